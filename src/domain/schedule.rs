//! Which pending jobs are sent next.
//!
//! Jobs of one target and user wait in a lane; lanes of one priority take turns. What a lane may send is bounded by
//! the places there are in all, for its user, for its server and for its host, and by the host's circuit breaker. A
//! lane that may send nothing is parked where it is held up, and costs nothing there; so it holds up nobody. What waits
//! in the table is read in small pieces (see `cursor`), so the memory is bounded whatever the table holds.

mod cursor;
mod hosts;
mod places;
mod rest;
mod table;

pub use cursor::{Position, Read, ReadKind, Row};
pub use hosts::{BreakerState, Reach};
pub use places::Counted;
pub use rest::{Charge, Meter, Rate};

use super::breaker::{Breaker, Pass, Rules};
use cursor::Cursor;
use hosts::Host;
use places::{Gate, Parked, Place, Server, User};
use rest::Resting;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::time::Instant;
use table::Table;

/// Priorities, 1 to 9.
pub const PRIORITIES: usize = 9;
/// How much is kept in memory, and read at a time.
#[derive(Clone, Copy, Debug)]
struct Room {
    /// Jobs that wait, in one lane and priority.
    lane: usize,
    /// Jobs of a lane and priority below which more are read.
    low: usize,
    /// Jobs that a lane may always have.
    short: usize,
    /// Jobs that wait in all.
    total: usize,
    /// Rows of one read.
    chunk: usize,
    /// Rows of a read that passes over much to find little.
    large_chunk: usize,
    /// Jobs that lanes that rest have to give up together, for it to be worth a look at all lanes.
    worthwhile: usize,
}

const ROOM: Room =
    Room { lane: 2_000, low: 256, short: 16, total: 200_000, chunk: 512, large_chunk: 2_000, worthwhile: 2_000 };

/// Arguments of the jobs that are claimed at a time.
const MAX_CLAIM_BYTES: usize = 32 * 1024 * 1024;

/// What the worker may have in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    pub total: usize,
    /// For one host, besides its fair share.
    pub per_host: usize,
}

/// The place of a lane.
pub type LaneId = usize;

/// What the jobs of a lane have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LaneKey {
    pub user: Option<u128>,
    /// The `server_id`, or the authority of the URL.
    pub target: String,
    pub is_mcp: bool,
}

/// Where the jobs of a lane go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Host and port.
    pub host: String,
    /// The server, and how many requests it may have in flight.
    pub server: Option<(String, usize)>,
    pub rate: Rate,
}

/// A job that waits.
#[derive(Clone, Copy)]
struct Waiting {
    position: Position,
    bytes: usize,
}

struct Lane {
    key: LaneKey,
    waiting: [VecDeque<Waiting>; PRIORITIES],
    /// From here on there may be jobs in the table that there was no room for.
    gap: [Option<Position>; PRIORITIES],
    /// The refill that ran out of room for this lane.
    stopped: [u32; PRIORITIES],
    in_turn: [bool; PRIORITIES],
    in_flight: usize,
    is_routed: bool,
    user: Option<usize>,
    host: Option<usize>,
    server: Option<usize>,
    rate: Rate,
    /// It has used up its rate limit.
    rests: bool,
    /// Priorities of which it has no turns as long as it rests, as bits.
    set_aside: u16,
}

impl Lane {
    fn is_empty(&self) -> bool {
        self.in_flight == 0 && self.waiting.iter().all(VecDeque::is_empty) && self.gap.iter().all(Option::is_none)
    }
}

/// A job to be claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    pub position: Position,
    pub bytes: usize,
    pub lane: LaneId,
    pub counted: Counted,
    pub priority: usize,
    /// What was counted against its lane's rate limit.
    pub charge: Option<Charge>,
    /// `Some`: it is not to be sent, but shares the failure of its host's probe.
    pub failure: Option<Rc<str>>,
}

/// The jobs that wait, as far as they are known, and what is in flight.
pub struct Schedule {
    caps: Caps,
    rules: Rules,
    lanes: Vec<Option<Lane>>,
    free_lanes: Vec<LaneId>,
    lane_of: HashMap<LaneKey, LaneId>,
    /// The lanes with jobs of a priority, in the order of their turns.
    turns: [VecDeque<LaneId>; PRIORITIES],
    cursors: [Cursor; PRIORITIES],
    unrouted: Vec<LaneId>,
    users: Table<u128, User>,
    hosts: Table<String, Host>,
    servers: Table<String, Server>,
    /// Requests of workers that make room, by server.
    elsewhere: HashMap<String, usize>,
    meter: Box<dyn Meter>,
    resting: Resting,
    /// Jobs that wait for their claim because their host's probe failed.
    doomed: VecDeque<Pick>,
    room: Room,
    /// Every job in this memory that is not claimed yet, and its lane.
    known: HashMap<u128, LaneId>,
    in_flight: usize,
    has_more: bool,
    /// Whether a job was passed over because there was no room at all.
    is_full: bool,
    /// Whether something was committed since the table was last read from its beginning.
    behind_due: bool,
    /// The hosts whose breakers are not closed.
    tripped: HashSet<usize>,
    /// The hosts whose breakers have changed.
    changed: Vec<usize>,
    /// Places where lanes wait for a larger share of what is free.
    strained: HashSet<Place>,
    /// The lane after which routes are looked up again.
    routes_from: LaneId,
}

impl Schedule {
    pub fn new(caps: Caps, rules: Rules, meter: Box<dyn Meter>) -> Self {
        Self {
            caps,
            rules,
            lanes: Vec::new(),
            free_lanes: Vec::new(),
            lane_of: HashMap::new(),
            turns: Default::default(),
            cursors: Default::default(),
            unrouted: Vec::new(),
            users: Table::default(),
            hosts: Table::default(),
            servers: Table::default(),
            elsewhere: HashMap::new(),
            meter,
            resting: Resting::default(),
            doomed: VecDeque::new(),
            room: ROOM,
            known: HashMap::new(),
            in_flight: 0,
            has_more: false,
            is_full: false,
            behind_due: false,
            tripped: HashSet::new(),
            changed: Vec::new(),
            strained: HashSet::new(),
            routes_from: 0,
        }
    }

    pub fn set_limits(&mut self, caps: Caps, rules: Rules) {
        (self.caps, self.rules) = (caps, rules);
        for id in 0..self.lanes.len() {
            self.unpark_around(id);
        }
    }

    /// Requests that the jobs in flight leave room for.
    pub fn room(&self) -> usize {
        self.caps.total.saturating_sub(self.in_flight)
    }

    fn lane(&mut self, id: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(id).and_then(Option::as_mut)
    }

    // ── Routes ──

    /// The MCP lanes whose route is not known yet; forgets them.
    pub fn take_unrouted(&mut self) -> Vec<(LaneId, LaneKey)> {
        let ids = std::mem::take(&mut self.unrouted);
        ids.into_iter().filter_map(|id| self.lane(id).map(|lane| (id, lane.key.clone()))).collect()
    }

    /// These lanes, as far as they are still there.
    pub fn lanes(&self, ids: &[LaneId]) -> Vec<(LaneId, LaneKey)> {
        let lane = |id: &LaneId| self.lanes.get(*id)?.as_ref().map(|lane| (*id, lane.key.clone()));
        ids.iter().filter_map(lane).collect()
    }

    /// What a lane's jobs have in common.
    pub fn key(&self, id: LaneId) -> Option<&LaneKey> {
        self.lanes.get(id)?.as_ref().map(|lane| &lane.key)
    }

    /// Whether nothing is known of any job.
    pub fn is_empty(&self) -> bool {
        self.lane_of.is_empty()
    }

    /// Up to `limit` MCP lanes in which jobs wait, others each time: their servers' configs may have changed.
    pub fn mcp_lanes(&mut self, limit: usize) -> Vec<(LaneId, LaneKey)> {
        let is_stale = |id: &LaneId| {
            let lane = self.lanes[*id].as_ref();
            lane.is_some_and(|lane| lane.key.is_mcp && lane.waiting.iter().any(|waiting| !waiting.is_empty()))
        };
        let (later, sooner) = (self.routes_from..self.lanes.len(), 0..self.routes_from.min(self.lanes.len()));
        let ids: Vec<_> = later.chain(sooner).filter(is_stale).take(limit).collect();
        self.routes_from = ids.last().map_or(0, |id| id + 1);
        ids.into_iter().filter_map(|id| self.lane(id).map(|lane| (id, lane.key.clone()))).collect()
    }

    /// Says where a lane's jobs go. `None`: nobody knows, and claiming them will tell why.
    pub fn route(&mut self, id: LaneId, route: Option<&Route>) {
        let host = route.map(|route| self.host(&route.host));
        let server = route.and_then(|route| route.server.as_ref()).map(|(name, cap)| {
            let elsewhere = self.elsewhere.get(name).copied().unwrap_or_default();
            let new = || Server { in_flight: 0, cap: *cap, elsewhere, parked: Parked::new() };
            let place = self.servers.place(name, new);
            self.servers[place].cap = *cap;
            place
        });
        // Whatever it waited for there.
        self.unpark_around(id);
        self.set_rate(id, route.map_or(Rate::Unmetered, |route| route.rate));
        let Some(lane) = self.lanes.get_mut(id).and_then(Option::as_mut) else { return };
        lane.is_routed = true;
        // What is in flight counts where it was sent.
        (lane.host, lane.server) = (host, server);
    }

    // ── Sending ──

    /// Up to `limit` jobs to be claimed now. They count as in flight, until [`Schedule::finished`] or
    /// [`Schedule::put_back`].
    pub fn pick(&mut self, limit: usize, now: Instant) -> Vec<Pick> {
        let (mut picks, mut bytes) = (Vec::new(), 0);
        let mut has_passed_on = false;
        // No more than half of the batch, so that the jobs of hosts that answer keep their pace.
        while picks.len() < limit.div_ceil(2)
            && let Some(pick) = self.doomed.pop_front()
        {
            bytes += pick.bytes;
            picks.push(pick);
        }
        self.share_anew();
        if self.window_at().is_some_and(|at| now >= at) {
            self.end_rest();
        }
        let due: Vec<_> =
            self.tripped.iter().copied().filter(|host| self.hosts[*host].breaker.pass(now) == Pass::One).collect();
        due.into_iter().for_each(|host| self.unpark(Place::Host(host), 1));
        for priority in 0..PRIORITIES {
            let mut unrouted = VecDeque::new();
            while picks.len() < limit && bytes < MAX_CLAIM_BYTES && self.in_flight < self.caps.total {
                let Some(id) = self.turns[priority].pop_front() else { break };
                let gate = self.gate(id, now);
                let Some(lane) = self.lanes.get_mut(id).and_then(Option::as_mut) else { continue };
                if lane.waiting[priority].is_empty() {
                    lane.in_turn[priority] = false;
                    continue;
                }
                match gate {
                    Gate::ShutBy(place, is_share) => {
                        self.parked(place).push_back((id, priority));
                        if is_share {
                            self.strained.insert(place);
                        }
                        continue;
                    }
                    Gate::Rests => {
                        lane.set_aside |= 1 << priority;
                        let host = lane.host.filter(|host| self.hosts[*host].breaker.pass(now) == Pass::One);
                        if let Some(host) = host {
                            has_passed_on = true;
                            self.unpark(Place::Host(host), 1);
                        }
                        continue;
                    }
                    Gate::Unrouted => {
                        unrouted.push_back(id);
                        continue;
                    }
                    Gate::Open | Gate::Probe => {}
                }
                let charge = match lane.rate {
                    Rate::Unmetered => Ok(None),
                    Rate::Metered(own) => self.meter.charge(&lane.key, own),
                };
                let charge = match charge {
                    Ok(charge) => charge,
                    Err(time) => {
                        lane.set_aside |= 1 << priority;
                        // The probe may be another lane's, whose turn may be over.
                        if let (Gate::Probe, Some(host)) = (gate, lane.host) {
                            has_passed_on = true;
                            self.unpark(Place::Host(host), 1);
                        }
                        self.rest(id, now + time);
                        continue;
                    }
                };
                let Some(Waiting { position, bytes: size }) = lane.waiting[priority].pop_front() else { continue };
                let counted = Counted { user: lane.user, server: lane.server, host: lane.host };
                bytes += size;
                self.turns[priority].push_back(id);
                self.count(id, counted, true);
                if let (Gate::Probe, Some(host)) = (gate, counted.host) {
                    self.probe(host, position.id);
                }
                self.look_for_more(id, priority);
                picks.push(Pick { position, bytes: size, lane: id, counted, priority, charge, failure: None });
            }
            self.turns[priority].append(&mut unrouted);
        }
        self.has_more = picks.len() >= limit || bytes >= MAX_CLAIM_BYTES || has_passed_on;
        picks
    }

    /// Whether the last pick ended because it had enough.
    pub fn has_more(&self) -> bool {
        self.has_more
    }

    /// After the commit of a claim: these jobs are no longer in the table as pending.
    pub fn claimed(&mut self, picks: &[Pick]) {
        for pick in picks {
            self.known.remove(&pick.position.id);
        }
        self.is_full &= picks.is_empty();
    }

    /// Takes picks back that could not be claimed for now.
    pub fn put_back(&mut self, picks: Vec<Pick>, now: Instant) {
        for pick in picks.into_iter().rev() {
            if pick.failure.is_some() {
                self.doomed.push_front(pick);
                continue;
            }
            self.not_sent(&pick, now);
            if let Some(lane) = self.lane(pick.lane) {
                lane.waiting[pick.priority].push_front(Waiting { position: pick.position, bytes: pick.bytes });
                self.take_turns(pick.lane, pick.priority);
            }
        }
    }

    /// A job that was picked was not sent: neither its place nor its lane's rate limit is used up.
    pub fn not_sent(&mut self, pick: &Pick, now: Instant) {
        self.finished(pick.lane, pick.counted, pick.position.id, &Reach::Unknown, now);
        if let (Some(charge), Some(lane)) = (pick.charge, self.lanes.get(pick.lane).and_then(Option::as_ref)) {
            self.meter.refund(&lane.key, charge);
            self.wake_lane(pick.lane);
        }
    }

    fn take_turns(&mut self, id: LaneId, priority: usize) {
        let Some(lane) = self.lane(id) else { return };
        if !std::mem::replace(&mut lane.in_turn[priority], true) {
            self.turns[priority].push_back(id);
        }
    }

    /// Forgets lanes, users, hosts and servers that nothing is known of any more.
    pub fn retire(&mut self, now: Instant) {
        let doomed: HashSet<_> = self.doomed.iter().map(|pick| pick.lane).collect();
        for id in 0..self.lanes.len() {
            // One that is in a turn or parked is looked at there once more.
            let is_idle = |lane: &Lane| lane.is_empty() && !lane.in_turn.contains(&true) && !doomed.contains(&id);
            if let Some(lane) = self.lanes[id].take_if(|lane| is_idle(lane)) {
                self.lane_of.remove(&lane.key);
                self.cursors.iter_mut().for_each(|cursor| cursor.forget(id));
                self.unrouted.retain(|other| *other != id);
                self.free_lanes.push(id);
            }
        }
        let used = |place: fn(&Lane) -> Option<usize>| -> HashSet<usize> {
            self.lanes.iter().flatten().filter_map(place).collect()
        };
        let (users, hosts, servers) = (used(|lane| lane.user), used(|lane| lane.host), used(|lane| lane.server));
        // A host that nobody wants to reach any more, and that could be tried again.
        let tripped = self.tripped.iter().copied();
        let given_up: Vec<_> = tripped
            .filter(|place| !hosts.contains(place) && self.hosts[*place].breaker.pass(now) == Pass::One)
            .collect();
        for place in given_up {
            self.hosts[place].breaker.reached();
            self.changed(place);
        }
        self.users.retain(|place, user| users.contains(&place) || user.in_flight > 0);
        self.servers.retain(|place, server| servers.contains(&place) || server.in_flight > 0);
        self.hosts.retain(|place, host| {
            let is_open = !matches!(host.breaker, Breaker::Closed { .. });
            hosts.contains(&place) || host.in_flight > 0 || host.is_changed || is_open
        });
        let (users, hosts) = (&self.users, &self.hosts);
        self.strained.retain(|place| match place {
            Place::User(user) => users.is_used(*user),
            Place::Host(host) => hosts.is_used(*host),
            Place::Server(_) => false,
        });
    }
}

#[cfg(test)]
mod tests;
