//! Rotation of the vault's keys in the background, in small batches.

use crate::rotation::{CORRUPT, NEW_KEY, ROWS, add_rows, openable, use_keys};
use crate::support::*;
use crate::vault::KEY;
use postgres::Client;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};

const PROCESS: &str =
    "SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub rotation' AND datname = current_database()";
const QUICK: &str = "nexus_hub.vault_rotation_pace = 100";
/// A batch, and then a long rest.
const SLOW: &str = "nexus_hub.vault_rotation_pace = 1";

fn start(client: &mut Client) {
    client.batch_execute("SELECT start_vault_rotation()").expect("start_vault_rotation");
}

fn state(client: &mut Client) -> String {
    value(client, "SELECT state FROM vault_rotation")
}

fn process(client: &mut Client) -> Option<i32> {
    client.query_opt(PROCESS, &[]).expect("pg_stat_activity").map(|row| row.get(0))
}

fn wait_for_end(client: &mut Client) {
    wait_until("the rotation is over", || state(client) == "done" && process(client).is_none());
}

/// A database with a few values, each in a block of its own.
fn notes(cluster: &Cluster) -> (Database<'_>, Client) {
    let database = cluster.database();
    let mut client = database.connect();
    add_few(&mut client);
    (database, client)
}

fn add_few(client: &mut Client) {
    client
        .batch_execute(
            "CREATE TABLE notes (id integer PRIMARY KEY, body bytea, filler text) WITH (fillfactor = 10);
             ALTER TABLE notes ALTER COLUMN filler SET STORAGE PLAIN;
             INSERT INTO notes SELECT n, encrypt_token('note ' || n, n::text), repeat('x', 5000) FROM generate_series(1, 200) AS n;
             SELECT register_vault_column('notes', 'body', 'id::text')",
        )
        .expect("notes");
}

fn under_the_first_key(client: &mut Client) -> i64 {
    value(client, "SELECT value_count FROM vault_keys WHERE is_primary")
}

#[test]
fn everything_comes_under_the_new_key_while_readers_and_writers_go_on_and_a_crash_loses_nothing() {
    let cluster = Cluster::start(&["nexus_hub.vault_rotation_pace = 30", "restart_after_crash = on"]);
    let database = cluster.database();
    let mut client = database.connect();
    add_rows(&mut client);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    let first: uuid::Uuid =
        value(&mut client, "SELECT min(id::text)::uuid FROM user_servers WHERE length(config_encrypted) <> 40");
    let id: uuid::Uuid =
        value(&mut client, "SELECT max(id::text)::uuid FROM user_servers WHERE length(config_encrypted) <> 40");

    let (over, reads, writes) = (AtomicBool::new(false), &AtomicI64::new(0), &AtomicI64::new(0));
    std::thread::scope(|scope| {
        let over = &over;
        let (mut reader, mut writer) = (database.connect(), database.connect());
        scope.spawn(move || {
            reader.batch_execute("SET lock_timeout = '1ms'").expect("SET");
            while !over.load(SeqCst) {
                reader
                    .query_one("SELECT decrypt_config(config_encrypted) FROM user_servers WHERE id = $1", &[&id])
                    .expect("read");
                reads.fetch_add(1, SeqCst);
            }
        });
        scope.spawn(move || {
            // Far more than a batch takes, far less than the rotation.
            writer.batch_execute("SET lock_timeout = '5s'").expect("SET");
            while !over.load(SeqCst) {
                let statement = "UPDATE user_servers SET name = name || '.' WHERE id = ANY ($1)";
                assert_eq!(writer.execute(statement, &[&vec![first, id]]).expect("write"), 2);
                writer
                    .execute("UPDATE user_servers SET name = 'n' WHERE id = ANY ($1)", &[&vec![first, id]])
                    .expect("write");
                writes.fetch_add(1, SeqCst);
            }
        });
        wait_until("reads and writes", || reads.load(SeqCst) > 0 && writes.load(SeqCst) > 0);
        start(&mut client);
        wait_until("a part is done", || value::<i64>(&mut client, "SELECT done FROM vault_rotation") > 5_000);
        let (read, written) = (reads.load(SeqCst), writes.load(SeqCst));
        wait_until("reads and writes meanwhile", || {
            reads.load(SeqCst) > read + 10 && writes.load(SeqCst) > written + 10
        });
        assert_eq!(state(&mut client), "running");
        over.store(true, SeqCst);
    });

    // It can be paused, which ends its process, and goes on where it was.
    assert!(value::<bool>(&mut client, "SELECT pause_vault_rotation()"));
    assert!(!value::<bool>(&mut client, "SELECT pause_vault_rotation()"), "it is paused already");
    wait_until("its process is gone", || process(&mut client).is_none());
    let done: i64 = value(&mut client, "SELECT done FROM vault_rotation");
    let resealed = under_the_first_key(&mut client);
    assert!(done < ROWS && resealed > 0 && state(&mut client) == "paused");
    client
        .query_one("SELECT FROM vault_rotation WHERE total BETWEEN 50000 AND 200000 AND rate > 0 AND eta > '0' AND NOT old_keys_are_free", &[])
        .expect("progress");
    assert!(value::<bool>(&mut client, "SELECT resume_vault_rotation()"));
    assert!(!value::<bool>(&mut client, "SELECT resume_vault_rotation()"), "it is running already");
    wait_until("it goes on", || value::<i64>(&mut client, "SELECT done FROM vault_rotation") > done + 5_000);

    // Killed, with the whole server; there is no need to take one's time any more.
    cluster.configure(&[QUICK, "restart_after_crash = on"]);
    let pid = process(&mut client).expect("its process");
    drop(client);
    cluster.signal("KILL", pid);
    wait_until("the server notices", || cluster.log().contains("reinitializing"));
    let mut client = cluster.reconnect(&database.name);
    assert!(under_the_first_key(&mut client) >= resealed, "what was done stays done");
    wait_for_end(&mut client);
    client
        .query_one(
            "SELECT FROM vault_rotation WHERE done = $1 AND total = $1 AND errors = $2 AND old_keys_are_free AND ended_at > started_at
                 AND problem IS NULL AND eta IS NULL",
            &[&ROWS, &CORRUPT],
        )
        .expect("the end");
    assert!(cluster.log().contains("are free to be removed"));
    let told = "SELECT count(*) FROM vault_rotation_errors e JOIN user_servers s ON e.item = 'Server ' || s.id
                 WHERE e.reason = 'the value cannot be decrypted'";
    assert_eq!(value::<i64>(&mut client, told), CORRUPT);

    // The old key can go, and nothing depends on it.
    use_keys(&cluster, &mut client, &[NEW_KEY]);
    assert_eq!(openable(&mut client), ROWS - CORRUPT);

    // The way back: the old key on top again.
    cluster.configure(&[QUICK]);
    use_keys(&cluster, &mut client, &[KEY, NEW_KEY]);
    start(&mut client);
    wait_for_end(&mut client);
    use_keys(&cluster, &mut client, &[KEY]);
    assert_eq!(openable(&mut client), ROWS - CORRUPT);
}

#[test]
fn a_users_table_is_taken_along_with_its_owners_rights_and_a_broken_column_does_not_hold_up_the_others() {
    let cluster = Cluster::start(&[QUICK]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "CREATE ROLE keeper; GRANT CREATE ON SCHEMA public TO keeper;
             GRANT EXECUTE ON FUNCTION register_vault_column TO keeper; SET ROLE keeper;
             CREATE TABLE notes (id integer, body bytea, changed integer DEFAULT 0, PRIMARY KEY (id)) PARTITION BY RANGE (id);
             CREATE TABLE notes_1 PARTITION OF notes FOR VALUES FROM (0) TO (500);
             CREATE TABLE notes_2 PARTITION OF notes FOR VALUES FROM (500) TO (1001);
             CREATE FUNCTION context(id integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
                 IF current_user <> 'keeper' THEN RAISE 'it runs as %', current_user; END IF; RETURN 'note/' || id; END $$;
             CREATE FUNCTION changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.changed := NEW.changed + 1; RETURN NEW; END $$;
             CREATE TRIGGER changed BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION changed();
             CREATE TABLE broken (id integer, body bytea);
             CREATE TABLE hanging (id integer, body bytea);
             RESET ROLE;
             INSERT INTO notes SELECT n, encrypt_token('note ' || n, 'note/' || n) FROM generate_series(1, 1000) AS n;
             INSERT INTO broken SELECT 1, encrypt_token('x', '1');
             SET ROLE keeper;
             SELECT register_vault_column('notes', 'body', 'public.context(id)');
             SELECT register_vault_column('broken', 'body', '(1 / id)::text');
             RESET ROLE; UPDATE broken SET id = 0",
        )
        .expect("notes");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("it is over", || state(&mut client) == "incomplete");
    client
        .query_one(
            "SELECT FROM vault_rotation WHERE done = 1000 AND resealed = 1000 AND errors = 1 AND NOT old_keys_are_free",
            &[],
        )
        .expect("the end");
    client
        .query_one(
            "SELECT FROM vault_rotation_errors WHERE item = 'public.broken.body' AND reason = 'division by zero'",
            &[],
        )
        .expect("its error");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(changed) FROM notes"), 0, "no trigger was told");

    // Once that is put right, another one finds the rest done.
    client.batch_execute("UPDATE broken SET id = 1").expect("UPDATE");
    start(&mut client);
    wait_for_end(&mut client);
    client
        .query_one(
            "SELECT FROM vault_rotation WHERE done = 1001 AND resealed = 1 AND errors = 0 AND old_keys_are_free",
            &[],
        )
        .expect("the end");
    use_keys(&cluster, &mut client, &[NEW_KEY]);
    assert_eq!(
        value::<i64>(
            &mut client,
            "SELECT count(*) FROM notes WHERE decrypt_token(body, 'note/' || id) = 'note ' || id"
        ),
        1000
    );

    // The registration goes with a dump, without what is gone.
    client.batch_execute("SELECT register_vault_column('hanging', 'body'); DROP TABLE hanging").expect("register");
    let copy = cluster.empty_database();
    database.copy_to(&copy);
    let columns = "SELECT string_agg(table_name || ' ' || coalesce(problem, ''), ',' ORDER BY table_name) FROM vault_columns WHERE is_registered";
    assert_eq!(value::<String>(&mut copy.connect(), columns), "public.broken ,public.notes ");
}

fn waits_for_process(client: &mut Client, other: &mut Client) -> bool {
    let pid: i32 = value(other, "SELECT pg_backend_pid()");
    let waits = format!("waits for the transaction of process {pid}, %");
    client
        .query_one("SELECT count(*) FROM vault_rotation WHERE problem LIKE $1", &[&waits])
        .expect("query")
        .get::<_, i64>(0)
        == 1
}

#[test]
fn what_a_transaction_of_before_commits_under_the_old_key_is_waited_for_and_encrypted_anew() {
    let cluster = Cluster::start(&[QUICK, "max_prepared_transactions = 2"]);
    let (database, mut client) = notes(&cluster);
    let mut late = database.connect();
    late.batch_execute(
        "SET track_activities = off; BEGIN; INSERT INTO notes SELECT 1000, encrypt_token('late', '1000')",
    )
    .expect("INSERT");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("it waits", || waits_for_process(&mut client, &mut late));
    assert_eq!(state(&mut client), "checking");
    // However often the worker is another one, one process is at it.
    for number in [2, 1, 2, 1] {
        cluster.configure(&[
            QUICK,
            "max_prepared_transactions = 2",
            &format!("nexus_hub.workers_per_database = {number}"),
        ]);
        client.batch_execute("SELECT pg_reload_conf()").expect("reload");
        let are_new = format!(
            "SELECT count(*) = {number} AND bool_and(number_of = {number})
               FROM (SELECT (w ->> 'of')::integer FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w
                      WHERE w ->> 'state' = 'running') AS w (number_of)"
        );
        wait_until("the workers are others", || value(&mut client, &are_new));
    }
    // Each of them has looked at once whether there has to be one.
    wait_until("there is one", || client.query(PROCESS, &[]).expect("pg_stat_activity").len() == 1);
    wait_until("it still waits", || waits_for_process(&mut client, &mut late));
    // Prepared, it is no process's any more, and still not committed.
    late.batch_execute("PREPARE TRANSACTION 'late'").expect("PREPARE");
    let waits = "SELECT count(*) FROM vault_rotation WHERE problem LIKE 'waits for the prepared transaction % late, %'";
    wait_until("it waits for that", || value::<i64>(&mut client, waits) == 1);
    late.batch_execute("COMMIT PREPARED 'late'").expect("COMMIT");
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 201);
}

#[test]
fn a_row_that_a_session_keeps_locked_holds_up_nothing_but_the_end() {
    let cluster = Cluster::start(&[QUICK]);
    let (database, mut client) = notes(&cluster);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_for_end(&mut client);
    // Begun after the start, so that the row alone is in the way, and not the transaction.
    use_keys(&cluster, &mut client, &[KEY, NEW_KEY]);
    let mut locking = database.connect();
    client
        .batch_execute("BEGIN; SELECT start_vault_rotation(); SELECT pause_vault_rotation(); COMMIT")
        .expect("start and pause");
    locking.batch_execute("BEGIN; SELECT FROM notes WHERE id = 200 FOR UPDATE").expect("lock");
    assert!(value::<bool>(&mut client, "SELECT resume_vault_rotation()"));
    wait_until("all others are done", || under_the_first_key(&mut client) == 199);
    assert_ne!(state(&mut client), "done");
    locking.batch_execute("ROLLBACK").expect("ROLLBACK");
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 200);
}

#[test]
fn a_key_that_is_put_on_top_in_the_middle_of_it_becomes_the_one() {
    const NEWER_KEY: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0";
    let cluster = Cluster::start(&[SLOW]);
    let (_database, mut client) = notes(&cluster);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("a part is done", || value::<i64>(&mut client, "SELECT resealed FROM vault_rotation") > 0);
    cluster.configure(&[QUICK]);
    use_keys(&cluster, &mut client, &[NEWER_KEY, NEW_KEY, KEY]);
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 200);
    use_keys(&cluster, &mut client, &[NEWER_KEY]);
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FROM notes WHERE decrypt_token(body, id::text) = 'note ' || id"),
        200
    );
}

#[test]
fn schema_changes_and_drops_do_not_wait_for_it() {
    let cluster = Cluster::start(&[SLOW]);
    let (database, mut client) = notes(&cluster);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("it is at work", || process(&mut client).is_some());
    // In the middle of a rest, which holds no lock.
    client.batch_execute("SET lock_timeout = '5s'; ALTER TABLE notes ADD COLUMN more text").expect("ALTER TABLE");
    client.batch_execute("DROP TABLE notes").expect("DROP TABLE");
    client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
    wait_until("its process is gone", || process(&mut client).is_none());
    client.batch_execute("CREATE EXTENSION nexus_hub; SET lock_timeout = 0").expect("CREATE EXTENSION");
    add_few(&mut client);
    start(&mut client);
    wait_until("it is at work again", || process(&mut client).is_some());
    drop(client);
    cluster.connect("postgres").batch_execute(&format!("DROP DATABASE {}", database.name)).expect("DROP DATABASE");
}

#[test]
fn a_check_lets_go_of_its_tables_for_whoever_wants_to_change_them() {
    let cluster = Cluster::start(&[QUICK]);
    let (database, mut client) = notes(&cluster);
    client
        .batch_execute(
            "CREATE TABLE slow ();
             CREATE FUNCTION context(id integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
                 IF EXISTS (SELECT FROM public.slow) THEN PERFORM pg_sleep(0.02); END IF; RETURN id::text; END $$;
             SELECT register_vault_column('notes', 'body', 'public.context(id)')",
        )
        .expect("a context");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    // The sweep is over in a moment, and the check waits until it is slow.
    let mut late = database.connect();
    late.batch_execute("BEGIN; SELECT now()").expect("BEGIN");
    start(&mut client);
    wait_until("it is to be checked", || state(&mut client) == "checking");
    client.batch_execute("INSERT INTO slow DEFAULT VALUES").expect("INSERT");
    late.batch_execute("COMMIT").expect("COMMIT");
    let checks = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                   WHERE a.backend_type = 'nexus_hub rotation' AND l.relation = 'notes'::regclass AND l.granted";
    wait_until("it is being checked", || value::<i64>(&mut client, checks) > 0);
    client.batch_execute("SET lock_timeout = '30s'; ALTER TABLE notes ADD COLUMN more text").expect("ALTER TABLE");
    assert_eq!(state(&mut client), "checking", "it was in nobody's way");
    client.batch_execute("DELETE FROM slow").expect("DELETE");
    wait_for_end(&mut client);
}

#[test]
fn without_preloading_it_says_so() {
    let cluster = Cluster::start(&["shared_preload_libraries = ''"]);
    let database = cluster.database();
    let mut client = database.connect();
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    let (code, message) = error_of(&mut client, "SELECT start_vault_rotation()");
    assert_eq!((code.as_str(), message.as_str()), ("55000", "nexus_hub is not preloaded"));
    client.batch_execute("SELECT * FROM rotate_vault_key()").expect("the other way");
}

#[test]
fn a_key_that_was_on_top_for_a_moment_is_noticed_though_the_sweep_is_over() {
    let cluster = Cluster::start(&[QUICK]);
    let (database, mut client) = notes(&cluster);
    let mut early = database.connect();
    early.batch_execute("BEGIN; SELECT now()").expect("BEGIN");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("all are gone through", || state(&mut client) == "checking");
    assert!(value::<bool>(&mut client, "SELECT pause_vault_rotation()"));
    wait_until("its process is gone", || process(&mut client).is_none());
    use_keys(&cluster, &mut client, &[KEY, NEW_KEY]);
    let mut late = database.connect();
    late.batch_execute("BEGIN; INSERT INTO notes SELECT 1000, encrypt_token('late', '1000')").expect("INSERT");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    early.batch_execute("COMMIT").expect("COMMIT");
    assert!(value::<bool>(&mut client, "SELECT resume_vault_rotation()"));
    wait_until("it waits", || waits_for_process(&mut client, &mut late));
    late.batch_execute("COMMIT").expect("COMMIT");
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 201);
}

#[test]
fn a_key_that_is_missing_in_the_middle_of_it_is_waited_for_and_what_is_said_of_old_keys_is_of_now() {
    let cluster = Cluster::start(&[QUICK]);
    let (database, mut client) = notes(&cluster);
    let mut late = database.connect();
    late.batch_execute("BEGIN; SELECT now()").expect("BEGIN");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("all are gone through", || state(&mut client) == "checking");
    use_keys(&cluster, &mut client, &[NEW_KEY]);
    late.batch_execute("COMMIT").expect("COMMIT");
    let waits = "SELECT count(*) FROM vault_rotation WHERE problem LIKE 'waits for the key ________________, %'";
    wait_until("it waits for the key", || value::<i64>(&mut client, waits) == 1);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    wait_for_end(&mut client);
    let are_free = "SELECT old_keys_are_free FROM vault_rotation";
    assert!(value::<bool>(&mut client, are_free));
    client
        .batch_execute("CREATE TABLE later (body bytea); SELECT register_vault_column('later', 'body')")
        .expect("register");
    assert!(!value::<bool>(&mut client, are_free), "a column was registered since");
    client.batch_execute("SELECT unregister_vault_column('later', 'body')").expect("unregister");
    assert!(value::<bool>(&mut client, are_free));
    use_keys(&cluster, &mut client, &[KEY, NEW_KEY]);
    assert!(!value::<bool>(&mut client, are_free), "another key encrypts");
}

#[test]
fn what_a_columns_context_does_not_open_keeps_the_old_keys() {
    let cluster = Cluster::start(&[QUICK]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "CREATE TABLE notes (id integer PRIMARY KEY, body bytea);
             INSERT INTO notes SELECT n, encrypt_token('note ' || n, 'note/' || n) FROM generate_series(1, 10) AS n;
             SELECT register_vault_column('notes', 'body', 'id::text')",
        )
        .expect("notes");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    wait_until("it is over", || state(&mut client) == "incomplete");
    client.query_one("SELECT FROM vault_rotation WHERE errors = 10 AND NOT old_keys_are_free", &[]).expect("the end");
    let told = "SELECT count(*) FROM vault_rotation_errors WHERE item ~ '^public.notes.body [0-9]+$'";
    assert_eq!(value::<i64>(&mut client, told), 10);
    client.batch_execute("SELECT register_vault_column('notes', 'body', '''note/'' || id')").expect("register");
    start(&mut client);
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 10);
}

#[test]
fn the_rotation_in_one_transaction_waits_for_rows_that_a_session_keeps_locked() {
    let cluster = Cluster::start(&[]);
    let (database, mut client) = notes(&cluster);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    let mut locking = database.connect();
    locking.batch_execute("BEGIN; SELECT FROM notes WHERE id <= 5 FOR UPDATE").expect("lock");
    let mut rotating = database.connect();
    let pid: i32 = value(&mut rotating, "SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        scope.spawn(move || rotating.batch_execute("SELECT rotate_vault_key()").expect("rotate_vault_key"));
        let waits = format!("SELECT cardinality(pg_blocking_pids({pid})) > 0");
        wait_until("it waits", || value(&mut client, &waits));
        locking.batch_execute("COMMIT").expect("COMMIT");
    });
    assert_eq!(under_the_first_key(&mut client), 200);
}

#[test]
fn a_table_that_is_locked_for_long_is_waited_for() {
    let cluster = Cluster::start(&[QUICK]);
    let (database, mut client) = notes(&cluster);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    let mut locking = database.connect();
    locking.batch_execute("BEGIN; LOCK TABLE notes IN SHARE MODE").expect("lock");
    start(&mut client);
    for _ in 0..4 {
        let problem = "SELECT count(*) FROM vault_rotation WHERE problem = 'canceling statement due to lock timeout'";
        wait_until("it has tried", || value::<i64>(&mut client, problem) == 1);
        client.batch_execute("UPDATE _nexus_hub.vault_rotation_state SET problem = NULL").expect("UPDATE");
    }
    assert_eq!(state(&mut client), "running");
    locking.batch_execute("ROLLBACK").expect("ROLLBACK");
    wait_for_end(&mut client);
    assert_eq!(under_the_first_key(&mut client), 200);
}

#[test]
fn an_expression_that_hangs_holds_up_no_shutdown() {
    let cluster = Cluster::start(&[QUICK]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "CREATE TABLE notes (id integer PRIMARY KEY, body bytea);
             INSERT INTO notes VALUES (1, encrypt_token('x', '1'));
             CREATE FUNCTION hangs(id integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
                 IF EXISTS (SELECT FROM pg_stat_activity WHERE pid = pg_backend_pid() AND backend_type = 'nexus_hub rotation') THEN
                     PERFORM pg_sleep(600);
                 END IF;
                 RETURN id::text; END $$;
             SELECT register_vault_column('notes', 'body', 'public.hangs(id)')",
        )
        .expect("notes");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    start(&mut client);
    let hangs =
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'nexus_hub rotation' AND wait_event = 'PgSleep'";
    wait_until("it hangs", || value::<i64>(&mut client, hangs) == 1);
    drop(client);
    // Were the server to wait for the expression, this would fail by its own time limit.
    cluster.pg_ctl(&["-t", "20", "-m", "fast", "stop"]);
}
