//! The operational guide of the Nexus Hub: its statements run as they are written there.

use crate::support::*;
use postgres::Client;
use serde_json::json;
use std::path::Path;
use std::process::Command;

/// A database as the guide knows it: servers of users and everybody's, caches, jobs in all states, calls over a limit, and
/// a schedule.
fn as_the_guide_knows_it(client: &mut Client) {
    client
        .batch_execute(
            "CREATE EXTENSION IF NOT EXISTS pg_cron; CREATE EXTENSION nexus_hub;
             SELECT cron.schedule('cleanup-old-job-results', '0 2 * * *', $$SELECT cleanup_old_job_results()$$);
             INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ('docs', 'Docs', '{\"url\": \"https://docs.example/mcp\"}', 2);
             INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
             SELECT 'tool_invoke', 'docs', 't', status, now() - age, CASE WHEN status <> 'running' THEN now() - age END FROM (VALUES
                 ('completed', interval '1 hour'), ('failed', '2 hours'), ('running', '3 hours'), ('completed', '9 days')) AS j (status, age);
             SELECT check_rate_limit('docs', NULL, 2) FROM generate_series(1, 3);
             INSERT INTO tool_cache (server_ref_id, server_type, tool_name, namespaced_name, expires_at)
             SELECT ref_id, 'system', 't' || number, 'docs__t' || number, now() + (number - 2) * interval '1 hour' FROM system_servers, generate_series(1, 3) AS number",
        )
        .expect("the scene");
    add_server(client, "own", json!({"url": "https://own.example/mcp", "headers": {"Authorization": "Bearer s3cr3t"}}));
}

#[test]
fn every_statement_of_the_operational_guide_runs_as_written() {
    let cluster = Cluster::create(&[
        "shared_preload_libraries = 'pg_cron, nexus_hub'",
        "cron.database_name = 'postgres'",
        // The guide looks at jobs that the worker would have dealt with.
        "nexus_hub.enabled = off",
        "nexus_hub.auto_cleanup = off",
        "nexus_hub.auto_refresh = off",
    ]);
    cluster.write_key_file(&"ab".repeat(32));
    cluster.start_up();
    let mut client = cluster.connect("postgres");
    as_the_guide_knows_it(&mut client);
    let psql = |arguments: &[&str], directory: &Path| {
        let output = Command::new("psql")
            .args(["--no-psqlrc", "--csv", "--set", "ON_ERROR_STOP=1", "--dbname", "postgres"])
            .args(arguments)
            .envs(cluster.environment())
            .current_dir(directory)
            .output()
            .expect("psql");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !errors.contains("ERROR"), "{errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let directory = std::env::temp_dir().join(format!("nexus_hub_guide_{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a folder");
    // The guide restores a table from a backup that somebody has made.
    psql(&["--command", "\\copy user_servers TO 'user_servers_backup.csv' CSV HEADER"], &directory);
    let before: String = value(&mut client, "SELECT u::text FROM user_servers u");
    cluster.write_key_file(&format!("{}\n{}\n", "cd".repeat(32), "ab".repeat(32)));
    cluster.pg_ctl(&["reload"]);
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guide/operational_guide.sql");
    let text = psql(&["--file", &guide.display().to_string()], &directory);
    std::fs::remove_dir_all(&directory).expect("the folder");
    for told in [
        // rotate_vault_key, the schedule, and the two cleanups by hand.
        "servers_updated,errors\n1,{}",
        "0 2 * * *,SELECT cleanup_old_job_results()",
        "deleted_completed,deleted_orphaned,total_deleted\n1,0,1",
        // The size of the job table, its growth, the caches, and who is over a limit.
        "total_jobs,completed,failed,pending,running,older_than_7_days,table_size,table_data_size,indexes_size\n3,1,1,0,1,0,",
        "date,jobs_created,completed,failed\n",
        "active_cached_tools,expired_tools,unique_servers_cached\n1,2,1",
        "server_id,violations,last_violation\ndocs,1,",
        // The encrypted config, and the job that is stuck.
        "id,encrypted_length\n",
        "id,job_type,server_id,created_at,status\n",
        "schemaname,tablename,size\npublic,",
    ] {
        assert!(text.contains(told), "{told:?} is not in:\n{text}");
    }
    let stuck = "SELECT status || ' ' || (completed_at IS NOT NULL) FROM job_results WHERE created_at < now() - interval '150 minutes'";
    assert_eq!(value::<String>(&mut client, stuck), "cancelled true");
    let after: String = value(&mut client, "SELECT u::text FROM user_servers u");
    assert_eq!(after.split(',').take(4).collect::<Vec<_>>(), before.split(',').take(4).collect::<Vec<_>>());
    let opened = "SELECT decrypt_config(config_encrypted) -> 'headers' ->> 'Authorization' FROM user_servers";
    assert_eq!(value::<String>(&mut client, opened), "Bearer s3cr3t", "the table that was restored can be used");
    // Of the sister systems' runbooks.
    client.batch_execute("SELECT * FROM system_health_summary").expect("system_health_summary");
}
