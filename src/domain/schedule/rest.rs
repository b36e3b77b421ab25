//! Rate limits: a lane that has used up its own rests until the next window. Its jobs stay pending, and hold up nobody.

use super::{LaneId, LaneKey, PRIORITIES, Pick, Reach, Schedule, Waiting};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Whether a lane's requests are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    Unmetered,
    /// With the limit that its server's row has, if any. What counts in the end is the meter's business.
    Metered(Option<i32>),
}

/// A request that was counted: in which window, and under which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    pub window: u32,
    pub limit: i32,
}

/// Counts the requests of lanes, together with those that others count.
pub trait Meter {
    /// Counts a request of a lane whose server's row has the limit `own`; `None`: it has no limit. The error: how long to
    /// wait until there may be room for it.
    fn charge(&mut self, lane: &LaneKey, own: Option<i32>) -> Result<Option<Charge>, Duration>;

    /// Takes back what was counted.
    fn refund(&mut self, lane: &LaneKey, charge: Charge);
}

/// The lanes that rest.
#[derive(Default)]
pub struct Resting {
    /// Some may have been woken since.
    lanes: Vec<LaneId>,
    /// When the first of them may go on.
    until: Option<Instant>,
    /// Whether some were forgotten, and have to be found again.
    has_forgotten: bool,
}

impl Schedule {
    pub(super) fn set_rate(&mut self, id: LaneId, rate: Rate) {
        let Some(lane) = self.lane(id) else { return };
        if std::mem::replace(&mut lane.rate, rate) != rate {
            self.wake_lane(id);
        }
    }

    /// Has a lane wait until there may be room for one more request.
    pub(super) fn rest(&mut self, id: LaneId, until: Instant) {
        let Some(lane) = self.lane(id) else { return };
        lane.rests = true;
        self.resting.lanes.push(id);
        self.resting.until = Some(self.resting.until.map_or(until, |first| first.min(until)));
    }

    /// Ends a lane's rest, if it rests.
    pub(super) fn wake_lane(&mut self, id: LaneId) {
        let Some(lane) = self.lane(id) else { return };
        if !std::mem::take(&mut lane.rests) {
            return;
        }
        let set_aside = std::mem::take(&mut lane.set_aside);
        for priority in 0..PRIORITIES {
            if set_aside & 1 << priority != 0 {
                self.turns[priority].push_back(id);
            }
            self.look_for_more(id, priority);
        }
    }

    /// Gives all lanes that rest another chance: those that come too early rest again.
    pub fn end_rest(&mut self) {
        self.resting.until = None;
        std::mem::take(&mut self.resting.lanes).into_iter().for_each(|id| self.wake_lane(id));
        self.behind_due |= std::mem::take(&mut self.resting.has_forgotten);
    }

    /// When lanes that rest may go on.
    pub fn window_at(&self) -> Option<Instant> {
        self.resting.until
    }

    /// A job that was picked waits again, because its lane's limit is found to be used up.
    pub fn hold_back(&mut self, pick: Pick, until: Instant, now: Instant) {
        self.finished(pick.lane, pick.counted, pick.position.id, &Reach::Unknown, now);
        if let Some(lane) = self.lane(pick.lane) {
            lane.waiting[pick.priority].push_front(Waiting { position: pick.position, bytes: pick.bytes });
            self.take_turns(pick.lane, pick.priority);
            self.rest(pick.lane, until);
        }
    }

    /// Forgets the jobs of all lanes that rest, and the lanes, where nothing else is known of them: they are read again
    /// when the rest is over. `false`: it was not worth looking for them.
    pub(super) fn forget_resting(&mut self) -> bool {
        let doomed: HashSet<_> = self.doomed.iter().map(|pick| pick.lane).collect();
        let known = self.known.len();
        let mut gone = HashSet::new();
        for id in 0..self.lanes.len() {
            if self.lanes[id].as_ref().is_none_or(|lane| !lane.rests) {
                continue;
            }
            (0..PRIORITIES).for_each(|priority| self.forget_waiting(id, priority, 0));
            // One that has turns elsewhere is looked at there once more.
            let is_idle = self.lanes[id].as_ref().is_some_and(|lane| {
                let is_aside = |priority: usize| !lane.in_turn[priority] || lane.set_aside & 1 << priority != 0;
                lane.in_flight == 0 && (0..PRIORITIES).all(is_aside)
            });
            if let Some(lane) = self.lanes[id].take_if(|_| is_idle && !doomed.contains(&id)) {
                self.lane_of.remove(&lane.key);
                self.free_lanes.push(id);
                gone.insert(id);
            }
        }
        self.forget_lanes(&gone);
        self.resting.lanes.retain(|id| !gone.contains(id));
        self.resting.has_forgotten |= !gone.is_empty();
        known - self.known.len() >= self.room.worthwhile
    }
}
