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
    let server = FakeServer::start(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        Some(Answer::json("{}"))
    });
    let worker = database.wait_for_worker();
    insert_jobs(&mut database.connect(), &server.url, 1000);
    wait_until("a part of the jobs has run", || killer.load(Ordering::SeqCst) >= 200);
    cluster.signal("KILL", worker);
    wait_until("the server has restarted", || cluster.log().contains("reinitializing"));
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
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let server = silent();
    let mut client = database.connect();
    insert_jobs(&mut client, &server.url, 100);
    wait_until("all run", || count_jobs(&mut client, "running") == 100);
    drop(client);
    // Their time-out is 30 s; three times the promised 3 s is patience enough for a busy machine.
    cluster.pg_ctl(&["-t", "9", "stop", "-m", "fast"]);
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
    assert!(!log.contains("ERROR") && !log.contains("failed"), "{log}");
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
    assert_eq!(without.worker(), None);
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
    client.batch_execute(&format!("DROP DATABASE {}", busy.name)).expect("DROP DATABASE");
    client.batch_execute(&format!("CREATE DATABASE copied TEMPLATE {}", idle.name)).expect("CREATE DATABASE");
    client.batch_execute(&format!("ALTER DATABASE {} RENAME TO renamed", idle.name)).expect("RENAME");
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
            "INSERT INTO job_results (job_type, params) VALUES ('http_request', $1) RETURNING id",
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
    drop(client);
    primary.pg_ctl(&["stop", "-m", "immediate"]);
    standby.pg_ctl(&["promote"]);
    let mut client = standby.connect(&database.name);
    run_http(&mut client, json!({"url": server.url})).completed();
    assert!(!standby.log().contains("nexus_hub:"), "{}", standby.log());
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
