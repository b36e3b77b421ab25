//! Who waits for whom: priorities, schedules, caps, fair shares and circuit breakers.

use crate::support::*;
use serde_json::json;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use uuid::Uuid;

/// A server that counts how many requests are with it at a time.
struct Counting {
    server: FakeServer,
    most: Arc<AtomicUsize>,
}

impl Counting {
    fn start() -> Self {
        let (now, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
        let highest = Arc::clone(&most);
        let server = FakeServer::start(move |_| {
            highest.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            // Long enough for others to come in beside it, if they are let.
            std::thread::sleep(std::time::Duration::from_millis(3));
            now.fetch_sub(1, SeqCst);
            Some(Answer::json("{}"))
        });
        Self { server, most }
    }
}

fn insert(client: &mut postgres::Client, url: &str, number: i64) {
    client
        .execute(
            "INSERT INTO job_results (job_type, params) SELECT 'http_request', jsonb_build_object('url', $1::text) FROM generate_series(1, $2::bigint)",
            &[&url, &number],
        )
        .expect("INSERT");
}

fn completed_at(client: &mut postgres::Client, url: &str) -> i64 {
    client
        .query_one("SELECT count(*) FROM job_results WHERE status = 'completed' AND params ->> 'url' = $1", &[&url])
        .expect("count")
        .get(0)
}

#[test]
fn jobs_start_by_priority_then_by_time() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 1"]);
    let gate = Gate::default();
    let server = gate.server();
    let database = cluster.database();
    let mut client = database.connect();
    insert(&mut client, &server.url, 1);
    wait_until("the first job is with the server", || server.requests().len() == 1);
    // In one transaction: what is committed a moment later may come a moment late.
    client.batch_execute("BEGIN").expect("BEGIN");
    for (path, priority, run_at) in [
        ("e", 9, "now()"),
        ("d", 5, "now()"),
        ("c", 5, "now() - interval '1 hour'"),
        ("b", 5, "now() - interval '2 hours'"),
        ("a", 1, "now()"),
    ] {
        let job = format!(
            "SELECT create_job(NULL, 'http_request', NULL, p_params => '{{\"url\": \"{}{path}\"}}', p_priority => {priority}, p_run_at => {run_at})",
            server.url
        );
        client.batch_execute(&job).expect("create_job");
    }
    client.batch_execute("COMMIT").expect("COMMIT");
    gate.open();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 6);
    let paths: String = server.requests()[1..].iter().map(|request| &request[5..6]).collect();
    assert_eq!(paths, "abcde");
}

#[test]
fn a_job_waits_for_its_time_and_nothing_else() {
    // No poll comes to its help.
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = cluster.database();
    let mut client = database.connect();
    run_http(&mut client, json!({"url": server.url})).completed();
    let job: Uuid = client
        .query_one("SELECT http_get($1, run_at => clock_timestamp() + interval '2 s')", &[&server.url])
        .expect("http_get")
        .get(0);
    // Something else meanwhile makes the worker look again.
    run_http(&mut client, json!({"url": server.url})).completed();
    let waits = format!("SELECT status = 'pending' OR clock_timestamp() >= run_at FROM job_results WHERE id = '{job}'");
    assert!(value::<bool>(&mut client, &waits));
    wait_for_job(&mut client, job).completed();
    assert!(value::<bool>(&mut client, "SELECT bool_and(started_at >= run_at) FROM job_results"));
}

#[test]
fn a_job_that_is_moved_to_an_earlier_time_or_committed_late_is_found() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = cluster.database();
    let mut client = database.connect();
    let mut late = database.connect();
    late.batch_execute("BEGIN").expect("BEGIN");
    let early: Uuid = late.query_one("SELECT http_get($1)", &[&server.url]).expect("http_get").get(0);
    for _ in 0..20 {
        run_http(&mut client, json!({"url": server.url})).completed();
    }
    late.batch_execute("COMMIT").expect("COMMIT");
    wait_for_job(&mut client, early).completed();
    let job: Uuid = client
        .query_one("SELECT http_get($1, run_at => now() + interval '1 day')", &[&server.url])
        .expect("http_get")
        .get(0);
    client.execute("UPDATE job_results SET run_at = now() - interval '1 day' WHERE id = $1", &[&job]).expect("UPDATE");
    wait_for_job(&mut client, job).completed();
}

/// A server of everybody's that takes two requests at a time.
pub fn add_narrow_server(client: &mut postgres::Client, server: &McpServer) {
    let mut config = server.config();
    config["max_in_flight"] = json!(2);
    client
        .execute("INSERT INTO system_servers (id, name, config) VALUES ('narrow', 'Narrow', $1)", &[&config])
        .expect("INSERT");
}

/// Calls of many users.
fn call_narrow_server(client: &mut postgres::Client, number: i64) {
    client
        .execute(
            "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
             SELECT md5((n % 20)::text)::uuid, 'tool_invoke', 'narrow', 'slow', '{\"ms\": 5}' FROM generate_series(1, $1::bigint) n",
            &[&number],
        )
        .expect("INSERT");
}

#[test]
fn a_server_never_gets_more_requests_at_a_time_than_its_config_says() {
    let narrow = McpServer::start(&[]);
    let other = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = shared().database();
    let mut client = database.connect();
    add_narrow_server(&mut client, &narrow);
    call_narrow_server(&mut client, 100);
    // Others are not held up.
    run_http(&mut client, json!({"url": other.url})).completed();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 101);
    assert_eq!(narrow.stats()["most_asleep"], 2);
}

#[test]
fn a_host_never_gets_more_requests_at_a_time_than_the_setting_says() {
    let cluster = Cluster::start(&["nexus_hub.max_in_flight_per_host = 3"]);
    let counting = Counting::start();
    let database = cluster.database();
    let mut client = database.connect();
    insert(&mut client, &counting.server.url, 300);
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 300);
    assert_eq!(counting.most.load(SeqCst), 3);
}

#[test]
fn a_slow_tenant_leaves_places_for_others() {
    let gate = Gate::default();
    let slow = gate.server();
    let good = FakeServer::start(|_| Some(Answer::json("{}")));
    let cluster = Cluster::start(&["nexus_hub.max_in_flight = 50"]);
    let database = cluster.database();
    let mut client = database.connect();
    insert(&mut client, &slow.url, 1_000);
    wait_until("its share is taken", || slow.requests().len() == 40);
    insert(&mut client, &good.url, 500);
    wait_until("the other's jobs are completed", || completed_at(&mut client, &good.url) == 500);
    assert_eq!(slow.requests().len(), 40);
    gate.open();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 1_500);
}

#[test]
fn a_dead_hosts_jobs_wait_behind_its_breaker_and_a_good_hosts_jobs_go_on() {
    let cluster = Cluster::start(&[
        "nexus_hub.breaker_threshold = 5",
        "nexus_hub.breaker_cooldown = 100",
        "nexus_hub.retry_base_delay = 100",
        "nexus_hub.retry_max_delay = 200",
    ]);
    let good = FakeServer::start(|_| Some(Answer::json("{}")));
    // A port that nobody listens on, and where somebody will.
    let port = ClosedPort::reserve();
    let address = port.address();
    let database = cluster.database();
    let mut client = database.connect();
    let url = format!("http://{address}/");
    client
        .execute(
            "INSERT INTO job_results (job_type, params, max_attempts)
             SELECT 'http_request', jsonb_build_object('url', $1::text), 100 FROM generate_series(1, 5000)",
            &[&url],
        )
        .expect("INSERT");
    insert(&mut client, &good.url, 2_000);
    wait_until("the breaker is open", || {
        let open = "SELECT count(*) FROM circuit_breakers WHERE host = $1 AND failures >= 5 AND error LIKE '%connection refused%'";
        client.query_one(open, &[&address.to_string()]).expect("circuit_breakers").get::<_, i64>(0) == 1
    });
    wait_until("the good host's jobs are completed", || completed_at(&mut client, &good.url) == 2_000);
    assert_eq!(count_jobs(&mut client, "completed"), 2_000);
    // Most attempts were shared failures of a probe, and no job has lost more than its own.
    wait_until("a probe's failure is shared", || {
        value::<bool>(&mut client, "SELECT EXISTS (SELECT FROM job_attempts WHERE error LIKE '%circuit breaker%')")
    });
    let server = FakeServer::start_at(&address.to_string(), |_| Some(Answer::json("{}")));
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 7_000);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM circuit_breakers"), 0);
    assert_eq!(server.requests().len(), 5_000);
}

#[test]
fn several_workers_share_the_jobs_and_no_job_is_sent_twice() {
    let cluster = Cluster::start(&["nexus_hub.workers_per_database = 3"]);
    let workers = |client: &mut postgres::Client, name: &str| -> i64 {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker' AND datname = $1";
        client.query_one(query, &[&name]).expect("pg_stat_activity").get(0)
    };
    let servers: Vec<_> = (0..12).map(|_| FakeServer::start(|_| Some(Answer::json("{}")))).collect();
    let narrow = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    wait_until("there are three workers", || workers(&mut client, &database.name) == 3);
    add_narrow_server(&mut client, &narrow);
    for number in [3, 1, 2] {
        cluster.configure(&[&format!("nexus_hub.workers_per_database = {number}")]);
        client.batch_execute("SELECT pg_reload_conf()").expect("reload");
        for server in &servers {
            insert(&mut client, &server.url, 100);
        }
        call_narrow_server(&mut client, 60);
        wait_until("all have ended", || count_jobs(&mut client, "pending") + count_jobs(&mut client, "running") == 0);
        wait_until("there are as many workers as there are to be", || workers(&mut client, &database.name) == number);
    }
    assert_eq!(count_jobs(&mut client, "completed"), 3 * 1_260);
    let mut keys = HashSet::new();
    for request in servers.iter().flat_map(FakeServer::requests) {
        let key = request.lines().find_map(|line| line.strip_prefix("idempotency-key: ")).expect("a key").to_owned();
        assert!(keys.insert(key), "sent twice");
    }
    assert_eq!(keys.len(), 3 * 1_200);
    assert_eq!(narrow.stats()["most_asleep"], 2);
}

#[test]
fn the_jobs_of_one_of_several_workers_are_taken_up_when_it_dies() {
    let cluster = Cluster::start(&["nexus_hub.workers_per_database = 2", "restart_after_crash = on"]);
    // A worker's share goes by a hash of the address: among so many, one that has all of them does not happen.
    let gates: Vec<_> = (0..40).map(|_| Gate::default()).collect();
    let servers: Vec<_> = gates.iter().map(Gate::server).collect();
    let database = cluster.database();
    let mut client = database.connect();
    for server in &servers {
        insert(&mut client, &server.url, 2);
    }
    wait_until("all are with the servers", || servers.iter().all(|server| server.requests().len() == 2));
    // In order, so that only this one ends: its jobs are given back, the other's are not.
    let query = "SELECT pg_terminate_backend(min(pid)) FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker'";
    assert!(value::<bool>(&mut client, query));
    wait_until("some are with the servers again", || servers.iter().any(|server| server.requests().len() == 4));
    gates.iter().for_each(Gate::open);
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 80);
    let sent: Vec<_> = servers.iter().map(|server| server.requests().len()).collect();
    assert!(sent.iter().all(|sent| matches!(sent, 2 | 4)) && sent.contains(&2), "{sent:?}");
}
