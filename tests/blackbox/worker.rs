//! The workers: where there is one, what they survive, and that no job is lost on the way.

use crate::support::*;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn insert_jobs(client: &mut postgres::Client, url: &str, count: i32) {
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, $2)",
            &[&json!({"url": url}), &count],
        )
        .expect("INSERT");
}

fn echo() -> FakeServer {
    FakeServer::start(|_| Some(Answer::json("{}")))
}

/// A server that never answers.
fn silent() -> FakeServer {
    FakeServer::start(|_| {
        std::thread::park();
        None
    })
}

/// Runs a statement that wants a database without connections. PostgreSQL waits 5 s for others to leave, so who is
/// slow is asked again.
pub fn insist(client: &mut postgres::Client, statement: &str) {
    wait_until(statement, || match client.batch_execute(statement) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.code().map(|code| code.code()), Some("55006"), "{statement}: {error}");
            false
        }
    });
}

fn works(database: &Database<'_>, server: &FakeServer) {
    let mut client = database.connect();
    run_http(&mut client, json!({"url": server.url})).completed();
}

#[test]
fn a_worker_killed_in_the_middle_of_a_thousand_jobs_loses_none() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 50"]);
    let database = cluster.database();
    let killer = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&killer);
    let gate = Gate::default();
    let server = FakeServer::start({
        let gate = gate.clone();
        move |_| {
            if counter.fetch_add(1, Ordering::SeqCst) >= 200 {
                gate.pass();
            }
            Some(Answer::json("{}"))
        }
    });
    insert_jobs(&mut database.connect(), &server.url, 1000);
    wait_until("a part of the jobs has run", || killer.load(Ordering::SeqCst) > 200);
    cluster.signal("KILL", database.wait_for_worker());
    wait_until("the server has restarted", || cluster.log().contains("reinitializing"));
    gate.open();
    let mut client = cluster.reconnect(&database.name);
    wait_until("all jobs are completed", || count_jobs(&mut client, "completed") == 1000);
    assert_eq!(count_jobs(&mut client, "running"), 0);
    assert!(killer.load(Ordering::SeqCst) >= 1000);
}

#[test]
fn jobs_in_flight_at_an_immediate_shutdown_run_again_after_the_start() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let answering = Arc::new(AtomicUsize::new(0));
    let answer = Arc::clone(&answering);
    let server = FakeServer::start(move |_| {
        if answer.load(Ordering::SeqCst) == 0 {
            std::thread::park();
        }
        Some(Answer::json("{}"))
    });
    let mut client = database.connect();
    insert_jobs(&mut client, &server.url, 30);
    wait_until("all run", || count_jobs(&mut client, "running") == 30);
    cluster.pg_ctl(&["stop", "-m", "immediate"]);
    answering.store(1, Ordering::SeqCst);
    cluster.pg_ctl(&["start"]);
    let mut client = cluster.reconnect(&database.name);
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 30);
}

#[test]
fn a_fast_shutdown_does_not_wait_for_requests_in_flight() {
    let cluster = Cluster::start(&["nexus_hub.request_timeout = '10min'"]);
    let database = cluster.database();
    let server = silent();
    let mut client = database.connect();
    insert_jobs(&mut client, &server.url, 100);
    wait_until("all run", || count_jobs(&mut client, "running") == 100);
    drop(client);
    // Who waited for them would need their 10 minutes. The promised 3 s would be too few for a busy machine.
    cluster.pg_ctl(&["-t", "25", "stop", "-m", "fast"]);
    assert!(!cluster.log().contains("PANIC"), "{}", cluster.log());
    cluster.pg_ctl(&["start"]);
    let mut client = cluster.reconnect(&database.name);
    wait_until("all run again", || count_jobs(&mut client, "running") == 100);
}

#[test]
fn a_worker_that_is_terminated_comes_back() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let server = echo();
    works(&database, &server);
    let worker = database.wait_for_worker();
    database.connect().execute("SELECT pg_terminate_backend($1)", &[&worker]).expect("terminate");
    wait_until("another worker", || database.worker().is_some_and(|pid| pid != worker));
    works(&database, &server);
}

#[test]
fn a_launcher_that_is_terminated_comes_back() {
    let cluster = Cluster::start(&[]);
    let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub launcher'";
    let mut client = cluster.connect("postgres");
    let launcher = |client: &mut postgres::Client| -> Option<i32> {
        client.query_opt(query, &[]).expect("pg_stat_activity").map(|row| row.get(0))
    };
    let mut first = None;
    wait_until("a launcher", || {
        first = launcher(&mut client);
        first.is_some()
    });
    client.execute("SELECT pg_terminate_backend($1)", &[&first]).expect("terminate");
    wait_until("another launcher", || launcher(&mut client).is_some_and(|pid| Some(pid) != first));
    works(&cluster.database(), &echo());
}

#[test]
fn a_worker_starts_when_create_extension_commits_and_ends_with_drop_extension() {
    let cluster = Cluster::start(&[]);
    let database = cluster.empty_database();
    let server = echo();
    let mut client = database.connect();
    for schema in ["public", "\"hub API\"", "public"] {
        client.batch_execute("BEGIN; CREATE EXTENSION nexus_hub; ROLLBACK").expect("a change of mind");
        client
            .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {schema}; CREATE EXTENSION nexus_hub SCHEMA {schema}"))
            .expect("CREATE EXTENSION");
        client.batch_execute(&format!("SET search_path = {schema}")).expect("SET");
        run_http(&mut client, json!({"url": server.url})).completed();
        client.batch_execute("BEGIN; DROP EXTENSION nexus_hub; ROLLBACK").expect("another change of mind");
        run_http(&mut client, json!({"url": server.url})).completed();
        client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
        wait_until("no worker", || database.worker().is_none());
    }
    assert!(!cluster.log().contains("exited with exit code 1"), "{}", cluster.log());
}

#[test]
fn drop_extension_while_jobs_run_is_clean() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let server = silent();
    let mut client = database.connect();
    insert_jobs(&mut client, &server.url, 20);
    wait_until("all run", || count_jobs(&mut client, "running") == 20);
    client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
    wait_until("no worker", || database.worker().is_none());
    let log = cluster.log();
    // Who waits for the DROP for more than a second tries again; others, autovacuum say, have troubles of their own.
    let is_trouble = |line: &str| ["ERROR", "failed", "exited with exit code 1"].iter().any(|word| line.contains(word));
    let mut own = log.lines().filter(|line| line.contains("nexus_hub") && !line.contains("lock timeout"));
    assert!(!log.contains("PANIC") && !own.any(is_trouble), "{log}");
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    works(&database, &echo());
}

#[test]
fn databases_with_and_without_the_extension_live_side_by_side() {
    let cluster = Cluster::start(&[]);
    let (one, two) = (cluster.database(), cluster.database());
    let without = cluster.empty_database();
    let (first, second) = (echo(), echo());
    insert_jobs(&mut one.connect(), &first.url, 3);
    insert_jobs(&mut two.connect(), &second.url, 5);
    for (database, server, count) in [(&one, &first, 3), (&two, &second, 5)] {
        let mut client = database.connect();
        wait_until("its jobs are completed", || count_jobs(&mut client, "completed") == count);
        assert_eq!(server.requests().len() as i64, count);
    }
    wait_until("no worker without the extension", || without.worker().is_none());
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    one.wait_for_worker();
    two.wait_for_worker();
    // It was looked into at the start, and left alone.
    wait_until("no worker without the extension", || without.worker().is_none());
    without.connect().batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    works(&without, &first);
}

#[test]
fn a_database_can_be_dropped_renamed_and_copied_though_its_worker_is_connected() {
    let cluster = Cluster::start(&[]);
    let (busy, idle) = (cluster.database(), cluster.database());
    let server = silent();
    {
        let mut client = busy.connect();
        insert_jobs(&mut client, &server.url, 10);
        wait_until("all run", || count_jobs(&mut client, "running") == 10);
    }
    idle.wait_for_worker();
    let mut client = cluster.connect("postgres");
    insist(&mut client, &format!("DROP DATABASE {}", busy.name));
    insist(&mut client, &format!("CREATE DATABASE copied TEMPLATE {}", idle.name));
    insist(&mut client, &format!("ALTER DATABASE {} RENAME TO renamed", idle.name));
    let server = echo();
    for name in ["renamed", "copied"] {
        let mut client = cluster.connect(name);
        run_http(&mut client, json!({"url": server.url})).completed();
    }
    let log = cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("FATAL:  database"), "{log}");
}

#[test]
fn settings_take_effect_with_a_reload() {
    let cluster = Cluster::start(&["nexus_hub.request_timeout = '1h'"]);
    let database = cluster.database();
    let server = silent();
    works(&database, &echo());
    cluster.configure(&["nexus_hub.request_timeout = '150ms'"]);
    let mut client = database.connect();
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the new time-out is in force", || {
        let error = run_http_for(&mut client, &server.url);
        error.as_deref() == Some("timed out: no answer within 150 ms")
    });
}

/// The error of a job, if it fails within a second.
fn run_http_for(client: &mut postgres::Client, url: &str) -> Option<String> {
    let job: uuid::Uuid = client
        .query_one(
            "INSERT INTO job_results (job_type, params, max_attempts) VALUES ('http_request', $1, 1) RETURNING id",
            &[&json!({"url": url})],
        )
        .expect("INSERT")
        .get(0);
    client.query_one("SELECT error FROM wait_for_job($1, 1000)", &[&job]).expect("wait_for_job").get(0)
}

#[test]
fn a_standby_has_no_worker_and_gets_one_with_its_promotion() {
    let primary = Cluster::start(&["wal_level = replica", "max_wal_senders = 4", "hot_standby = on"]);
    let database = primary.database();
    let server = echo();
    works(&database, &server);
    let standby = Cluster::standby_of(&primary);
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'nexus_hub%'";
    let mut client = standby.connect(&database.name);
    assert_eq!(value::<i64>(&mut client, workers), 0);
    // Reading works there, waiting included.
    let status: String = value(&mut client, "SELECT status FROM wait_for_job((SELECT id FROM job_results), 1000)");
    assert_eq!(status, "completed");
    // Jobs that are in flight when the primary is lost, and one that waits.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/", silent.local_addr().expect("an address"));
    database
        .connect()
        .batch_execute(&format!(
            "SELECT http_get('{url}') FROM generate_series(1, 20); SELECT http_get('{}', run_at => now() + interval '5 seconds')",
            server.url
        ))
        .expect("http_get");
    let requests: Vec<_> = (0..20).map(|_| silent.accept().expect("the request")).collect();
    wait_until("the standby knows that they run", || count_jobs(&mut client, "running") == 20);
    drop(client);
    primary.pg_ctl(&["stop", "-m", "immediate"]);
    drop((requests, silent));
    let answering =
        FakeServer::start_at(url.trim_start_matches("http://").trim_end_matches('/'), |_| Some(Answer::json("{}")));
    standby.pg_ctl(&["promote"]);
    let mut client = standby.connect(&database.name);
    run_http(&mut client, json!({"url": server.url})).completed();
    wait_until("they have run again", || count_jobs(&mut client, "completed") == 23);
    assert_eq!(answering.requests().len(), 20);
    let log = standby.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("nexus_hub:")).collect();
    assert!(lines.iter().all(|line| line.contains("gave back 20 jobs")) && lines.len() == 1, "{lines:?}");
}

#[test]
fn without_preloading_everything_says_so_and_nothing_is_lost() {
    let cluster = Cluster::start(&["shared_preload_libraries = ''"]);
    let database = cluster.database();
    let mut client = database.connect();
    let text: String = value(&mut client, "SELECT decrypt_token(encrypt_token('the vault works'))");
    assert_eq!(text, "the vault works");
    let server = echo();
    insert_jobs(&mut client, &server.url, 1);
    let (code, message) = error_of(&mut client, "SELECT wait_for_job(id) FROM job_results");
    assert_eq!((code.as_str(), message.as_str()), ("55000", "nexus_hub is not preloaded"));
    let (code, _) = error_of(&mut client, "SELECT execute_job_via_pg_net(id) FROM job_results");
    assert_eq!(code, "55000");
    cluster.configure(&[]);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = database.connect();
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
}

#[test]
fn too_few_worker_processes_are_logged_once_and_made_up_for_later() {
    let cluster = Cluster::start(&["max_worker_processes = 2"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = echo();
    insert_jobs(&mut client, &server.url, 1);
    // The server's own replication launcher has one, that of nexus_hub the other.
    wait_until("the shortage is logged", || cluster.log().contains("raise max_worker_processes"));
    cluster.configure(&[]);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = database.connect();
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
}

#[test]
fn a_new_launcher_leaves_every_database_its_one_worker() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let server = McpServer::start(&[]);
    let mut client = database.connect();
    add_server(&mut client, "demo", server.config());
    let job = create_job(&mut client, "tool_invoke", "demo", Some("slow"), json!({"ms": 3000}));
    wait_until("the call runs", || server.stats()["tool_calls"] == 1);
    let worker = database.worker();
    let launcher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub launcher'";
    let first: i32 = value(&mut client, launcher);
    client.execute("SELECT pg_terminate_backend($1)", &[&first]).expect("terminate");
    wait_until("another launcher", || {
        client.query_opt(launcher, &[]).expect("launcher").is_some_and(|row| row.get::<_, i32>(0) != first)
    });
    wait_for_job(&mut client, job).completed();
    assert_eq!(server.stats()["tool_calls"], 1, "sent once");
    assert_eq!(database.worker(), worker);
    works(&database, &echo());
}

#[test]
fn an_extension_dropped_and_created_in_one_transaction_has_a_worker() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let database = cluster.database();
    let server = echo();
    works(&database, &server);
    let mut client = database.connect();
    for _ in 0..3 {
        client.batch_execute("BEGIN; DROP EXTENSION nexus_hub; CREATE EXTENSION nexus_hub; COMMIT").expect("replace");
        works(&database, &server);
        client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
        client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
        works(&database, &server);
    }
}

#[test]
fn a_locked_row_of_a_worker_that_is_gone_does_not_stop_the_queue() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let server = echo();
    database.wait_for_worker();
    let mut locker = database.connect();
    let mut transaction = locker.transaction().expect("BEGIN");
    transaction
        .execute(
            "INSERT INTO job_results (job_type, params, status, started_at, lease)
             VALUES ('http_request', $1, 'running', now(), gen_random_uuid())",
            &[&json!({"url": server.url})],
        )
        .expect("a row of a worker that is gone");
    transaction.commit().expect("COMMIT");
    let mut transaction = locker.transaction().expect("BEGIN");
    // It may have been given back already; then there is nothing to keep, and nothing to test.
    transaction.execute("SELECT FROM job_results WHERE status = 'running' FOR UPDATE", &[]).expect("lock");
    works(&database, &server);
    transaction.rollback().expect("ROLLBACK");
    let mut client = database.connect();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 2);
    assert!(!cluster.log().contains("failed"), "{}", cluster.log());
}

#[test]
fn a_table_that_is_locked_for_long_costs_no_outcome_and_one_line_of_log() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let server = echo();
    works(&database, &server);
    let mut locker = database.connect();
    let mut transaction = locker.transaction().expect("BEGIN");
    transaction.batch_execute("LOCK TABLE job_results IN SHARE MODE").expect("LOCK");
    let mut client = database.connect();
    client.batch_execute("SET lock_timeout = 0").expect("SET");
    let url = server.url.clone();
    let inserter = std::thread::spawn(move || insert_jobs(&mut client, &url, 5));
    // Longer than several lock time-outs of the worker.
    transaction.batch_execute("SELECT pg_sleep(4)").expect("wait");
    transaction.rollback().expect("ROLLBACK");
    inserter.join().expect("the INSERT");
    let mut client = database.connect();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 6);
    assert_eq!(server.requests().len(), 6);
    assert!(cluster.log().matches("a transaction of the worker failed").count() <= 1, "{}", cluster.log());
}

#[test]
fn only_a_databases_owner_can_send_its_worker_away() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let worker = database.wait_for_worker();
    let mut client = cluster.connect("postgres");
    client.batch_execute("CREATE ROLE nobody LOGIN CREATEDB; SET ROLE nobody").expect("a role");
    let name = &database.name;
    for statement in [
        format!("DROP DATABASE {name}"),
        format!("CREATE DATABASE copied TEMPLATE {name}"),
        format!("ALTER DATABASE {name} RENAME TO renamed"),
        format!("ALTER DATABASE {name} SET TABLESPACE pg_default"),
    ] {
        assert_eq!(error_of(&mut client, &statement).0, "42501", "{statement}");
    }
    works(&database, &echo());
    assert_eq!(database.worker(), Some(worker));
}

#[test]
fn other_drops_start_no_worker_where_there_is_no_extension() {
    let cluster = Cluster::start(&["log_min_messages = debug1"]);
    let (database, other) = (cluster.empty_database(), cluster.database());
    let starts = || cluster.log().matches("starting background worker process \"nexus_hub worker\"").count() as i64;
    cluster.pg_ctl(&["stop", "-m", "fast"]);
    let before = starts();
    cluster.pg_ctl(&["start"]);
    let mut client = database.connect();
    // A new server looks into each database once, and into no other.
    let databases = "SELECT count(*) FROM pg_database WHERE datallowconn AND NOT datistemplate";
    let databases: i64 = value(&mut client, databases);
    wait_until("all databases have been looked into", || starts() == before + databases);
    for _ in 0..20 {
        client.batch_execute("CREATE SCHEMA s; CREATE TABLE s.t (); DROP TABLE s.t; DROP SCHEMA s").expect("DROP");
    }
    // When the launcher replaces a worker, it has done what it was asked for before.
    let worker = other.wait_for_worker();
    client.execute("SELECT pg_terminate_backend($1)", &[&worker]).expect("terminate");
    wait_until("another worker", || other.wait_for_worker() != worker);
    assert_eq!(starts(), before + databases + 1);
}

#[test]
fn a_worker_that_is_switched_off_takes_no_jobs_until_it_is_on_again() {
    let cluster = Cluster::start(&["nexus_hub.enabled = off", "nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let server = echo();
    let mut client = database.connect();
    database.wait_for_worker();
    insert_jobs(&mut client, &server.url, 3);
    let status: String =
        value(&mut client, "SELECT status FROM wait_for_job((SELECT min(id::text)::uuid FROM job_results), 500)");
    assert_eq!(status, "pending");
    cluster.configure(&[]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 3);
}

#[test]
fn an_outcome_counts_only_for_the_claim_it_belongs_to() {
    let cluster = Cluster::start(&["nexus_hub.request_timeout = '10min'"]);
    let database = cluster.database();
    let calls = Arc::new(AtomicUsize::new(0));
    let (counter, release) = (Arc::clone(&calls), Arc::new(AtomicUsize::new(0)));
    let gate = Arc::clone(&release);
    let server = FakeServer::start(move |_| {
        let call = counter.fetch_add(1, Ordering::SeqCst);
        while gate.load(Ordering::SeqCst) <= call {
            std::thread::yield_now();
        }
        Some(Answer::json(&call.to_string()))
    });
    let mut client = database.connect();
    insert_jobs(&mut client, &server.url, 1);
    wait_until("the first call runs", || calls.load(Ordering::SeqCst) == 1);
    client.batch_execute("UPDATE job_results SET status = 'pending'").expect("run it again");
    wait_until("the second call runs", || calls.load(Ordering::SeqCst) == 2);
    release.store(1, Ordering::SeqCst);
    // A job that comes after the first answer shows that this has been taken in, and left alone.
    let other = echo();
    works(&database, &other);
    assert_eq!(count_jobs(&mut client, "running"), 1);
    release.store(2, Ordering::SeqCst);
    wait_until("it is completed", || count_jobs(&mut client, "completed") == 2);
    let body: i32 = value(
        &mut client,
        &format!("SELECT (result ->> 'body')::integer FROM job_results WHERE params ->> 'url' = '{}'", server.url),
    );
    assert_eq!(body, 1, "the second call's answer");
}

#[test]
fn keys_that_a_reload_finds_broken_are_logged() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    database.wait_for_worker();
    cluster.write_key_file("c0ffee\n");
    database.connect().batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the log says so", || cluster.log().contains("line 1 is not 64 hex characters"));
    assert!(!cluster.log().contains("c0ffee"));
}

#[test]
fn few_descriptors_fail_no_job() {
    let cluster = Cluster::create(&[
        "nexus_hub.max_in_flight = 4000",
        "max_files_per_process = 100",
        "nexus_hub.egress_allow = '127.0.0.0/8'",
    ]);
    cluster.start_with_descriptors(1024);
    // A thousand hosts, each of which leaves a connection behind that is kept for a while.
    let server = FakeServer::start_at("0.0.0.0:0", |_| Some(Answer::json("{}")));
    let port = server.url.rsplit(':').next().expect("a port").trim_end_matches('/').to_owned();
    let database = cluster.database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params)
             SELECT 'http_request', jsonb_build_object('url', format('http://127.0.%s.%s:%s/', n / 250, 1 + n % 250, $1::text))
               FROM generate_series(1, 1000) n, generate_series(1, 3)",
            &[&port],
        )
        .expect("INSERT");
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 3_000);
    let failed: Option<String> = value(&mut client, "SELECT string_agg(DISTINCT error, chr(10)) FROM job_attempts");
    assert_eq!(failed, None, "every job at its first attempt: {}", cluster.log());
    assert!(!cluster.log().contains("out of file descriptors"), "PostgreSQL's own files have theirs");
}
