//! A real Prometheus.

use super::server::Process;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Prometheus, configured as `monitoring/prometheus.yml` says.
pub struct Prometheus {
    process: Option<Process>,
    port: u16,
    dir: PathBuf,
}

impl Prometheus {
    /// Starts one that reads the metrics of a PostgREST on this port every second.
    pub fn start(postgrest: u16, token: &str) -> Self {
        let name = format!("nexus_hub_prometheus.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).expect("a folder");
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/monitoring");
        let text = std::fs::read_to_string(format!("{example}/prometheus.yml")).expect("the example");
        let changes = [
            ("scrape_interval: 15s", "scrape_interval: 1s".to_owned()),
            ("- nexus_hub.rules.yml", format!("- {example}/nexus_hub.rules.yml")),
            ("/etc/prometheus/nexus_hub.jwt", dir.join("jwt").display().to_string()),
            ("postgrest.internal:3000", format!("127.0.0.1:{postgrest}")),
        ];
        let config = changes.iter().fold(text, |text, (from, to)| {
            assert!(text.contains(from), "the example has no {from}");
            text.replace(from, to)
        });
        std::fs::write(dir.join("prometheus.yml"), config).expect("write");
        std::fs::write(dir.join("jwt"), token).expect("write");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus");
        Self { process: Some(Process(child)), port, dir }
    }

    /// The value of a query with one answer; none as long as there is no answer.
    pub fn query(&self, query: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let form: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let head =
            "POST /api/v1/query HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\nquery={form}", form.len() + 6).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let answer: Value = serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()?;
        answer["data"]["result"].as_array()?.first()?["value"][1].as_str().map(str::to_owned)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.process.take();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
