//! Health: what a watcher sees of a real server, in psql and through PostgREST.

use crate::support::*;
use crate::vault::KEY;
use crate::vault_keys::is_running;
use postgres::Client;
use serde_json::{Value, json};

fn health(client: &mut Client) -> Value {
    value(client, "SELECT nexus_hub_health()")
}

fn reasons(health: &Value) -> Vec<&str> {
    health["reasons"]
        .as_array()
        .expect("an array")
        .iter()
        .map(|reason| reason["name"].as_str().expect("a name"))
        .collect()
}

#[test]
fn a_database_at_work_is_ok_and_says_who_works() {
    let gate = Gate::default();
    let server = gate.server();
    let cluster = Cluster::start(&[
        "nexus_hub.workers_per_database = 2",
        "nexus_hub.poll_interval = 100",
        "nexus_hub.request_timeout = '10min'",
    ]);
    let database = cluster.database();
    let mut client = database.connect();
    // The second one starts when the first is at work.
    let at_work = "SELECT count(*) FROM jsonb_array_elements(nexus_hub_health() -> 'workers') w
                    WHERE w ->> 'database' = current_database() AND w ->> 'state' = 'running'";
    wait_until("both are at work", || value::<i64>(&mut client, at_work) == 2);
    assert_eq!(health(&mut client)["status"], "ok");
    client.batch_execute(&format!("SELECT http_get('{}')", server.url)).expect("http_get");
    let running =
        "SELECT EXISTS (SELECT FROM system_health_summary WHERE status = 'ok' AND running = 1 AND active_sessions = 1)";
    wait_until("the request in flight is seen", || value(&mut client, running));
    let seen = health(&mut client);
    assert_eq!(seen["reasons"], json!([]));
    assert_eq!((&seen["preloaded"], &seen["standby"], &seen["enabled"]), (&json!(true), &json!(false), &json!(true)));
    assert_eq!(seen["version"], env!("CARGO_PKG_VERSION"));
    let workers: Vec<_> = seen["workers"]
        .as_array()
        .expect("an array")
        .iter()
        .filter(|worker| worker["database"] == *database.name)
        .collect();
    let pids: Vec<i32> = client
        .query("SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker' AND datname = current_database() ORDER BY pid", &[])
        .expect("pg_stat_activity")
        .iter()
        .map(|row| row.get(0))
        .collect();
    let mut seen_pids: Vec<_> = workers.iter().map(|worker| worker["pid"].as_i64().expect("a pid") as i32).collect();
    seen_pids.sort_unstable();
    assert_eq!(seen_pids, pids);
    for (number, worker) in workers.iter().enumerate() {
        assert_eq!(
            (&worker["number"], &worker["of"], &worker["state"]),
            (&json!(number), &json!(2), &json!("running"))
        );
    }
    // Each look leaves a later sign of life.
    let last_loop = |client: &mut Client| {
        health(client)["workers"]
            .as_array()
            .expect("an array")
            .iter()
            .map(|worker| worker["last_loop"].as_str().expect("a time").to_owned())
            .min()
    };
    let before = last_loop(&mut client);
    wait_until("they are at work", || last_loop(&mut client) > before);
    assert!(seen["rate_limits"]["max_keys"].as_i64().expect("a number") > 0);
    gate.open();
    wait_until("the job is done", || value::<i64>(&mut client, "SELECT running FROM system_health_summary") == 0);
}

#[test]
fn without_the_library_preloaded_it_is_down_and_says_what_to_do() {
    let cluster = Cluster::start(&["shared_preload_libraries = ''"]);
    let database = cluster.database();
    let mut client = database.connect();
    let seen = health(&mut client);
    assert_eq!((&seen["status"], &seen["preloaded"], &seen["workers"]), (&json!("down"), &json!(false), &json!([])));
    assert_eq!(reasons(&seen), ["worker_down"]);
    assert_eq!(
        seen["reasons"][0]["reason"],
        "nexus_hub is not preloaded: add it to shared_preload_libraries and restart the server"
    );
    let firing: String = value(
        &mut client,
        "SELECT string_agg(name || ' ' || severity || ' ' || value, ',') FROM nexus_hub_alerts WHERE firing",
    );
    assert_eq!(firing, "worker_down critical 1");
}

#[test]
fn a_worker_that_finds_no_process_is_missed_and_one_that_comes_back_is_not() {
    let cluster = Cluster::start(&["max_worker_processes = 1"]);
    let database = cluster.database();
    let mut client = database.connect();
    // The launcher has the only process.
    let seen = health(&mut client);
    assert_eq!((&seen["status"], reasons(&seen)), (&json!("down"), vec!["worker_down"]));
    assert!(seen["reasons"][0]["reason"].as_str().expect("a text").contains("max_worker_processes"));
    cluster.configure(&[]);
    drop(client);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect(&database.name);
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
}

#[test]
fn a_worker_that_fails_again_and_again_is_not_taken_for_one_at_work() {
    let cluster = Cluster::start(&["nexus_hub.poll_interval = 100"]);
    let database = cluster.database();
    let mut client = database.connect();
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
    client
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'never'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON job_results FOR EACH ROW EXECUTE FUNCTION refuse();
             SELECT http_get('http://127.0.0.1:1/')",
        )
        .expect("trouble");
    // Between two of them there is none.
    wait_until("the worker is stuck", || reasons(&health(&mut client)).contains(&"worker_stuck"));
    for _ in 0..50 {
        assert_eq!(health(&mut client)["status"], "down");
    }
    client.batch_execute("DROP TRIGGER refuse ON job_results").expect("DROP");
    let tried = "SELECT EXISTS (SELECT FROM job_results WHERE attempt > 0)";
    wait_until("the job is run", || value(&mut client, tried));
}

#[test]
fn a_lock_on_the_tables_is_told_and_not_waited_for() {
    let database = shared().database();
    let mut client = database.connect();
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
    let mut holder = database.connect();
    client.batch_execute("SET statement_timeout = '30s'").expect("SET");
    let tables = [
        "job_results",
        "job_attempts",
        "circuit_breakers",
        "_nexus_hub.rate_limit_windows",
        "user_servers",
        "_nexus_hub.known_vault_keys",
    ];
    for table in tables {
        holder.batch_execute(&format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")).expect("LOCK");
        let seen = health(&mut client);
        assert_eq!((&seen["status"], reasons(&seen)), (&json!("degraded"), vec!["tables_locked"]), "{table}");
        let others = "SELECT * FROM nexus_hub_alerts; SELECT * FROM system_health_summary; SELECT nexus_hub_metrics()";
        client.batch_execute(others).expect(table);
        holder.batch_execute("ROLLBACK").expect("ROLLBACK");
    }
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
}

#[test]
fn a_slow_key_command_is_not_waited_for() {
    // It is ended after 10 s.
    let sleep = "sleep 41.42";
    let slow = format!("nexus_hub.vault_key_command = '{sleep}; exit 1'");
    let cluster = Cluster::start(&["nexus_hub.vault_key_file = ''", &slow]);
    let database = cluster.database();
    let mut client = database.connect();
    // Who waited for it would answer when it is over.
    wait_until("there are answers while it runs", || {
        if !is_running(sleep) {
            // It is run once a load.
            client.batch_execute("SELECT pg_reload_conf()").expect("reload");
            return false;
        }
        for _ in 0..20 {
            health(&mut client);
        }
        is_running(sleep)
    });
    let problem = "the vault key command failed: The reason is in the server's log.";
    wait_until("its failure is told", || health(&mut client)["vault"]["problem"] == problem);
}

#[test]
fn a_key_that_cannot_be_used_degrades_it_without_being_shown() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    let with_keys = |text: &str, client: &mut Client| {
        cluster.write_key_file(text);
        client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    };
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
    let bad = KEY.replace('0', "x");
    with_keys(&bad, &mut client);
    wait_until("the key is missed", || reasons(&health(&mut client)) == ["vault_key_unusable"]);
    let seen = health(&mut client);
    assert_eq!((&seen["status"], &seen["vault"]["usable"]), (&json!("degraded"), &json!(false)));
    assert!(!seen.to_string().contains(&bad), "{seen}");
    with_keys(KEY, &mut client);
    wait_until("it is ok again", || health(&mut client)["status"] == "ok");
    cluster.configure(&["nexus_hub.vault_key_file = ''"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("none is missed, too", || health(&mut client)["vault"]["problem"] == "no vault key is configured");
}

#[test]
fn a_standby_is_ok_without_a_worker() {
    let primary = Cluster::start(&["wal_level = replica"]);
    let database = primary.database();
    database.connect().batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    let standby = Cluster::standby_of(&primary);
    let mut client = standby.connect(&database.name);
    let seen = health(&mut client);
    assert_eq!((&seen["status"], &seen["standby"], &seen["workers"]), (&json!("ok"), &json!(true), &json!([])));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM nexus_hub_alerts WHERE firing"), 0);
}

#[test]
fn a_monitoring_role_reads_it_and_learns_nothing_else() {
    let database = shared().database();
    let mut client = database.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS watcher; CREATE ROLE watcher; GRANT pg_monitor TO watcher; SET ROLE watcher",
        )
        .expect("role");
    for query in ["SELECT nexus_hub_health()", "SELECT * FROM nexus_hub_alerts", "SELECT * FROM system_health_summary"]
    {
        client.batch_execute(query).expect(query);
    }
    for query in [
        "SELECT FROM job_results",
        "SELECT cleanup_old_job_results()",
        "SELECT FROM vault_audit",
        "SELECT _nexus_hub.situation()",
    ] {
        assert_eq!(error_of(&mut client, query).0, "42501", "{query}");
    }
    // In whatever schema it is.
    client
        .batch_execute(
            "RESET ROLE; DROP EXTENSION nexus_hub; CREATE SCHEMA hub; CREATE EXTENSION nexus_hub SCHEMA hub; SET ROLE watcher;
             SELECT hub.nexus_hub_health(); SELECT * FROM hub.nexus_hub_alerts; SELECT hub.nexus_hub_metrics()",
        )
        .expect("another schema");
    client.batch_execute("RESET ROLE; DROP OWNED BY watcher; DROP ROLE watcher").expect("role");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn postgrest_answers_200_while_jobs_run_and_503_when_they_do_not() {
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    wait_until("it is ok", || health(&mut client)["status"] == "ok");
    let ask = |api: &PostgRest, client: &mut Client, role: &str, method: &str| {
        let token = bearer(client, role, ALICE);
        let answer = api.ask(
            method,
            "/rpc/nexus_hub_health",
            &[("Authorization", &token)],
            if method == "POST" { "{}" } else { "" },
        );
        (answer.status, answer.body)
    };
    {
        let api = PostgRest::start(&database, &[]);
        for method in ["GET", "POST"] {
            let (status, body) = ask(&api, &mut client, "service_role", method);
            assert_eq!((status, &body["status"]), (200, &json!("ok")), "{method}");
        }
        // Degraded is for people to look at, not for a load balancer.
        client.batch_execute("INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES ('h:80', 7, 'open', 5, now(), 'e')").expect("INSERT");
        let (status, body) = ask(&api, &mut client, "service_role", "GET");
        assert_eq!((status, &body["status"]), (200, &json!("degraded")));
        let token = bearer(&mut client, "service_role", ALICE);
        let summary = api.ask("GET", "/system_health_summary?select=status", &[("Authorization", &token)], "");
        assert_eq!((summary.status, summary.body), (200, json!([{"status": "degraded"}])));
        assert_eq!(ask(&api, &mut client, "authenticated", "GET").0, 403);
        assert_eq!(ask(&api, &mut client, "anon", "GET").0, 401);
    }
    cluster.configure(&["shared_preload_libraries = ''"]);
    drop(client);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut client = cluster.reconnect(&database.name);
    let api = PostgRest::start(&database, &[]);
    for method in ["GET", "POST"] {
        let (status, body) = ask(&api, &mut client, "service_role", method);
        assert_eq!((status, &body["status"], &body["preloaded"]), (503, &json!("down"), &json!(false)), "{method}");
    }
}
