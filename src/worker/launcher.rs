//! The launcher: gives every database that has the extension a worker, and a new one when that ends.
//!
//! It is connected to no database, so it can't see where the extension is: it starts a worker, which looks, and ends
//! at once where there is none. Afterwards a commit that needs a worker asks for it.

use super::WORKER_MAIN;
use crate::pg::bgworker::{self, Launched};
use crate::pg::shmem::{self, WorkerState};
use crate::pg::{catalog, transaction};
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// How often the list of databases is read for new ones (CREATE DATABASE … TEMPLATE asks for nothing).
const RESCAN_INTERVAL: Duration = Duration::from_secs(60);
/// A worker that was asked to leave comes back after this time, if its database is still there.
const AWAY_TIME: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// A worker that lived this long was healthy: the next start is not held back by failures before.
const HEALTHY_TIME: Duration = Duration::from_secs(60);

/// Workers that may be on their way at the same time: the others keep their chance of a process.
const MAX_STARTING: usize = 4;

struct Running {
    slot: usize,
    /// `None`: started by a launcher before this one.
    handle: Option<Launched>,
    since: Instant,
}

impl Running {
    fn is_over(&self, now: Instant) -> bool {
        match (&self.handle, shmem::slot_state(self.slot)) {
            (Some(handle), _) => handle.is_over(),
            (None, WorkerState::Running) => false,
            // It may never have come to be: nobody would tell.
            (None, WorkerState::Starting) => now.duration_since(self.since) >= AWAY_TIME,
            (None, _) => true,
        }
    }
}

/// What the launcher knows of a database.
#[derive(Default)]
struct Database {
    running: Option<Running>,
    /// When to start a worker; `None`: not before somebody asks.
    due: Option<Instant>,
    failures: u32,
}

impl Database {
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

pub fn main() {
    bgworker::start(None);
    shmem::attach_launcher();
    let mut databases: HashMap<pg_sys::Oid, Database> = HashMap::new();
    let mut next_scan = Instant::now();
    for (slot, oid) in shmem::occupied_slots() {
        databases.entry(oid).or_default().running = Some(Running { slot, handle: None, since: next_scan });
    }
    let mut told_no_room = false;
    loop {
        if bgworker::stop_requested() {
            return;
        }
        bgworker::handle_interrupts();
        bgworker::reload_configuration();
        let now = Instant::now();
        match shmem::take_wanted() {
            Some(wanted) => {
                for oid in wanted {
                    databases.entry(oid).or_default().ask(now);
                }
            }
            None => {
                databases.values_mut().for_each(|database| database.due = Some(now));
                next_scan = now;
            }
        }
        databases.values_mut().for_each(|database| notice_end(database, now));
        // A database may be gone since its worker ended: look before starting another.
        if now >= next_scan || databases.values().any(|database| database.is_due(now)) {
            scan(&mut databases, now);
            next_scan = now + RESCAN_INTERVAL;
        }
        let started = start_due(&mut databases, now);
        if started == Room::None && !told_no_room {
            log!("nexus_hub: no free background worker for a database; raise max_worker_processes");
        }
        told_no_room = started == Room::None;
        let next = databases.values().filter(|database| database.running.is_none()).filter_map(|database| database.due);
        let until = next.chain([next_scan]).min().map_or(RESCAN_INTERVAL, |at| at.saturating_duration_since(now));
        // Never a busy loop: what is due but could not be started is tried again in a while.
        bgworker::wait(None, until.max(if started == Room::None { FIRST_RETRY } else { Duration::from_millis(20) }));
    }
}

/// Finds out why a worker is gone, and when the next one is due.
fn notice_end(database: &mut Database, now: Instant) {
    let Some(running) = database.running.take_if(|running| running.is_over(now)) else { return };
    let state = shmem::slot_state(running.slot);
    let woken = shmem::slot_was_woken(running.slot);
    shmem::free_slot(running.slot);
    if now.duration_since(running.since) >= HEALTHY_TIME {
        database.failures = 0;
    }
    database.due = match state {
        // A wake-up that it did not see may be that of a new CREATE EXTENSION.
        WorkerState::NoExtension if !woken => database.due,
        WorkerState::NoExtension | WorkerState::Replaced => Some(now),
        WorkerState::Left => Some(now + AWAY_TIME),
        WorkerState::Starting | WorkerState::Running | WorkerState::Stopped => {
            let delay = FIRST_RETRY * 2u32.saturating_pow(database.failures.min(16));
            database.failures += 1;
            Some(now + delay.min(LAST_RETRY))
        }
    };
}

/// Learns of new databases and forgets the ones that are gone.
fn scan(databases: &mut HashMap<pg_sys::Oid, Database>, now: Instant) {
    match transaction::run(c"nexus_hub: reading pg_database", catalog::connectable_databases) {
        Ok(found) => {
            let found: HashSet<_> = found.into_iter().collect();
            databases.retain(|oid, database| found.contains(oid) || database.running.is_some());
            for oid in found {
                databases.entry(oid).or_insert_with(|| Database { due: Some(now), ..Database::default() });
            }
        }
        Err(problem) => log!("nexus_hub: could not read the list of databases: {}", problem.message),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Enough,
    None,
}

fn start_due(databases: &mut HashMap<pg_sys::Oid, Database>, now: Instant) -> Room {
    let is_starting = |running: &Running| shmem::slot_state(running.slot) == WorkerState::Starting;
    let starting = databases.values().filter(|database| database.running.as_ref().is_some_and(is_starting)).count();
    // The postmaster tells when one of them has started; then there is room for another.
    let room = MAX_STARTING.saturating_sub(starting);
    for (oid, database) in databases.iter_mut().filter(|(_, database)| database.is_due(now)).take(room) {
        let Some(slot) = shmem::reserve_slot(*oid) else { return Room::None };
        let Some(handle) = Launched::start(WORKER_MAIN, slot) else {
            shmem::free_slot(slot);
            return Room::None;
        };
        database.due = None;
        database.running = Some(Running { slot, handle: Some(handle), since: now });
    }
    Room::Enough
}
