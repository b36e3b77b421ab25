//! The leak hunt: secrets that go in the documented way are found nowhere, whatever the server logs.

use crate::support::*;
use crate::vault::KEY;
use postgres::Client;
use serde_json::json;

/// What no file, no log and no view may hold.
const MARKER: &str = "pl4int3xt-m4rk3r";
const NEW_KEY: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";

fn marked(what: &str) -> String {
    format!("{MARKER}-{what}")
}

/// Statements that PostgreSQL shows to superusers.
fn shown_statements(client: &mut Client, text: &str) -> i64 {
    let query = "SELECT (SELECT count(*) FROM pg_stat_statements WHERE position($1 IN query) > 0)
                      + (SELECT count(*) FROM pg_stat_activity WHERE position($1 IN query) > 0)";
    client.query_one(query, &[&text]).expect("statistics").get(0)
}

#[test]
fn bound_parameters_leave_no_plaintext_and_no_key_in_logs_statistics_files_wal_and_dumps() {
    let cluster = Cluster::start(&[
        "shared_preload_libraries = 'pg_stat_statements, nexus_hub'",
        "pg_stat_statements.track = 'all'",
        "log_statement = 'all'",
        "log_min_duration_statement = 0",
        "log_parameter_max_length = 0",
        "log_min_messages = 'debug1'",
        "log_error_verbosity = 'verbose'",
        "debug_print_plan = on",
        "wal_level = 'logical'",
    ]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("CREATE EXTENSION pg_stat_statements").expect("pg_stat_statements");

    // A server that gives back, in its error, what it was sent.
    let echo = FakeServer::start(|request| Some(Answer::new("401 Unauthorized", "text/plain", request)));
    let config =
        |what: &str| json!({"url": echo.url, "headers": {"Authorization": format!("Bearer {}", marked(what))}});
    let id = add_server(&mut client, "s", config("added"));
    let changed: bool = client
        .query_one("SELECT update_server($1, p_config => $2)", &[&id, &config("changed")])
        .expect("update")
        .get(0);
    assert!(changed);
    let error = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed();
    assert!(error.contains("401") && !error.contains(MARKER), "{error}");

    let sealed: Vec<u8> =
        client.query_one("SELECT encrypt_token($1, $2)", &[&marked("token"), &"row"]).expect("seal").get(0);
    let opened: String = client.query_one("SELECT decrypt_token($1, $2)", &[&sealed, &"row"]).expect("open").get(0);
    assert_eq!(opened, marked("token"));
    client
        .query_one("SELECT insert_user_api_key($1, 'openai', $2)", &[&uuid::Uuid::nil(), &marked("api-key")])
        .expect("an API key");
    let got: String =
        client.query_one("SELECT get_user_api_key($1, 'openai')", &[&uuid::Uuid::nil()]).expect("the key").get(0);
    assert_eq!(got, marked("api-key"));
    // A named secret, at a server that gives back what it was sent, in an error and as a result.
    let user = uuid::Uuid::parse_str(ALICE).expect("a uuid");
    for (name, user) in [("named", Some(user)), ("named", None)] {
        client.query_one("SELECT create_secret($1, $2, $3)", &[&name, &marked("first"), &user]).expect("a secret");
        let changed = client.query_one("SELECT update_secret($1, $2, $3)", &[&name, &marked("named"), &user]);
        assert!(changed.expect("update_secret").get::<_, bool>(0));
    }
    let named = json!({"url": format!("{}?k={{{{secret:named}}}}", echo.url), "headers": {"Authorization": "Bearer {{secret:named}}"}});
    add_server(&mut client, "named", named.clone());
    let error = run_job(&mut client, "tool_invoke", "named", Some("t"), json!({})).failed();
    assert!(error.contains("401") && !error.contains(MARKER), "{error}");
    let job = run_http(&mut client, named);
    assert!(format!("{job:?}").contains("{{secret:named}}") && !format!("{job:?}").contains(MARKER), "{job:?}");
    assert!(echo.requests().iter().filter(|request| request.contains(&marked("named"))).count() >= 2);
    // Refused, with the secret among the arguments.
    let refused = client.query_one("SELECT create_secret('a b', $1)", &[&marked("name")]);
    assert!(!format!("{:?}", refused.expect_err("no name")).contains(MARKER));
    let refused = client.query_one("SELECT create_secret('named', $1)", &[&format!("{}\n", marked("line"))]);
    assert!(!format!("{:?}", refused.expect_err("a line end")).contains(MARKER));
    let refused = client.query_one("SELECT create_secret('named', $1)", &[&marked("again")]);
    assert!(!format!("{:?}", refused.expect_err("a duplicate")).contains(MARKER));
    let refused =
        client.query_one("SELECT insert_user_api_key($1, 'nobody', $2)", &[&uuid::Uuid::nil(), &marked("refused")]);
    assert!(!format!("{:?}", refused.expect_err("no such service")).contains(MARKER));
    let refused = client.query_one(
        "SELECT add_server('bad', 'n', $1, $2)",
        &[&json!({"headers": {"X": marked("bad")}}), &uuid::Uuid::nil()],
    );
    assert!(!format!("{:?}", refused.expect_err("no url")).contains(MARKER));
    let refused = client.query_one("SELECT encrypt_token($1)::text::integer", &[&marked("cast")]);
    assert!(!format!("{:?}", refused.expect_err("no number")).contains(MARKER));

    cluster.write_key_file(&format!("{NEW_KEY}\n{KEY}"));
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    let ring = "SELECT count(*) = 2 FROM vault_keys WHERE source IS NOT NULL";
    wait_until("the new key", || value(&mut client, ring));
    assert_eq!(value::<i32>(&mut client, "SELECT servers_updated FROM rotate_vault_key()"), 2);

    for text in [MARKER, KEY, NEW_KEY] {
        assert_eq!(shown_statements(&mut client, text), 0, "{text}");
        assert!(!database.dump().contains(text), "{text} is in the dump");
    }
    client.batch_execute("CHECKPOINT").expect("CHECKPOINT");
    drop(client);
    cluster.pg_ctl(&["stop", "-m", "fast"]);
    // The hunter finds what is there.
    assert!(!cluster.files_with("insert_user_api_key").is_empty());
    for text in [MARKER, KEY, NEW_KEY] {
        assert_eq!(cluster.files_with(text), Vec::<String>::new(), "{text}");
    }
}
