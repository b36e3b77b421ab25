//! Edge mode: an executor elsewhere runs the MCP jobs.

use crate::support::*;
use serde_json::{Value, json};
use uuid::Uuid;

const KEY: &str = "service-role-key-5up3r-s3cr3t";

fn in_edge_mode(url: &str) -> Database<'static> {
    let database = shared().empty_database();
    shared()
        .connect("postgres")
        .batch_execute(&format!(
            "ALTER DATABASE {0} SET nexus_hub.executor = 'edge';
             ALTER DATABASE {0} SET app.edge_function_url = '{1}';
             ALTER DATABASE {0} SET app.service_role_key = '{KEY}'",
            database.name,
            url.trim_end_matches('/')
        ))
        .expect("ALTER DATABASE");
    database.connect().batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    database
}

/// The job that a request hands over.
fn handed_over(request: &str) -> Value {
    let (head, body) = request.split_once("\r\n\r\n").expect("a body");
    assert!(head.starts_with("POST /internal/job-executor HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(&format!("\r\nauthorization: Bearer {KEY}\r\n")), "{head}");
    assert!(head.contains("\r\ncontent-type: application/json\r\n"), "{head}");
    serde_json::from_str(body).expect("JSON")
}

#[test]
fn the_executor_gets_the_seeds_body_and_writes_the_jobs_end() {
    let (to_executor, jobs) = std::sync::mpsc::channel();
    let server = FakeServer::start({
        let database = std::sync::Mutex::new(None::<postgres::Client>);
        let name = std::sync::OnceLock::<String>::new();
        let to_executor = std::sync::Mutex::new(to_executor);
        move |request| {
            let job = handed_over(request);
            let _ = name.get_or_init(|| job["params"]["database"].as_str().expect("its name").to_owned());
            let mut database = database.lock().expect("not poisoned");
            let client = database.get_or_insert_with(|| shared().connect(name.get().expect("set")));
            // As the seeds' executor does it, in two statements by id.
            let id: Uuid = job["job_id"].as_str().expect("an id").parse().expect("a uuid");
            for statement in [
                "UPDATE job_results SET status = 'running', started_at = now() WHERE id = $1 AND status = 'pending'",
                "UPDATE job_results SET status = 'completed', result = '{\"by\": \"edge\"}', completed_at = now() WHERE id = $1",
            ] {
                client.execute(statement, &[&id]).expect("the executor's statement");
            }
            to_executor.lock().expect("not poisoned").send(job).expect("the test listens");
            Some(Answer::json("{\"success\": true}"))
        }
    });
    let database = in_edge_mode(&server.url);
    let mut client = database.connect();
    // The executor knows the server, this database need not.
    let params = json!({"database": database.name, "n": 1});
    let job = run_job(&mut client, "tool_invoke", "somewhere", Some("add"), params.clone());
    assert_eq!(job.completed(), json!({"by": "edge"}));
    let sent = jobs.recv().expect("the job");
    let id: Uuid = value(&mut client, "SELECT id FROM job_results");
    let expected = json!({"job_id": id.to_string(), "job_type": "tool_invoke", "server_id": "somewhere", "tool_name": "add",
                          "params": params, "user_id": ALICE});
    assert_eq!(sent, expected);
}

#[test]
fn an_executor_that_leaves_a_job_unfinished_has_failed_it_and_one_that_accepts_it_has_not() {
    let server = FakeServer::start(|request| {
        let status = if handed_over(request)["tool_name"] == "later" { "202 Accepted" } else { "200 OK" };
        Some(Answer::new(status, "application/json", "{}"))
    });
    let database = in_edge_mode(&server.url);
    let mut client = database.connect();
    let error = run_job(&mut client, "tool_invoke", "s", Some("now"), json!({})).failed();
    assert_eq!(error, "the executor answered 200 OK and left the job unfinished");
    let job = create_job(&mut client, "tool_invoke", "s", Some("later"), json!({}));
    wait_until("the job is handed over", || {
        value::<i64>(&mut client, "SELECT count(*) FROM job_results WHERE status = 'running' AND lease IS NULL") == 1
    });
    client.execute("UPDATE job_results SET status = 'completed', result = '1' WHERE id = $1", &[&job]).expect("UPDATE");
    assert_eq!(wait_for_job(&mut client, job).completed(), 1);
}

#[test]
fn an_executor_that_fails_is_asked_again_and_its_key_is_never_shown() {
    let server = FakeServer::start(|_| Some(Answer::new("401 Unauthorized", "text/plain", KEY)));
    let database = in_edge_mode(&server.url);
    let mut client = database.connect();
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert_eq!(error, "the server answered 401 Unauthorized");
    let leaks = "SELECT count(*) FROM job_results j LEFT JOIN job_attempts a ON a.job_id = j.id WHERE (j, a)::text LIKE '%s3cr3t%'";
    assert_eq!(value::<i64>(&mut client, leaks), 0);
}

#[test]
fn a_sync_is_the_executors_too() {
    let (to_test, handed) = std::sync::mpsc::channel();
    let to_test = std::sync::Mutex::new(to_test);
    let server = FakeServer::start(move |request| {
        to_test.lock().expect("not poisoned").send(handed_over(request)).expect("the test listens");
        Some(Answer::json("{}"))
    });
    let database = in_edge_mode(&server.url);
    let mut client = database.connect();
    let id = add_server(&mut client, "s", json!({"url": "https://host.example/mcp"}));
    let job: Uuid = client.query_one("SELECT sync_server($1)", &[&id]).expect("sync_server").get(0);
    let got = handed.recv_timeout(std::time::Duration::from_secs(300)).expect("a request");
    assert_eq!((&got["job_type"], &got["job_id"]), (&json!("server_sync"), &json!(job.to_string())));
    assert_eq!((&got["server_id"], &got["user_id"]), (&json!("s"), &json!(ALICE)));
}

#[test]
fn plain_http_jobs_are_run_by_the_worker_all_the_same() {
    let server = FakeServer::start(|_| Some(Answer::json("{\"a\": 1}")));
    let database = in_edge_mode("http://127.0.0.1:1");
    let mut client = database.connect();
    assert_eq!(run_http(&mut client, json!({"url": server.url})).completed()["body"], json!({"a": 1}));
}

#[test]
fn a_missing_setting_is_said_in_the_jobs_error() {
    let database = shared().empty_database();
    shared()
        .connect("postgres")
        .batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.executor = 'edge'", database.name))
        .expect("ALTER DATABASE");
    let mut client = database.connect();
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.contains("app.edge_function_url or app.service_role_key is not set"), "{error}");
}

#[test]
fn rate_limits_are_the_executors_business() {
    let executor = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = in_edge_mode(&executor.url);
    let mut client = database.connect();
    client
        .batch_execute(
            "INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ('narrow', 'Narrow', '{\"url\": \"https://h/\"}', 1);
             INSERT INTO job_results (job_type, server_id, tool_name) SELECT 'tool_invoke', 'narrow', 't' FROM generate_series(1, 5)",
        )
        .expect("INSERT");
    wait_until("all are posted", || executor.requests().len() == 5);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM rate_limit_tracking"), 0);
}
