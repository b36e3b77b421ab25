//! Which pending jobs are sent next.
//!
//! Jobs of one target and user wait in a lane; lanes of one priority take turns. What a lane may send is bounded by
//! the places there are in all, for its user, for its server and for its host, and by the host's circuit breaker. A
//! lane that may send nothing is passed over, so it holds up nobody. What waits in the table is read in small pieces
//! (see `cursor`), so the memory is bounded whatever the table holds.

mod cursor;
mod table;

pub use cursor::{Position, Read, ReadKind, Row};

use super::breaker::{Breaker, Pass, Rules, Trip};
use cursor::Cursor;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};
use table::Table;

/// Priorities, 1 to 9.
pub const PRIORITIES: usize = 9;
/// A host or a user gets at most so many times as many places as are free: alone, four fifths of all; beside others,
/// each less, and there is always a place for a newcomer. (Choudhury and Hahne, "Dynamic Queue Length Thresholds".)
const FAIR_SHARE: usize = 4;
/// Jobs that wait in memory, in one lane and priority.
const LANE_ROOM: usize = 2_000;
/// Jobs of a lane and priority below which more are read.
const LANE_LOW: usize = 256;
/// Jobs that wait in memory in all.
const TOTAL_ROOM: usize = 200_000;

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
}

struct Lane {
    key: LaneKey,
    waiting: [VecDeque<Position>; PRIORITIES],
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
}

impl Lane {
    fn is_empty(&self) -> bool {
        self.in_flight == 0 && self.waiting.iter().all(VecDeque::is_empty) && self.gap.iter().all(Option::is_none)
    }
}

#[derive(Default)]
struct Host {
    in_flight: usize,
    breaker: Breaker,
    probe: Option<u128>,
    is_changed: bool,
}

struct Server {
    in_flight: usize,
    cap: usize,
}

/// A job to be claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    pub position: Position,
    pub lane: LaneId,
    pub priority: usize,
    /// `Some`: it is not to be sent, but shares the failure of its host's probe.
    pub failure: Option<Rc<str>>,
}

/// Whether a job's host could be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    Reached,
    Unreachable(String),
    /// Nobody knows: the time was over, say.
    Unknown,
}

/// How a breaker stands, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerState {
    pub host: String,
    /// closed, open or half-open.
    pub state: &'static str,
    pub failures: u32,
    pub probe_in: Duration,
    pub error: String,
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
    users: Table<u128, usize>,
    hosts: Table<String, Host>,
    servers: Table<String, Server>,
    /// Jobs that wait for their claim because their host's probe failed.
    doomed: VecDeque<Pick>,
    /// Every job in this memory that is not claimed yet.
    known: HashSet<u128>,
    in_flight: usize,
    /// Whether something was committed since the table was last read from its beginning.
    behind_due: bool,
    /// Whether a breaker has changed.
    is_changed: bool,
}

impl Schedule {
    pub fn new(caps: Caps, rules: Rules) -> Self {
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
            doomed: VecDeque::new(),
            known: HashSet::new(),
            in_flight: 0,
            behind_due: false,
            is_changed: false,
        }
    }

    pub fn set_limits(&mut self, caps: Caps, rules: Rules) {
        (self.caps, self.rules) = (caps, rules);
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

    /// All MCP lanes: their servers' configs may have changed.
    pub fn mcp_lanes(&self) -> Vec<(LaneId, LaneKey)> {
        let lanes = self.lanes.iter().enumerate();
        lanes
            .filter_map(|(id, lane)| lane.as_ref().filter(|lane| lane.key.is_mcp).map(|lane| (id, lane.key.clone())))
            .collect()
    }

    /// Says where a lane's jobs go. `None`: nobody knows, and claiming them will tell why.
    pub fn route(&mut self, id: LaneId, route: Option<&Route>) {
        let host = route.map(|route| self.hosts.place(&route.host, Host::default));
        let server = route.and_then(|route| route.server.as_ref()).map(|(name, cap)| {
            let place = self.servers.place(name, || Server { in_flight: 0, cap: *cap });
            self.servers[place].cap = *cap;
            place
        });
        let (hosts, servers) = (&mut self.hosts, &mut self.servers);
        let Some(lane) = self.lanes.get_mut(id).and_then(Option::as_mut) else { return };
        lane.is_routed = true;
        if lane.host == host && lane.server == server {
            return;
        }
        // What is in flight counts where the lane stands now.
        if let Some(before) = lane.host {
            hosts[before].in_flight = hosts[before].in_flight.saturating_sub(lane.in_flight);
        }
        if let Some(before) = lane.server {
            servers[before].in_flight = servers[before].in_flight.saturating_sub(lane.in_flight);
        }
        (lane.host, lane.server) = (host, server);
        if let Some(now) = host {
            hosts[now].in_flight += lane.in_flight;
        }
        if let Some(now) = server {
            servers[now].in_flight += lane.in_flight;
        }
    }

    // ── Sending ──

    /// Up to `limit` jobs to be claimed now. They count as in flight, until [`Schedule::finished`] or
    /// [`Schedule::put_back`].
    pub fn pick(&mut self, limit: usize, now: Instant) -> Vec<Pick> {
        let mut picks = Vec::new();
        // No more than half of the batch, so that the jobs of hosts that answer keep their pace.
        while picks.len() < limit.div_ceil(2)
            && let Some(pick) = self.doomed.pop_front()
        {
            picks.push(pick);
        }
        for priority in 0..PRIORITIES {
            let mut shut = VecDeque::new();
            while picks.len() < limit && self.in_flight < self.caps.total {
                let Some(id) = self.turns[priority].pop_front() else { break };
                let pass = self.pass(id, now);
                let Some(lane) = self.lane(id) else { continue };
                if lane.waiting[priority].is_empty() {
                    lane.in_turn[priority] = false;
                    continue;
                }
                if pass == Pass::Nothing {
                    shut.push_back(id);
                    continue;
                }
                let Some(position) = lane.waiting[priority].pop_front() else { continue };
                self.turns[priority].push_back(id);
                self.count(id, true);
                if pass == Pass::One {
                    self.probe(id, position.id);
                }
                self.look_for_more(id, priority);
                picks.push(Pick { position, lane: id, priority, failure: None });
            }
            self.turns[priority].append(&mut shut);
        }
        picks
    }

    fn pass(&self, id: LaneId, now: Instant) -> Pass {
        let Some(lane) = self.lanes.get(id).and_then(Option::as_ref) else { return Pass::Nothing };
        let fair = self.room().saturating_mul(FAIR_SHARE);
        let is_full = lane.user.is_some_and(|user| self.users[user] >= fair)
            || lane.server.is_some_and(|server| self.servers[server].in_flight >= self.servers[server].cap);
        if is_full || !lane.is_routed {
            return Pass::Nothing;
        }
        let Some(host) = lane.host.map(|host| &self.hosts[host]) else { return Pass::All };
        if host.in_flight >= fair.min(self.caps.per_host) { Pass::Nothing } else { host.breaker.pass(now) }
    }

    fn count(&mut self, id: LaneId, more: bool) {
        let Some(lane) = self.lanes.get_mut(id).and_then(Option::as_mut) else { return };
        let add = |number: &mut usize| *number = if more { *number + 1 } else { number.saturating_sub(1) };
        add(&mut self.in_flight);
        add(&mut lane.in_flight);
        if let Some(user) = lane.user {
            add(&mut self.users[user]);
        }
        if let Some(server) = lane.server {
            add(&mut self.servers[server].in_flight);
        }
        if let Some(host) = lane.host {
            add(&mut self.hosts[host].in_flight);
        }
    }

    fn probe(&mut self, id: LaneId, job: u128) {
        let host = self.lane(id).and_then(|lane| lane.host);
        if let Some(host) = host.map(|host| &mut self.hosts[host]) {
            host.breaker.probe();
            host.probe = Some(job);
            host.is_changed = true;
            self.is_changed = true;
        }
    }

    /// After the commit of a claim: these jobs are no longer in the table as pending.
    pub fn claimed(&mut self, picks: &[Pick]) {
        for pick in picks {
            self.known.remove(&pick.position.id);
        }
    }

    /// Takes picks back that could not be claimed for now.
    pub fn put_back(&mut self, picks: Vec<Pick>, now: Instant) {
        for pick in picks.into_iter().rev() {
            if pick.failure.is_some() {
                self.doomed.push_front(pick);
                continue;
            }
            self.finished(pick.lane, pick.position.id, &Reach::Unknown, now);
            if let Some(lane) = self.lane(pick.lane) {
                lane.waiting[pick.priority].push_front(pick.position);
                self.take_turns(pick.lane, pick.priority);
            }
        }
    }

    fn take_turns(&mut self, id: LaneId, priority: usize) {
        let Some(lane) = self.lane(id) else { return };
        if !std::mem::replace(&mut lane.in_turn[priority], true) {
            self.turns[priority].push_back(id);
        }
    }

    /// A job that was picked is no longer in flight, for whatever reason.
    pub fn finished(&mut self, id: LaneId, job: u128, reach: &Reach, now: Instant) {
        self.count(id, false);
        let Some(place) = self.lane(id).and_then(|lane| lane.host) else { return };
        let host = &mut self.hosts[place];
        let is_probe = host.probe.take_if(|probe| *probe == job).is_some();
        let trip = match reach {
            Reach::Reached => {
                host.is_changed |= host.breaker.reached();
                Trip::Nothing
            }
            Reach::Unreachable(error) => host.breaker.failed(now, error, is_probe, &self.rules),
            Reach::Unknown => {
                if is_probe {
                    host.breaker.probe_lost(now);
                    host.is_changed = true;
                }
                Trip::Nothing
            }
        };
        host.is_changed |= trip != Trip::Nothing;
        self.is_changed |= host.is_changed;
        if let (Trip::ProbeFailed, Reach::Unreachable(error)) = (trip, reach) {
            self.doom(place, error);
        }
    }

    /// The probe stood for all that waited for it.
    fn doom(&mut self, host: usize, error: &str) {
        let error: Rc<str> = error.into();
        for id in 0..self.lanes.len() {
            let Some(lane) = self.lane(id).filter(|lane| lane.host == Some(host)) else { continue };
            let waiting: Vec<_> = lane.waiting.iter_mut().map(std::mem::take).collect();
            for (priority, positions) in waiting.into_iter().enumerate() {
                let picks = positions.into_iter();
                self.doomed.extend(picks.map(|position| Pick {
                    position,
                    lane: id,
                    priority,
                    failure: Some(Rc::clone(&error)),
                }));
                self.look_for_more(id, priority);
            }
        }
    }

    /// The breakers that have changed since the last call.
    pub fn breaker_changes(&mut self, now: Instant) -> Vec<BreakerState> {
        if !std::mem::take(&mut self.is_changed) {
            return Vec::new();
        }
        let mut changes = Vec::new();
        for (name, host) in self.hosts.iter_mut() {
            if !std::mem::take(&mut host.is_changed) {
                continue;
            }
            let (state, failures, until, error) = match &host.breaker {
                Breaker::Closed { failures } => ("closed", *failures, now, ""),
                Breaker::Open { failures, until, error, .. } => ("open", *failures, *until, error.as_str()),
                Breaker::HalfOpen { failures, error, .. } => ("half-open", *failures, now, error.as_str()),
            };
            changes.push(BreakerState {
                host: name.clone(),
                state,
                failures,
                probe_in: until.saturating_duration_since(now),
                error: error.to_owned(),
            });
        }
        changes
    }

    /// When a probe may be sent to a host that jobs wait for.
    pub fn next_probe(&self) -> Option<Instant> {
        let lanes = self.lanes.iter().flatten().filter(|lane| lane.waiting.iter().any(|waiting| !waiting.is_empty()));
        lanes.filter_map(|lane| self.hosts[lane.host?].breaker.probe_at()).min()
    }

    /// Whether jobs wait for their claim that share a probe's failure.
    pub fn has_doomed(&self) -> bool {
        !self.doomed.is_empty()
    }

    /// Forgets lanes, users, hosts and servers that nothing is known of any more.
    pub fn retire(&mut self) {
        for id in 0..self.lanes.len() {
            let doomed = &self.doomed;
            let idle =
                self.lanes[id].as_ref().is_some_and(Lane::is_empty) && !doomed.iter().any(|pick| pick.lane == id);
            if idle && let Some(lane) = self.lanes[id].take() {
                self.lane_of.remove(&lane.key);
                self.turns.iter_mut().for_each(|turn| turn.retain(|other| *other != id));
                self.cursors.iter_mut().for_each(|cursor| cursor.forget(id));
                self.unrouted.retain(|other| *other != id);
                self.free_lanes.push(id);
            }
        }
        let used = |place: fn(&Lane) -> Option<usize>| -> HashSet<usize> {
            self.lanes.iter().flatten().filter_map(place).collect()
        };
        let (users, hosts, servers) = (used(|lane| lane.user), used(|lane| lane.host), used(|lane| lane.server));
        self.users.retain(|place, _| users.contains(&place));
        self.servers.retain(|place, _| servers.contains(&place));
        self.hosts.retain(|place, host| {
            hosts.contains(&place) || host.is_changed || !matches!(host.breaker, Breaker::Closed { failures: 0 })
        });
    }
}

#[cfg(test)]
mod tests;
