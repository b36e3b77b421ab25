//! One transaction of a worker, and what follows from its commit or its failure.

use super::assign;
use super::backlog::Finished;
use super::feed;
use super::fill::Secrets;
use super::limits;
use super::run::{FLUSH_TIME, RESTART, Worker};
use super::start;
use crate::domain::job::JobType;
use crate::domain::metrics::{self, Counter};
use crate::domain::schedule::{Counted, LaneId, Pick, Reach};
use crate::jobs::queue::{Claim, ClaimedJob, Queue};
use crate::net::{Ending, Retry, Verdict};
use crate::pg::guc::WorkerSettings;
use crate::pg::guc::database::DatabaseSettings;
use crate::pg::shmem::counters;
use crate::pg::transaction::Durability;
use crate::pg::{bgworker, catalog, restore, shmem, transaction};
use crate::rate_limit;
use crate::vault::online;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long to wait before a failed transaction is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Transactions that may fail in a row, with nothing to be lost, before the worker starts anew.
const MAX_FAILURES: u32 = 20;
/// How long rows are locked one by one after somebody was found to keep one locked.
const CAREFUL_TIME: Duration = Duration::from_secs(10);
/// How often it is looked whether somebody who loads a dump has come to its end.
const RESTORE_LOOK: Duration = Duration::from_secs(1);
/// Polls after the last work at which memory is given back.
const TRIMS: u32 = 12;
/// Lanes whose servers' configs a poll looks up again.
const MAX_ROUTES: usize = 1000;

/// How a transaction went.
pub enum Step {
    Done(Done),
    /// The extension is gone; whether it is there anew.
    ExtensionGone {
        replaced: bool,
    },
}

/// What it has found.
#[derive(Default)]
pub struct Done {
    /// Jobs whose rows were locked.
    locked: Vec<Claim>,
    lease: Uuid,
    claimed: Vec<ClaimedJob>,
    /// What they name.
    secrets: Secrets,
    /// Of those that were picked, what is over its rate limit: how long it has to wait.
    held_back: HashMap<u128, Duration>,
    /// Jobs in flight that are no longer to be run.
    lost: Vec<Claim>,
    /// Somebody loads a dump: what was picked is not claimed.
    is_restoring: bool,
}

/// A job that was claimed.
pub struct Running {
    pub lane: LaneId,
    pub counted: Counted,
    /// Attempts made with this one, and allowed.
    pub attempts: (i32, i32),
    pub kind: Option<JobType>,
    pub sent_at: Instant,
}

impl Worker {
    /// One transaction: gives back what others left, writes outcomes, claims jobs.
    pub fn step(&mut self) -> Result<Step, transaction::Failure> {
        let now = Instant::now();
        self.tried.clear();
        self.not_before.take_if(|at| now >= *at);
        if self.not_before.is_some() {
            return Ok(Step::Done(Done::default()));
        }
        let poll = now >= self.next_poll;
        self.restoring_until.take_if(|at| now >= *at);
        let batch = self.backlog.batch(now);
        // After a failure outcomes come first, so that it is known which part fails.
        let may_claim = self.may_claim() && (self.failures == 0 || batch.is_empty());
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
        if self.outdated {
            // What the one in its place knows of them is shown.
            self.breakers.clear();
        }
        let look = poll || (std::mem::take(&mut self.look_due) && !self.in_flight.is_empty());
        let is_idle = batch.is_empty() && self.picks.is_empty() && self.breakers.is_empty() && !reads && !look;
        let is_due_asked = self.feed.look_for_due_at(is_idle && self.in_flight.is_empty()).is_some_and(|at| now >= at);
        let ask_due = may_claim && is_due_asked;
        if is_idle && !ask_due {
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
            in_flight
                .keys()
                .copied()
                .chain(self.backlog.claims())
                .chain(self.syncs.claims())
                .map(|(_, lease)| lease)
                .collect()
        } else {
            HashSet::new()
        };
        let mut replaced = false;
        let mut later = None;
        let mut released = 0;
        let mut rotates = false;
        let is_first = self.place.number == 0 && !self.outdated;
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
                    later = Some(DatabaseSettings::read()?).filter(|later| later != database_settings);
                    rotates = is_first && online::is_wanted()?;
                    released = release_abandoned(queue, database, holder, &active, settings.max_crashes)?;
                    if let Some(edge) = &mut *edge {
                        *edge = start::edge()?;
                    }
                    let lanes = schedule.mcp_lanes(MAX_ROUTES);
                    feed::route(queue, schedule, edge.as_ref(), lanes)?;
                    if !schedule.is_empty() {
                        rate_limit::jobs::refresh()?;
                    }
                    // Somebody may have changed or reset a limit.
                    schedule.end_rest();
                }
                // What is known is never too little: who makes room only ever finishes.
                if (poll || reads) && shmem::is_draining(database) {
                    feed::count_elsewhere(queue, schedule, holder)?;
                } else if schedule.has_elsewhere() && !shmem::is_draining(database) {
                    schedule.set_elsewhere(HashMap::new());
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
                if ask_due || (picks.is_empty() && feed.look_for_due_at(true).is_some()) {
                    feed.look_for_due(queue)?;
                }
                done.is_restoring = !picks.is_empty() && restore::is_under_way();
                if !picks.is_empty() && !done.is_restoring {
                    let jobs: Vec<_> = picks.iter().map(|pick| pick.position.id).collect();
                    done.claimed = queue.claim(lease, &jobs, careful)?;
                    if edge.is_none() {
                        let recount = limits::recount(schedule, picks, &done.claimed)?;
                        if !recount.held_back.is_empty() {
                            queue.unclaim(lease, recount.held_back.keys().copied())?;
                            done.claimed.retain(|job| !recount.held_back.contains_key(&job.id.as_u128()));
                        }
                        let lanes = schedule.lanes(&recount.lanes);
                        feed::route(queue, schedule, None, lanes)?;
                        done.held_back = recount.held_back;
                    }
                    done.secrets = Secrets::read(queue, &done.claimed, edge.is_some())?;
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
            counters::add(Counter::GivenBack, u64::from(released.unsigned_abs()));
            shmem::wake(self.database, false);
        }
        if !done.claimed.is_empty() && durability == Durability::Later {
            let is_wary = self.wary_until.is_some_and(|until| now < until);
            self.flush_at.get_or_insert(if is_wary { now } else { now + FLUSH_TIME });
        } else if !self.tried.is_empty() && done.locked.is_empty() {
            // What was written has taken the claims to the disk with it.
            self.flush_at = None;
        }
        self.failures = 0;
        self.not_before = None;
        self.picks_due = may_claim && (self.schedule.has_more() || poll);
        if let Some(later) = later {
            self.outdated |= self.database_settings.follow(&later);
            self.database_settings = later;
            self.settings_due = true;
        }
        self.breakers.clear();
        if poll {
            self.next_poll = now + self.settings.poll_interval;
            if rotates {
                self.rotation.fill(self.database);
            }
            self.tidy();
        }
        if !self.tried.is_empty() {
            shmem::announce_finished_jobs();
            if self.outdated {
                // There are places free for the one in this one's place.
                shmem::nudge(self.database, false);
            }
        }
        Ok(Step::Done(done))
    }

    /// After the commit: forgets what is written, breaks off what is cancelled, and sends what is claimed.
    pub fn settle(&mut self, done: Done) {
        let now = Instant::now();
        self.backlog.settle(&self.tried, &done.locked, now);
        for claim in done.lost {
            if let Some(running) = self.in_flight.remove(&claim) {
                self.net.cancel(claim.0, claim.1);
                self.schedule.finished(running.lane, running.counted, claim.0.as_u128(), &Reach::Unknown, now);
            }
        }
        if done.is_restoring {
            let picks = std::mem::take(&mut self.picks);
            self.schedule.put_back(picks, now);
            self.restoring_until = Some(now + RESTORE_LOOK);
            return;
        }
        let (held_back, picks): (Vec<_>, Vec<_>) = std::mem::take(&mut self.picks)
            .into_iter()
            .partition(|pick| done.held_back.contains_key(&pick.position.id));
        self.schedule.claimed(&picks);
        // The last one first, because each goes before those that wait.
        for pick in held_back.into_iter().rev() {
            let time = done.held_back.get(&pick.position.id).copied().unwrap_or_default();
            self.schedule.hold_back(pick, now + time, now);
        }
        let mut claimed: HashMap<u128, ClaimedJob> =
            done.claimed.into_iter().map(|job| (job.id.as_u128(), job)).collect();
        for pick in picks {
            match (claimed.remove(&pick.position.id), &pick.failure) {
                (Some(job), None) => self.send(job, done.lease, &done.secrets, &pick),
                (Some(job), Some(failure)) => {
                    let error =
                        format!("{failure} (not tried again for this job: the circuit breaker of its host is open)");
                    let ending = Ending { retry: Retry::Later, ..Ending::refused(&error) };
                    let attempts = (job.attempts, assign::max_attempts(&job));
                    let kind = JobType::parse(&job.job_type);
                    self.push_end(finished(job.id, done.lease, kind, ending, attempts, &self.settings));
                }
                // Cancelled or claimed meanwhile, or locked: then the next poll finds it again.
                (None, None) => self.schedule.not_sent(&pick, now),
                (None, Some(_)) => {}
            }
        }
    }

    fn send(&mut self, job: ClaimedJob, lease: Uuid, secrets: &Secrets, pick: &Pick) {
        let (id, lane, counted) = (job.id, pick.lane, pick.counted);
        let attempts = (job.attempts, assign::max_attempts(&job));
        let kind = JobType::parse(&job.job_type);
        match assign::request(job, lease, self.settings.request_timeout, self.edge.as_ref(), secrets) {
            Ok(request) => {
                // If the thread is gone, the next loop notices and the next worker takes the job.
                self.net.send(request);
                let running = Running { lane, counted, attempts, kind, sent_at: Instant::now() };
                self.in_flight.insert((id, lease), running);
            }
            Err(error) => {
                self.schedule.not_sent(pick, Instant::now());
                self.push_end(finished(id, lease, kind, Ending::refused(&error), attempts, &self.settings));
            }
        }
    }

    /// After a failed transaction: when to try again, with how much, or the exit code when that is pointless.
    pub fn failed(&mut self, failure: transaction::Failure) -> Option<i32> {
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
        counters::add(Counter::FailedTransactions, 1);
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

/// What is to be written of an attempt that has ended.
pub fn finished(
    job: Uuid,
    lease: Uuid,
    kind: Option<JobType>,
    ending: Ending,
    attempts: (i32, i32),
    settings: &WorkerSettings,
) -> Finished {
    let held = ending.held.clone();
    let is_retried = ending.retry != Retry::Never && matches!(ending.verdict, Verdict::Failed { .. });
    let jitter = if is_retried { (Uuid::new_v4().as_u64_pair().1 as u32) as f64 / f64::from(u32::MAX) } else { 0.0 };
    let completion = assign::completion(job, lease, kind, ending, attempts, settings, jitter);
    if let Some(kind) = kind {
        let ending = match (&completion.verdict, completion.retry_in) {
            (Verdict::Completed { .. }, _) => metrics::Ending::Completed,
            (Verdict::Failed { .. }, None) => metrics::Ending::Failed,
            (Verdict::Failed { .. }, Some(_)) => metrics::Ending::Retried,
            (Verdict::HandedOver, _) => metrics::Ending::HandedOver,
        };
        counters::add(Counter::Attempts(kind, ending), 1);
    }
    Finished { completion, held }
}
