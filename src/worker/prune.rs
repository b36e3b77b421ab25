//! What the first worker of a database deletes by itself, in batches between which jobs go on.

use super::run::Worker;
use crate::cleanup::{self, Stage};
use crate::domain::metrics::Counter;
use crate::domain::sweep::Sweep;
use crate::pg::shmem::counters;
use crate::pg::{catalog, transaction};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// Polls after which it begins anew: an idle database has no transaction for it at each.
const POLLS_BETWEEN_ROUNDS: u32 = 6;
/// Failures in a row that the log tells of, where somebody else is in the way.
const FAILURES_TOLD: u32 = 5;

/// Where it is.
pub struct Pruner {
    sweep: Sweep<TimestampWithTimeZone>,
    /// What the sweep's times count from.
    epoch: Instant,
    /// In a row.
    failures: u32,
    /// What the log tells of: rows that cannot be deleted.
    told: Option<String>,
}

impl Pruner {
    pub fn new(now: Instant) -> Self {
        let start = TimestampWithTimeZone::negative_infinity();
        Self { sweep: Sweep::new(Stage::ALL.len(), start, Duration::ZERO), epoch: now, failures: 0, told: None }
    }
}

impl Worker {
    /// When [`Worker::prune`] has something to do.
    pub fn prune_at(&self) -> Option<Instant> {
        let is_wanted = self.place.number == 0 && !self.outdated && self.settings.retention.auto_cleanup;
        is_wanted.then(|| self.pruner.epoch + self.pruner.sweep.due())
    }

    /// Deletes a batch, in a transaction of its own: what fails here holds no job up.
    pub fn prune(&mut self) {
        let begin = Instant::now();
        if self.prune_at().is_none_or(|at| begin < at) {
            return;
        }
        let Pruner { sweep, epoch, .. } = &mut self.pruner;
        let epoch = *epoch;
        let Some((number, from)) = sweep.next(begin - epoch) else { return };
        let stage = Stage::ALL[number];
        let (extension, retention) = (self.extension, self.settings.retention);
        // A crash that forgets it leaves rows for the next round.
        let done = transaction::run_with(c"nexus_hub: deleting what is old", transaction::Durability::Later, || {
            if !catalog::hold_extension(extension) {
                return Ok(None);
            }
            cleanup::batch(stage, from, retention).map(Some).map_err(|problem| problem.to_string())
        });
        let now = Instant::now();
        let interval = self.settings.poll_interval * POLLS_BETWEEN_ROUNDS;
        match done {
            Ok(Some(done)) => {
                self.pruner.failures = 0;
                let counter = match stage {
                    Stage::Ended(_) => Counter::DeletedJobs,
                    Stage::Attempts => Counter::DeletedAttempts,
                    Stage::Orphans => Counter::FailedOrphans,
                };
                counters::add(counter, done.rows);
                if let Some((kept, problem)) = done.kept {
                    self.tell_of_kept(kept, problem);
                }
                self.pruner.sweep.done(done.swept, now - epoch, now - begin, interval);
            }
            // Where it is gone, the next step finds out.
            Ok(None) => self.pruner.sweep.failed(now - epoch, self.settings.poll_interval),
            Err(failure) => {
                self.pruner.failures += 1;
                counters::add(Counter::FailedTransactions, 1);
                if self.pruner.failures == if failure.transient { FAILURES_TOLD } else { 1 } {
                    log!("nexus_hub: what is old was not deleted, and is tried again: {}", failure.message);
                }
                self.pruner.sweep.failed(now - epoch, self.settings.poll_interval);
            }
        }
    }

    /// Once for each reason.
    fn tell_of_kept(&mut self, kept: i32, problem: String) {
        if self.pruner.told.as_ref() != Some(&problem) {
            log!("nexus_hub: {kept} old jobs could not be deleted, and are tried again: {problem}");
            self.pruner.told = Some(problem);
        }
    }
}
