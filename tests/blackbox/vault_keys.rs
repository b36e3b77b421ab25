//! Where the vault's keys come from: each source, its bad forms and its reload, and that SQL can't see a key.

use crate::support::*;
use crate::vault::{KEY, webcrypto};
use postgres::Client;
use std::time::{Duration, Instant};

const OTHER_KEY: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
const COMMAND: &str = "nexus_hub.vault_key_command = 'echo ran >>../runs; cat ../command.key'";
const NO_FILE: &str = "nexus_hub.vault_key_file = ''";

fn reload(client: &mut Client) {
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
}

/// Whether the session encrypts under a key.
fn encrypts_under(client: &mut Client, key: &str) -> bool {
    let sealed: Result<_, _> = client.query_one("SELECT encode(encrypt_token('text'), 'hex')", &[]);
    sealed.is_ok_and(|row| webcrypto(&["open-or-not", key, row.get(0), ""]) == "text")
}

/// The DETAIL of the error that the vault gives without a usable key, once it holds the text.
fn wait_for_detail(client: &mut Client, part: &str) {
    let mut last = String::new();
    let begin = Instant::now();
    loop {
        if let Err(error) = client.batch_execute("SELECT encrypt_token('x')") {
            let error = error.as_db_error().expect("an SQL error");
            assert_eq!(error.code().code(), "F0000", "{error:?}");
            assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error:?}");
            last = format!("{error:?}");
            if error.detail().unwrap_or_default().contains(part) {
                return;
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(300), "waited for {part:?}, and have {last}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn runs(cluster: &Cluster) -> usize {
    cluster.read_file("runs").lines().count()
}

#[test]
fn the_command_goes_before_the_file_and_runs_once_a_load_for_all_sessions() {
    let cluster = Cluster::create(&[COMMAND]);
    cluster.write_file("command.key", &format!("# of the command\n{OTHER_KEY}\n{KEY}\n"), "0600");
    cluster.start_up();
    let database = cluster.database();
    let mut clients: Vec<_> = (0..16).map(|_| database.connect()).collect();
    std::thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(move || assert!(encrypts_under(client, OTHER_KEY)));
        }
    });
    assert_eq!(runs(&cluster), 1, "sessions and workers share what the command has printed");
    let sealed = webcrypto(&["seal", KEY, "older", ""]);
    let opened: String =
        clients[0].query_one("SELECT decrypt_token(decode($1, 'hex'))", &[&sealed]).expect("open").get(0);
    assert_eq!(opened, "older", "each of its keys decrypts");

    let newest = KEY.replace('0', "5");
    cluster.write_file("command.key", &format!("{newest}\n{OTHER_KEY}\n"), "0600");
    reload(&mut clients[0]);
    for client in &mut clients {
        wait_until("the new key encrypts", || encrypts_under(client, &newest));
    }
    assert_eq!(runs(&cluster), 2, "the reload had it run once more");
}

#[test]
fn a_session_in_the_middle_of_a_statement_does_not_give_the_old_commands_keys_to_others() {
    let cluster = Cluster::create(&["nexus_hub.vault_key_command = 'cat ../old.key'"]);
    cluster.write_file("old.key", KEY, "0600");
    cluster.write_file("new.key", &format!("{OTHER_KEY}\n{KEY}"), "0600");
    cluster.start_up();
    let database = cluster.database();
    let (mut long, mut client) = (database.connect(), database.connect());
    assert!(encrypts_under(&mut client, KEY));
    std::thread::scope(|scope| {
        client.batch_execute("SELECT pg_advisory_lock(1)").expect("a lock");
        let statement = scope.spawn(move || {
            long.batch_execute("DO $$ BEGIN PERFORM encrypt_token('a'); PERFORM pg_advisory_xact_lock(1); PERFORM encrypt_token('b'); END $$")
        });
        wait_until("it is in the middle", || {
            value(&mut client, "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)")
        });
        cluster.configure(&["nexus_hub.vault_key_command = 'cat ../new.key'"]);
        reload(&mut client);
        client.batch_execute("SELECT pg_advisory_unlock(1)").expect("unlock");
        statement.join().expect("no panic").expect("its statement goes on");
    });
    wait_until("the others have the new command's", || encrypts_under(&mut client, OTHER_KEY));
}

#[test]
fn a_command_that_fails_is_told_by_its_reason_and_leaves_no_process() {
    let cluster = Cluster::start(&[NO_FILE]);
    let database = cluster.database();
    let mut client = database.connect();
    // The commands print a file: what a command says is in the log when it is changed.
    let odd = &KEY[1..];
    let second = format!("{KEY}\n{OTHER_KEY}0");
    let many = [KEY; 33].join("\n");
    for (command, printed, reason) in [
        ("exit 3", "", "it ended with exit status: 3"),
        ("kill -9 $$", "", "it ended with signal: 9 (SIGKILL)"),
        ("/nowhere/at/all", "", "it ended with exit status: 127"),
        ("cat ../printed; exit 1", KEY, "it ended with exit status: 1"),
        ("true", "", "of what it printed, it holds no key"),
        ("cat ../printed", odd, "of what it printed, line 1 is not 64 hex characters"),
        ("cat  ../printed", &second, "of what it printed, line 2 is not 64 hex characters"),
        ("cat   ../printed", &many, "of what it printed, it holds more than 32 keys"),
        ("printf \"\\\\377\"", "", "what it printed is not text"),
        ("yes", "", "it wrote more than 65536 bytes, and was stopped"),
        // Also one that has closed its output.
        ("exec >&-; sleep 3141.5", "", "it was still running after 10 s, and was stopped"),
    ] {
        cluster.write_file("printed", printed, "0600");
        cluster.configure(&[NO_FILE, &format!("nexus_hub.vault_key_command = '{command}'")]);
        let begin = Instant::now();
        reload(&mut client);
        // Whichever process was first has the reason; it is in the log, too.
        wait_until(command, || {
            let _ = client.batch_execute("SELECT encrypt_token('x')");
            cluster.log().contains(&format!("The command of nexus_hub.vault_key_command: {reason}"))
        });
        assert!(begin.elapsed() < Duration::from_secs(40), "{command}");
        let (code, message) = error_of(&mut client, "SELECT encrypt_token('x')");
        assert_eq!((code.as_str(), message.as_str()), ("F0000", "the vault key command failed"), "{command}");
    }
    wait_until("the command that hung is ended with all it had started", || !is_running("sleep 3141.5"));
    let log = cluster.log();
    assert!(!log.contains(odd) && !log.contains(KEY), "no output is quoted");

    cluster.write_file("command.key", KEY, "0600");
    cluster.configure(&[NO_FILE, COMMAND]);
    reload(&mut client);
    wait_until("a command that works is used", || encrypts_under(&mut client, KEY));
}

pub fn is_running(command_line: &str) -> bool {
    std::process::Command::new("pgrep").args(["-f", "-x", command_line]).output().expect("pgrep").status.success()
}

/// A session in whose transaction the extension is being made: no worker knows of it, and runs the command first.
fn unseen(cluster: &Cluster) -> (Client, i32) {
    let mut client = cluster.connect("postgres");
    client.batch_execute("BEGIN; CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    let pid = value(&mut client, "SELECT pg_backend_pid()");
    (client, pid)
}

#[test]
fn a_session_that_is_cancelled_or_ended_while_its_command_runs_holds_up_nobody() {
    let sleep = "sleep 2718.2";
    let command = format!("nexus_hub.vault_key_command = 'test -e ../go || {sleep}; cat ../command.key'");
    let cluster = Cluster::start(&[&command]);
    let (mut client, _) = unseen(&cluster);
    client.batch_execute("SET LOCAL statement_timeout = '300ms'").expect("SET");
    let (code, _) = error_of(&mut client, "SELECT encrypt_token('x')");
    assert_eq!(code, "57014", "cancelled, as any statement");
    wait_until("and the command with it", || !is_running(sleep));
    drop(client);

    let (mut client, pid) = unseen(&cluster);
    std::thread::scope(|scope| {
        scope.spawn(move || client.batch_execute("SELECT encrypt_token('x')").expect_err("it is ended"));
        wait_until("the command runs", || is_running(sleep));
        let ended: bool = value(&mut cluster.connect("postgres"), &format!("SELECT pg_terminate_backend({pid})"));
        assert!(ended);
    });
    wait_until("the command is ended, too", || !is_running(sleep));
    let (mut client, _) = unseen(&cluster);
    // A command whose time is over is known to have failed, whatever its session was told.
    let problem: Option<String> = value(&mut client, "SELECT _nexus_hub.vault_problem()");
    assert_eq!(problem, None, "nobody waited for the command's own time to be over");
    assert!(!cluster.log().contains("it was still running after 10 s"), "{}", cluster.log());

    cluster.write_file("command.key", KEY, "0600");
    cluster.write_file("go", "", "0600");
    assert!(encrypts_under(&mut client, KEY), "the next session runs it, without a reload");
}

#[test]
fn without_preloading_each_session_runs_the_command_itself() {
    let cluster = Cluster::create(&[COMMAND, "shared_preload_libraries = ''"]);
    cluster.write_file("command.key", KEY, "0600");
    cluster.start_up();
    let mut client = cluster.connect("postgres");
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    assert!(encrypts_under(&mut client, KEY) && encrypts_under(&mut client, KEY));
    let once = runs(&cluster);
    assert!(encrypts_under(&mut cluster.connect("postgres"), KEY));
    assert_eq!(runs(&cluster), once + 1);
    cluster.write_file("command.key", &format!("{OTHER_KEY}\n{KEY}"), "0600");
    reload(&mut client);
    wait_until("the reload is noticed", || encrypts_under(&mut client, OTHER_KEY));
}

#[test]
fn each_bad_form_of_a_key_file_is_told_and_the_next_good_one_is_used() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let long = format!("{KEY}0");
    let many = [KEY; 33].join("\n");
    let large = "#".repeat(70_000);
    for (text, mode, reason) in [
        (KEY, "0640", "group or others may access it (mode 0640)"),
        (&KEY[1..], "0600", "line 1 is not 64 hex characters"),
        (&long, "0600", "line 1 is not 64 hex characters"),
        (&KEY.replace('0', "g"), "0600", "line 1 is not 64 hex characters"),
        ("# nothing\n\n", "0600", "it holds no key"),
        (&many, "0600", "it holds more than 32 keys"),
        (&large, "0600", "it is larger than 65536 bytes"),
    ] {
        cluster.write_file("vault.key", text, mode);
        reload(&mut client);
        wait_for_detail(&mut client, reason);
    }
    for (file, reason) in [
        ("'/nowhere/vault.key'", "it does not exist"),
        ("'/'", "it is not an ordinary file"),
        ("'/dev/zero'", "it is not an ordinary file"),
    ] {
        cluster.configure(&[&format!("nexus_hub.vault_key_file = {file}")]);
        reload(&mut client);
        wait_for_detail(&mut client, reason);
    }
    cluster.configure(&[]);
    cluster.write_key_file(&format!("{OTHER_KEY}\n{KEY}"));
    reload(&mut client);
    wait_until("the good file is used", || encrypts_under(&mut client, OTHER_KEY));
}

#[test]
fn the_environments_key_in_a_bad_form_is_told_by_the_variables_name() {
    let cluster = Cluster::create(&[NO_FILE]);
    cluster.start_with_environment("VAULT_ENCRYPTION_KEY", &KEY[1..]);
    let database = cluster.database();
    wait_for_detail(
        &mut database.connect(),
        "environment variable VAULT_ENCRYPTION_KEY, line 1 is not 64 hex characters",
    );
    assert!(!cluster.log().contains(&KEY[1..]));
}

#[test]
fn the_seeds_setting_is_used_last_and_is_shown_to_nobody() {
    let cluster = Cluster::start(&[NO_FILE]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute(&format!("SET app.vault_key = '{KEY}'")).expect("SET");
    assert!(encrypts_under(&mut client, KEY));
    client.batch_execute(&format!("SET app.vault_key = '{OTHER_KEY}'; SELECT adopt_vault_key()")).expect("SET");
    assert!(encrypts_under(&mut client, OTHER_KEY), "a SET counts at once");
    for query in ["SHOW app.vault_key", "SELECT current_setting('app.vault_key')"] {
        assert_eq!(value::<String>(&mut client, query), "********", "{query}");
    }
    let shown: i64 = value(&mut client, "SELECT count(*) FROM pg_settings s WHERE s::text ~* 'ffeeddcc'");
    assert_eq!(shown, 0);
    client.batch_execute("SET app.vault_key = 'c0ffee'").expect("SET");
    wait_for_detail(&mut client, "In app.vault_key, line 1 is not 64 hex characters");
    client.batch_execute("RESET app.vault_key").expect("RESET");
    assert_eq!(value::<String>(&mut client, "SHOW app.vault_key"), "");
    let (_, message) = error_of(&mut client, "SELECT encrypt_token('x')");
    assert_eq!(message, "no vault key is configured");

    client.batch_execute("SET ROLE authenticated").expect("SET ROLE");
    for setting in ["app.vault_key", "app.vault_old_key", "app.vault_new_key"] {
        let (code, _) = error_of(&mut client, &format!("SET {setting} = '{KEY}'"));
        assert_eq!(code, "42501", "only a superuser sets {setting}");
    }
}

#[test]
fn a_key_in_a_configuration_file_is_refused_and_not_logged() {
    let cluster = Cluster::start(&[NO_FILE]);
    let database = cluster.database();
    let mut client = database.connect();
    cluster.configure(&[NO_FILE, &format!("app.vault_key = '{KEY}'")]);
    reload(&mut client);
    wait_until("it is refused", || cluster.log().contains("a vault key in a configuration file is not used"));
    let (_, message) = error_of(&mut database.connect(), "SELECT encrypt_token('x')");
    assert_eq!(message, "no vault key is configured");
    assert!(!cluster.log().contains(KEY));
    // At the start, too.
    cluster.pg_ctl(&["-m", "fast", "restart"]);
    let (_, message) = error_of(&mut cluster.reconnect(&database.name), "SELECT encrypt_token('x')");
    assert_eq!(message, "no vault key is configured");
    assert!(!cluster.log().contains(KEY));
}

#[test]
fn the_workers_log_tells_at_the_start_and_at_a_reload_that_the_keys_cannot_be_used() {
    let cluster = Cluster::start(&["nexus_hub.vault_key_command = 'exit 7'"]);
    let database = cluster.database();
    database.wait_for_worker();
    wait_until("the log tells at the start", || cluster.log().contains("exit status: 7"));
    cluster.configure(&["nexus_hub.vault_key_command = 'exit 8'"]);
    reload(&mut database.connect());
    wait_until("the log tells after the reload", || cluster.log().contains("exit status: 8"));
}

#[test]
fn no_sql_shows_a_key_of_any_source() {
    let cluster = Cluster::create(&[COMMAND]);
    cluster.write_file("command.key", OTHER_KEY, "0600");
    cluster.start_up();
    let database = cluster.database();
    let mut client = database.connect();
    assert!(encrypts_under(&mut client, OTHER_KEY));
    for (relation, marker) in [
        ("pg_settings", "ffeeddcc"),
        ("pg_file_settings", "ffeeddcc"),
        ("pg_settings", "00112233"),
        ("pg_file_settings", "00112233"),
    ] {
        let query = format!("SELECT count(*) FROM {relation} r WHERE r::text ~* '{marker}'");
        assert_eq!(value::<i64>(&mut client, &query), 0, "{query}");
    }
    client.batch_execute("SET ROLE service_role").expect("SET ROLE");
    for setting in ["nexus_hub.vault_key_command", "nexus_hub.vault_key_file", "app.vault_key"] {
        let (code, _) = error_of(&mut client, &format!("SHOW {setting}"));
        assert_eq!(code, "42501", "{setting}");
    }
}

/// What the view vault_keys shows: place, source and number of values of each key, without the fingerprints.
fn shown(client: &mut Client) -> Vec<(bool, String, bool, i64)> {
    client
        .query("SELECT is_primary, coalesce(source, ''), first_seen IS NOT NULL, value_count FROM vault_keys", &[])
        .expect("vault_keys")
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3)))
        .collect()
}

#[test]
fn a_key_that_the_database_does_not_know_encrypts_nothing_until_it_is_adopted() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let sealed: Vec<u8> = value(&mut client, "SELECT encrypt_token('first')");
    let first: String = value(&mut client, "SELECT fingerprint FROM vault_keys");

    cluster.write_key_file(OTHER_KEY);
    reload(&mut client);
    wait_for_detail(&mut client, &format!("the database's values are under {first}"));
    wait_until("the log says so at once", || {
        cluster.log().contains(&format!("is not one that this database knows, whose values are under {first}"))
    });
    let (code, message) =
        error_of(&mut client, "SELECT add_server('s', 's', '{\"url\": \"http://127.0.0.1/\"}', gen_random_uuid())");
    assert_eq!((code.as_str(), message.as_str()), ("F0000", "the vault key is not one that this database knows"));
    // A new server with the wrong key: at the start, too.
    cluster.pg_ctl(&["-m", "fast", "restart"]);
    let mut client = cluster.reconnect(&database.name);
    let (code, _) = error_of(&mut client, "SELECT encrypt_token('x')");
    assert_eq!(code, "F0000");
    client.batch_execute("SET ROLE service_role").expect("SET ROLE");
    let (code, _) = error_of(&mut client, "SELECT adopt_vault_key()");
    assert_eq!(code, "42501", "the owner alone decides that");
    client.batch_execute("RESET ROLE").expect("RESET ROLE");

    // The right key below it makes it the next one.
    cluster.write_key_file(&format!("{OTHER_KEY}\n{KEY}"));
    reload(&mut client);
    wait_until("the new key encrypts", || encrypts_under(&mut client, OTHER_KEY));
    let opened: String = client.query_one("SELECT decrypt_token($1)", &[&sealed]).expect("open").get(0);
    assert_eq!(opened, "first");

    // A third one alone, on purpose.
    let third = KEY.replace('0', "3");
    cluster.write_key_file(&third);
    reload(&mut client);
    wait_for_detail(&mut client, "the database's values are under");
    client.batch_execute("BEGIN; SELECT adopt_vault_key(), encrypt_token('x'); ROLLBACK").expect("a transaction");
    let (code, _) = error_of(&mut client, "SELECT encrypt_token('x')");
    assert_eq!(code, "F0000", "what was rolled back counts for nothing");
    let adopted: String = value(&mut client, "SELECT adopt_vault_key()");
    assert!(encrypts_under(&mut client, &third));
    let (primary, keys): (String, i64) = {
        let row = client
            .query_one("SELECT max(fingerprint) FILTER (WHERE is_primary), count(*) FROM vault_keys", &[])
            .expect("keys");
        (row.get(0), row.get(1))
    };
    assert_eq!((primary, keys), (adopted, 3));
}

#[test]
fn a_first_use_that_is_rolled_back_leaves_no_key_behind() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("BEGIN; SELECT encrypt_token('x'); ROLLBACK").expect("a transaction");
    assert_eq!(shown(&mut client), [(true, "nexus_hub.vault_key_file".to_owned(), false, 0)]);
    // Read-only transactions and parallel workers encrypt, and leave the noting to others.
    client.batch_execute("BEGIN READ ONLY; SELECT encrypt_token('x'); COMMIT").expect("read only");
    assert_eq!(shown(&mut client), [(true, "nexus_hub.vault_key_file".to_owned(), false, 0)]);
    // What encrypts after a savepoint was rolled back has the key noted anew.
    client
        .batch_execute(
            "BEGIN; SAVEPOINT s; SELECT encrypt_token('x'); ROLLBACK TO s; SELECT encrypt_token('x'), encrypt_token('y'); COMMIT",
        )
        .expect("a savepoint");
    assert_eq!(shown(&mut client), [(true, "nexus_hub.vault_key_file".to_owned(), true, 0)]);
    assert!(encrypts_under(&mut client, KEY));
}

#[test]
fn the_view_shows_which_keys_are_in_use_and_which_are_missing() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    for server in ["a", "b"] {
        add_server(&mut client, server, serde_json::json!({"url": "http://127.0.0.1/"}));
    }
    let file = || "nexus_hub.vault_key_file".to_owned();
    assert_eq!(shown(&mut client), [(true, file(), true, 2)]);
    cluster.write_key_file(&format!("{OTHER_KEY}\n{KEY}"));
    reload(&mut client);
    wait_until("the ring has two keys", || shown(&mut client) == [(true, file(), false, 0), (false, file(), true, 2)]);
    add_server(&mut client, "c", serde_json::json!({"url": "http://127.0.0.1/"}));
    assert_eq!(shown(&mut client), [(true, file(), true, 1), (false, file(), true, 2)]);
    client.batch_execute("SELECT rotate_vault_key()").expect("rotate_vault_key");
    assert_eq!(shown(&mut client), [(true, file(), true, 3), (false, file(), true, 0)], "the older key can go");
    cluster.write_key_file(KEY);
    reload(&mut client);
    wait_until("a key is missing", || {
        shown(&mut client)
            == [(true, file(), true, 0), (false, String::new(), true, 0), (false, String::new(), false, 3)]
    });
    let unopened: i64 = value(&mut client, "SELECT value_count FROM vault_keys WHERE fingerprint IS NULL");
    assert_eq!(unopened, 3);
    client
        .batch_execute("SET ROLE service_role; SELECT * FROM vault_keys; SET ROLE authenticated")
        .expect("service_role");
    assert_eq!(error_of(&mut client, "SELECT * FROM vault_keys").0, "42501");
}

#[test]
fn a_restored_dump_knows_its_key() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    add_server(&mut client, "s", serde_json::json!({"url": "http://127.0.0.1/"}));
    let elsewhere = Cluster::start(&[]);
    elsewhere.write_key_file(OTHER_KEY);
    elsewhere.connect("postgres").batch_execute("SELECT pg_reload_conf()").expect("reload");
    let copy = elsewhere.empty_database();
    database.copy_to(&copy);
    let mut client = copy.connect();
    wait_for_detail(&mut client, "the database's values are under");
    elsewhere.write_key_file(KEY);
    reload(&mut client);
    wait_until("with its key it is as before", || encrypts_under(&mut client, KEY));
    assert_eq!(shown(&mut client), [(true, "nexus_hub.vault_key_file".to_owned(), true, 1)]);
}

/// The values that the view has under the key that encrypts.
fn encrypted_count(client: &mut Client) -> i64 {
    value(client, "SELECT coalesce(max(encrypted_count), 0) FROM vault_keys WHERE is_primary")
}

#[test]
fn values_are_counted_under_the_key_they_are_encrypted_with() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100", "max_prepared_transactions = 5"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(
            "SELECT count(encrypt_token('t')) FROM generate_series(1, 1000);
             BEGIN; SELECT count(encrypt_config('{}')) FROM generate_series(1, 100); ROLLBACK;
             BEGIN READ ONLY; SELECT encrypt_token('t'); COMMIT;
             BEGIN; SELECT encrypt_token('t'); PREPARE TRANSACTION 'p';
             SELECT insert_user_api_key(NULL, 'xai', 'k');
             SELECT add_server('s', 's', '{\"url\": \"https://host/\"}', gen_random_uuid())",
        )
        .expect("encrypt");
    client.batch_execute("ROLLBACK PREPARED 'p'").expect("rollback");
    wait_until("all are counted", || encrypted_count(&mut client) == 1104);
    assert!(!value::<bool>(&mut client, "SELECT bool_or(is_worn) FROM vault_keys"));
    // Several rows of one key, as two transactions may make them: the oldest counts.
    client
        .batch_execute("INSERT INTO _nexus_hub.known_vault_keys (fingerprint) SELECT fingerprint FROM _nexus_hub.known_vault_keys; SELECT encrypt_token('t')")
        .expect("another row");
    wait_until("it is counted", || encrypted_count(&mut client) == 1105);
    assert_eq!(value::<i64>(&mut client, "SELECT count(encrypted_count) FROM _nexus_hub.known_vault_keys"), 1);

    // Right before the end of the server, which does not wait for a poll.
    cluster.configure(&["nexus_hub.poll_interval = '1h'", "max_prepared_transactions = 5"]);
    drop(client);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect(&database.name);
    // One that is still starting when it is told to end writes nothing.
    client.batch_execute("SELECT adopt_vault_key()").expect("adopt");
    wait_until("the worker is at work", || {
        value(&mut client, "SELECT EXISTS (SELECT FROM vault_audit WHERE kind = 'rotate')")
    });
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    drop(client);
    cluster.configure(&["nexus_hub.poll_interval = 100"]);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect(&database.name);
    assert_eq!(encrypted_count(&mut client), 1106, "the restart has kept it: {}", cluster.log());

    // A rotation is counted under the new key.
    cluster.write_key_file(&format!("{OTHER_KEY}\n{KEY}"));
    reload(&mut client);
    wait_until("the new key", || value(&mut client, "SELECT count(*) = 2 FROM vault_keys WHERE source IS NOT NULL"));
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    wait_until("it is counted", || encrypted_count(&mut client) > 0);
    let before = encrypted_count(&mut client);
    client.batch_execute("SELECT * FROM rotate_vault_key()").expect("rotate");
    wait_until("the rotation is counted", || encrypted_count(&mut client) == before + 2);
    let older: i64 =
        value(&mut client, "SELECT encrypted_count FROM vault_keys WHERE NOT is_primary AND source IS NOT NULL");
    assert_eq!(older, 1106);
}

#[test]
fn a_worn_key_is_told_of_once() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    wait_until("it is counted", || encrypted_count(&mut client) == 1);
    client.batch_execute("UPDATE _nexus_hub.known_vault_keys SET encrypted_count = 2147483646").expect("UPDATE");
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    wait_until("it is counted", || encrypted_count(&mut client) == 2_147_483_647);
    assert!(!value::<bool>(&mut client, "SELECT is_worn FROM vault_keys"));
    let told = |cluster: &Cluster| cluster.log().matches("has encrypted more than 2^31 values").count();
    assert_eq!(told(&cluster), 0);
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    wait_until("the log tells", || told(&cluster) == 1);
    assert!(value::<bool>(&mut client, "SELECT is_worn FROM vault_keys"));
    for more in 1..4 {
        client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
        wait_until("another poll", || encrypted_count(&mut client) == 2_147_483_648 + more);
    }
    assert_eq!(told(&cluster), 1, "once, and not at each poll");
}
