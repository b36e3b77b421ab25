//! Shared memory: who runs where, who wants a worker, and who waits for a job to end.
//!
//! All of it is atomics, so a process killed at any point leaves no lock behind, and a commit callback can use it
//! without a chance to fail. Rate limits have a segment of their own.

pub mod audit;
pub mod counters;
pub mod keys;
pub mod pulse;
pub mod rates;
pub mod tally;

use super::guc;
use pgrx::prelude::*;
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// Workers that there can be at the same time.
pub const MAX_WORKERS: usize = 128;
const MAX_WANTED: usize = 64;

/// What has become of the worker in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum WorkerState {
    /// Asked of the postmaster; it has not reported yet.
    Starting = 0,
    /// At work: its latch is valid.
    Running = 1,
    /// Ended: the database does not have the extension.
    NoExtension = 2,
    /// Ended: somebody needs the database without connections.
    Left = 3,
    /// Ended: the extension was dropped and is there anew.
    Replaced = 4,
    /// Ended in any other way.
    Stopped = 5,
    /// Finishes what it has begun, beside the one that is to take its place.
    Draining = 6,
}

impl WorkerState {
    fn from_u32(value: u32) -> Self {
        match value {
            0 => Self::Starting,
            1 => Self::Running,
            2 => Self::NoExtension,
            3 => Self::Left,
            4 => Self::Replaced,
            6 => Self::Draining,
            _ => Self::Stopped,
        }
    }

    /// Whether its process may be there, with jobs in flight.
    fn is_alive(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Draining)
    }
}

/// Which of a database's workers one is: the first is number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub number: u16,
    pub of: u16,
}

impl Place {
    fn from_u32(value: u32) -> Self {
        Self { number: (value >> 16) as u16, of: value as u16 }
    }

    fn into_u32(self) -> u32 {
        u32::from(self.number) << 16 | u32::from(self.of)
    }
}

#[repr(C)]
struct Slot {
    database: AtomicU32,
    state: AtomicU32,
    /// Which of the database's workers it is, and how many there are: see [`Place`].
    place: AtomicU32,
    /// What the leases of this worker begin with; 0 before it has any.
    holder: AtomicU64,
    leave: AtomicBool,
    /// Jobs that run were changed by others: cancelled, perhaps.
    look: AtomicBool,
    /// The worker is to look at everything.
    poll: AtomicBool,
    /// The worker is to read the configuration files: it may have missed the signal while it came to be.
    reload: AtomicBool,
    /// Something was committed that the worker has to look for. The latch alone would not do: the worker's own lock
    /// waits and waits for replication use it up.
    wake: AtomicBool,
    /// Entries of the audit that were put in since the worker took some: see [`audit`].
    noted: AtomicU32,
    pulse: pulse::Pulse,
    latch: AtomicPtr<pg_sys::Latch>,
}

#[repr(C)]
struct Shared {
    launcher: AtomicPtr<pg_sys::Latch>,
    /// Workers that a database is to have, as the launcher knows it; 0: it has not said so yet.
    workers: AtomicU32,
    rescan: AtomicBool,
    wanted: [AtomicU32; MAX_WANTED],
    slots: [Slot; MAX_WORKERS],
    keys: keys::Keys,
    tallies: tally::Tallies,
    audit: audit::Audit,
    counters: counters::Counters,
    job_finished: UnsafeCell<pg_sys::ConditionVariable>,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(null_mut());
/// The slot of the worker this process is, for its exit callback.
static OWN_SLOT: AtomicU32 = AtomicU32::new(u32::MAX);

fn shared() -> Option<&'static Shared> {
    // SAFETY: set once by the postmaster to a segment that lives as long as any process that sees it; the fields are
    // atomics, and the condition variable is touched only through PostgreSQL's functions.
    unsafe { SHARED.load(SeqCst).as_ref() }
}

/// Whether the library was preloaded, so that there is shared memory and a launcher.
pub fn preloaded() -> bool {
    shared().is_some()
}

static mut PREVIOUS_STARTUP_HOOK: pg_sys::shmem_startup_hook_type = None;
#[cfg(not(feature = "pg14"))]
static mut PREVIOUS_REQUEST_HOOK: pg_sys::shmem_request_hook_type = None;

/// Reserves the segment. Only from `_PG_init` of a preloaded library.
pub fn register() {
    // SAFETY: the postmaster runs this before it has children or threads; the hooks chain to the ones before.
    unsafe {
        #[cfg(feature = "pg14")]
        {
            pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
            pg_sys::RequestAddinShmemSpace(rates::size(guc::rate_limit_max_keys()));
        }
        #[cfg(not(feature = "pg14"))]
        {
            PREVIOUS_REQUEST_HOOK = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(request);
        }
        PREVIOUS_STARTUP_HOOK = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

#[cfg(not(feature = "pg14"))]
#[pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: called by the postmaster in its request phase, as RequestAddinShmemSpace wants.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST_HOOK {
            pg_sys::ffi::pg_guard_ffi_boundary(|| previous());
        }
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
        pg_sys::RequestAddinShmemSpace(rates::size(guc::rate_limit_max_keys()));
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: called by the postmaster alone, at start and after a crash (so no lock is needed); the segment is
    // zeroed before use, which is a valid value of every atomic, and the condition variable gets its own init.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP_HOOK {
            pg_sys::ffi::pg_guard_ffi_boundary(|| previous());
        }
        let mut found = false;
        let segment: *mut Shared =
            pg_sys::ShmemInitStruct(c"nexus_hub".as_ptr(), size_of::<Shared>(), &mut found).cast();
        if !found {
            segment.write_bytes(0, 1);
            pg_sys::ConditionVariableInit((*segment).job_finished.get());
        }
        SHARED.store(segment, SeqCst);
        rates::start(guc::rate_limit_max_keys());
    }
}

fn set_latch(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(SeqCst);
    if !latch.is_null() {
        // SAFETY: latches of processes live in shared memory for good; setting one whose process is gone, or now
        // another, wakes somebody for nothing and harms nobody.
        unsafe { pg_sys::SetLatch(latch) }
    }
}

fn own_latch() -> *mut pg_sys::Latch {
    // SAFETY: a plain global; for a process with shared memory it points into its PGPROC.
    unsafe { pg_sys::MyLatch }
}

/// Wakes the workers of a database, and tells whether there is a first one. Can't fail and does not allocate.
pub fn nudge(database: pg_sys::Oid, look: bool) -> bool {
    let Some(shared) = shared() else { return false };
    let database = database.to_u32();
    let mut is_there = false;
    for slot in &shared.slots {
        if slot.database.load(SeqCst) != database {
            continue;
        }
        let state = worker_state(slot);
        if matches!(state, WorkerState::Running | WorkerState::Draining) {
            if look {
                slot.look.store(true, SeqCst);
            }
            slot.wake.store(true, SeqCst);
            set_latch(&slot.latch);
            is_there |= state == WorkerState::Running && place(slot).number == 0;
        }
    }
    is_there
}

/// Has the workers of a database look at everything when they are woken next. A new one does so anyway.
pub fn ask_for_poll(database: pg_sys::Oid) {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    let own = slots.iter().filter(|slot| slot.database.load(SeqCst) == database.to_u32());
    own.for_each(|slot| slot.poll.store(true, SeqCst));
}

/// Whether a database's first worker is at work.
pub fn has_worker(database: pg_sys::Oid) -> bool {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    slots.iter().any(|slot| {
        slot.database.load(SeqCst) == database.to_u32()
            && place(slot).number == 0
            && worker_state(slot) == WorkerState::Running
            && !slot.leave.load(SeqCst)
    })
}

fn place(slot: &Slot) -> Place {
    Place::from_u32(slot.place.load(SeqCst))
}

/// Wakes the workers of a database, or has the launcher start them; `look`: jobs that run were changed. Can't fail and
/// does not allocate.
pub fn wake(database: pg_sys::Oid, look: bool) {
    if nudge(database, look) {
        return;
    }
    let Some(shared) = shared() else { return };
    let database = database.to_u32();
    let noted = shared
        .wanted
        .iter()
        .any(|entry| entry.load(SeqCst) == database || entry.compare_exchange(0, database, SeqCst, SeqCst).is_ok());
    if !noted {
        shared.rescan.store(true, SeqCst);
    }
    set_latch(&shared.launcher);
}

/// Asks the worker of a database to let go of it, and tells whether there was one.
pub fn ask_to_leave(database: pg_sys::Oid) -> bool {
    let Some(shared) = shared() else { return false };
    let mut asked = false;
    for slot in shared.slots.iter().filter(|slot| slot.database.load(SeqCst) == database.to_u32()) {
        if worker_state(slot).is_alive() {
            slot.leave.store(true, SeqCst);
            set_latch(&slot.latch);
            asked = true;
        }
    }
    asked
}

/// Whether a worker of the database makes room, and finishes what it has begun.
pub fn is_draining(database: pg_sys::Oid) -> bool {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    slots
        .iter()
        .any(|slot| slot.database.load(SeqCst) == database.to_u32() && worker_state(slot) == WorkerState::Draining)
}

/// Asks the worker of a slot to give back what it has begun, and end.
pub fn ask_slot_to_leave(index: usize) {
    if let Some(slot) = shared().and_then(|shared| shared.slots.get(index)) {
        slot.leave.store(true, SeqCst);
        set_latch(&slot.latch);
    }
}

/// Whether the worker of a slot was asked to.
pub fn slot_is_to_leave(index: usize) -> bool {
    shared().and_then(|shared| shared.slots.get(index)).is_some_and(|slot| slot.leave.load(SeqCst))
}

fn worker_state(slot: &Slot) -> WorkerState {
    WorkerState::from_u32(slot.state.load(SeqCst))
}

// ── The launcher's side ──

/// Makes this process the one that [`wake`] turns to for a new worker.
pub fn attach_launcher() {
    if let Some(shared) = shared() {
        shared.launcher.store(own_latch(), SeqCst);
    }
}

/// The databases that asked for a worker since the last call; `None` when there were too many to note.
pub fn take_wanted() -> Option<Vec<pg_sys::Oid>> {
    let shared = shared()?;
    let wanted = shared
        .wanted
        .iter()
        .map(|entry| entry.swap(0, SeqCst))
        .filter(|&database| database != 0)
        .map(pg_sys::Oid::from)
        .collect();
    (!shared.rescan.swap(false, SeqCst)).then_some(wanted)
}

/// Makes known how many workers a database is to have: those that share the jobs among another number make room.
pub fn set_workers(workers: u16) {
    let Some(shared) = shared() else { return };
    if shared.workers.swap(workers.into(), SeqCst) != u32::from(workers) {
        shared.slots.iter().for_each(|slot| set_latch(&slot.latch));
    }
}

/// Has workers that are coming to be read the configuration files, because signals are lost until they can take them.
pub fn pass_reload_on() {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    for slot in slots.iter().filter(|slot| worker_state(slot) == WorkerState::Starting) {
        slot.reload.store(true, SeqCst);
        set_latch(&slot.latch);
    }
}

/// Takes a free slot for a worker of a database, after so many that ended soon, in a row.
pub fn reserve_slot(database: pg_sys::Oid, place: Place, restarts: u32) -> Option<usize> {
    let shared = shared()?;
    let is_free = |slot: &Slot| slot.database.load(SeqCst) == 0 && !slot.pulse.is_taken();
    let index = shared.slots.iter().position(is_free)?;
    let slot = &shared.slots[index];
    slot.state.store(WorkerState::Starting as u32, SeqCst);
    slot.leave.store(false, SeqCst);
    slot.look.store(false, SeqCst);
    slot.poll.store(false, SeqCst);
    slot.reload.store(false, SeqCst);
    slot.wake.store(false, SeqCst);
    slot.noted.store(0, SeqCst);
    slot.pulse.reserve(restarts);
    slot.place.store(place.into_u32(), SeqCst);
    slot.holder.store(0, SeqCst);
    slot.latch.store(null_mut(), SeqCst);
    slot.database.store(database.to_u32(), SeqCst);
    Some(index)
}

/// What has become of the worker in a slot.
pub fn slot_state(index: usize) -> WorkerState {
    shared().and_then(|shared| shared.slots.get(index)).map_or(WorkerState::Stopped, worker_state)
}

/// Whether the slot's worker has come to be, and is not gone.
pub fn slot_is_attached(index: usize) -> bool {
    shared().and_then(|shared| shared.slots.get(index)).is_some_and(|slot| slot.pulse.is_taken())
}

/// Whether a worker was woken that did not get to look.
pub fn slot_was_woken(index: usize) -> bool {
    shared().and_then(|shared| shared.slots.get(index)).is_some_and(|slot| slot.wake.load(SeqCst))
}

/// The slots in use, their databases and places: what a new launcher finds of the one before.
pub fn occupied_slots() -> Vec<(usize, pg_sys::Oid, Place)> {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    let databases = slots.iter().map(|slot| (slot.database.load(SeqCst), place(slot))).enumerate();
    databases.filter(|(_, (oid, _))| *oid != 0).map(|(index, (oid, place))| (index, oid.into(), place)).collect()
}

/// Which of its database's workers the one in a slot is.
pub fn slot_place(index: usize) -> Place {
    shared().and_then(|shared| shared.slots.get(index)).map_or(Place { number: 0, of: 1 }, place)
}

/// Gives a slot back, once its worker is known to be gone, and tells whether it was: one may have come late.
pub fn free_slot(index: usize) -> bool {
    let Some(slot) = shared().and_then(|shared| shared.slots.get(index)) else { return false };
    // Taken meanwhile, so that nobody comes into a slot that is just being freed.
    let is_free = slot.pulse.take();
    if is_free {
        slot.latch.store(null_mut(), SeqCst);
        slot.database.store(0, SeqCst);
        slot.pulse.leave();
    }
    is_free
}

// ── A worker's side ──

/// Makes this process the worker of a slot, and returns the slot's database. Undone when the process exits. `None`: the
/// slot is free, or another process has it, or the database has such a worker already.
pub fn attach_worker(index: usize) -> Option<pg_sys::Oid> {
    let shared = shared()?;
    let slot = shared.slots.get(index)?;
    // From here on until the process is through with it, nobody gives the slot to another one.
    if !slot.pulse.take() {
        return None;
    }
    OWN_SLOT.store(index as u32, SeqCst);
    // SAFETY: registers a callback of this library, which stays loaded.
    unsafe { pg_sys::before_shmem_exit(Some(detach_worker), pg_sys::Datum::from(0)) };
    slot.latch.store(own_latch(), SeqCst);
    let database = slot.database.load(SeqCst);
    let own_place = place(slot);
    let rival = shared.slots.iter().enumerate().any(|(other, slot)| {
        other != index
            && slot.database.load(SeqCst) == database
            && place(slot) == own_place
            && worker_state(slot) == WorkerState::Running
    });
    (database != 0 && !rival).then(|| pg_sys::Oid::from(database))
}

/// Whether something was committed that this worker has to look for; forgets it.
pub fn take_wake() -> bool {
    own_slot().is_some_and(|slot| slot.wake.swap(false, SeqCst))
}

/// Whether this worker is to look at everything; forgets it.
pub fn take_poll() -> bool {
    own_slot().is_some_and(|slot| slot.poll.swap(false, SeqCst))
}

/// Whether jobs that run were changed by others; forgets it.
pub fn take_look() -> bool {
    own_slot().is_some_and(|slot| slot.look.swap(false, SeqCst))
}

/// Whether this worker is to read the configuration files; forgets it.
pub fn take_reload() -> bool {
    own_slot().is_some_and(|slot| slot.reload.swap(false, SeqCst))
}

/// Whether there is another process in the place of this worker, or on its way.
pub fn has_successor() -> bool {
    let Some(own) = own_slot() else { return false };
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    slots.iter().any(|slot| {
        !std::ptr::eq(slot, own)
            && slot.database.load(SeqCst) == own.database.load(SeqCst)
            && place(slot).number == place(own).number
            && matches!(worker_state(slot), WorkerState::Starting | WorkerState::Running)
    })
}

/// How many workers a database is to have, as the launcher knows it; `None`: it has not said so yet.
pub fn workers() -> Option<u16> {
    let workers = shared()?.workers.load(SeqCst);
    u16::try_from(workers).ok().filter(|workers| *workers > 0)
}

/// Which of its database's workers this one is.
pub fn own_place() -> Place {
    own_slot().map_or(Place { number: 0, of: 1 }, place)
}

/// Makes known what the leases of this worker begin with: as long as it lives, nobody gives its jobs back.
pub fn set_holder(holder: u64) {
    if let Some(slot) = own_slot() {
        slot.holder.store(holder, SeqCst);
    }
}

/// What the leases of the database's living workers begin with.
pub fn live_holders(database: pg_sys::Oid) -> Vec<u64> {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    let live =
        slots.iter().filter(|slot| slot.database.load(SeqCst) == database.to_u32() && worker_state(slot).is_alive());
    live.map(|slot| slot.holder.load(SeqCst)).collect()
}

/// Whether leases that begin with this are those of a living worker of the database.
pub fn is_live_holder(database: pg_sys::Oid, holder: u64) -> bool {
    live_holders(database).contains(&holder)
}

/// Records how this worker stands; [`WorkerState::Running`] makes [`wake`] turn to it.
pub fn set_worker_state(state: WorkerState) {
    if let Some(slot) = own_slot() {
        slot.state.store(state as u32, SeqCst);
        if let Some(shared) = shared() {
            // It starts the others beside a first one that runs.
            set_latch(&shared.launcher);
        }
    }
}

/// Whether somebody asked this worker to let go of its database.
pub fn leave_requested() -> bool {
    own_slot().is_some_and(|slot| slot.leave.load(SeqCst))
}

fn own_slot() -> Option<&'static Slot> {
    shared()?.slots.get(OWN_SLOT.load(SeqCst) as usize)
}

#[pg_guard]
unsafe extern "C-unwind" fn detach_worker(_code: i32, _arg: pg_sys::Datum) {
    if let Some(slot) = own_slot() {
        slot.latch.store(null_mut(), SeqCst);
        if worker_state(slot).is_alive() {
            slot.state.store(WorkerState::Stopped as u32, SeqCst);
        }
        // The last of what it does to the slot.
        slot.pulse.leave();
        if let Some(shared) = shared() {
            set_latch(&shared.launcher);
        }
    }
}

// ── Waiting for jobs ──

/// Wakes everybody who waits for a job's end.
pub fn announce_finished_jobs() {
    if let Some(shared) = shared() {
        // SAFETY: initialised at startup; broadcasting takes spinlocks only.
        unsafe { pg_sys::ConditionVariableBroadcast(shared.job_finished.get()) }
    }
}

/// A place in the queue of those who wait for a job's end. Begin waiting before looking, so that no end is missed.
pub struct JobWait(&'static Shared);

impl JobWait {
    /// Takes a place; `None` when the library is not preloaded.
    pub fn begin() -> Option<Self> {
        let shared = shared()?;
        // SAFETY: initialised at startup. Reads in between may sleep on other condition variables; then the next sleep
        // on this one returns at once, and the caller looks again.
        unsafe { pg_sys::ConditionVariablePrepareToSleep(shared.job_finished.get()) };
        Some(Self(shared))
    }

    /// Sleeps until jobs have ended or the time is over. A cancel request raises its error from here.
    pub fn sleep(&self, time: Duration) {
        let milliseconds = i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1);
        // SAFETY: as in `begin`; the place was taken there.
        unsafe {
            pg_sys::ConditionVariableTimedSleep(self.0.job_finished.get(), milliseconds, pg_sys::PG_WAIT_EXTENSION);
        }
    }
}

impl Drop for JobWait {
    fn drop(&mut self) {
        // SAFETY: leaves the queue if still in it; PostgreSQL does the same by itself when a transaction aborts.
        unsafe {
            pg_sys::ConditionVariableCancelSleep();
        }
    }
}
