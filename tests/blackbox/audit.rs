//! The audit of the vault: who is seen doing what, in spite of rollbacks, restarts and kills, and that no value is.

use crate::rotation::{NEW_KEY, use_keys};
use crate::support::*;
use crate::vault::KEY;
use postgres::Client;
use serde_json::json;

const MARKER: &str = "pl4int3xt-m4rk3r";

/// Entries as text: kind, object, outcome, count, role, sub; the oldest first.
fn entries(client: &mut Client, condition: &str) -> Vec<String> {
    let query = format!(
        "SELECT concat_ws(' ', kind, coalesce(object, '-'), coalesce(outcome, '-'), count, coalesce(role, '-'), coalesce(sub::text, '-'))
           FROM vault_audit WHERE {condition} ORDER BY at, object"
    );
    client.query(&query, &[]).unwrap_or_else(|error| panic!("{error}")).iter().map(|row| row.get(0)).collect()
}

/// Waits for the entries of an object.
fn wait_for(client: &mut Client, object: &str, expected: &[&str]) {
    let condition = format!("object = '{object}'");
    let mut last = Vec::new();
    wait_until(&format!("{expected:?}"), || {
        last = entries(client, &condition);
        last.len() >= expected.len()
    });
    assert_eq!(last, expected);
}

/// All counted uses so far.
fn total(client: &mut Client, condition: &str) -> i64 {
    value(client, &format!("SELECT coalesce(sum(count), 0)::bigint FROM vault_audit WHERE {condition}"))
}

/// The claims of a user, for the session.
fn claim(client: &mut Client, role: &str, sub: &str) {
    let statement = format!("SET ROLE {role}; SET request.jwt.claims = '{{\"role\": \"{role}\", \"sub\": \"{sub}\"}}'");
    client.batch_execute(&statement).expect("claims");
}

#[test]
fn who_has_decrypted_what_is_seen_whatever_becomes_of_the_transaction() {
    let database = shared().database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    owner
        .batch_execute(
            "CREATE TABLE sealed AS SELECT encrypt_token('t', 'row') AS value; GRANT SELECT ON sealed TO PUBLIC",
        )
        .expect("a value");
    claim(&mut client, "service_role", ALICE);
    let open = |context: &str| format!("SELECT decrypt_token(encrypt_token('t', '{context}'), '{context}')");

    client.batch_execute(&open("plain")).expect("open");
    wait_for(&mut owner, "plain", &[&format!("decrypt plain allowed 1 service_role {ALICE}")]);
    client.batch_execute(&format!("BEGIN; {}; {0}; ROLLBACK", open("rolled back"))).expect("open");
    wait_for(&mut owner, "rolled back", &[&format!("decrypt rolled back allowed 2 service_role {ALICE}")]);
    client.batch_execute("BEGIN READ ONLY; SELECT decrypt_token(value, 'row') FROM sealed; COMMIT").expect("open");
    wait_for(&mut owner, "row", &[&format!("decrypt row allowed 1 service_role {ALICE}")]);
    client.batch_execute(&format!("BEGIN; SAVEPOINT s; {}; ROLLBACK TO s; COMMIT", open("savepoint"))).expect("open");
    wait_for(&mut owner, "savepoint", &[&format!("decrypt savepoint allowed 1 service_role {ALICE}")]);
    client.batch_execute("SELECT decrypt_config(encrypt_config('{}', 'config'), 'config')").expect("open");
    wait_for(&mut owner, "config", &[&format!("decrypt config allowed 1 service_role {ALICE}")]);

    // Another key or context, too short, and not JSON.
    for (statement, object) in [
        ("SELECT decrypt_token(encrypt_token('t', 'this'), 'another')", "another"),
        ("SELECT decrypt_token('\\x00', 'short')", "short"),
        ("SELECT decrypt_config(encrypt_token('t', 'no json'), 'no json')", "no json"),
    ] {
        client.batch_execute(statement).expect_err("it cannot be opened");
        wait_for(&mut owner, object, &[&format!("decrypt {object} failed 1 service_role {ALICE}")]);
    }
    // Told apart: two users in one transaction, even in one statement, the older claim, and none.
    client
        .batch_execute(&format!(
            "DO $$ DECLARE sealed bytea := encrypt_token('t', 'two'); BEGIN
                 FOR i IN 1..6 LOOP
                     PERFORM set_config('request.jwt.claims', format('{{\"sub\": \"%s\"}}', CASE i % 3 WHEN 0 THEN '{ALICE}' WHEN 1 THEN '{BOB}' ELSE 'nobody' END), true);
                     PERFORM set_config('request.jwt.claim.sub', '{ALICE}', true);
                     PERFORM length(decrypt_token(sealed, 'two'));
                 END LOOP;
                 PERFORM set_config('request.jwt.claims', '', true);
                 PERFORM decrypt_token(sealed, 'two');
             END $$"
        ))
        .expect("open");
    wait_for(
        &mut owner,
        "two",
        &[
            &format!("decrypt two allowed 2 service_role {BOB}"),
            "decrypt two allowed 2 service_role -",
            &format!("decrypt two allowed 3 service_role {ALICE}"),
        ],
    );
    // Inside of somebody else's function it is still the caller who is named.
    owner
        .batch_execute("CREATE FUNCTION peek() RETURNS text LANGUAGE sql SECURITY DEFINER AS $$ SELECT decrypt_token(encrypt_token('t', 'definer'), 'definer') $$")
        .expect("a function");
    claim(&mut client, "anon", BOB);
    client.batch_execute("SELECT peek()").expect("open");
    wait_for(&mut owner, "definer", &[&format!("decrypt definer allowed 1 anon {BOB}")]);
    // When: as PostgreSQL has it.
    assert!(value::<bool>(
        &mut owner,
        "SELECT bool_and(at BETWEEN now() - interval '5 minutes' AND now()) FROM vault_audit"
    ));
}

#[test]
fn keys_servers_and_rotations_are_seen_with_their_rows_and_refusals() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    claim(&mut client, "service_role", BOB);
    let key = format!("{ALICE}/openai");
    client.query_one("SELECT insert_user_api_key($1::text::uuid, ' OpenAI', $2)", &[&ALICE, &MARKER]).expect("insert");
    client.batch_execute(&format!("SELECT get_user_api_key('{ALICE}', 'openai')")).expect("get");
    client.batch_execute(&format!("SELECT get_user_api_key('{BOB}', 'openai')")).expect("none");
    client
        .batch_execute(&format!(
            "SELECT delete_user_api_key('{ALICE}', 'openai'), delete_user_api_key('{BOB}', 'openai')"
        ))
        .expect("delete");
    let by_bob = |what: &str| format!("{what} 1 service_role {BOB}");
    let expected = [format!("change {key} allowed"), format!("get {key} allowed"), format!("change {key} allowed")];
    wait_for(&mut owner, &key, &expected.each_ref().map(|what| by_bob(what)).each_ref().map(String::as_str));
    assert_eq!(total(&mut owner, "kind = 'decrypt'"), 0, "a key that is got is not decrypted, too");

    client.batch_execute("BEGIN; SELECT insert_user_api_key(NULL, 'xai', 'k'); ROLLBACK").expect("a change of mind");
    wait_for(&mut owner, "team/xai", &[&by_bob("change team/xai rolled_back")]);
    client
        .batch_execute(
            "BEGIN; SELECT insert_user_api_key(NULL, 'anthropic', 'k'); SAVEPOINT s; SELECT insert_user_api_key(NULL, 'gateway', 'k');
             ROLLBACK TO s; SAVEPOINT t; SELECT insert_user_api_key(NULL, 'openrouter', 'k'); RELEASE t; COMMIT",
        )
        .expect("half of it");
    wait_for(&mut owner, "team/gateway", &[&by_bob("change team/gateway rolled_back")]);
    wait_for(&mut owner, "team/anthropic", &[&by_bob("change team/anthropic allowed")]);
    wait_for(&mut owner, "team/openrouter", &[&by_bob("change team/openrouter allowed")]);

    claim(&mut client, "authenticated", ALICE);
    for call in [
        "get_user_api_key($1::text::uuid, $2)",
        "delete_user_api_key($1::text::uuid, $2)",
        "insert_user_api_key($1::text::uuid, $2, 'k')",
    ] {
        client.query_one(&format!("SELECT {call}"), &[&BOB, &MARKER]).expect_err("not the service role");
    }
    let refused = |kind: &str| format!("{kind} {BOB}/? refused 1 authenticated {ALICE}");
    let expected = [refused("get"), refused("change"), refused("change")];
    wait_for(&mut owner, &format!("{BOB}/?"), &expected.each_ref().map(String::as_str));

    let id = add_server(&mut client, "s", json!({"url": "https://host/mcp", "headers": {"X": MARKER}}));
    let object = format!("server {id}");
    client.query_one("SELECT update_server($1, p_config => '{\"url\": \"https://host/\"}')", &[&id]).expect("update");
    client.query_one("SELECT update_server($1, p_name => 'another')", &[&id]).expect("no secret");
    client.query_one("SELECT delete_server($1)", &[&id]).expect("delete");
    client.query_one("SELECT delete_server($1)", &[&id]).expect("again");
    let expected = [(); 3].map(|()| format!("change {object} allowed 1 authenticated {ALICE}"));
    wait_for(&mut owner, &object, &expected.each_ref().map(String::as_str));
    client
        .batch_execute(&format!("SELECT add_server('s', 's', '{{\"url\": \"https://host/\"}}', '{BOB}')"))
        .expect_err("another's");
    wait_for(&mut owner, "server", &[&format!("change server refused 1 authenticated {ALICE}")]);

    let (primary, older) = ("ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100", crate::vault::KEY);
    claim(&mut client, "service_role", BOB);
    client.batch_execute("SELECT * FROM rotate_vault_key()").expect_err("one key");
    wait_until("the failure", || {
        entries(&mut owner, "kind = 'rotate'") == [format!("rotate - failed 1 service_role {BOB}")]
    });
    cluster.write_key_file(&format!("{primary}\n{older}"));
    owner.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the new key", || value(&mut client, "SELECT count(*) = 2 FROM vault_keys WHERE source IS NOT NULL"));
    client
        .batch_execute("BEGIN; SELECT * FROM rotate_vault_key(); ROLLBACK; SELECT * FROM rotate_vault_key()")
        .expect("rotate");
    let to: String = value(&mut owner, "SELECT fingerprint FROM vault_keys WHERE is_primary");
    wait_for(
        &mut owner,
        &to,
        &[&by_bob(&format!("rotate {to} rolled_back")), &by_bob(&format!("rotate {to} allowed"))],
    );
    owner.batch_execute("SELECT adopt_vault_key()").expect("adopt");
    wait_until("the adoption", || {
        total(&mut owner, "kind = 'rotate' AND role = 'postgres' AND outcome = 'allowed'") == 1
    });

    // Never a value, wherever it was put.
    let all: String = value(&mut owner, "SELECT string_agg(l::text, ' ') FROM _nexus_hub.vault_audit_log l");
    assert!(!all.contains(MARKER), "{all}");
    assert!(database.dump().contains("COPY _nexus_hub.vault_audit_log"), "it goes with the dump");
}

#[test]
fn a_hundred_thousand_are_one_entry_and_of_many_objects_sixteen_are_named() {
    let database = shared().database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    client
        .batch_execute("SELECT count(decrypt_token(s.v, 'same')) FROM (SELECT encrypt_token('t', 'same') AS v OFFSET 0) AS s, generate_series(1, 100000)")
        .expect("open");
    wait_for(&mut owner, "same", &["decrypt same allowed 100000 postgres -"]);
    client
        .batch_execute("SELECT count(decrypt_token(encrypt_token('t', 'object ' || i), 'object ' || i)) FROM generate_series(1, 1000) AS i, generate_series(1, 2)")
        .expect("open");
    wait_until("all are counted", || total(&mut owner, "true") == 102_000);
    let merged = entries(&mut owner, "object IS NULL");
    assert_eq!(merged, ["decrypt - allowed 1968 postgres -"]);
    assert_eq!(
        value::<i64>(&mut owner, "SELECT count(*) FROM vault_audit WHERE object LIKE 'object %' AND count = 2"),
        16
    );
    // Cut, but not through a character.
    client
        .batch_execute("SELECT decrypt_token(encrypt_token('t', repeat('€', 100000)), repeat('€', 100000))")
        .expect("open");
    wait_for(&mut owner, &"€".repeat(33), &[&format!("decrypt {} allowed 1 postgres -", "€".repeat(33))]);
}

#[test]
fn parallel_workers_lose_nothing() {
    let database = shared().database();
    let mut client = database.connect();
    client
        .batch_execute(
            "CREATE TABLE sealed AS SELECT encrypt_token('t', 'p') AS value FROM generate_series(1, 20000);
             ANALYZE sealed; ALTER TABLE sealed SET (parallel_workers = 4); GRANT SELECT ON sealed TO service_role;
             SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
             SET max_parallel_workers_per_gather = 4",
        )
        .expect("a table");
    claim(&mut client, "service_role", ALICE);
    let plan = client.query("EXPLAIN SELECT count(decrypt_token(value, 'p')) FROM sealed", &[]).expect("plan");
    assert!(plan.iter().any(|row| row.get::<_, String>(0).contains("Parallel Seq Scan")), "{plan:?}");
    client.batch_execute("SELECT count(decrypt_token(value, 'p')) FROM sealed").expect("open");
    let mut owner = database.connect();
    wait_until("all are counted", || total(&mut owner, "object = 'p'") == 20_000);
    let by_others = format!("object = 'p' AND (role, sub) IS DISTINCT FROM ('service_role', '{ALICE}'::uuid)");
    assert_eq!(entries(&mut owner, &by_others), Vec::<String>::new());
}

#[test]
fn prepared_transactions_are_seen() {
    let cluster = Cluster::start(&["max_prepared_transactions = 5"]);
    let database = cluster.database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    client
        .batch_execute(
            "BEGIN; SELECT insert_user_api_key(NULL, 'xai', 'k'); SELECT decrypt_token(encrypt_token('t', 'x'), 'x');
             PREPARE TRANSACTION 'p'",
        )
        .expect("prepare");
    client.batch_execute("ROLLBACK PREPARED 'p'").expect("rollback");
    wait_for(&mut owner, "team/xai", &["change team/xai prepared 1 postgres -"]);
    wait_for(&mut owner, "x", &["decrypt x allowed 1 postgres -"]);
}

#[test]
fn entries_without_room_are_counted_as_lost_and_harm_no_other_database() {
    let cluster = Cluster::start(&[]);
    let (database, other) = (cluster.database(), cluster.database());
    let (mut client, mut owner, mut neighbour) = (database.connect(), database.connect(), other.connect());
    // The worker cannot write.
    let mut lock = owner.transaction().expect("BEGIN");
    lock.batch_execute("LOCK TABLE _nexus_hub.vault_audit_log").expect("LOCK");
    for _ in 0..300 {
        client
            .batch_execute(
                "SELECT count(decrypt_token(encrypt_token('t', 'o' || i), 'o' || i)) FROM generate_series(1, 16) AS i",
            )
            .expect("nobody waits");
    }
    neighbour.batch_execute("SELECT decrypt_token(encrypt_token('t', 'neighbour'), 'neighbour')").expect("open");
    wait_for(&mut neighbour, "neighbour", &["decrypt neighbour allowed 1 postgres -"]);
    wait_until("the log tells", || cluster.log().contains("the vault's audit was not written"));
    lock.commit().expect("COMMIT");
    wait_until("all are written or counted", || total(&mut owner, "true") == 4800);
    assert_eq!(total(&mut owner, "kind = 'lost'"), 4800 - 2048);
    assert_eq!(total(&mut neighbour, "true"), 1);
    // There is room again.
    client.batch_execute("SELECT decrypt_token(encrypt_token('t', 'later'), 'later')").expect("open");
    wait_for(&mut owner, "later", &["decrypt later allowed 1 postgres -"]);
    assert_eq!(cluster.log().matches("the vault's audit was not written").count(), 1, "{}", cluster.log());
}

#[test]
fn what_is_switched_off_is_not_written_and_only_superusers_switch() {
    let database = shared().database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    let open = |context: &str| format!("SELECT decrypt_token(encrypt_token('t', '{context}'), '{context}')");
    client
        .batch_execute(&format!("SET nexus_hub.audit = off; {}; SET nexus_hub.audit = on; {}", open("off"), open("on")))
        .expect("open");
    wait_for(&mut owner, "on", &["decrypt on allowed 1 postgres -"]);
    assert_eq!(total(&mut owner, "true"), 1);
    for role in ["service_role", "authenticated"] {
        client.batch_execute(&format!("RESET ROLE; SET ROLE {role}")).expect("SET ROLE");
        assert_eq!(error_of(&mut client, "SET nexus_hub.audit = off").0, "42501", "{role}");
    }
}

#[test]
fn old_entries_are_pruned_in_batches_and_by_the_owner() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "INSERT INTO _nexus_hub.vault_audit_log (at, kind, outcome, count)
             SELECT now() - d * interval '1 day', 'get', 'allowed', 1 FROM unnest('{89, 91}'::int[]) AS d, generate_series(1, 2500)",
        )
        .expect("INSERT");
    wait_until("the old ones are gone", || total(&mut client, "true") == 2500);
    assert_eq!(value::<i32>(&mut client, "SELECT cleanup_vault_audit()"), 0);
    assert_eq!(value::<i32>(&mut client, "SELECT cleanup_vault_audit(88)"), 2500);
    client.batch_execute("INSERT INTO _nexus_hub.vault_audit_log (at, kind, outcome, count) VALUES (now() - interval '2 minutes', 'get', 'allowed', 7)").expect("INSERT");
    cluster.configure(&["nexus_hub.poll_interval = 100", "nexus_hub.audit_retention = '1min'"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the setting is obeyed", || total(&mut client, "true") == 0);
    // A job that goes shows that the worker has read it.
    client.batch_execute("INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at) VALUES ('tool_invoke', 's', 't', 'completed', now() - interval '2 days', now() - interval '2 days')").expect("INSERT");
    cluster.configure(&[
        "nexus_hub.poll_interval = 100",
        "nexus_hub.audit_retention = 0",
        "nexus_hub.completed_retention = '1d'",
    ]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("it is read", || value(&mut client, "SELECT count(*) = 0 FROM job_results"));
    client.batch_execute("INSERT INTO _nexus_hub.vault_audit_log (at, kind, outcome, count) VALUES ('-infinity', 'get', 'allowed', 7)").expect("INSERT");
    client.batch_execute("SELECT decrypt_token(encrypt_token('t', 'x'), 'x')").expect("open");
    wait_for(&mut client, "x", &["decrypt x allowed 1 postgres -"]);
    assert_eq!(total(&mut client, "at = '-infinity'"), 7, "0 is for ever");
}

#[test]
fn an_orderly_restart_keeps_entries_and_a_kill_leaves_the_audit_at_work() {
    let cluster = Cluster::start(&[]);
    let (database, other) = (cluster.database(), cluster.database());
    let mut client = database.connect();
    let open = |context: &str| format!("SELECT decrypt_token(encrypt_token('t', '{context}'), '{context}')");
    // One that is still starting when it is told to end writes nothing.
    client.batch_execute(&open("first")).expect("open");
    wait_for(&mut client, "first", &["decrypt first allowed 1 postgres -"]);
    client.batch_execute(&open("before")).expect("open");
    drop(client);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect(&database.name);
    wait_for(&mut client, "before", &["decrypt before allowed 1 postgres -"]);

    // In the middle of many.
    let mut victim = database.connect();
    let pid: i32 = value(&mut victim, "SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        let busy = scope.spawn(move || {
            while victim
                .batch_execute(
                    "SELECT decrypt_token(encrypt_token('t', 'o' || i), 'o' || i) FROM generate_series(1, 16) AS i",
                )
                .is_ok()
            {}
        });
        wait_until("it is at it", || total(&mut client, "object = 'o1'") > 0);
        cluster.signal("KILL", pid);
        busy.join().expect("no panic");
    });
    wait_until("the server has restarted", || cluster.log().contains("reinitializing"));
    let mut client = cluster.reconnect(&database.name);
    client.batch_execute(&open("after")).expect("open");
    wait_for(&mut client, "after", &["decrypt after allowed 1 postgres -"]);
    let mut client = cluster.reconnect(&other.name);
    assert_eq!(total(&mut client, "true"), 0, "each database has its own");
}

#[test]
fn drop_extension_with_entries_waiting_is_clean_and_the_next_one_begins_anew() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let mut worker = database.wait_for_worker();
    for _ in 0..5 {
        client
            .batch_execute(
                "BEGIN; SELECT decrypt_token(encrypt_token('t', 'old'), 'old'); DROP EXTENSION nexus_hub; COMMIT;
                 CREATE EXTENSION nexus_hub",
            )
            .expect("anew");
        // The one before forgets all that is noted when it finds the extension gone.
        let before = worker;
        wait_until("another worker", || {
            worker = database.wait_for_worker();
            worker != before
        });
        client.batch_execute("SELECT decrypt_token(encrypt_token('t', 'new'), 'new')").expect("open");
        wait_for(&mut client, "new", &["decrypt new allowed 1 postgres -"]);
    }
    client
        .batch_execute(
            "BEGIN; SELECT decrypt_token(encrypt_token('t', 'old'), 'old'); DROP EXTENSION nexus_hub; COMMIT",
        )
        .expect("DROP");
    wait_until("no worker", || database.worker().is_none());
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    client.batch_execute("SELECT decrypt_token(encrypt_token('t', 'new'), 'new')").expect("open");
    wait_for(&mut client, "new", &["decrypt new allowed 1 postgres -"]);
    assert_eq!(total(&mut client, "true"), 1, "what was of the one before is forgotten");
    let log = cluster.log();
    assert!(!log.contains("PANIC") && !log.contains("exited with exit code 1"), "{log}");
}

#[test]
fn a_standby_writes_nothing_and_says_nothing() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("CREATE TABLE sealed AS SELECT encrypt_token('t', 'standby') AS value").expect("a value");
    let standby = Cluster::standby_of(&cluster);
    let mut reader = standby.connect(&database.name);
    wait_until("the value", || value(&mut reader, "SELECT to_regclass('sealed') IS NOT NULL"));
    let many = "SELECT count(decrypt_token(value, 'standby')) FROM sealed";
    (0..3000).for_each(|_| reader.batch_execute(many).expect("open"));
    standby.pg_ctl(&["promote"]);
    wait_until("it is promoted", || value(&mut reader, "SELECT NOT pg_is_in_recovery()"));
    reader.batch_execute("SELECT decrypt_token(encrypt_token('t', 'promoted'), 'promoted')").expect("open");
    wait_for(&mut reader, "promoted", &["decrypt promoted allowed 1 postgres -"]);
    assert_eq!(total(&mut reader, "object = 'standby' OR kind = 'lost'"), 0);
    assert!(!standby.log().contains("audit"), "{}", standby.log());
}

#[test]
fn without_preloading_nothing_is_noted_and_all_works() {
    let cluster = Cluster::create(&[]);
    cluster.write_file("data/test.conf", &cluster.read_file("data/test.conf").replace("'nexus_hub'", "''"), "0600");
    cluster.start_up();
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "SELECT decrypt_token(encrypt_token('t', 'x'), 'x'); SELECT insert_user_api_key(NULL, 'xai', 'k')",
        )
        .expect("open");
    assert_eq!(total(&mut client, "true"), 0);
    assert!(value::<bool>(&mut client, "SELECT bool_and(encrypted_count IS NULL AND NOT is_worn) FROM vault_keys"));
}

#[test]
fn changes_of_named_secrets_and_rotations_in_the_background_are_seen() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let (mut client, mut owner) = (database.connect(), database.connect());
    use_keys(&cluster, &mut owner, &[NEW_KEY, KEY]);
    claim(&mut client, "authenticated", ALICE);
    for statement in ["SELECT create_secret('s', $1)", "SELECT update_secret('s', $1 || 'x')"] {
        client.query_one(statement, &[&MARKER]).expect(statement);
    }
    client.batch_execute("SELECT delete_secret('s'), delete_secret('another')").expect("delete_secret");
    let object = format!("secret:{ALICE}:s");
    let entry = format!("change {object} allowed 1 authenticated {ALICE}");
    wait_for(&mut owner, &object, &[&entry, &entry, &entry]);

    claim(&mut client, "service_role", ALICE);
    client.batch_execute("BEGIN; SELECT create_secret('s', 'taken back'); ROLLBACK").expect("create");
    wait_for(&mut owner, "secret:shared:s", &[&format!("change secret:shared:s rolled_back 1 service_role {ALICE}")]);
    let key: String = client.query_one("SELECT start_vault_rotation()", &[]).expect("start").get(0);
    wait_for(&mut owner, &key, &[&format!("rotate {key} allowed 1 service_role {ALICE}")]);
    assert_eq!(total(&mut owner, &format!("object LIKE '%{MARKER}%'")), 0);
}
