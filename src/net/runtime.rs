//! The network thread: a tokio runtime that takes requests in and gives outcomes back.

use super::endpoint::Endpoint;
use super::failure::{Failure, quote};
use super::http::{self, HttpCall};
use super::mcp::{self, McpCall, Sessions};
use super::outcome::{Outcome, Verdict};
use crate::domain::secret::{Secret, redact};
use futures::FutureExt;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::mpsc as async_mpsc;
use uuid::Uuid;

/// How often idle sessions are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// What a call may take beyond its time-out, for the library to tell the server that it is off.
const GRACE: Duration = Duration::from_millis(200);

/// A job's request.
#[derive(Debug)]
pub struct Request {
    pub job: Uuid,
    /// The lease that the job was claimed under; comes back with the outcome.
    pub lease: Uuid,
    pub timeout: Duration,
    pub work: Work,
}

/// What a job asks for.
#[derive(Debug)]
pub enum Work {
    Http(HttpCall),
    Mcp { endpoint: Endpoint, call: McpCall },
}

/// Limits that can change while the thread runs.
#[derive(Debug)]
pub struct Limits {
    max_in_flight: AtomicUsize,
    max_response_bytes: AtomicUsize,
    session_idle_timeout_ms: AtomicUsize,
}

impl Limits {
    pub fn new(max_in_flight: usize, max_response_bytes: usize, session_idle_timeout: Duration) -> Self {
        let limits = Self { max_in_flight: 0.into(), max_response_bytes: 0.into(), session_idle_timeout_ms: 0.into() };
        limits.set(max_in_flight, max_response_bytes, session_idle_timeout);
        limits
    }

    /// Takes effect for what begins from now on.
    pub fn set(&self, max_in_flight: usize, max_response_bytes: usize, session_idle_timeout: Duration) {
        self.max_in_flight.store(max_in_flight.max(1), SeqCst);
        self.max_response_bytes.store(max_response_bytes, SeqCst);
        self.session_idle_timeout_ms.store(session_idle_timeout.as_millis() as usize, SeqCst);
    }

    pub fn max_in_flight(&self) -> usize {
        self.max_in_flight.load(SeqCst)
    }

    pub fn max_response_bytes(&self) -> usize {
        self.max_response_bytes.load(SeqCst)
    }

    fn session_idle_timeout(&self) -> Duration {
        Duration::from_millis(self.session_idle_timeout_ms.load(SeqCst) as u64)
    }
}

/// The handle of the thread that owns PostgreSQL to the one that owns the network.
pub struct Net {
    requests: async_mpsc::UnboundedSender<Request>,
    outcomes: mpsc::Receiver<Outcome>,
    wake: UnixStream,
    woken: Arc<AtomicBool>,
}

impl Net {
    /// Starts the thread. Signals must be blocked, so that it never runs a handler of its process.
    pub fn start(limits: Arc<Limits>) -> std::io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // An error means that another library of the process has chosen one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = http::client(limits.max_in_flight()).map_err(std::io::Error::other)?;
        let (requests, incoming) = async_mpsc::unbounded_channel();
        let (finished, outcomes) = mpsc::channel();
        let woken = Arc::new(AtomicBool::new(false));
        let reporter = Reporter { finished, waker: Arc::new(waker), woken: Arc::clone(&woken) };
        std::thread::Builder::new()
            .name("nexus_hub net".into())
            .spawn(move || runtime.block_on(serve(incoming, client, limits, reporter)))?;
        Ok(Self { requests, outcomes, wake, woken })
    }

    /// Hands a request over. `false`: the thread is gone.
    pub fn send(&self, request: Request) -> bool {
        self.requests.send(request).is_ok()
    }

    /// The next outcome, if there is one. `Err`: the thread is gone.
    pub fn next_outcome(&self) -> Result<Option<Outcome>, ThreadGone> {
        match self.outcomes.try_recv() {
            Ok(outcome) => Ok(Some(outcome)),
            Err(mpsc::TryRecvError::Empty) => Ok(None),
            Err(mpsc::TryRecvError::Disconnected) => Err(ThreadGone),
        }
    }

    /// Readable when there are outcomes.
    pub fn wake_descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the descriptor quiet again. Outcomes that come after this call make it readable anew.
    pub fn acknowledge_wake(&self) {
        let mut buffer = [0; 64];
        while matches!((&self.wake).read(&mut buffer), Ok(length) if length > 0) {}
        self.woken.store(false, SeqCst);
    }
}

/// The network thread has ended, which it never should.
#[derive(Debug)]
pub struct ThreadGone;

#[derive(Clone)]
struct Reporter {
    finished: mpsc::Sender<Outcome>,
    waker: Arc<UnixStream>,
    woken: Arc<AtomicBool>,
}

impl Reporter {
    fn report(&self, outcome: Outcome) {
        if self.finished.send(outcome).is_err() {
            return;
        }
        // One byte per acknowledgement is enough, however many outcomes there are.
        if !self.woken.swap(true, SeqCst) {
            match (&*self.waker).write(&[1]) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => self.woken.store(false, SeqCst),
                _ => {}
            }
        }
    }
}

async fn serve(
    mut incoming: async_mpsc::UnboundedReceiver<Request>,
    client: reqwest::Client,
    limits: Arc<Limits>,
    reporter: Reporter,
) {
    let sessions = Arc::new(Sessions::new(client.clone(), Arc::clone(&limits)));
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            request = incoming.recv() => {
                let Some(request) = request else { return };
                let (client, limits) = (client.clone(), Arc::clone(&limits));
                let (sessions, reporter) = (Arc::clone(&sessions), reporter.clone());
                tokio::spawn(async move {
                    let (job, lease) = (request.job, request.lease);
                    let verdict = AssertUnwindSafe(run(request, &client, &limits, &sessions))
                        .catch_unwind()
                        .await
                        .unwrap_or_else(|_| Failure::Internal("the job's code panicked".into()).into());
                    reporter.report(Outcome { job, lease, verdict });
                });
            }
            _ = sweep.tick() => {
                let (sessions, time) = (Arc::clone(&sessions), limits.session_idle_timeout());
                tokio::spawn(async move { sessions.close_idle(time).await });
            }
        }
    }
}

/// Runs one request within its time, and keeps its secrets out of the error.
async fn run(request: Request, client: &reqwest::Client, limits: &Limits, sessions: &Sessions) -> Verdict {
    let Request { job, timeout, work, .. } = request;
    match work {
        Work::Http(call) => {
            let work = call.perform(client, job, limits.max_response_bytes());
            let verdict = tokio::time::timeout(timeout, work).await.unwrap_or(Err(Failure::Timeout(timeout)));
            without_secrets(verdict, &call.secrets())
        }
        Work::Mcp { endpoint, call } => {
            let work = mcp::perform(sessions, &endpoint, call, job, timeout);
            let verdict = tokio::time::timeout(timeout + GRACE, work).await.unwrap_or(Err(Failure::Timeout(timeout)));
            without_secrets(verdict, &endpoint.secrets())
        }
    }
}

/// Redacted before it is cut to its length: half a secret at the cut would not be found.
fn without_secrets(verdict: Result<Verdict, Failure>, secrets: &[Secret]) -> Verdict {
    match verdict.unwrap_or_else(Verdict::from) {
        Verdict::Failed { error, result } => Verdict::Failed { error: quote(&redact(&error, secrets)), result },
        completed => completed,
    }
}
