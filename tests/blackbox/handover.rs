//! Workers that make room for others: when their settings or their number change, and what becomes of what they have begun.

use crate::lanes::add_narrow_server;
use crate::support::*;
use postgres::Client;
use serde_json::json;
use uuid::Uuid;

fn echo() -> FakeServer {
    FakeServer::start(|_| Some(Answer::json("{}")))
}

fn get(client: &mut Client, url: &str) -> Uuid {
    client.query_one("SELECT http_get($1)", &[&url]).expect("http_get").get(0)
}

fn reload(client: &mut Client) {
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
}

/// Sets or resets something for the database, and has the server take it in.
fn alter(client: &mut Client, database: &Database<'_>, how: &str) {
    client.batch_execute(&format!("ALTER DATABASE {} {how}", database.name)).expect("ALTER DATABASE");
    reload(client);
}

/// A job that its server answers when the gate is opened.
fn in_flight(client: &mut Client) -> (Gate, FakeServer, Uuid) {
    let gate = Gate::default();
    let server = gate.server();
    let job = get(client, &server.url);
    wait_until("it is in flight", || server.requests().len() == 1);
    // Shown a moment later: whoever waits for it to be shown no more must have seen that.
    let shown = "SELECT EXISTS (SELECT FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w WHERE w ->> 'in_flight' <> '0')";
    wait_until("and shown", || value(client, shown));
    (gate, server, job)
}

/// Resets what the worker has been set, and waits for another one beside it.
fn hand_over(client: &mut Client, database: &Database<'_>) {
    alter(client, database, "RESET nexus_hub.enabled");
    wait_until("there is another one beside it", || processes(client, WORKER).len() == 2);
}

fn launcher(client: &mut Client) -> Option<i32> {
    value(client, "SELECT max(pid) FROM pg_stat_activity WHERE backend_type = 'nexus_hub launcher'")
}

/// A database whose worker knows, since it has connected, of a setting that can be reset.
fn with_a_switch(cluster: &Cluster) -> Database<'_> {
    let database = cluster.empty_database();
    let mut client = database.connect();
    client
        .batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.enabled = on", database.name))
        .expect("ALTER DATABASE");
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    database
}

fn runs(client: &mut Client, server: &FakeServer) {
    run_http(client, json!({"url": server.url})).completed();
}

/// The processes of a kind, those of workers or of rotations.
fn processes(client: &mut Client, kind: &str) -> Vec<i32> {
    let query =
        "SELECT pid FROM pg_stat_activity WHERE backend_type = $1 AND datname = current_database() ORDER BY pid";
    client.query(query, &[&kind]).expect("pg_stat_activity").iter().map(|row| row.get(0)).collect()
}

const WORKER: &str = "nexus_hub worker";

/// Waits until the worker takes no jobs: one that is put in stays pending for a while.
fn wait_until_off(client: &mut Client, server: &FakeServer) {
    wait_until("the switch is off", || {
        let job = get(client, &server.url);
        let status = "SELECT status FROM wait_for_job($1, 500)";
        client.query_one(status, &[&job]).expect("wait_for_job").get::<_, String>(0) == "pending"
    });
}

fn wait_until_all_are_completed(client: &mut Client) {
    wait_until("all are completed", || value(client, "SELECT bool_and(status = 'completed') FROM job_results"));
}

#[test]
fn what_is_set_for_a_database_takes_effect_at_once_and_in_the_same_worker() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = echo();
    runs(&mut client, &server);
    let workers = processes(&mut client, WORKER);
    let (gate, slow, job) = in_flight(&mut client);
    alter(&mut client, &database, "SET nexus_hub.enabled = off");
    wait_until_off(&mut client, &server);
    assert_eq!(processes(&mut client, WORKER), workers);
    gate.open();
    wait_for_job(&mut client, job).completed();
    alter(&mut client, &database, "RESET nexus_hub.enabled");
    wait_until_all_are_completed(&mut client);
    assert_eq!(slow.requests().len(), 1);
}

#[test]
fn what_is_set_for_all_or_for_the_worker_s_user_takes_effect_too() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = echo();
    runs(&mut client, &server);
    for whose in ["ROLE ALL", "ROLE postgres"] {
        for (number, how) in ["SET nexus_hub.enabled = off", "RESET nexus_hub.enabled"].into_iter().enumerate() {
            client.batch_execute(&format!("ALTER {whose} {how}")).expect("ALTER ROLE");
            reload(&mut client);
            if number == 0 {
                wait_until_off(&mut client, &server);
            } else {
                wait_until_all_are_completed(&mut client);
            }
        }
    }
}

#[test]
fn settings_of_others_change_no_worker() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = echo();
    runs(&mut client, &server);
    let workers = processes(&mut client, WORKER);
    alter(&mut client, &database, "SET work_mem = '5MB'");
    alter(&mut client, &database, "RESET work_mem");
    alter(&mut client, &database, "SET nexus_hub.enabled = off");
    wait_until_off(&mut client, &server);
    assert_eq!(processes(&mut client, WORKER), workers);
}

#[test]
fn a_worker_that_makes_room_finishes_its_requests_and_holds_up_no_job() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'", "nexus_hub.request_timeout = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    let server = echo();
    let (gate, slow, job) = in_flight(&mut client);
    let old = processes(&mut client, WORKER);
    hand_over(&mut client, &database);
    let draining = "SELECT count(*) FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w
                     WHERE w ->> 'state' = 'draining' AND w ->> 'in_flight' = '1'";
    wait_until("it is seen to drain", || value::<i64>(&mut client, draining) == 1);
    runs(&mut client, &server);
    // What it has in flight is its own: it can be cancelled, and nobody gives it back.
    let other = get(&mut client, &server.url);
    wait_for_job(&mut client, other).completed();
    let state = "SELECT status, crashes, attempt FROM job_results WHERE id = $1";
    let row = client.query_one(state, &[&job]).expect("the job");
    assert_eq!((row.get(0), row.get(1), row.get(2)), ("running".to_owned(), 0, 1));
    gate.open();
    wait_for_job(&mut client, job).completed();
    wait_until("the old one is gone", || {
        let now = processes(&mut client, WORKER);
        now.len() == 1 && now != old
    });
    assert_eq!(slow.requests().len(), 1);
    let row = client.query_one(state, &[&job]).expect("the job");
    assert_eq!((row.get(0), row.get(1), row.get(2)), ("completed".to_owned(), 0, 1));
}

#[test]
fn a_job_of_a_worker_that_makes_room_can_be_cancelled() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'", "nexus_hub.request_timeout = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    let (gate, _, job) = in_flight(&mut client);
    hand_over(&mut client, &database);
    client.execute("SELECT cancel_job($1)", &[&job]).expect("cancel_job");
    wait_until("the old one is gone", || processes(&mut client, WORKER).len() == 1);
    gate.open();
}

#[test]
fn an_answer_whose_row_is_locked_is_kept_when_its_worker_makes_room() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    for how in ["RESET nexus_hub.enabled", "number"] {
        let (gate, slow, job) = in_flight(&mut client);
        let mut locking = database.connect();
        let mut lock = locking.transaction().expect("BEGIN");
        lock.execute("SELECT FROM job_results WHERE id = $1 FOR UPDATE", &[&job]).expect("a lock");
        gate.open();
        wait_until("the answer is there", || {
            let in_flight =
                "SELECT bool_and(w ->> 'in_flight' = '0') FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w";
            value::<Option<bool>>(&mut client, in_flight) == Some(true)
        });
        if how == "number" {
            cluster.configure(&["nexus_hub.poll_interval = '1h'", "nexus_hub.workers_per_database = 2"]);
            reload(&mut client);
        } else {
            alter(&mut client, &database, how);
        }
        let draining = "SELECT count(*) FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w WHERE w ->> 'state' = 'draining'";
        wait_until("the worker drains", || value::<i64>(&mut client, draining) == 1);
        lock.rollback().expect("ROLLBACK");
        wait_for_job(&mut client, job).completed();
        assert_eq!(slow.requests().len(), 1, "{how}");
    }
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_results WHERE crashes > 0 OR failures > 0"), 0);
}

#[test]
fn an_answer_whose_row_is_locked_for_a_moment_is_kept_when_its_worker_is_ended() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let (gate, slow, job) = in_flight(&mut client);
    let mut locking = database.connect();
    let mut lock = locking.transaction().expect("BEGIN");
    lock.execute("SELECT FROM job_results WHERE id = $1 FOR UPDATE", &[&job]).expect("a lock");
    gate.open();
    wait_until("the answer is there", || {
        let in_flight = "SELECT nexus_hub_health() -> 'workers' -> 0 ->> 'in_flight' = '0'";
        value::<Option<bool>>(&mut client, in_flight) == Some(true)
    });
    // As a fast shutdown does it: the one who keeps the lock is ended, too.
    let worker = database.worker().expect("a worker");
    cluster.signal("TERM", worker);
    lock.rollback().expect("ROLLBACK");
    wait_for_job(&mut client, job).completed();
    wait_until("it has ended", || database.worker() != Some(worker));
    assert_eq!(slow.requests().len(), 1);
    assert_eq!(value::<i32>(&mut client, "SELECT crashes FROM job_results"), 0);
}

#[test]
fn a_number_of_workers_that_is_written_but_not_loaded_changes_nothing() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = echo();
    runs(&mut client, &server);
    cluster.configure(&["nexus_hub.workers_per_database = 2"]);
    for _ in 0..3 {
        let worker = database.wait_for_worker();
        cluster.signal("TERM", worker);
        wait_until("it is gone", || database.worker() != Some(worker));
        runs(&mut client, &server);
        assert_eq!(processes(&mut client, WORKER).len(), 1);
    }
    reload(&mut client);
    wait_until("there are two", || processes(&mut client, WORKER).len() == 2);
    runs(&mut client, &server);
}

#[test]
fn a_cancel_request_ends_neither_the_worker_nor_the_launcher() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let (gate, slow, job) = in_flight(&mut client);
    let all = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE backend_type LIKE 'nexus_hub%'";
    let before: Vec<i32> = value(&mut client, all);
    assert_eq!(before.len(), 2);
    for _ in 0..20 {
        client
            .batch_execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'nexus_hub%'")
            .expect("cancel");
        runs(&mut client, &echo());
    }
    gate.open();
    wait_for_job(&mut client, job).completed();
    assert_eq!(value::<Vec<i32>>(&mut client, all), before);
    assert_eq!(slow.requests().len(), 1);
}

#[test]
fn a_launcher_that_comes_anew_leaves_those_alone_that_make_room() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100", "nexus_hub.request_timeout = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let (gate, slow, job) = in_flight(&mut client);
    let server = echo();
    for number in 1..=3 {
        // A worker for each, beside the first one.
        alter(&mut client, &database, "SET nexus_hub.enabled = off");
        wait_until_off(&mut client, &server);
        alter(&mut client, &database, "RESET nexus_hub.enabled");
        let old = launcher(&mut client).expect("a launcher");
        cluster.signal("TERM", old);
        wait_until("there is a new launcher", || launcher(&mut client).is_some_and(|pid| pid != old));
        wait_until("there is one worker beside the first", || processes(&mut client, WORKER).len() == 2);
        runs(&mut client, &server);
        assert_eq!(slow.requests().len(), 1, "{number}");
    }
    gate.open();
    wait_for_job(&mut client, job).completed();
    wait_until("there is one worker", || processes(&mut client, WORKER).len() == 1);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_results WHERE crashes > 0"), 0);
    assert_eq!(slow.requests().len(), 1);
    let log = cluster.log();
    assert!(!log.contains("gave back"), "{log}");
}

#[test]
fn a_hand_over_that_ends_while_there_is_no_launcher_leaves_one_worker() {
    let cluster = Cluster::start(&["nexus_hub.request_timeout = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    let server = echo();
    // The new worker is behind the old one in shared memory, and then before it.
    for round in 0..2 {
        if round > 0 {
            alter(&mut client, &database, "SET nexus_hub.enabled = off");
            wait_until_off(&mut client, &server);
            alter(&mut client, &database, "SET nexus_hub.enabled = on");
            runs(&mut client, &server);
        }
        let (gate, _, job) = in_flight(&mut client);
        hand_over(&mut client, &database);
        runs(&mut client, &server);
        let old = launcher(&mut client).expect("a launcher");
        cluster.signal("STOP", old);
        cluster.signal("TERM", old);
        gate.open();
        wait_for_job(&mut client, job).completed();
        wait_until("the old one is gone", || processes(&mut client, WORKER).len() == 1);
        cluster.signal("CONT", old);
        wait_until("there is a new launcher", || launcher(&mut client).is_some_and(|pid| pid != old));
        let workers = "SELECT coalesce(string_agg(w ->> 'state', ' '), '') FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w";
        wait_until("one is known", || value::<String>(&mut client, workers) == "running");
        let worker = database.wait_for_worker();
        cluster.signal("TERM", worker);
        wait_until("it is replaced", || database.wait_for_worker() != worker);
        assert_eq!(value::<String>(&mut client, workers), "running");
        runs(&mut client, &server);
    }
}

#[test]
fn a_server_gets_no_more_requests_at_a_time_while_workers_make_room() {
    let cluster = Cluster::start(&[]);
    let narrow = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_narrow_server(&mut client, &narrow);
    client
        .batch_execute(
            "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
             SELECT md5((n % 20)::text)::uuid, 'tool_invoke', 'narrow', 'slow', '{\"ms\": 100}' FROM generate_series(1, 60) n",
        )
        .expect("INSERT");
    for number in [2, 3, 1] {
        let ended = count_jobs(&mut client, "completed");
        wait_until("some are completed", || count_jobs(&mut client, "completed") >= ended + 6);
        cluster.configure(&[&format!("nexus_hub.workers_per_database = {number}")]);
        reload(&mut client);
    }
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 60);
    assert_eq!(narrow.stats()["most_asleep"], 2);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_results WHERE attempt > 1 OR crashes > 0"), 0);
}

#[test]
fn a_worker_that_makes_room_lets_go_of_an_extension_that_is_dropped() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1h'", "nexus_hub.request_timeout = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    let (gate, ..) = in_flight(&mut client);
    hand_over(&mut client, &database);
    client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
    wait_until("both are gone", || processes(&mut client, WORKER).is_empty());
    gate.open();
}

#[test]
fn where_there_is_no_process_for_another_one_a_worker_makes_room_before_long() {
    // The launcher, PostgreSQL's own for logical replication, and one worker.
    let cluster = Cluster::start(&["max_worker_processes = 3", "nexus_hub.request_timeout = '1h'"]);
    let database = with_a_switch(&cluster);
    let mut client = database.connect();
    let (gate, _, job) = in_flight(&mut client);
    alter(&mut client, &database, "RESET nexus_hub.enabled");
    let state = "SELECT nexus_hub_health() -> 'workers' -> 0 ->> 'state'";
    wait_until("it drains", || value::<Option<String>>(&mut client, state).as_deref() == Some("draining"));
    runs(&mut client, &echo());
    assert!(cluster.log().contains("raise max_worker_processes"), "{}", cluster.log());
    gate.open();
    wait_for_job(&mut client, job).completed();
    let row = client.query_one("SELECT attempt, crashes FROM job_results WHERE id = $1", &[&job]).expect("the job");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1)), (1, 0), "given back, and no fault of the job");
}

#[test]
fn a_database_that_is_closed_for_a_while_keeps_its_counters() {
    let cluster = Cluster::start(&[]);
    let (one, other) = (cluster.database(), cluster.database());
    let server = echo();
    let mut client = one.connect();
    for _ in 0..3 {
        runs(&mut client, &server);
    }
    drop(client);
    let completed = |client: &mut Client| -> i64 {
        value(
            client,
            "SELECT coalesce(sum(split_part(line, ' ', 2)::numeric), 0)::bigint
               FROM string_to_table(nexus_hub_metrics(), E'\\n') AS line
              WHERE line LIKE 'nexus_hub_jobs_total%completed%'",
        )
    };
    let mut postgres = cluster.connect("postgres");
    postgres.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", one.name)).expect("ALTER DATABASE");
    // Databases that are new have the list read again.
    let new: Vec<_> = (0..2).map(|_| cluster.database()).collect();
    for database in new.iter().chain([&other]) {
        let mut client = database.connect();
        runs(&mut client, &server);
        assert_eq!(completed(&mut client), 1);
    }
    postgres.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", one.name)).expect("ALTER DATABASE");
    assert_eq!(completed(&mut one.connect()), 3);
}

#[test]
fn a_switch_set_for_a_database_while_its_worker_starts_is_not_missed() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let server = echo();
    let mut client = database.connect();
    runs(&mut client, &server);
    // A worker has connected, and comes no further than this lock, while the switch is set.
    let mut starting = |how: &str| {
        let old = database.worker();
        let mut other = database.connect();
        let mut lock = other.transaction().expect("BEGIN");
        lock.batch_execute("LOCK pg_catalog.pg_extension").expect("LOCK");
        lock.execute("SELECT pg_terminate_backend($1)", &[&old]).expect("the old worker");
        wait_until("the new worker waits", || {
            lock.query_one(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'pg_catalog.pg_extension'::regclass)",
                &[],
            )
            .expect("pg_locks")
            .get(0)
        });
        client.batch_execute(&format!("ALTER DATABASE {} {how}", database.name)).expect("ALTER DATABASE");
        lock.commit().expect("COMMIT");
    };
    starting("SET nexus_hub.enabled = off");
    let mut client = database.connect();
    get(&mut client, &server.url);
    let job = "SELECT status FROM wait_for_job((SELECT id FROM job_results WHERE status <> 'completed'), 500)";
    assert_eq!(value::<String>(&mut client, job), "pending");
    starting("RESET nexus_hub.enabled");
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 2);
}
