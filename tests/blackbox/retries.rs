//! Attempts: when they are made again, and what is kept of them.

use crate::support::*;
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use uuid::Uuid;

/// A cluster whose retries come soon.
fn quick() -> &'static Cluster {
    static QUICK: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();
    QUICK.get_or_init(|| {
        Cluster::start(&[
            "nexus_hub.retry_base_delay = 20",
            "nexus_hub.retry_max_delay = 60",
            "nexus_hub.breaker_threshold = 0",
        ])
    })
}

/// A server that fails with these statuses, one after the other, and then is well.
fn failing(statuses: &'static [&'static str]) -> FakeServer {
    let number = AtomicUsize::new(0);
    FakeServer::start(move |_| {
        let status = statuses.get(number.fetch_add(1, SeqCst)).copied().unwrap_or("200 OK");
        Some(Answer::new(status, "application/json", "{}"))
    })
}

fn post(client: &mut postgres::Client, url: &str) -> Uuid {
    client.query_one("SELECT http_post($1)", &[&url]).expect("http_post").get(0)
}

type Attempt = (i32, Option<i32>, String);

fn attempts(client: &mut postgres::Client, job: Uuid) -> Vec<Attempt> {
    let query = "SELECT attempt, http_status, error, started_at <= finished_at FROM get_job_attempts($1)";
    let rows = client.query(query, &[&job]).expect("get_job_attempts");
    rows.iter()
        .map(|row| {
            assert!(row.get::<_, bool>(3), "an attempt ends after it was started");
            (row.get(0), row.get(1), row.get(2))
        })
        .collect()
}

#[test]
fn a_job_is_tried_again_until_it_succeeds_always_with_the_same_key() {
    let server = failing(&[
        "500 Internal Server Error",
        "503 Service Unavailable",
        "429 Too Many Requests",
        "408 Request Timeout",
    ]);
    let database = quick().database();
    let mut client = database.connect();
    let job = post(&mut client, &server.url);
    wait_for_job(&mut client, job).completed();
    let statuses: Vec<_> =
        attempts(&mut client, job).into_iter().map(|(attempt, status, _)| (attempt, status)).collect();
    assert_eq!(statuses, [(1, Some(500)), (2, Some(503)), (3, Some(429)), (4, Some(408))]);
    assert_eq!(value::<i32>(&mut client, "SELECT attempt FROM job_results"), 5);
    let key = format!("\r\nidempotency-key: {job}\r\n");
    let requests = server.requests();
    assert_eq!(requests.iter().filter(|request| request.contains(&key)).count(), 5, "{requests:?}");
}

#[test]
fn a_job_that_succeeds_at_once_leaves_no_attempt_behind() {
    let server = failing(&[]);
    let database = quick().database();
    let mut client = database.connect();
    let job = post(&mut client, &server.url);
    wait_for_job(&mut client, job).completed();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_attempts"), 0);
}

#[test]
fn after_its_last_attempt_a_job_has_failed_and_keeps_the_last_answer() {
    const BAD: &str = "500 Internal Server Error";
    let server = failing(&[BAD; 9]);
    let database = quick().database();
    let mut client = database.connect();
    let job = post(&mut client, &server.url);
    let failed = wait_for_job(&mut client, job);
    assert_eq!(failed.result.as_ref().expect("kept")["status"], 500);
    assert_eq!(failed.failed(), "the server answered 500 Internal Server Error");
    assert_eq!(attempts(&mut client, job).len(), 5);
    assert_eq!(server.requests().len(), 5);
}

#[test]
fn broken_connections_and_time_outs_are_tried_again() {
    let database = quick().database();
    let mut client = database.connect();
    let number = AtomicUsize::new(0);
    let gate = Gate::default();
    let server = FakeServer::start({
        let gate = gate.clone();
        move |_| match number.fetch_add(1, SeqCst) {
            0 => None,
            1 => {
                gate.pass();
                None
            }
            _ => Some(Answer::json("{}")),
        }
    });
    let job: Uuid =
        client.query_one("SELECT http_post($1, timeout_ms => 5000)", &[&server.url]).expect("http_post").get(0);
    wait_for_job(&mut client, job).completed();
    gate.open();
    let errors: Vec<_> = attempts(&mut client, job).into_iter().map(|(_, _, error)| error).collect();
    assert!(errors[0].starts_with("the connection broke"), "{errors:?}");
    assert_eq!(errors[1..], ["timed out: no answer within 5000 ms"]);
    let job = post(&mut client, "http://127.0.0.1:1/");
    assert_eq!(wait_for_job(&mut client, job).failed(), "could not connect to 127.0.0.1:1: connection refused");
    assert_eq!(attempts(&mut client, job).len(), 5);
}

#[test]
fn what_would_fail_again_is_not_tried_again() {
    let database = quick().database();
    let mut client = database.connect();
    for status in
        ["400 Bad Request", "401 Unauthorized", "404 Not Found", "409 Conflict", "410 Gone", "422 Unprocessable"]
    {
        let server = FakeServer::start(move |_| Some(Answer::json("{}")).map(|answer| Answer { status, ..answer }));
        let job = post(&mut client, &server.url);
        wait_for_job(&mut client, job).failed();
        assert_eq!((attempts(&mut client, job).len(), server.requests().len()), (1, 1), "{status}");
    }
    let job = post(&mut client, "http://name.invalid:65535/");
    client.execute("SELECT cancel_job($1)", &[&job]).expect("cancel_job");
    let job: Uuid =
        value(&mut client, "SELECT create_job(NULL, 'resource_fetch', 'nowhere', p_params => '{\"uri\": \"a:b\"}')");
    assert!(wait_for_job(&mut client, job).failed().contains("there is no server \"nowhere\""));
    assert_eq!(attempts(&mut client, job).len(), 1);
}

#[test]
fn a_tool_call_is_not_made_twice_unless_the_job_says_so_and_others_are() {
    let database = quick().database();
    let mut client = database.connect();
    let count =
        |server: &FakeServer, word: &str| server.requests().iter().filter(|request| request.contains(word)).count();
    let server = FakeServer::start(|_| Some(Answer::new("503 Service Unavailable", "text/plain", "later")));
    add_server(&mut client, "s", json!({"url": server.url}));
    let job = create_job(&mut client, "tool_invoke", "s", Some("pay"), json!({}));
    assert!(wait_for_job(&mut client, job).failed().contains("503"));
    assert_eq!(attempts(&mut client, job).len(), 1);
    for (job_type, tool, made) in [("resource_fetch", None, 3), ("prompt_execute", Some("p"), 3)] {
        let job = create_job(&mut client, job_type, "s", tool, json!({"uri": "a:b"}));
        wait_for_job(&mut client, job).failed();
        assert_eq!(attempts(&mut client, job).len(), made, "{job_type}");
    }
    let job: Uuid =
        value(&mut client, &format!("SELECT create_job('{ALICE}', 'tool_invoke', 's', 'pay', p_max_attempts => 4)"));
    wait_for_job(&mut client, job).failed();
    assert_eq!(attempts(&mut client, job).len(), 4);
    assert!(count(&server, "initialize") + count(&server, "discover") > 0);
}

#[test]
fn retry_after_is_obeyed_within_the_cap() {
    let cluster = Cluster::start(&["nexus_hub.retry_base_delay = 1", "nexus_hub.retry_max_delay = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let waits = |client: &mut postgres::Client, retry_after: String| -> f64 {
        let server = FakeServer::start(move |_| {
            let mut answer = Answer::new("429 Too Many Requests", "text/plain", "");
            answer.headers.push(("Retry-After", retry_after.clone()));
            Some(answer)
        });
        let job = post(client, &server.url);
        wait_until("the attempt has failed", || attempts(client, job).len() == 1);
        let seconds =
            "SELECT extract(epoch FROM run_at - (SELECT finished_at FROM job_attempts a WHERE a.job_id = j.id))::float8
                         FROM job_results j WHERE id = $1 AND status = 'pending'";
        client.query_one(seconds, &[&job]).expect("it waits").get(0)
    };
    assert_eq!(waits(&mut client, "120".into()).round(), 120.0);
    assert_eq!(waits(&mut client, "86400".into()).round(), 3600.0, "the cap");
    let date = "SELECT to_char((now() + interval '600 s') AT TIME ZONE 'UTC', 'Dy, DD Mon YYYY HH24:MI:SS \"GMT\"')";
    let date: String = value(&mut client, date);
    let waited = waits(&mut client, date);
    assert!((590.0..=601.0).contains(&waited), "{waited}");
}

#[test]
fn a_failed_job_can_be_run_again_with_all_its_attempts() {
    const BAD: &str = "500 Internal Server Error";
    let server = failing(&[BAD; 6]);
    let database = quick().database();
    let mut client = database.connect();
    let job = post(&mut client, &server.url);
    wait_for_job(&mut client, job).failed();
    assert!(value::<bool>(&mut client, &format!("SELECT retry_job('{job}')")));
    wait_for_job(&mut client, job).completed();
    let numbers: Vec<_> = attempts(&mut client, job).into_iter().map(|attempt| attempt.0).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 1]);
    assert!(!value::<bool>(&mut client, &format!("SELECT retry_job('{job}')")), "it is completed");
}

#[test]
fn many_failed_jobs_are_redriven_at_once() {
    let server = failing(&["404 Not Found"; 50]);
    let database = quick().database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 50)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    wait_until("all have failed", || count_jobs(&mut client, "failed") == 50);
    assert_eq!(value::<i32>(&mut client, "SELECT retry_failed_jobs(p_since => now() + interval '1 hour')"), 0);
    assert_eq!(value::<i32>(&mut client, "SELECT retry_failed_jobs(p_job_type => 'http_request')"), 50);
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 50);
}

#[test]
fn a_job_that_was_in_flight_in_several_crashes_of_the_worker_is_set_aside() {
    let cluster =
        Cluster::start(&["nexus_hub.max_crashes = 2", "nexus_hub.poll_interval = 200", "restart_after_crash = on"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let good = failing(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let poison = post(&mut client, &url);
    for crash in 1..=2 {
        let request = listener.accept().expect("the request");
        let worker = database.wait_for_worker();
        // Else a crash that comes soon after the claim forgets it.
        wait_until("it runs", || count_jobs(&mut client, "running") == 1);
        client.batch_execute("CHECKPOINT").expect("CHECKPOINT");
        cluster.signal("KILL", worker);
        wait_until("the server has noticed", || client.batch_execute("SELECT 1").is_err());
        client = cluster.reconnect(&database.name);
        drop(request);
        if crash == 1 {
            run_http(&mut client, json!({"url": good.url})).completed();
        }
    }
    let error = wait_for_job(&mut client, poison).failed();
    assert_eq!(error, "set aside: the worker crashed 2 times while this job was in flight (nexus_hub.max_crashes)");
    let kept = attempts(&mut client, poison);
    assert_eq!(kept.iter().map(|attempt| attempt.0).collect::<Vec<_>>(), [1, 2]);
    run_http(&mut client, json!({"url": good.url})).completed();
}

#[test]
fn an_orderly_end_of_the_worker_counts_as_neither_attempt_nor_crash() {
    let cluster = Cluster::start(&[]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let database = cluster.database();
    let mut client = database.connect();
    post(&mut client, &url);
    let request = listener.accept().expect("the request");
    drop(client);
    cluster.pg_ctl(&["stop", "-m", "fast"]);
    drop(request);
    // Without a worker one can look.
    cluster.configure(&["nexus_hub.enabled = off"]);
    cluster.pg_ctl(&["start"]);
    let mut client = database.connect();
    let state = client.query_one("SELECT status, attempt, crashes FROM job_results", &[]).expect("the job");
    assert_eq!((state.get(0), state.get(1), state.get(2)), ("pending", 0, 0));
}
