//! The pgTAP suites under tests/sql, each with the extension in `public` and in a schema whose name needs quotes.

use crate::support::*;
use std::path::Path;
use std::process::Command;

fn run_suites(schema: &str) {
    let suites = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sql");
    let mut files: Vec<_> = std::fs::read_dir(&suites)
        .expect("tests/sql")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        let database = shared().empty_database();
        database
            .connect()
            .batch_execute(&format!(
                "CREATE SCHEMA IF NOT EXISTS \"{schema}\"; CREATE EXTENSION nexus_hub SCHEMA \"{schema}\";
                 CREATE SCHEMA pgtap; GRANT USAGE ON SCHEMA pgtap TO PUBLIC; CREATE EXTENSION pgtap SCHEMA pgtap;
                 GRANT USAGE ON SCHEMA \"{schema}\" TO anon"
            ))
            .expect("CREATE EXTENSION");
        let output = Command::new("pg_prove")
            .args(["--dbname", &database.name, "--set", &format!("schema={schema}"), "--failures"])
            .arg(&file)
            .envs(shared().environment())
            .env("PGOPTIONS", "-c client_min_messages=warning")
            .output()
            .expect("pg_prove");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("Result: PASS"),
            "{} in schema {schema}:\n{text}{}",
            file.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn the_sql_surface_holds_in_schema_public() {
    run_suites("public");
}

#[test]
fn the_sql_surface_holds_in_a_schema_of_another_name() {
    run_suites("hub API");
}
