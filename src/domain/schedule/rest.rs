//! Rate limits: a lane that has used up its own rests until the next window. Its jobs stay pending, and hold up nobody.

use super::places::{Parked, Place};
use super::{LaneId, LaneKey, Schedule};
use std::time::{Duration, Instant};

/// Counts the requests of lanes, together with those that others count.
pub trait Meter {
    /// Counts a request, and returns the window it is counted in. The error: how long to wait until there may be room
    /// for it.
    fn charge(&mut self, lane: &LaneKey, limit: i32) -> Result<u32, Duration>;

    /// Takes back what was counted in a window.
    fn refund(&mut self, lane: &LaneKey, window: u32);
}

/// The lanes that rest.
#[derive(Default)]
pub struct Resting {
    pub(super) parked: Parked,
    /// When the first of them may go on.
    until: Option<Instant>,
}

impl Schedule {
    /// Sets the requests that a lane may make in a window.
    pub(super) fn limit_rate(&mut self, id: LaneId, limit: Option<i32>) {
        let Some(lane) = self.lane(id) else { return };
        let was = std::mem::replace(&mut lane.rate_limit, limit);
        if lane.rests && was != limit {
            self.end_rest();
        }
    }

    /// Has a lane wait until there may be room for one more request.
    pub(super) fn rest(&mut self, id: LaneId, priority: usize, until: Instant) {
        let Some(lane) = self.lane(id) else { return };
        lane.rests = true;
        self.resting.parked.push_back((id, priority));
        self.resting.until = Some(self.resting.until.map_or(until, |first| first.min(until)));
    }

    /// Gives all lanes that rest another chance: those that come too early rest again.
    pub fn end_rest(&mut self) {
        self.resting.until = None;
        for place in 0..self.resting.parked.len() {
            let (id, _) = self.resting.parked[place];
            self.lane(id).into_iter().for_each(|lane| lane.rests = false);
        }
        self.unpark(Place::Window, usize::MAX);
    }

    /// When lanes that rest may go on.
    pub fn window_at(&self) -> Option<Instant> {
        self.resting.until
    }
}
