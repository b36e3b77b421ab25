//! The ends of syncs: written one by one, each in a transaction of its own, so that what a server lists, however much it is,
//! never keeps other jobs' ends waiting for long.

use super::backlog::Finished;
use super::run::Worker;
use crate::cache::{self, Settled};
use crate::domain::metrics::Counter;
use crate::jobs::queue::{Claim, Completion};
use crate::net::Verdict;
use crate::pg::shmem::{self, counters};
use crate::pg::{catalog, transaction};
use pgrx::prelude::*;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// After a write it rests so many times as long as it took.
const REST: u32 = 3;
/// How long to wait when a session keeps rows locked; twice as long each time.
const FIRST_DELAY: Duration = Duration::from_millis(50);
const MAX_DELAY: Duration = Duration::from_secs(10);
/// Failures of its transaction after which a sync has failed.
const MAX_FAILURES: u32 = 5;

struct Waiting {
    end: Finished,
    not_before: Instant,
    delay: Duration,
    failures: u32,
}

/// The ends that are not written yet.
pub struct Syncs {
    waiting: VecDeque<Waiting>,
    rests_until: Instant,
}

impl Syncs {
    pub fn new(now: Instant) -> Self {
        Self { waiting: VecDeque::new(), rests_until: now }
    }

    pub fn push(&mut self, end: Finished) {
        let not_before = Instant::now();
        self.waiting.push_back(Waiting { end, not_before, delay: FIRST_DELAY, failures: 0 });
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What their jobs are held under.
    pub fn claims(&self) -> impl Iterator<Item = Claim> {
        self.waiting.iter().map(|waiting| waiting.end.completion.claim())
    }

    /// When there is one to write.
    pub fn due(&self) -> Option<Instant> {
        let first = self.waiting.iter().map(|waiting| waiting.not_before).min()?;
        Some(first.max(self.rests_until))
    }

    fn take(&mut self, now: Instant) -> Option<Waiting> {
        let place = self.waiting.iter().position(|waiting| waiting.not_before <= now)?;
        self.waiting.remove(place)
    }
}

impl Worker {
    /// Takes the end of a job, which is written together with others' where that cannot take long.
    pub fn push_end(&mut self, end: Finished) {
        if end.completion.is_sync {
            self.syncs.push(end);
        } else {
            self.backlog.push(end);
        }
    }

    /// Writes the end of one sync, if it is time.
    pub fn write_sync(&mut self) {
        let begin = Instant::now();
        if self.syncs.due().is_none_or(|at| begin < at) {
            return;
        }
        let Some(mut waiting) = self.syncs.take(begin) else { return };
        let (extension, queue, ttl) = (self.extension, &self.queue, self.settings.caching.ttl);
        let sync = &waiting.end.completion;
        let written = transaction::run(c"nexus_hub: writing what a server offers", || {
            // Where it is gone, the next step finds out.
            if !catalog::hold_extension(extension) {
                return Ok(true);
            }
            let write = || {
                let settled = match cache::settle(sync, ttl)? {
                    Settled::Locked => return Ok(false),
                    Settled::AsItIs => return Ok(queue.complete(&[sync])?.is_empty()),
                    Settled::As(verdict) => verdict,
                };
                let (job, lease, is_sync, http_status) = (sync.job, sync.lease, true, sync.http_status);
                let end = Completion { job, lease, is_sync, verdict: settled, http_status, retry_in: None };
                Ok::<_, pgrx::spi::SpiError>(queue.complete(&[&end])?.is_empty())
            };
            write().map_err(|problem| problem.to_string())
        });
        let now = Instant::now();
        self.syncs.rests_until = now + (now - begin) * REST;
        match written {
            Ok(true) => {
                if let Some(time) = waiting.end.completion.retry_in {
                    self.feed.expect(time);
                }
                shmem::announce_finished_jobs();
                return;
            }
            Ok(false) => {}
            Err(failure) => {
                counters::add(Counter::FailedTransactions, 1);
                waiting.failures += u32::from(!failure.transient);
                if waiting.failures == 1 {
                    log!("nexus_hub: the end of a sync was not written, and is tried again: {}", failure.message);
                }
                if waiting.failures == MAX_FAILURES {
                    let error = format!("what the server lists could not be stored: {}", failure.message);
                    waiting.end.completion.verdict = Verdict::Failed { error, result: None };
                    waiting.end.completion.retry_in = None;
                }
            }
        }
        waiting.not_before = now + waiting.delay;
        waiting.delay = (waiting.delay * 2).min(MAX_DELAY);
        self.syncs.waiting.push_back(waiting);
    }
}
