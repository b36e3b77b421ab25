//! Rotation of the vault's keys while everything runs.

use crate::support::*;
use crate::vault::KEY;
use postgres::Client;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

pub const NEW_KEY: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
pub const ROWS: i64 = 100_000;
pub const CORRUPT: i64 = 100;

/// Gives the server these keys, newest first, and waits until the session has them.
pub fn use_keys(cluster: &Cluster, client: &mut Client, keys: &[&str]) {
    let before: String = value(client, "SELECT pg_conf_load_time()::text");
    cluster.write_key_file(&keys.join("\n"));
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the reload", || value::<String>(client, "SELECT pg_conf_load_time()::text") != before);
}

pub fn add_rows(client: &mut Client) {
    client
        .batch_execute(&format!(
            "INSERT INTO user_servers (user_id, server_id, name, config_encrypted)
             SELECT gen_random_uuid(), 's', 'n', encrypt_config(jsonb_build_object('url', 'http://h/' || n))
               FROM generate_series(1, {ROWS}) AS n;
             UPDATE user_servers SET config_encrypted = decode(repeat('ab', 40), 'hex')
              WHERE id IN (SELECT id FROM user_servers ORDER BY id LIMIT {CORRUPT})"
        ))
        .expect("rows");
}

fn rotate(client: &mut Client) -> (i64, i64) {
    let row = client.query_one("SELECT servers_updated, cardinality(errors) FROM rotate_vault_key()", &[]);
    let row = row.expect("rotate_vault_key");
    (row.get::<_, i32>(0).into(), row.get::<_, i32>(1).into())
}

/// Rows that the session's keys open.
pub fn openable(client: &mut Client) -> i64 {
    client
        .batch_execute(
            "CREATE OR REPLACE FUNCTION pg_temp.opens(sealed bytea) RETURNS boolean LANGUAGE plpgsql AS $$
             BEGIN RETURN decrypt_config(sealed) ? 'url'; EXCEPTION WHEN data_exception THEN RETURN false; END $$",
        )
        .expect("a function");
    value(client, "SELECT count(*) FROM user_servers WHERE pg_temp.opens(config_encrypted)")
}

#[test]
fn with_a_new_key_on_top_everything_comes_under_it_while_readers_go_on_and_writers_wait() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_rows(&mut client);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    let id: uuid::Uuid = value(&mut client, "SELECT max(id::text)::uuid FROM user_servers");

    let (over, reads, writes) = (AtomicBool::new(false), &AtomicBool::new(false), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let over = &over;
        let (mut reader, mut writer) = (database.connect(), database.connect());
        scope.spawn(move || {
            reader.batch_execute("SET lock_timeout = '1ms'").expect("SET");
            while !over.load(SeqCst) {
                reader
                    .query_one("SELECT decrypt_config(config_encrypted) FROM user_servers WHERE id = $1", &[&id])
                    .expect("read");
                reads.store(true, SeqCst);
            }
        });
        scope.spawn(move || {
            while !over.load(SeqCst) {
                let changed: bool = writer
                    .query_one("SELECT update_server($1, p_config => '{\"url\": \"http://changed/\"}')", &[&id])
                    .expect("write")
                    .get(0);
                assert!(changed);
                writes.store(true, SeqCst);
            }
        });
        wait_until("reads and writes", || reads.load(SeqCst) && writes.load(SeqCst));
        let (updated, errors) = rotate(&mut client);
        // One of them is written all the time, and under the new key.
        assert!((ROWS - CORRUPT - 1..=ROWS - CORRUPT).contains(&updated), "{updated}");
        assert_eq!(errors, CORRUPT);
        reads.store(false, SeqCst);
        writes.store(false, SeqCst);
        wait_until("reads and writes afterwards", || reads.load(SeqCst) && writes.load(SeqCst));
        over.store(true, SeqCst);
    });

    // The old key can go, and nothing depends on it.
    use_keys(&cluster, &mut client, &[NEW_KEY]);
    assert_eq!(openable(&mut client), ROWS - CORRUPT);
    use_keys(&cluster, &mut client, &[KEY]);
    assert_eq!(openable(&mut client), 0);

    // The way back: the old key on top again.
    use_keys(&cluster, &mut client, &[KEY, NEW_KEY]);
    assert_eq!(rotate(&mut client), (ROWS - CORRUPT, CORRUPT));
    use_keys(&cluster, &mut client, &[KEY]);
    assert_eq!(openable(&mut client), ROWS - CORRUPT);
}

#[test]
fn a_rotation_that_is_killed_or_rolled_back_has_changed_nothing() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_rows(&mut client);
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    client.batch_execute("BEGIN").expect("BEGIN");
    assert_eq!(rotate(&mut client), (ROWS - CORRUPT, CORRUPT));
    client.batch_execute("ROLLBACK").expect("ROLLBACK");
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").expect("BEGIN");
    let (code, _) = error_of(&mut client, "SELECT rotate_vault_key()");
    assert_eq!(code, "55000", "a snapshot of before would miss rows");
    drop(client);

    let mut rotating = database.connect();
    let pid: i32 = value(&mut rotating, "SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        scope.spawn(move || rotating.batch_execute("SELECT rotate_vault_key()").expect_err("it is killed"));
        let mut watcher = database.connect();
        let locked = format!(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = {pid} AND granted AND relation = 'user_servers'::regclass
                                AND mode = 'ShareRowExclusiveLock')"
        );
        wait_until("it is at work", || value(&mut watcher, &locked));
        cluster.signal("KILL", pid);
    });

    // Until then it could still take a connection, and end it.
    wait_until("the server notices", || cluster.log().contains("reinitializing"));
    let mut client = cluster.reconnect(&database.name);
    use_keys(&cluster, &mut client, &[KEY]);
    assert_eq!(openable(&mut client), ROWS - CORRUPT, "everything is under the old key");
    use_keys(&cluster, &mut client, &[NEW_KEY, KEY]);
    assert_eq!(rotate(&mut client), (ROWS - CORRUPT, CORRUPT), "and the next rotation does it all");
}
