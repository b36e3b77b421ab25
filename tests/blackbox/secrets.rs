//! Named secrets: where they are filled in, for whom, and that nothing shows them afterwards.

use crate::support::*;
use postgres::Client;
use serde_json::{Value, json};
use uuid::Uuid;

/// Has everything that has to be escaped somewhere: in URLs, in JSON, in both.
const VALUE: &str = "s3cr3t/\"ü&=+ %2e\\v4lue";
const ENCODED: &str = "s3cr3t%2F%22%C3%BC%26%3D%2B%20%252e%5Cv4lue";

fn scene() -> (Database<'static>, Client) {
    let database = shared().database();
    let client = database.connect();
    (database, client)
}

/// Stores a secret of a user, or a shared one.
fn set(client: &mut Client, user: Option<&str>, name: &str, text: &str) {
    let user: Option<Uuid> = user.map(|user| user.parse().expect("a uuid"));
    client.query_one("SELECT create_secret($1, $2, $3)", &[&name, &text, &user]).expect("create_secret");
}

fn set_system_server(client: &mut Client, config: Value) {
    client
        .execute("INSERT INTO system_servers (id, name, config) VALUES ('system', 'System', $1)", &[&config])
        .expect("a system server");
}

fn run_for(client: &mut Client, user: Option<&str>, job_type: &str, server: Option<&str>, params: Value) -> Job {
    let user: Option<Uuid> = user.map(|user| user.parse().expect("a uuid"));
    let job = client
        .query_one("SELECT create_job($1, $2, $3, $4, $5)", &[&user, &job_type, &server, &server.map(|_| "t"), &params])
        .expect("create_job")
        .get(0);
    wait_for_job(client, job)
}

/// The value of a header of a request.
fn header(request: &str, name: &str) -> String {
    let head = request.split("\r\n\r\n").next().unwrap_or_default();
    let value = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    value.unwrap_or_else(|| panic!("no {name} in {head}")).to_owned()
}

fn silent() -> FakeServer {
    FakeServer::start(|_| Some(Answer::json("{}")))
}

/// An MCP server of the older protocol. `answer` makes the rest of the reply to a tool call from its X-Key header.
fn mcp(answer: impl Fn(&str) -> Value + Send + Sync + 'static) -> FakeServer {
    FakeServer::start(move |request| {
        let message: Value = serde_json::from_str(request.split_once("\r\n\r\n")?.1).ok()?;
        let mut reply = match message["method"].as_str()? {
            "server/discover" => json!({"error": {"code": -32601, "message": "unknown method"}}),
            "initialize" => json!({"result": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                              "serverInfo": {"name": "echo", "version": "1"}}}),
            "tools/call" => answer(&header(request, "x-key")),
            _ => return Some(Answer::new("202 Accepted", "text/plain", "")),
        };
        reply["jsonrpc"] = json!("2.0");
        reply["id"] = message["id"].clone();
        Some(Answer::json(&reply.to_string()))
    })
}

/// What the database shows of a text, and the server's log.
fn is_shown(database: &Database<'_>, text: &str) -> bool {
    let mut client = database.connect();
    let query = "SELECT EXISTS (SELECT FROM job_results j WHERE position($1 IN j::text || (j.result #>> '{}')) > 0)
                     OR EXISTS (SELECT FROM job_attempts a WHERE position($1 IN a::text) > 0)
                     OR EXISTS (SELECT FROM circuit_breakers b WHERE position($1 IN b::text) > 0)";
    client.query_one(query, &[&text]).expect("the tables").get::<_, bool>(0) || database.cluster.log().contains(text)
}

#[test]
fn secrets_are_filled_into_headers_and_url_and_the_row_keeps_the_placeholders() {
    let server = silent();
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    set(&mut client, None, "user", "us:er");
    let authority = server.url.trim_start_matches("http://").trim_end_matches('/');
    let url = format!(
        "http://{{{{secret:user}}}}:{{{{secret:key}}}}@{authority}/a/{{{{secret:key}}}}/b?k={{{{secret:key}}}}&l=1"
    );
    let params =
        json!({"url": url, "headers": {"X-Key": "a {{secret:key}}, {{secret:user}}"}, "body": {"a": "{{secret:key}}"}});
    run_http(&mut client, params.clone()).completed();
    let request = server.requests().remove(0);
    assert!(request.starts_with(&format!("POST /a/{ENCODED}/b?k={ENCODED}&l=1 HTTP/1.1\r\n")), "{request}");
    assert_eq!(header(&request, "x-key"), format!("a {VALUE}, us:er"));
    assert_eq!(header(&request, "host"), authority);
    // "us:er:…" in base64.
    assert!(header(&request, "authorization").starts_with("Basic dXM6ZXI6czNjcjN0Ly"), "{request}");
    assert!(request.ends_with("{\"a\": \"{{secret:key}}\"}"), "a body is sent as it is: {request}");
    let kept: Value = value(&mut client, "SELECT params FROM job_results");
    assert_eq!(kept, params);
    assert!(!is_shown(&database, "s3cr3t"));
}

#[test]
fn a_header_that_is_given_goes_before_the_credentials_in_the_url() {
    let server = silent();
    let (_database, mut client) = scene();
    let url = server.url.replace("http://", "http://user:password@");
    run_http(&mut client, json!({"url": url})).completed();
    run_http(&mut client, json!({"url": url, "headers": {"Authorization": "Bearer t"}})).completed();
    let sent: Vec<_> = server.requests().iter().map(|request| header(request, "authorization")).collect();
    assert_eq!(sent, ["Basic dXNlcjpwYXNzd29yZA==", "Bearer t"]);
}

#[test]
fn a_users_own_server_gets_that_users_secrets_and_never_a_shared_one() {
    let server = mcp(|key| json!({"result": {"content": [{"type": "text", "text": format!("{}", key.len())}]}}));
    let (database, mut client) = scene();
    set(&mut client, None, "token", "shared-s3cr3t");
    set(&mut client, Some(BOB), "token", "bobs-s3cr3t");
    for config in [
        json!({"url": server.url, "headers": {"X-Key": "{{secret:token}}"}}),
        json!({"url": format!("{}{{{{secret:token}}}}", server.url)}),
        json!({"url": server.url.replace("://", "://{{secret:token}}@")}),
    ] {
        add_server(&mut client, "own", config);
        let error = run_job(&mut client, "tool_invoke", "own", Some("t"), json!({})).failed();
        assert_eq!(
            error,
            "the user has no secret \"token\", and in a user's own server shared ones are not used: add it with create_secret"
        );
        client.batch_execute("SELECT delete_server(id) FROM user_servers").expect("delete_server");
    }
    assert!(server.requests().is_empty(), "nothing was sent");
    set(&mut client, Some(ALICE), "token", "alices-s3cr3t");
    add_server(&mut client, "own", json!({"url": server.url, "headers": {"X-Key": "{{secret:token}}"}}));
    run_job(&mut client, "tool_invoke", "own", Some("t"), json!({})).completed();
    assert!(server.requests().iter().all(|request| header(request, "x-key") == "alices-s3cr3t"));
    assert!(!is_shown(&database, "s3cr3t"));
}

#[test]
fn http_jobs_and_system_servers_use_the_jobs_users_secret_and_else_the_shared_one() {
    let (server, endpoint) = (mcp(|_| json!({"result": {"content": []}})), silent());
    let (_database, mut client) = scene();
    set_system_server(&mut client, json!({"url": server.url, "headers": {"X-Key": "{{secret:token}}"}}));
    set(&mut client, None, "token", "shared");
    set(&mut client, Some(ALICE), "token", "alices");
    let params = json!({"url": endpoint.url, "headers": {"X-Key": "{{secret:token}}"}});
    for (user, key) in [(Some(ALICE), "alices"), (Some(BOB), "shared"), (None, "shared")] {
        let sent = server.requests().len();
        run_for(&mut client, user, "tool_invoke", Some("system"), json!({})).completed();
        run_for(&mut client, user, "http_request", None, params.clone()).completed();
        let requests = server.requests();
        assert!(requests.len() > sent);
        let last = endpoint.requests().pop();
        assert!(
            requests[sent..].iter().chain(&last).all(|request| header(request, "x-key") == key),
            "{user:?} {requests:?}"
        );
    }
    client.batch_execute("SELECT delete_secret('token')").expect("delete_secret");
    run_for(&mut client, Some(ALICE), "tool_invoke", Some("system"), json!({})).completed();
    let error = run_for(&mut client, Some(BOB), "tool_invoke", Some("system"), json!({})).failed();
    assert_eq!(error, "there is no secret \"token\", the user's own or shared: add it with create_secret");
    let error = run_for(&mut client, None, "http_request", None, params).failed();
    assert_eq!(error, "there is no shared secret \"token\": add it with create_secret, as service_role");
}

#[test]
fn an_mcp_session_is_not_shared_between_values_and_a_new_value_is_used_by_the_next_job() {
    let server = McpServer::start(&["--legacy"]);
    let (_database, mut client) = scene();
    let config = json!({"url": server.url, "headers": {"Authorization": "Bearer {{secret:token}}", "X-Tenant": "{{secret:tenant}}"}});
    set_system_server(&mut client, config);
    set(&mut client, None, "token", "wrong-s3cr3t");
    for user in [ALICE, BOB] {
        set(&mut client, Some(user), "tenant", user);
    }
    let call = |client: &mut Client, user| {
        let job: Uuid = client
            .query_one(
                "SELECT create_job($1::text::uuid, 'tool_invoke', 'system', 'add', '{\"a\": 1, \"b\": 2}')",
                &[&user],
            )
            .expect("create_job")
            .get(0);
        wait_for_job(client, job)
    };
    let error = call(&mut client, ALICE).failed();
    assert!(error.contains("401") && !error.contains("s3cr3t"), "{error}");
    client.query_one("SELECT update_secret('token', $1)", &[&"demo-token-5up3r-s3cr3t"]).expect("update_secret");
    for user in [ALICE, BOB, ALICE, BOB] {
        assert_eq!(call(&mut client, user).completed()["structuredContent"]["sum"], 3);
    }
    assert_eq!(server.stats()["initialize"], 2, "{}", server.stats());
}

#[test]
fn an_unknown_or_undecipherable_secret_fails_the_job_at_once() {
    let server = silent();
    let (_database, mut client) = scene();
    set(&mut client, None, "mine", "s3cr3t-1");
    set(&mut client, None, "moved", "s3cr3t-2");
    client
        .batch_execute("UPDATE _nexus_hub.secrets SET value_encrypted = (SELECT value_encrypted FROM _nexus_hub.secrets WHERE name = 'mine') WHERE name = 'moved'")
        .expect("a ciphertext is moved to another row");
    let both = json!({"url": server.url, "headers": {"A": "{{secret:mine}}", "B": "{{secret:nothing}}"}});
    let moved = json!({"url": format!("{}?{{{{secret:moved}}}}", server.url)});
    for (params, problem) in [
        (both, "there is no shared secret \"nothing\": add it with create_secret, as service_role"),
        (moved, "the secret \"moved\" cannot be used: the value cannot be decrypted; update_secret sets it anew"),
    ] {
        let job = client
            .query_one("SELECT create_job(NULL, 'http_request', NULL, NULL, $1)", &[&params])
            .expect("a job")
            .get(0);
        assert_eq!(wait_for_job(&mut client, job).failed(), problem);
        let attempts: i64 =
            client.query_one("SELECT count(*) FROM get_job_attempts($1)", &[&job]).expect("attempts").get(0);
        assert_eq!(attempts, 1, "it was tried again");
    }
    assert!(server.requests().is_empty());
}

#[test]
fn a_job_with_a_bad_placeholder_is_not_sent_and_one_that_has_nothing_to_fill_in_is() {
    let server = silent();
    let (_database, mut client) = scene();
    set(&mut client, None, "name", "127.0.0.1:1");
    for (params, problem) in [
        (
            json!({"url": server.url, "headers": {"X": "{{secret:name}"}}),
            "the header \"X\" has a placeholder that is not",
        ),
        (json!({"url": format!("{}{{{{secret:a b}}}}", server.url)}), "\"url\" has a placeholder that is not"),
        (json!({"url": "http://{{secret:name}}/"}), "\"url\" is not a valid URL"),
        (json!({"url": server.url.trim_end_matches('/').to_owned() + "{{secret:name}}"}), "\"url\" is not a valid URL"),
        (json!({"url": "{{secret:name}}"}), "\"url\" is not a valid URL"),
        (
            json!({"url": format!("{}{{{{secret:name}}}}/..", server.url)}),
            "\"url\" has a placeholder where none can be",
        ),
        (json!({"url": server.url, "headers": {"X-{{secret:name}}": "x"}}), "not a valid header name"),
    ] {
        let error = run_http(&mut client, params.clone()).failed();
        assert!(error.starts_with("bad request: ") && error.contains(problem), "{params}: {error}");
    }
    assert!(server.requests().is_empty());
    let others = json!({"url": server.url, "headers": {"X": "{{name}} {{ secret:name }}"}, "body": "{{secret:"});
    run_http(&mut client, others).completed();
    assert_eq!(header(&server.requests()[0], "x"), "{{name}} {{ secret:name }}");
}

#[test]
fn a_value_cannot_lead_a_request_elsewhere() {
    let server = silent();
    let (database, mut client) = scene();
    for (number, text) in
        ["..", ".", "../../admin", "@evil.example/", "a?b#c", "{{secret:v0}}", "%2e%2e"].iter().enumerate()
    {
        set(&mut client, None, &format!("v{number}"), text);
        let url = format!("{}a/{{{{secret:v{number}}}}}/c", server.url);
        let job = run_http(&mut client, json!({"url": url}));
        if number < 2 {
            let error = format!(
                "the secret \"v{number}\" cannot stand in \"url\": with its value, the URL would lead elsewhere"
            );
            assert_eq!(job.failed(), error);
        } else {
            job.completed();
        }
    }
    let paths: Vec<_> =
        server.requests().iter().map(|request| request.split(' ').nth(1).unwrap_or_default().to_owned()).collect();
    assert_eq!(
        paths,
        [
            "/a/..%2F..%2Fadmin/c",
            "/a/%40evil.example%2F/c",
            "/a/a%3Fb%23c/c",
            "/a/%7B%7Bsecret%3Av0%7D%7D/c",
            "/a/%252e%252e/c"
        ]
    );
    assert!(!is_shown(&database, "evil.example"));
}

#[test]
fn a_redirect_to_another_origin_leaves_the_secret_behind() {
    let other = silent();
    let location = other.url.clone();
    let server = FakeServer::start(move |_| {
        let mut answer = Answer::new("302 Found", "text/plain", "");
        answer.headers.push(("Location", location.clone()));
        Some(answer)
    });
    let (_database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    let url = server.url.replace("://", "://{{secret:key}}@");
    run_http(&mut client, json!({"url": url, "headers": {"X-Key": "{{secret:key}}"}})).completed();
    assert!(
        server.requests()[0].contains(VALUE) && header(&server.requests()[0], "authorization").starts_with("Basic ")
    );
    let request = other.requests().remove(0);
    assert!(!request.contains("s3cr3t") && !request.contains("authorization"), "{request}");
}

#[test]
fn a_redirect_within_the_origin_keeps_the_credentials_of_the_url() {
    let server = FakeServer::start(|request| {
        if !request.starts_with("GET / ") {
            return Some(Answer::json("{}"));
        }
        let mut answer = Answer::new("302 Found", "text/plain", "");
        answer.headers.push(("Location", format!("http://{}/next", header(request, "host"))));
        Some(answer)
    });
    let (_database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    run_http(&mut client, json!({"url": server.url.replace("://", "://{{secret:key}}@")})).completed();
    let sent: Vec<_> = server.requests().iter().map(|request| header(request, "authorization")).collect();
    assert!(sent.len() == 2 && sent[0] == sent[1] && sent[0].starts_with("Basic "), "{sent:?}");
}

/// Runs an HTTP job whose server answers as `answer` says, given the secret.
fn echoed(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Job {
    let server = FakeServer::start(move |request| Some(answer(&header(request, "x-key"))));
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    let url = format!("{}?k={{{{secret:key}}}}", server.url);
    let job = run_http(&mut client, json!({"url": url, "headers": {"X-Key": "{{secret:key}}"}}));
    assert!(server.requests()[0].contains(VALUE), "it was sent");
    assert!(!is_shown(&database, "s3cr3t") && !is_shown(&database, "v4lue"), "{job:?}");
    job
}

#[test]
fn an_answer_that_gives_the_secret_back_is_kept_with_the_placeholder() {
    let body = |job: Job| job.completed()["body"].clone();
    let json_body =
        |key: &str| json!({"key": key, key: [key, 1.10, true], "url": format!("/?k={ENCODED}&l=1")}).to_string();
    let shown = json!({"key": "{{secret:key}}", "{{secret:key}}": ["{{secret:key}}", 1.10, true], "url": "/?k={{secret:key}}&l=1"});
    assert_eq!(body(echoed(move |key| Answer::json(&json_body(key)))), shown);
    // Escaped as nobody does.
    let escaped = |key: &str| {
        let units: String = key.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        Answer::json(&format!("{{\"k\": \"{units}\", \"n\": 1.10}}"))
    };
    assert_eq!(body(echoed(escaped)), json!({"k": "{{secret:key}}", "n": 1.10}));
    let text = echoed(|key| Answer::new("200 OK", "text/html", format!("<p>{key}</p>{}", json!({ "k": key }))));
    assert_eq!(body(text), "<p>{{secret:key}}</p>{\"k\":\"{{secret:key}}\"}");
    let bytes = echoed(|key| Answer::new("200 OK", "image/png", [&[0xff, 0][..], key.as_bytes()].concat()));
    // ff 00 {{secret:key}}
    assert_eq!(bytes.completed()["body_base64"], "/wB7e3NlY3JldDprZXl9fQ==");
    let header = echoed(|key| {
        let mut answer = Answer::json("{}");
        answer.headers.push(("X-Echo", format!("<{key}>")));
        answer
    });
    assert_eq!(header.completed()["headers"]["x-echo"], "<{{secret:key}}>");
    let refused = echoed(|key| Answer::new("403 Forbidden", "text/plain", format!("{key} is not known")));
    assert_eq!(refused.result.as_ref().expect("kept")["body"], "{{secret:key}} is not known");
    assert_eq!(refused.failed(), "the server answered 403 Forbidden");
}

#[test]
fn large_answers_and_numbers_are_searched_too() {
    let server = FakeServer::start(|request| {
        let key = header(request, "x-key");
        Some(Answer::json(&format!("[{key}, 1{key}.5, \"{}\", \"{key}\"]", "x".repeat(1_000_000))))
    });
    let (database, mut client) = scene();
    set(&mut client, None, "pin", "8473625");
    run_http(&mut client, json!({"url": server.url, "headers": {"X-Key": "{{secret:pin}}"}})).completed();
    let ends: String = value(
        &mut client,
        "SELECT concat_ws(' ', result #>> '{body,0}', result #>> '{body,1}', result #>> '{body,3}') FROM job_results",
    );
    assert_eq!(ends, "{{secret:pin}} {{secret:pin}} {{secret:pin}}");
    assert!(!is_shown(&database, "8473625"));
}

/// Runs a tool call at a system server that answers as `answer` says, given the secret.
fn told(answer: impl Fn(&str) -> Value + Send + Sync + 'static) -> Job {
    let server = mcp(answer);
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    set_system_server(&mut client, json!({"url": server.url, "headers": {"X-Key": "{{secret:key}}"}}));
    let job = run_for(&mut client, Some(ALICE), "tool_invoke", Some("system"), json!({"echo": "{{secret:key}}"}));
    assert!(server.requests().iter().all(|request| header(request, "x-key") == VALUE));
    assert!(
        server.requests().iter().any(|request| request.contains("\"echo\": \"{{secret:key}}\"")),
        "arguments are sent as they are"
    );
    assert!(!is_shown(&database, "s3cr3t") && !is_shown(&database, "v4lue"), "{job:?}");
    job
}

#[test]
fn an_mcp_server_that_gives_the_secret_back_is_kept_with_the_placeholder() {
    let content = |text: String| json!([{"type": "text", "text": text}]);
    let result = told(
        move |key| json!({"result": {"content": content(format!("you are {key}")), "structuredContent": {"key": key}}}),
    );
    let shown =
        json!({"content": content("you are {{secret:key}}".into()), "structuredContent": {"key": "{{secret:key}}"}});
    assert_eq!(result.completed(), shown);
    let reported = told(move |key| json!({"result": {"content": content(format!("bad key {key}")), "isError": true}}));
    assert_eq!(reported.result.as_ref().expect("kept")["content"][0]["text"], "bad key {{secret:key}}");
    assert_eq!(reported.failed(), "the tool reported an error: bad key {{secret:key}}");
    let refused = told(|key| json!({"error": {"code": -32000, "message": format!("bad key {key}!")}}));
    assert_eq!(refused.failed(), "the server refused the call: bad key {{secret:key}}! (MCP error -32000)");
}

#[test]
fn a_refusal_by_status_shows_the_placeholder() {
    let server =
        FakeServer::start(|request| Some(Answer::new("401 Unauthorized", "text/plain", header(request, "x-key"))));
    let (database, mut client) = scene();
    set(&mut client, Some(ALICE), "key", VALUE);
    add_server(&mut client, "own", json!({"url": server.url, "headers": {"X-Key": "{{secret:key}}"}}));
    let error = run_job(&mut client, "tool_invoke", "own", Some("t"), json!({})).failed();
    assert!(error.contains("401 Unauthorized") && error.ends_with("({{secret:key}})"), "{error}");
    assert!(!is_shown(&database, "s3cr3t"));
}

#[test]
fn of_two_secrets_the_longer_one_is_named_and_nothing_of_either_is_left() {
    let server = FakeServer::start(|request| Some(Answer::new("200 OK", "text/plain", header(request, "x-key"))));
    let (_database, mut client) = scene();
    set(&mut client, None, "short", "t0ken");
    set(&mut client, None, "long", "my-t0ken-1");
    let params =
        json!({"url": server.url, "headers": {"X-Key": "{{secret:short}} {{secret:long}} my-{{secret:short}}"}});
    assert_eq!(
        run_http(&mut client, params).completed()["body"],
        "{{secret:short}} {{secret:long}} my-{{secret:short}}"
    );
}

#[test]
fn an_unreachable_hosts_breaker_and_attempts_tell_nothing() {
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    let closed = ClosedPort::reserve();
    let port = closed.address().port();
    let params = json!({"url": format!("http://{{{{secret:key}}}}@127.0.0.1:{port}/{{{{secret:key}}}}"), "headers": {"X": "{{secret:key}}"}});
    for _ in 0..5 {
        let error = run_http(&mut client, params.clone()).failed();
        assert!(error.contains("connection refused"), "{error}");
    }
    wait_until("the breaker is shown", || value(&mut client, "SELECT count(*) = 1 FROM circuit_breakers"));
    assert!(!is_shown(&database, "s3cr3t"));
}

#[test]
fn an_executor_elsewhere_gets_no_secret_and_http_jobs_get_theirs() {
    let executor = FakeServer::start(|_| Some(Answer::json("{}")));
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    set(&mut client, Some(ALICE), "key", VALUE);
    add_server(
        &mut client,
        "own",
        json!({"url": executor.url, "headers": {"X-Key": "{{secret:key}} {{secret:nothing}}"}}),
    );
    shared()
        .connect("postgres")
        .batch_execute(&format!(
            "ALTER DATABASE {0} SET nexus_hub.executor = 'edge'; ALTER DATABASE {0} SET app.edge_function_url = '{1}';
             ALTER DATABASE {0} SET app.service_role_key = 'role-key'",
            database.name,
            executor.url.trim_end_matches('/')
        ))
        .expect("ALTER DATABASE");
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    let mut error = String::new();
    wait_until("the executor is asked", || {
        error = run_job(&mut client, "tool_invoke", "own", Some("t"), json!({})).failed();
        error.contains("left the job unfinished")
    });
    assert!(executor.requests().iter().all(|request| !request.contains("s3cr3t")));
    let params = json!({"url": executor.url, "headers": {"X-Key": "{{secret:key}}"}});
    run_http(&mut client, params).completed();
    assert_eq!(header(executor.requests().last().expect("a request"), "x-key"), VALUE);
}

#[test]
fn secrets_survive_dump_and_restore_and_no_dump_shows_them() {
    let server = silent();
    let (database, mut client) = scene();
    set(&mut client, None, "key", VALUE);
    assert!(database.dump().contains("_nexus_hub.secrets") && !database.dump().contains("s3cr3t"));
    let copy = shared().empty_database();
    database.copy_to(&copy);
    run_http(&mut copy.connect(), json!({"url": server.url, "headers": {"X-Key": "{{secret:key}}"}})).completed();
    assert_eq!(header(&server.requests()[0], "x-key"), VALUE);
}

#[test]
fn jobs_of_one_batch_get_each_the_secrets_of_their_user() {
    let server = silent();
    let (database, mut client) = scene();
    set(&mut client, None, "one", "shared-1");
    set(&mut client, None, "two", "shared-2");
    set(&mut client, Some(ALICE), "one", "alices-1");
    set(&mut client, Some(BOB), "two", "bobs-2");
    let params = json!({"url": server.url, "headers": {"X-Key": "{{secret:one}} {{secret:two}}"}});
    let plain = json!({"url": server.url, "headers": {"X-Key": "none"}});
    client
        .execute(
            "INSERT INTO job_results (user_id, job_type, params)
             SELECT u.id, 'http_request', CASE WHEN n % 2 = 0 THEN $1::jsonb ELSE $2 END
               FROM generate_series(1, 60) AS n, (VALUES ($3::text::uuid), ($4::text::uuid), (NULL)) AS u (id)",
            &[&params, &plain, &ALICE, &BOB],
        )
        .expect("INSERT");
    wait_until("all jobs are completed", || count_jobs(&mut client, "completed") == 180);
    let requests = server.requests();
    for row in client.query("SELECT id, user_id::text, params = $1 FROM job_results", &[&params]).expect("the jobs") {
        let (id, user, is_filled): (Uuid, Option<String>, bool) = (row.get(0), row.get(1), row.get(2));
        let key = format!("\r\nidempotency-key: {id}\r\n");
        let request = requests.iter().find(|request| request.contains(&key)).expect("its request");
        let expected = match user.as_deref() {
            _ if !is_filled => "none",
            Some(ALICE) => "alices-1 shared-2",
            Some(_) => "shared-1 bobs-2",
            None => "shared-1 shared-2",
        };
        assert_eq!(header(request, "x-key"), expected, "{user:?}");
    }
    assert!(!is_shown(&database, "alices-1"));
}
