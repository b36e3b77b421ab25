//! The workers' signs of life, for whoever watches them.

use super::{Place, WorkerState, own_slot, place, shared, worker_state};
use crate::domain::vigil::Vigil;
use crate::pg::identity;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

#[repr(C)]
pub(super) struct Pulse {
    /// The process that has the slot; 0: none, yet or any more.
    pid: AtomicU32,
    /// When it was asked for, as PostgreSQL counts time.
    since: AtomicI64,
    /// When it had done its work last, or was asked for.
    last_loop: AtomicI64,
    /// Workers before it that ended soon after their start, in a row.
    restarts: AtomicU32,
    in_flight: AtomicU32,
}

impl Pulse {
    /// Gives the slot to this process, unless another one has it.
    pub(super) fn take(&self) -> bool {
        // SAFETY: a plain global, set once before any code of ours runs in a process.
        let pid = unsafe { pg_sys::MyProcPid };
        self.pid.compare_exchange(0, pid.cast_unsigned(), SeqCst, SeqCst).is_ok()
    }

    /// This process is through with the slot.
    pub(super) fn leave(&self) {
        self.pid.store(0, SeqCst);
    }

    pub(super) fn is_taken(&self) -> bool {
        self.pid.load(SeqCst) != 0
    }

    /// It is asked for.
    pub(super) fn reserve(&self, restarts: u32) {
        self.since.store(identity::now(), SeqCst);
        self.last_loop.store(identity::now(), SeqCst);
        self.restarts.store(restarts, SeqCst);
        self.in_flight.store(0, SeqCst);
    }
}

/// This worker has done its work, and has so many requests in flight.
pub fn beat(in_flight: usize) {
    if let Some(slot) = own_slot() {
        slot.pulse.last_loop.store(identity::now(), SeqCst);
        slot.pulse.in_flight.store(u32::try_from(in_flight).unwrap_or(u32::MAX), SeqCst);
    }
}

/// What can be seen of a worker.
pub struct Sighting {
    pub database: pg_sys::Oid,
    pub place: Place,
    pub state: WorkerState,
    pub pid: i32,
    /// When it was asked for.
    pub since: i64,
    pub last_loop: i64,
    pub restarts: u32,
    pub in_flight: u32,
}

impl Sighting {
    /// What it is judged by.
    pub fn vigil(&self) -> Vigil {
        let now = identity::now();
        let time = |then: i64| Duration::from_micros(now.saturating_sub(then).max(0).unsigned_abs());
        Vigil { age: time(self.since), unseen_for: time(self.last_loop), restarts: self.restarts }
    }
}

/// All workers that are there, or were until just now.
pub fn sightings() -> Vec<Sighting> {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    let taken = slots.iter().filter(|slot| slot.database.load(SeqCst) != 0);
    let sighting = |slot: &super::Slot| Sighting {
        database: slot.database.load(SeqCst).into(),
        place: place(slot),
        state: worker_state(slot),
        pid: slot.pulse.pid.load(SeqCst).cast_signed(),
        since: slot.pulse.since.load(SeqCst),
        last_loop: slot.pulse.last_loop.load(SeqCst),
        restarts: slot.pulse.restarts.load(SeqCst),
        in_flight: slot.pulse.in_flight.load(SeqCst),
    };
    taken.map(sighting).collect()
}
