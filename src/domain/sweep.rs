//! The order and pace of a cleanup: which batch is next, where it begins, and when.
//!
//! A round goes through all stages, and goes on in each where the round before has ended: what was deleted stays in an
//! index until a vacuum, under somebody's old snapshot for long, and to step over a million dead entries takes a while.
//! What came in behind that place is found by a round from the beginning, which is made as often as its cost allows.

use std::time::Duration;

/// After so much work it rests so many times as long: what it takes from the jobs is a tenth.
const REST: u32 = 9;
/// The share of the time that rounds from the beginning may take, as a divisor.
const FULL_SHARE: u32 = 20;

/// Longest time between two rounds from the beginning that find rows which cannot go.
const MAX_FULL_TIME: Duration = Duration::from_secs(24 * 3600);

/// What came of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swept<P> {
    /// Where to go on.
    pub next: P,
    /// Whether there may be more.
    pub more: bool,
    /// Whether there are rows that could not go.
    pub kept: bool,
}

/// A cleanup of several stages. Times are durations since any moment, the same for all.
#[derive(Debug)]
pub struct Sweep<P> {
    places: Vec<P>,
    start: P,
    stage: usize,
    due: Duration,
    /// When the next round begins at the beginning.
    full_due: Duration,
    is_full: bool,
    /// What this round has taken.
    work: Duration,
    /// Whether this round has met rows that could not go.
    kept: bool,
    /// Rounds from the beginning, in a row, that have.
    futile: u32,
}

impl<P: Clone> Sweep<P> {
    /// So many stages, each beginning at `start`; due at once.
    pub fn new(stages: usize, start: P, now: Duration) -> Self {
        let places = vec![start.clone(); stages];
        Self {
            places,
            start,
            stage: 0,
            due: now,
            full_due: now,
            is_full: false,
            work: Duration::ZERO,
            kept: false,
            futile: 0,
        }
    }

    /// When the next batch is due.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// The batch to do now: its stage, and where it begins.
    pub fn next(&mut self, now: Duration) -> Option<(usize, P)> {
        if now < self.due {
            return None;
        }
        if self.stage == 0 && self.work.is_zero() && now >= self.full_due {
            self.is_full = true;
            self.places.fill(self.start.clone());
        }
        Some((self.stage, self.places.get(self.stage)?.clone()))
    }

    /// The batch took so long, and this came of it. `interval`: the time between two rounds. Tells whether the round is over.
    pub fn done(&mut self, swept: Swept<P>, now: Duration, took: Duration, interval: Duration) -> bool {
        // Never nothing: it tells that the round has begun.
        self.work += took.max(Duration::from_nanos(1));
        if let Some(place) = self.places.get_mut(self.stage) {
            *place = swept.next;
        }
        self.kept |= swept.kept;
        self.due = now + took * REST;
        !swept.more && self.leave_stage(now, interval)
    }

    /// The batch took so long, and has failed: what is in its way must not hold up the other stages. It is tried again in
    /// the next round. Tells whether the round is over.
    pub fn failed(&mut self, now: Duration, took: Duration, interval: Duration) -> bool {
        self.work += took.max(Duration::from_nanos(1));
        self.due = now + took * REST;
        self.leave_stage(now, interval)
    }

    fn leave_stage(&mut self, now: Duration, interval: Duration) -> bool {
        self.stage += 1;
        if self.stage < self.places.len() {
            return false;
        }
        if self.is_full {
            // What cannot go costs as much each time.
            self.futile = if self.kept { self.futile.saturating_add(1) } else { 0 };
            let time = interval.max(self.work * FULL_SHARE);
            self.full_due = now + time.saturating_mul(1 << self.futile.min(20)).min(MAX_FULL_TIME.max(time));
        }
        self.due = self.due.max(now + interval);
        self.stage = 0;
        self.is_full = false;
        self.work = Duration::ZERO;
        self.kept = false;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const INTERVAL: Duration = Duration::from_secs(60);

    fn swept(next: i32, more: bool) -> Swept<i32> {
        Swept { next, more, kept: false }
    }

    #[test]
    fn a_round_goes_through_all_stages_and_rests_after_each_batch() {
        let mut sweep = Sweep::new(2, 0, MS);
        assert_eq!(sweep.next(Duration::ZERO), None);
        assert_eq!(sweep.next(MS), Some((0, 0)));
        sweep.done(swept(5, true), 2 * MS, MS, INTERVAL);
        assert_eq!(sweep.due(), 11 * MS);
        assert_eq!(sweep.next(10 * MS), None);
        assert_eq!(sweep.next(11 * MS), Some((0, 5)));
        sweep.done(swept(7, false), 12 * MS, MS, INTERVAL);
        assert_eq!(sweep.next(21 * MS), Some((1, 0)));
        sweep.done(swept(3, false), 22 * MS, MS, INTERVAL);
        assert_eq!(sweep.due(), 22 * MS + INTERVAL);
    }

    #[test]
    fn the_next_round_goes_on_where_the_last_one_ended_until_one_from_the_beginning_is_due() {
        let mut sweep = Sweep::new(1, 0, Duration::ZERO);
        let took = Duration::from_secs(30);
        assert_eq!(sweep.next(Duration::ZERO), Some((0, 0)));
        // A round that takes 30 seconds from the beginning is made every ten minutes.
        sweep.done(swept(9, false), took, took, INTERVAL);
        assert_eq!(sweep.due(), took + took * 9);
        let mut now = sweep.due();
        for _ in 0..5 {
            assert_eq!(sweep.next(now), Some((0, 9)));
            sweep.done(swept(9, false), now + MS, MS, INTERVAL);
            now = sweep.due();
        }
        now = now.max(took + took * 20);
        assert_eq!(sweep.next(now), Some((0, 0)));
    }

    #[test]
    fn a_cheap_round_always_begins_at_the_beginning() {
        let mut sweep = Sweep::new(1, 0, Duration::ZERO);
        let mut now = Duration::ZERO;
        for _ in 0..3 {
            assert_eq!(sweep.next(now), Some((0, 0)));
            sweep.done(swept(9, false), now + MS, MS, INTERVAL);
            now = sweep.due();
        }
    }

    #[test]
    fn a_round_that_began_at_the_beginning_does_not_begin_again_in_the_middle() {
        let mut sweep = Sweep::new(1, 0, Duration::ZERO);
        sweep.next(Duration::ZERO);
        sweep.done(swept(4, true), MS, Duration::ZERO, INTERVAL);
        assert_eq!(sweep.next(MS), Some((0, 4)));
        // Asked again, before it is done.
        assert_eq!(sweep.next(MS), Some((0, 4)));
    }

    #[test]
    fn a_stage_that_fails_holds_up_no_other_and_comes_again_in_the_next_round_where_it_was() {
        let mut sweep = Sweep::new(2, 0, Duration::ZERO);
        sweep.next(Duration::ZERO);
        assert!(!sweep.done(swept(4, true), MS, MS, INTERVAL));
        assert_eq!(sweep.next(10 * MS), Some((0, 4)));
        assert!(!sweep.failed(10 * MS, MS, INTERVAL));
        assert_eq!(sweep.next(19 * MS), Some((1, 0)));
        assert!(sweep.failed(20 * MS, MS, INTERVAL));
        assert_eq!(sweep.next(21 * MS), None);
        // The round from the beginning is over, too.
        sweep.full_due = Duration::MAX;
        assert_eq!(sweep.next(20 * MS + INTERVAL), Some((0, 4)));
    }

    #[test]
    fn rounds_that_meet_what_cannot_go_become_rare_and_usual_again_when_it_is_gone() {
        let mut sweep = Sweep::new(1, 0, Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut full_rounds = Vec::new();
        for _ in 0..40 {
            let (_, place) = sweep.next(now).expect("due");
            if place == 0 {
                full_rounds.push(now);
            }
            sweep.done(Swept { next: 9, more: false, kept: place == 0 && full_rounds.len() < 4 }, now, MS, INTERVAL);
            now = sweep.due();
        }
        let pauses: Vec<_> = full_rounds.windows(2).map(|two| (two[1] - two[0]).as_secs()).take(4).collect();
        assert_eq!(pauses, [120, 240, 480, 60]);
    }
}
