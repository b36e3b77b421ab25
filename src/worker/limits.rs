//! The worker's part in rate limits: jobs keep to them, and minutes that are over go from shared memory into the table.

use super::run::Worker;
use crate::domain::job::JobType;
use crate::domain::schedule::{Charge, LaneId, LaneKey, Meter, Pick, Schedule};
use crate::jobs::queue::ClaimedJob;
use crate::pg::{catalog, transaction};
use crate::rate_limit::jobs;
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Counts the requests of MCP jobs in shared memory.
pub struct SharedMeter;

fn user(lane: &LaneKey) -> Option<[u8; 16]> {
    lane.user.map(u128::to_be_bytes)
}

impl Meter for SharedMeter {
    fn charge(&mut self, lane: &LaneKey, own: Option<i32>) -> Result<Option<Charge>, Duration> {
        let user = user(lane);
        let limit = jobs::limit_as_known(&lane.target, user.as_ref(), own);
        let charge = |limit| jobs::charge(&lane.target, user.as_ref(), limit).map(|window| Charge { window, limit });
        limit.map(charge).transpose()
    }

    fn refund(&mut self, lane: &LaneKey, charge: Charge) {
        jobs::refund(&lane.target, user(lane).as_ref(), charge.window);
    }
}

/// What was found of claimed jobs whose lanes' limits were not those that count.
#[derive(Debug, Default)]
pub struct Recount {
    /// Jobs that are over the limit, and how long they have to wait.
    pub held_back: HashMap<u128, Duration>,
    /// Lanes that lead elsewhere by now, or under another limit.
    pub lanes: Vec<LaneId>,
}

/// Counts claimed jobs anew whose servers or limits have changed since they were picked. Nobody gets past a limit by
/// changing servers between two looks at them. Call it in the transaction that has claimed them.
pub fn recount(schedule: &Schedule, picks: &mut [Pick], claimed: &[ClaimedJob]) -> Result<Recount, SpiError> {
    let mut recount = Recount::default();
    if claimed.iter().all(|job| job.job_type == JobType::HTTP_REQUEST) {
        return Ok(recount);
    }
    let mut picks: HashMap<u128, &mut Pick> = picks.iter_mut().map(|pick| (pick.position.id, pick)).collect();
    for job in claimed {
        let Some(pick) = picks.get_mut(&job.id.as_u128()).filter(|pick| pick.failure.is_none()) else { continue };
        let Some(server) = job.server_id.as_deref().filter(|_| job.job_type != JobType::HTTP_REQUEST) else { continue };
        // What goes nowhere is not counted.
        if job.server.endpoint(server).is_err() {
            continue;
        }
        let user = job.user_id.map(Uuid::into_bytes);
        let limit = jobs::limit(server, user.as_ref(), job.server.rate_limit())?;
        let key = schedule.key(pick.lane);
        // Somebody may have moved it since it was read.
        let is_there = key.is_some_and(|key| key.target == server && self::user(key) == user);
        if is_there && limit == pick.charge.map(|charge| charge.limit) {
            continue;
        }
        recount.lanes.push(pick.lane);
        if let (Some(charge), Some(key)) = (pick.charge.take(), key) {
            jobs::refund(&key.target, self::user(key).as_ref(), charge.window);
        }
        match limit.map(|limit| jobs::charge(server, user.as_ref(), limit).map(|window| Charge { window, limit })) {
            None => {}
            Some(Ok(charge)) => pick.charge = Some(charge),
            Some(Err(time)) => _ = recount.held_back.insert(job.id.as_u128(), time),
        }
    }
    recount.lanes.sort_unstable();
    recount.lanes.dedup();
    Ok(recount)
}

impl Worker {
    /// When [`Self::record_limits`] may have something to do.
    pub fn limits_due(&self) -> Option<Instant> {
        let tidies = self.settings.retention.auto_cleanup;
        (self.place.number == 0 && !self.outdated).then(|| self.recorder.due(tidies))
    }

    /// Writes a batch down, in a transaction of its own: what fails here holds no job up.
    pub fn record_limits(&mut self) {
        let (now, poll_interval) = (Instant::now(), self.settings.poll_interval);
        if self.limits_due().is_none_or(|due| now < due) {
            return;
        }
        let Some(batch) = self.recorder.batch(now, poll_interval, self.settings.retention.auto_cleanup) else { return };
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
