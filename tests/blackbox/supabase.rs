//! Supabase: its client library and PostgREST in front of the API, and what errors are as HTTP.

use crate::support::*;
use postgres::Client;
use serde_json::json;
use std::process::Command;

fn token(client: &mut Client, role: &str, user: &str) -> String {
    bearer(client, role, user).trim_start_matches("Bearer ").to_owned()
}

#[test]
fn supabase_js_serves_the_back_end_and_each_user_the_own_and_anon_nothing() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let api = PostgRest::start(&database, &[]);
    let mut client = database.connect();
    let tokens = [("authenticated", ALICE), ("authenticated", BOB), ("service_role", "")];
    let tokens = tokens.map(|(role, user)| token(&mut client, role, user));
    let modules = build_dir().parent().expect("target").join("npm/node_modules");
    let output = Command::new("node")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/npm/supabase.mjs"))
        .args([&modules.display().to_string(), &format!("http://127.0.0.1:{}", api.port()), ALICE])
        .args(tokens)
        .arg(server.config().to_string())
        .output()
        .expect("node");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout == b"all is well\n", "{errors}");
}

#[test]
fn errors_have_the_http_status_of_their_kind() {
    let database = shared().database();
    let api = PostgRest::start(&database, &[]);
    let mut client = database.connect();
    let service = bearer(&mut client, "service_role", ALICE);
    let user = bearer(&mut client, "authenticated", ALICE);
    add_server(&mut client, "there", json!({"url": "https://host.example/mcp"}));
    let large = "x".repeat(70_000);
    let cases = [
        // A bad argument, and a ciphertext that is none, or that no key opens.
        (
            &user,
            "add_server",
            json!({"p_server_id": "", "p_name": "n", "p_config": {"url": "https://host.example/"}}),
            "22023",
            400,
        ),
        (&service, "decrypt_token", json!({"encrypted": "\\x00"}), "22023", 400),
        (&service, "decrypt_token", json!({"encrypted": format!("\\x{}", "00".repeat(40))}), "22000", 400),
        // Not allowed, and denied by the egress policy.
        (&user, "encrypt_token", json!({"token": "t"}), "42501", 403),
        (
            &user,
            "add_server",
            json!({"p_server_id": "s", "p_name": "n", "p_config": {"url": "https://10.0.0.1/"}}),
            "42501",
            403,
        ),
        // Twice, and too large.
        (
            &user,
            "add_server",
            json!({"p_server_id": "there", "p_name": "n", "p_config": {"url": "https://host.example/"}}),
            "23505",
            409,
        ),
        (
            &user,
            "add_server",
            json!({"p_server_id": "s", "p_name": "n", "p_config": {"url": "https://host.example/", "note": large}}),
            "54000",
            413,
        ),
    ];
    for (who, function, arguments, code, status) in cases {
        let answer = api.ask("POST", &format!("/rpc/{function}"), &[("Authorization", who)], &arguments.to_string());
        let told = answer.body["code"].as_str().unwrap_or_default();
        assert_eq!((told, answer.status), (code, status), "{function} {}", answer.body);
    }
    // Without a token it is another status: who are you?
    let answer = api.ask("POST", "/rpc/list_servers", &[], "{}");
    assert_eq!((&answer.body["code"], answer.status), (&json!("42501"), 401));
    // A vault without a key.
    let cluster = Cluster::start(&["nexus_hub.vault_key_file = ''"]);
    let database = cluster.database();
    let api = PostgRest::start(&database, &[]);
    let answer = api.ask("POST", "/rpc/encrypt_token", &[("Authorization", &service)], r#"{"token": "t"}"#);
    assert_eq!((&answer.body["code"], answer.status), (&json!("F0000"), 500), "{}", answer.body);
    assert!(answer.body["hint"].as_str().is_some_and(|hint| hint.contains("vault_key_file")), "{}", answer.body);
}
