//! What the tests stand on: clusters, databases, servers to call, and waiting.

mod cluster;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod postgrest;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod prometheus;
mod server;

pub use cluster::{Cluster, Database, shared};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use postgrest::{PostgRest, bearer};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use prometheus::Prometheus;
pub use server::{Answer, EverythingServer, FakeServer, Gate, McpServer, RawServer, TOKEN, read_request};

use postgres::Client;
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest time any condition may take to come true. Only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(300);

/// A user, and another one.
pub const ALICE: &str = "a11ce000-0000-4000-8000-000000000001";
pub const BOB: &str = "b0b00000-0000-4000-8000-000000000002";

/// A port of this machine that nobody listens on, and nobody is given as long as this is there.
pub struct ClosedPort(tokio::net::TcpSocket);

impl ClosedPort {
    pub fn reserve() -> Self {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        // So that a server can be started on it later.
        socket.set_reuseaddr(true).expect("SO_REUSEADDR");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
        Self(socket)
    }

    pub fn address(&self) -> std::net::SocketAddr {
        self.0.local_addr().expect("an address")
    }
}

/// Waits until a condition is true; panics with `what` when it never is.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The folder that cargo builds into, such as target/debug.
pub fn build_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.ancestors().nth(2).expect("target/<profile>/deps/<test>").to_owned()
}

/// A finished job.
#[derive(Debug)]
pub struct Job {
    pub status: String,
    pub result: Option<Value>,
    pub error: Option<String>,
}

impl Job {
    /// The result of a job that must have completed.
    pub fn completed(self) -> Value {
        assert_eq!(self.status, "completed", "{self:?}");
        assert_eq!(self.error, None);
        self.result.expect("a completed job has a result")
    }

    /// The error of a job that must have failed.
    pub fn failed(self) -> String {
        assert_eq!(self.status, "failed", "{self:?}");
        self.error.expect("a failed job has an error")
    }
}

/// Creates a job and returns its id.
pub fn create_job(client: &mut Client, job_type: &str, server: &str, tool: Option<&str>, params: Value) -> Uuid {
    let user: Uuid = ALICE.parse().expect("a uuid");
    client
        .query_one("SELECT create_job($1, $2, $3, $4, $5)", &[&user, &job_type, &server, &tool, &params])
        .expect("create_job")
        .get(0)
}

/// Waits for a job to finish.
pub fn wait_for_job(client: &mut Client, job: Uuid) -> Job {
    let row =
        client.query_one("SELECT status, result, error FROM wait_for_job($1, 300000)", &[&job]).expect("wait_for_job");
    let job = Job { status: row.get(0), result: row.get(1), error: row.get(2) };
    assert!(!matches!(job.status.as_str(), "pending" | "running"), "never finished: {job:?}");
    job
}

/// Creates a job and waits for it.
pub fn run_job(client: &mut Client, job_type: &str, server: &str, tool: Option<&str>, params: Value) -> Job {
    let job = create_job(client, job_type, server, tool, params);
    wait_for_job(client, job)
}

/// Runs a plain HTTP job, with a single attempt.
pub fn run_http(client: &mut Client, params: Value) -> Job {
    let job = client
        .query_one(
            "INSERT INTO job_results (job_type, params, max_attempts) VALUES ('http_request', $1, 1) RETURNING id",
            &[&params],
        )
        .expect("a plain INSERT is enough")
        .get(0);
    wait_for_job(client, job)
}

/// Adds a server for [`ALICE`].
pub fn add_server(client: &mut Client, name: &str, config: Value) -> Uuid {
    let user: Uuid = ALICE.parse().expect("a uuid");
    client.query_one("SELECT add_server($1, $1, $2, $3)", &[&name, &config, &user]).expect("add_server").get(0)
}

/// The SQLSTATE and message of a statement that must fail.
pub fn error_of(client: &mut Client, statement: &str) -> (String, String) {
    let error = client.batch_execute(statement).expect_err("the statement should fail");
    let error = error.as_db_error().unwrap_or_else(|| panic!("no SQL error: {error}"));
    (error.code().code().to_owned(), error.message().to_owned())
}

/// The one value of a query.
pub fn value<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, query: &str) -> T {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error}")).get(0)
}

/// How many jobs are in a state.
pub fn count_jobs(client: &mut Client, status: &str) -> i64 {
    client.query_one("SELECT count(*) FROM job_results WHERE status = $1", &[&status]).expect("count").get(0)
}
