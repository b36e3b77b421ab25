//! Installing: into which schema, and what a dump brings back.

use crate::support::*;
use crate::worker::insist;
use serde_json::json;
use std::process::Command;

#[test]
fn a_dump_brings_back_all_rows_and_a_running_worker_in_a_new_cluster() {
    let database = shared().database();
    let server = McpServer::start(&[]);
    let mut client = database.connect();
    let id = add_server(&mut client, "demo", server.config());
    client
        .batch_execute(
            "INSERT INTO system_servers (id, name, config) VALUES ('sys', 'sys', '{\"url\": \"http://h/\"}');
             SELECT insert_user_api_key(NULL, 'gateway', 'key'), upsert_user_gateway_config(NULL, 'https://gateway.example/v1'), create_secret('s', 'value');
             INSERT INTO user_settings (user_id) VALUES (gen_random_uuid());
             INSERT INTO rate_limit_exemptions (identifier) VALUES ('i');
             INSERT INTO rate_limit_overrides (key, request_limit) VALUES ('k', 5)",
        )
        .expect("rows of all kinds");
    run_job(&mut client, "tool_invoke", "demo", Some("echo"), json!({"text": "x"})).completed();
    run_job(&mut client, "tool_invoke", "demo", Some("no such tool"), json!({})).failed();
    let sync = client.query_one("SELECT sync_server($1)", &[&id]).expect("sync_server").get(0);
    wait_for_job(&mut client, sync).completed();
    client.batch_execute("SELECT _nexus_hub.grant_api()").expect("as after roles were made");
    // What backup_preflight says is to be saved besides the dump: the key.
    let saves = "SELECT count(*) FROM backup_preflight() WHERE item = 'vault key' AND state = 'save'";
    assert_eq!(value::<i64>(&mut client, saves), 1);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM backup_preflight() WHERE state = 'problem'"), 0);
    let cluster = Cluster::create(&[]);
    cluster.write_key_file(&shared().read_file("vault.key"));
    cluster.start_up();
    let restored = cluster.empty_database();
    database.copy_to(&restored);
    let mut client_there = restored.connect();
    let tables = "SELECT string_agg(t.oid::regclass::text, ' ' ORDER BY 1)
                    FROM pg_extension e CROSS JOIN LATERAL unnest(e.extconfig) AS t (oid) WHERE e.extname = 'nexus_hub'";
    let tables: String = value(&mut client, tables);
    for table in tables.split(' ') {
        let all = format!("SELECT string_agg(t::text, E'\n' ORDER BY t::text) FROM {table} t");
        let (here, there): (Option<String>, Option<String>) =
            (value(&mut client, &all), value(&mut client_there, &all));
        // The worker goes on writing these two.
        if !table.ends_with("vault_audit_log") && !table.ends_with("known_vault_keys") {
            assert_eq!(here, there, "{table}");
        }
        assert!(there.is_some() || table.ends_with("registered_columns"), "{table} has rows");
    }
    assert_eq!(value::<String>(&mut client_there, "SELECT get_user_api_key(NULL, 'gateway')"), "key");
    run_job(&mut client_there, "tool_invoke", "demo", Some("echo"), json!({"text": "x"})).completed();
}

/// Loads a dump piece by piece, and stops in front of a line that begins so.
fn load(psql: &mut std::process::ChildStdin, rest: &mut &str, until: &str) {
    use std::io::Write;
    let end = rest.find(until).unwrap_or_else(|| panic!("no {until}"));
    let (piece, others) = rest.split_at(end);
    psql.write_all(piece.as_bytes()).and_then(|()| psql.flush()).expect("psql");
    *rest = others;
}

fn loops(client: &mut postgres::Client) -> f64 {
    let page: String = value(client, "SELECT nexus_hub_metrics()::text");
    let line = page.lines().find_map(|line| line.strip_prefix("nexus_hub_worker_loops_total "));
    line.and_then(|count| count.parse().ok()).unwrap_or_default()
}

#[test]
fn jobs_of_a_dump_wait_until_all_of_it_is_loaded() {
    const SWIFT: &str = "nexus_hub.poll_interval = 100";
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.enabled = off"]);
    let source = cluster.database();
    let mut client = source.connect();
    let server = McpServer::start(&[]);
    add_server(&mut client, "demo", server.config());
    create_job(&mut client, "tool_invoke", "demo", Some("echo"), json!({"text": "x"}));
    let dump = source.dump();
    cluster.configure(&[SWIFT]);
    cluster.pg_ctl(&["reload"]);
    let restored = cluster.empty_database();
    let mut psql = Command::new("psql")
        .args(["-q", "-v", "ON_ERROR_STOP=1", "-d", &restored.name])
        .envs(cluster.environment())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("psql");
    let mut stdin = psql.stdin.take().expect("piped");
    let mut rest = dump.as_str();
    load(&mut stdin, &mut rest, "COPY public.user_servers");
    let mut client = restored.connect();
    wait_until("the job is there", || {
        client.query_one("SELECT count(*) FROM job_results", &[]).is_ok_and(|row| row.get::<_, i64>(0) == 1)
    });
    restored.wait_for_worker();
    let before = loops(&mut client);
    wait_until("the worker has looked", || loops(&mut client) > before + 5.0);
    assert_eq!(count_jobs(&mut client, "pending"), 1, "its server is not there yet");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM user_servers"), 0);
    assert!(value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'restoring'"));
    std::io::Write::write_all(&mut stdin, rest.as_bytes()).expect("psql");
    drop(stdin);
    assert!(psql.wait().expect("psql").success());
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
    assert!(!value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'restoring'"));
}

#[test]
fn jobs_of_a_data_only_dump_wait_also_where_triggers_are_disabled() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100", "nexus_hub.enabled = off"]);
    let source = cluster.database();
    let mut client = source.connect();
    let server = McpServer::start(&[]);
    add_server(&mut client, "demo", server.config());
    for _ in 0..20 {
        create_job(&mut client, "tool_invoke", "demo", Some("echo"), json!({"text": "x"}));
    }
    let restored = cluster.database();
    restored.wait_for_worker();
    cluster.configure(&["nexus_hub.poll_interval = 100"]);
    cluster.pg_ctl(&["reload"]);
    source.copy_with(&restored, &["--data-only", "--disable-triggers"]);
    let mut client = restored.connect();
    wait_until("all are completed", || count_jobs(&mut client, "completed") == 20);
}

#[test]
fn nobody_but_who_can_load_a_dump_keeps_the_worker_from_its_jobs() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let pretends = "SET row_security = off; SET check_function_bodies = off; SELECT pg_catalog.set_config('search_path', '', false)";
    let mut nobody = database.connect();
    nobody
        .batch_execute(&format!(
            "CREATE ROLE nobody; SET ROLE nobody; {pretends}; CREATE EXTENSION IF NOT EXISTS nexus_hub;
             CREATE TEMP TABLE t (id integer); SET ROLE authenticated; SET request.jwt.claims = '{{\"sub\": \"{ALICE}\"}}'; SET row_security = on;
             INSERT INTO public.job_results (user_id, job_type, server_id, tool_name) VALUES ('{ALICE}', 'tool_invoke', 's', 't')"
        ))
        .expect("tricks");
    run_http(&mut client, json!({"url": server.url})).completed();
    assert!(!value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'restoring'"));
    // Who can is believed.
    let mut owner = database.connect();
    owner.batch_execute(&format!("{pretends}; CREATE EXTENSION IF NOT EXISTS nexus_hub")).expect("a dump's beginning");
    assert!(value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'restoring'"));
    owner.batch_execute("DISCARD ALL").expect("DISCARD ALL");
    assert!(!value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'restoring'"));
}

#[test]
fn a_running_job_that_comes_with_a_dump_is_run_again() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 200"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    database.wait_for_worker();
    client
        .execute(
            "INSERT INTO job_results (job_type, params, status, started_at, lease)
             VALUES ('http_request', $1, 'running', now(), gen_random_uuid())",
            &[&json!({"url": server.url})],
        )
        .expect("a row as a dump has it");
    wait_until("the job is completed", || count_jobs(&mut client, "completed") == 1);
}

#[test]
fn a_database_in_another_encoding_is_refused() {
    let cluster = shared();
    let mut client = cluster.connect("postgres");
    insist(&mut client, "DROP DATABASE IF EXISTS latin");
    insist(&mut client, "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    let (code, message) = error_of(&mut cluster.connect("latin"), "CREATE EXTENSION nexus_hub");
    assert_eq!((code.as_str(), message.as_str()), ("0A000", "nexus_hub needs a database with encoding UTF8"));
    insist(&mut client, "DROP DATABASE latin");
}

#[test]
fn a_schema_of_the_internals_name_is_not_taken_over() {
    let database = shared().empty_database();
    let mut client = database.connect();
    client.batch_execute("CREATE SCHEMA _nexus_hub").expect("CREATE SCHEMA");
    let (code, _) = error_of(&mut client, "CREATE EXTENSION nexus_hub");
    assert_eq!(code, "42P06");
}

#[test]
fn errors_of_utility_statements_pass_through_beside_other_extensions_hooks() {
    for libraries in ["nexus_hub,pg_stat_statements", "pg_stat_statements,nexus_hub"] {
        let cluster = Cluster::start(&[&format!("shared_preload_libraries = '{libraries}'")]);
        let database = cluster.database();
        let mut client = database.connect();
        for (statement, code) in [
            ("DROP TABLE nowhere", "42P01"),
            ("DROP DATABASE nowhere", "3D000"),
            ("CREATE DATABASE x TEMPLATE nowhere", "3D000"),
            ("ALTER DATABASE nowhere RENAME TO elsewhere", "3D000"),
            ("CREATE EXTENSION nexus_hub", "42710"),
        ] {
            assert_eq!(error_of(&mut client, statement).0, code, "{statement}");
        }
        let (code, _) = error_of(&mut client, "BEGIN; SELECT 1/0; COMMIT");
        assert_eq!(code, "22012");
        client.batch_execute("ROLLBACK; SELECT 1").expect("the session goes on");
    }
}

#[test]
fn a_databases_owner_can_not_have_the_worker_run_own_code_as_superuser() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    client
        .batch_execute(&format!(
            "CREATE ROLE owner; ALTER DATABASE {} OWNER TO owner; ALTER SCHEMA public OWNER TO owner; SET ROLE owner;
             ALTER SCHEMA public RENAME TO hidden; CREATE SCHEMA public;
             CREATE TABLE public.job_results (id uuid, user_id uuid, job_type text, server_id text, tool_name text, params jsonb,
                 status text DEFAULT 'pending', result jsonb, error text, created_at timestamptz DEFAULT now(),
                 started_at timestamptz, completed_at timestamptz, lease uuid);
             CREATE FUNCTION public.take_over() RETURNS trigger LANGUAGE plpgsql AS
                 $$BEGIN ALTER ROLE owner SUPERUSER; RETURN NEW; END$$;
             CREATE TRIGGER take_over BEFORE UPDATE ON public.job_results FOR EACH ROW EXECUTE FUNCTION public.take_over();
             INSERT INTO public.job_results (id, job_type, params) VALUES (gen_random_uuid(), 'http_request', '{{\"url\": \"http://127.0.0.1:1/\"}}');
             RESET ROLE;
             INSERT INTO hidden.job_results (job_type, params, max_attempts) VALUES ('http_request', '{{\"url\": \"http://127.0.0.1:1/\"}}', 1)",
            database.name
        ))
        .expect("an owner's tricks");
    wait_until("the worker has run the job of the real table", || {
        value::<i64>(&mut client, "SELECT count(*) FROM hidden.job_results WHERE status = 'failed'") == 1
    });
    assert!(!value::<bool>(&mut client, "SELECT rolsuper FROM pg_roles WHERE rolname = 'owner'"));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM public.job_results WHERE status = 'pending'"), 1);
}

#[test]
fn what_others_put_into_the_schema_is_not_run_by_create_extension() {
    let database = shared().empty_database();
    let mut client = database.connect();
    client
        .batch_execute(
            "CREATE TABLE public.trapped (by_whom text);
             CREATE FUNCTION public.trap(oid, regclass) RETURNS boolean LANGUAGE plpgsql AS
                 $$BEGIN INSERT INTO public.trapped VALUES (current_user); RETURN $1 OPERATOR(pg_catalog.=) $2::oid; END$$;
             CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = public.trap);
             CREATE FUNCTION public.format(text, regprocedure) RETURNS text LANGUAGE plpgsql AS
                 $$BEGIN INSERT INTO public.trapped VALUES (current_user); RETURN ''; END$$;
             CREATE EXTENSION nexus_hub SCHEMA public",
        )
        .expect("CREATE EXTENSION");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM public.trapped"), 0);
}
