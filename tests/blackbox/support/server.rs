//! Servers for jobs to call.

use super::{build_dir, wait_until};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A process that is ended with the value.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The example's MCP server, written with the same library as the worker.
pub struct McpServer {
    _process: Process,
    pub url: String,
}

pub const TOKEN: &str = "demo-token-5up3r-s3cr3t";

impl McpServer {
    /// Starts one that wants [`TOKEN`]; with "--legacy" it speaks only the older protocol.
    pub fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(build_dir().join("examples/mcp_server"))
            .args(["--token", TOKEN])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .expect("examples/mcp_server: run `make example`");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its first line");
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("unexpected: {line}")).to_owned();
        Self { _process: Process(child), url }
    }

    /// A config with the right token.
    pub fn config(&self) -> Value {
        serde_json::json!({"url": self.url, "headers": {"Authorization": format!("Bearer {TOKEN}")}})
    }

    /// What the server has counted.
    pub fn stats(&self) -> Value {
        serde_json::from_str(&self.ask("GET", "/stats")).expect("JSON")
    }

    /// Makes the server forget its sessions.
    pub fn forget_sessions(&self) {
        self.ask("POST", "/forget");
    }

    fn ask(&self, method: &str, path: &str) -> String {
        let authority = self.url.trim_start_matches("http://").trim_end_matches("/mcp");
        let mut stream = TcpStream::connect(authority).expect("connect");
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .expect("send");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("receive");
        answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
    }
}

/// The reference server of the MCP project.
pub struct EverythingServer {
    _process: Process,
    pub url: String,
}

impl EverythingServer {
    pub fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let target = build_dir().parent().expect("target").to_owned();
        let program = target.join("npm/node_modules/@modelcontextprotocol/server-everything/dist/index.js");
        assert!(program.exists(), "{} is missing: run `make test` once", program.display());
        let child = Command::new("node")
            .arg(program)
            .arg("streamableHttp")
            .env("PORT", port.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("node");
        let process = Process(child);
        wait_until("server-everything listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { _process: process, url: format!("http://127.0.0.1:{port}/mcp") }
    }
}

/// What a [`FakeServer`] answers.
pub struct Answer {
    pub status: &'static str,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: &'static str, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: vec![("Content-Type", content_type.to_owned())], body: body.into() }
    }

    pub fn json(body: &str) -> Self {
        Self::new("200 OK", "application/json", body)
    }
}

/// An HTTP server that answers as a closure says. The closure gets the head and the body of each request, and may block.
pub struct FakeServer {
    pub url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeServer {
    pub fn start(answer: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", answer)
    }

    /// Starts one at an address of the test's choice.
    pub fn start_at(address: &str, answer: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &seen, &*answer));
            }
        });
        Self { url, requests }
    }

    /// All requests so far, each with head and body as they came.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("not poisoned").clone()
    }
}

/// Answers one request after the other; closes without an answer when there is none to give.
fn serve(mut stream: TcpStream, seen: &Mutex<Vec<String>>, answer: &(impl Fn(&str) -> Option<Answer> + ?Sized)) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    while let Some(request) = read_request(&mut stream) {
        seen.lock().expect("not poisoned").push(request.clone());
        let Some(answer) = answer(&request) else { return };
        let mut head = format!("HTTP/1.1 {}\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        // In one piece, or the second would wait for the first to be acknowledged.
        let bytes = [head.as_bytes(), &answer.body].concat();
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Reads one request, head and body; `None` when the other side has closed.
pub fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| {
                    line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok()
                })
                .unwrap_or(0);
            if body.len() >= length {
                return Some(text.into_owned());
            }
        }
        match stream.read(&mut chunk) {
            Ok(length) if length > 0 => bytes.extend_from_slice(&chunk[..length]),
            _ => return None,
        }
    }
}

/// A server that hands each connection to a closure, to misbehave on. A connection is closed when the closure returns.
pub struct RawServer {
    pub url: String,
    connections: Arc<AtomicUsize>,
}

impl RawServer {
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, serve) = (Arc::clone(&connections), Arc::new(serve));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || {
                    let _ = stream.set_nodelay(true);
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
                    let _ = stream.set_write_timeout(Some(Duration::from_secs(60)));
                    serve(stream);
                });
            }
        });
        Self { url, connections }
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Opens for good when told to.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().expect("not poisoned") = true;
        self.0.1.notify_all();
    }

    /// Waits until it is open.
    pub fn pass(&self) {
        let mut open = self.0.0.lock().expect("not poisoned");
        while !*open {
            open = self.0.1.wait(open).expect("not poisoned");
        }
    }

    /// A server that answers nobody before it is open.
    pub fn server(&self) -> FakeServer {
        let gate = self.clone();
        FakeServer::start(move |_| {
            gate.pass();
            Some(Answer::json("{}"))
        })
    }
}
