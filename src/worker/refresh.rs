//! The first worker of a database has servers synced again before what is cached of them expires.

use super::run::Worker;
use crate::cache;
use crate::domain::metrics::Counter;
use crate::pg::guc::Executor;
use crate::pg::shmem::counters;
use crate::pg::{catalog, restore, transaction};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// Polls between two looks: an idle database has no transaction for it at each.
const POLLS_BETWEEN_LOOKS: u32 = 6;

/// Where there is more to begin, it rests so many times as long as that took, and a second at least.
const REST: u32 = 9;

/// When it looks, and what the log has been told.
pub struct Refresher {
    next: Instant,
    told: Option<String>,
}

impl Refresher {
    pub fn new(now: Instant) -> Self {
        Self { next: now, told: None }
    }
}

impl Worker {
    /// When [`Worker::refresh`] has something to do.
    pub fn refresh_at(&self) -> Option<Instant> {
        let is_wanted = self.place.number == 0
            && !self.outdated
            && self.settings.enabled
            && self.settings.caching.auto_refresh
            // The executor that makes the calls then looks after the caches, too.
            && self.settings.executor == Executor::Worker;
        is_wanted.then_some(self.refresher.next)
    }

    /// Begins syncs, in a transaction of its own: what fails here fails no job.
    pub fn refresh(&mut self) {
        let now = Instant::now();
        if self.refresh_at().is_none_or(|at| now < at) {
            return;
        }
        let (extension, caching) = (self.extension, self.settings.caching);
        let done = transaction::run(c"nexus_hub: looking for what is to be synced", || {
            // Of what a dump holds, this may not be there yet.
            if !catalog::hold_extension(extension) || restore::is_under_way() {
                return Ok(0);
            }
            cache::refresh(caching).map_err(|problem| problem.to_string())
        });
        let mut pause = self.settings.poll_interval * POLLS_BETWEEN_LOOKS;
        match done {
            Ok(begun) => {
                self.refresher.told = None;
                if begun == cache::BATCH {
                    pause = (now.elapsed() * REST).max(Duration::from_secs(1));
                }
            }
            Err(failure) => {
                counters::add(Counter::FailedTransactions, 1);
                if self.refresher.told.as_ref() != Some(&failure.message) {
                    log!("nexus_hub: no syncs were begun, which is tried again: {}", failure.message);
                    self.refresher.told = Some(failure.message);
                }
            }
        }
        self.refresher.next = now + pause;
    }
}
