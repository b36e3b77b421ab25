//! ALTER EXTENSION … UPDATE from each earlier release, and what CREATE EXTENSION makes of the same.

use crate::support::*;
use postgres::Client;
use serde_json::json;
use std::collections::BTreeSet;

/// The releases before this one.
const RELEASES: [&str; 1] = ["0.1.0"];

/// Everything about every object of the extension, a line each. `$1`: the schema it is installed into.
const OBJECTS: &str = "
WITH member AS (
    SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
     WHERE e.extname = 'nexus_hub' AND d.deptype = 'e'),
relation AS (SELECT c.* FROM pg_class c JOIN member m ON m.classid = 'pg_class'::regclass AND m.objid = c.oid),
rights AS (
    SELECT o.kind, o.name, string_agg(concat_ws(' ', a.grantee::regrole::text, a.privilege_type, a.is_grantable::text), ', '
                                      ORDER BY a.grantee::regrole::text, a.privilege_type) AS acl
      FROM (SELECT 'function' AS kind, p.oid::regprocedure::text AS name, coalesce(p.proacl, acldefault('f', p.proowner)) AS acl
              FROM pg_proc p JOIN member m ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
            UNION ALL SELECT 'relation', oid::regclass::text, coalesce(relacl, acldefault('r', relowner)) FROM relation
            UNION ALL SELECT 'column', a.attrelid::regclass || '.' || a.attname, a.attacl FROM pg_attribute a JOIN relation r ON r.oid = a.attrelid
            UNION ALL SELECT 'schema', n.nspname, coalesce(n.nspacl, acldefault('n', n.nspowner))
              FROM pg_namespace n JOIN member m ON m.classid = 'pg_namespace'::regclass AND m.objid = n.oid) AS o
     CROSS JOIN LATERAL aclexplode(o.acl) AS a
     GROUP BY 1, 2)
SELECT 'member ' || pg_describe_object(classid, objid, 0) AS line FROM member
UNION ALL SELECT 'comment on ' || pg_describe_object(s.classoid, s.objoid, s.objsubid) || ': ' || s.description
  FROM pg_description s JOIN member m ON m.classid = s.classoid AND m.objid = s.objoid
UNION ALL SELECT 'function ' || pg_get_functiondef(p.oid) FROM pg_proc p JOIN member m ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
UNION ALL SELECT concat_ws(' ', 'relation', r.oid::regclass, r.relkind, r.relrowsecurity, r.relforcerowsecurity, r.reloptions, r.relpersistence) FROM relation r
UNION ALL SELECT concat_ws(' ', 'column', a.attrelid::regclass, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                           a.attgenerated, a.attstorage, pg_get_expr(x.adbin, x.adrelid))
  FROM pg_attribute a JOIN relation r ON r.oid = a.attrelid LEFT JOIN pg_attrdef x ON x.adrelid = a.attrelid AND x.adnum = a.attnum
 WHERE a.attnum > 0
UNION ALL SELECT concat_ws(' ', 'constraint', c.conrelid::regclass, c.conname, pg_get_constraintdef(c.oid), c.convalidated)
  FROM pg_constraint c JOIN relation r ON r.oid = c.conrelid
UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid), i.indisvalid) FROM pg_index i JOIN relation r ON r.oid = i.indrelid
UNION ALL SELECT concat_ws(' ', 'policy', p.schemaname, p.tablename, p.policyname, p.permissive, p.roles, p.cmd, p.qual, p.with_check)
  FROM pg_policies p JOIN relation r ON r.oid = format('%I.%I', p.schemaname, p.tablename)::regclass
UNION ALL SELECT concat_ws(' ', 'trigger', pg_get_triggerdef(t.oid), t.tgenabled) FROM pg_trigger t JOIN relation r ON r.oid = t.tgrelid
 WHERE NOT t.tgisinternal
UNION ALL SELECT 'view ' || oid::regclass || ' ' || pg_get_viewdef(oid) FROM relation WHERE relkind = 'v'
UNION ALL SELECT concat_ws(' ', 'rights', kind, name, acl) FROM rights
UNION ALL SELECT concat_ws(' ', 'dumped', t.oid::regclass, e.extcondition[t.place])
  FROM pg_extension e CROSS JOIN LATERAL unnest(e.extconfig) WITH ORDINALITY AS t (oid, place) WHERE e.extname = 'nexus_hub'
UNION ALL SELECT concat_ws(' ', 'part', relation::regclass, kind, name) FROM _nexus_hub.parts
UNION ALL SELECT concat_ws(' ', 'extension', extversion, extrelocatable, extnamespace::regnamespace) FROM pg_extension WHERE extname = 'nexus_hub'";

fn objects(client: &mut Client) -> BTreeSet<String> {
    client.batch_execute("SET search_path = pg_catalog").expect("SET");
    let rows = client.query(OBJECTS, &[]).expect("the catalogues");
    rows.iter().map(|row| row.get::<_, String>(0)).collect()
}

fn updated(database: &Database<'_>, schema: &str, from: &str) {
    database
        .connect()
        .batch_execute(&format!(
            "CREATE SCHEMA IF NOT EXISTS \"{schema}\"; CREATE EXTENSION nexus_hub SCHEMA \"{schema}\" VERSION '{from}'; ALTER EXTENSION nexus_hub UPDATE"
        ))
        .expect("ALTER EXTENSION");
}

#[test]
fn an_update_from_each_release_equals_a_fresh_install_object_by_object() {
    let cluster = shared();
    for schema in ["public", "hub API"] {
        let fresh = cluster.empty_database();
        let mut client = fresh.connect();
        client
            .batch_execute(&format!(
                "CREATE SCHEMA IF NOT EXISTS \"{schema}\"; CREATE EXTENSION nexus_hub SCHEMA \"{schema}\""
            ))
            .expect("CREATE EXTENSION");
        let expected = objects(&mut client);
        assert!(expected.len() > 1000, "the catalogues were read: {}", expected.len());
        for from in RELEASES {
            let database = cluster.empty_database();
            updated(&database, schema, from);
            let found = objects(&mut database.connect());
            let missing: Vec<_> = expected.difference(&found).collect();
            let others: Vec<_> = found.difference(&expected).collect();
            assert!(
                missing.is_empty() && others.is_empty(),
                "{from} in {schema}\nmissing: {missing:#?}\nothers: {others:#?}"
            );
        }
    }
}

#[test]
fn an_update_opens_nothing_under_default_privileges_and_keeps_the_rights_that_were_given() {
    let cluster = shared();
    let opened = "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon, authenticated, service_role, PUBLIC;
                  ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
                  ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO anon, authenticated, service_role";
    let fresh = cluster.database();
    let expected = objects(&mut fresh.connect());
    for from in RELEASES {
        let database = cluster.empty_database();
        let mut client = database.connect();
        client
            .batch_execute(&format!("CREATE EXTENSION nexus_hub VERSION '{from}'; {opened}"))
            .expect("CREATE EXTENSION");
        client
            .batch_execute("GRANT SELECT ON job_results TO pg_read_all_stats; ALTER EXTENSION nexus_hub UPDATE")
            .expect("ALTER EXTENSION");
        let found = objects(&mut client);
        let others: Vec<_> = found.difference(&expected).collect();
        assert_eq!(others.len(), 1, "{others:#?}");
        assert!(
            others[0].starts_with("rights relation public.job_results")
                && others[0].contains("pg_read_all_stats SELECT"),
            "{others:#?}"
        );
    }
}

/// Rows of a user's tables, as text.
fn rows(client: &mut Client, query: &str) -> Vec<String> {
    let rows = client.query(&format!("SELECT t::text FROM ({query}) AS t ORDER BY 1"), &[]).expect("rows");
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn an_update_keeps_all_rows_and_the_worker_goes_on() {
    for from in RELEASES {
        let cluster = Cluster::start(&[
            "nexus_hub.retry_base_delay = '1ms'",
            "nexus_hub.retry_max_delay = '1ms'",
            "nexus_hub.request_timeout = '10min'",
        ]);
        let database = cluster.empty_database();
        let mut client = database.connect();
        client.batch_execute(&format!("CREATE EXTENSION nexus_hub VERSION '{from}'")).expect("CREATE EXTENSION");
        let server = McpServer::start(&[]);
        let refuses = FakeServer::start(|_| Some(Answer::new("503 Service Unavailable", "text/plain", "")));
        let id = add_server(&mut client, "demo", server.config());
        // The new library serves the old objects until somebody updates them.
        run_job(&mut client, "tool_invoke", "demo", Some("echo"), json!({"text": "x"})).completed();
        client
            .execute(
                "INSERT INTO job_results (job_type, params, max_attempts) VALUES ('http_request', $1, 3)",
                &[&json!({"url": refuses.url})],
            )
            .expect("INSERT");
        wait_until("it has failed", || count_jobs(&mut client, "failed") == 1);
        client
            .batch_execute(
                "SELECT insert_user_api_key(NULL, 'openai', 'k'), create_secret('s', 'v'), encrypt_token('t');
                 INSERT INTO rate_limit_overrides (key, request_limit) VALUES ('k', 5);
                 INSERT INTO system_servers (id, name, config) VALUES ('sys', 'S', '{\"url\": \"https://host.example/\"}')",
            )
            .expect("rows");
        let tables = [
            "SELECT * FROM user_servers",
            "SELECT * FROM system_servers",
            "SELECT id, user_id, job_type, params, status, result, error, attempt, completed_at FROM job_results",
            "SELECT * FROM job_attempts",
            "SELECT * FROM api_keys",
            "SELECT * FROM rate_limit_overrides",
            "SELECT * FROM _nexus_hub.secrets",
        ];
        let before = tables.map(|table| rows(&mut client, table));
        // What runs meanwhile, runs on.
        let gate = Gate::default();
        let held = gate.server();
        let url = json!({"url": held.url});
        client
            .execute(
                "INSERT INTO job_results (job_type, params) SELECT 'http_request', $1 FROM generate_series(1, 50)",
                &[&url],
            )
            .expect("INSERT");
        wait_until("they run", || count_jobs(&mut client, "running") == 50);
        client.batch_execute("ALTER EXTENSION nexus_hub UPDATE").expect("ALTER EXTENSION");
        gate.open();
        wait_until("they are completed", || count_jobs(&mut client, "completed") == 51);
        client.execute("DELETE FROM job_results WHERE params = $1", &[&url]).expect("DELETE");
        assert_eq!(tables.map(|table| rows(&mut client, table)), before);
        assert_eq!(held.requests().len(), 50, "no job was sent twice");
        let failures: i32 = value(&mut client, "SELECT failures FROM job_results WHERE status = 'failed'");
        assert_eq!(failures, 3);
        assert_eq!(value::<String>(&mut client, "SELECT get_user_api_key(NULL, 'openai')"), "k");
        // And what is new works.
        let sync = client.query_one("SELECT sync_server($1)", &[&id]).expect("sync_server").get(0);
        wait_for_job(&mut client, sync).completed();
        wait_until("all is well", || value::<String>(&mut client, "SELECT nexus_hub_health() ->> 'status'") == "ok");
        client.batch_execute("DELETE FROM job_results").expect("DELETE");
        assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_attempts"), 0, "they go with their jobs");
    }
}
