//! The life of a job, seen from SQL.

use crate::support::*;
use serde_json::json;
use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex};
use uuid::Uuid;

#[test]
fn a_plain_insert_is_enough_to_have_a_job_run() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    let job: Uuid = client
        .query_one(
            "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
             VALUES ($1, 'tool_invoke', 'demo', 'add', '{\"a\": 2, \"b\": 40}') RETURNING id",
            &[&ALICE.parse::<Uuid>().expect("a uuid")],
        )
        .expect("INSERT")
        .get(0);
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
    assert_eq!(wait_for_job(&mut client, job).completed()["structuredContent"]["sum"], 42);
    let row = client
        .query_one(
            "SELECT created_at <= started_at AND started_at <= completed_at, lease IS NULL FROM job_results",
            &[],
        )
        .expect("times");
    assert_eq!((row.get(0), row.get(1)), (Some(true), true));
}

#[test]
fn a_rolled_back_job_never_runs_and_a_committed_one_after_it_does() {
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = shared().database();
    let mut client = database.connect();
    let insert =
        format!("INSERT INTO job_results (job_type, params) VALUES ('http_request', '{{\"url\": \"{}", server.url);
    client.batch_execute(&format!("BEGIN; {insert}rolled-back\"}}'); ROLLBACK")).expect("rollback");
    client
        .batch_execute(&format!("BEGIN; SAVEPOINT a; {insert}half\"}}'); ROLLBACK TO a; {insert}kept\"}}'); COMMIT"))
        .expect("commit");
    wait_until("the committed job is completed", || count_jobs(&mut client, "completed") == 1);
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].starts_with("GET /kept "), "{requests:?}");
}

#[test]
fn a_job_in_a_prepared_transaction_runs_once_that_is_committed() {
    let cluster = Cluster::start(&["max_prepared_transactions = 2", "nexus_hub.poll_interval = 200"]);
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(&format!(
            "BEGIN; INSERT INTO job_results (job_type, params) VALUES ('http_request', '{{\"url\": \"{}\"}}');
             PREPARE TRANSACTION 'p'",
            server.url
        ))
        .expect("prepare");
    assert_eq!(count_jobs(&mut client, "completed"), 0);
    client.batch_execute("COMMIT PREPARED 'p'").expect("commit");
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
}

#[test]
fn a_job_can_be_cancelled_until_it_is_finished() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 1"]);
    let gate = Gate::default();
    let held = gate.clone();
    let server = FakeServer::start(move |_| {
        held.pass();
        Some(Answer::json("{}"))
    });
    let database = cluster.database();
    let mut client = database.connect();
    let create = |client: &mut postgres::Client| -> Uuid {
        client
            .query_one(
                "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id",
                &[&json!({"url": server.url})],
            )
            .expect("INSERT")
            .get(0)
    };
    let cancel = |client: &mut postgres::Client, job: Uuid| -> bool {
        client.query_one("SELECT cancel_job($1)", &[&job]).expect("cancel_job").get(0)
    };
    let running = create(&mut client);
    wait_until("the first job runs", || count_jobs(&mut client, "running") == 1);
    let waiting = create(&mut client);
    assert!(cancel(&mut client, waiting), "it waits");
    assert!(!cancel(&mut client, waiting), "it is cancelled already");
    assert!(!cancel(&mut client, Uuid::nil()), "there is none");
    let cancelled = wait_for_job(&mut client, waiting);
    assert_eq!((cancelled.status.as_str(), cancelled.result, cancelled.error), ("cancelled", None, None));
    gate.open();
    wait_for_job(&mut client, running).completed();
    assert!(!cancel(&mut client, running), "it is finished");
    assert_eq!(server.requests().len(), 1, "a cancelled job sends nothing");
}

#[test]
fn the_request_of_a_cancelled_job_is_broken_off_and_a_late_answer_changes_nothing() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 1"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let database = cluster.database();
    let mut client = database.connect();
    // Cancelled by the function, by hand, by deleting its row, and by having it run again.
    for statement in [
        "SELECT cancel_job(id) FROM job_results",
        "UPDATE job_results SET status = 'cancelled'",
        "DELETE FROM job_results",
        "WITH done AS (SELECT cancel_job(id) FROM job_results) SELECT count(*) FROM done;
         UPDATE job_results SET status = 'pending', run_at = now() + interval '1 day'",
    ] {
        client
            .execute("INSERT INTO job_results (job_type, params) VALUES ('http_request', $1)", &[&json!({"url": url})])
            .expect("INSERT");
        let (mut stream, _) = listener.accept().expect("the connection");
        let mut method = [0; 4];
        stream.read_exact(&mut method).expect("the request");
        assert_eq!(&method, b"GET ");
        wait_until("the job runs", || count_jobs(&mut client, "running") == 1);
        client.batch_execute(statement).expect(statement);
        let state: Option<String> = value(&mut client, "SELECT max(status) FROM job_results");
        // The end of the stream after the request is the end of the connection.
        let mut request = Vec::new();
        stream.read_to_end(&mut request).expect("the request breaks off");
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        // With one place for a request, another job shows that the worker has gone on.
        let other = FakeServer::start(|_| Some(Answer::json("{}")));
        run_http(&mut client, json!({"url": other.url})).completed();
        client.batch_execute("DELETE FROM job_results WHERE status = 'completed'").expect("DELETE");
        assert_eq!(value::<Option<String>>(&mut client, "SELECT max(status) FROM job_results"), state, "{statement}");
        client.batch_execute("DELETE FROM job_results").expect("DELETE");
    }
}

#[test]
fn the_server_of_a_cancelled_mcp_call_is_told() {
    let server = McpServer::start(&["--legacy"]);
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    let job = create_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 60_000}));
    wait_until("the call is under way", || server.stats()["tool_calls"] == 1);
    assert!(value::<bool>(&mut client, &format!("SELECT cancel_job('{job}')")));
    assert_eq!(wait_for_job(&mut client, job).status, "cancelled");
    wait_until("the server was told", || server.stats()["cancelled"] == 1);
    // The session goes on.
    run_job(&mut client, "tool_invoke", "demo", Some("add"), json!({"a": 1, "b": 2})).completed();
}

#[test]
fn the_same_idempotency_key_makes_one_job_even_side_by_side() {
    let database = shared().database();
    let mut first = database.connect();
    let create = "SELECT create_job(NULL, 'http_request', NULL, p_params => '{\"url\": \"http://127.0.0.1:1/\"}',
                         p_run_at => now() + interval '1 day', p_idempotency_key => 'invoice 7')";
    first.batch_execute("BEGIN").expect("BEGIN");
    let job: Uuid = value(&mut first, create);
    let mut second = database.connect();
    let pid: i32 = value(&mut second, "SELECT pg_backend_pid()");
    let waiting = std::thread::spawn(move || value::<Uuid>(&mut second, create));
    let waits = format!("SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'");
    wait_until("the second waits for the first", || value::<bool>(&mut first, &waits));
    first.batch_execute("COMMIT").expect("COMMIT");
    assert_eq!(waiting.join().expect("no panic"), job);
    assert_eq!(count_jobs(&mut first, "pending"), 1);
}

#[test]
fn five_hundred_slow_jobs_run_side_by_side() {
    const JOBS: usize = 500;
    // Nobody is answered before all are there: one after the other they would wait for ever.
    let arrived = Arc::new((Mutex::new(0), Condvar::new()));
    let door = Arc::clone(&arrived);
    let server = FakeServer::start(move |_| {
        let mut count = door.0.lock().expect("not poisoned");
        *count += 1;
        door.1.notify_all();
        while *count < JOBS {
            count = door.1.wait(count).expect("not poisoned");
        }
        Some(Answer::json("{}"))
    });
    let database = shared().database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 500)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    wait_until("all are completed", || count_jobs(&mut client, "completed") == JOBS as i64);
}

#[test]
fn no_more_requests_are_in_flight_than_allowed_and_all_jobs_run() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 7", "nexus_hub.batch_size = 3"]);
    let (now, most) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
    let (current, highest) = (Arc::clone(&now), Arc::clone(&most));
    let server = FakeServer::start(move |_| {
        {
            let mut now = current.lock().expect("not poisoned");
            *now += 1;
            let mut most = highest.lock().expect("not poisoned");
            *most = (*most).max(*now);
        }
        std::thread::yield_now();
        *current.lock().expect("not poisoned") -= 1;
        Some(Answer::json("{}"))
    });
    let database = cluster.database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 300)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 300);
    let most = *most.lock().expect("not poisoned");
    assert!((1..=7).contains(&most), "{most} in flight");
}

#[test]
fn answers_that_come_all_at_once_are_written_without_another_wake_up() {
    let cluster = Cluster::start(&["nexus_hub.batch_size = 3", "nexus_hub.poll_interval = '1h'"]);
    let gate = Gate::default();
    let held = gate.clone();
    let server = FakeServer::start(move |_| {
        held.pass();
        Some(Answer::json("{}"))
    });
    let database = cluster.database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 200)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    wait_until("all run", || count_jobs(&mut client, "running") == 200);
    gate.open();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 200);
}

#[test]
fn a_row_that_a_session_keeps_locked_does_not_hold_up_the_others() {
    let gate = Gate::default();
    let held = gate.clone();
    let server = FakeServer::start(move |_| {
        held.pass();
        Some(Answer::json("{}"))
    });
    let database = shared().database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 20)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    wait_until("all run", || count_jobs(&mut client, "running") == 20);
    let mut locker = database.connect();
    let mut transaction = locker.transaction().expect("BEGIN");
    transaction.execute("SELECT FROM job_results ORDER BY id LIMIT 1 FOR UPDATE", &[]).expect("lock");
    gate.open();
    wait_until("the others are completed", || count_jobs(&mut client, "completed") == 19);
    transaction.rollback().expect("ROLLBACK");
    wait_until("the last one is completed", || count_jobs(&mut client, "completed") == 20);
}

#[test]
fn an_answer_that_jsonb_can_not_hold_does_not_take_others_with_it() {
    // 1e200000 is JSON, but no number that jsonb takes.
    let server = FakeServer::start(|request| {
        Some(Answer::json(if request.starts_with("GET /poison ") { "1e200000" } else { "1" }))
    });
    let database = shared().database();
    let mut client = database.connect();
    client
        .batch_execute(&format!(
            "INSERT INTO job_results (job_type, params)
             SELECT 'http_request', jsonb_build_object('url', '{}' || CASE WHEN n = 25 THEN 'poison' ELSE 'good' END)
               FROM generate_series(1, 50) n",
            server.url
        ))
        .expect("INSERT");
    wait_until("all are finished", || count_jobs(&mut client, "completed") + count_jobs(&mut client, "failed") == 50);
    assert_eq!(count_jobs(&mut client, "failed"), 1);
    let error: String = value(&mut client, "SELECT error FROM job_results WHERE status = 'failed'");
    assert!(error.starts_with("the answer cannot be stored as jsonb"), "{error}");
}

#[test]
fn a_job_that_is_changed_by_hand_while_it_runs_keeps_that_state() {
    let gate = Gate::default();
    let held = gate.clone();
    let server = FakeServer::start(move |_| {
        held.pass();
        Some(Answer::json("{}"))
    });
    let database = shared().database();
    let mut client = database.connect();
    let insert = "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id";
    let job: Uuid = client.query_one(insert, &[&json!({"url": server.url})]).expect("INSERT").get(0);
    wait_until("it runs", || count_jobs(&mut client, "running") == 1);
    client
        .execute(
            "UPDATE job_results SET status = 'cancelled', completed_at = now() WHERE status IN ('pending', 'running')",
            &[],
        )
        .expect("the operational guide's statement");
    gate.open();
    let after: Uuid = client.query_one(insert, &[&json!({"url": server.url})]).expect("INSERT").get(0);
    wait_for_job(&mut client, after).completed();
    assert_eq!(wait_for_job(&mut client, job).status, "cancelled");
}

#[test]
fn waiting_returns_the_state_when_the_time_is_over() {
    let server = FakeServer::start(|_| {
        std::thread::park();
        None
    });
    let database = shared().database();
    let mut client = database.connect();
    let job: Uuid = client
        .query_one(
            "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT")
        .get(0);
    let status: String = client.query_one("SELECT status FROM wait_for_job($1, 50)", &[&job]).expect("wait").get(0);
    assert!(matches!(status.as_str(), "pending" | "running"), "{status}");
    assert!(client.query("SELECT FROM wait_for_job($1)", &[&Uuid::nil()]).expect("wait").is_empty());
}

#[test]
fn a_waiting_session_can_be_cancelled() {
    let server = FakeServer::start(|_| {
        std::thread::park();
        None
    });
    let database = shared().database();
    let mut client = database.connect();
    let job: Uuid = client
        .query_one(
            "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT")
        .get(0);
    client.batch_execute("SET statement_timeout = 1000").expect("SET");
    let error = client.query("SELECT FROM wait_for_job($1)", &[&job]).expect_err("a time-out");
    assert_eq!(error.code().map(|code| code.code()), Some("57014"));
    client.batch_execute("RESET statement_timeout").expect("the session goes on");
}

#[test]
fn execute_job_via_pg_net_knows_its_jobs() {
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = shared().database();
    let mut client = database.connect();
    let job: Uuid = client
        .query_one(
            "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT")
        .get(0);
    client.execute("SELECT execute_job_via_pg_net(job_id => $1)", &[&job]).expect("a known job");
    wait_for_job(&mut client, job).completed();
    let (code, message) =
        error_of(&mut client, "SELECT execute_job_via_pg_net('00000000-0000-0000-0000-000000000000')");
    assert_eq!((code.as_str(), message.as_str()), ("22023", "Job 00000000-0000-0000-0000-000000000000 not found"));
}

#[test]
fn the_worker_reads_the_table_by_its_indexes_though_its_plans_were_made_when_it_was_empty() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let mut client = database.connect();
    // Not counted below: these queries shall leave no sequential scans themselves.
    client.batch_execute("SET enable_seqscan = off").expect("SET");
    let scans = "SELECT seq_scan::bigint, idx_scan::bigint, n_tup_upd::bigint FROM pg_stat_user_tables WHERE relname = 'job_results'";
    let looked = |client: &mut postgres::Client, index_scans: i64, updates: i64| {
        let row = client.query_one(scans, &[]).expect("statistics");
        (row.get::<_, i64>(1) >= index_scans && row.get::<_, i64>(2) >= updates).then(|| row.get::<_, i64>(0))
    };
    // Building the indexes read the table, too; a session's statistics arrive when it is gone.
    wait_until("nobody else is connected", || {
        value(
            &mut client,
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'",
        )
    });
    let mut before = None;
    wait_until("the worker has looked at the empty table", || {
        before = looked(&mut client, 10, 0);
        before.is_some()
    });
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 2000)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    // Asked in a way that an index answers.
    wait_until("none is left", || count_jobs(&mut client, "pending") + count_jobs(&mut client, "running") == 0);
    wait_until("the statistics have arrived", || looked(&mut client, 0, 4000).is_some());
    assert_eq!(looked(&mut client, 0, 0), before, "sequential scans");
}

#[test]
fn refusals_say_what_is_not_allowed() {
    let database = shared().database();
    let mut client = database.connect();
    add_server(&mut client, "s", json!({"url": "http://h/"}));
    let (code, message) =
        error_of(&mut client, &format!("SELECT add_server('s', 's', '{{\"url\": \"http://h/\"}}', '{ALICE}')"));
    assert_eq!((code.as_str(), message.as_str()), ("23505", "the user has a server \"s\" already"));
    client
        .batch_execute(&format!("SET request.jwt.claims = '{{\"sub\": \"{ALICE}\"}}'; SET ROLE authenticated"))
        .expect("a user");
    let (code, message) = error_of(&mut client, &format!("SELECT create_job('{BOB}', 'tool_invoke', 's', 't')"));
    assert_eq!((code.as_str(), message.as_str()), ("42501", "p_user_id is not the caller's own"));
    let (code, message) =
        error_of(&mut client, "SELECT create_job(NULL, 'http_request', NULL, NULL, '{\"url\": \"http://h/\"}')");
    assert_eq!((code.as_str(), message.as_str()), ("42501", "http_request jobs are not for users"));
}
