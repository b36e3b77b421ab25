//! Slots: where new ones come from. Free ones first, then such as were never used, then those of keys whose limits are
//! full again anyway.

use super::{Rates, Slot};
use crate::domain::rate::key::Kind;
use crate::domain::rate::{SECOND, minute, valid_state};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// How long it is remembered at most, and at least, that no slot could be had, so that calls on a full table stay quick.
const FULL_TIME: u64 = SECOND;
const SHORT_FULL_TIME: u64 = SECOND / 100;
/// Slots that are looked at for one whose minute is written down, where one was found that is not.
const PATIENCE: u32 = 256;
/// Slots after which a long search looks at interrupts.
const LOOK: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// The state counts, or the slot is in no chain.
    InUse,
    /// The state says no more than none would.
    Expired,
    /// The same, but a closed minute is not written down yet.
    Unrecorded,
}

impl Slot {
    fn standing(&self, now: u64) -> Standing {
        let (kind, state, second) = (self.kind.load(SeqCst), self.state.load(SeqCst), self.second.load(SeqCst));
        if kind == 0 {
            Standing::InUse
        } else if kind == Kind::Text as u32 {
            if valid_state(state, second, now) <= now { Standing::Expired } else { Standing::InUse }
        } else if !minute::is_over(state, minute::of(now)) {
            Standing::InUse
        } else if second != 0 || minute::is_unrecorded(state) {
            Standing::Unrecorded
        } else {
            Standing::Expired
        }
    }
}

impl Slot {
    /// When an entry that is in use expires, if nobody calls.
    fn expiry(&self) -> u64 {
        let (kind, state) = (self.kind.load(SeqCst), self.state.load(SeqCst));
        if kind == Kind::Text as u32 { state } else { minute::end(minute::parts(state).0) }
    }
}

impl Rates {
    /// Takes a slot for this process, in no chain; it must be linked or given back. No partition may be locked.
    pub(super) fn allocate(&self, now: u64, may_interrupt: bool) -> Option<u32> {
        self.take_free().or_else(|| self.evict(now, may_interrupt))
    }

    fn take_free(&self) -> Option<u32> {
        let header = self.0;
        // Nobody gives back what is used up; a glance saves the lock.
        if header.free.load(SeqCst) == 0 && header.used.load(SeqCst) >= header.max_keys {
            return None;
        }
        let _exclusive = header.space.exclude();
        if let Some(index) = header.free.load(Relaxed).checked_sub(1) {
            let next = self.slots()[index as usize].next.load(Relaxed);
            header.free.store(next, SeqCst);
            return Some(index);
        }
        let index = header.used.load(Relaxed);
        if index >= header.max_keys {
            return None;
        }
        self.slots()[index as usize].kind.store(0, SeqCst);
        header.used.store(index + 1, SeqCst);
        Some(index)
    }

    /// Gives back a slot that is in no chain. A partition may be locked: this lock is always the last.
    pub(super) fn give_back(&self, index: u32) {
        let _exclusive = self.0.space.exclude();
        self.slots()[index as usize].next.store(self.0.free.load(Relaxed), Relaxed);
        self.0.free.store(index + 1, SeqCst);
    }

    fn evict(&self, now: u64, may_interrupt: bool) -> Option<u32> {
        let header = self.0;
        let full_until = header.full_until.load(Relaxed);
        if full_until > now && full_until - now <= FULL_TIME {
            return None;
        }
        let mut next_expiry = u64::MAX;
        let mut unrecorded = None;
        let mut tries = 0;
        for looked_at in 1..=header.max_keys {
            if looked_at % LOOK == 0 && may_interrupt {
                pgrx::check_for_interrupts!();
            }
            // It wraps around at a power of two, not at the size: some slots are then looked at twice.
            let index = header.hand.fetch_add(1, Relaxed) % header.max_keys;
            match self.slots()[index as usize].standing(now) {
                Standing::InUse => next_expiry = next_expiry.min(self.slots()[index as usize].expiry()),
                Standing::Expired => {
                    if self.reclaim(index, now, Standing::Expired) {
                        return Some(index);
                    }
                }
                Standing::Unrecorded => unrecorded = unrecorded.or(Some(index)),
            }
            if let Some(index) = unrecorded {
                tries += 1;
                if tries >= PATIENCE {
                    if self.reclaim(index, now, Standing::Unrecorded) {
                        return Some(index);
                    }
                    (unrecorded, tries) = (None, 0);
                }
            }
        }
        if let Some(index) = unrecorded.filter(|index| self.reclaim(*index, now, Standing::Unrecorded)) {
            return Some(index);
        }
        header.full_until.store(next_expiry.clamp(now + SHORT_FULL_TIME, now + FULL_TIME), Relaxed);
        None
    }

    /// Takes a slot out of its chain, if it still is as it was seen.
    fn reclaim(&self, index: u32, now: u64, standing: Standing) -> bool {
        let slot = &self.slots()[index as usize];
        let hash = slot.hash.load(SeqCst);
        // Not waiting: others may hold theirs and look at this one's.
        let Some(_exclusive) = self.partition(hash).try_exclude() else { return false };
        let is_same = self.chain(hash).any(|(other, slot)| other == index && slot.hash.load(Relaxed) == hash);
        if !is_same || slot.standing(now) != standing {
            return false;
        }
        self.unlink(hash, index);
        self.0.evicted.fetch_add(1, Relaxed);
        if standing == Standing::Unrecorded {
            self.0.unrecorded.fetch_add(1, Relaxed);
        }
        true
    }

    /// Takes a slot out of its chain. The partition must be locked exclusively.
    pub(super) fn unlink(&self, hash: u64, index: u32) {
        let slot = &self.slots()[index as usize];
        let before = self.chain(hash).find(|(_, before)| before.next.load(Relaxed) == index + 1);
        let link = before.map_or(self.bucket(hash), |(_, before)| &before.next);
        if link.load(Relaxed) == index + 1 {
            link.store(slot.next.load(Relaxed), SeqCst);
            slot.kind.store(0, SeqCst);
            self.0.keys.fetch_sub(1, Relaxed);
        }
    }
}
