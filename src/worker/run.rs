//! A worker of a database: complete what is done, claim what waits, hand it to the network thread, wait.
//!
//! One short transaction does both, so that many jobs share a commit; no transaction is open while a request is.

use super::assign::{self, Edge};
use super::backlog::{Backlog, Finished};
use super::feed::{self, Feed};
use super::start;
use crate::domain::schedule::{BreakerState, Counted, LaneId, Pick, Reach, Schedule};
use crate::jobs::queue::{Claim, ClaimedJob, Queue};
use crate::net::outbound::Outbound;
use crate::net::{Ending, Limits, Net, Retry, ThreadGone, Verdict};
use crate::pg::bgworker::Waiter;
use crate::pg::guc::{Executor, WorkerSettings};
use crate::pg::shmem::{self, Place, WorkerState};
use crate::pg::transaction::Durability;
use crate::pg::{bgworker, catalog, transaction};
use crate::vault;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Exit code: nothing to do here.
pub const GONE: i32 = 0;
/// Exit code: a new worker may do better.
pub const RESTART: i32 = 1;
/// How long to wait before a failed transaction is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Transactions that may fail in a row, with nothing to be lost, before the worker starts anew.
const MAX_FAILURES: u32 = 20;
/// How long a worker that is to be replaced waits for its requests before it gives their jobs back.
const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How long rows are locked one by one after somebody was found to keep one locked.
const CAREFUL_TIME: Duration = Duration::from_secs(10);

/// With so many requests in flight, and fewer outcomes written by the last transaction than that, the next one waits a
/// moment for more: what a transaction costs by itself is then shared by more jobs, and nobody waits for a single one.
const GATHER_IN_FLIGHT: usize = 256;
const GATHER_OUTCOMES: usize = 128;
const GATHER_TIME: Duration = Duration::from_millis(2);

/// Polls after the last work at which memory is given back.
const TRIMS: u32 = 12;
/// Lanes whose servers' configs a poll looks up again.
const MAX_ROUTES: usize = 1000;

/// How a transaction went.
enum Step {
    Done(Done),
    /// The extension is gone; whether it is there anew.
    ExtensionGone {
        replaced: bool,
    },
}

#[derive(Default)]
struct Done {
    /// Jobs whose rows were locked.
    locked: Vec<Claim>,
    lease: Uuid,
    claimed: Vec<ClaimedJob>,
    /// Jobs in flight that are no longer to be run.
    lost: Vec<Claim>,
}

/// A job that was claimed.
pub struct Running {
    lane: LaneId,
    counted: Counted,
    /// Attempts made with this one, and allowed.
    attempts: (i32, i32),
}

pub struct Worker {
    pub extension: pg_sys::Oid,
    pub database: pg_sys::Oid,
    pub place: Place,
    /// What the leases of this worker begin with.
    pub holder: u64,
    pub leases: u64,
    pub queue: Queue,
    pub net: Net,
    pub waiter: Waiter,
    pub outbound: Arc<Outbound>,
    pub limits: Arc<Limits>,
    pub descriptors: usize,
    pub settings: WorkerSettings,
    pub edge: Option<Result<Edge, String>>,
    /// What ALTER DATABASE … SET said when this worker connected: it counts only for new connections.
    pub database_settings: String,
    /// Whether that has changed since, or how many workers there are: no more jobs, and a new worker as soon as none is
    /// in flight, or after a while.
    pub outdated: bool,
    pub draining_since: Option<Instant>,
    pub schedule: Schedule,
    pub feed: Feed,
    /// Jobs that the network thread has, by the leases they were claimed under.
    pub in_flight: HashMap<Claim, Running>,
    /// Outcomes that are not written yet.
    pub backlog: Backlog,
    /// The jobs whose outcomes the last transaction tried to write.
    pub tried: HashSet<Claim>,
    /// What is to be claimed in the running transaction.
    pub picks: Vec<Pick>,
    /// Breakers that have changed and are not shown yet.
    pub breakers: Vec<BreakerState>,
    /// Whether the last look at the network thread ended with a full batch: there may be more.
    pub outcomes_due: bool,
    /// Whether the last look at the schedule ended with a full batch: there may be more.
    pub picks_due: bool,
    /// Whether there was a commit since the table was read.
    pub was_woken: bool,
    /// When the schedule was looked at last.
    pub looked_at: Instant,
    /// Whether somebody has changed jobs that run.
    pub look_due: bool,
    pub careful_until: Option<Instant>,
    /// Polls at which memory is given back: after work, until the connections that were kept are closed, too.
    pub trims_due: u32,
    pub next_poll: Instant,
    pub failures: u32,
    /// No transaction before this time.
    pub not_before: Option<Instant>,
}

impl Worker {
    /// Works until it has to end, and returns the exit code.
    pub fn work(mut self) -> i32 {
        loop {
            if bgworker::stop_requested() || shmem::leave_requested() {
                return self.finish();
            }
            bgworker::handle_interrupts();
            if bgworker::reload_configuration() {
                self.take_settings();
            }
            if self.outdated {
                let since = *self.draining_since.get_or_insert_with(Instant::now);
                let is_drained = self.in_flight.is_empty() && !self.backlog.has_fresh() && !self.outcomes_due;
                if is_drained || since.elapsed() >= DRAIN_TIME {
                    self.finish();
                    shmem::set_worker_state(WorkerState::Replaced);
                    return GONE;
                }
            }
            self.take_wakes();
            if self.collect().is_err() {
                log!("nexus_hub: the network thread is gone");
                return RESTART;
            }
            match self.step() {
                Ok(Step::Done(done)) => {
                    self.settle(done);
                    transaction::make_durable();
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
            if self.in_flight.len() >= GATHER_IN_FLIGHT && (1..GATHER_OUTCOMES).contains(&self.tried.len()) {
                std::thread::sleep(GATHER_TIME);
            }
        }
    }

    fn take_wakes(&mut self) {
        self.look_due |= shmem::take_look();
        if shmem::take_wake() {
            self.schedule.wake();
            self.was_woken = true;
        }
        self.feed.tick(&mut self.schedule, Instant::now());
    }

    /// Takes what the network thread has finished, up to a batch.
    fn collect(&mut self) -> Result<(), ThreadGone> {
        self.net.acknowledge_wake();
        let (net, in_flight, schedule, settings) = (&self.net, &mut self.in_flight, &mut self.schedule, &self.settings);
        let now = Instant::now();
        // What is left there was acknowledged: nobody will wake this thread for it.
        self.outcomes_due = self.backlog.fill(self.settings.batch_size, || {
            while let Some(outcome) = net.next_outcome()? {
                // A job that was broken off is not in flight any more.
                let Some(running) = in_flight.remove(&(outcome.job, outcome.lease)) else { continue };
                schedule.finished(running.lane, running.counted, outcome.job.as_u128(), &outcome.ending.reach, now);
                return Ok(Some(finished(outcome.job, outcome.lease, outcome.ending, running.attempts, settings)));
            }
            Ok(None)
        })?;
        Ok(())
    }

    /// One transaction: gives back what others left, writes outcomes, claims jobs.
    fn step(&mut self) -> Result<Step, transaction::Failure> {
        let now = Instant::now();
        self.tried.clear();
        self.not_before.take_if(|at| now >= *at);
        if self.not_before.is_some() {
            return Ok(Step::Done(Done::default()));
        }
        let poll = now >= self.next_poll;
        let batch = self.backlog.batch(now);
        // After a failure outcomes come first, so that it is known which part fails.
        let may_claim = self.settings.enabled && !self.outdated && (self.failures == 0 || batch.is_empty());
        let limit = if may_claim { self.settings.batch_size } else { 0 };
        // The poll looks at everything.
        if poll {
            self.schedule.wake();
        }
        self.looked_at = now;
        // What was committed since may go before what is known: it is read first.
        let read_first = std::mem::take(&mut self.was_woken) && limit > 0;
        if read_first {
            self.feed.read_first();
        }
        self.picks = if read_first { Vec::new() } else { self.schedule.pick(limit, now) };
        self.picks_due = false;
        let hungry = self.picks.len() < limit && self.schedule.room() > 0;
        let reads = may_claim && (read_first || self.feed.is_due(&self.schedule, hungry, now));
        // Of each host the last word, also where the one before could not be shown.
        let changes = self.schedule.breaker_changes(now);
        self.breakers.retain(|old| !changes.iter().any(|new| new.host == old.host));
        self.breakers.extend(changes);
        let look = poll || (std::mem::take(&mut self.look_due) && !self.in_flight.is_empty());
        if batch.is_empty() && self.picks.is_empty() && self.breakers.is_empty() && !reads && !look {
            return Ok(Step::Done(Done::default()));
        }
        if !batch.is_empty() || !self.picks.is_empty() {
            self.trims_due = TRIMS;
        }
        self.tried.extend(batch.iter().map(|completion| completion.claim()));
        self.leases += 1;
        let lease = Uuid::from_u64_pair(self.holder, self.leases);
        let careful = self.careful_until.is_some_and(|until| now < until);
        let limit = if hungry { limit } else { self.picks.len() };
        let (extension, queue, schedule, feed, edge) =
            (self.extension, &self.queue, &mut self.schedule, &mut self.feed, &mut self.edge);
        let (picks, breakers, in_flight, settings) = (&mut self.picks, &self.breakers, &self.in_flight, &self.settings);
        let (database, database_settings) = (self.database, &self.database_settings);
        let holder = self.holder;
        let active: HashSet<_> = if poll {
            in_flight.keys().copied().chain(self.backlog.claims()).map(|(_, lease)| lease).collect()
        } else {
            HashSet::new()
        };
        let mut replaced = false;
        let mut outdated = false;
        let mut released = 0;
        // A claim that is lost in a crash leaves a job pending, as it was. So the requests need not wait until it is on
        // disk; it is put there while they are on their way.
        let durability = if batch.is_empty() && !poll { Durability::Later } else { Durability::AtCommit };
        let retry = batch.iter().filter_map(|completion| completion.retry_in).min();
        let step = transaction::run_with(c"nexus_hub: completing and claiming jobs", durability, || {
            if !catalog::hold_extension(extension) {
                replaced = catalog::extension().is_some();
                return Ok(None);
            }
            let mut work = || {
                let mut done = Done { lease, ..Done::default() };
                if poll {
                    outdated = Queue::database_settings()? != *database_settings;
                    released = release_abandoned(queue, database, holder, &active, settings.max_crashes)?;
                    if let Some(edge) = &mut *edge {
                        *edge = start::edge()?;
                    }
                    let lanes = schedule.mcp_lanes(MAX_ROUTES);
                    feed::route(queue, schedule, edge.as_ref(), lanes)?;
                }
                if look && !in_flight.is_empty() {
                    done.lost = queue.lost(in_flight.keys().copied())?;
                }
                if !batch.is_empty() {
                    done.locked = queue.complete(&batch)?;
                }
                if !breakers.is_empty() {
                    queue.show_breakers(Some(breakers))?;
                }
                if reads {
                    feed.fill(queue, schedule, edge.as_ref(), picks, limit, now)?;
                }
                if !picks.is_empty() {
                    let jobs: Vec<_> = picks.iter().map(|pick| pick.position.id).collect();
                    done.claimed = queue.claim(lease, &jobs, careful)?;
                }
                Ok::<_, pgrx::spi::SpiError>(done)
            };
            work().map(Some).map_err(|problem| problem.to_string())
        })?;
        let Some(done) = step else { return Ok(Step::ExtensionGone { replaced }) };
        if let Some(time) = retry {
            self.feed.expect(time);
        }
        if released > 0 {
            log!("nexus_hub: gave back {released} jobs of a worker that is gone");
            shmem::wake(self.database, false);
        }
        self.failures = 0;
        self.not_before = None;
        self.picks_due = may_claim && self.schedule.has_more();
        self.outdated |= outdated;
        self.breakers.clear();
        if poll {
            self.next_poll = now + self.settings.poll_interval;
            self.tidy();
        }
        if !self.tried.is_empty() {
            shmem::announce_finished_jobs();
        }
        Ok(Step::Done(done))
    }

    /// After the commit: forgets what is written, breaks off what is cancelled, and sends what is claimed.
    fn settle(&mut self, done: Done) {
        let now = Instant::now();
        self.backlog.settle(&self.tried, &done.locked, now);
        for claim in done.lost {
            if let Some(running) = self.in_flight.remove(&claim) {
                self.net.cancel(claim.0, claim.1);
                self.schedule.finished(running.lane, running.counted, claim.0.as_u128(), &Reach::Unknown, now);
            }
        }
        let picks = std::mem::take(&mut self.picks);
        self.schedule.claimed(&picks);
        let mut claimed: HashMap<u128, ClaimedJob> =
            done.claimed.into_iter().map(|job| (job.id.as_u128(), job)).collect();
        for pick in picks {
            match (claimed.remove(&pick.position.id), &pick.failure) {
                (Some(job), None) => self.send(job, done.lease, &pick),
                (Some(job), Some(failure)) => {
                    let error =
                        format!("{failure} (not tried again for this job: the circuit breaker of its host is open)");
                    let ending = Ending { retry: Retry::Later, ..Ending::refused(&error) };
                    self.end(&job, done.lease, ending);
                }
                // Cancelled or claimed meanwhile, or locked: then the next poll finds it again.
                (None, None) => {
                    self.schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Unknown, now);
                }
                (None, Some(_)) => {}
            }
        }
    }

    fn send(&mut self, job: ClaimedJob, lease: Uuid, pick: &Pick) {
        let (id, lane, counted) = (job.id, pick.lane, pick.counted);
        let attempts = (job.attempts, assign::max_attempts(&job));
        match assign::request(job, lease, self.settings.request_timeout, self.edge.as_ref()) {
            Ok(request) => {
                // If the thread is gone, the next loop notices and the next worker takes the job.
                self.net.send(request);
                self.in_flight.insert((id, lease), Running { lane, counted, attempts });
            }
            Err(error) => {
                self.schedule.finished(lane, counted, id.as_u128(), &Reach::Unknown, Instant::now());
                self.backlog.push(finished(id, lease, Ending::refused(&error), attempts, &self.settings));
            }
        }
    }

    /// Ends a job that was claimed and not sent.
    fn end(&mut self, job: &ClaimedJob, lease: Uuid, ending: Ending) {
        let attempts = (job.attempts, assign::max_attempts(job));
        self.backlog.push(finished(job.id, lease, ending, attempts, &self.settings));
    }

    /// After a failed transaction: when to try again, with how much, or the exit code when that is pointless.
    fn failed(&mut self, failure: transaction::Failure) -> Option<i32> {
        let now = Instant::now();
        let picks = std::mem::take(&mut self.picks);
        let was_claiming = !picks.is_empty();
        self.schedule.put_back(picks, now);
        self.schedule.wake();
        self.look_due = true;
        let was_careful = self.careful_until.is_some_and(|until| now < until);
        if failure.transient && was_claiming {
            self.careful_until = Some(now + CAREFUL_TIME);
            if !was_careful {
                // Somebody keeps a row locked: tried again at once, past it.
                self.picks_due = true;
                return None;
            }
        }
        self.failures += 1;
        self.not_before = Some(now + RETRY_DELAY);
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

    fn wait(&mut self) {
        self.take_wakes();
        let now = Instant::now();
        let may_claim = self.settings.enabled && !self.outdated;
        let busy = self.outcomes_due
            || self.look_due
            // Jobs that failed before they were sent are outcomes, too.
            || self.backlog.has_fresh()
            || (may_claim && (self.picks_due || self.schedule.has_doomed() || self.feed.is_due(&self.schedule, self.schedule.room() > 0, now)));
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
            // A probe that was due and not sent waits for a place.
            let probe = self.schedule.next_probe().filter(|at| *at > self.looked_at);
            let jobs = [self.feed.next(&self.schedule), probe].into_iter().flatten().filter(|_| may_claim);
            let drained = self.draining_since.map(|since| since + DRAIN_TIME);
            let next =
                jobs.chain(self.backlog.look_again()).chain(drained).chain([self.next_poll]).min().unwrap_or(now);
            next.saturating_duration_since(now)
        };
        self.waiter.wait(time);
    }

    fn take_settings(&mut self) {
        self.settings = start::settings(self.descriptors);
        self.limits.set(start::limit_values(&self.settings));
        self.schedule.set_limits(start::caps(&self.settings), start::rules(&self.settings));
        if let Err(problem) = self.outbound.configure(start::egress(&self.settings, self.descriptors)) {
            log!("nexus_hub: {problem}; requests go as before");
        }
        self.outdated |= self.settings.workers != self.place.of;
        // What the executor's URL and key are now is read by the poll.
        self.edge = (self.settings.executor == Executor::Edge).then(|| Err("the executor is not known yet".into()));
        // The poll looks whether the database's settings have changed, too.
        self.next_poll = Instant::now();
        if let Some(problem) = vault::problem() {
            log!("nexus_hub: {problem}");
        }
    }

    /// Now and then: lets go of what is not used any more.
    fn tidy(&mut self) {
        self.schedule.retire(Instant::now());
        if self.trims_due > 0 {
            self.trims_due -= 1;
            if self.in_flight.is_empty() {
                self.in_flight.shrink_to_fit();
            }
            bgworker::give_memory_back();
        }
    }

    /// Writes what is finished, and gives back what is in flight.
    fn finish(&mut self) -> i32 {
        bgworker::postpone_end();
        self.settings.enabled = false;
        self.not_before = None;
        loop {
            let more = self.collect().is_ok() && self.outcomes_due;
            match self.step() {
                Ok(Step::Done(done)) => self.settle(done),
                _ => break,
            }
            if !more {
                break;
            }
        }
        let leases: HashSet<_> = self.in_flight.keys().map(|(_, lease)| *lease).collect();
        if !leases.is_empty() {
            let (extension, queue) = (self.extension, &self.queue);
            let given_back = transaction::run(c"nexus_hub: giving jobs back", || {
                if !catalog::hold_extension(extension) {
                    return Ok(0);
                }
                queue.release(leases.into_iter().collect(), None).map_err(|problem| problem.to_string())
            });
            if let Err(failure) = given_back {
                // The next worker finds them, and takes this one's end for a crash.
                log!("nexus_hub: the jobs in flight were not given back: {}", failure.message);
            }
        }
        if shmem::leave_requested() {
            shmem::set_worker_state(WorkerState::Left);
        }
        GONE
    }
}

/// Gives back the jobs of the database's workers that are gone, and, should there ever be any, those of this worker's
/// own under leases that nothing is known of.
fn release_abandoned(
    queue: &Queue,
    database: pg_sys::Oid,
    own: u64,
    active: &HashSet<Uuid>,
    max_crashes: i32,
) -> Result<i32, pgrx::spi::SpiError> {
    let held = queue.held_leases()?;
    // Looked at after the leases: whoever holds one has made itself known before.
    let live = shmem::live_holders(database);
    let is_abandoned = |lease: &Uuid| {
        let (holder, _) = lease.as_u64_pair();
        if holder == own { !active.contains(lease) } else { !live.contains(&holder) }
    };
    let abandoned: Vec<_> = held.into_iter().filter(is_abandoned).collect();
    if abandoned.is_empty() { Ok(0) } else { queue.release(abandoned, Some(max_crashes)) }
}

fn finished(job: Uuid, lease: Uuid, ending: Ending, attempts: (i32, i32), settings: &WorkerSettings) -> Finished {
    let held = ending.held.clone();
    let is_retried = ending.retry != Retry::Never && matches!(ending.verdict, Verdict::Failed { .. });
    let jitter = if is_retried { (Uuid::new_v4().as_u64_pair().1 as u32) as f64 / f64::from(u32::MAX) } else { 0.0 };
    Finished { completion: assign::completion(job, lease, ending, attempts, settings, jitter), held }
}
