//! A worker of a database: complete what is done, claim what waits, hand it to the network thread, wait.
//!
//! One short transaction does both, so that many jobs share a commit; no transaction is open while a request is.

use super::assign::Edge;
use super::backlog::Backlog;
use super::feed::Feed;
use super::prune::Pruner;
use super::record::Records;
use super::refresh::Refresher;
use super::step::{Running, Step, finished};
use super::sync::Syncs;
use super::{rotate, start};
use crate::domain::metrics::Counter;
use crate::domain::schedule::{BreakerState, Pick, Schedule};
use crate::jobs::queue::{Claim, Queue};
use crate::net::outbound::Outbound;
use crate::net::{Limits, Net, ThreadGone};
use crate::pg::bgworker::Waiter;
use crate::pg::catalog::Extension;
use crate::pg::guc::database::DatabaseSettings;
use crate::pg::guc::{Executor, WorkerSettings};
use crate::pg::shmem::{self, Place, WorkerState, counters};
use crate::pg::{bgworker, catalog, transaction};
use crate::rate_limit::Recorder;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Exit code: nothing to do here.
pub const GONE: i32 = 0;
/// Exit code: a new worker may do better.
pub const RESTART: i32 = 1;
/// How long a worker that makes room waits for rows that others keep locked, once it has no request in flight.
const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How long a worker that ends goes on trying to write what is finished, and how long it waits between two tries.
const LAST_TIME: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_millis(20);
/// With so many requests in flight, and fewer outcomes written by the last transaction than that, the next one waits a
/// moment for more: what a transaction costs by itself is then shared by more jobs, and nobody waits for a single one.
const GATHER_IN_FLIGHT: usize = 256;
const GATHER_OUTCOMES: usize = 128;
const GATHER_TIME: Duration = Duration::from_millis(2);
/// How long claims wait for the next transaction to put them on disk with its own changes.
pub const FLUSH_TIME: Duration = Duration::from_millis(2);

/// A worker at work.
pub struct Worker {
    pub extension: Extension,
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
    /// What this worker goes by.
    pub database_settings: DatabaseSettings,
    /// Whether they have changed so since, or how many workers there are, that it needs a new worker: this one takes no
    /// more jobs, and ends when none is in flight.
    pub outdated: bool,
    /// It has made room for that one.
    pub drains: bool,
    /// When it gives up what it has not written by then; known once no request is in flight.
    pub drain_until: Option<Instant>,
    /// The database's settings have changed, and were set.
    pub settings_due: bool,
    /// Somebody loads a dump: no jobs before it is looked again whether that is over.
    pub restoring_until: Option<Instant>,
    pub schedule: Schedule,
    pub feed: Feed,
    /// Jobs that the network thread has, by the leases they were claimed under.
    pub in_flight: HashMap<Claim, Running>,
    /// Outcomes that are not written yet.
    pub backlog: Backlog,
    /// The ends of syncs, which are written apart.
    pub syncs: Syncs,
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
    /// When the last claims have to be on disk, if no other transaction puts them there.
    pub flush_at: Option<Instant>,
    /// Until then claims are put on disk at once. A crash of the server forgets those that are not, and does not count
    /// against the job that caused it; the second one shall.
    pub wary_until: Option<Instant>,
    pub careful_until: Option<Instant>,
    /// Polls at which memory is given back: after work, until the connections that were kept are closed, too.
    pub trims_due: u32,
    pub next_poll: Instant,
    /// What is written for sessions.
    pub records: Records,
    pub failures: u32,
    /// No transaction before this time.
    pub not_before: Option<Instant>,
    /// Deletes what is old.
    pub pruner: Pruner,
    /// Has servers synced again.
    pub refresher: Refresher,
    /// Writes down what was counted of rate limits.
    pub recorder: Recorder,
    /// The process that rotates the vault's keys.
    pub rotation: rotate::Post,
}

impl Worker {
    /// Works until it has to end, and returns the exit code.
    pub fn work(mut self) -> i32 {
        loop {
            if bgworker::stop_requested() || shmem::leave_requested() {
                return self.finish();
            }
            bgworker::handle_interrupts_of_others();
            if shmem::take_reload() {
                bgworker::request_reload();
            }
            if bgworker::reload_configuration() | std::mem::take(&mut self.settings_due) {
                self.take_settings();
            }
            self.outdated |= shmem::workers().is_some_and(|workers| workers != self.place.of);
            if self.outdated {
                if self.in_flight.is_empty() && !self.outcomes_due {
                    self.drain_until.get_or_insert_with(|| Instant::now() + DRAIN_TIME);
                }
                // From here on there may be another one in this one's place.
                if !std::mem::replace(&mut self.drains, true) {
                    shmem::set_worker_state(WorkerState::Draining);
                }
                if self.is_drained() {
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
            if self.flush_at.take_if(|at| Instant::now() >= *at).is_some() {
                transaction::make_durable();
            }
            match self.step() {
                Ok(Step::Done(done)) => {
                    self.settle(done);
                    counters::add(Counter::Loops, 1);
                    // One that fails again and again is not at work.
                    if self.failures == 0 {
                        shmem::pulse::beat(self.in_flight.len());
                    }
                }
                Ok(Step::ExtensionGone { replaced }) => {
                    // Else what it would forget is that of the one in its place.
                    if !self.drains {
                        shmem::audit::forget(self.database);
                    }
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
            self.write_sync();
            self.record();
            self.record_limits();
            self.prune();
            self.refresh();
            self.wait();
            if self.in_flight.len() >= GATHER_IN_FLIGHT && (1..GATHER_OUTCOMES).contains(&self.tried.len()) {
                std::thread::sleep(GATHER_TIME);
            }
        }
    }

    fn take_wakes(&mut self) {
        self.look_due |= shmem::take_look();
        if shmem::take_poll() {
            self.next_poll = Instant::now();
        }
        if shmem::take_wake() {
            self.schedule.wake();
            self.was_woken = true;
            // Perhaps by DROP EXTENSION, which one that takes no jobs does not find out by looking for some.
            self.look_due |= self.outdated;
        }
        self.feed.tick(&mut self.schedule, Instant::now());
    }

    /// Takes what the network thread has finished, up to a batch.
    fn collect(&mut self) -> Result<(), ThreadGone> {
        self.net.acknowledge_wake();
        let (net, in_flight, schedule, settings) = (&self.net, &mut self.in_flight, &mut self.schedule, &self.settings);
        let syncs = &mut self.syncs;
        let now = Instant::now();
        // What is left there was acknowledged: nobody will wake this thread for it.
        self.outcomes_due = self.backlog.fill(self.settings.batch_size, || {
            while let Some(outcome) = net.next_outcome()? {
                // A job that was broken off is not in flight any more.
                let Some(running) = in_flight.remove(&(outcome.job, outcome.lease)) else { continue };
                schedule.finished(running.lane, running.counted, outcome.job.as_u128(), &outcome.ending.reach, now);
                let Running { kind, sent_at, attempts, .. } = running;
                if let Some(kind) = kind {
                    counters::note_latency(kind, sent_at.elapsed());
                }
                let end = finished(outcome.job, outcome.lease, kind, outcome.ending, attempts, settings);
                if end.completion.is_sync {
                    syncs.push(end);
                    continue;
                }
                return Ok(Some(end));
            }
            Ok(None)
        })?;
        Ok(())
    }

    fn wait(&mut self) {
        self.take_wakes();
        let record_at = self.record_at();
        let now = Instant::now();
        let may_claim = self.may_claim();
        let is_feed_due = || self.feed.is_due(&self.schedule, self.schedule.room() > 0, now);
        let busy = self.outcomes_due
            || self.look_due
            // Jobs that failed before they were sent are outcomes, too.
            || self.backlog.has_fresh()
            || (may_claim && (self.picks_due || self.schedule.has_doomed() || is_feed_due()));
        let asked = (self.outdated && (!self.drains || self.is_drained()))
            || self.settings_due
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
            let look = self.feed.look_for_due_at(self.in_flight.is_empty());
            let jobs = [self.feed.next(&self.schedule), probe, look, self.schedule.window_at()];
            let jobs = jobs.into_iter().flatten().filter(|_| may_claim);
            let next = jobs
                .chain(self.backlog.look_again())
                .chain(self.drain_until)
                .chain(self.flush_at)
                .chain(record_at)
                .chain([self.next_poll])
                .chain(self.limits_due())
                .chain(self.prune_at())
                .chain(self.refresh_at())
                .chain(self.restoring_until)
                .chain(self.syncs.due())
                .min()
                .unwrap_or(now);
            next.saturating_duration_since(now)
        };
        self.waiter.wait(time);
    }

    /// Whether a worker that makes room has nothing left to do.
    fn is_drained(&self) -> bool {
        let is_over = self.drain_until.is_some_and(|until| Instant::now() >= until);
        self.in_flight.is_empty()
            && !self.outcomes_due
            && (is_over || (self.backlog.is_empty() && self.syncs.is_empty()))
    }

    /// Whether it takes jobs at all.
    pub fn may_claim(&self) -> bool {
        self.settings.enabled && !self.outdated && self.restoring_until.is_none()
    }

    fn take_settings(&mut self) {
        self.settings = start::settings(self.descriptors);
        self.limits.set(start::limit_values(&self.settings));
        self.schedule.set_limits(start::caps(&self.settings), start::rules(&self.settings));
        if let Err(problem) = self.outbound.configure(start::egress(&self.settings, self.descriptors)) {
            log!("nexus_hub: {problem}; requests go as before");
        }
        // What the executor's URL and key are now is read by the poll.
        self.edge = (self.settings.executor == Executor::Edge).then(|| Err("the executor is not known yet".into()));
        // The poll looks whether the database's settings have changed, too.
        self.next_poll = Instant::now();
        start::tell_of_vault_keys(self.extension);
    }

    /// Writes what is finished, and gives back what is in flight.
    fn finish(&mut self) -> i32 {
        self.settings.enabled = false;
        let begin = Instant::now();
        loop {
            self.not_before = None;
            let more = self.collect().is_ok() && self.outcomes_due;
            match self.step() {
                Ok(Step::Done(done)) => self.settle(done),
                Ok(Step::ExtensionGone { .. }) => break,
                Err(failure) => {
                    if self.failed(failure).is_some() {
                        break;
                    }
                }
            }
            if (!more && self.backlog.is_empty()) || begin.elapsed() >= LAST_TIME {
                break;
            }
            // Somebody keeps rows locked, perhaps for a moment only.
            if !more {
                std::thread::sleep(LAST_PAUSE);
            }
        }
        let held = self.in_flight.keys().copied().chain(self.syncs.claims()).chain(self.backlog.claims());
        let leases: HashSet<_> = held.map(|(_, lease)| lease).collect();
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
        // Else another one finds it: one writes it at a time.
        let is_last = bgworker::stop_requested() || shmem::leave_requested();
        if !self.drains || (is_last && !shmem::has_successor()) {
            self.record_last();
        }
        if shmem::leave_requested() {
            shmem::set_worker_state(WorkerState::Left);
        }
        GONE
    }
}
