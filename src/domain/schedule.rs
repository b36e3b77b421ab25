//! Which pending jobs are sent next.
//!
//! Jobs of one target and user wait in a lane; lanes of one priority take turns. What a lane may send is bounded by
//! the places there are in all, for its user, for its server and for its host, and by the host's circuit breaker. A
//! lane that may send nothing is parked where it is held up, and costs nothing there; so it holds up nobody. What waits in the table is read in small pieces
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
}

impl Lane {
    fn is_empty(&self) -> bool {
        self.in_flight == 0 && self.waiting.iter().all(VecDeque::is_empty) && self.gap.iter().all(Option::is_none)
    }
}

/// Lanes that wait for a place, with the priority of what waits in them.
type Parked = VecDeque<(LaneId, usize)>;

#[derive(Default)]
struct User {
    in_flight: usize,
    parked: Parked,
}

#[derive(Default)]
struct Host {
    name: String,
    in_flight: usize,
    breaker: Breaker,
    probe: Option<u128>,
    is_changed: bool,
    parked: Parked,
}

struct Server {
    in_flight: usize,
    cap: usize,
    parked: Parked,
}

/// What a lane may send now.
enum Gate {
    Open,
    /// One job, to see whether the host is back.
    Probe,
    /// And whether a larger share of what is free would open it.
    ShutBy(Place, bool),
    /// Nobody knows yet where its jobs go.
    Unrouted,
}

/// Where a lane can be held up.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    User(usize),
    Server(usize),
    Host(usize),
}

/// Lanes that get another chance when one request has ended: its own place, and one more in case there is room for it.
const UNPARKED: usize = 2;

/// Where a job counts as in flight, from its pick to its end, wherever its lane leads meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    user: Option<usize>,
    server: Option<usize>,
    host: Option<usize>,
}

/// A job to be claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    pub position: Position,
    pub bytes: usize,
    pub lane: LaneId,
    pub counted: Counted,
    pub priority: usize,
    /// `Some`: it is not to be sent, but shares the failure of its host's probe.
    pub failure: Option<Rc<str>>,
}

/// Whether a job's host could be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    Reached,
    Unreachable(String),
    /// The time was over, and nobody knows at what.
    Silent(String),
    /// It was not tried.
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
    users: Table<u128, User>,
    hosts: Table<String, Host>,
    servers: Table<String, Server>,
    /// Jobs that wait for their claim because their host's probe failed.
    doomed: VecDeque<Pick>,
    /// Every job in this memory that is not claimed yet.
    known: HashSet<u128>,
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
            let place = self.servers.place(name, || Server { in_flight: 0, cap: *cap, parked: Parked::new() });
            self.servers[place].cap = *cap;
            place
        });
        // Whatever it waited for there.
        self.unpark_around(id);
        let Some(lane) = self.lanes.get_mut(id).and_then(Option::as_mut) else { return };
        lane.is_routed = true;
        // What is in flight counts where it was sent.
        (lane.host, lane.server) = (host, server);
    }

    fn host(&mut self, name: &str) -> usize {
        self.hosts.place(name, || Host { name: name.to_owned(), ..Host::default() })
    }

    // ── Sending ──

    /// Up to `limit` jobs to be claimed now. They count as in flight, until [`Schedule::finished`] or
    /// [`Schedule::put_back`].
    pub fn pick(&mut self, limit: usize, now: Instant) -> Vec<Pick> {
        let (mut picks, mut bytes) = (Vec::new(), 0);
        // No more than half of the batch, so that the jobs of hosts that answer keep their pace.
        while picks.len() < limit.div_ceil(2)
            && let Some(pick) = self.doomed.pop_front()
        {
            bytes += pick.bytes;
            picks.push(pick);
        }
        self.share_anew();
        let due: Vec<_> =
            self.tripped.iter().copied().filter(|host| self.hosts[*host].breaker.pass(now) == Pass::One).collect();
        due.into_iter().for_each(|host| self.unpark(Place::Host(host), 1));
        for priority in 0..PRIORITIES {
            let mut unrouted = VecDeque::new();
            while picks.len() < limit && bytes < MAX_CLAIM_BYTES && self.in_flight < self.caps.total {
                let Some(id) = self.turns[priority].pop_front() else { break };
                let gate = self.gate(id, now);
                let Some(lane) = self.lane(id) else { continue };
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
                    Gate::Unrouted => {
                        unrouted.push_back(id);
                        continue;
                    }
                    Gate::Open | Gate::Probe => {}
                }
                let Some(Waiting { position, bytes: size }) = lane.waiting[priority].pop_front() else { continue };
                let counted = Counted { user: lane.user, server: lane.server, host: lane.host };
                bytes += size;
                self.turns[priority].push_back(id);
                self.count(id, counted, true);
                if let (Gate::Probe, Some(host)) = (gate, counted.host) {
                    self.probe(host, position.id);
                }
                self.look_for_more(id, priority);
                picks.push(Pick { position, bytes: size, lane: id, counted, priority, failure: None });
            }
            self.turns[priority].append(&mut unrouted);
        }
        self.has_more = picks.len() >= limit || bytes >= MAX_CLAIM_BYTES;
        picks
    }

    /// Whether the last pick ended because it had enough.
    pub fn has_more(&self) -> bool {
        self.has_more
    }

    fn gate(&self, id: LaneId, now: Instant) -> Gate {
        let Some(lane) = self.lanes.get(id).and_then(Option::as_ref).filter(|lane| lane.is_routed) else {
            return Gate::Unrouted;
        };
        let fair = self.room().saturating_mul(FAIR_SHARE);
        if let Some(user) = lane.user.filter(|user| self.users[*user].in_flight >= fair) {
            return Gate::ShutBy(Place::User(user), true);
        }
        if let Some(server) = lane.server.filter(|server| self.servers[*server].in_flight >= self.servers[*server].cap)
        {
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

    fn parked(&mut self, place: Place) -> &mut Parked {
        match place {
            Place::User(user) => &mut self.users[user].parked,
            Place::Server(server) => &mut self.servers[server].parked,
            Place::Host(host) => &mut self.hosts[host].parked,
        }
    }

    /// Gives lanes another chance whose share has grown since, because requests of others have ended.
    fn share_anew(&mut self) {
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

    /// Gives up to `number` lanes that are held up at a place another chance.
    fn unpark(&mut self, place: Place, mut number: usize) {
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
    fn unpark_around(&mut self, id: LaneId) {
        let Some(lane) = self.lane(id) else { return };
        let places = [lane.user.map(Place::User), lane.server.map(Place::Server), lane.host.map(Place::Host)];
        places.into_iter().flatten().for_each(|place| self.unpark(place, usize::MAX));
    }

    fn count(&mut self, id: LaneId, counted: Counted, more: bool) {
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

    fn probe(&mut self, place: usize, job: u128) {
        self.hosts[place].breaker.probe();
        self.hosts[place].probe = Some(job);
        self.changed(place);
    }

    fn changed(&mut self, place: usize) {
        let host = &mut self.hosts[place];
        if !std::mem::replace(&mut host.is_changed, true) {
            self.changed.push(place);
        }
        if matches!(host.breaker, Breaker::Closed { .. }) {
            self.tripped.remove(&place);
        } else {
            self.tripped.insert(place);
        }
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
            self.finished(pick.lane, pick.counted, pick.position.id, &Reach::Unknown, now);
            if let Some(lane) = self.lane(pick.lane) {
                lane.waiting[pick.priority].push_front(Waiting { position: pick.position, bytes: pick.bytes });
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
    pub fn finished(&mut self, id: LaneId, counted: Counted, job: u128, reach: &Reach, now: Instant) {
        self.count(id, counted, false);
        let Some(place) = counted.host else { return };
        let host = &mut self.hosts[place];
        let is_probe = host.probe.take_if(|probe| *probe == job).is_some();
        let (trip, is_changed) = match reach {
            Reach::Reached => (Trip::Nothing, host.breaker.reached()),
            // A probe that nobody answers is no better than one that nobody takes.
            Reach::Silent(error) if is_probe => (host.breaker.failed(now, error, true, &self.rules), true),
            Reach::Unreachable(error) => {
                let trip = host.breaker.failed(now, error, is_probe, &self.rules);
                (trip, trip != Trip::Nothing)
            }
            Reach::Silent(_) | Reach::Unknown => {
                if is_probe {
                    host.breaker.probe_lost(now);
                }
                (Trip::Nothing, is_probe)
            }
        };
        if is_changed {
            self.changed(place);
        }
        match (trip, reach) {
            (Trip::ProbeFailed, Reach::Unreachable(error) | Reach::Silent(error)) => self.doom(place, error),
            (_, Reach::Reached) if is_changed => self.unpark(Place::Host(place), usize::MAX),
            _ => {}
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
                self.doomed.extend(picks.map(|Waiting { position, bytes }| Pick {
                    position,
                    bytes,
                    lane: id,
                    counted: Counted::default(),
                    priority,
                    failure: Some(Rc::clone(&error)),
                }));
                self.look_for_more(id, priority);
            }
        }
        // Those that are empty now are to be forgotten.
        self.unpark(Place::Host(host), usize::MAX);
    }

    /// The breakers that have changed since the last call.
    pub fn breaker_changes(&mut self, now: Instant) -> Vec<BreakerState> {
        let mut changes = Vec::new();
        for place in std::mem::take(&mut self.changed) {
            let host = &mut self.hosts[place];
            host.is_changed = false;
            let (state, failures, until, error) = match &host.breaker {
                Breaker::Closed { failures } => ("closed", *failures, now, ""),
                Breaker::Open { failures, until, error, .. } => ("open", *failures, *until, error.as_str()),
                Breaker::HalfOpen { failures, error, .. } => ("half-open", *failures, now, error.as_str()),
            };
            changes.push(BreakerState {
                host: host.name.clone(),
                state,
                failures,
                probe_in: until.saturating_duration_since(now),
                error: error.to_owned(),
            });
        }
        changes
    }

    /// When a probe may be sent to a host.
    pub fn next_probe(&self) -> Option<Instant> {
        self.tripped.iter().filter_map(|host| self.hosts[*host].breaker.probe_at()).min()
    }

    /// Whether jobs wait for their claim that share a probe's failure.
    pub fn has_doomed(&self) -> bool {
        !self.doomed.is_empty()
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
