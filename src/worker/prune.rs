//! What the first worker of a database deletes by itself, in batches between which jobs go on.

use super::run::Worker;
use crate::cleanup::{self, Done, MAX_BATCH, Place, Stage};
use crate::domain::metrics::Counter;
use crate::domain::sweep::Sweep;
use crate::pg::shmem::counters;
use crate::pg::{bgworker, catalog, timeout, transaction};
use pgrx::prelude::*;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Polls after which it begins anew: an idle database has no transaction for it at each.
const POLLS_BETWEEN_ROUNDS: u32 = 6;
/// After a batch that takes longer the next one is smaller, and larger again after one that takes less than a quarter:
/// triggers of the user's may take any time.
const BATCH_TIME: Duration = Duration::from_millis(40);
/// A batch that takes longer than this is broken off.
const MAX_BATCH_TIME: Duration = Duration::from_secs(1);
/// Reasons that are remembered, so that the log tells each once.
const MAX_TOLD: usize = 16;

/// Where it is.
pub struct Pruner {
    sweep: Sweep<Place>,
    /// What the sweep's times count from.
    epoch: Instant,
    /// Rows of a batch.
    rows: i32,
    /// What this round could not delete, and why the first could not.
    kept: u64,
    problem: Option<String>,
    /// What the log tells of.
    told: HashSet<String>,
}

impl Pruner {
    pub fn new(now: Instant) -> Self {
        Self {
            sweep: Sweep::new(Stage::ALL.len(), Place::start(), Duration::ZERO),
            epoch: now,
            rows: MAX_BATCH,
            kept: 0,
            problem: None,
            told: HashSet::new(),
        }
    }

    fn fit_batch(&mut self, took: Duration) {
        if took > BATCH_TIME {
            self.rows = (self.rows / 4).max(1);
        } else if took < BATCH_TIME / 4 {
            self.rows = self.rows.saturating_mul(2).min(MAX_BATCH);
        }
    }

    fn note(&mut self, done: &Done) {
        if let Some((kept, problem)) = &done.kept {
            self.kept += u64::from(kept.unsigned_abs());
            self.problem.get_or_insert_with(|| problem.clone());
        }
    }

    /// At the end of a round.
    fn tell_of_kept(&mut self) {
        let kept = std::mem::take(&mut self.kept);
        if let Some(problem) = self.problem.take()
            && self.is_news(&problem)
        {
            log!("nexus_hub: {kept} old jobs could not be deleted, and are tried again: {problem}");
        }
    }

    /// Whether the log has not told of it.
    fn is_news(&mut self, problem: &str) -> bool {
        self.told.len() < MAX_TOLD && self.told.insert(problem.to_owned())
    }
}

impl Worker {
    /// When [`Worker::prune`] has something to do.
    pub fn prune_at(&self) -> Option<Instant> {
        let is_wanted = self.place.number == 0 && !self.outdated && self.settings.retention.auto_cleanup;
        is_wanted.then(|| self.pruner.epoch + self.pruner.sweep.due())
    }

    /// Deletes a batch, in a transaction of its own: what fails here fails no job.
    pub fn prune(&mut self) {
        let begin = Instant::now();
        if self.prune_at().is_none_or(|at| begin < at) {
            return;
        }
        let Pruner { sweep, epoch, rows, .. } = &mut self.pruner;
        let (epoch, rows) = (*epoch, *rows);
        let Some((number, from)) = sweep.next(begin - epoch) else { return };
        let stage = Stage::ALL[number];
        let (extension, retention) = (self.extension, self.settings.retention);
        // A crash that forgets it leaves rows for the next round.
        let done = transaction::run_with(c"nexus_hub: deleting what is old", transaction::Durability::Later, || {
            if !catalog::hold_extension(extension) {
                return Ok(None);
            }
            timeout::start(MAX_BATCH_TIME);
            cleanup::batch(stage, from, rows, retention).map(Some).map_err(|problem| problem.to_string())
        });
        timeout::stop();
        // The time may have been over when nothing was left to be broken off.
        bgworker::forget_cancel_request();
        let now = Instant::now();
        let took = now - begin;
        let interval = self.settings.poll_interval * POLLS_BETWEEN_ROUNDS;
        let pruner = &mut self.pruner;
        pruner.fit_batch(took);
        let is_over = match done {
            Ok(Some(done)) => {
                let counter = match stage {
                    Stage::Ended(_) => Counter::DeletedJobs,
                    Stage::Attempts => Counter::DeletedAttempts,
                    Stage::Orphans => Counter::FailedOrphans,
                };
                counters::add(counter, done.rows);
                pruner.note(&done);
                pruner.sweep.done(done.swept, now - epoch, took, interval)
            }
            // Where it is gone, the next step finds out.
            Ok(None) => pruner.sweep.failed(now - epoch, took, interval),
            Err(failure) => {
                counters::add(Counter::FailedTransactions, 1);
                if pruner.is_news(&failure.message) {
                    log!("nexus_hub: what is old was not deleted, and is tried again: {}", failure.message);
                }
                pruner.sweep.failed(now - epoch, took, interval)
            }
        };
        if is_over {
            pruner.tell_of_kept();
        }
    }
}
