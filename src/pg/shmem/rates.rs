//! Rate limits: a table of keys and their states, as large as `nexus_hub.rate_limit_max_keys` says.
//!
//! Chains of slots in hash buckets; a bucket belongs to one of 128 locks. Who holds its lock, shared, may follow a chain
//! and swap the states in it, which are atomics: no slot leaves a chain, or gets another key, without the lock held
//! exclusively. Between taking and releasing a lock nothing raises an error or looks at interrupts.

mod calls;
mod report;
mod space;

pub use calls::Charge;
pub use report::Window;

use crate::domain::rate::key::{Key, Kind, Secrets};
use crate::domain::rate::valid_state;
use pgrx::pg_sys;
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{
    AtomicI64, AtomicPtr, AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

const PARTITIONS: usize = 128;
/// Policies that one call may ask for: fewer than the locks that PostgreSQL lets a process hold.
pub const MAX_POLICIES: usize = 64;

// pgrx's bindings would save and restore PostgreSQL's place for errors around each of these, which raise none.
unsafe extern "C-unwind" {
    fn LWLockAcquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    fn LWLockConditionalAcquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    fn LWLockRelease(lock: *mut pg_sys::LWLock);
    fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
}

#[repr(C, align(128))]
struct Partition {
    lock: UnsafeCell<pg_sys::LWLock>,
    // Beside the lock, whose cache line a call has anyway.
    allowed: AtomicU64,
    denied: AtomicU64,
}

/// One key's state. Of a clock minute: `state` is this one's, `second` the one before as long as it is not written down.
/// Of the other limiter: `state` is the arrival time, `second` when it was charged last.
#[repr(C, align(64))]
pub(super) struct Slot {
    state: AtomicU64,
    second: AtomicU64,
    hash: AtomicU64,
    /// One more than the index of the next slot of the chain; 0: none.
    next: AtomicU32,
    /// 0: in no chain.
    kind: AtomicU32,
    /// Written only while the slot is in no chain.
    key: UnsafeCell<Key>,
}

#[repr(C, align(128))]
struct Header {
    max_keys: u32,
    secrets: Secrets,
    /// Counts up whenever somebody may have changed exemptions or overrides.
    rules: AtomicU64,
    exempt: AtomicU64,
    evicted: AtomicU64,
    full: AtomicU64,
    unrecorded: AtomicU64,
    keys: AtomicU32,
    /// Slots that were ever in use: those behind were not even written to.
    used: AtomicU32,
    free: AtomicU32,
    hand: AtomicU32,
    full_until: AtomicU64,
    warned_at: AtomicI64,
    space: Partition,
    partitions: [Partition; PARTITIONS],
}

static HEADER: AtomicPtr<Header> = AtomicPtr::new(null_mut());

fn buckets_of(max_keys: u32) -> usize {
    (max_keys as usize).next_power_of_two().max(PARTITIONS)
}

/// Where the slots begin, behind the buckets.
fn slots_at(max_keys: u32) -> usize {
    (size_of::<Header>() + buckets_of(max_keys) * size_of::<AtomicU32>()).next_multiple_of(align_of::<Header>())
}

/// Bytes of shared memory for so many keys.
pub(super) fn size(max_keys: u32) -> usize {
    slots_at(max_keys) + max_keys as usize * size_of::<Slot>()
}

/// Makes the table. Only from the postmaster's startup hook.
pub(super) unsafe fn start(max_keys: u32) {
    // SAFETY: called by the postmaster alone, at start and after a crash. The header and the buckets are zeroed before
    // use, which is a valid value of all their fields; slots are written before they are used.
    unsafe {
        let mut found = false;
        let header: *mut Header =
            pg_sys::ShmemInitStruct(c"nexus_hub rate limits".as_ptr(), size(max_keys), &mut found).cast();
        if !found {
            header.cast::<u8>().write_bytes(0, slots_at(max_keys));
            (*header).max_keys = max_keys;
            let secrets = (&raw mut (*header).secrets).cast();
            if !pg_sys::pg_strong_random(secrets, size_of::<Secrets>()) {
                pgrx::error!("could not obtain random bytes from the operating system");
            }
            let tranche = pg_sys::LWLockNewTrancheId();
            pg_sys::LWLockRegisterTranche(tranche, c"nexus_hub_rate_limits".as_ptr());
            pg_sys::LWLockInitialize((*header).space.lock.get(), tranche);
            for partition in &(*header).partitions {
                pg_sys::LWLockInitialize(partition.lock.get(), tranche);
            }
            (*header).rules.store(1, SeqCst);
        }
        HEADER.store(header, SeqCst);
    }
}

/// A lock that is held until it is dropped.
struct Held(*mut pg_sys::LWLock);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: taken when this was made, and not released since.
        unsafe { LWLockRelease(self.0) }
    }
}

impl Partition {
    fn share(&self) -> Held {
        // SAFETY: initialised at start. The wait is not interrupted, and no error comes while few locks are held.
        unsafe { LWLockAcquire(self.lock.get(), pg_sys::LWLockMode::LW_SHARED) };
        Held(self.lock.get())
    }

    fn exclude(&self) -> Held {
        // SAFETY: see above.
        unsafe { LWLockAcquire(self.lock.get(), pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Held(self.lock.get())
    }

    fn try_exclude(&self) -> Option<Held> {
        // SAFETY: see above.
        let taken = unsafe { LWLockConditionalAcquire(self.lock.get(), pg_sys::LWLockMode::LW_EXCLUSIVE) };
        taken.then(|| Held(self.lock.get()))
    }

    fn note(&self, allowed: bool) {
        if allowed { &self.allowed } else { &self.denied }.fetch_add(1, Relaxed);
    }
}

/// The clock's time, not the transaction's: nanoseconds since 2000-01-01.
pub fn now() -> u64 {
    // SAFETY: a look at the clock.
    u64::try_from(unsafe { GetCurrentTimestamp() }).unwrap_or(0).saturating_mul(1000)
}

fn database() -> u32 {
    // SAFETY: a plain global of this process.
    unsafe { pg_sys::MyDatabaseId }.to_u32()
}

/// The table.
#[derive(Clone, Copy)]
pub struct Rates(&'static Header);

/// The table; `None` when the library is not preloaded.
pub fn table() -> Option<Rates> {
    // SAFETY: set once by the postmaster to a segment that lives as long as any process that sees it.
    unsafe { HEADER.load(Relaxed).as_ref() }.map(Rates)
}

impl Rates {
    fn buckets(&self) -> &'static [AtomicU32] {
        // SAFETY: the segment was made that long, with the buckets behind the header; they are atomics.
        unsafe {
            let first = std::ptr::from_ref(self.0).add(1).cast();
            std::slice::from_raw_parts(first, buckets_of(self.0.max_keys))
        }
    }

    fn slots(&self) -> &'static [Slot] {
        // SAFETY: as above; nobody looks at a slot before it is written, see `used` and the chains.
        unsafe {
            let first = std::ptr::from_ref(self.0).cast::<u8>().add(slots_at(self.0.max_keys)).cast();
            std::slice::from_raw_parts(first, self.0.max_keys as usize)
        }
    }

    fn bucket(&self, hash: u64) -> &'static AtomicU32 {
        let buckets = self.buckets();
        &buckets[hash as usize & (buckets.len() - 1)]
    }

    fn partition(&self, hash: u64) -> &'static Partition {
        &self.0.partitions[hash as usize % PARTITIONS]
    }

    /// The key of a server and a user in this database.
    pub fn server_key(&self, server: &str, user: Option<&[u8; 16]>) -> Key {
        Key::server(&self.0.secrets, database(), server, user)
    }

    /// The key that is a text in this database, with a window in seconds.
    pub fn text_key(&self, text: &str, window: u32) -> Key {
        Key::text(&self.0.secrets, database(), text, window)
    }

    /// The slots of a bucket's chain. Its partition must be locked.
    fn chain(&self, hash: u64) -> impl Iterator<Item = (u32, &'static Slot)> {
        let slots = self.slots();
        let mut next = self.bucket(hash).load(Relaxed);
        std::iter::from_fn(move || {
            let index = next.checked_sub(1)?;
            let slot = slots.get(index as usize)?;
            next = slot.next.load(Relaxed);
            Some((index, slot))
        })
    }

    /// The slot of a key. Its partition must be locked.
    fn find(&self, key: &Key) -> Option<&'static Slot> {
        self.find_by(key.hash, |other| other.is(key))
    }

    fn find_by(&self, hash: u64, is: impl Fn(&Key) -> bool) -> Option<&'static Slot> {
        let found = self.chain(hash).find(|(_, slot)| slot.hash.load(Relaxed) == hash && is(slot.key()));
        found.map(|(_, slot)| slot)
    }

    /// Puts a slot that is in no chain into its key's. The partition must be locked exclusively.
    fn link(&self, index: u32, key: &Key) -> &'static Slot {
        let slot = &self.slots()[index as usize];
        // SAFETY: the slot is in no chain and was taken by this process, so nobody else looks at the key.
        unsafe { *slot.key.get() = *key };
        slot.state.store(0, Relaxed);
        slot.second.store(0, Relaxed);
        slot.hash.store(key.hash, Relaxed);
        let bucket = self.bucket(key.hash);
        slot.next.store(bucket.load(Relaxed), Relaxed);
        slot.kind.store(u32::from(key.kind), SeqCst);
        bucket.store(index + 1, SeqCst);
        self.0.keys.fetch_add(1, Relaxed);
        slot
    }

    /// What [`Self::rules_changed`] counts.
    pub fn rules(&self) -> u64 {
        self.0.rules.load(SeqCst)
    }

    /// Has every session read the exemptions and overrides again.
    pub fn rules_changed(&self) {
        self.0.rules.fetch_add(1, SeqCst);
    }

    /// Counts a call that was denied without a look at its key.
    pub fn note_denied(&self) {
        self.0.partitions[0].note(false);
    }

    /// Counts a call that no limit is for.
    pub fn note_exempt(&self) {
        self.0.exempt.fetch_add(1, Relaxed);
    }

    /// Counts a call that there was no room for.
    pub fn note_full(&self) {
        self.0.full.fetch_add(1, Relaxed);
    }

    /// Whether the log should tell that there is no room: true at most once a minute.
    pub fn is_warning_due(&self, now: u64) -> bool {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let last = self.0.warned_at.load(Relaxed);
        let is_due = last == 0 || !(0..60_000_000_000).contains(&(now - last));
        is_due && self.0.warned_at.compare_exchange(last, now, SeqCst, Relaxed).is_ok()
    }
}

impl Slot {
    /// The key. The slot must be in a chain whose partition is locked.
    fn key(&self) -> &Key {
        // SAFETY: it is written only while the slot is in no chain, and slots enter chains under the exclusive lock.
        unsafe { &*self.key.get() }
    }

    fn is_minute(&self) -> bool {
        [Kind::Server as u32, Kind::ServerUser as u32].contains(&self.kind.load(SeqCst))
    }

    fn arrival(&self, now: u64) -> u64 {
        valid_state(self.state.load(SeqCst), self.second.load(SeqCst), now)
    }
}
