//! The launcher: gives every database that has the extension its workers, and a new one when one ends.
//!
//! It is connected to no database, so it can't see where the extension is: it starts a worker, which looks, and ends
//! at once where there is none. Afterwards a commit that needs a worker asks for it. Where there are to be several, the
//! others are started beside the first, once that runs.

use super::{WORKER, WORKER_MAIN};
use crate::domain::vigil::HEALTHY_TIME;
use crate::pg::bgworker::{self, Launched};
use crate::pg::shmem::{self, Place, WorkerState};
use crate::pg::{catalog, guc, transaction};
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// How often the list of databases is read for new ones (CREATE DATABASE … TEMPLATE asks for nothing).
const RESCAN_INTERVAL: Duration = Duration::from_secs(60);
/// A worker that was asked to leave comes back after this time, if its database is still there.
const AWAY_TIME: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Workers that may be on their way at the same time: the others keep their chance of a process.
const MAX_STARTING: usize = 4;
/// For how long one that waits for others, once it is there, keeps others from being started.
const START_TIME: Duration = Duration::from_secs(5);
/// How long a worker may finish what it has begun where there is no process for the one in its place.
const DRAIN_TIME: Duration = Duration::from_secs(30);

struct Running {
    slot: usize,
    /// `None`: started by a launcher before this one.
    handle: Option<Launched>,
    /// When it was started, or found; of one that drains, when that was noticed.
    since: Instant,
}

impl Running {
    /// Never while a process has the slot, whatever it has said: it may have more to say.
    fn is_over(&self, now: Instant) -> bool {
        !shmem::slot_is_attached(self.slot)
            && match &self.handle {
                Some(handle) => handle.is_over(),
                None => self.doubtful_until().is_none_or(|until| now >= until),
            }
    }

    /// Until when a worker may still come to be that an earlier launcher has started: nobody would tell.
    fn doubtful_until(&self) -> Option<Instant> {
        let is_doubtful = self.handle.is_none()
            && shmem::slot_state(self.slot) == WorkerState::Starting
            && !shmem::slot_is_attached(self.slot);
        is_doubtful.then(|| self.since + AWAY_TIME)
    }
}

/// What the launcher knows of one of the workers that a database has or may have.
#[derive(Default)]
struct Post {
    running: Option<Running>,
    /// When to start a worker; `None`: not before somebody asks.
    due: Option<Instant>,
    failures: u32,
}

impl Post {
    /// Somebody needs a worker now; only one that keeps failing waits its time.
    fn ask(&mut self, now: Instant) {
        if self.failures == 0 {
            self.due = Some(now);
        } else {
            self.due.get_or_insert(now);
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.running.is_none() && self.due.is_some_and(|at| at <= now)
    }
}

/// The workers of a database: the first, which finds out whether the extension is there, and those beside it.
#[derive(Default)]
struct Database {
    posts: Vec<Post>,
    /// Workers that finish what they have begun, beside those in their places.
    draining: Vec<Running>,
}

impl Database {
    /// The first worker's post.
    fn first(&mut self) -> &mut Post {
        self.post(0)
    }

    fn post(&mut self, number: u16) -> &mut Post {
        let number = usize::from(number);
        if self.posts.len() <= number {
            self.posts.resize_with(number + 1, Post::default);
        }
        &mut self.posts[number]
    }

    fn running(&self) -> impl Iterator<Item = &Running> {
        self.posts.iter().filter_map(|post| post.running.as_ref())
    }

    /// Finds out what has become of the workers.
    fn notice(&mut self, now: Instant) {
        for post in &mut self.posts {
            notice_end(post, now);
            if let Some(running) = post.running.take_if(|running| is_draining(running.slot)) {
                if now.duration_since(running.since) >= HEALTHY_TIME {
                    post.failures = 0;
                }
                post.due = Some(at_once(&running, now));
                self.draining.push(Running { since: now, ..running });
            }
        }
        self.draining.retain(|running| !running.is_over(now) || !shmem::free_slot(running.slot));
    }

    /// Has the others started as soon as the first is at work.
    fn complete(&mut self, workers: u16, now: Instant) {
        let first = self.first().running.as_ref();
        if first.is_none_or(|first| shmem::slot_state(first.slot) != WorkerState::Running) {
            return;
        }
        for number in 1..workers {
            let post = self.post(number);
            if post.running.is_none() {
                post.due.get_or_insert(now);
            }
        }
    }

    /// The posts to be filled now. None as long as workers are there that share the jobs among another number.
    fn due(&self, workers: u16, now: Instant) -> impl Iterator<Item = u16> {
        let mut running = self.running().map(|running| shmem::slot_place(running.slot).of);
        let is_mixed = running.any(|of| of != workers);
        let has_first = self.posts.first().is_some_and(|post| post.running.is_some());
        let posts = (0..workers).zip(&self.posts);
        let due = posts.filter(move |(number, post)| !is_mixed && post.is_due(now) && (*number == 0 || has_first));
        due.map(|(number, _)| number)
    }
}

pub fn main() {
    bgworker::start(None);
    shmem::attach_launcher();
    let mut databases: HashMap<pg_sys::Oid, Database> = HashMap::new();
    let mut next_scan = Instant::now();
    let mut found = shmem::occupied_slots();
    // Of two in the same place, the one at work.
    found.sort_by_key(|(slot, ..)| shmem::slot_state(*slot) != WorkerState::Running);
    for (slot, oid, place) in found {
        let running = Running { slot, handle: None, since: next_scan };
        let is_in_place = matches!(shmem::slot_state(slot), WorkerState::Starting | WorkerState::Running);
        let database = databases.entry(oid).or_default();
        let post = database.post(place.number);
        if is_in_place && post.running.is_none() {
            post.running = Some(running);
        } else {
            // It drains, or ends, or has ended.
            database.draining.push(running);
        }
    }
    // One that drains may have nobody in its place yet.
    databases.values_mut().for_each(|database| database.first().due = Some(next_scan));
    let mut told_no_room = false;
    loop {
        if bgworker::stop_requested() {
            return;
        }
        bgworker::handle_interrupts_of_others();
        if bgworker::reload_configuration() {
            shmem::pass_reload_on();
        }
        let workers = guc::workers_per_database();
        shmem::set_workers(workers);
        let now = Instant::now();
        match shmem::take_wanted() {
            Some(wanted) => {
                for oid in wanted {
                    databases.entry(oid).or_default().first().ask(now);
                }
            }
            None => {
                databases.values_mut().for_each(|database| database.first().due = Some(now));
                next_scan = now;
            }
        }
        for database in databases.values_mut() {
            database.notice(now);
            database.complete(workers, now);
        }
        // A database may be gone since its worker ended: look before starting another.
        if now >= next_scan || databases.values().any(|database| database.due(workers, now).next().is_some()) {
            scan(&mut databases, now);
            next_scan = now + RESCAN_INTERVAL;
        }
        let started = start_due(&mut databases, workers, now);
        if started == Room::None {
            make_room(&databases, now);
        }
        if started == Room::None && !told_no_room {
            log!("nexus_hub: no free background worker for a database; raise max_worker_processes");
        }
        told_no_room = started == Room::None;
        let posts = databases.values().flat_map(|database| &database.posts[..database.posts.len().min(workers.into())]);
        let next = posts.filter(|post| post.running.is_none()).filter_map(|post| post.due);
        let doubtful = databases.values().flat_map(Database::running).filter_map(Running::doubtful_until);
        let until = next
            .chain(doubtful)
            .chain([next_scan])
            .min()
            .map_or(RESCAN_INTERVAL, |at| at.saturating_duration_since(now));
        // Never a busy loop: what is due but could not be started is tried again in a while.
        bgworker::wait(until.max(if started == Room::None { FIRST_RETRY } else { Duration::from_millis(20) }));
    }
}

fn is_draining(slot: usize) -> bool {
    shmem::slot_state(slot) == WorkerState::Draining
}

/// When to replace a worker that has made room: at once, unless it was there so briefly that the next may do the same.
fn at_once(running: &Running, now: Instant) -> Instant {
    if now.duration_since(running.since) < FIRST_RETRY { now + FIRST_RETRY } else { now }
}

/// Finds out why a worker is gone, and when the next one is due.
fn notice_end(post: &mut Post, now: Instant) {
    let Some(running) = post.running.take_if(|running| running.is_over(now)) else { return };
    let state = shmem::slot_state(running.slot);
    let woken = shmem::slot_was_woken(running.slot);
    if !shmem::free_slot(running.slot) {
        post.running = Some(running);
        return;
    }
    if now.duration_since(running.since) >= HEALTHY_TIME {
        post.failures = 0;
    }
    post.due = match state {
        // A wake-up that it did not see may be that of a new CREATE EXTENSION.
        WorkerState::NoExtension if !woken => post.due,
        WorkerState::NoExtension => Some(now),
        WorkerState::Replaced => Some(at_once(&running, now)),
        WorkerState::Left => Some(now + AWAY_TIME),
        WorkerState::Starting | WorkerState::Running | WorkerState::Draining | WorkerState::Stopped => {
            let delay = FIRST_RETRY * 2u32.saturating_pow(post.failures.min(16));
            post.failures += 1;
            Some(now + delay.min(LAST_RETRY))
        }
    };
}

/// Learns of new databases and forgets the ones that are gone.
fn scan(databases: &mut HashMap<pg_sys::Oid, Database>, now: Instant) {
    // Looked at before the list is read: what comes up meanwhile may be of a database that is not in it yet.
    let held: HashSet<_> = shmem::counters::databases().chain(shmem::audit::databases()).collect();
    match transaction::run(c"nexus_hub: reading pg_database", catalog::databases) {
        Ok(found) => {
            let all: HashSet<_> = found.iter().map(|(oid, _)| *oid).collect();
            let is_gone = |oid| held.contains(&oid) && !all.contains(&oid);
            shmem::audit::forget_if(is_gone);
            shmem::counters::forget_if(is_gone);
            let open: HashSet<_> = found.into_iter().filter(|(_, is_open)| *is_open).map(|(oid, _)| oid).collect();
            databases.retain(|oid, database| {
                open.contains(oid) || !database.draining.is_empty() || database.running().next().is_some()
            });
            for oid in open {
                let new = || Database { posts: vec![Post { due: Some(now), ..Post::default() }], draining: Vec::new() };
                databases.entry(oid).or_insert_with(new);
            }
        }
        Err(problem) => log!("nexus_hub: could not read the list of databases: {}", problem.message),
    }
}

/// Has the worker end that has been draining for longest, where that is long enough.
fn make_room(databases: &HashMap<pg_sys::Oid, Database>, now: Instant) {
    let draining = databases.values().flat_map(|database| &database.draining);
    let draining = draining.filter(|running| !shmem::slot_is_to_leave(running.slot));
    if let Some(running) = draining.min_by_key(|running| running.since)
        && now.duration_since(running.since) >= DRAIN_TIME
    {
        shmem::ask_slot_to_leave(running.slot);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Enough,
    None,
}

fn start_due(databases: &mut HashMap<pg_sys::Oid, Database>, workers: u16, now: Instant) -> Room {
    let is_starting = |running: &&Running| {
        let is_young = now.duration_since(running.since) < START_TIME;
        shmem::slot_state(running.slot) == WorkerState::Starting && (is_young || !shmem::slot_is_attached(running.slot))
    };
    let starting = databases.values().flat_map(Database::running).filter(is_starting).count();
    // The postmaster tells when one of them has started; then there is room for another.
    let room = MAX_STARTING.saturating_sub(starting);
    let due = databases.iter().flat_map(|(oid, database)| database.due(workers, now).map(|number| (*oid, number)));
    for (oid, number) in due.take(room).collect::<Vec<_>>() {
        let failures = databases.entry(oid).or_default().post(number).failures;
        let Some(slot) = shmem::reserve_slot(oid, Place { number, of: workers }, failures) else { return Room::None };
        let Some(handle) = Launched::start(WORKER, WORKER_MAIN, slot) else {
            shmem::free_slot(slot);
            return Room::None;
        };
        let post = databases.entry(oid).or_default().post(number);
        post.due = None;
        post.running = Some(Running { slot, handle: Some(handle), since: now });
    }
    Room::Enough
}
