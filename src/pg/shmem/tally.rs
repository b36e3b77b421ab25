//! Numbers that backends add to, and the worker of the database writes to a table: values encrypted under each key, and
//! entries of the audit that found no room.
//!
//! Atomics, like all of the shared memory: a process that is killed at any point leaves nothing locked.

use super::shared;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

const MAX_TALLIES: usize = 256;

const FREE: u32 = 0;
/// Being made. A process that is killed in the middle of it takes the place with it, until the server starts anew.
const TAKEN: u32 = 1;
const READY: u32 = 2;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// Values encrypted under the key of this fingerprint.
    Sealed(u64),
    /// Entries of the audit that were lost.
    Lost,
}

impl What {
    /// No fingerprint is 0, or one in 2^64.
    fn into_u64(self) -> u64 {
        match self {
            Self::Sealed(fingerprint) => fingerprint,
            Self::Lost => 0,
        }
    }

    fn from_u64(value: u64) -> Self {
        if value == 0 { Self::Lost } else { Self::Sealed(value) }
    }
}

#[repr(C)]
struct Tally {
    state: AtomicU32,
    database: AtomicU32,
    what: AtomicU64,
    count: AtomicU64,
}

impl Tally {
    fn is_of(&self, database: u32) -> bool {
        self.state.load(SeqCst) == READY && self.database.load(SeqCst) == database
    }
}

#[repr(C)]
pub(super) struct Tallies([Tally; MAX_TALLIES]);

fn tallies() -> &'static [Tally] {
    shared().map_or(&[], |shared| &shared.tallies.0)
}

/// Adds to a number, and tells whether there was room for it. Can't fail otherwise and does not allocate.
pub fn add(database: pg_sys::Oid, what: What, count: u64) -> bool {
    let (database, what) = (database.to_u32(), what.into_u64());
    let own = tallies().iter().find(|tally| tally.is_of(database) && tally.what.load(SeqCst) == what);
    // Two processes may make one each: they are added up.
    let own = own.or_else(|| {
        let free = tallies().iter().find(|tally| tally.state.compare_exchange(FREE, TAKEN, SeqCst, SeqCst).is_ok())?;
        free.database.store(database, SeqCst);
        free.what.store(what, SeqCst);
        free.count.store(0, SeqCst);
        free.state.store(READY, SeqCst);
        Some(free)
    });
    own.map(|tally| tally.count.fetch_add(count, SeqCst)).is_some()
}

/// The numbers of a database that are not 0.
pub fn of(database: pg_sys::Oid) -> Vec<(What, u64)> {
    let mut found: Vec<(What, u64)> = Vec::new();
    for tally in tallies().iter().filter(|tally| tally.is_of(database.to_u32())) {
        let (what, count) = (What::from_u64(tally.what.load(SeqCst)), tally.count.load(SeqCst));
        match found.iter_mut().find(|(known, _)| *known == what) {
            Some((_, sum)) => *sum += count,
            None => found.push((what, count)),
        }
    }
    found.retain(|(_, count)| *count > 0);
    found
}

/// Takes from a number what has been written. Only the one worker that writes does so.
pub fn take(database: pg_sys::Oid, what: What, mut count: u64) {
    let what = what.into_u64();
    for tally in tallies().iter().filter(|tally| tally.is_of(database.to_u32()) && tally.what.load(SeqCst) == what) {
        let part = tally.count.load(SeqCst).min(count);
        tally.count.fetch_sub(part, SeqCst);
        count -= part;
    }
}

/// The databases that there are numbers of.
pub(super) fn databases() -> impl Iterator<Item = pg_sys::Oid> {
    let ready = tallies().iter().filter(|tally| tally.state.load(SeqCst) == READY);
    ready.map(|tally| tally.database.load(SeqCst).into())
}

/// Forgets the numbers of databases that are gone, or have the extension no more.
pub(super) fn forget(is_gone: impl Fn(pg_sys::Oid) -> bool) {
    for tally in tallies().iter().filter(|tally| tally.state.load(SeqCst) == READY) {
        if is_gone(tally.database.load(SeqCst).into()) {
            tally.state.store(FREE, SeqCst);
        }
    }
}
