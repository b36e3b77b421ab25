//! Rate limits: exact under any concurrency, apart by database, read-only, after kills, in a full table and without one.

use crate::support::*;
use crate::worker::insist;
use postgres::Client;
use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const CLIENTS: usize = 32;

/// Waits until the clock minute lasts for a while, so that it does not end in the middle of what is counted.
fn early_in_a_minute(client: &mut Client) {
    wait_until("the minute is young", || value(client, "SELECT extract(second FROM clock_timestamp()) < 20"));
}

/// How many of so many calls of each of 32 clients are allowed, by key: `n` is the client's number of the call.
fn allowed_of(database: &Database<'_>, calls: i32, expression: &str) -> Vec<(String, i64)> {
    let barrier = Barrier::new(CLIENTS);
    let counts: Vec<Vec<(String, i64)>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = database.connect();
                    let query = format!(
                        "SELECT key, count(*) FILTER (WHERE allowed)
                           FROM (SELECT 's' || n % 100 AS key, {expression} AS allowed FROM generate_series(1, {calls}) n) AS c
                          GROUP BY 1"
                    );
                    barrier.wait();
                    let rows = client.query(&query, &[]).expect("counts");
                    rows.into_iter().map(|row| (row.get(0), row.get(1))).collect()
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect()
    });
    let mut sums: std::collections::BTreeMap<String, i64> = Default::default();
    counts.into_iter().flatten().for_each(|(key, count)| *sums.entry(key).or_default() += count);
    sums.into_iter().collect()
}

#[test]
fn thirty_two_clients_on_one_key_get_exactly_the_limit() {
    let database = shared().database();
    let mut client = database.connect();
    early_in_a_minute(&mut client);
    let sums = allowed_of(&database, 2000, "check_rate_limit('one', NULL, 1234)");
    assert_eq!(sums.iter().map(|(_, count)| count).sum::<i64>(), 1234);
    let counted: i32 = value(&mut client, "SELECT request_count FROM rate_limit_tracking WHERE server_id = 'one'");
    assert_eq!(counted, 64_000, "each call is counted");
}

#[test]
fn thirty_two_clients_on_many_keys_get_exactly_the_limit_of_each() {
    let database = shared().database();
    let mut client = database.connect();
    early_in_a_minute(&mut client);
    // Whoever comes first makes the entry: all begin with the same new keys.
    let sums =
        allowed_of(&database, 1000, "check_rate_limit('s' || n % 100, '00000000-0000-0000-0000-000000000001', 77)");
    assert_eq!(sums.len(), 100);
    assert!(sums.iter().all(|(_, count)| *count == 77), "{sums:?}");
    let counted: i64 = value(&mut client, "SELECT count(*) FROM rate_limit_tracking WHERE request_count = 320");
    assert_eq!(counted, 100);
}

#[test]
fn the_general_limiter_is_exact_and_several_policies_are_charged_all_or_none() {
    let database = shared().database();
    let mut client = database.connect();
    // So slow that nothing is refilled meanwhile.
    let sums = allowed_of(&database, 500, "(rate_limit('s' || n % 100, 50, 86400000)).allowed");
    assert!(sums.iter().all(|(_, count)| *count == 50), "{sums:?}");
    // One policy for each of ten keys, and one for all of them, named in an order that differs.
    let sums = allowed_of(
        &database,
        300,
        "(SELECT bool_and(r.allowed) FROM rate_limit_all(
            CASE WHEN n % 2 = 0 THEN ARRAY['each' || n % 10, 'all'] ELSE ARRAY['all', 'each' || n % 10] END,
            CASE WHEN n % 2 = 0 THEN ARRAY[500, 3000] ELSE ARRAY[3000, 500] END, ARRAY[86400000, 86400000]) AS r)",
    );
    assert_eq!(sums.iter().map(|(_, count)| count).sum::<i64>(), 3000);
    let left: i64 = value(
        &mut client,
        "SELECT sum((rate_limit_peek('each' || n, 500, 86400000, 0)).remaining) FROM generate_series(0, 9) n",
    );
    assert_eq!(left, 2000, "what 'all' has denied was charged to no other");
}

#[test]
fn read_only_transactions_count_and_a_rollback_gives_nothing_back() {
    let database = shared().database();
    let mut client = database.connect();
    early_in_a_minute(&mut client);
    client.batch_execute("BEGIN READ ONLY").expect("BEGIN");
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 2)"));
    assert!(value::<bool>(&mut client, "SELECT allowed FROM rate_limit('k', 2)"));
    assert!(value::<bool>(&mut client, "SELECT bool_and(allowed) FROM rate_limit_all('{k}', '{2}')"));
    client.batch_execute("ROLLBACK").expect("ROLLBACK");
    client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY").expect("BEGIN");
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 2)"));
    client.batch_execute("ROLLBACK").expect("ROLLBACK");
    assert!(!value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 2)"));
    assert!(!value::<bool>(&mut client, "SELECT allowed FROM rate_limit('k', 2)"));
    let transaction: Option<String> = value(&mut client, "SELECT pg_current_xact_id_if_assigned()::text");
    assert_eq!(transaction, None);
}

#[test]
fn databases_are_apart() {
    let (one, other) = (shared().database(), shared().database());
    let (mut one, mut other) = (one.connect(), other.connect());
    early_in_a_minute(&mut one);
    let call = "SELECT check_rate_limit('s', NULL, 1) AND (rate_limit('k', 1)).allowed";
    assert!(value::<bool>(&mut one, call));
    assert!(!value::<bool>(&mut one, call));
    assert!(value::<bool>(&mut other, call));
    let count = "SELECT sum(request_count) FROM rate_limit_tracking";
    assert_eq!((value::<i64>(&mut one, count), value::<i64>(&mut other, count)), (2, 1));
}

#[test]
fn a_database_that_is_dropped_leaves_nothing() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("SELECT rate_limit('k' || n, 1, 86400) FROM generate_series(1, 500) n").expect("rate_limit");
    drop(client);
    let other = cluster.database();
    let mut other = other.connect();
    assert_eq!(value::<i32>(&mut other, "SELECT keys FROM rate_limit_stats"), 500);
    insist(&mut other, &format!("DROP DATABASE {} WITH (FORCE)", database.name));
    assert_eq!(value::<i32>(&mut other, "SELECT keys FROM rate_limit_stats"), 0);
}

#[test]
fn the_next_minute_begins_anew_and_the_last_one_is_written_down() {
    let database = shared().database();
    database.wait_for_worker();
    let mut client = database.connect();
    // In every minute as many as the limit, wherever it begins; then the calls of three minutes at the most.
    wait_until("the minute is nearly over", || {
        value(&mut client, "SELECT extract(second FROM clock_timestamp()) > 57")
    });
    let allowed: i64 = value(
        &mut client,
        "SELECT count(*) FILTER (WHERE check_rate_limit('s', NULL, 10) AND pg_sleep(0.02) IS NOT NULL) FROM generate_series(1, 100)",
    );
    let mut later = 0;
    wait_until("the next minute", || {
        later += i64::from(value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 10)"));
        value(&mut client, "SELECT count(*) = 2 FROM rate_limit_tracking WHERE server_id = 's'")
    });
    wait_until("the limit of the next minute is used up", || {
        let allowed: bool = value(&mut client, "SELECT check_rate_limit('s', NULL, 10)");
        later += i64::from(allowed);
        !allowed
    });
    assert_eq!(allowed + later, 20);
    let sum = "SELECT sum(request_count)::bigint FROM rate_limit_tracking";
    let counted: i64 = value(&mut client, sum);
    wait_until("the minute is in the table", || {
        assert_eq!(value::<i64>(&mut client, sum), counted, "it is never there twice, nor missing");
        value(&mut client, "SELECT count(*) > 0 FROM _nexus_hub.rate_limit_windows")
    });
    let first = |table: &str| format!("SELECT request_count FROM {table} ORDER BY window_start LIMIT 1");
    assert_eq!(
        value::<i32>(&mut client, &first("_nexus_hub.rate_limit_windows")),
        value::<i32>(&mut client, &first("rate_limit_tracking"))
    );
    client
        .batch_execute(
            "INSERT INTO _nexus_hub.rate_limit_windows (server_id, window_start, request_count)
             SELECT 'old' || n, now() - interval '25 hours', 1 FROM generate_series(1, 2500) n",
        )
        .expect("INSERT");
    wait_until("old minutes are deleted", || {
        value(&mut client, "SELECT count(*) = 0 FROM _nexus_hub.rate_limit_windows WHERE server_id LIKE 'old%'")
    });
}

#[test]
fn a_full_table_allows_or_refuses_and_reuses_what_has_expired_first() {
    let cluster = Cluster::start(&["nexus_hub.rate_limit_max_keys = 1024"]);
    let database = cluster.database();
    let mut client = database.connect();
    let stat =
        |client: &mut Client, name: &str| value::<i64>(client, &format!("SELECT {name}::bigint FROM rate_limit_stats"));
    let fill = |client: &mut Client, prefix: &str, window: i32, count: i32| {
        value::<i64>(
            client,
            &format!(
                "SELECT count(*) FROM generate_series(1, {count}) n WHERE (rate_limit('{prefix}' || n, 1, {window})).allowed"
            ),
        )
    };
    // Expire after a second, when others need their place.
    assert_eq!(fill(&mut client, "short", 1, 1024), 1024);
    assert_eq!(stat(&mut client, "keys"), 1024);
    wait_until("they have expired", || {
        value(
            &mut client,
            "SELECT bool_and((rate_limit_peek('short' || n, 1, 1, 0)).reset_seconds = 0) FROM generate_series(1, 1024) n",
        )
    });
    assert_eq!(fill(&mut client, "long", 86_400, 1024), 1024);
    assert_eq!(
        (stat(&mut client, "evicted"), stat(&mut client, "\"full\""), stat(&mut client, "keys")),
        (1024, 0, 1024)
    );
    assert_eq!(fill(&mut client, "long", 86_400, 1024), 0, "each has kept its state");

    // Allowed, counted, and warned about once.
    assert_eq!(fill(&mut client, "more", 86_400, 3000), 3000);
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit('more', NULL, 1)"));
    assert!(!value::<bool>(&mut client, "SELECT check_rate_limit('more', NULL, 0)"), "not even then");
    assert_eq!(stat(&mut client, "\"full\""), 3001);
    let warnings = |cluster: &Cluster| cluster.log().matches("the table of rate limits is full").count();
    assert_eq!(warnings(&cluster), 1);
    let rows = "SELECT count(*) FILTER (WHERE allowed) FROM rate_limit_all('{a,b,long1}', '{1,1,1}', '{60,60,86400}')";
    assert_eq!(value::<i64>(&mut client, rows), 2, "a limit that is reached denies");
    let rows = rows.replace("long1", "c");
    assert_eq!(value::<i64>(&mut client, &rows), 3);

    client.batch_execute("ALTER SYSTEM SET nexus_hub.rate_limit_when_full = 'refuse'").expect("ALTER SYSTEM");
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the setting is known", || value(&mut client, "SELECT NOT check_rate_limit('more', NULL, 1)"));
    assert_eq!(fill(&mut client, "more", 86_400, 10), 0);
    assert_eq!(value::<i64>(&mut client, &rows), 0);
    assert_eq!(warnings(&cluster), 1);

    // A place that becomes free is there at once.
    assert!(value::<bool>(&mut client, "SELECT reset_rate_limit('long7')"));
    assert!(value::<bool>(&mut client, "SELECT allowed FROM rate_limit('one more', 1, 86400)"));
    assert!(!value::<bool>(&mut client, "SELECT allowed FROM rate_limit('yet one', 1, 86400)"));
}

#[test]
fn keys_that_come_and_go_under_32_clients_stay_exact() {
    let cluster = Cluster::start(&["nexus_hub.rate_limit_max_keys = 1024"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute("SELECT rate_limit('kept' || n, 5, 86400) FROM generate_series(1, 100) n")
        .expect("rate_limit");
    // Ten times as many keys as there is room for, that expire in a moment; and such as stay, which must stay exact.
    let sums = allowed_of(
        &database,
        3000,
        "(rate_limit('gone' || n % 5000 || pg_backend_pid(), 1000, 1)).allowed IS NOT NULL AND
         (rate_limit('kept' || 1 + n % 100, 5, 86400)).allowed",
    );
    assert_eq!(sums.iter().map(|(_, count)| count).sum::<i64>(), 400);
    let stats = client.query_one("SELECT keys, evicted FROM rate_limit_stats", &[]).expect("stats");
    let (keys, evicted): (i32, i64) = (stats.get(0), stats.get(1));
    assert!(keys <= 1024 && evicted > 500, "{keys} keys, {evicted} evicted");
    // All places are still there.
    wait_until("the others have expired", || {
        value(
            &mut client,
            "SELECT count(*) = 924 FROM generate_series(1, 924) n WHERE reset_rate_limit('x' || n) IS NOT NULL",
        )
    });
    thread::sleep(Duration::from_millis(10));
    let query = "SELECT count(*) FROM generate_series(1, 924) n WHERE (rate_limit('last' || n, 1, 86400)).allowed";
    assert_eq!(value::<i64>(&mut client, query), 924);
    let full: i64 = value(&mut client, "SELECT \"full\" FROM rate_limit_stats");
    wait_until("and no more", || {
        value::<bool>(&mut client, "SELECT allowed FROM rate_limit('over', 1, 86400)")
            && value::<i64>(&mut client, "SELECT \"full\" FROM rate_limit_stats") > full
    });
    assert_eq!(value::<i32>(&mut client, "SELECT keys FROM rate_limit_stats"), 1024);
}

#[test]
fn parallel_workers_count_together() {
    let database = shared().database();
    let mut client = database.connect();
    early_in_a_minute(&mut client);
    client
        .batch_execute(
            "CREATE TABLE calls AS SELECT n FROM generate_series(1, 20000) n;
             ALTER TABLE calls SET (parallel_workers = 4);
             SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; SET max_parallel_workers_per_gather = 4;
             SET parallel_leader_participation = off",
        )
        .expect("settings");
    let query = "SELECT count(*) FILTER (WHERE check_rate_limit('s', NULL, 777)),
                        count(*) FILTER (WHERE (rate_limit('k', 555, 86400)).allowed) FROM calls";
    let plan = client.query(&format!("EXPLAIN (ANALYZE) {query}"), &[]).expect("EXPLAIN");
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    // Where the calls are made; the leader makes none.
    assert!(plan.iter().any(|line| line.contains("Partial Aggregate")), "{plan:#?}");
    assert!(plan.iter().any(|line| line.contains("Workers Launched: 4")), "{plan:#?}");
    client.batch_execute("SELECT reset_server_rate_limit('s', NULL), reset_rate_limit('k')").expect("reset");
    let row = client.query_one(query, &[]).expect("counts");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (777, 555));
}

/// Sessions that call, on keys that come and go, until they are gone or `disturb` is over.
fn with_callers(database: &Database<'_>, disturb: impl FnOnce(&[i32])) {
    let pids = std::sync::Mutex::new(HashSet::new());
    let is_over = AtomicBool::new(false);
    // Also when it panics: or the callers would be waited for without end.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    thread::scope(|scope| {
        let over = Over(&is_over);
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = database.connect();
                pids.lock().expect("pids").insert(value::<i32>(&mut client, "SELECT pg_backend_pid()"));
                let calls = "SELECT count(check_rate_limit('s' || n % 3000, NULL, 5)),
                                    count((SELECT bool_and(allowed) FROM rate_limit_all(ARRAY['a' || n % 2000, 'b' || n % 100], '{5,5}', '{1,1}')))
                               FROM generate_series(1, 100000) n";
                while !is_over.load(Ordering::SeqCst) {
                    if let Err(error) = client.batch_execute(calls)
                        && error.as_db_error().is_none_or(|error| error.code().code() != "57014")
                    {
                        break;
                    }
                }
            });
        }
        wait_until("all are calling", || pids.lock().expect("pids").len() == 8);
        let mut client = database.connect();
        wait_until("they call", || {
            value(&mut client, "SELECT allowed + denied + \"full\" > 20000 FROM rate_limit_stats")
        });
        drop(client);
        let pids: Vec<_> = pids.lock().expect("pids").iter().copied().collect();
        disturb(&pids);
        drop(over);
    });
}

#[test]
fn sessions_that_are_cancelled_or_ended_in_the_middle_of_calls_leave_no_lock() {
    let cluster = Cluster::start(&["nexus_hub.rate_limit_max_keys = 1024"]);
    let database = cluster.database();
    with_callers(&database, |pids| {
        let mut client = database.connect();
        for _ in 0..50 {
            for pid in pids {
                client.execute("SELECT pg_cancel_backend($1)", &[pid]).expect("cancel");
            }
            client.batch_execute("SET statement_timeout = '60s'; SELECT check_rate_limit('k' || n, NULL, 1) FROM generate_series(1, 500) n").expect("no lock is held");
        }
        for pid in pids {
            cluster.signal("TERM", *pid);
        }
        wait_until("they are gone", || {
            value(
                &mut client,
                "SELECT count(*) = 0 FROM pg_stat_activity WHERE query LIKE 'SELECT count(check%' AND pid <> pg_backend_pid()",
            )
        });
        // Every lock is needed for this.
        client
            .batch_execute("SELECT check_rate_limit('k' || n, NULL, 1) FROM generate_series(1, 5000) n")
            .expect("no lock is held");
    });
    assert!(!cluster.log().contains("PANIC"), "{}", cluster.log());
}

#[test]
fn a_session_that_is_killed_in_the_middle_of_calls_leaves_no_lock() {
    let cluster = Cluster::start(&["nexus_hub.rate_limit_max_keys = 1024", "restart_after_crash = on"]);
    let database = cluster.database();
    for round in 1..=3 {
        with_callers(&database, |pids| cluster.signal("KILL", pids[0]));
        // Until then it could still take a connection, and end it.
        wait_until("the server notices", || cluster.log().matches("reinitializing").count() == round);
        let mut client = cluster.reconnect(&database.name);
        client
            .batch_execute("SET statement_timeout = '60s'; SELECT check_rate_limit('k' || n, NULL, 1) FROM generate_series(1, 5000) n")
            .expect("no lock is held");
        // Windows start anew, and the server is in order.
        assert!(value::<i32>(&mut client, "SELECT keys FROM rate_limit_stats") <= 1024);
    }
}

#[test]
fn exemptions_and_overrides_count_at_once_in_other_sessions() {
    let database = shared().database();
    let (mut admin, mut client, mut frozen) = (database.connect(), database.connect(), database.connect());
    early_in_a_minute(&mut client);
    let user = "a11ce000-0000-4000-8000-000000000001";
    let call = format!("SELECT check_rate_limit('s', '{user}', 1)");
    frozen.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1").expect("BEGIN");
    assert!(value::<bool>(&mut client, &call));
    assert!(!value::<bool>(&mut client, &call));
    for (statement, allowed) in [
        ("INSERT INTO rate_limit_exemptions (identifier) VALUES ('s')".to_owned(), true),
        ("DELETE FROM rate_limit_exemptions".to_owned(), false),
        (format!("INSERT INTO rate_limit_exemptions (identifier) VALUES ('{}')", user.to_uppercase()), true),
        ("DELETE FROM rate_limit_exemptions".to_owned(), false),
        ("INSERT INTO rate_limit_overrides (server_id, request_limit) VALUES ('s', 1000)".to_owned(), true),
        (format!("INSERT INTO rate_limit_overrides (user_id, request_limit) VALUES ('{user}', 0)"), false),
        (
            format!(
                "INSERT INTO rate_limit_overrides (server_id, user_id, request_limit) VALUES ('s', '{user}', 1000)"
            ),
            true,
        ),
        (
            "UPDATE rate_limit_overrides SET request_limit = 1 WHERE server_id IS NOT NULL AND user_id IS NOT NULL"
                .to_owned(),
            false,
        ),
        ("DELETE FROM rate_limit_overrides WHERE user_id IS NOT NULL".to_owned(), true),
        ("DELETE FROM rate_limit_overrides".to_owned(), false),
    ] {
        admin.batch_execute(&statement).expect("a rule");
        assert_eq!(value::<bool>(&mut client, &call), allowed, "{statement}");
        assert_eq!(value::<bool>(&mut frozen, &call), allowed, "in a snapshot from before: {statement}");
    }
    frozen.batch_execute("ROLLBACK").expect("ROLLBACK");
    admin.batch_execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ('s')").expect("INSERT");
    assert!(value::<bool>(&mut client, &call));
    admin.batch_execute("TRUNCATE rate_limit_exemptions").expect("TRUNCATE");
    assert!(!value::<bool>(&mut client, &call));
    // What is rolled back never counted, not even for the session itself.
    admin.batch_execute("BEGIN; INSERT INTO rate_limit_exemptions (identifier) VALUES ('s')").expect("INSERT");
    assert!(!value::<bool>(&mut client, &call));
    admin.batch_execute(&call).expect("a call");
    admin.batch_execute("ROLLBACK").expect("ROLLBACK");
    assert!(!value::<bool>(&mut admin, &call));

    let call = "SELECT allowed FROM rate_limit('k', 1, 86400)";
    assert!(value::<bool>(&mut client, call));
    assert!(!value::<bool>(&mut client, call));
    admin.batch_execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ('k')").expect("INSERT");
    assert!(value::<bool>(&mut client, call));
    admin.batch_execute("DELETE FROM rate_limit_exemptions; INSERT INTO rate_limit_overrides (key, request_limit) VALUES ('k', 7), ('none', 0)").expect("a rule");
    let row = client
        .query_one(
            "SELECT allowed, \"limit\", retry_after_seconds < 86400.0 / 7 + 1 FROM rate_limit('k', 1, 86400)",
            &[],
        )
        .expect("rate_limit");
    assert_eq!(
        (row.get::<_, bool>(0), row.get::<_, i32>(1), row.get::<_, bool>(2)),
        (false, 7, true),
        "it fills up faster"
    );
    assert!(value::<bool>(
        &mut client,
        "SELECT reset_rate_limit('k') AND (rate_limit_peek('k', 1, 86400)).remaining = 6"
    ));
    assert!(!value::<bool>(&mut client, "SELECT allowed FROM rate_limit('none', 100)"));
    let allowed: Vec<bool> = client
        .query("SELECT allowed FROM rate_limit_all('{x,none}', '{5,5}')", &[])
        .expect("all")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(allowed, [true, false]);
    // Those who may call, but read no table.
    client.batch_execute("SET ROLE service_role").expect("SET ROLE");
    assert!(value::<bool>(&mut client, "SELECT (rate_limit('new', 1)).allowed"));
    client.batch_execute("RESET ROLE; BEGIN READ ONLY").expect("BEGIN");
    admin.batch_execute("DELETE FROM rate_limit_overrides").expect("DELETE");
    assert!(value::<bool>(&mut client, "SELECT (rate_limit('none', 100)).allowed"));
}

#[test]
fn rules_of_a_prepared_transaction_count_within_ten_seconds() {
    let cluster = Cluster::start(&["max_prepared_transactions = 4"]);
    let database = cluster.database();
    let (mut admin, mut client) = (database.connect(), database.connect());
    admin
        .batch_execute("BEGIN; INSERT INTO rate_limit_exemptions (identifier) VALUES ('s'); PREPARE TRANSACTION 'p'")
        .expect("PREPARE");
    assert!(!value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 0)"));
    admin.batch_execute("COMMIT PREPARED 'p'").expect("COMMIT");
    wait_until("the exemption counts", || value(&mut client, "SELECT check_rate_limit('s', NULL, 0)"));
}

#[test]
fn a_standby_counts_for_itself() {
    let primary = Cluster::start(&[]);
    let database = primary.database();
    let standby = Cluster::standby_of(&primary);
    let mut client = standby.connect(&database.name);
    early_in_a_minute(&mut client);
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 1)"));
    assert!(!value::<bool>(&mut client, "SELECT check_rate_limit('s', NULL, 1)"));
    assert!(value::<bool>(&mut client, "SELECT allowed FROM rate_limit('k', 1)"));
    assert_eq!(value::<i32>(&mut client, "SELECT request_count FROM rate_limit_tracking"), 2);
    database.connect().batch_execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ('s')").expect("INSERT");
    wait_until("the exemption has come", || value(&mut client, "SELECT check_rate_limit('s', NULL, 1)"));
}

#[test]
fn without_preload_a_table_does_the_same() {
    let cluster = Cluster::create(&["shared_preload_libraries = ''"]);
    cluster.start_up();
    let database = cluster.database();
    let mut client = database.connect();
    early_in_a_minute(&mut client);
    let sums = allowed_of(&database, 20, "check_rate_limit('one', NULL, 123)");
    // Each of the clients' transactions takes its turn.
    assert_eq!(sums.iter().map(|(_, count)| count).sum::<i64>(), 123);
    assert_eq!(value::<i32>(&mut client, "SELECT request_count FROM rate_limit_tracking"), 640);
    let user = "a11ce000-0000-4000-8000-000000000001";
    assert!(value::<bool>(&mut client, &format!("SELECT check_rate_limit('one', '{user}', 1)")));
    assert!(!value::<bool>(&mut client, &format!("SELECT check_rate_limit('one', '{user}', 1)")));
    assert!(value::<bool>(&mut client, &format!("SELECT reset_server_rate_limit('one', '{user}')")));
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit(repeat('x', 3000000), NULL, 1)"));
    assert!(!value::<bool>(&mut client, "SELECT check_rate_limit(repeat('x', 3000000), NULL, 1)"));

    let row = client.query_one("SELECT allowed, remaining, reset_seconds FROM rate_limit('k', 3)", &[]).expect("row");
    assert_eq!((row.get::<_, bool>(0), row.get::<_, i32>(1), row.get::<_, f64>(2)), (true, 2, 20.0));
    assert_eq!(value::<i32>(&mut client, "SELECT remaining FROM rate_limit_peek('k', 3)"), 1);
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FILTER (WHERE allowed) FROM rate_limit_all('{k,l}', '{3,1}')"),
        2
    );
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FILTER (WHERE allowed) FROM rate_limit_all('{k,l}', '{3,1}')"),
        1
    );
    assert_eq!(value::<i32>(&mut client, "SELECT remaining FROM rate_limit('k', 3)"), 0);
    assert!(value::<bool>(&mut client, "SELECT reset_rate_limit('k')"));
    assert!(!value::<bool>(&mut client, "SELECT reset_rate_limit('k')"));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM rate_limit_stats"), 0);

    client.batch_execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ('one')").expect("INSERT");
    assert!(value::<bool>(&mut client, "SELECT check_rate_limit('one', NULL, 0)"));
    let row = client.query_one("SELECT allowed FROM rate_limit_peek('k', 3)", &[]).expect("row");
    assert!(row.get::<_, bool>(0));
    client.batch_execute("BEGIN READ ONLY").expect("BEGIN");
    assert!(value::<bool>(&mut client, "SELECT allowed FROM rate_limit_peek('k', 3)"));
    assert_eq!(
        error_of(&mut client, "SELECT check_rate_limit('s', NULL, 1)"),
        ("55000".to_owned(), "nexus_hub is not preloaded".to_owned())
    );
    client.batch_execute("ROLLBACK").expect("ROLLBACK");
    // What has expired is cleared up along the way.
    client
        .batch_execute("UPDATE _nexus_hub.rate_limit_entries SET expires_at = now() - interval '1 hour'")
        .expect("UPDATE");
    let before: i64 = value(&mut client, "SELECT sum(request_count) FROM rate_limit_tracking");
    client.batch_execute("DELETE FROM rate_limit_exemptions").expect("DELETE");
    for _ in 0..100 {
        client.batch_execute("SELECT rate_limit('tidy', 1)").expect("rate_limit");
    }
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM _nexus_hub.rate_limit_entries"), 1);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(request_count) FROM rate_limit_tracking"), before);
}

#[test]
fn rules_and_counts_go_where_dumps_and_restarts_take_them() {
    let cluster = Cluster::start(&[]);
    let (database, copy) = (cluster.database(), cluster.empty_database());
    let mut client = database.connect();
    client
        .batch_execute(
            "INSERT INTO rate_limit_exemptions (identifier) VALUES ('s');
             INSERT INTO rate_limit_overrides (key, request_limit) VALUES ('k', 2);
             INSERT INTO _nexus_hub.rate_limit_windows VALUES ('old', NULL, date_trunc('minute', now() - interval '1 hour'), 5);
             SELECT rate_limit('k', 5, 86400)",
        )
        .expect("rules");
    database.copy_to(&copy);
    let mut copied = copy.connect();
    assert!(value::<bool>(&mut copied, "SELECT check_rate_limit('s', NULL, 0)"));
    assert_eq!(value::<i32>(&mut copied, "SELECT \"limit\" FROM rate_limit_peek('k', 5)"), 2);
    drop((client, copied));
    cluster.pg_ctl(&["-m", "fast", "restart"]);
    let mut client = database.connect();
    assert_eq!(value::<i32>(&mut client, "SELECT remaining FROM rate_limit('k', 5, 86400)"), 1, "begun anew");
    assert_eq!(value::<i32>(&mut client, "SELECT request_count FROM rate_limit_tracking"), 5);
}

#[test]
fn the_size_and_what_happens_when_full_are_settings() {
    let cluster = Cluster::start(&["nexus_hub.rate_limit_max_keys = 300000"]);
    let database = cluster.database();
    let mut client = database.connect();
    assert_eq!(value::<i32>(&mut client, "SELECT max_keys FROM rate_limit_stats"), 300_000);
    // More keys than buckets of a smaller table, all of them apart.
    let counted = AtomicU64::new(0);
    thread::scope(|scope| {
        for part in 0..4 {
            let (database, counted) = (&database, &counted);
            scope.spawn(move || {
                let mut client = database.connect();
                let query = format!(
                    "SELECT count(*) FROM generate_series(1, 60000) n
                      WHERE (rate_limit('key {part} ' || n, 1, 86400)).allowed AND NOT (rate_limit('key {part} ' || n, 1, 86400)).allowed"
                );
                counted.fetch_add(value::<i64>(&mut client, &query).unsigned_abs(), Ordering::SeqCst);
            });
        }
    });
    assert_eq!(counted.into_inner(), 240_000);
    assert_eq!(value::<i32>(&mut client, "SELECT keys FROM rate_limit_stats"), 240_000);
}
