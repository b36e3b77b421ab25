//! What the worker takes from the table: reads, in small pieces, and picks, which are then claimed.

use super::assign::{self, Edge};
use crate::domain::schedule::{LaneId, LaneKey, Pick, ReadKind, Schedule};
use crate::jobs::queue::Queue;
use pgrx::spi::SpiError;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Reads of one transaction, while there are places for more jobs.
const MAX_ROUNDS: usize = 8;
/// Added to the time until a job is due, so that it is by the clock of the next transaction.
const MARGIN: Duration = Duration::from_millis(1);

/// How long jobs that are due now may keep the worker from finding out when the next one is.
const MAX_UNKNOWN: Duration = Duration::from_millis(10);

/// Work that may take a twentieth of the time, unless it is slow.
#[derive(Clone, Copy, Debug)]
pub struct Duty {
    next: Instant,
}

impl Duty {
    const SHARE: u32 = 20;
    /// What was held up once must not keep jobs waiting for long.
    const MAX_REST: Duration = Duration::from_secs(1);

    fn new(now: Instant) -> Self {
        Self { next: now }
    }

    fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    fn spent(&mut self, since: Instant) {
        let now = Instant::now();
        self.next = now + (now.duration_since(since) * (Self::SHARE - 1)).min(Self::MAX_REST);
    }
}

/// When to read what.
pub struct Feed {
    behind: Duty,
    /// Reading ahead of what is needed, to find lanes that wait behind a long one.
    ahead: Duty,
    /// When a job becomes due that is not due yet.
    due_at: Option<Instant>,
    /// Since when it is not known when that is.
    due_unknown: Option<Instant>,
    /// Something was committed that nobody has read yet.
    read_first: bool,
}

impl Feed {
    pub fn new(now: Instant) -> Self {
        Self { behind: Duty::new(now), ahead: Duty::new(now), due_at: None, due_unknown: None, read_first: false }
    }

    /// Has the next reading look at what was committed, whatever is known already.
    pub fn read_first(&mut self) {
        self.read_first = true;
    }

    /// A job becomes due after this time.
    pub fn expect(&mut self, time: Duration) {
        let Some(at) = Instant::now().checked_add(time + MARGIN) else { return };
        self.due_at = Some(self.due_at.map_or(at, |due| due.min(at)));
    }

    /// Notices that time has passed.
    pub fn tick(&mut self, schedule: &mut Schedule, now: Instant) {
        if self.due_at.take_if(|at| now >= *at).is_some() {
            schedule.wake_ahead();
        }
    }

    /// Whether there is something to read; `hungry`: there are places for more jobs than are known to be able to run.
    pub fn is_due(&self, schedule: &Schedule, hungry: bool, now: Instant) -> bool {
        schedule.is_refill_due()
            || (schedule.is_ahead_due() && (hungry || self.ahead.is_due(now)))
            || (schedule.is_behind_due() && self.behind.is_due(now))
    }

    /// When there will be something to read, if nothing happens.
    pub fn next(&self, schedule: &Schedule) -> Option<Instant> {
        let ahead = schedule.is_ahead_due().then_some(self.ahead.next);
        let behind = schedule.is_behind_due().then_some(self.behind.next);
        [ahead, behind, self.due_at].into_iter().flatten().min()
    }

    /// Reads, and picks up to `limit` jobs altogether. Call it in a transaction.
    pub fn fill(
        &mut self,
        queue: &Queue,
        schedule: &mut Schedule,
        edge: Option<&Result<Edge, String>>,
        picks: &mut Vec<Pick>,
        limit: usize,
        now: Instant,
    ) -> Result<(), SpiError> {
        let behind = self.behind.is_due(now);
        for round in 0..MAX_ROUNDS {
            let hungry = picks.len() < limit;
            let begin = Instant::now();
            let reads = schedule
                .reads(hungry || (round == 0 && (self.read_first || self.ahead.is_due(now))), behind && round == 0);
            self.read_first = false;
            if reads.is_empty() {
                break;
            }
            let found = queue.read(&reads)?;
            for (read, rows) in reads.iter().zip(found) {
                schedule.take(read, rows);
            }
            if reads.iter().any(|read| read.kind == ReadKind::Behind) {
                self.behind.spent(begin);
            }
            if reads.iter().any(|read| read.kind == ReadKind::Ahead) {
                self.ahead.spent(begin);
            }
            let unrouted = schedule.take_unrouted();
            route(queue, schedule, edge, unrouted)?;
            if !hungry {
                break;
            }
            picks.extend(schedule.pick(limit - picks.len(), now));
        }
        if !schedule.is_ahead_due() {
            self.due_unknown.get_or_insert(now);
        }
        Ok(())
    }

    /// When somebody has to find out when the next job is due, which no job that is due now should wait for.
    pub fn look_for_due_at(&self, is_idle: bool) -> Option<Instant> {
        self.due_unknown.map(|since| if is_idle { since } else { since + MAX_UNKNOWN })
    }

    /// Finds out when the next job is due. Call it in a transaction.
    pub fn look_for_due(&mut self, queue: &Queue) -> Result<(), SpiError> {
        let due = queue.next_due()?;
        self.due_unknown = None;
        self.due_at = None;
        due.into_iter().for_each(|time| self.expect(time));
        Ok(())
    }
}

/// Learns what workers that make room have in flight yet; `own` is what this worker's leases begin with. Call it in a
/// transaction.
pub fn count_elsewhere(queue: &Queue, schedule: &mut Schedule, own: u64) -> Result<(), SpiError> {
    let (keys, counts): (Vec<_>, Vec<_>) = Queue::elsewhere(own)?.into_iter().unzip();
    let servers = queue.servers(&keys)?;
    let mut elsewhere = HashMap::new();
    for ((key, count), server) in keys.iter().zip(counts).zip(&servers) {
        let route = assign::route(key.user, &key.target, server);
        if let Some((name, _)) = route.and_then(|route| route.server) {
            *elsewhere.entry(name).or_default() += count;
        }
    }
    schedule.set_elsewhere(elsewhere);
    Ok(())
}

/// Says where the jobs of MCP lanes go. Call it in a transaction.
pub fn route(
    queue: &Queue,
    schedule: &mut Schedule,
    edge: Option<&Result<Edge, String>>,
    lanes: Vec<(LaneId, LaneKey)>,
) -> Result<(), SpiError> {
    if lanes.is_empty() {
        return Ok(());
    }
    if let Some(edge) = edge {
        let route = edge.as_ref().ok().map(Edge::route);
        lanes.iter().for_each(|(lane, _)| schedule.route(*lane, route.as_ref()));
        return Ok(());
    }
    let (ids, keys): (Vec<_>, Vec<_>) = lanes.into_iter().unzip();
    let servers = queue.servers(&keys)?;
    for ((lane, key), server) in ids.into_iter().zip(&keys).zip(&servers) {
        schedule.route(lane, assign::route(key.user, &key.target, server).as_ref());
    }
    Ok(())
}
