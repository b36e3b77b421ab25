//! What the first worker of a database writes for its sessions: the audit of the vault, and how many values were encrypted
//! under each key. In transactions of its own, so that jobs and audit do not fail together.

use super::run::Worker;
use crate::pg::{catalog, shmem, transaction};
use crate::{audit, vault};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// How long the first entry waits for others.
const GATHER_TIME: Duration = Duration::from_millis(250);
/// Polls after which old entries and worn keys are looked for: an idle database has no transaction for it at each.
const POLLS_TO_TIDY: u32 = 6;
/// Entries that are written in one transaction.
const BATCH: usize = 1000;
/// How long to wait after a failure.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Transactions at the worker's end at most, and how long to wait after one that has failed.
const LAST_TRIES: u32 = 10;
const LAST_PAUSE: Duration = Duration::from_millis(20);
/// Failures in a row that the log tells of, where somebody else is in the way.
const FAILURES_TOLD: u32 = 5;

/// When what is to be written.
pub struct Records {
    /// Entries of the audit that wait.
    due: Option<Instant>,
    /// Numbers of encrypted values.
    next_poll: Instant,
    /// Old entries, and worn keys.
    next_tidy: Instant,
    /// After a failure.
    not_before: Option<Instant>,
    /// Of them, in a row.
    failures: u32,
    /// The worn key that the log tells of.
    told: Option<String>,
}

impl Records {
    pub fn new(now: Instant) -> Self {
        // At once: entries may be waiting since before this worker was there.
        Self { due: None, next_poll: now, next_tidy: now, not_before: None, failures: 0, told: None }
    }
}

/// What a transaction has found.
struct Found {
    written: Vec<(shmem::tally::What, u64)>,
    has_more_to_prune: bool,
    /// Where it was looked for.
    worn: Option<Option<String>>,
}

impl Worker {
    /// When [`Worker::record`] has something to do. Right before the wait: entries that are put in later set the latch.
    pub fn record_at(&mut self) -> Option<Instant> {
        if self.place.number != 0 || self.outdated {
            return None;
        }
        let now = Instant::now();
        let (any, urgent) = shmem::audit::waiting();
        let records = &mut self.records;
        if urgent {
            records.due = Some(now);
        } else if any {
            records.due.get_or_insert(now + GATHER_TIME);
        }
        records.not_before.or(records.due.into_iter().chain([records.next_poll]).min())
    }

    /// Writes what is due.
    pub fn record(&mut self) {
        if self.record_at().is_some_and(|at| at <= Instant::now()) {
            self.write_records();
        }
    }

    /// Writes all there is, at the worker's end.
    pub fn record_last(&mut self) {
        if self.place.number == 0 {
            // Nobody comes after it who could write them: what is in the way may be gone in a moment.
            for _ in 0..LAST_TRIES {
                self.records.next_poll = Instant::now();
                let is_written = self.write_records();
                if is_written && self.records.due.is_none() {
                    break;
                }
                if !is_written {
                    std::thread::sleep(LAST_PAUSE);
                }
            }
        }
    }

    /// Tells whether it went well.
    fn write_records(&mut self) -> bool {
        let now = Instant::now();
        let (extension, database, retention) = (self.extension, self.database, self.settings.retention);
        let is_poll = now >= self.records.next_poll;
        let (events, slots) = shmem::audit::full(database, BATCH);
        let lost = audit::lost(database);
        let is_full = slots.len() == BATCH;
        self.records.due = is_full.then_some(now);
        self.records.not_before = None;
        let is_sealed = |(what, _): &(_, _)| matches!(what, shmem::tally::What::Sealed(_));
        let counts = is_poll && shmem::tally::of(database).iter().any(is_sealed);
        let tidies = counts || (is_poll && now >= self.records.next_tidy);
        if !tidies && events.is_empty() && lost == 0 {
            if is_poll {
                self.records.next_poll = now + self.settings.poll_interval;
            }
            return true;
        }
        let work = || {
            if !events.is_empty() || lost > 0 {
                audit::write(&events, lost)?;
            }
            let mut found = Found { written: Vec::new(), has_more_to_prune: false, worn: None };
            if counts {
                found.written = vault::write_wear(database)?;
            }
            if tidies {
                found.has_more_to_prune = retention.auto_cleanup && audit::prune(retention.audit)?;
                found.worn = Some(vault::worn()?);
            }
            Ok::<_, pgrx::spi::SpiError>(found)
        };
        let done = transaction::run(c"nexus_hub: writing the vault's audit", || {
            // Where it is gone, the next step finds out.
            if !catalog::hold_extension(extension) {
                return Ok(None);
            }
            work().map(Some).map_err(|problem| problem.to_string())
        });
        match done {
            Ok(Some(found)) => {
                shmem::audit::free(slots);
                self.records.failures = 0;
                let written = found.written.into_iter().chain([(shmem::tally::What::Lost, lost)]);
                written.for_each(|(what, count)| shmem::tally::take(database, what, count));
                if is_poll {
                    let time = if found.has_more_to_prune { Duration::ZERO } else { self.settings.poll_interval };
                    self.records.next_poll = now + time;
                }
                if tidies && !found.has_more_to_prune {
                    self.records.next_tidy = now + self.settings.poll_interval * POLLS_TO_TIDY;
                }
                if let Some(worn) = found.worn {
                    self.tell_of_worn_key(worn);
                }
                return true;
            }
            Ok(None) => {}
            Err(failure) => {
                self.records.failures += 1;
                // Somebody may just be at work on the table.
                if self.records.failures == if failure.transient { FAILURES_TOLD } else { 1 } {
                    log!("nexus_hub: the vault's audit was not written, and is tried again: {}", failure.message);
                }
            }
        }
        self.records.due = Some(now);
        self.records.not_before = Some(now + RETRY_DELAY);
        false
    }

    fn tell_of_worn_key(&mut self, worn: Option<String>) {
        if let Some(key) = worn.as_ref().filter(|_| worn != self.records.told) {
            log!(
                "nexus_hub: the vault key {key} has encrypted more than 2^31 values in this database, and is safe for \
                 2^32: put a new key above it, reload, and call rotate_vault_key()"
            );
        }
        self.records.told = worn;
    }
}
