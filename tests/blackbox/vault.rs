//! The vault against the real WebCrypto, and its keys.

use crate::support::*;
use std::process::Command;

pub const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// Runs tests/npm/webcrypto.mjs, the seeds' vault code on Node's WebCrypto.
pub fn webcrypto(arguments: &[&str]) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/npm/webcrypto.mjs");
    let output = Command::new("node").arg(script).args(arguments).output().expect("node");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim_end_matches('\n').to_owned()
}

const TEXTS: [&str; 4] = ["", "sk-abc123", "grüße 🦀 \n\t\"quoted\"", "{\"url\":\"https://host/mcp\"}"];

#[test]
pub fn webcrypto_opens_what_sql_sealed() {
    let database = shared().database();
    let mut client = database.connect();
    for text in TEXTS {
        for context in [None, Some("user:1/openai")] {
            let sealed: String = client
                .query_one("SELECT encode(encrypt_token($1, $2), 'hex')", &[&text, &context])
                .expect("seal")
                .get(0);
            assert_eq!(webcrypto(&["open", KEY, &sealed, context.unwrap_or_default()]), text.replace('\n', "\\n"));
        }
    }
}

#[test]
fn sql_opens_what_webcrypto_sealed() {
    let database = shared().database();
    let mut client = database.connect();
    for text in TEXTS {
        for context in [None, Some("user:1/openai")] {
            let sealed = webcrypto(&["seal", KEY, text, context.unwrap_or_default()]);
            let opened: String = client
                .query_one("SELECT decrypt_token(decode($1, 'hex'), $2)", &[&sealed, &context])
                .expect("open")
                .get(0);
            assert_eq!(opened, text);
        }
    }
    let sealed = webcrypto(&["seal", KEY, "{\"a\":[1,2.50]}", ""]);
    let config: String =
        client.query_one("SELECT decrypt_config(decode($1, 'hex'))::text", &[&sealed]).expect("open").get(0);
    assert_eq!(config, "{\"a\": [1, 2.50]}");
}

#[test]
fn truncated_flipped_empty_and_foreign_ciphertexts_give_the_contracts_errors() {
    let database = shared().database();
    let mut client = database.connect();
    let foreign = webcrypto(&["seal", &KEY.replace('0', "9"), "text", ""]);
    let undecipherable = ("22000".to_owned(), "the value cannot be decrypted".to_owned());
    let malformed = ("22023".to_owned(), "the value is too short to be a ciphertext".to_owned());
    for (ciphertext, expected) in [
        ("''::bytea".to_owned(), &malformed),
        ("substr(encrypt_token('text'), 1, 27)".to_owned(), &malformed),
        ("substr(encrypt_token('text'), 1, 31)".to_owned(), &undecipherable),
        ("encrypt_token('text') || '\\x00'".to_owned(), &undecipherable),
        ("(SELECT set_bit(c, 0, 1 - get_bit(c, 0)) FROM encrypt_token('text') c)".to_owned(), &undecipherable),
        ("(SELECT set_bit(c, 100, 1 - get_bit(c, 100)) FROM encrypt_token('text') c)".to_owned(), &undecipherable),
        ("(SELECT set_bit(c, 255, 1 - get_bit(c, 255)) FROM encrypt_token('text') c)".to_owned(), &undecipherable),
        ("encrypt_token('text', 'context')".to_owned(), &undecipherable),
        (format!("'\\x{foreign}'::bytea"), &undecipherable),
    ] {
        assert_eq!(&error_of(&mut client, &format!("SELECT decrypt_token({ciphertext})")), expected, "{ciphertext}");
        assert_eq!(&error_of(&mut client, &format!("SELECT decrypt_config({ciphertext})")), expected, "{ciphertext}");
    }
}

#[test]
fn a_key_put_on_top_encrypts_after_a_reload_and_the_old_one_still_decrypts() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    let old: Vec<u8> = value(&mut client, "SELECT encrypt_token('old')");
    let new_key = KEY.replace('0', "7");
    cluster.write_key_file(&format!("{new_key}\n{KEY}\n"));
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the new key encrypts", || {
        let sealed: String = value(&mut client, "SELECT encode(encrypt_token('new'), 'hex')");
        webcrypto(&["open-or-not", &new_key, &sealed, ""]) == "new"
    });
    let opened: String = client.query_one("SELECT decrypt_token($1)", &[&old]).expect("open").get(0);
    assert_eq!(opened, "old");
}

#[test]
fn the_environments_key_is_used_where_no_file_is_named() {
    let cluster = Cluster::create(&["nexus_hub.vault_key_file = ''"]);
    cluster.start_with_environment("VAULT_ENCRYPTION_KEY", KEY);
    let database = cluster.database();
    let mut client = database.connect();
    let sealed = webcrypto(&["seal", KEY, "text", ""]);
    let opened: String = client.query_one("SELECT decrypt_token(decode($1, 'hex'))", &[&sealed]).expect("open").get(0);
    assert_eq!(opened, "text");
}

#[test]
fn a_key_file_that_can_not_be_used_is_refused_with_its_reason_and_never_quoted() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    for (text, mode, reason) in [
        (KEY, "0640", "group or others may access it (mode 0640)"),
        (KEY, "0604", "group or others may access it (mode 0604)"),
        ("", "0600", "it holds no key"),
        ("c0ffee\n", "0600", "line 1 is not 64 hex characters"),
    ] {
        cluster.write_file("vault.key", text, mode);
        let error = database.connect().batch_execute("SELECT encrypt_token('x')").expect_err("no usable key");
        let error = error.as_db_error().expect("an SQL error").clone();
        assert_eq!(error.code().code(), "F0000");
        let detail = error.detail().unwrap_or_default();
        assert!(detail.contains(reason), "{detail}");
        assert!(!text.is_empty() || !format!("{error:?}").contains(KEY));
        assert!(!format!("{error:?}").contains("c0ffee"));
    }
}

#[test]
fn without_a_key_the_error_says_how_to_get_one() {
    let cluster = Cluster::start(&["nexus_hub.vault_key_file = ''"]);
    let database = cluster.database();
    let error = database.connect().batch_execute("SELECT encrypt_token('x')").expect_err("no key");
    let error = error.as_db_error().expect("an SQL error");
    assert_eq!((error.code().code(), error.message()), ("F0000", "no vault key is configured"));
    assert!(error.hint().unwrap_or_default().contains("openssl rand -hex 32"));
}

#[test]
fn the_key_is_not_readable_from_sql() {
    let database = shared().database();
    let mut client = database.connect();
    for query in [
        "SELECT count(*) FROM pg_settings WHERE setting LIKE '%00112233%' OR reset_val LIKE '%00112233%' OR boot_val LIKE '%00112233%'",
        "SELECT count(*) FROM pg_file_settings WHERE setting LIKE '%00112233%'",
    ] {
        assert_eq!(value::<i64>(&mut client, query), 0, "{query}");
    }
    client.batch_execute("SET ROLE authenticated").expect("SET ROLE");
    let (code, _) = error_of(&mut client, "SHOW nexus_hub.vault_key_file");
    assert_eq!(code, "42501");
}

#[test]
fn a_servers_config_is_ciphertext_before_the_first_tuple_is_written() {
    let database = shared().database();
    let mut client = database.connect();
    client.batch_execute("CREATE EXTENSION pageinspect").expect("pageinspect");
    let config = serde_json::json!({"url": "http://h/", "headers": {"X": "pl4int3xt-t0ken"}});
    let id = add_server(&mut client, "s", config);
    client
        .execute("SELECT update_server($1, p_config => '{\"url\": \"http://h/\", \"headers\": {\"X\": \"pl4int3xt-t0ken\"}}')", &[&id])
        .expect("update_server");
    let found: bool = value(&mut client, "SELECT position('pl4int3xt'::bytea IN get_raw_page('user_servers', 0)) > 0");
    assert!(!found);
}

#[test]
fn a_million_random_byte_strings_are_refused_one_by_one() {
    let database = shared().database();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let mut client = database.connect();
            scope.spawn(move || {
                // Of all lengths up to 100, drawn anew for each.
                let (refused, short): (i64, i64) = {
                    client
                        .batch_execute(
                            "CREATE FUNCTION pg_temp.refusal(bytes bytea) RETURNS text LANGUAGE plpgsql AS $$
                             BEGIN PERFORM decrypt_token(bytes); RETURN 'opened'; EXCEPTION WHEN OTHERS THEN RETURN SQLSTATE; END $$",
                        )
                        .expect("a function");
                    let row = client
                        .query_one(
                            "SELECT count(*) FILTER (WHERE refusal = '22000' AND length >= 28), count(*) FILTER (WHERE refusal = '22023' AND length < 28)
                               FROM (SELECT length(bytes), pg_temp.refusal(bytes) AS refusal
                                       FROM (SELECT substr(sha512((n || ' a')::bytea) || sha512((n || ' b')::bytea), 1, n % 101) AS bytes
                                               FROM generate_series($1::integer * 250000 + 1, $1::integer * 250000 + 250000) AS n) AS b) AS r",
                            &[&seed],
                        )
                        .expect("a million calls");
                    (row.get(0), row.get(1))
                };
                assert_eq!(refused + short, 250_000);
                assert!(refused > 150_000 && short > 60_000, "{refused} {short}");
            });
        }
    });
}
