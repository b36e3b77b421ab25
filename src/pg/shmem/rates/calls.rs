//! Calls: counted, charged, and forgotten again.

use super::{PARTITIONS, Rates, Slot};
use crate::domain::rate::key::{Key, Sought};
use crate::domain::rate::minute::{self, Step};
use crate::domain::rate::{Answer, Policy, valid_state};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// What a key is to be charged in a call for several.
pub struct Charge {
    pub key: Key,
    pub policy: Policy,
    pub cost: u32,
}

impl Rates {
    /// Works on the state of a key, made if it is not there. `None`: there is no room for it. `may_interrupt`: while it
    /// looks for room.
    fn with<R>(&self, key: &Key, now: u64, may_interrupt: bool, work: impl Fn(&Slot) -> R) -> Option<R> {
        let partition = self.partition(key.hash);
        {
            let _shared = partition.share();
            if let Some(slot) = self.find(key) {
                return Some(work(slot));
            }
        }
        let spare = self.allocate(now, may_interrupt);
        let _exclusive = partition.exclude();
        // Somebody may have been quicker.
        if let Some(slot) = self.find(key) {
            spare.into_iter().for_each(|index| self.give_back(index));
            return Some(work(slot));
        }
        spare.map(|index| work(self.link(index, key)))
    }

    /// Counts a call in the running minute and tells whether it is within the limit. `None`: the table is
    /// full.
    pub fn count(&self, key: &Key, now: u64, limit: i32) -> Option<bool> {
        let Step { allowed, .. } = self.advance(key, now, true, |state, clock| minute::count(state, clock, limit))?;
        self.partition(key.hash).note(allowed);
        Some(allowed)
    }

    /// Counts a call in the running minute if it is within the limit, and returns the minute. The error: when another
    /// one begins; `None`: the table is full. It looks at no interrupts.
    pub fn take(&self, key: &Key, now: u64, limit: i32) -> Option<Result<u32, u64>> {
        if limit <= 0 {
            return Some(Err(minute::end(minute::of(now))));
        }
        let Step { allowed, state, .. } =
            self.advance(key, now, false, |state, clock| minute::take(state, clock, limit))?;
        let (minute, _) = minute::parts(state);
        if !allowed {
            return Some(Err(minute::end(minute)));
        }
        self.partition(key.hash).note(true);
        Some(Ok(minute))
    }

    /// Takes back a call that was counted in a minute, if it still runs.
    pub fn refund(&self, key: &Key, minute: u32) {
        let _shared = self.partition(key.hash).share();
        if let Some(slot) = self.find(key) {
            let _ = slot.state.fetch_update(SeqCst, SeqCst, |state| minute::refund(state, minute));
        }
    }

    /// [`Self::count`] for a server and user that are in the table; `None`: they are not. It makes no key, takes no
    /// memory, raises no error and looks at no interrupts.
    pub fn count_known(&self, server: &[u8], user: Option<&[u8; 16]>, now: u64, limit: i32) -> Option<bool> {
        let sought = Sought::server(&self.0.secrets, super::database(), server, user)?;
        let partition = self.partition(sought.hash);
        let _shared = partition.share();
        let slot = self.find_by(sought.hash, |key| sought.is(key))?;
        let allowed = self.step(slot, now, |state, clock| minute::count(state, clock, limit)).allowed;
        partition.note(allowed);
        Some(allowed)
    }

    fn advance(&self, key: &Key, now: u64, may_interrupt: bool, step: impl Fn(u64, u32) -> Step) -> Option<Step> {
        self.with(key, now, may_interrupt, |slot| self.step(slot, now, &step))
    }

    fn step(&self, slot: &Slot, now: u64, step: impl Fn(u64, u32) -> Step) -> Step {
        let mut clock = minute::of(now);
        let mut state = slot.state.load(Relaxed);
        loop {
            if minute::parts(state).0 > clock {
                // Perhaps this process was held up since it looked at the clock.
                clock = minute::of(super::now());
            }
            let step = step(state, clock);
            if step.state == state {
                return step;
            }
            match slot.state.compare_exchange_weak(state, step.state, SeqCst, Relaxed) {
                Ok(_) => {
                    if let Some(closed) = step.closed
                        && slot.second.swap(closed, SeqCst) != 0
                    {
                        self.0.unrecorded.fetch_add(1, Relaxed);
                    }
                    return step;
                }
                Err(changed) => state = changed,
            }
        }
    }

    /// Charges a call where it is allowed. `None`: the table is full.
    pub fn charge(&self, key: &Key, now: u64, policy: Policy, cost: u32) -> Option<Answer> {
        let fresh = policy.judge(0, now, cost);
        if !fresh.allowed || cost == 0 {
            // Nothing will be charged: no need for an entry.
            let answer = self.peek(key, now, policy, cost);
            self.partition(key.hash).note(answer.allowed);
            return Some(answer);
        }
        let answer = self.with(key, now, true, |slot| slot.charge(now, policy, cost))?;
        self.partition(key.hash).note(answer.allowed);
        Some(answer)
    }

    /// What [`Self::charge`] would answer.
    pub fn peek(&self, key: &Key, now: u64, policy: Policy, cost: u32) -> Answer {
        let _shared = self.partition(key.hash).share();
        let state = self.find(key).map_or(0, |slot| slot.arrival(now));
        policy.judge(state, now, cost)
    }

    /// Charges all, or none when one of them is denied. `None` in an answer: the table is full. With `refuse_full`,
    /// that is a denial, too.
    pub fn charge_all(&self, charges: &[Charge], now: u64, refuse_full: bool) -> Vec<Option<Answer>> {
        let mut partitions: Vec<_> = charges.iter().map(|charge| charge.key.hash as usize % PARTITIONS).collect();
        partitions.sort_unstable();
        partitions.dedup();
        let mut held = Vec::with_capacity(partitions.len());
        let mut spares = Vec::with_capacity(charges.len());
        let mut answers = Vec::with_capacity(charges.len());
        loop {
            // Before the locks are taken. While a slot is held, an interrupt would lose it.
            let missing = charges.iter().filter(|charge| !self.is_there(&charge.key)).count();
            let mut is_full = false;
            while spares.len() < missing && !is_full {
                match self.allocate(now, spares.is_empty()) {
                    Some(index) => spares.push(index),
                    None => is_full = true,
                }
            }
            // Always in the same order, so that nobody waits in a circle.
            held.extend(partitions.iter().map(|partition| self.0.partitions[*partition].exclude()));
            let now = super::now();
            let missing = charges.iter().filter(|charge| self.find(&charge.key).is_none()).count();
            if missing <= spares.len() || is_full {
                let mut room = spares.len();
                for charge in charges {
                    let slot = self.find(&charge.key);
                    let has_room = slot.is_some() || room > 0;
                    room -= usize::from(slot.is_none() && has_room);
                    let state = slot.map_or(0, |slot| slot.arrival(now));
                    answers.push(has_room.then(|| charge.policy.judge(state, now, charge.cost)));
                }
                let allowed = answers.iter().all(|answer| answer.map_or(!refuse_full, |answer| answer.allowed));
                if allowed {
                    for (charge, _) in charges.iter().zip(&answers).filter(|(_, answer)| answer.is_some()) {
                        let slot = self.find(&charge.key).or_else(|| Some(self.link(spares.pop()?, &charge.key)));
                        slot.into_iter().for_each(|slot| _ = slot.charge(now, charge.policy, charge.cost));
                    }
                }
                for (charge, answer) in charges.iter().zip(&mut answers).filter(|_| !allowed) {
                    // What is left of those that would have allowed it.
                    if answer.is_some_and(|answer| answer.allowed) {
                        let state = self.find(&charge.key).map_or(0, |slot| slot.arrival(now));
                        *answer = Some(charge.policy.judge(state, now, 0));
                    }
                }
                if let Some(first) = charges.first() {
                    self.partition(first.key.hash).note(allowed);
                }
                held.clear();
                spares.drain(..).for_each(|index| self.give_back(index));
                return answers;
            }
            // One of them has just been evicted.
            held.clear();
        }
    }

    fn is_there(&self, key: &Key) -> bool {
        let _shared = self.partition(key.hash).share();
        self.find(key).is_some()
    }

    /// Forgets a text's state, under all windows; false: there was none.
    pub fn forget(&self, key: &Key) -> bool {
        let _exclusive = self.partition(key.hash).exclude();
        let mut is_found = false;
        while let Some((index, _)) = self.chain(key.hash).find(|(_, slot)| slot.key().has_text_of(key)) {
            self.unlink(key.hash, index);
            self.give_back(index);
            is_found = true;
        }
        is_found
    }

    /// Takes back the calls of the running minute; false: there were none.
    pub fn forget_minute(&self, key: &Key, now: u64) -> bool {
        let _shared = self.partition(key.hash).share();
        let Some(slot) = self.find(key) else { return false };
        let empty = |state| (!minute::is_over(state, minute::of(now))).then(|| minute::emptied(state));
        slot.state.fetch_update(SeqCst, SeqCst, empty).is_ok_and(|state| minute::parts(state).1 > 0)
    }
}

impl Slot {
    fn charge(&self, now: u64, policy: Policy, cost: u32) -> Answer {
        let mut now = now;
        let mut state = self.state.load(SeqCst);
        loop {
            let charged_at = self.second.load(SeqCst);
            if charged_at > now {
                // Perhaps this process was held up since it looked at the clock.
                now = super::now();
            }
            let answer = policy.judge(valid_state(state, charged_at, now), now, cost);
            if !answer.allowed {
                return answer;
            }
            match self.state.compare_exchange_weak(state, answer.state, SeqCst, SeqCst) {
                Ok(_) => {
                    self.second.store(now, SeqCst);
                    return answer;
                }
                Err(changed) => state = changed,
            }
        }
    }
}
