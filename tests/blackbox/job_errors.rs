//! How jobs fail, in words that a person understands.

use crate::support::*;
use serde_json::{Value, json};

/// The error of a tool call to a server with this config.
fn error_with(config: Value) -> String {
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "s", config);
    run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed()
}

/// The error of a tool call to a server that answers everything alike.
fn error_answered(answer: impl Fn() -> Answer + Send + Sync + 'static) -> String {
    let server = FakeServer::start(move |_| Some(answer()));
    error_with(json!({"url": server.url}))
}

#[test]
fn an_unknown_server_is_named() {
    let database = shared().database();
    let mut client = database.connect();
    let error = run_job(&mut client, "tool_invoke", "nowhere", Some("t"), json!({})).failed();
    assert_eq!(error, "there is no server \"nowhere\" for this user: add it with add_server, or check the name");
}

#[test]
fn another_users_server_is_an_unknown_server() {
    let database = shared().database();
    let mut client = database.connect();
    let bob: uuid::Uuid = BOB.parse().expect("a uuid");
    client
        .execute("SELECT add_server('s', 's', '{\"url\": \"http://127.0.0.1:1/\"}', $1)", &[&bob])
        .expect("add_server");
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.starts_with("there is no server \"s\""), "{error}");
}

#[test]
fn a_disabled_server_is_told_apart_and_gives_way_to_an_enabled_system_server() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "s", json!({"url": "http://127.0.0.1:1/"}));
    client.execute("SELECT update_server($1, p_enabled => false)", &[&id]).expect("update_server");
    let error = run_job(&mut client, "tool_invoke", "s", Some("echo"), json!({"text": "x"})).failed();
    assert_eq!(error, "the server \"s\" is disabled");
    client
        .execute("INSERT INTO system_servers (id, name, config) VALUES ('s', 's', $1)", &[&server.config()])
        .expect("a system server");
    run_job(&mut client, "tool_invoke", "s", Some("echo"), json!({"text": "x"})).completed();
    client.execute("UPDATE system_servers SET enabled = false", &[]).expect("update");
    let error = run_job(&mut client, "tool_invoke", "s", Some("echo"), json!({"text": "x"})).failed();
    assert_eq!(error, "the server \"s\" is disabled");
}

#[test]
fn a_bad_url_is_explained_without_quoting_it() {
    let database = shared().database();
    let mut client = database.connect();
    for (config, problem) in [
        (json!({"url": "ftp://user:hunter2@host/"}), "\"url\" must begin with http:// or https://"),
        (json!({"url": "hunter2"}), "\"url\" is not a valid URL: relative URL without a base"),
        (json!({}), "\"url\" is missing"),
    ] {
        client
            .execute(
                "INSERT INTO system_servers (id, name, config) VALUES ('s', 's', $1)
                 ON CONFLICT (id) DO UPDATE SET config = excluded.config",
                &[&config],
            )
            .expect("a system server");
        let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
        assert_eq!(error, format!("the config of server \"s\" cannot be used: {problem}"));
    }
}

#[test]
fn a_refused_connection_names_address_and_reason() {
    let error = error_with(json!({"url": "http://127.0.0.1:1/mcp"}));
    assert_eq!(error, "could not connect to 127.0.0.1:1: connection refused");
}

#[test]
fn an_unknown_host_is_named() {
    let error = error_with(json!({"url": "http://no-such-host.invalid/mcp"}));
    assert_eq!(error, "could not find the host \"no-such-host.invalid\"");
}

#[test]
fn wrong_credentials_are_explained_and_never_shown() {
    let server = McpServer::start(&[]);
    let error = error_with(json!({"url": server.url, "headers": {"Authorization": "Bearer wr0ng-t0ken"}}));
    assert!(error.starts_with("the server answered 401 Unauthorized: it does not accept the credentials"), "{error}");
    assert!(!error.contains("wr0ng-t0ken"), "{error}");
}

#[test]
fn credentials_that_a_server_echoes_are_redacted() {
    let server = FakeServer::start(|request| {
        let token = request.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or_default();
        Some(Answer::new("403 Forbidden", "text/plain", format!("no way, {token}")))
    });
    let error = error_with(json!({"url": server.url, "headers": {"Authorization": "Bearer s3cr3t-t0ken"}}));
    assert!(error.ends_with("(no way, [redacted])"), "{error}");
}

#[test]
fn an_echoed_credential_at_the_end_of_a_long_text_is_not_cut_but_redacted() {
    let server = FakeServer::start(|request| {
        let token = request.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or_default();
        Some(Answer::new("403 Forbidden", "text/plain", format!("{} {token}", "x".repeat(560))))
    });
    for padding in 0..40 {
        let token = format!("Bearer {}s3cr3t-t0ken", "p".repeat(padding));
        let error = error_with(json!({"url": server.url, "headers": {"Authorization": token}}));
        assert!(!error.contains("s3cr") && !error.contains("ppp"), "{error}");
    }
}

#[test]
fn a_404_says_that_nothing_is_served_there() {
    let error = error_answered(|| Answer::new("404 Not Found", "text/html", "<html>nginx</html>"));
    assert_eq!(error, "the server answered 404 Not Found: nothing is served at that URL");
}

#[test]
fn a_500_comes_with_the_servers_own_words() {
    let error = error_answered(|| Answer::new("500 Internal Server Error", "text/plain", "database\n is on fire"));
    assert_eq!(error, "the server answered 500 Internal Server Error (database is on fire)");
}

#[test]
fn an_answer_that_is_not_json_is_not_mcp() {
    let error = error_answered(|| Answer::new("200 OK", "text/html; charset=utf-8", "<html>hello</html>"));
    assert_eq!(
        error,
        "the server does not speak MCP at that URL: it answered with content type text/html; charset=utf-8"
    );
    let error = error_answered(|| Answer::json("{broken"));
    assert_eq!(error, "the server does not speak MCP at that URL: it answered with text that is not JSON");
}

#[test]
fn json_that_is_not_mcp_is_told_so() {
    let error = error_answered(|| Answer::json(r#"{"hello": "world"}"#));
    assert_eq!(error, "the server does not speak MCP at that URL: it answered with JSON that is not JSON-RPC");
}

#[test]
fn a_tool_that_reports_an_error_fails_with_its_text_and_keeps_its_result() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    let job = run_job(&mut client, "tool_invoke", "demo", Some("fail"), json!({"message": "out of paper"}));
    assert_eq!(job.result.as_ref().expect("kept")["isError"], true);
    assert!(job.failed().starts_with("the tool reported an error: out of paper"));
}

#[test]
fn a_time_out_says_how_long_was_waited() {
    let server = McpServer::start(&[]);
    let mut config = server.config();
    config["timeout_ms"] = json!(300);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "demo", config);
    let job = run_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 30000}));
    assert_eq!(job.failed(), "timed out: no answer within 300 ms");
    let silent = FakeServer::start(|_| {
        std::thread::park();
        None
    });
    assert_eq!(error_with(json!({"url": silent.url, "timeout_ms": 300})), "timed out: no answer within 300 ms");
}

#[test]
fn a_connection_that_breaks_is_told_from_one_that_never_came() {
    let server = FakeServer::start(|_| None);
    let error = error_with(json!({"url": server.url}));
    assert!(error.starts_with("the connection broke before the answer was complete"), "{error}");
}

#[test]
fn an_answer_that_is_too_large_is_not_kept() {
    let server = FakeServer::start(|_| Some(Answer::json(&format!("\"{}\"", "x".repeat(20 << 20)))));
    let error = error_with(json!({"url": server.url}));
    assert_eq!(error, "the answer is larger than 16777216 bytes (nexus_hub.max_response_bytes)");
}

#[test]
fn a_missing_vault_key_is_explained() {
    let cluster = Cluster::start(&["nexus_hub.vault_key_file = ''"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO user_servers (user_id, server_id, name, config_encrypted) VALUES ($1, 's', 's', $2)",
            &[&ALICE.parse::<uuid::Uuid>().expect("a uuid"), &vec![0u8; 64]],
        )
        .expect("a row from another server");
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.ends_with("no vault key is configured"), "{error}");
}

#[test]
fn a_config_that_no_key_opens_is_explained() {
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "s", json!({"url": "http://127.0.0.1:1/"}));
    client
        .execute("UPDATE user_servers SET config_encrypted = set_byte(config_encrypted, 0, 255 - get_byte(config_encrypted, 0))", &[])
        .expect("update");
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.contains("the value cannot be decrypted"), "{error}");
}
