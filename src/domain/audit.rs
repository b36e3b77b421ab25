//! The audit of the vault: what an entry is, and how those of one transaction are gathered.

use std::ops::Range;

/// Bytes of an object's name that are kept.
pub const MAX_OBJECT: usize = 100;
/// Kinds of entry that a transaction keeps one by one; the others lose their object.
const EXACT: usize = 16;
/// Kinds of entry without an object; the others lose whom they were for, too.
const MERGED: usize = 8;
/// One for each pair of a kind and an outcome.
const LAST_RESORT: usize = Kind::ALL.len() * Outcome::ALL.len();

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A value was opened.
    Decrypt,
    /// A stored secret was read.
    Get,
    /// Values were brought under another key, or another key was let in.
    Rotate,
    /// A stored secret was written or deleted.
    Change,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Decrypt, Self::Get, Self::Rotate, Self::Change];

    /// What it is called in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decrypt => "decrypt",
            Self::Get => "get",
            Self::Rotate => "rotate",
            Self::Change => "change",
        }
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether a rollback undoes it.
    pub fn is_undoable(self) -> bool {
        matches!(self, Self::Rotate | Self::Change)
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    Allowed,
    /// The caller may not.
    Refused,
    /// It could not be done.
    Failed,
    /// It was done, and taken back with its transaction.
    RolledBack,
    /// It was done in a transaction that was prepared: what has become of that is not known.
    Prepared,
}

impl Outcome {
    pub const ALL: [Self; 5] = [Self::Allowed, Self::Refused, Self::Failed, Self::RolledBack, Self::Prepared];

    /// What it is called in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::RolledBack => "rolled_back",
            Self::Prepared => "prepared",
        }
    }
}

/// The beginning of an object's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    bytes: [u8; MAX_OBJECT],
    length: u8,
}

impl Object {
    /// Cut where a character ends.
    pub fn new(name: &str) -> Self {
        let kept = cut(name);
        let mut bytes = [0; MAX_OBJECT];
        bytes[..kept.len()].copy_from_slice(kept);
        Self { bytes, length: kept.len() as u8 }
    }

    /// As much of the name as is kept.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// The part of a name that [`Object::new`] would keep.
fn cut(name: &str) -> &[u8] {
    let mut length = name.len().min(MAX_OBJECT);
    while !name.is_char_boundary(length) {
        length -= 1;
    }
    &name.as_bytes()[..length]
}

/// What was done, by whom and to what, so many times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it was first, in microseconds of PostgreSQL's.
    pub at: i64,
    pub kind: Kind,
    pub outcome: Outcome,
    /// The oid of the role; 0: several.
    pub role: u32,
    /// The caller's id.
    pub sub: Option<[u8; 16]>,
    pub object: Option<Object>,
    pub count: u64,
}

/// What makes events equal.
#[derive(Clone, Copy, Debug)]
pub struct Deed<'a> {
    pub kind: Kind,
    pub outcome: Outcome,
    pub object: Option<&'a str>,
    pub role: u32,
    pub sub: Option<[u8; 16]>,
    /// The subtransaction it is done in.
    pub nest: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    event: Event,
    /// The subtransaction whose rollback undoes it; 0: none does.
    nest: u32,
}

impl Entry {
    #[inline]
    fn is(&self, deed: &Deed<'_>) -> bool {
        let event = &self.event;
        (event.kind, event.outcome, event.role, self.nest) == (deed.kind, deed.outcome, deed.role, deed.nest)
            && event.sub == deed.sub
            && match (&event.object, deed.object) {
                (Some(own), Some(other)) => own.bytes() == cut(other),
                (None, None) => true,
                _ => false,
            }
    }

    fn is_like(&self, other: &Self) -> bool {
        self.nest == other.nest && self.event == Event { at: self.event.at, count: self.event.count, ..other.event }
    }

    fn is_undoable(&self) -> bool {
        self.event.kind.is_undoable() && self.event.outcome == Outcome::Allowed
    }
}

/// The events of the running transaction, equal ones as one. It takes memory when it is made and never again, so that it
/// can be emptied where nothing may fail.
#[derive(Debug)]
pub struct Pending {
    entries: Vec<Entry>,
    /// How many of the entries, from the first, have their object.
    exact: usize,
    /// Of those.
    tags: [u32; EXACT],
    /// Which of them was noted last, and what was counted last without its object.
    last: usize,
    last_merged: usize,
}

/// How a transaction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Committed,
    RolledBack,
    Prepared,
}

impl Default for Pending {
    fn default() -> Self {
        let entries = Vec::with_capacity(EXACT + MERGED + LAST_RESORT);
        Self { entries, exact: 0, tags: [0; EXACT], last: 0, last_merged: 0 }
    }
}

impl Pending {
    /// Counts a deed. `now` is asked when it is the first of its like.
    pub fn note(&mut self, mut deed: Deed<'_>, now: impl FnOnce() -> i64) {
        if !deed.kind.is_undoable() || deed.outcome != Outcome::Allowed {
            deed.nest = 0;
        }
        let tag = tag(deed.object.map(cut));
        if self.tags[self.last] == tag
            && let Some(entry) = self.entries.get_mut(self.last)
            && entry.is(&deed)
        {
            entry.event.count += 1;
            return;
        }
        if let Some(index) = self.find(tag, &deed) {
            self.entries[index].event.count += 1;
            self.last = index;
        } else if self.exact < EXACT && self.exact == self.entries.len() {
            self.tags[self.exact] = tag;
            self.exact += 1;
            self.last = self.push(&deed, now);
        } else {
            self.last_merged = self.merge(deed, now);
        }
    }

    fn find(&self, tag: u32, deed: &Deed<'_>) -> Option<usize> {
        // All of them, without a branch in between, is quicker than up to the first.
        let equal = self.tags.iter().enumerate().fold(0_u32, |set, (index, own)| set | u32::from(*own == tag) << index);
        let mut rest = equal & ((1 << self.exact) - 1);
        while rest != 0 {
            let index = rest.trailing_zeros() as usize;
            if self.entries[index].is(deed) {
                return Some(index);
            }
            rest &= rest - 1;
        }
        None
    }

    fn merge(&mut self, mut deed: Deed<'_>, now: impl FnOnce() -> i64) -> usize {
        deed.object = None;
        if self.last_merged >= self.exact
            && let Some(entry) = self.entries.get_mut(self.last_merged)
            && entry.is(&deed)
        {
            entry.event.count += 1;
            return self.last_merged;
        }
        if let Some(index) = self.count_in(self.exact..self.entries.len(), &deed) {
            return index;
        }
        if self.entries.len() < self.exact + MERGED {
            return self.push(&deed, now);
        }
        // Rather too many that stand than one that seems undone and is not.
        (deed.role, deed.sub, deed.nest) = (0, None, 0);
        self.count_in(self.exact..self.entries.len(), &deed).unwrap_or_else(|| self.push(&deed, now))
    }

    fn count_in(&mut self, range: Range<usize>, deed: &Deed<'_>) -> Option<usize> {
        let index = range.into_iter().find(|&index| self.entries[index].is(deed))?;
        self.entries[index].event.count += 1;
        Some(index)
    }

    fn push(&mut self, deed: &Deed<'_>, now: impl FnOnce() -> i64) -> usize {
        let Deed { kind, outcome, role, sub, .. } = *deed;
        let event = Event { at: now(), kind, outcome, role, sub, object: deed.object.map(Object::new), count: 1 };
        self.entries.push(Entry { event, nest: deed.nest });
        self.entries.len() - 1
    }

    /// A subtransaction has become part of the one around it.
    pub fn nested_committed(&mut self, own: u32, parent: u32) {
        self.change(|entry| {
            let is_its = entry.nest == own;
            if is_its {
                entry.nest = parent;
            }
            is_its
        });
    }

    /// A subtransaction was rolled back.
    pub fn nested_rolled_back(&mut self, own: u32) {
        self.change(|entry| {
            let is_its = entry.nest == own;
            if is_its {
                entry.nest = 0;
                entry.event.outcome = Outcome::RolledBack;
            }
            is_its
        });
    }

    /// Changes entries, and brings those together that have become equal.
    fn change(&mut self, change: impl Fn(&mut Entry) -> bool) {
        let mut index = 0;
        while index < self.entries.len() {
            if !change(&mut self.entries[index]) {
                index += 1;
                continue;
            }
            let entry = self.entries[index];
            let is_exact = index < self.exact;
            let range = if is_exact { 0..self.exact } else { self.exact..self.entries.len() };
            let like = range.into_iter().find(|&other| other != index && self.entries[other].is_like(&entry));
            if let Some(other) = like {
                let kept = &mut self.entries[other].event;
                kept.count += entry.event.count;
                kept.at = kept.at.min(entry.event.at);
                self.entries.remove(index);
                if is_exact {
                    self.tags.copy_within(index + 1.., index);
                    self.exact -= 1;
                }
                continue;
            }
            index += 1;
        }
        (self.last, self.last_merged) = (0, 0);
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Hands out the events of a transaction that has ended, and forgets them.
    pub fn finish(&mut self, end: End, mut each: impl FnMut(&Event)) {
        let undone = match end {
            End::Committed => None,
            End::RolledBack => Some(Outcome::RolledBack),
            End::Prepared => Some(Outcome::Prepared),
        };
        for entry in &mut self.entries {
            if let Some(outcome) = undone.filter(|_| entry.is_undoable()) {
                entry.event.outcome = outcome;
            }
            each(&entry.event);
        }
        self.entries.clear();
        (self.exact, self.last, self.last_merged) = (0, 0, 0);
    }
}

/// Tells most names apart, and takes no time: the whole of a name is only compared where this is equal.
fn tag(object: Option<&[u8]>) -> u32 {
    let object = object.unwrap_or_default();
    let (first, last) = match (object.first_chunk::<8>(), object.last_chunk::<8>()) {
        (Some(first), Some(last)) => (u64::from_le_bytes(*first), u64::from_le_bytes(*last)),
        _ => (object.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)), 0),
    };
    let mixed = (first.rotate_left(32) ^ last ^ object.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as u32
}

#[cfg(test)]
mod tests;
