//! Outcomes on their way into the job table: which of them go into the next transaction.

use crate::jobs::queue::{Claim, Completion};
use crate::net::{Held, Verdict};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Answers written in one transaction: PostgreSQL takes no array of more than 1 GB.
const MAX_BATCH_BYTES: usize = 32 * 1024 * 1024;
/// How long to wait before a row that a session keeps locked is tried again.
const LOCKED_DELAY: Duration = Duration::from_millis(50);

/// What is to be written of a job, and the memory that it was given until then.
pub struct Finished {
    pub completion: Completion,
    #[allow(dead_code, reason = "it counts until it is dropped")]
    pub held: Held,
}

/// Outcomes that are not written yet.
pub struct Backlog {
    outcomes: Vec<Finished>,
    /// Those that could not be written, because a session keeps their rows locked.
    locked: HashSet<Claim>,
    /// When to try these again.
    look_again: Instant,
    /// How many go into one transaction: all, or less after a failure, until the one that can't be written is found.
    limit: usize,
}

impl Backlog {
    pub fn new(now: Instant) -> Self {
        Self { outcomes: Vec::new(), locked: HashSet::new(), look_again: now, limit: usize::MAX }
    }

    pub fn push(&mut self, outcome: Finished) {
        self.outcomes.push(outcome);
    }

    /// Takes outcomes until it holds as much as goes into one transaction, or there are no more, and tells whether
    /// there may be more. Rows that are locked do not count, or a batch of them would keep all others out.
    pub fn fill<E>(&mut self, count: usize, mut next: impl FnMut() -> Result<Option<Finished>, E>) -> Result<bool, E> {
        let mut held = self.fresh().count();
        let mut bytes: usize = self.fresh().map(|outcome| outcome.completion.verdict.bytes()).sum();
        while held < count && bytes < MAX_BATCH_BYTES {
            let Some(outcome) = next()? else { return Ok(false) };
            held += 1;
            bytes += outcome.completion.verdict.bytes();
            self.outcomes.push(outcome);
        }
        Ok(true)
    }

    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Whether there are outcomes that can be written at once.
    pub fn has_fresh(&self) -> bool {
        self.fresh().next().is_some()
    }

    fn fresh(&self) -> impl Iterator<Item = &Finished> {
        self.outcomes.iter().filter(|outcome| !self.locked.contains(&outcome.completion.claim()))
    }

    /// What the outcomes' jobs are held under.
    pub fn claims(&self) -> impl Iterator<Item = Claim> {
        self.outcomes.iter().map(|outcome| outcome.completion.claim())
    }

    /// When rows that were locked are due to be tried again.
    pub fn look_again(&self) -> Option<Instant> {
        (!self.locked.is_empty()).then_some(self.look_again)
    }

    /// The outcomes for the next transaction. Those whose rows were locked are tried by themselves, now and then.
    pub fn batch(&self, now: Instant) -> Vec<&Completion> {
        let locked_ones = self.look_again().is_some_and(|at| now >= at);
        let mut bytes = 0;
        let fits = |outcome: &&Finished| {
            let before = bytes;
            bytes += outcome.completion.verdict.bytes();
            // One is always taken, however large.
            before == 0 || bytes <= MAX_BATCH_BYTES
        };
        let outcomes =
            self.outcomes.iter().filter(|outcome| self.locked.contains(&outcome.completion.claim()) == locked_ones);
        outcomes.take(self.limit).take_while(fits).map(|outcome| &outcome.completion).collect()
    }

    /// After a transaction that has committed: drops what it dealt with, and remembers the jobs whose rows were locked.
    pub fn settle(&mut self, tried: &HashSet<Claim>, locked: &[Claim], now: Instant) {
        if tried.is_empty() {
            return;
        }
        self.limit = usize::MAX;
        self.outcomes.retain(|outcome| {
            !tried.contains(&outcome.completion.claim()) || locked.contains(&outcome.completion.claim())
        });
        self.locked.retain(|job| !tried.contains(job));
        if !locked.is_empty() {
            self.locked.extend(locked);
            self.look_again = now + LOCKED_DELAY;
        }
    }

    /// After a transaction that failed on these jobs: halves the batch, until one outcome is left, which then becomes a
    /// failure that says why. `false`: even that could not be written.
    pub fn narrow(&mut self, tried: &HashSet<Claim>, reason: &str) -> bool {
        if tried.len() > 1 {
            self.limit = tried.len() / 2;
            return true;
        }
        let Some(outcome) = self.outcomes.iter_mut().find(|outcome| tried.contains(&outcome.completion.claim())) else {
            return true;
        };
        if matches!(&outcome.completion.verdict, Verdict::Failed { result: None, error } if error.starts_with(UNSTORABLE))
        {
            return false;
        }
        outcome.completion.verdict = Verdict::Failed { error: format!("{UNSTORABLE}: {reason}"), result: None };
        outcome.completion.retry_in = None;
        true
    }
}

const UNSTORABLE: &str = "the answer could not be stored";

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn outcome(number: u128, bytes: usize) -> Finished {
        let completion = Completion {
            job: Uuid::from_u128(number),
            lease: Uuid::from_u128(1000 + number),
            is_sync: false,
            verdict: Verdict::Completed { result: "x".repeat(bytes) },
            http_status: None,
            retry_in: None,
        };
        Finished { completion, held: Held::default() }
    }

    fn backlog(sizes: &[usize]) -> (Backlog, Instant) {
        let now = Instant::now();
        let mut backlog = Backlog::new(now);
        (0..).zip(sizes).for_each(|(number, bytes)| backlog.push(outcome(number, *bytes)));
        (backlog, now)
    }

    fn numbers(batch: &[&Completion]) -> Vec<u128> {
        batch.iter().map(|outcome| outcome.job.as_u128()).collect()
    }

    fn claim(number: u128) -> Claim {
        (Uuid::from_u128(number), Uuid::from_u128(1000 + number))
    }

    fn jobs(numbers: &[u128]) -> HashSet<Claim> {
        numbers.iter().map(|number| claim(*number)).collect()
    }

    #[test]
    fn a_batch_has_a_bounded_size_and_at_least_one_outcome() {
        let (mut backlog, now) = backlog(&[MAX_BATCH_BYTES + 1, 1, 1]);
        assert_eq!(numbers(&backlog.batch(now)), [0]);
        backlog.settle(&jobs(&[0]), &[], now);
        assert_eq!(numbers(&backlog.batch(now)), [1, 2]);
        backlog.settle(&jobs(&[1, 2]), &[], now);
        assert!(!backlog.has_fresh() && backlog.batch(now).is_empty());
    }

    #[test]
    fn it_is_filled_up_to_a_count_or_a_size_of_rows_that_are_not_locked() {
        let (mut backlog, now) = backlog(&[1, 1]);
        backlog.settle(&jobs(&[0, 1]), &[claim(0), claim(1)], now);
        let mut waiting = vec![outcome(5, 1), outcome(4, MAX_BATCH_BYTES), outcome(3, 1), outcome(2, 1)];
        let mut fill = |backlog: &mut Backlog, count| backlog.fill(count, || Ok::<_, ()>(waiting.pop()));
        assert_eq!(fill(&mut backlog, 2), Ok(true));
        assert_eq!(numbers(&backlog.batch(now)), [2, 3]);
        assert_eq!(fill(&mut backlog, 9), Ok(true), "by size");
        backlog.settle(&jobs(&[2, 3, 4]), &[], now);
        assert_eq!(fill(&mut backlog, 9), Ok(false));
        assert_eq!(numbers(&backlog.batch(now)), [5]);
    }

    #[test]
    fn locked_rows_wait_by_themselves_and_hold_up_nobody() {
        let (mut backlog, now) = backlog(&[1, 1]);
        backlog.settle(&jobs(&[0, 1]), &[claim(1)], now);
        backlog.push(outcome(2, 1));
        assert_eq!(numbers(&backlog.batch(now)), [2]);
        let later = now + LOCKED_DELAY;
        assert_eq!(backlog.look_again(), Some(later));
        assert_eq!(numbers(&backlog.batch(later)), [1]);
        backlog.settle(&jobs(&[1]), &[], later);
        assert_eq!(backlog.look_again(), None);
        assert_eq!(numbers(&backlog.batch(later)), [2]);
    }

    #[test]
    fn the_one_outcome_that_can_not_be_written_is_found_and_replaced() {
        let (mut backlog, now) = backlog(&[1, 1, 1, 1]);
        for expected in [&[0, 1, 2, 3][..], &[0, 1], &[0]] {
            assert_eq!(numbers(&backlog.batch(now)), expected);
            assert!(backlog.narrow(&jobs(expected), "too large"));
        }
        let batch = backlog.batch(now);
        assert!(matches!(&batch[0].verdict, Verdict::Failed { error, result: None } if error.ends_with("too large")));
        assert!(!backlog.narrow(&jobs(&[0]), "too large"), "not even that");
    }
}
