//! MCP jobs keep to the rate limits of their servers: those over them wait, and hold up nobody.

use crate::support::*;
use postgres::Client;
use serde_json::{Value, json};

/// No poll comes to anybody's help.
const NO_POLL: &str = "nexus_hub.poll_interval = '1h'";

fn add_system_server(client: &mut Client, name: &str, config: &Value, limit: i32) {
    client
        .execute(
            "INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ($1, $1, $2, $3)",
            &[&name, &config, &limit],
        )
        .expect("INSERT");
}

/// Adds jobs that add 1 and 2, all in one transaction.
fn insert(client: &mut Client, user: &str, server: &str, number: i64) {
    client
        .execute(
            "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
             SELECT $1::text::uuid, 'tool_invoke', $2, 'add', '{\"a\": 1, \"b\": 2}' FROM generate_series(1, $3::bigint)",
            &[&user, &server, &number],
        )
        .expect("INSERT");
}

fn jobs(client: &mut Client, user: &str, server: &str, status: &str) -> i64 {
    client
        .query_one(
            "SELECT count(*) FROM job_results WHERE user_id = $1::text::uuid AND server_id = $2 AND status = $3",
            &[&user, &server, &status],
        )
        .expect("count")
        .get(0)
}

fn early_in_a_minute(client: &mut Client) {
    wait_until("the minute is young", || value(client, "SELECT extract(second FROM clock_timestamp()) < 30"));
}

/// Waits until so many jobs of the user are completed, and makes sure that no other one comes after them.
fn only(client: &mut Client, user: &str, server: &str, number: i64) {
    wait_until("as many are completed as may be", || jobs(client, user, server, "completed") == number);
    // Another user's job after them: had there been one more to send, it would have gone before.
    let later = client
        .query_one(
            "SELECT create_job($1::text::uuid, 'tool_invoke', 'free', 'add', '{\"a\": 1, \"b\": 2}', 9)",
            &[&BOB],
        )
        .expect("create_job")
        .get(0);
    wait_for_job(client, later).completed();
    assert_eq!(jobs(client, user, server, "running"), 0);
    assert_eq!(jobs(client, user, server, "completed"), number);
}

#[test]
fn jobs_over_the_limit_wait_for_the_next_minute_and_hold_up_nobody() {
    let cluster = Cluster::start(&[NO_POLL]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "narrow", &server.config(), 3);
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    wait_until("the minute ends soon", || {
        value(&mut client, "SELECT extract(second FROM clock_timestamp()) BETWEEN 40 AND 50")
    });
    let minute: String = value(&mut client, "SELECT date_trunc('minute', clock_timestamp())::text");
    insert(&mut client, ALICE, "narrow", 7);
    insert(&mut client, BOB, "narrow", 2);
    insert(&mut client, ALICE, "free", 50);
    only(&mut client, ALICE, "narrow", 3);
    wait_until("nobody else waits", || {
        jobs(&mut client, BOB, "narrow", "completed") == 2 && jobs(&mut client, ALICE, "free", "completed") == 50
    });
    let untouched = "SELECT count(*) FROM job_results
        WHERE status = 'pending' AND attempt = 0 AND error IS NULL AND started_at IS NULL AND server_id = 'narrow'";
    assert_eq!(value::<i64>(&mut client, untouched), 4, "they are not failed, and have used no attempt up");
    wait_until("the next minute lets as many go", || jobs(&mut client, ALICE, "narrow", "completed") == 6);
    only(&mut client, ALICE, "narrow", 6);
    let counts: Vec<(bool, i32)> = client
        .query(
            &format!(
                "SELECT window_start = '{minute}', request_count FROM rate_limit_tracking
                  WHERE server_id = 'narrow' AND user_id = '{ALICE}' ORDER BY window_start"
            ),
            &[],
        )
        .expect("rate_limit_tracking")
        .into_iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(counts, [(true, 3), (false, 3)], "what waits is no violation");
    // Nobody has to wait for another minute.
    client
        .batch_execute("INSERT INTO rate_limit_overrides (server_id, request_limit) VALUES ('narrow', 100)")
        .expect("INSERT");
    wait_until("the last one goes", || jobs(&mut client, ALICE, "narrow", "completed") == 7);
}

#[test]
fn jobs_and_calls_are_counted_together_and_a_reset_lets_jobs_go() {
    let cluster = Cluster::start(&[NO_POLL]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "narrow", &server.config(), 5);
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    early_in_a_minute(&mut client);
    let call = format!("SELECT check_rate_limit('narrow', '{ALICE}', 5)");
    assert!(value::<bool>(&mut client, &call) && value::<bool>(&mut client, &call));
    insert(&mut client, ALICE, "narrow", 7);
    only(&mut client, ALICE, "narrow", 3);
    assert!(!value::<bool>(&mut client, &call), "the jobs have used the rest up");
    assert!(value::<bool>(&mut client, &format!("SELECT reset_server_rate_limit('narrow', '{ALICE}')")));
    wait_until("all go", || jobs(&mut client, ALICE, "narrow", "completed") == 7);
    let count = "SELECT sum(request_count)::integer FROM rate_limit_tracking WHERE server_id = 'narrow'";
    assert_eq!(value::<i32>(&mut client, count), 4, "counted since the reset");
}

#[test]
fn jobs_and_calls_at_the_same_time_never_get_one_too_many() {
    let cluster = Cluster::start(&[NO_POLL, "nexus_hub.workers_per_database = 2"]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    for name in ["a", "b", "c", "d"] {
        add_system_server(&mut client, name, &server.config(), 150);
    }
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    early_in_a_minute(&mut client);
    for name in ["a", "b", "c", "d"] {
        insert(&mut client, ALICE, name, 200);
    }
    let call = format!(
        "SELECT s, count(*) FILTER (WHERE check_rate_limit(s, '{ALICE}', 150))
           FROM generate_series(1, 60), unnest(ARRAY['a', 'b', 'c', 'd']) AS s GROUP BY s ORDER BY s"
    );
    let allowed: Vec<Vec<i64>> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let rows = database.connect().query(&call, &[]).expect("calls");
                    rows.into_iter().map(|row| row.get(1)).collect()
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().expect("a caller")).collect()
    });
    for (place, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let calls: i64 = allowed.iter().map(|counts| counts[place]).sum();
        only(&mut client, ALICE, name, 150 - calls);
    }
}

#[test]
fn exemptions_and_changes_of_a_servers_row_count_for_jobs() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = '1s'"]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    add_system_server(&mut client, "shut", &server.config(), 0);
    let own = add_server(&mut client, "own", server.config());
    add_server(&mut client, "open", server.config());
    let limit = |client: &mut Client, limit: Option<i32>| {
        client
            .execute("UPDATE user_servers SET rate_limit_per_minute = $2 WHERE id = $1", &[&own, &limit])
            .expect("UPDATE");
    };
    limit(&mut client, Some(2));
    early_in_a_minute(&mut client);
    insert(&mut client, ALICE, "own", 5);
    insert(&mut client, ALICE, "open", 100);
    only(&mut client, ALICE, "own", 2);
    wait_until("a user's own server has no limit at first", || jobs(&mut client, ALICE, "open", "completed") == 100);
    limit(&mut client, Some(4));
    only(&mut client, ALICE, "own", 4);
    limit(&mut client, None);
    wait_until("a limit that is gone holds nobody up", || jobs(&mut client, ALICE, "own", "completed") == 5);

    insert(&mut client, ALICE, "shut", 2);
    only(&mut client, ALICE, "shut", 0);
    client.execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ($1)", &[&ALICE]).expect("INSERT");
    wait_until("who is exempt does not wait", || jobs(&mut client, ALICE, "shut", "completed") == 2);
}

#[test]
fn nobody_gets_past_a_limit_by_changing_servers_and_a_lower_one_counts_at_the_next_claim() {
    let cluster = Cluster::start(&[NO_POLL]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "lowered", &server.config(), 1000);
    add_system_server(&mut client, "shared", &server.config(), 5);
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    let own = add_server(&mut client, "shared", server.config());
    early_in_a_minute(&mut client);
    // The lane of these jobs leads to the user's own server, which has no limit.
    insert(&mut client, ALICE, "shared", 20);
    only(&mut client, ALICE, "shared", 20);
    client.execute("SELECT update_server($1, p_enabled => false)", &[&own]).expect("update_server");
    insert(&mut client, ALICE, "shared", 300);
    only(&mut client, ALICE, "shared", 25);
    let count =
        format!("SELECT request_count FROM rate_limit_tracking WHERE server_id = 'shared' AND user_id = '{ALICE}'");
    assert_eq!(value::<i32>(&mut client, &count), 5);
    let untouched = "SELECT count(*) FROM job_results WHERE status = 'pending' AND attempt = 0 AND started_at IS NULL";
    assert_eq!(value::<i64>(&mut client, untouched), 295, "what was claimed and given back is as it was");
    insert(&mut client, ALICE, "lowered", 10);
    only(&mut client, ALICE, "lowered", 10);
    client.batch_execute("UPDATE system_servers SET rate_limit_per_minute = 15 WHERE id = 'lowered'").expect("UPDATE");
    insert(&mut client, ALICE, "lowered", 50);
    only(&mut client, ALICE, "lowered", 15);
}

#[test]
fn jobs_that_are_cancelled_or_locked_use_nothing_up() {
    let cluster = Cluster::start(&[NO_POLL]);
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "narrow", &server.config(), 5);
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    early_in_a_minute(&mut client);
    let minute: String = value(&mut client, "SELECT date_trunc('minute', clock_timestamp())::text");
    insert(&mut client, ALICE, "narrow", 65);
    only(&mut client, ALICE, "narrow", 5);
    client.batch_execute("UPDATE job_results SET status = 'cancelled' WHERE status = 'pending'").expect("UPDATE");
    value::<bool>(&mut client, &format!("SELECT reset_server_rate_limit('narrow', '{ALICE}')"));
    let job = create_job(&mut client, "tool_invoke", "narrow", Some("add"), json!({"a": 1, "b": 2}));
    wait_for_job(&mut client, job).completed();
    let started: String = value(
        &mut client,
        &format!("SELECT date_trunc('minute', started_at)::text FROM job_results WHERE id = '{job}'"),
    );
    assert_eq!(started, minute, "it has not waited for the next one");

    // Of five that may go, one is locked by somebody: another one goes instead.
    let mut other = database.connect();
    other.batch_execute("BEGIN").expect("BEGIN");
    early_in_a_minute(&mut client);
    client.batch_execute("BEGIN").expect("BEGIN");
    insert(&mut client, BOB, "narrow", 20);
    let first: uuid::Uuid = value(&mut client, "SELECT min(id::text)::uuid FROM job_results WHERE status = 'pending'");
    client
        .batch_execute("UPDATE job_results SET run_at = clock_timestamp() + interval '8 s' WHERE status = 'pending'")
        .expect("UPDATE");
    client.batch_execute("COMMIT").expect("COMMIT");
    other.execute("SELECT FROM job_results WHERE id = $1 FOR UPDATE", &[&first]).expect("a lock");
    wait_until("five others are completed", || jobs(&mut client, BOB, "narrow", "completed") == 5);
    assert_eq!(
        value::<String>(&mut client, &format!("SELECT status FROM job_results WHERE id = '{first}'")),
        "pending"
    );
    other.batch_execute("ROLLBACK").expect("ROLLBACK");
}

#[test]
fn every_attempt_counts() {
    let cluster = Cluster::start(&[NO_POLL, "nexus_hub.retry_base_delay = '1ms'", "nexus_hub.retry_max_delay = '1ms'"]);
    let broken = FakeServer::start(|_| Some(Answer::new("503 Service Unavailable", "text/plain", "not now")));
    let server = McpServer::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_system_server(&mut client, "broken", &json!({"url": broken.url}), 4);
    add_system_server(&mut client, "free", &server.config(), 1_000_000);
    early_in_a_minute(&mut client);
    client
        .execute(
            "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params, max_attempts)
             VALUES ($1::text::uuid, 'tool_invoke', 'broken', 'add', '{}', 100)",
            &[&ALICE],
        )
        .expect("INSERT");
    let attempts = "SELECT attempt FROM job_results WHERE server_id = 'broken'";
    wait_until("four attempts are made", || {
        value::<i32>(&mut client, attempts) == 4 && jobs(&mut client, ALICE, "broken", "pending") == 1
    });
    only(&mut client, ALICE, "broken", 0);
    assert_eq!(value::<i32>(&mut client, attempts), 4);
    assert_eq!(jobs(&mut client, ALICE, "broken", "pending"), 1);
}
