//! Cleanup: what the worker deletes by itself, what the functions do, and who must not be held up by it.

use crate::support::*;
use postgres::Client;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use uuid::Uuid;

/// Settings under which the worker cleans up at once.
const SWIFT: &str = "nexus_hub.poll_interval = 100";

/// Adds so many jobs that have ended so many days ago.
fn add_ended(client: &mut Client, status: &str, days: f64, count: i32) {
    client
        .execute(
            "INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
             SELECT 'tool_invoke', 's', $1, $1, now() - interval '30 days', now() - $2 * interval '1 day' FROM generate_series(1, $3)",
            &[&status, &days, &count],
        )
        .expect("INSERT");
}

fn count(client: &mut Client, condition: &str) -> i64 {
    value(client, &format!("SELECT count(*) FROM job_results WHERE {condition}"))
}

fn deleted(client: &mut Client, call: &str) -> (i32, i32, i32) {
    let row = client.query_one(&format!("SELECT * FROM {call}"), &[]).expect("cleanup");
    (row.get(0), row.get(1), row.get(2))
}

/// A connection of its own with a transaction that is open.
fn in_transaction(database: &Database<'_>, statement: &str) -> Client {
    let mut client = database.connect();
    client.batch_execute(&format!("BEGIN; {statement}")).expect("statement");
    client
}

#[test]
fn the_worker_deletes_old_jobs_in_batches_and_leaves_young_ones() {
    let cluster = Cluster::start(&[SWIFT]);
    let database = cluster.database();
    let mut client = database.connect();
    for status in ["completed", "failed", "cancelled"] {
        add_ended(&mut client, status, 7.01, 1700);
        add_ended(&mut client, status, 6.99, 3);
    }
    wait_until("the old ones are gone", || count(&mut client, "completed_at < now() - interval '7 days'") == 0);
    assert_eq!(count(&mut client, "true"), 9);
    // Brought in behind the place where it is.
    add_ended(&mut client, "completed", 20.0, 1);
    wait_until("older ones, too", || count(&mut client, "true") == 9);
    let transactions: i64 = value(&mut client, "SELECT count(DISTINCT xmin::text) FROM job_results");
    assert_eq!(transactions, 3, "what is young was not touched");
}

#[test]
fn each_retention_is_obeyed_and_zero_is_for_ever() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.completed_retention = 0", "nexus_hub.attempts_retention = '1h'"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "failed", 1000.0, 2);
    client
        .batch_execute(
            "UPDATE job_results SET failures = 2;
             INSERT INTO job_attempts (job_id, attempt, started_at, finished_at, error)
             SELECT j.id, n, now() - interval '1 day', now() - n * interval '50 minutes', 'e' FROM job_results AS j, generate_series(1, 2) AS n",
        )
        .expect("INSERT");
    let attempts = "SELECT string_agg(attempt::text, ',') FROM job_attempts";
    wait_until("old attempts are gone", || value::<Option<String>>(&mut client, attempts).as_deref() == Some("1,1"));
    assert_eq!(count(&mut client, "true"), 2, "0 is for ever");
    cluster.configure(&[SWIFT, "nexus_hub.completed_retention = '1000h'", "nexus_hub.attempts_retention = 0"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the setting is obeyed", || count(&mut client, "true") == 0);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_attempts"), 0, "attempts go with their jobs");
}

#[test]
fn switched_off_it_deletes_nothing_of_any_kind() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_cleanup = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 30.0, 1);
    client
        .batch_execute(
            "INSERT INTO job_attempts (job_id, attempt, started_at, finished_at, error) SELECT id, 1, now(), '2020-01-01', 'e' FROM job_results;
             INSERT INTO _nexus_hub.vault_audit_log (at, kind, outcome, count) VALUES ('2020-01-01', 'get', 'allowed', 1);
             INSERT INTO _nexus_hub.rate_limit_windows (server_id, window_start, request_count) VALUES ('s', '2020-01-01', 1);
             INSERT INTO job_results (job_type, server_id, tool_name, status, created_at) VALUES ('tool_invoke', 's', 'handed over', 'running', '2020-01-01')",
        )
        .expect("INSERT");
    let old = "SELECT (SELECT count(*) FROM job_results WHERE status = 'completed') || ' ' || (SELECT count(*) FROM job_attempts WHERE finished_at < '2021-01-01')
                      || ' ' || (SELECT count(*) FROM _nexus_hub.vault_audit_log WHERE at < '2021-01-01') || ' ' || (SELECT count(*) FROM _nexus_hub.rate_limit_windows)
                      || ' ' || (SELECT count(*) FROM job_results WHERE status = 'running')";
    // The worker has been through its round when it has written an entry of the audit, and looked at it again.
    for context in ["a", "b"] {
        client
            .batch_execute(&format!("SELECT decrypt_token(encrypt_token('t', '{context}'), '{context}')"))
            .expect("open");
        let noted = format!("SELECT EXISTS (SELECT FROM vault_audit WHERE object = '{context}')");
        wait_until("the worker is there", || value(&mut client, &noted));
    }
    assert_eq!(value::<String>(&mut client, old), "1 1 1 1 1");
    // Where a database has a say of its own.
    client.batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.auto_cleanup = on", database.name)).expect("ALTER");
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("all are gone", || value::<String>(&mut client, old) == "0 0 0 0 0");
}

#[test]
fn the_worker_ends_what_an_executor_has_forgotten_and_never_deletes_a_job_that_waits() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.orphaned_retention = '2h'", "nexus_hub.enabled = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "INSERT INTO job_results (job_type, server_id, tool_name, status, created_at) VALUES
                 ('tool_invoke', 's', 'forgotten', 'running', now() - interval '121 minutes'),
                 ('tool_invoke', 's', 'at work', 'running', now() - interval '119 minutes'),
                 ('tool_invoke', 's', 'waits', 'pending', now() - interval '3 days')",
        )
        .expect("INSERT");
    let forgotten = "SELECT status || ': ' || error FROM job_results WHERE tool_name = 'forgotten'";
    wait_until("it is ended", || value::<Option<String>>(&mut client, forgotten).is_some());
    assert_eq!(
        value::<String>(&mut client, forgotten),
        "failed: given up: whoever runs this job has not written its end for 02:00:00 (nexus_hub.orphaned_retention)"
    );
    let attempts = "SELECT count(*) FROM job_results j, get_job_attempts(j.id) a WHERE j.tool_name = 'forgotten' AND j.failures = 1 AND a.error = j.error";
    assert_eq!(value::<i64>(&mut client, attempts), 1, "it is among its attempts");
    assert_eq!(count(&mut client, "status = 'running' AND tool_name = 'at work'"), 1);
    assert_eq!(count(&mut client, "status = 'pending' AND tool_name = 'waits'"), 1);
    // Asked for, it goes: nobody has run it for days.
    assert_eq!(deleted(&mut client, "cleanup_job_results_manual()"), (0, 1, 1));
    assert_eq!(count(&mut client, "tool_name = 'waits'"), 0);
}

#[test]
fn a_job_that_a_living_worker_runs_is_no_orphan_and_one_of_a_dead_worker_is() {
    let gate = Gate::default();
    let server = gate.server();
    let database = shared().database();
    let mut client = database.connect();
    let job: Uuid =
        client.query_one("SELECT http_get($1, timeout_ms => 600000)", &[&server.url]).expect("http_get").get(0);
    wait_until("it runs", || count(&mut client, "status = 'running' AND lease IS NOT NULL") == 1);
    // As old as can be.
    client
        .batch_execute(
            "UPDATE job_results SET created_at = '2020-01-01', run_at = '2020-01-01', started_at = '2020-01-01'",
        )
        .expect("UPDATE");
    client
        .batch_execute(
            "INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, lease)
             VALUES ('tool_invoke', 's', 't', 'running', '2020-01-01', gen_random_uuid())",
        )
        .expect("INSERT");
    // The worker itself may be quicker, and give the lost one back; then it may have failed, for want of its server.
    let (completed, orphaned, _) = deleted(&mut client, "cleanup_job_results_manual(0, 0)");
    assert_eq!(completed + orphaned + count(&mut client, "tool_name = 't'") as i32, 1);
    assert_eq!(count(&mut client, "status = 'running' AND lease IS NOT NULL AND job_type = 'http_request'"), 1);
    gate.open();
    assert_eq!(wait_for_job(&mut client, job).completed()["status"], json!(200));
}

#[test]
fn a_locked_row_holds_up_no_other_and_nobody_waits_for_it() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_cleanup = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 8.0, 1200);
    let mut holder = in_transaction(&database, "SELECT FROM job_results LIMIT 1 FOR UPDATE");
    client.batch_execute("SET statement_timeout = '30s'; SET lock_timeout = 0").expect("SET");
    assert_eq!(deleted(&mut client, "cleanup_job_results_manual()"), (1199, 0, 1199));
    // The same for the worker.
    add_ended(&mut client, "failed", 8.0, 1200);
    cluster.configure(&[SWIFT]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("all but one are gone", || count(&mut client, "true") == 1);
    wait_until("the log tells of it", || {
        cluster.log().contains("1 old jobs could not be deleted, and are tried again: a session keeps the row locked")
    });
    holder.batch_execute("ROLLBACK").expect("ROLLBACK");
    wait_until("the last one goes, too", || count(&mut client, "true") == 0);
}

#[test]
fn what_a_foreign_key_or_trigger_of_the_users_holds_is_kept_with_a_warning_and_the_rest_goes() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_cleanup = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 8.0, 700);
    client
        .batch_execute(
            "CREATE TABLE invoices (job_id uuid REFERENCES job_results (id));
             INSERT INTO invoices SELECT id FROM job_results ORDER BY id LIMIT 3;
             CREATE TABLE heard (id uuid);
             CREATE FUNCTION hear() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.heard VALUES (OLD.id); RETURN OLD; END $$;
             CREATE TRIGGER hear AFTER DELETE ON job_results FOR EACH ROW EXECUTE FUNCTION hear()",
        )
        .expect("DDL");
    assert_eq!(deleted(&mut client, "cleanup_job_results_manual()"), (697, 0, 697));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM heard"), 697, "triggers hear of it");
    add_ended(&mut client, "completed", 8.0, 700);
    cluster.configure(&[SWIFT]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("all but the held ones are gone", || count(&mut client, "true") == 3);
    wait_until("the log tells why", || {
        cluster.log().contains("old jobs could not be deleted, and are tried again: update or delete on table \"job_results\" violates foreign key")
    });
    client.batch_execute("DROP TABLE invoices").expect("DROP");
    wait_until("then they go", || count(&mut client, "true") == 0);
}

#[test]
fn a_deferred_foreign_key_and_a_trigger_that_says_no_hold_up_nothing_else() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_cleanup = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    // More than a batch, of one and the same time.
    add_ended(&mut client, "completed", 9.0, 1200);
    client
        .batch_execute(
            "UPDATE job_results SET completed_at = now() - interval '9 days';
             CREATE TABLE invoices (job_id uuid REFERENCES job_results (id) DEFERRABLE INITIALLY DEFERRED);
             INSERT INTO invoices SELECT id FROM job_results ORDER BY id LIMIT 2;
             CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN CASE WHEN OLD.tool_name = 'kept' THEN NULL ELSE OLD END; END $$;
             CREATE TRIGGER refuse BEFORE DELETE ON job_results FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .expect("DDL");
    client
        .batch_execute(
            "INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
             SELECT 'tool_invoke', 's', 'kept', 'failed', now() - interval '9 days', date_trunc('day', now()) - interval '9 days' FROM generate_series(1, 1200)",
        )
        .expect("INSERT");
    add_ended(&mut client, "failed", 8.5, 3);
    cluster.configure(&[SWIFT]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("all others are gone", || count(&mut client, "tool_name <> 'kept'") == 2);
    assert_eq!(count(&mut client, "true"), 1202);
    // Who calls the function hears of it at the commit, as with a DELETE; unless the worker tries just then, whose
    // locks keep both rows from being met.
    wait_until("the caller hears of it", || match client.batch_execute("SELECT cleanup_job_results_manual()") {
        Ok(()) => false,
        Err(error) => {
            assert_eq!(error.code().map(|code| code.code()), Some("23503"));
            true
        }
    });
    client.batch_execute("TRUNCATE invoices").expect("TRUNCATE");
    wait_until("then they go", || count(&mut client, "true") == 1200);
    assert_eq!(deleted(&mut client, "cleanup_job_results_manual()"), (0, 0, 0));
}

#[test]
fn jobs_of_one_time_are_gone_through_once_whatever_holds_some_of_them() {
    let database = shared().empty_database();
    let mut client = database.connect();
    // Before there is a worker that could be in the way.
    client.batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.auto_cleanup = off", database.name)).expect("ALTER");
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    client
        .batch_execute(
            "CREATE TABLE invoices (job_id uuid REFERENCES job_results (id));
             CREATE FUNCTION add_jobs(ended_at timestamptz, held integer, free integer) RETURNS void LANGUAGE sql AS $$
                 WITH added AS (
                     INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
                     SELECT 'tool_invoke', 's', 't', 'completed', '2020-01-01', ended_at FROM generate_series(1, held + free) RETURNING id)
                 INSERT INTO invoices SELECT id FROM (SELECT id FROM added ORDER BY id LIMIT held) AS first $$",
        )
        .expect("DDL");
    // Held ones before the others, more than a batch of them; and times that nothing comes before.
    client
        .batch_execute(
            "SELECT add_jobs('2020-02-02', 1200, 300), add_jobs('2020-02-03', 5, 2000), add_jobs('-infinity', 1001, 3)",
        )
        .expect("jobs");
    let warnings = warned(&database, "SELECT cleanup_job_results_manual()");
    assert_eq!(count(&mut client, "true"), 1200 + 5 + 1001);
    assert_eq!(warnings, ["2206 old jobs could not be deleted, all others were"]);
}

/// The warnings of a statement.
fn warned(database: &Database<'_>, statement: &str) -> Vec<String> {
    let output = std::process::Command::new("psql")
        .args(["-XqAt", "-d", &database.name, "-c", statement])
        .envs(database.cluster.environment())
        .output()
        .expect("psql");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stderr).expect("text");
    text.lines().filter_map(|line| line.strip_prefix("WARNING:  ")).map(str::to_owned).collect()
}

#[test]
fn what_is_wrong_with_attempts_or_orphans_holds_up_no_jobs() {
    let cluster = Cluster::start(&[
        SWIFT,
        "nexus_hub.auto_cleanup = off",
        "nexus_hub.enabled = off",
        "max_prepared_transactions = 5",
    ]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 3);
    client
        .batch_execute(
            "INSERT INTO job_attempts (job_id, attempt, started_at, finished_at, error) SELECT id, 1, now(), '2020-01-01', 'e' FROM job_results LIMIT 2;
             INSERT INTO job_results (job_type, server_id, tool_name, status, created_at) VALUES ('tool_invoke', 's', 'forgotten', 'running', '2020-01-01');
             CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF OLD.tool_name = 'forgotten' THEN RAISE 'never'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON job_results FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .expect("trouble");
    client
        .batch_execute("BEGIN; SELECT FROM job_attempts LIMIT 1 FOR UPDATE; PREPARE TRANSACTION 'holder'")
        .expect("more of it");
    add_ended(&mut client, "cancelled", 8.0, 5);
    cluster.configure(&[SWIFT, "nexus_hub.enabled = off", "max_prepared_transactions = 5"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("old jobs go", || count(&mut client, "status = 'cancelled'") == 0);
    wait_until("the free attempt goes", || value::<i64>(&mut client, "SELECT count(*) FROM job_attempts") == 1);
    wait_until("the log tells of the other", || {
        cluster.log().contains("what is old was not deleted, and is tried again: never")
    });
    // And again, in rounds to come.
    add_ended(&mut client, "completed", 8.0, 5);
    wait_until("old jobs go", || count(&mut client, "status = 'completed'") == 3);
    client.batch_execute("COMMIT PREPARED 'holder'").expect("COMMIT");
    client.batch_execute("DROP TRIGGER refuse ON job_results").expect("DROP");
    wait_until("all is as it should be", || {
        count(&mut client, "status = 'running'") == 0
            && value::<i64>(&mut client, "SELECT count(*) FROM job_attempts WHERE finished_at < '2021-01-01'") == 0
    });
}

#[test]
fn rows_that_go_with_old_jobs_and_are_locked_do_not_keep_jobs_from_running() {
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_cleanup = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 8.0, 30);
    client
        .batch_execute(
            "CREATE TABLE notes (job_id uuid PRIMARY KEY REFERENCES job_results (id) ON DELETE CASCADE);
             INSERT INTO notes SELECT id FROM job_results",
        )
        .expect("DDL");
    let mut holder = in_transaction(&database, "SELECT FROM notes FOR UPDATE");
    cluster.configure(&[SWIFT]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    // Each waits a moment for its lock; all of them one after the other, for the second that the worker waits for
    // others, would take longer than that.
    client.batch_execute("SET statement_timeout = '25s'").expect("SET");
    for _ in 0..20 {
        let job: Uuid = client.query_one("SELECT http_get($1)", &[&server.url]).expect("http_get").get(0);
        wait_for_job(&mut client, job).completed();
    }
    wait_until("the worker has been there", || {
        cluster
            .log()
            .contains("old jobs could not be deleted, and are tried again: canceling statement due to lock timeout")
    });
    holder.batch_execute("ROLLBACK").expect("ROLLBACK");
    // The more there are, the later they are tried again; another worker begins with the first.
    client.execute("SELECT pg_terminate_backend($1)", &[&database.wait_for_worker()]).expect("terminate");
    wait_until("then they go", || count(&mut client, "server_id = 's'") == 0);
}

#[test]
fn a_lock_on_the_whole_table_makes_the_caller_wait_as_long_as_it_wants() {
    let database = shared().database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 5);
    let holder = in_transaction(&database, "LOCK TABLE job_results IN SHARE MODE");
    client.batch_execute("SET lock_timeout = '30ms'").expect("SET");
    assert_eq!(error_of(&mut client, "SELECT cleanup_job_results_manual(0, 0)").0, "55P03");
    client.batch_execute("SET lock_timeout = 0").expect("SET");
    let waiter = std::thread::spawn(move || deleted(&mut client, "cleanup_job_results_manual(0, NULL)"));
    let mut watcher = database.connect();
    wait_until("it waits for the lock", || {
        value(
            &mut watcher,
            "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'job_results'::regclass AND NOT granted)",
        )
    });
    drop(holder);
    assert_eq!(waiter.join().expect("the caller"), (5, 0, 5));
}

#[test]
fn two_at_once_delete_each_job_once_and_a_job_that_is_run_again_meanwhile_stays() {
    let database = shared().database();
    let mut client = database.connect();
    client.batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.auto_cleanup = off", database.name)).expect("ALTER");
    add_ended(&mut client, "completed", 3.0, 3000);
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = database.connect();
            std::thread::spawn(move || deleted(&mut client, "cleanup_job_results_manual(2, NULL)").0)
        })
        .collect();
    let total: i32 = callers.into_iter().map(|caller| caller.join().expect("a caller")).sum();
    assert_eq!((total, count(&mut client, "true")), (3000, 0));

    add_ended(&mut client, "failed", 3.0, 1);
    let mut other =
        in_transaction(&database, "UPDATE job_results SET status = 'pending', run_at = now() + interval '1 hour'");
    let caller = std::thread::spawn({
        let mut client = database.connect();
        move || deleted(&mut client, "cleanup_job_results_manual(2, 1)")
    });
    wait_until("the other one was met, or is over", || {
        caller.is_finished() || value(&mut client, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
    });
    other.batch_execute("COMMIT").expect("COMMIT");
    assert_eq!(caller.join().expect("the caller"), (0, 0, 0));
    assert_eq!(count(&mut client, "status = 'pending'"), 1);
}

#[test]
fn a_rollback_takes_it_back() {
    let database = shared().database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 10);
    client.batch_execute("BEGIN; SELECT cleanup_job_results_manual(0, 0); ROLLBACK").expect("ROLLBACK");
    assert_eq!(count(&mut client, "true"), 10);
}

#[test]
fn a_job_that_failed_and_succeeded_after_a_retry_by_hand_takes_its_attempts_along() {
    let database = shared().database();
    let mut client = database.connect();
    let is_up = Arc::new(AtomicBool::new(false));
    let server = FakeServer::start({
        let is_up = is_up.clone();
        move |_| {
            Some(if is_up.load(SeqCst) { Answer::json("{}") } else { Answer::new("404 Not Found", "text/plain", "no") })
        }
    });
    let job: Uuid = client.query_one("SELECT http_get($1)", &[&server.url]).expect("http_get").get(0);
    wait_for_job(&mut client, job).failed();
    is_up.store(true, SeqCst);
    assert!(client.query_one("SELECT retry_job($1)", &[&job]).expect("retry_job").get::<_, bool>(0));
    wait_for_job(&mut client, job).completed();
    let row = client
        .query_one("SELECT attempt, failures, (SELECT count(*) FROM job_attempts) FROM job_results", &[])
        .expect("the job");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1), row.get::<_, i64>(2)), (1, 1, 1));
    assert_eq!(deleted(&mut client, "cleanup_job_results_manual(0, 0)"), (1, 0, 1));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_attempts"), 0);
}

#[test]
fn an_idle_worker_takes_no_transaction_id_to_find_nothing() {
    let cluster = Cluster::start(&[SWIFT, "autovacuum = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 10);
    database.wait_for_worker();
    let commits = format!("SELECT xact_commit FROM pg_stat_database WHERE datname = '{}'", database.name);
    let next_xid = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8";
    // From elsewhere, so that no commit but the worker's is counted.
    let mut watcher = cluster.connect("postgres");
    // What it writes but once, at its start, is written at some time.
    wait_until("it looks and does not write", || {
        let before: i64 = value(&mut watcher, next_xid);
        let looks: i64 = value(&mut watcher, &commits);
        wait_until("the worker has looked again and again", || value::<i64>(&mut watcher, &commits) > looks + 30);
        value::<i64>(&mut watcher, next_xid) == before
    });
}

#[test]
fn the_guides_pg_cron_schedule_runs_it() {
    let cluster = Cluster::start(&[
        "shared_preload_libraries = 'pg_cron, nexus_hub'",
        "cron.database_name = 'postgres'",
        "cron.use_background_workers = on",
        "nexus_hub.auto_cleanup = off",
    ]);
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("CREATE EXTENSION IF NOT EXISTS pg_cron; CREATE EXTENSION nexus_hub")
        .expect("CREATE EXTENSION");
    add_ended(&mut client, "completed", 8.0, 3);
    add_ended(&mut client, "completed", 6.0, 2);
    client
        .batch_execute(
            "SELECT cron.schedule('cleanup-old-job-results', '0 2 * * *', $$SELECT cleanup_old_job_results()$$)",
        )
        .expect("cron.schedule");
    let job = client
        .query_one("SELECT schedule, command, active FROM cron.job WHERE jobname = 'cleanup-old-job-results'", &[])
        .expect("cron.job");
    assert_eq!(
        (job.get::<_, String>(0).as_str(), job.get::<_, String>(1).as_str(), job.get(2)),
        ("0 2 * * *", "SELECT cleanup_old_job_results()", true)
    );
    // Nobody waits until two o'clock: the same job, at the next start.
    client
        .batch_execute("SELECT cron.alter_job(jobid, schedule => '@reboot') FROM cron.job WHERE jobname = 'cleanup-old-job-results'")
        .expect("cron.alter_job");
    drop(client);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect("postgres");
    let history = "SELECT max(status || ' ' || return_message) FROM cron.job_run_details
                    WHERE jobid = (SELECT jobid FROM cron.job WHERE jobname = 'cleanup-old-job-results') AND end_time IS NOT NULL";
    wait_until("pg_cron has run it", || value::<Option<String>>(&mut client, history).is_some());
    assert_eq!(value::<String>(&mut client, history), "succeeded SELECT 1");
    assert_eq!(count(&mut client, "true"), 2);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn a_back_end_cleans_up_through_postgrest_and_nobody_else_does() {
    let database = shared().database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 3);
    add_ended(&mut client, "failed", 3.0, 2);
    let api = PostgRest::start(&database, &[]);
    let ask = |role: &str, path: &str, body: &str, client: &mut Client| {
        let token = bearer(client, role, ALICE);
        let answer = api.ask("POST", path, &[("Authorization", &token)], body);
        (answer.status, answer.body)
    };
    for (role, expected) in [("authenticated", 403), ("anon", 401)] {
        let (status, body) = ask(role, "/rpc/cleanup_job_results_manual", "{}", &mut client);
        assert_eq!((status, body["code"].as_str()), (expected, Some("42501")), "{role}");
        assert_eq!(ask(role, "/rpc/cleanup_old_job_results", "{}", &mut client).0, expected, "{role}");
    }
    let body = r#"{"p_days_completed": 4, "p_days_orphaned": 1}"#;
    let (status, body) = ask("service_role", "/rpc/cleanup_job_results_manual", body, &mut client);
    assert_eq!((status, body), (200, json!([{"deleted_completed": 3, "deleted_orphaned": 0, "total_deleted": 3}])));
    assert_eq!(ask("service_role", "/rpc/cleanup_old_job_results", "{}", &mut client), (200, json!(0)));
    let (status, body) =
        ask("service_role", "/rpc/cleanup_job_results_manual", r#"{"p_days_completed": -1}"#, &mut client);
    assert_eq!((status, body["message"].as_str()), (400, Some("p_days_completed must be 0 or more, not -1")));
}

#[test]
fn a_kill_in_the_middle_of_it_loses_no_young_job_and_the_next_worker_goes_on() {
    let cluster = Cluster::start(&[SWIFT]);
    let database = cluster.database();
    let mut client = database.connect();
    add_ended(&mut client, "completed", 6.0, 100);
    add_ended(&mut client, "completed", 8.0, 20_000);
    wait_until("it is in the middle", || count(&mut client, "completed_at < now() - interval '7 days'") < 20_000);
    cluster.signal("KILL", database.wait_for_worker());
    wait_until("the server notices", || cluster.log().contains("reinitializing"));
    let mut client = cluster.reconnect(&database.name);
    wait_until("the rest is gone", || count(&mut client, "completed_at < now() - interval '7 days'") == 0);
    assert_eq!(count(&mut client, "true"), 100);
}
