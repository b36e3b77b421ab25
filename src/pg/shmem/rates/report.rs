//! What the table tells: counters, running minutes, and closed ones until they are written down.

use super::{PARTITIONS, Rates, Slot};
use crate::domain::rate::key::Key;
use crate::domain::rate::minute;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// Slots after which a long look at the table looks at interrupts.
const LOOK: usize = 4096;

/// The counters, of the whole server since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    pub allowed: u64,
    pub denied: u64,
    /// Calls that no limit was for.
    pub exempt: u64,
    /// Entries that made room for others, being of no more use.
    pub evicted: u64,
    /// Calls that there was no room for.
    pub full: u64,
    /// Closed minutes that were forgotten before they were written down.
    pub unrecorded: u64,
    pub keys: u32,
    pub max_keys: u32,
}

/// A server's and user's minute.
#[derive(Clone, Copy)]
pub struct Window {
    pub key: Key,
    state: u64,
}

impl Window {
    /// The minute since 2000-01-01 and its calls.
    pub fn parts(&self) -> (u32, u32) {
        minute::parts(self.state)
    }
}

impl Rates {
    /// The counters.
    pub fn statistics(&self) -> Statistics {
        let header = self.0;
        let sum = |of: fn(&super::Partition) -> &AtomicU64| {
            header.partitions[..PARTITIONS].iter().map(|partition| of(partition).load(Relaxed)).sum()
        };
        Statistics {
            allowed: sum(|partition| &partition.allowed),
            denied: sum(|partition| &partition.denied),
            exempt: header.exempt.load(Relaxed),
            evicted: header.evicted.load(Relaxed),
            full: header.full.load(Relaxed),
            unrecorded: header.unrecorded.load(Relaxed),
            keys: header.keys.load(Relaxed),
            max_keys: header.max_keys,
        }
    }

    /// The minutes of this database that are not written down: closed ones, and with `running` also those that go on. Looks
    /// at the table from slot `from` on until there are so many, and tells where it stopped; `None`: at the end.
    pub fn windows(&self, now: u64, running: bool, from: usize, limit: usize) -> (Vec<Window>, Option<usize>) {
        let (clock, database) = (minute::of(now), super::database());
        let is_wanted = |state: u64| minute::is_unrecorded(state) && (running || minute::is_over(state, clock));
        let mut windows = Vec::with_capacity(limit.min(LOOK) + 2);
        let used = self.0.used.load(SeqCst) as usize;
        for (index, slot) in self.slots().iter().enumerate().take(used).skip(from) {
            if windows.len() >= limit {
                return (windows, Some(index));
            }
            if index % LOOK == 0 {
                pgrx::check_for_interrupts!();
            }
            let has_any = || slot.second.load(SeqCst) != 0 || is_wanted(slot.state.load(SeqCst));
            if !slot.is_minute() || !has_any() {
                continue;
            }
            // Not while a lock is held.
            windows.reserve(2);
            let hash = slot.hash.load(SeqCst);
            let _shared = self.partition(hash).share();
            let is_linked = self.chain(hash).any(|(other, _)| other as usize == index);
            if !is_linked || !slot.is_minute() || slot.key().database != database {
                continue;
            }
            let key = *slot.key();
            let states = [slot.second.load(SeqCst), slot.state.load(SeqCst)];
            windows.extend(states.into_iter().filter(|state| is_wanted(*state)).map(|state| Window { key, state }));
        }
        (windows, None)
    }

    /// Notes that a closed minute was written down.
    pub fn mark_recorded(&self, window: &Window) {
        let _shared = self.partition(window.key.hash).share();
        let Some(slot) = self.find(&window.key) else { return };
        let swap =
            |word: fn(&Slot) -> &AtomicU64, to| word(slot).compare_exchange(window.state, to, SeqCst, SeqCst).is_ok();
        // While this looks, it may become the minute before.
        let _ = swap(|slot| &slot.second, 0)
            || swap(|slot| &slot.state, minute::recorded(window.state))
            || swap(|slot| &slot.second, 0);
    }

    /// Forgets all keys of a database.
    pub fn forget_database(&self, database: u32) {
        let used = self.0.used.load(SeqCst) as usize;
        for (index, slot) in self.slots().iter().enumerate().take(used).filter(|(_, slot)| slot.kind.load(SeqCst) != 0)
        {
            let hash = slot.hash.load(SeqCst);
            let _exclusive = self.partition(hash).exclude();
            let is_linked = self.chain(hash).any(|(other, _)| other as usize == index);
            if is_linked && slot.key().database == database {
                self.unlink(hash, index as u32);
                self.give_back(index as u32);
            }
        }
    }
}
