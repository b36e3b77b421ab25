//! The worker's part in rate limits: minutes that are over go from shared memory into the table.

use super::run::Worker;
use crate::pg::{catalog, transaction};
use pgrx::prelude::*;
use std::time::Instant;

impl Worker {
    /// When [`Self::record_limits`] may have something to do.
    pub fn limits_due(&self) -> Option<Instant> {
        (self.place.number == 0 && !self.outdated).then(|| self.recorder.due())
    }

    /// Writes a batch down, in a transaction of its own: what fails here holds no job up.
    pub fn record_limits(&mut self) {
        let (now, poll_interval) = (Instant::now(), self.settings.poll_interval);
        if self.limits_due().is_none_or(|due| now < due) {
            return;
        }
        let Some(batch) = self.recorder.batch(now, poll_interval) else { return };
        let extension = self.extension;
        // It was done in memory before; that it is done is not worth waiting for.
        let done = transaction::run_with(c"nexus_hub: recording rate limits", transaction::Durability::Later, || {
            if !catalog::hold_extension(extension) {
                return Ok(false);
            }
            batch.write().map_err(|problem| problem.to_string())
        });
        let done = done.map_err(|failure| {
            log!("nexus_hub: minutes of rate limits were not recorded, and are tried again: {}", failure.message);
        });
        self.recorder.settle(batch, done.ok(), now, poll_interval);
    }
}
