//! MCP jobs against real servers: the project's reference server, and one of the worker's own library.

use crate::support::*;
use serde_json::json;

fn everything() -> (EverythingServer, Database<'static>, postgres::Client) {
    let server = EverythingServer::start();
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "everything", json!({"url": server.url}));
    (server, database, client)
}

#[test]
fn the_reference_servers_tools_take_arguments_and_answer() {
    let (_server, _database, mut client) = everything();
    let echo = run_job(&mut client, "tool_invoke", "everything", Some("echo"), json!({"message": "grüße"}));
    assert_eq!(echo.completed()["content"][0]["text"], "Echo: grüße");
    let sum = run_job(&mut client, "tool_invoke", "everything", Some("get-sum"), json!({"a": 2, "b": 3}));
    assert_eq!(sum.completed()["content"][0]["text"], "The sum of 2 and 3 is 5.");
    let structured = run_job(
        &mut client,
        "tool_invoke",
        "everything",
        Some("get-structured-content"),
        json!({"location": "New York"}),
    );
    assert!(structured.completed()["structuredContent"].is_object());
}

#[test]
fn the_reference_servers_resources_and_prompts_are_fetched() {
    let (_server, _database, mut client) = everything();
    let uri = "demo://resource/dynamic/text/1";
    let resource = run_job(&mut client, "resource_fetch", "everything", None, json!({"uri": uri}));
    assert_eq!(resource.completed()["contents"][0]["uri"], uri);
    let prompt = run_job(&mut client, "prompt_execute", "everything", Some("args-prompt"), json!({"city": "Basel"}));
    assert!(prompt.completed()["messages"][0]["content"]["text"].as_str().unwrap_or_default().contains("Basel"));
}

#[test]
fn a_tool_that_reports_progress_for_seconds_completes() {
    let (_server, _database, mut client) = everything();
    let arguments = json!({"duration": 2, "steps": 4});
    let job = run_job(&mut client, "tool_invoke", "everything", Some("trigger-long-running-operation"), arguments);
    assert!(job.completed()["content"][0]["text"].as_str().unwrap_or_default().contains("completed"));
}

#[test]
fn an_unknown_tool_prompt_or_resource_is_a_failed_job_that_names_it() {
    let (_server, _database, mut client) = everything();
    let tool = run_job(&mut client, "tool_invoke", "everything", Some("no-such-tool"), json!({}));
    assert!(tool.failed().contains("no-such-tool"));
    let prompt = run_job(&mut client, "prompt_execute", "everything", Some("no-such-prompt"), json!({}));
    assert!(prompt.failed().contains("no-such-prompt"));
    let resource = run_job(&mut client, "resource_fetch", "everything", None, json!({"uri": "demo://nowhere"}));
    assert!(resource.failed().contains("demo://nowhere"));
}

fn own(flags: &[&str]) -> (McpServer, Database<'static>, postgres::Client) {
    let server = McpServer::start(flags);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    (server, database, client)
}

fn adds_up(client: &mut postgres::Client, count: i32) {
    let jobs: Vec<_> = (0..count)
        .map(|number| create_job(client, "tool_invoke", "demo", Some("add"), json!({"a": number, "b": 1})))
        .collect();
    for (number, job) in (0..count).zip(jobs) {
        assert_eq!(wait_for_job(client, job).completed()["structuredContent"]["sum"], number + 1);
    }
}

#[test]
fn the_stateless_protocol_is_spoken_where_the_server_knows_it() {
    let (server, _database, mut client) = own(&[]);
    adds_up(&mut client, 20);
    let stats = server.stats();
    assert_eq!(stats["initialize"], 0, "{stats}");
    assert_eq!(stats["discover"], 1, "one session serves all jobs: {stats}");
    assert_eq!(stats["tool_calls"], 20, "{stats}");
}

#[test]
fn one_session_of_the_older_protocol_serves_all_jobs_and_is_reopened_when_forgotten() {
    let (server, _database, mut client) = own(&["--legacy"]);
    adds_up(&mut client, 20);
    assert_eq!(server.stats()["initialize"], 1, "{}", server.stats());
    server.forget_sessions();
    adds_up(&mut client, 20);
    assert_eq!(server.stats()["initialize"], 2, "{}", server.stats());
}

#[test]
fn a_session_is_not_shared_between_credentials() {
    let (server, _database, mut client) = own(&["--legacy"]);
    adds_up(&mut client, 1);
    let mut other = server.config();
    other["headers"]["X-Tenant"] = json!("other");
    add_server(&mut client, "other", other);
    run_job(&mut client, "tool_invoke", "other", Some("echo"), json!({"text": "x"})).completed();
    assert_eq!(server.stats()["initialize"], 2, "{}", server.stats());
}

#[test]
fn every_call_carries_the_jobs_id_as_idempotency_key() {
    let (server, _database, mut client) = own(&[]);
    let job = create_job(&mut client, "tool_invoke", "demo", Some("echo"), json!({"text": "x"}));
    wait_for_job(&mut client, job).completed();
    let keys = server.stats()["idempotency_keys"].clone();
    assert!(keys.as_array().is_some_and(|keys| keys.contains(&json!(job.to_string()))), "{keys}");
}

#[test]
fn the_own_servers_resource_prompt_and_slow_tool_work() {
    let (_server, _database, mut client) = own(&[]);
    let resource = run_job(&mut client, "resource_fetch", "demo", None, json!({"uri": "note://welcome"}));
    assert_eq!(resource.completed()["contents"][0]["uri"], "note://welcome");
    let prompt = run_job(&mut client, "prompt_execute", "demo", Some("greet"), json!({"name": "Ada"}));
    assert!(prompt.completed().to_string().contains("Ada"));
    run_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 300, "steps": 3})).completed();
}

/// A server of the older protocol that answers calls with one fixed result.
fn fixed(result: &'static str) -> FakeServer {
    FakeServer::start(move |request| {
        let body = request.split_once("\r\n\r\n")?.1;
        let message: serde_json::Value = serde_json::from_str(body).ok()?;
        let id = &message["id"];
        match message["method"].as_str()? {
            "server/discover" => {
                let error = json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32601, "message": "unknown method"}});
                Some(Answer::json(&error.to_string()))
            }
            "initialize" => {
                let result = json!({"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                    "serverInfo": {"name": "fixed", "version": "1"}});
                Some(Answer::json(&json!({"jsonrpc": "2.0", "id": id, "result": result}).to_string()))
            }
            "tools/call" => Some(Answer::json(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#))),
            _ => Some(Answer::new("202 Accepted", "text/plain", "")),
        }
    })
}

fn call_fixed(result: &'static str) -> (Job, String) {
    let server = fixed(result);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "fixed", json!({"url": server.url}));
    let job = run_job(&mut client, "tool_invoke", "fixed", Some("t"), json!({}));
    (job, value(&mut client, "SELECT result::text FROM job_results"))
}

#[test]
fn the_result_is_what_the_server_sent_with_unknown_parts_and_exact_numbers() {
    let (job, text) = call_fixed(
        r#"{"content":[{"type":"hologram","size":12345678901234567890123,"price":1.10}],"x-vendor":{"a":null}}"#,
    );
    let result = job.completed();
    assert_eq!(result["x-vendor"], json!({"a": null}));
    assert!(text.contains("12345678901234567890123") && text.contains("1.10"), "{text}");
}

#[test]
fn a_result_with_a_zero_character_is_stored_with_a_replacement() {
    let (job, _) = call_fixed(r#"{"content":[{"type":"text","text":"a\u0000b"}]}"#);
    assert_eq!(job.completed()["content"][0]["text"], "a\u{fffd}b");
}

#[test]
fn a_server_that_asks_for_input_from_a_person_gets_none_and_the_job_says_so() {
    let (job, _) = call_fixed(r#"{"resultType":"input_required","inputRequests":{}}"#);
    assert!(job.failed().contains("input from a person"));
}

#[test]
fn a_session_forgotten_while_a_call_runs_fails_that_call_and_no_other() {
    let (server, _database, mut client) = own(&["--legacy"]);
    let job = create_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 25000}));
    wait_until("the call runs", || server.stats()["tool_calls"] == 1);
    server.forget_sessions();
    let error = wait_for_job(&mut client, job).failed();
    assert!(error.starts_with("the connection broke before the answer was complete: the server"), "{error}");
    adds_up(&mut client, 3);
}

#[test]
fn a_stream_that_ends_without_an_answer_fails_the_job_at_once() {
    let server = FakeServer::start(|request| {
        let body: serde_json::Value = serde_json::from_str(request.split_once("\r\n\r\n")?.1).ok()?;
        if body["method"] == "server/discover" {
            let error = json!({"jsonrpc": "2.0", "id": body["id"], "error": {"code": -32601, "message": "?"}});
            return Some(Answer::json(&error.to_string()));
        }
        if body["method"] == "initialize" {
            let result = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}});
            return Some(Answer::json(&json!({"jsonrpc": "2.0", "id": body["id"], "result": result}).to_string()));
        }
        if body["method"] == "tools/call" {
            return Some(Answer::new("200 OK", "text/event-stream", ": nothing\n\n"));
        }
        Some(Answer::new("202 Accepted", "text/plain", ""))
    });
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "s", json!({"url": server.url}));
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.ends_with("the server ended the stream without an answer"), "{error}");
}

#[test]
fn a_call_may_take_longer_than_a_session_may_be_idle() {
    let cluster = Cluster::start(&["nexus_hub.session_idle_timeout = '1s'"]);
    let database = cluster.database();
    let server = McpServer::start(&["--legacy"]);
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    run_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 3500})).completed();
}

#[test]
fn numbers_in_arguments_reach_the_server_as_they_stand_in_the_job() {
    let server = fixed("{\"content\": []}");
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "fixed", json!({"url": server.url}));
    client
        .batch_execute(&format!(
            "SELECT create_job('{ALICE}', 'tool_invoke', 'fixed', 't', '{{\"n\": 12345678901234567890123, \"x\": 0.1000}}')"
        ))
        .expect("create_job");
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
    let requests = server.requests();
    let call = requests.iter().find(|request| request.contains("tools/call")).expect("the call");
    assert!(call.contains("12345678901234567890123") && call.contains("0.1000"), "{call}");
}
