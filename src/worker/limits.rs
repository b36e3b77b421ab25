//! The worker's part in rate limits: jobs keep to them, and minutes that are over go from shared memory into the table.

use super::run::Worker;
use crate::domain::schedule::{LaneKey, Meter};
use crate::pg::{catalog, transaction};
use crate::rate_limit::jobs;
use crate::servers::ServerRow;
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::time::{Duration, Instant};

/// Counts the requests of MCP jobs in shared memory.
pub struct SharedMeter;

fn user(lane: &LaneKey) -> Option<[u8; 16]> {
    lane.user.map(u128::to_be_bytes)
}

impl Meter for SharedMeter {
    fn charge(&mut self, lane: &LaneKey, limit: i32) -> Result<u32, Duration> {
        jobs::charge(&lane.target, user(lane).as_ref(), limit)
    }

    fn refund(&mut self, lane: &LaneKey, window: u32) {
        jobs::refund(&lane.target, user(lane).as_ref(), window);
    }
}

/// The rate limit of a lane. Call it in a transaction.
pub fn of_lane(lane: &LaneKey, server: &ServerRow) -> Result<Option<i32>, SpiError> {
    jobs::limit(&lane.target, user(lane).as_ref(), server.rate_limit())
}

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
