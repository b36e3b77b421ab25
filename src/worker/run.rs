//! The worker of a database: complete what is done, claim what waits, hand it to the network thread, wait.
//!
//! One short transaction does both, so that many jobs share a commit; no transaction is open while a request is.

use super::assign;
use crate::jobs::queue::{ClaimedJob, Queue};
use crate::net::{Limits, Net, Outcome, Verdict};
use crate::pg::guc::{self, WorkerSettings};
use crate::pg::shmem::{self, WorkerState};
use crate::pg::{bgworker, catalog, transaction};
use pgrx::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

const GONE: i32 = 0;
const RESTART: i32 = 1;
/// How long to wait before a failed transaction is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// How long to wait before a row that a session keeps locked is tried again.
const LOCKED_DELAY: Duration = Duration::from_millis(50);
/// Transactions that may fail in a row before the worker starts anew.
const MAX_FAILURES: u32 = 20;

/// Why a transaction did nothing.
enum Halt {
    /// The extension is not in the database any more, or not the one this worker began with.
    ExtensionGone,
    /// The statement failed.
    Sql(String),
}

struct Worker {
    extension: pg_sys::Oid,
    queue: Queue,
    net: Net,
    limits: Arc<Limits>,
    settings: WorkerSettings,
    /// Jobs that the network thread has.
    in_flight: HashSet<Uuid>,
    /// Outcomes that are not written yet.
    outcomes: Vec<Outcome>,
    /// How many of them could not be written, because a session keeps their rows locked.
    locked: usize,
    /// Whether the last look at the network thread ended with a full batch: there may be more.
    outcomes_due: bool,
    /// Whether there may be pending jobs that no claim has seen.
    claim_due: bool,
    next_poll: Instant,
    failures: u32,
}

/// Runs the worker of a slot until it has to end, and returns its exit code.
pub fn main(slot: usize) -> i32 {
    let Some(database) = shmem::attach_worker(slot) else { return GONE };
    bgworker::start(Some(database));
    bgworker::pin_session_settings();
    let lease = Uuid::new_v4();
    let opened = transaction::run(c"nexus_hub: starting", || {
        let extension = catalog::extension()?;
        // The same lock as in every later transaction: the extension can't go while its functions are looked up.
        if !catalog::hold_extension(extension) {
            return None;
        }
        Some(
            Queue::open(lease).and_then(|queue| queue.release_abandoned().map(|released| (extension, queue, released))),
        )
    });
    let (extension, queue, released) = match opened {
        Ok(Some(Ok(opened))) => opened,
        Ok(None) => {
            shmem::set_worker_state(WorkerState::NoExtension);
            return GONE;
        }
        Ok(Some(Err(problem))) => {
            log!("nexus_hub: the worker could not start: {problem}");
            return RESTART;
        }
        Err(problem) => {
            log!("nexus_hub: the worker could not start: {problem}");
            return RESTART;
        }
    };
    if released > 0 {
        log!("nexus_hub: gave back {released} jobs of a worker that is gone");
    }
    let settings = guc::worker_settings();
    let limits =
        Arc::new(Limits::new(settings.max_in_flight, settings.max_response_bytes, settings.session_idle_timeout));
    let net = match bgworker::with_signals_blocked(|| Net::start(Arc::clone(&limits))) {
        Ok(net) => net,
        Err(problem) => {
            log!("nexus_hub: could not start the network thread: {problem}");
            return RESTART;
        }
    };
    // From here on commits wake this worker. What was committed before is found by the first claim.
    shmem::set_worker_state(WorkerState::Running);
    let now = Instant::now();
    Worker {
        extension,
        queue,
        net,
        limits,
        settings,
        in_flight: HashSet::new(),
        outcomes: Vec::new(),
        locked: 0,
        outcomes_due: false,
        claim_due: true,
        next_poll: now + settings.poll_interval,
        failures: 0,
    }
    .work()
}

impl Worker {
    fn work(mut self) -> i32 {
        loop {
            if bgworker::stop_requested() || shmem::leave_requested() {
                return self.finish();
            }
            bgworker::handle_interrupts();
            if bgworker::reload_configuration() {
                self.take_settings();
            }
            if self.collect().is_err() {
                log!("nexus_hub: the network thread is gone");
                return RESTART;
            }
            match self.step() {
                Ok(()) => self.failures = 0,
                Err(Halt::ExtensionGone) => {
                    shmem::set_worker_state(WorkerState::NoExtension);
                    return GONE;
                }
                Err(Halt::Sql(problem)) => {
                    self.failures += 1;
                    log!("nexus_hub: a transaction of the worker failed and is tried again: {problem}");
                    if self.failures >= MAX_FAILURES {
                        return RESTART;
                    }
                    self.claim_due = true;
                    // Not woken by the network thread, or it would be no delay.
                    bgworker::wait(None, RETRY_DELAY);
                    continue;
                }
            }
            self.wait();
        }
    }

    /// Takes what the network thread has finished, up to a batch.
    fn collect(&mut self) -> Result<(), crate::net::ThreadGone> {
        self.net.acknowledge_wake();
        // Not counting the locked ones, or a batch of them would keep all others out.
        while self.outcomes.len() - self.locked < self.settings.batch_size {
            let Some(outcome) = self.net.next_outcome()? else {
                self.outcomes_due = false;
                return Ok(());
            };
            self.in_flight.remove(&outcome.job);
            self.outcomes.push(outcome);
        }
        // Acknowledged but not taken: nobody will wake this thread for these.
        self.outcomes_due = true;
        Ok(())
    }

    /// One transaction: writes outcomes, claims jobs, and sends them off once it has committed.
    fn step(&mut self) -> Result<(), Halt> {
        let now = Instant::now();
        let poll = now >= self.next_poll;
        let room = self.settings.max_in_flight.saturating_sub(self.in_flight.len());
        let limit = if self.claim_due || poll { room.min(self.settings.batch_size) } else { 0 };
        if self.outcomes.is_empty() && limit == 0 && !poll {
            return Ok(());
        }
        let (extension, queue, outcomes) = (self.extension, &self.queue, &self.outcomes);
        let done = transaction::run(c"nexus_hub: completing and claiming jobs", || {
            if !catalog::hold_extension(extension) {
                return None;
            }
            Some((|| {
                if poll {
                    queue.release_abandoned()?;
                }
                let later = if outcomes.is_empty() { Vec::new() } else { queue.complete(outcomes)? };
                let claimed = if limit > 0 { queue.claim(limit)? } else { Vec::new() };
                Ok::<_, pgrx::spi::SpiError>((later, claimed))
            })())
        });
        let (later, claimed) = match done {
            Ok(Some(Ok(done))) => done,
            Ok(None) => return Err(Halt::ExtensionGone),
            Ok(Some(Err(problem))) => return Err(Halt::Sql(problem.to_string())),
            Err(problem) => return Err(Halt::Sql(problem)),
        };
        if !self.outcomes.is_empty() {
            shmem::announce_finished_jobs();
        }
        self.outcomes.retain(|outcome| later.contains(&outcome.job));
        self.locked = self.outcomes.len();
        if poll {
            self.next_poll = now + self.settings.poll_interval;
        }
        if limit > 0 {
            // A full batch means that there may be more; so does one that was cut short by what is in flight.
            self.claim_due = claimed.len() == limit;
        }
        for job in claimed {
            self.send(job);
        }
        Ok(())
    }

    fn send(&mut self, job: ClaimedJob) {
        let id = job.id;
        match assign::request(job, self.settings.request_timeout) {
            Ok(request) => {
                // If the thread is gone, the next loop notices and the next worker takes the job.
                self.net.send(request);
                self.in_flight.insert(id);
            }
            Err(error) => {
                self.outcomes.push(Outcome { job: id, verdict: Verdict::Failed { error, result: None } });
            }
        }
    }

    fn wait(&mut self) {
        let has_room = self.in_flight.len() < self.settings.max_in_flight;
        // Jobs that failed before they were sent are outcomes, too.
        let busy = self.outcomes_due || self.outcomes.len() > self.locked || (self.claim_due && has_room);
        let time = if busy {
            Duration::ZERO
        } else {
            let poll = self.next_poll.saturating_duration_since(Instant::now());
            if self.locked > 0 { poll.min(LOCKED_DELAY) } else { poll }
        };
        if bgworker::wait(Some(self.net.wake_descriptor()), time) {
            self.claim_due = true;
        }
    }

    fn take_settings(&mut self) {
        self.settings = guc::worker_settings();
        self.limits.set(
            self.settings.max_in_flight,
            self.settings.max_response_bytes,
            self.settings.session_idle_timeout,
        );
        self.next_poll = self.next_poll.min(Instant::now() + self.settings.poll_interval);
    }

    /// Writes what is finished; what is in flight is given back by the next worker.
    fn finish(&mut self) -> i32 {
        self.claim_due = false;
        self.settings.batch_size = usize::MAX;
        if self.collect().is_ok() && !self.outcomes.is_empty() {
            let (extension, queue, outcomes) = (self.extension, &self.queue, &self.outcomes);
            let _ = transaction::run(c"nexus_hub: completing jobs before the end", || {
                catalog::hold_extension(extension).then(|| queue.complete(outcomes))
            });
        }
        if shmem::leave_requested() {
            shmem::set_worker_state(WorkerState::Left);
        }
        GONE
    }
}
