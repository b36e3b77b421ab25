//! The worker of a database: complete what is done, claim what waits, hand it to the network thread, wait.
//!
//! One short transaction does both, so that many jobs share a commit; no transaction is open while a request is.

use super::assign;
use super::backlog::Backlog;
use crate::jobs::queue::{ClaimedJob, Queue};
use crate::net::{Limits, Net, Outcome, ThreadGone, Verdict};
use crate::pg::guc::{self, WorkerSettings};
use crate::pg::shmem::{self, WorkerState};
use crate::pg::{bgworker, catalog, transaction};
use crate::vault;
use pgrx::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

const GONE: i32 = 0;
const RESTART: i32 = 1;
/// How long to wait before a failed transaction is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Transactions that may fail in a row, with nothing to be lost, before the worker starts anew.
const MAX_FAILURES: u32 = 20;
/// Descriptors that are not for requests: files of PostgreSQL, sessions, the way to the network thread.
const OTHER_DESCRIPTORS: usize = 200;
/// How a transaction went.
enum Step {
    Done {
        /// Jobs whose rows were locked.
        locked: Vec<Uuid>,
        claimed: Vec<ClaimedJob>,
    },
    /// The extension is gone; whether it is there anew.
    ExtensionGone { replaced: bool },
}

struct Worker {
    extension: pg_sys::Oid,
    queue: Queue,
    net: Net,
    limits: Arc<Limits>,
    descriptors: usize,
    settings: WorkerSettings,
    /// What ALTER DATABASE … SET said when this worker connected: it counts only for new connections.
    database_settings: String,
    /// Whether that has changed since: no more jobs, and a new worker as soon as none is in flight.
    outdated: bool,
    /// Jobs that the network thread has, with the leases they were claimed under.
    in_flight: HashSet<(Uuid, Uuid)>,
    /// Outcomes that are not written yet.
    backlog: Backlog,
    /// The jobs whose outcomes the last transaction tried to write.
    tried: HashSet<Uuid>,
    /// Whether the last look at the network thread ended with a full batch: there may be more.
    outcomes_due: bool,
    /// Whether there may be pending jobs that no claim has seen.
    claim_due: bool,
    next_poll: Instant,
    failures: u32,
    /// No transaction before this time.
    not_before: Option<Instant>,
}

/// Runs the worker of a slot until it has to end, and returns its exit code.
pub fn main(slot: usize) -> i32 {
    let Some(database) = shmem::attach_worker(slot) else { return GONE };
    bgworker::start(Some(database));
    bgworker::pin_session_settings();
    let opened = transaction::run(c"nexus_hub: starting", || {
        // The same lock as in every later transaction: the extension can't go while its functions are looked up.
        let Some(extension) = catalog::extension().filter(|extension| catalog::hold_extension(*extension)) else {
            return Ok(None);
        };
        let open = || Ok::<_, pgrx::spi::SpiError>((extension, Queue::open()?, Queue::database_settings()?));
        open().map(Some).map_err(|problem| problem.to_string())
    });
    let (extension, queue, database_settings) = match opened {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            shmem::set_worker_state(WorkerState::NoExtension);
            return GONE;
        }
        Err(problem) => {
            log!("nexus_hub: the worker could not start: {}", problem.message);
            return RESTART;
        }
    };
    let descriptors = bgworker::raise_descriptor_limit();
    let settings = settings(descriptors);
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
    Worker {
        extension,
        queue,
        net,
        limits,
        descriptors,
        settings,
        database_settings,
        outdated: false,
        in_flight: HashSet::new(),
        backlog: Backlog::new(Instant::now()),
        tried: HashSet::new(),
        outcomes_due: false,
        claim_due: true,
        // At once: jobs of a worker that is gone are given back by the poll.
        next_poll: Instant::now(),
        failures: 0,
        not_before: None,
    }
    .work()
}

/// The settings, with no more requests in flight than there are descriptors for: one for each, and one for a
/// connection that is kept for the next request.
fn settings(descriptors: usize) -> WorkerSettings {
    let mut settings = guc::worker_settings();
    let most = (descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).max(1);
    if settings.max_in_flight > most {
        log!("nexus_hub: only {most} requests at a time: the limit of open files is {descriptors}");
        settings.max_in_flight = most;
    }
    settings
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
            if self.outdated && self.in_flight.is_empty() && !self.backlog.has_fresh() && !self.outcomes_due {
                shmem::set_worker_state(WorkerState::Replaced);
                return GONE;
            }
            self.claim_due |= shmem::take_wake();
            if self.collect().is_err() {
                log!("nexus_hub: the network thread is gone");
                return RESTART;
            }
            match self.step() {
                Ok(Step::Done { locked, claimed }) => {
                    self.backlog.settle(&self.tried, &locked, Instant::now());
                    claimed.into_iter().for_each(|job| self.send(job));
                }
                Ok(Step::ExtensionGone { replaced }) => {
                    let state = if replaced { WorkerState::Replaced } else { WorkerState::NoExtension };
                    shmem::set_worker_state(state);
                    return GONE;
                }
                Err(failure) => {
                    if let Some(code) = self.failed(failure) {
                        return code;
                    }
                }
            }
            self.wait();
        }
    }

    /// Takes what the network thread has finished, up to a batch.
    fn collect(&mut self) -> Result<(), ThreadGone> {
        self.net.acknowledge_wake();
        let (net, in_flight) = (&self.net, &mut self.in_flight);
        // What is left there was acknowledged: nobody will wake this thread for it.
        self.outcomes_due = self.backlog.fill(self.settings.batch_size, || {
            let outcome = net.next_outcome()?;
            if let Some(outcome) = &outcome {
                in_flight.remove(&(outcome.job, outcome.lease));
            }
            Ok(outcome)
        })?;
        Ok(())
    }

    /// One transaction: gives back what others left, writes outcomes, claims jobs.
    fn step(&mut self) -> Result<Step, transaction::Failure> {
        let now = Instant::now();
        let nothing = Ok(Step::Done { locked: Vec::new(), claimed: Vec::new() });
        self.tried.clear();
        if self.not_before.is_some_and(|at| now < at) {
            return nothing;
        }
        let poll = now >= self.next_poll;
        let batch = self.backlog.batch(now);
        let room = self.settings.max_in_flight.saturating_sub(self.in_flight.len());
        // After a failure outcomes come first, so that it is known which part fails.
        let may_claim = self.settings.enabled && !self.outdated && (self.failures == 0 || batch.is_empty());
        let limit = if may_claim && (self.claim_due || poll) { room.min(self.settings.batch_size) } else { 0 };
        if batch.is_empty() && limit == 0 && !poll {
            return nothing;
        }
        self.tried.extend(batch.iter().map(|outcome| outcome.job));
        let (extension, queue) = (self.extension, &self.queue);
        let mut replaced = false;
        let step = transaction::run(c"nexus_hub: completing and claiming jobs", || {
            if !catalog::hold_extension(extension) {
                replaced = catalog::extension().is_some();
                return Ok(None);
            }
            let work = || {
                let mut outdated = false;
                if poll {
                    outdated = Queue::database_settings()? != self.database_settings;
                    let released = queue.release_abandoned(self.leases())?;
                    if released > 0 {
                        log!("nexus_hub: gave back {released} jobs of a worker that is gone");
                    }
                }
                let locked = if batch.is_empty() { Vec::new() } else { queue.complete(&batch)? };
                let claimed = if limit > 0 { queue.claim(Uuid::new_v4(), limit)? } else { Vec::new() };
                Ok::<_, pgrx::spi::SpiError>((locked, claimed, outdated))
            };
            work().map(Some).map_err(|problem| problem.to_string())
        })?;
        let Some((locked, claimed, outdated)) = step else { return Ok(Step::ExtensionGone { replaced }) };
        self.failures = 0;
        self.not_before = None;
        self.outdated |= outdated;
        if poll {
            self.next_poll = now + self.settings.poll_interval;
        }
        if limit > 0 {
            // A full batch means that there may be more.
            self.claim_due = claimed.len() == limit;
        }
        if !self.tried.is_empty() {
            shmem::announce_finished_jobs();
        }
        Ok(Step::Done { locked, claimed })
    }

    /// The leases that are this worker's: of jobs in flight, and of outcomes to be written.
    fn leases(&self) -> HashSet<Uuid> {
        self.in_flight.iter().map(|(_, lease)| *lease).chain(self.backlog.leases()).collect()
    }

    /// After a failed transaction: when to try again, with how much, or the exit code when that is pointless.
    fn failed(&mut self, failure: transaction::Failure) -> Option<i32> {
        self.failures += 1;
        self.claim_due = true;
        self.not_before = Some(Instant::now() + RETRY_DELAY);
        if self.failures == 1 {
            log!("nexus_hub: a transaction of the worker failed and is tried again: {}", failure.message);
        }
        // The first failure may have been that of the claim, which is left out of the next try.
        if failure.transient || self.failures == 1 {
            return None;
        }
        let can_go_on = !self.tried.is_empty() && self.backlog.narrow(&self.tried, &failure.message);
        (!can_go_on && self.failures >= MAX_FAILURES).then_some(RESTART)
    }

    fn send(&mut self, job: ClaimedJob) {
        let (id, lease) = (job.id, job.lease);
        match assign::request(job, self.settings.request_timeout) {
            Ok(request) => {
                // If the thread is gone, the next loop notices and the next worker takes the job.
                self.net.send(request);
                self.in_flight.insert((id, lease));
            }
            Err(error) => {
                self.backlog.push(Outcome { job: id, lease, verdict: Verdict::Failed { error, result: None } });
            }
        }
    }

    fn wait(&mut self) {
        self.claim_due |= shmem::take_wake();
        let now = Instant::now();
        let has_room = self.settings.enabled && !self.outdated && self.in_flight.len() < self.settings.max_in_flight;
        let busy = self.outcomes_due
            // Jobs that failed before they were sent are outcomes, too.
            || self.backlog.has_fresh()
            || (self.claim_due && has_room);
        let asked = (self.outdated && self.in_flight.is_empty())
            || bgworker::stop_requested()
            || bgworker::reload_requested()
            || shmem::leave_requested();
        let time = if asked {
            Duration::ZERO
        } else if let Some(at) = self.not_before {
            at.saturating_duration_since(now)
        } else if busy {
            Duration::ZERO
        } else {
            let next = self.backlog.look_again().map_or(self.next_poll, |at| at.min(self.next_poll));
            next.saturating_duration_since(now)
        };
        bgworker::wait(Some(self.net.wake_descriptor()), time);
    }

    fn take_settings(&mut self) {
        self.settings = settings(self.descriptors);
        self.limits.set(
            self.settings.max_in_flight,
            self.settings.max_response_bytes,
            self.settings.session_idle_timeout,
        );
        // The poll looks whether the database's settings have changed, too.
        self.next_poll = Instant::now();
        self.claim_due = true;
        if let Some(problem) = vault::problem() {
            log!("nexus_hub: {problem}");
        }
    }

    /// Writes what is finished; what is in flight is given back by the next worker.
    fn finish(&mut self) -> i32 {
        bgworker::postpone_end();
        self.settings.enabled = false;
        self.not_before = None;
        loop {
            let more = self.collect().is_ok() && self.outcomes_due;
            match self.step() {
                Ok(Step::Done { locked, .. }) => self.backlog.settle(&self.tried, &locked, Instant::now()),
                _ => break,
            }
            if !more {
                break;
            }
        }
        if shmem::leave_requested() {
            shmem::set_worker_state(WorkerState::Left);
        }
        GONE
    }
}
