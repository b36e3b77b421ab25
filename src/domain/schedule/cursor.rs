//! How the pending jobs of a priority are read from the table, which may hold millions.
//!
//! The jobs lie in the order of their position. *Ahead* is the first position not read yet: reading on from there
//! finds what is new without touching what is done, of which the index may hold any number of dead entries while
//! somebody's old snapshot is open. *Behind* it there may be jobs all the same, of transactions that began earlier and
//! committed later: the table is read again from its beginning now and then. And a lane that was full when its jobs
//! were passed has a *gap*, which is *refilled* once there is room again.

use super::{Lane, LaneId, LaneKey, PRIORITIES, Rate, Room, Schedule, Waiting};
use std::collections::{HashSet, VecDeque};

/// Where a job lies among those of its priority: by its time, in microseconds, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub run_at: i64,
    pub id: u128,
}

impl Position {
    /// The first of all.
    pub const START: Self = Self { run_at: i64::MIN, id: 0 };

    fn next(self) -> Self {
        match self.id.checked_add(1) {
            Some(id) => Self { id, ..self },
            None => Self { run_at: self.run_at.saturating_add(1), id: 0 },
        }
    }
}

/// What a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadKind {
    Ahead,
    Behind,
    Refill,
}

/// Rows of one priority to be read: those at or after `from`, up to `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    pub kind: ReadKind,
    /// 0 for priority 1.
    pub priority: usize,
    pub from: Position,
    pub limit: usize,
}

/// A pending job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub position: Position,
    /// The size of its arguments.
    pub bytes: usize,
    /// `None`: it is another worker's.
    pub key: Option<LaneKey>,
}

/// Where the reading of a priority stands.
pub struct Cursor {
    ahead: Position,
    /// Nothing was ahead when it was last looked for.
    is_at_end: bool,
    behind: Option<Position>,
    refill: Option<Position>,
    /// The number of the refill, and where it began.
    run: u32,
    run_start: Position,
    /// The lanes that the refill is for.
    wanting: Vec<LaneId>,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            ahead: Position::START,
            is_at_end: false,
            behind: None,
            refill: None,
            run: 0,
            run_start: Position::START,
            wanting: Vec::new(),
        }
    }
}

impl Cursor {
    /// A lane is gone.
    pub fn forget(&mut self, lane: LaneId) {
        self.wanting.retain(|other| *other != lane);
    }
}

impl Schedule {
    /// Something was committed: there may be jobs ahead and behind.
    pub fn wake(&mut self) {
        // Lanes may rest by now, and give their memory up.
        self.is_full = false;
        self.wake_ahead();
        self.behind_due = true;
    }

    /// Jobs became due, or there may be more where the last were.
    pub fn wake_ahead(&mut self) {
        self.cursors.iter_mut().for_each(|cursor| cursor.is_at_end = false);
    }

    /// Whether the table is to be read from its beginning.
    pub fn is_behind_due(&self) -> bool {
        !self.is_full && (self.behind_due || self.cursors.iter().any(|cursor| cursor.behind.is_some()))
    }

    /// Whether there may be jobs ahead that are not known.
    pub fn is_ahead_due(&self) -> bool {
        !self.is_full && self.cursors.iter().any(|cursor| !cursor.is_at_end)
    }

    /// Whether a lane has room for jobs that it had none for before.
    pub fn is_refill_due(&self) -> bool {
        !self.is_full && self.cursors.iter().any(|cursor| !cursor.wanting.is_empty())
    }

    /// The reads that are due, of these kinds.
    pub fn reads(&mut self, ahead: bool, behind: bool) -> Vec<Read> {
        // One pass after the other: begun anew at each commit, it would never come far.
        let is_passing = self.cursors.iter().any(|cursor| cursor.behind.is_some());
        if behind && !is_passing && std::mem::take(&mut self.behind_due) {
            for cursor in self.cursors.iter_mut().filter(|cursor| cursor.ahead > Position::START) {
                cursor.behind = Some(Position::START);
            }
        }
        let mut reads = Vec::new();
        for priority in 0..PRIORITIES {
            let mut read = |kind, from, limit| reads.push(Read { kind, priority, from, limit });
            if let Some(from) = self.next_refill(priority) {
                read(ReadKind::Refill, from, self.room.large_chunk);
            }
            let cursor = &self.cursors[priority];
            if let Some(from) = cursor.behind.filter(|_| behind) {
                read(ReadKind::Behind, from, self.room.large_chunk);
            }
            if ahead && !cursor.is_at_end {
                read(ReadKind::Ahead, cursor.ahead, self.room.chunk);
            }
        }
        reads
    }

    fn next_refill(&mut self, priority: usize) -> Option<Position> {
        let (lanes, cursor) = (&self.lanes, &mut self.cursors[priority]);
        if cursor.wanting.is_empty() {
            // All that the last one was for are gone. Who asks next wants one of its own.
            cursor.refill = None;
        }
        if cursor.refill.is_none() {
            let gap = |id: &LaneId| lanes[*id].as_ref().and_then(|lane| lane.gap[priority]);
            cursor.wanting.retain(|id| gap(id).is_some());
            let from = cursor.wanting.iter().filter_map(gap).min()?;
            (cursor.refill, cursor.run_start) = (Some(from), from);
            cursor.run = cursor.run.wrapping_add(1).max(1);
        }
        cursor.refill
    }

    /// Has a lane refilled if it has become short of jobs and there are more.
    pub(super) fn look_for_more(&mut self, id: LaneId, priority: usize) {
        let Some(lane) = self.lanes.get(id).and_then(Option::as_ref) else { return };
        let wanting = &mut self.cursors[priority].wanting;
        if lane.gap[priority].is_some() && lane.waiting[priority].len() < self.room.low && !wanting.contains(&id) {
            wanting.push(id);
        }
    }

    /// Takes what a read has found.
    pub fn take(&mut self, read: &Read, rows: Vec<Row>) {
        let priority = read.priority;
        let ahead = self.cursors[priority].ahead;
        let mut is_over = rows.len() < read.limit;
        let mut next = read.from;
        for Row { position, bytes, key } in rows {
            if read.kind != ReadKind::Ahead && position >= ahead {
                is_over = true;
                break;
            }
            if self.known.len() >= self.room.total && !self.make_room() {
                // To be gone on with when there is room.
                next = position;
                is_over = false;
                self.is_full = true;
                break;
            }
            next = position.next();
            if let Some(key) = key.filter(|key| !self.is_known(position.id, key)) {
                self.offer(read.kind, priority, Waiting { position, bytes }, key);
            }
        }
        let cursor = &mut self.cursors[priority];
        match read.kind {
            ReadKind::Ahead => (cursor.ahead, cursor.is_at_end) = (next, is_over),
            ReadKind::Behind => cursor.behind = (!is_over).then_some(next),
            ReadKind::Refill => {
                cursor.refill = Some(next);
                self.end_refill(priority, next, is_over);
            }
        }
    }

    /// Whether a job waits in memory. One that somebody has moved to another server or user since is forgotten where it
    /// was.
    fn is_known(&mut self, job: u128, key: &LaneKey) -> bool {
        let Some(id) = self.known.get(&job).copied() else { return false };
        let Some(lane) = self.lanes[id].as_mut().filter(|lane| lane.key != *key) else { return true };
        let place = |waiting: &VecDeque<Waiting>| waiting.iter().position(|waiting| waiting.position.id == job);
        let found =
            lane.waiting.iter_mut().any(|waiting| place(waiting).is_some_and(|at| waiting.remove(at).is_some()));
        if found {
            self.known.remove(&job);
        }
        // If not, it is being claimed.
        !found
    }

    /// Has the longest lane forget the later half of its jobs, to be read again; where all are short, those that rest
    /// all of theirs. `false`: there are none.
    fn make_room(&mut self) -> bool {
        let lanes = self.lanes.iter().enumerate().filter_map(|(id, lane)| lane.as_ref().map(|lane| (id, lane)));
        let lengths = lanes.flat_map(|(id, lane)| {
            lane.waiting.iter().enumerate().map(move |(priority, waiting)| (waiting.len(), id, priority))
        });
        let Some((length, id, priority)) = lengths.max().filter(|(length, ..)| *length >= self.room.short) else {
            return self.forget_resting();
        };
        self.forget_waiting(id, priority, length / 2);
        true
    }

    /// Forgets the jobs of a lane from one on, to be read again.
    pub(super) fn forget_waiting(&mut self, id: LaneId, priority: usize, from: usize) {
        let run = self.cursors[priority].run;
        let Some(lane) = self.lanes[id].as_mut() else { return };
        let dropped = lane.waiting[priority].split_off(from);
        let Some(start) = dropped.front().map(|waiting| waiting.position) else { return };
        lane.gap[priority] = lane.gap[priority].into_iter().chain([start]).min();
        lane.stopped[priority] = run;
        for waiting in dropped {
            self.known.remove(&waiting.position.id);
        }
    }

    /// Lanes are gone.
    pub(super) fn forget_lanes(&mut self, lanes: &HashSet<LaneId>) {
        self.cursors.iter_mut().for_each(|cursor| cursor.wanting.retain(|id| !lanes.contains(id)));
        self.unrouted.retain(|id| !lanes.contains(id));
    }

    fn offer(&mut self, kind: ReadKind, priority: usize, job: Waiting, key: LaneKey) {
        let position = job.position;
        let (run, run_start) = (self.cursors[priority].run, self.cursors[priority].run_start);
        let Room { lane, total, short, .. } = self.room;
        let room = lane.min(total.saturating_sub(self.known.len()) / 4).max(short);
        let id = match self.lane_of.get(&key) {
            Some(id) => *id,
            None => self.open_lane(key),
        };
        let Some(lane) = self.lanes[id].as_mut() else { return };
        let has_room = lane.waiting[priority].len() < room;
        let gap = &mut lane.gap[priority];
        let takes = match (*gap, kind) {
            // Before the gap everything is known: this one was committed late.
            (Some(start), _) if position < start => has_room,
            (None, _) => {
                if !has_room {
                    *gap = Some(position);
                    lane.stopped[priority] = run;
                }
                has_room
            }
            // Only a reading without a hole from the gap's beginning on may fill it.
            (Some(start), ReadKind::Refill) if run_start <= start && lane.stopped[priority] != run => {
                if has_room {
                    *gap = Some(position.next());
                } else {
                    *gap = Some(position);
                    lane.stopped[priority] = run;
                }
                has_room
            }
            (Some(_), _) => false,
        };
        if !takes {
            return;
        }
        let waiting = &mut lane.waiting[priority];
        // In order, though a late one comes after others.
        let place = waiting.iter().rposition(|other| other.position < position).map_or(0, |place| place + 1);
        waiting.insert(place, job);
        self.known.insert(position.id, id);
        self.take_turns(id, priority);
    }

    fn end_refill(&mut self, priority: usize, next: Position, is_over: bool) {
        let (cursor, low) = (&mut self.cursors[priority], self.room.low);
        let (run, run_start) = (cursor.run, cursor.run_start);
        let is_filled = |lane: &Lane| {
            lane.waiting[priority].len() >= low || lane.stopped[priority] == run || lane.gap[priority].is_none()
        };
        let lanes = &mut self.lanes;
        cursor.wanting.retain(|id| lanes[*id].as_ref().is_some_and(|lane| !is_filled(lane)));
        if !is_over && !cursor.wanting.is_empty() {
            return;
        }
        cursor.refill = None;
        cursor.wanting.clear();
        for lane in lanes.iter_mut().flatten() {
            let passed = lane.gap[priority].is_some_and(|start| run_start <= start) && lane.stopped[priority] != run;
            if passed {
                // All there was up to here has been taken.
                lane.gap[priority] = if is_over { None } else { lane.gap[priority].max(Some(next)) };
            }
        }
        // Those that came too late for this one, and have nothing left.
        let is_dry = |lane: &Lane| lane.gap[priority].is_some() && lane.waiting[priority].is_empty() && !lane.rests;
        let dry = lanes.iter().enumerate().filter(|(_, lane)| lane.as_ref().is_some_and(is_dry));
        cursor.wanting.extend(dry.map(|(id, _)| id));
    }

    fn open_lane(&mut self, key: LaneKey) -> LaneId {
        let user = key.user.map(|user| self.users.place(&user, super::User::default));
        let host = (!key.is_mcp).then(|| self.host(&key.target));
        let lane = Lane {
            waiting: std::array::from_fn(|_| VecDeque::new()),
            gap: [None; PRIORITIES],
            stopped: [0; PRIORITIES],
            in_turn: [false; PRIORITIES],
            in_flight: 0,
            is_routed: !key.is_mcp,
            user,
            host,
            server: None,
            rate: Rate::Unmetered,
            rests: false,
            set_aside: 0,
            key: key.clone(),
        };
        let id = match self.free_lanes.pop() {
            Some(id) => {
                self.lanes[id] = Some(lane);
                id
            }
            None => {
                self.lanes.push(Some(lane));
                self.lanes.len() - 1
            }
        };
        if key.is_mcp {
            self.unrouted.push(id);
        }
        self.lane_of.insert(key, id);
        id
    }
}
