//! Entries of the audit on their way from backends to the worker that writes them.
//!
//! Atomics, like all of the shared memory: a process that is killed at any point leaves nothing locked. Entries have no
//! order here and are each in a slot of their own, so that one that is never finished holds up no other. The slots of a
//! database are the half that begins at its own place: one whose worker does not come leaves room for others.

use super::tally::{self, What};
use super::{own_slot, place, set_latch, shared};
use crate::domain::audit::{Event, Kind, MAX_OBJECT, Object, Outcome};
use pgrx::pg_sys;
use std::sync::atomic::{
    AtomicI64, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
};

const SLOTS: usize = 4096;
/// Slots that a database may use.
const REACH: usize = SLOTS / 2;
/// With so many entries the worker does not wait for more.
const URGENT: u32 = 512;
const WORDS: usize = MAX_OBJECT.div_ceil(8);

// States of a slot; in between, the id of the process that writes it, and this bit.
const FREE: u32 = 0;
const FULL: u32 = 1;
const WRITING: u32 = 1 << 31;

const NO_OBJECT: u32 = 0xff;

#[repr(C)]
struct Slot {
    state: AtomicU32,
    database: AtomicU32,
    role: AtomicU32,
    /// Kind, outcome, whether there is a sub, length of the object: a byte each.
    what: AtomicU32,
    at: AtomicI64,
    count: AtomicU64,
    sub: [AtomicU64; 2],
    object: [AtomicU64; WORDS],
}

#[repr(C)]
pub(super) struct Audit {
    /// Where to look for a free slot first, beyond a database's own place.
    next: AtomicU32,
    slots: [Slot; SLOTS],
}

impl Slot {
    /// Only by the process that has it.
    fn write(&self, database: u32, event: &Event) {
        let sub = event.sub.map(|sub| uuid::Uuid::from_bytes(sub).as_u64_pair());
        let object = event.object.as_ref().map(Object::bytes);
        let length = object.map_or(NO_OBJECT, |object| object.len() as u32);
        let what = event.kind as u32 | (event.outcome as u32) << 8 | u32::from(sub.is_some()) << 16 | length << 24;
        self.database.store(database, Relaxed);
        self.role.store(event.role, Relaxed);
        self.what.store(what, Relaxed);
        self.at.store(event.at, Relaxed);
        self.count.store(event.count, Relaxed);
        let (high, low) = sub.unwrap_or_default();
        self.sub[0].store(high, Relaxed);
        self.sub[1].store(low, Relaxed);
        for (word, part) in self.object.iter().zip(object.unwrap_or_default().chunks(8)) {
            let mut eight = [0; 8];
            eight[..part.len()].copy_from_slice(part);
            word.store(u64::from_ne_bytes(eight), Relaxed);
        }
    }

    /// Only of a full one.
    fn read(&self) -> Option<Event> {
        let [kind, outcome, has_sub, length] = self.what.load(Relaxed).to_le_bytes();
        let mut bytes = [0; WORDS * 8];
        for (eight, word) in bytes.chunks_mut(8).zip(&self.object) {
            eight.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        let sub = || uuid::Uuid::from_u64_pair(self.sub[0].load(Relaxed), self.sub[1].load(Relaxed)).into_bytes();
        let object = if u32::from(length) == NO_OBJECT {
            None
        } else {
            Some(Object::new(std::str::from_utf8(bytes.get(..usize::from(length))?).ok()?))
        };
        Some(Event {
            at: self.at.load(Relaxed),
            kind: *Kind::ALL.get(usize::from(kind))?,
            outcome: *Outcome::ALL.get(usize::from(outcome))?,
            role: self.role.load(Relaxed),
            sub: (has_sub != 0).then(sub),
            object,
            count: self.count.load(Relaxed),
        })
    }

    fn is_full_of(&self, database: u32) -> bool {
        self.state.load(Acquire) == FULL && self.database.load(Relaxed) == database
    }
}

impl Audit {
    /// Tells whether there was room.
    fn put(&self, database: u32, process: i32, event: &Event) -> bool {
        let own = WRITING | process.unsigned_abs();
        let first = self.next.fetch_add(1, Relaxed) as usize;
        let taken = slots_of(self, database, first).find(|slot| {
            slot.state.load(Relaxed) == FREE && slot.state.compare_exchange(FREE, own, Acquire, Relaxed).is_ok()
        });
        if let Some(slot) = taken {
            slot.write(database, event);
            slot.state.store(FULL, Release);
        }
        taken.is_some()
    }

    /// The slots with entries of a database.
    fn full(&self, database: u32) -> impl Iterator<Item = &Slot> {
        slots_of(self, database, 0).filter(move |slot| slot.is_full_of(database))
    }

    /// Frees slots that a process was writing when it was killed.
    fn reclaim(&self) {
        for slot in &self.slots {
            let state = slot.state.load(Relaxed);
            if state & WRITING == 0 {
                continue;
            }
            // SAFETY: no signal is sent; it is only asked whether the process is there.
            let is_gone = unsafe { libc::kill((state & !WRITING) as libc::pid_t, 0) } != 0
                && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
            if is_gone {
                let _ = slot.state.compare_exchange(state, FREE, SeqCst, SeqCst);
            }
        }
    }
}

// pgrx's bindings put a guard around each call; a callback at a transaction's end needs none, and this raises no error.
unsafe extern "C-unwind" {
    #[allow(non_snake_case)]
    fn RecoveryInProgress() -> bool;
}

/// The slots that a database may use, from the `first` of them on.
fn slots_of(audit: &Audit, database: u32, first: usize) -> impl Iterator<Item = &Slot> {
    // Oids follow each other: so that databases of neighbouring oids begin far apart.
    let home = database.wrapping_mul(0x9e37_79b9) as usize % SLOTS;
    (0..REACH).map(move |offset| &audit.slots[(home + (first + offset) % REACH) % SLOTS])
}

/// Puts an entry in for the worker of a database; where there is no room, it is counted as lost. On a standby, which has
/// no worker and cannot write, it is dropped. Can't fail and does not allocate.
pub fn put(database: pg_sys::Oid, event: &Event) {
    // SAFETY: a look at a flag in shared memory.
    let Some(shared) = shared().filter(|_| !unsafe { RecoveryInProgress() }) else { return };
    // SAFETY: a plain global of this process.
    let own = unsafe { pg_sys::MyProcPid };
    if !shared.audit.put(database.to_u32(), own, event) {
        tally::add(database, What::Lost, event.count);
    }
}

/// Wakes the worker of a database that so many entries are for: at the first ones and when there are many, not each time.
/// Where none runs, the next one finds them. Can't fail and does not allocate.
pub fn wake(database: pg_sys::Oid, count: u32) {
    let slots = shared().map_or(&[][..], |shared| &shared.slots);
    for slot in slots.iter().filter(|slot| slot.database.load(SeqCst) == database.to_u32() && place(slot).number == 0) {
        let before = slot.noted.fetch_add(count, SeqCst);
        if before == 0 || (before < URGENT && before + count >= URGENT) {
            set_latch(&slot.latch);
        }
    }
}

/// How many entries were put in for this worker since it last called [`full`]: whether there are any, and whether they
/// cannot wait.
pub fn waiting() -> (bool, bool) {
    let noted = own_slot().map_or(0, |slot| slot.noted.load(SeqCst));
    (noted > 0, noted >= URGENT)
}

/// Entries of a database, up to so many, and the slots they are in. They stay there until [`free`]: what is to be written
/// of them may be rolled back.
pub fn full(database: pg_sys::Oid, limit: usize) -> (Vec<Event>, Vec<Full>) {
    let Some(shared) = shared() else { return Default::default() };
    if let Some(own) = own_slot() {
        own.noted.store(0, SeqCst);
    }
    shared.audit.reclaim();
    let slots: Vec<_> = shared.audit.full(database.to_u32()).take(limit).map(Full).collect();
    let mut events: Vec<_> = slots.iter().filter_map(|slot| slot.0.read()).collect();
    events.sort_by_key(|event| event.at);
    (events, slots)
}

/// A slot whose entry was read.
pub struct Full(&'static Slot);

/// Lets go of slots whose entries are written for good.
pub fn free(slots: Vec<Full>) {
    slots.iter().for_each(|slot| slot.0.state.store(FREE, Release));
}

/// Forgets what is there of a database without the extension: nobody will write it.
pub fn forget(database: pg_sys::Oid) {
    forget_if(|other| other == database);
}

/// The databases that something is there of.
pub fn databases() -> impl Iterator<Item = pg_sys::Oid> {
    let slots = shared().map_or(&[][..], |shared| &shared.audit.slots);
    let full = slots.iter().filter(|slot| slot.state.load(Acquire) == FULL);
    full.map(|slot| slot.database.load(Relaxed).into()).chain(tally::databases())
}

/// Forgets what is there of databases that are gone.
pub fn forget_if(is_gone: impl Fn(pg_sys::Oid) -> bool) {
    tally::forget(&is_gone);
    let slots = shared().map_or(&[][..], |shared| &shared.audit.slots);
    let full = slots.iter().filter(|slot| slot.state.load(Acquire) == FULL);
    for slot in full.filter(|slot| is_gone(slot.database.load(Relaxed).into())) {
        slot.state.store(FREE, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn audit() -> &'static Audit {
        // SAFETY: zero is a valid value of every atomic, as in shared memory.
        Box::leak(unsafe { Box::new_zeroed().assume_init() })
    }

    fn event(object: Option<&str>, count: u64) -> Event {
        let object = object.map(Object::new);
        let (kind, outcome) = (Kind::Change, Outcome::Prepared);
        Event { at: -5, kind, outcome, role: u32::MAX, sub: Some([7; 16]), object, count }
    }

    #[test]
    fn what_was_put_in_comes_out_and_only_for_its_database() {
        let audit = audit();
        let long = "€".repeat(100);
        let events = [None, Some(""), Some("12345678"), Some("123456789"), Some(long.as_str())].map(|o| event(o, 1));
        let plain = Event { sub: None, kind: Kind::Decrypt, outcome: Outcome::Allowed, ..events[0] };
        events.iter().for_each(|event| assert!(audit.put(5, 1, event)));
        assert!(audit.put(6, 1, &plain));
        let read = |database| audit.full(database).filter_map(Slot::read).collect::<Vec<_>>();
        assert_eq!(read(5), events);
        assert_eq!(read(6), [plain]);
        assert_eq!(read(7), []);
    }

    #[test]
    fn a_database_has_half_of_the_slots_and_leaves_the_rest_to_others() {
        let audit = audit();
        let put = |database| (0..SLOTS).filter(|_| audit.put(database, 1, &event(None, 1))).count();
        assert_eq!(put(5), REACH);
        assert!(put(6) > 0);
        audit.full(5).take(3).for_each(|slot| slot.state.store(FREE, Release));
        assert_eq!(put(5), 3, "room that was made is found");
    }

    #[test]
    fn a_slot_of_a_killed_process_is_never_read_and_found_again() {
        let audit = audit();
        let gone = std::process::Command::new("true").spawn().and_then(|mut child| child.wait().map(|_| child.id()));
        let (gone, own) = (gone.map_or(0, |id| id | WRITING), std::process::id() | WRITING);
        for (slot, state) in slots_of(audit, 5, 0).zip([gone, own]) {
            slot.write(5, &event(Some("half"), 1));
            slot.state.store(state, SeqCst);
        }
        assert_eq!(audit.full(5).count(), 0);
        audit.reclaim();
        let states: Vec<_> = slots_of(audit, 5, 0).take(2).map(|slot| slot.state.load(SeqCst)).collect();
        assert_eq!(states, [FREE, own], "one that lives keeps its slot");
    }

    #[test]
    fn many_threads_lose_nothing_and_mix_nothing_up() {
        let audit = audit();
        let mut seen = HashSet::new();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4_u64)
                .map(|writer| {
                    scope.spawn(move || {
                        for number in 0..20_000 {
                            let count = writer << 32 | number;
                            while !audit.put(5, 1, &event(Some(&count.to_string()), count)) {
                                std::thread::yield_now();
                            }
                        }
                    })
                })
                .collect();
            loop {
                let is_over = writers.iter().all(std::thread::ScopedJoinHandle::is_finished);
                for slot in audit.full(5) {
                    let event = slot.read().unwrap_or_else(|| panic!("unreadable"));
                    assert_eq!(event.object, Some(Object::new(&event.count.to_string())));
                    assert!(seen.insert(event.count));
                    slot.state.store(FREE, Release);
                }
                if is_over {
                    break;
                }
            }
        });
        assert_eq!(seen.len(), 80_000);
    }
}
