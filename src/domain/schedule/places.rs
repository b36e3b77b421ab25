//! Where requests are counted, and what that leaves for a lane to send.

use super::{LaneId, Pass, Schedule};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// A host or a user gets at most so many times as many places as are free: alone, four fifths of all; beside others,
/// each less, and there is always a place for a newcomer. (Choudhury and Hahne, "Dynamic Queue Length Thresholds".)
const FAIR_SHARE: usize = 4;

/// Lanes that wait for a place, with the priority of what waits in them.
pub type Parked = VecDeque<(LaneId, usize)>;

#[derive(Default)]
pub struct User {
    pub(super) in_flight: usize,
    pub(super) parked: Parked,
}

pub struct Server {
    pub(super) in_flight: usize,
    pub(super) cap: usize,
    /// Requests of workers that make room.
    pub(super) elsewhere: usize,
    pub(super) parked: Parked,
}

/// What a lane may send now.
pub enum Gate {
    Open,
    /// One job, to see whether the host is back.
    Probe,
    /// And whether a larger share of what is free would open it.
    ShutBy(Place, bool),
    /// It has used up its rate limit.
    Rests,
    /// Nobody knows yet where its jobs go.
    Unrouted,
}

/// Where a lane can be held up.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    User(usize),
    Server(usize),
    Host(usize),
}

/// Lanes that get another chance when one request has ended: its own place, and one more in case there is room for it.
const UNPARKED: usize = 2;

/// Where a job counts as in flight, from its pick to its end, wherever its lane leads meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub(super) user: Option<usize>,
    pub(super) server: Option<usize>,
    pub(super) host: Option<usize>,
}

impl Schedule {
    pub(super) fn gate(&self, id: LaneId, now: Instant) -> Gate {
        let Some(lane) = self.lanes.get(id).and_then(Option::as_ref).filter(|lane| lane.is_routed) else {
            return Gate::Unrouted;
        };
        if lane.rests {
            return Gate::Rests;
        }
        let fair = self.room().saturating_mul(FAIR_SHARE);
        if let Some(user) = lane.user.filter(|user| self.users[*user].in_flight >= fair) {
            return Gate::ShutBy(Place::User(user), true);
        }
        let is_full = |server: &Server| server.in_flight.saturating_add(server.elsewhere) >= server.cap;
        if let Some(server) = lane.server.filter(|server| is_full(&self.servers[*server])) {
            return Gate::ShutBy(Place::Server(server), false);
        }
        let Some(place) = lane.host else { return Gate::Open };
        let host = &self.hosts[place];
        match host.breaker.pass(now) {
            Pass::Nothing => Gate::ShutBy(Place::Host(place), false),
            _ if host.in_flight >= fair.min(self.caps.per_host) => Gate::ShutBy(Place::Host(place), true),
            Pass::One => Gate::Probe,
            Pass::All => Gate::Open,
        }
    }

    pub(super) fn parked(&mut self, place: Place) -> &mut Parked {
        match place {
            Place::User(user) => &mut self.users[user].parked,
            Place::Server(server) => &mut self.servers[server].parked,
            Place::Host(host) => &mut self.hosts[host].parked,
        }
    }

    /// Gives lanes another chance whose share has grown since, because requests of others have ended.
    pub(super) fn share_anew(&mut self) {
        let fair = self.room().saturating_mul(FAIR_SHARE);
        for place in self.strained.iter().copied().collect::<Vec<_>>() {
            let (in_flight, most) = match place {
                Place::User(user) => (self.users[user].in_flight, fair),
                Place::Host(host) => (self.hosts[host].in_flight, fair.min(self.caps.per_host)),
                Place::Server(server) => (self.servers[server].in_flight, usize::MAX),
            };
            self.unpark(place, most.saturating_sub(in_flight));
            if self.parked(place).is_empty() {
                self.strained.remove(&place);
            }
        }
    }

    /// Says what workers that make room have in flight yet, by server: it counts towards the servers' caps.
    pub fn set_elsewhere(&mut self, elsewhere: HashMap<String, usize>) {
        self.elsewhere = elsewhere;
        let places: Vec<_> = self.servers.places().map(|(name, place)| (name.clone(), place)).collect();
        for (name, place) in places {
            self.servers[place].elsewhere = self.elsewhere.get(&name).copied().unwrap_or_default();
            self.unpark(Place::Server(place), usize::MAX);
        }
    }

    /// Whether they have any, as far as is known.
    pub fn has_elsewhere(&self) -> bool {
        !self.elsewhere.is_empty()
    }

    /// Gives up to `number` lanes that are held up at a place another chance.
    pub(super) fn unpark(&mut self, place: Place, mut number: usize) {
        while number > 0 {
            let Some((id, priority)) = self.parked(place).pop_front() else { return };
            let Some(lane) = self.lane(id) else { continue };
            if lane.waiting[priority].is_empty() {
                lane.in_turn[priority] = false;
                continue;
            }
            self.turns[priority].push_back(id);
            number -= 1;
        }
    }

    /// Gives all lanes another chance that are held up where this one may be.
    pub(super) fn unpark_around(&mut self, id: LaneId) {
        let Some(lane) = self.lane(id) else { return };
        let places = [lane.user.map(Place::User), lane.server.map(Place::Server), lane.host.map(Place::Host)];
        places.into_iter().flatten().for_each(|place| self.unpark(place, usize::MAX));
    }

    pub(super) fn count(&mut self, id: LaneId, counted: Counted, more: bool) {
        let add = |number: &mut usize| *number = if more { *number + 1 } else { number.saturating_sub(1) };
        let places = [counted.user.map(Place::User), counted.server.map(Place::Server), counted.host.map(Place::Host)];
        add(&mut self.in_flight);
        if let Some(lane) = self.lane(id) {
            add(&mut lane.in_flight);
        }
        for place in places.into_iter().flatten() {
            match place {
                Place::User(user) => add(&mut self.users[user].in_flight),
                Place::Server(server) => add(&mut self.servers[server].in_flight),
                Place::Host(host) => add(&mut self.hosts[host].in_flight),
            }
            if !more {
                self.unpark(place, UNPARKED);
            }
        }
    }
}
