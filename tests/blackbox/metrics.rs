//! Metrics: what Prometheus reads is valid and true, and the files under `monitoring/` fit it.

use crate::support::*;
use postgres::Client;
use serde_json::json;
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub fn page(client: &mut Client) -> String {
    value(client, "SELECT nexus_hub_metrics()::text")
}

/// The value of a sample, as it stands on the page.
pub fn sample(page: &str, name: &str) -> f64 {
    let line = page.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.rsplit(' ').next().expect("a value").parse().expect("a number")
}

fn wait_for_sample(client: &mut Client, name: &str, expected: f64) {
    wait_until(&format!("{name} is {expected}"), || sample(&page(client), name) == expected);
}

/// Runs promtool, which must have nothing to say.
fn promtool(arguments: &[&str], dir: &Path, input: &str) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, of the package prometheus");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("write");
    let output = child.wait_with_output().expect("promtool");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}: {text}\n{input}");
    if !input.is_empty() {
        assert_eq!(text, "", "{input}");
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_page_is_valid_and_tells_what_has_happened() {
    let server = FakeServer::start(|request| {
        Some(if request.starts_with("GET /bad") {
            Answer::new("500 No", "text/plain", "no")
        } else {
            Answer::json("{}")
        })
    });
    let cluster = Cluster::start(&["nexus_hub.retry_base_delay = 1", "nexus_hub.poll_interval = 100"]);
    let (database, other) = (cluster.database(), cluster.database());
    let mut client = database.connect();
    let before = page(&mut client);
    promtool(&["check", "metrics"], &root(), &before);
    assert_eq!(sample(&before, "nexus_hub_jobs_total{type=\"http_request\",status=\"completed\"}"), 0.0);

    for path in ["", "", "", "bad"] {
        client
            .execute("SELECT http_get($1, max_attempts => 3)", &[&format!("{}{path}", server.url)])
            .expect("http_get");
    }
    run_job(&mut client, "tool_invoke", "no such server", Some("t"), json!({})).failed();
    wait_for_sample(&mut client, "nexus_hub_jobs_total{type=\"http_request\",status=\"completed\"}", 3.0);
    wait_for_sample(&mut client, "nexus_hub_jobs_total{type=\"http_request\",status=\"failed\"}", 1.0);
    client
        .batch_execute(
            "SELECT decrypt_token(encrypt_token('t', 'c'), 'c'), encrypt_token('u'), check_rate_limit('s', NULL, 1), check_rate_limit('s', NULL, 1);
             INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
             SELECT 'tool_invoke', 's', 't', 'completed', '2020-01-01', '2020-01-01' FROM generate_series(1, 7)",
        )
        .expect("use");
    assert_eq!(
        error_of(&mut client, "SELECT decrypt_token('\\x00112233445566778899aabbccddeeff00112233445566778899aabbcc')")
            .0,
        "22000"
    );
    wait_for_sample(&mut client, "nexus_hub_cleanup_rows_total{what=\"jobs\"}", 7.0);
    let after = page(&mut client);
    promtool(&["check", "metrics"], &root(), &after);
    for (name, expected) in [
        ("nexus_hub_jobs_total{type=\"tool_invoke\",status=\"failed\"}", 1.0),
        ("nexus_hub_job_attempts_total{type=\"http_request\"}", 6.0),
        ("nexus_hub_job_retries_total{type=\"http_request\"}", 2.0),
        ("nexus_hub_request_duration_seconds_count{type=\"http_request\"}", 6.0),
        ("nexus_hub_request_duration_seconds_bucket{type=\"http_request\",le=\"+Inf\"}", 6.0),
        // It had no server to be sent to.
        ("nexus_hub_request_duration_seconds_count{type=\"tool_invoke\"}", 0.0),
        ("nexus_hub_vault_operations_total{operation=\"encrypt\",outcome=\"ok\"}", 2.0),
        ("nexus_hub_vault_operations_total{operation=\"decrypt\",outcome=\"ok\"}", 1.0),
        ("nexus_hub_vault_operations_total{operation=\"decrypt\",outcome=\"failed\"}", 1.0),
        ("nexus_hub_rate_limit_decisions_total{decision=\"allowed\"}", 1.0),
        ("nexus_hub_rate_limit_decisions_total{decision=\"denied\"}", 1.0),
        ("nexus_hub_worker_up{number=\"0\"}", 1.0),
        ("nexus_hub_requests_in_flight{number=\"0\"}", 0.0),
        ("nexus_hub_pending_jobs", 0.0),
    ] {
        assert_eq!(sample(&after, name), expected, "{name}");
    }
    assert!(sample(&after, "nexus_hub_request_duration_seconds_sum{type=\"http_request\"}") > 0.0);
    assert!(sample(&after, "nexus_hub_worker_loops_total") > sample(&before, "nexus_hub_worker_loops_total"));
    assert!(after.contains(&format!(
        "nexus_hub_info{{version=\"{}\",database=\"{}\"}} 1\n",
        env!("CARGO_PKG_VERSION"),
        database.name
    )));
    // Each database has its own.
    let others = page(&mut other.connect());
    assert_eq!(sample(&others, "nexus_hub_jobs_total{type=\"http_request\",status=\"completed\"}"), 0.0);
    assert_eq!(sample(&others, "nexus_hub_vault_operations_total{operation=\"encrypt\",outcome=\"ok\"}"), 0.0);
}

#[test]
fn gauges_tell_how_things_stand() {
    let gate = Gate::default();
    let server = gate.server();
    let database = shared().database();
    let mut client = database.connect();
    client.execute("SELECT http_get($1, timeout_ms => 600000)", &[&server.url]).expect("http_get");
    wait_for_sample(&mut client, "nexus_hub_requests_in_flight{number=\"0\"}", 1.0);
    gate.open();
    wait_for_sample(&mut client, "nexus_hub_requests_in_flight{number=\"0\"}", 0.0);
    // In a transaction, the worker does not see them.
    client
        .batch_execute(
            "BEGIN; INSERT INTO job_results (job_type, server_id, tool_name, created_at, priority)
             SELECT 'tool_invoke', 's', 't', now() - interval '2 minutes', 1 + n % 9 FROM generate_series(1, 40) n;
             INSERT INTO job_results (job_type, server_id, tool_name, run_at) VALUES ('tool_invoke', 's', 't', now() + interval '1 hour');
             INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES ('h', 0, 'open', 1, now(), 'e'), ('h', 1, 'open', 1, now(), 'e')",
        )
        .expect("INSERT");
    let page = page(&mut client);
    assert_eq!(sample(&page, "nexus_hub_pending_jobs"), 40.0);
    assert_eq!(sample(&page, "nexus_hub_oldest_pending_job_seconds"), 120.0);
    assert_eq!(sample(&page, "nexus_hub_unreachable_hosts"), 1.0);
    assert!(sample(&page, "nexus_hub_job_bytes") > 8192.0);
}

#[test]
fn a_backlog_above_a_thousand_is_estimated() {
    let database = shared().database();
    let mut client = database.connect();
    client.batch_execute(&format!("ALTER DATABASE {} SET nexus_hub.enabled = off", database.name)).expect("ALTER");
    // The worker that goes by it.
    let disabled = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker' AND datname = current_database())";
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("a worker is there", || value(&mut client, disabled));
    client
        .batch_execute(
            "BEGIN; INSERT INTO job_results (job_type, server_id, tool_name, priority) SELECT 'tool_invoke', 's', 't', 9 FROM generate_series(1, 5000);
             ANALYZE job_results",
        )
        .expect("INSERT");
    let estimate = sample(&page(&mut client), "nexus_hub_pending_jobs");
    assert!((4900.0..=5100.0).contains(&estimate), "{estimate}");
    client.batch_execute("ROLLBACK").expect("ROLLBACK");
}

#[test]
fn a_crash_is_told_and_counters_begin_anew() {
    let gate = Gate::default();
    let server = gate.server();
    let cluster = Cluster::start(&[]);
    let database = cluster.database();
    let mut client = database.connect();
    client.batch_execute("SELECT encrypt_token('t')").expect("encrypt");
    client.execute("SELECT http_get($1, timeout_ms => 600000)", &[&server.url]).expect("http_get");
    wait_for_sample(&mut client, "nexus_hub_requests_in_flight{number=\"0\"}", 1.0);
    // On disk, or the crash forgets that it was claimed.
    client.batch_execute("CHECKPOINT").expect("CHECKPOINT");
    cluster.signal("KILL", database.wait_for_worker());
    wait_until("the server notices", || cluster.log().contains("reinitializing"));
    let mut client = cluster.reconnect(&database.name);
    wait_for_sample(&mut client, "nexus_hub_jobs_given_back_total", 1.0);
    assert_eq!(
        sample(&page(&mut client), "nexus_hub_vault_operations_total{operation=\"encrypt\",outcome=\"ok\"}"),
        0.0
    );
    gate.open();
    wait_for_sample(&mut client, "nexus_hub_jobs_total{type=\"http_request\",status=\"completed\"}", 1.0);
}

#[test]
fn without_shared_memory_and_on_a_standby_the_page_is_valid() {
    let primary = Cluster::start(&["wal_level = replica"]);
    let database = primary.database();
    let standby = Cluster::standby_of(&primary);
    let text = page(&mut standby.connect(&database.name));
    promtool(&["check", "metrics"], &root(), &text);
    assert_eq!(sample(&text, "nexus_hub_worker_up{number=\"0\"}"), 0.0);
    primary.configure(&["shared_preload_libraries = ''"]);
    primary.pg_ctl(&["restart", "-m", "fast"]);
    let text = page(&mut primary.reconnect(&database.name));
    promtool(&["check", "metrics"], &root(), &text);
    assert!(!text.contains("worker_up") && text.contains("nexus_hub_pending_jobs 0"), "{text}");
}

#[test]
fn rules_and_dashboard_are_valid_and_name_only_metrics_that_there_are() {
    let root = root();
    promtool(&["check", "rules", "monitoring/nexus_hub.rules.yml"], &root, "");
    promtool(&["check", "config", "--syntax-only", "monitoring/prometheus.yml"], &root, "");
    promtool(&["test", "rules", "rules_test.yml"], &root.join("tests/monitoring"), "");
    let database = shared().database();
    let text = page(&mut database.connect());
    let names: HashSet<_> =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next()).collect();
    for file in ["nexus_hub.rules.yml", "grafana_dashboard.json"] {
        let file = std::fs::read_to_string(root.join("monitoring").join(file)).expect("a file");
        let words =
            file.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("nexus_hub_"));
        // Views and functions are named in texts.
        let used: HashSet<_> = words.filter(|word| !matches!(*word, "nexus_hub_health" | "nexus_hub_alerts")).collect();
        assert!(used.len() > 5, "{used:?}");
        for name in used {
            assert!(names.contains(name), "{name} is not on the page");
        }
    }
    let dashboard: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root.join("monitoring/grafana_dashboard.json")).expect("a file"))
            .expect("JSON");
    assert!(dashboard["panels"].as_array().expect("panels").len() > 10);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn prometheus_reads_it_through_postgrest() {
    let database = shared().database();
    let mut client = database.connect();
    let api = PostgRest::start(&database, &[]);
    let token = bearer(&mut client, "service_role", ALICE);
    let accept = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    let answer = api.ask("GET", "/rpc/nexus_hub_metrics", &[("Authorization", &token), ("Accept", accept)], "");
    assert_eq!((answer.status, answer.header("Content-Type")), (200, Some("text/plain; charset=utf-8")));
    for (role, expected) in [("authenticated", 403), ("anon", 401)] {
        let token = bearer(&mut client, role, ALICE);
        let answer =
            api.ask("GET", "/rpc/nexus_hub_metrics", &[("Authorization", &token), ("Accept", "text/plain")], "");
        assert_eq!(answer.status, expected, "{role}");
    }
    let prometheus = Prometheus::start(api.port(), token.trim_start_matches("Bearer "));
    for (query, expected) in [
        ("up", "1"),
        ("nexus_hub_worker_up", "1"),
        ("count(nexus_hub_request_duration_seconds_bucket{type=\"http_request\"})", "15"),
    ] {
        wait_until(&format!("{query} is {expected}"), || prometheus.query(query).as_deref() == Some(expected));
    }
}
