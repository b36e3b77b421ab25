//! Numbers that only grow, of each database: what metrics tell. They begin anew when the server starts.
//!
//! Atomics, like all of the shared memory: a process that is killed at any point leaves nothing locked.

use super::shared;
use crate::domain::job::JobType;
use crate::domain::metrics::{self, COUNT, Counter};
use crate::pg::identity;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

/// Databases that there is room for; what others do is not counted.
const MAX_DATABASES: usize = 128;
const UNKNOWN: usize = usize::MAX;

#[repr(C)]
struct Row {
    /// 0: free, and all numbers are 0.
    database: AtomicU32,
    numbers: [AtomicU64; COUNT],
}

#[repr(C)]
pub(super) struct Counters([Row; MAX_DATABASES]);

/// The row of this process's database, as it was last.
static OWN: AtomicUsize = AtomicUsize::new(UNKNOWN);

fn rows() -> &'static [Row] {
    shared().map_or(&[], |shared| &shared.counters.0)
}

/// Found, or taken.
fn own_row() -> Option<&'static Row> {
    let rows = rows();
    let database = identity::database().to_u32();
    if let Some(row) = rows.get(OWN.load(Relaxed)).filter(|row| row.database.load(Relaxed) == database) {
        return Some(row);
    }
    if database == 0 {
        return None;
    }
    // Everybody looks from the first one on, so that two who are new take the same.
    let taken = || {
        rows.iter().position(|row| {
            let found = row.database.compare_exchange(0, database, SeqCst, SeqCst);
            found.is_ok() || found == Err(database)
        })
    };
    let place = rows.iter().position(|row| row.database.load(SeqCst) == database).or_else(taken)?;
    OWN.store(place, Relaxed);
    rows.get(place)
}

fn add_at(place: usize, value: u64) {
    if let Some(number) = own_row().and_then(|row| row.numbers.get(place)) {
        number.fetch_add(value, Relaxed);
    }
}

/// Adds to a number of this process's database.
pub fn add(counter: Counter, value: u64) {
    add_at(counter.place(), value);
}

/// An attempt's request took so long.
pub fn note_latency(job: JobType, time: Duration) {
    for (place, value) in metrics::latency(job, time) {
        add_at(place, value);
    }
}

/// The numbers of a database, by their places; `None`: there is no shared memory.
pub fn of(database: pg_sys::Oid) -> Option<impl Fn(usize) -> u64> {
    let database = database.to_u32();
    let own: Vec<_> = rows().iter().filter(|row| row.database.load(SeqCst) == database).collect();
    let number = |row: &&Row, place: usize| row.numbers.get(place).map_or(0, |number| number.load(Relaxed));
    shared().map(|_| move |place| own.iter().map(|row| number(row, place)).sum())
}

/// The databases that something is counted of.
pub fn databases() -> impl Iterator<Item = pg_sys::Oid> {
    rows().iter().map(|row| row.database.load(SeqCst)).filter(|database| *database != 0).map(Into::into)
}

/// Forgets the databases that are gone.
pub fn forget_if(is_gone: impl Fn(pg_sys::Oid) -> bool) {
    for row in rows() {
        let database = row.database.load(SeqCst);
        if database != 0 && is_gone(database.into()) {
            row.numbers.iter().for_each(|number| number.store(0, SeqCst));
            row.database.store(0, SeqCst);
        }
    }
}
