//! The network thread: a tokio runtime that takes requests in and gives outcomes back.

use super::endpoint::Endpoint;
use super::failure::Failure;
use super::http::HttpCall;
use super::mcp::{self, McpCall, Sessions};
use super::outbound::Outbound;
use super::outcome::{Ending, Outcome};
use super::redaction::{with_redacted_result, without_secrets};
use super::template::Hidden;
use crate::domain::redact::Redactor;
use futures::FutureExt;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, mpsc};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc, oneshot};
use uuid::Uuid;

/// How often idle sessions are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// What a call may take beyond its time-out, for the library to tell the server that it is off.
const GRACE: Duration = Duration::from_millis(200);
/// Names that are looked up at a time: each takes a thread.
const MAX_RESOLVING: usize = 128;

enum Command {
    Run(Box<Request>),
    /// Break the request of a job off.
    Cancel {
        job: Uuid,
        lease: Uuid,
    },
}

/// A job's request.
#[derive(Debug)]
pub struct Request {
    pub job: Uuid,
    /// The lease that the job was claimed under; comes back with the outcome.
    pub lease: Uuid,
    pub timeout: Duration,
    pub work: Work,
    /// The secrets that were filled in, and what the answer shows in their stead.
    pub hidden: Hidden,
}

/// What a job asks for.
#[derive(Debug)]
pub enum Work {
    Http(HttpCall),
    Mcp { endpoint: Endpoint, call: McpCall },
}

/// What bounds requests and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitValues {
    pub max_in_flight: usize,
    pub max_response_bytes: usize,
    /// Memory for all large answers together.
    pub response_memory: usize,
    pub max_redirects: usize,
    pub session_idle_timeout: Duration,
}

/// Limits that can change while the thread runs: for what begins from then on.
#[derive(Debug)]
pub struct Limits {
    values: RwLock<LimitValues>,
    large_answers: RwLock<Arc<Semaphore>>,
}

impl Limits {
    pub fn new(values: LimitValues) -> Self {
        Self { values: RwLock::new(values), large_answers: RwLock::new(large_answers(&values)) }
    }

    pub fn set(&self, values: LimitValues) {
        let before = self.values();
        *self.values.write().unwrap_or_else(PoisonError::into_inner) = values;
        if (before.response_memory, before.max_response_bytes) != (values.response_memory, values.max_response_bytes) {
            *self.large_answers.write().unwrap_or_else(PoisonError::into_inner) = large_answers(&values);
        }
    }

    fn values(&self) -> LimitValues {
        *self.values.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn max_in_flight(&self) -> usize {
        self.values().max_in_flight
    }

    pub fn max_response_bytes(&self) -> usize {
        self.values().max_response_bytes
    }

    pub fn max_redirects(&self) -> usize {
        self.values().max_redirects
    }

    /// Waits for one of the places for large answers, of which there are as many as fit into the memory.
    pub async fn place_for_large_answer(&self) -> Result<OwnedSemaphorePermit, Failure> {
        let places = Arc::clone(&self.large_answers.read().unwrap_or_else(PoisonError::into_inner));
        places.acquire_owned().await.map_err(|_| Failure::Internal("the places for large answers are gone".into()))
    }
}

fn large_answers(values: &LimitValues) -> Arc<Semaphore> {
    Arc::new(Semaphore::new((values.response_memory / values.max_response_bytes.max(1)).max(1)))
}

/// The handle of the thread that owns PostgreSQL to the one that owns the network.
pub struct Net {
    commands: async_mpsc::UnboundedSender<Command>,
    outcomes: mpsc::Receiver<Outcome>,
    wake: UnixStream,
    woken: Arc<AtomicBool>,
}

impl Net {
    /// Starts the thread. Signals must be blocked, so that it never runs a handler of its process.
    pub fn start(limits: Arc<Limits>, outbound: Arc<Outbound>) -> std::io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(MAX_RESOLVING).build()?;
        let (commands, incoming) = async_mpsc::unbounded_channel();
        let (finished, outcomes) = mpsc::channel();
        let woken = Arc::new(AtomicBool::new(false));
        let reporter = Reporter { finished, waker: Arc::new(waker), woken: Arc::clone(&woken) };
        std::thread::Builder::new()
            .name("nexus_hub net".into())
            .spawn(move || runtime.block_on(serve(incoming, outbound, limits, reporter)))?;
        Ok(Self { commands, outcomes, wake, woken })
    }

    /// Hands a request over. `false`: the thread is gone.
    pub fn send(&self, request: Request) -> bool {
        self.commands.send(Command::Run(Box::new(request))).is_ok()
    }

    /// Has the request of a job broken off. Its outcome may come all the same, or never.
    pub fn cancel(&self, job: Uuid, lease: Uuid) {
        // If the thread is gone, so is the request.
        let _ = self.commands.send(Command::Cancel { job, lease });
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
    mut incoming: async_mpsc::UnboundedReceiver<Command>,
    outbound: Arc<Outbound>,
    limits: Arc<Limits>,
    reporter: Reporter,
) {
    let sessions = Arc::new(Sessions::new(Arc::clone(&outbound), Arc::clone(&limits)));
    let running = Running::default();
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            command = incoming.recv() => match command {
                None => return,
                Some(Command::Cancel { job, lease }) => running.cancel(job, lease),
                Some(Command::Run(request)) => {
                    let (outbound, limits) = (Arc::clone(&outbound), Arc::clone(&limits));
                    let (sessions, reporter, running) = (Arc::clone(&sessions), reporter.clone(), running.clone());
                    let (job, lease) = (request.job, request.lease);
                    let cancelled = running.begin(job, lease);
                    tokio::spawn(async move {
                        let work = AssertUnwindSafe(run(*request, &outbound, &limits, &sessions, cancelled));
                        let ending = work.catch_unwind().await.unwrap_or_else(|_| {
                            Some(Failure::Internal("the job's code panicked".into()).into())
                        });
                        running.end(job, lease);
                        if let Some(ending) = ending {
                            reporter.report(Outcome { job, lease, ending });
                        }
                    });
                }
            },
            _ = sweep.tick() => {
                let (sessions, time) = (Arc::clone(&sessions), limits.values().session_idle_timeout);
                tokio::spawn(async move { sessions.close_idle(time).await });
            }
        }
    }
}

/// How requests are broken off, by job and lease.
type Cancels = HashMap<(Uuid, Uuid), oneshot::Sender<()>>;

/// The requests that can be broken off.
#[derive(Clone, Default)]
struct Running(Arc<Mutex<Cancels>>);

impl Running {
    fn requests(&self) -> MutexGuard<'_, Cancels> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, job: Uuid, lease: Uuid) -> oneshot::Receiver<()> {
        let (cancel, cancelled) = oneshot::channel();
        self.requests().insert((job, lease), cancel);
        cancelled
    }

    fn cancel(&self, job: Uuid, lease: Uuid) {
        if let Some(cancel) = self.requests().remove(&(job, lease)) {
            let _ = cancel.send(());
        }
    }

    fn end(&self, job: Uuid, lease: Uuid) {
        let mut requests = self.requests();
        requests.remove(&(job, lease));
        // After a burst.
        if requests.is_empty() && requests.capacity() > 1024 {
            requests.shrink_to_fit();
        }
    }
}

/// Runs one request within its time, and keeps its secrets out of the error. `None`: it was broken off.
async fn run(
    request: Request,
    outbound: &Outbound,
    limits: &Arc<Limits>,
    sessions: &Sessions,
    cancelled: oneshot::Receiver<()>,
) -> Option<Ending> {
    let Request { job, timeout, work, hidden, .. } = request;
    let redactor = Arc::new(Redactor::new(hidden.iter().map(|(secret, mark)| (secret, mark.as_str()))));
    match work {
        Work::Http(call) => {
            let work = tokio::time::timeout(timeout, call.perform(outbound, job, limits, &redactor));
            tokio::select! {
                ended = work => {
                    let ended = ended.unwrap_or(Err(Failure::Timeout(timeout)));
                    Some(without_secrets(ended, || call.secrets(), &hidden))
                }
                Ok(()) = cancelled => None,
            }
        }
        Work::Mcp { endpoint, call } => {
            // Boxed, or every task would be as large as the largest kind.
            let work = Box::pin(mcp::perform(sessions, &endpoint, call, job, timeout, cancelled));
            let ended = tokio::time::timeout(timeout + GRACE, work).await;
            let mut ended = ended.unwrap_or(Err(Failure::Timeout(timeout))).transpose()?;
            if let Ok(ending) = ended {
                ended = with_redacted_result(ending, &redactor, limits.max_response_bytes()).await;
            }
            Some(without_secrets(ended, || endpoint.secrets(), &hidden))
        }
    }
}
