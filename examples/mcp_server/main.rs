//! A small real MCP server, for the demo and the tests.
//!
//! ```text
//! cargo run --example mcp_server -- --token s3cret [--port 8931]
//! ```
//!
//! It speaks MCP over streamable HTTP at `/mcp` on 127.0.0.1: the stateless protocol of 2026-07-28
//! as well as the older `initialize` handshake with sessions. The first line on stdout says where:
//! `listening on http://127.0.0.1:PORT/mcp`. SIGTERM or ctrl-c ends it.
//!
//! - tools: `add` {a, b}; `echo` {text}; `slow` {ms, steps?}, which reports progress; `fail` {message}
//! - resource: `note://welcome`; prompt: `greet` {name}
//!
//! Flags: `--port N` (0, the default, takes a free one); `--token T`, the bearer token that `/mcp`
//! requires, or `--no-auth`; `--legacy`, to be a server of 2025 that knows nothing but sessions.
//!
//! Without the token, so that a test can look at the server from behind:
//!
//! - `GET /stats`: what has arrived at `/mcp` so far, as JSON; `posts` counts refused ones, too
//! - `POST /forget`: end all sessions; the next request in one of them gets a 404

mod offer;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::error::Error;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, server::conn::http1};
use hyper_util::rt::TokioIo;
use offer::Offer;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

const MAX_BODY: usize = 4 << 20;
const KEYS_KEPT: usize = 100;

type Body = BoxBody<Bytes, Infallible>;

#[derive(Default)]
struct Stats {
    initialize: u64,
    discover: u64,
    tool_calls: u64,
    posts: u64,
    cancelled: u64,
    idempotency_keys: VecDeque<String>,
}

struct App {
    /// None: no token needed.
    token: Option<String>,
    legacy: bool,
    sessions: Arc<LocalSessionManager>,
    mcp: StreamableHttpService<Offer, LocalSessionManager>,
    stats: Mutex<Stats>,
}

impl App {
    async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        match (request.method(), request.uri().path()) {
            (_, "/mcp") => self.mcp(request).await,
            (&Method::GET, "/stats") => {
                let s = self.stats();
                let stats = json!({
                    "initialize": s.initialize, "discover": s.discover, "tool_calls": s.tool_calls,
                    "posts": s.posts, "idempotency_keys": s.idempotency_keys, "cancelled": s.cancelled,
                    "asleep": offer::ASLEEP.load(SeqCst), "most_asleep": offer::MOST_ASLEEP.load(SeqCst),
                });
                reply(StatusCode::OK, &stats)
            }
            (&Method::POST, "/forget") => {
                let sessions = std::mem::take(&mut *self.sessions.sessions.write().await);
                for session in sessions.values() {
                    // One that has ended by itself meanwhile is as good.
                    let _ = session.close().await;
                }
                reply(StatusCode::OK, &json!({"forgotten": sessions.len()}))
            }
            _ => reply(StatusCode::NOT_FOUND, &json!({"error": "not found"})),
        }
    }

    async fn mcp(&self, request: Request<Incoming>) -> Response<Body> {
        if request.method() == Method::POST {
            let mut stats = self.stats();
            stats.posts += 1;
            if let Some(key) = request.headers().get("idempotency-key") {
                let key = String::from_utf8_lossy(key.as_bytes()).into_owned();
                stats.idempotency_keys.push_back(key);
                if stats.idempotency_keys.len() > KEYS_KEPT {
                    stats.idempotency_keys.pop_front();
                }
            }
        }
        if let Some(token) = &self.token {
            let given = request.headers().get(AUTHORIZATION);
            if given.is_none_or(|given| given.as_bytes() != format!("Bearer {token}").as_bytes()) {
                return unauthorized(given.is_some());
            }
        }
        let (parts, body) = request.into_parts();
        let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
            let error = json!({"error": "the body is too large, or was cut off"});
            return reply(StatusCode::PAYLOAD_TOO_LARGE, &error);
        };
        let body = body.to_bytes();
        let message: Value = serde_json::from_slice(&body).unwrap_or_default();
        match message["method"].as_str() {
            Some("initialize") => self.stats().initialize += 1,
            Some("tools/call") => self.stats().tool_calls += 1,
            Some("notifications/cancelled") => self.stats().cancelled += 1,
            Some("server/discover") => {
                self.stats().discover += 1;
                if self.legacy {
                    let error = json!({"code": -32601, "message": "Method not found"});
                    let answer = json!({"jsonrpc": "2.0", "id": message["id"], "error": error});
                    return reply(StatusCode::OK, &answer);
                }
            }
            _ => {}
        }
        self.mcp.handle(Request::from_parts(parts, Full::new(body))).await
    }

    fn stats(&self) -> MutexGuard<'_, Stats> {
        // Counters are right at any point, also where a panic has left them.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn reply(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Full::from(body.to_string()).boxed());
    *response.status_mut() = status;
    set(&mut response, CONTENT_TYPE, "application/json");
    response
}

fn unauthorized(token_given: bool) -> Response<Body> {
    let (text, challenge) = if token_given {
        ("the bearer token is wrong", r#"Bearer realm="mcp", error="invalid_token""#)
    } else {
        ("a bearer token is required", r#"Bearer realm="mcp""#)
    };
    let body = json!({"error": "unauthorized", "error_description": text});
    let mut response = reply(StatusCode::UNAUTHORIZED, &body);
    set(&mut response, WWW_AUTHENTICATE, challenge);
    response
}

fn set(response: &mut Response<Body>, name: HeaderName, value: &'static str) {
    response.headers_mut().insert(name, HeaderValue::from_static(value));
}

async fn connection(app: Arc<App>, stream: TcpStream) {
    // Answers are small and somebody waits for each.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| async { Ok::<_, Infallible>(app.handle(request).await) });
    // An error here is a client that hung up.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mcp_server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(arg: Option<String>) -> Result<u16, &'static str> {
    arg.and_then(|arg| arg.parse().ok()).ok_or("--port needs a number")
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let (mut port, mut token, mut no_auth, mut legacy) = (0u16, None, false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--port" => port = number(args.next())?,
            "--token" => token = Some(args.next().ok_or("--token needs a value")?),
            "--no-auth" => no_auth = true,
            "--legacy" => legacy = true,
            _ => return Err(format!("unknown argument: {arg}").into()),
        }
    }
    if token.is_some() == no_auth {
        return Err("either --token T or --no-auth is needed".into());
    }

    let sessions = Arc::new(LocalSessionManager::default());
    let config = StreamableHttpServerConfig::default();
    let open_streams = config.cancellation_token.clone();
    let mcp = StreamableHttpService::new(move || Ok(Offer { legacy }), sessions.clone(), config);
    let app = Arc::new(App { token, legacy, sessions, mcp, stats: Mutex::default() });

    // Before the first line, so that who has read it can send the signal.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on http://{}/mcp", listener.local_addr()?)?;
    stdout.flush()?;

    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::spawn(connection(app.clone(), stream))),
                Err(error) => {
                    // Most likely out of file descriptors: better later than never.
                    eprintln!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    open_streams.cancel();
    Ok(())
}
