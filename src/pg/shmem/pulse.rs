//! The workers' signs of life, for whoever watches them.

use super::{Place, WorkerState, own_slot, place, shared, worker_state};
use crate::pg::identity;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::SeqCst};

#[repr(C)]
pub(super) struct Pulse {
    pid: AtomicU32,
    /// When it was last seen at work, as PostgreSQL counts time.
    last_loop: AtomicI64,
    in_flight: AtomicU32,
}

impl Pulse {
    pub(super) fn start(&self) {
        // SAFETY: a plain global, set once before any code of ours runs in a process.
        let pid = unsafe { pg_sys::MyProcPid };
        self.pid.store(pid.cast_unsigned(), SeqCst);
        self.last_loop.store(identity::now(), SeqCst);
    }

    pub(super) fn stop(&self) {
        self.pid.store(0, SeqCst);
        self.last_loop.store(0, SeqCst);
        self.in_flight.store(0, SeqCst);
    }
}

/// This worker is at work, with so many requests in flight.
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
    /// `None`: it has not begun yet.
    pub last_loop: Option<i64>,
    pub in_flight: u32,
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
        last_loop: Some(slot.pulse.last_loop.load(SeqCst)).filter(|time| *time != 0),
        in_flight: slot.pulse.in_flight.load(SeqCst),
    };
    taken.map(sighting).collect()
}
