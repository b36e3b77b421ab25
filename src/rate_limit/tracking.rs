//! What was counted: running minutes, closed ones on their way into the table, counters.

use crate::pg::guc;
use crate::pg::shmem::rates::{self, Window};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::time::{Duration, Instant};

/// Closed minutes that are written in one transaction.
const BATCH: usize = 1000;
/// Longest time between two looks for closed minutes: two may not close between them.
const INTERVAL: Duration = Duration::from_secs(20);
/// How often what is old is deleted.
const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// `nexus_hub.rate_limit_retention` in seconds.
pub fn retention() -> i32 {
    i32::try_from(guc::rate_limit_retention().as_secs()).unwrap_or(i32::MAX)
}

/// The minutes of this database that are not written down; see the function's COMMENT.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn running_rate_limit_windows() -> TableIterator<
    'static,
    (
        name!(server_id, Option<String>),
        name!(user_id, Option<pgrx::Uuid>),
        name!(minute, i32),
        name!(request_count, i32),
    ),
> {
    let windows = rates::table().map(|table| table.windows(rates::now(), true, 0, usize::MAX).0).unwrap_or_default();
    TableIterator::new(windows.into_iter().map(|window| {
        let (server, user) = names(&window);
        let (minute, count) = window.parts();
        (server, user, minute.cast_signed(), count.cast_signed())
    }))
}

fn names(window: &Window) -> (Option<String>, Option<pgrx::Uuid>) {
    let (server, user) = window.key.server_and_user().unzip();
    (server, user.flatten().map(pgrx::Uuid::from_bytes))
}

/// The counters; see the view's COMMENT.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn rate_limit_statistics() -> TableIterator<
    'static,
    (
        name!(allowed, i64),
        name!(denied, i64),
        name!(exempt, i64),
        name!(evicted, i64),
        name!(full, i64),
        name!(unrecorded, i64),
        name!(keys, i32),
        name!(max_keys, i32),
    ),
> {
    TableIterator::new(rates::table().into_iter().map(|table| {
        let is = table.statistics();
        let [allowed, denied, exempt, evicted, full, unrecorded] =
            [is.allowed, is.denied, is.exempt, is.evicted, is.full, is.unrecorded].map(u64::cast_signed);
        (allowed, denied, exempt, evicted, full, unrecorded, is.keys.cast_signed(), is.max_keys.cast_signed())
    }))
}

/// Writes closed minutes down, in small batches, and deletes old ones.
pub struct Recorder {
    due: Instant,
    tidy_due: Instant,
    /// Where in shared memory the next batch begins.
    from: usize,
    /// What the last round has written. It is marked at the next one: whoever reads both the table and shared memory,
    /// and the table as it was before, still finds it here.
    written: Vec<Window>,
}

/// What is to be done in a transaction.
pub struct Batch {
    windows: Vec<Window>,
    next: Option<usize>,
    tidy: bool,
}

impl Recorder {
    pub fn new(now: Instant) -> Self {
        Self { due: now, tidy_due: now, from: 0, written: Vec::new() }
    }

    /// When there may be something to do; `tidies`: to delete, too.
    pub fn due(&self, tidies: bool) -> Instant {
        if tidies { self.due.min(self.tidy_due) } else { self.due }
    }

    /// What there is to do now.
    pub fn batch(&mut self, now: Instant, poll_interval: Duration, tidies: bool) -> Option<Batch> {
        let tidy = tidies && now >= self.tidy_due;
        let mut batch = Batch { windows: Vec::new(), next: None, tidy };
        if now >= self.due
            && let Some(table) = rates::table()
        {
            if self.from == 0 {
                self.written.drain(..).for_each(|window| table.mark_recorded(&window));
            }
            (batch.windows, batch.next) = table.windows(rates::now(), false, self.from, BATCH);
            if batch.windows.is_empty() {
                self.from = 0;
                self.due = now + poll_interval.min(INTERVAL);
            }
        }
        (tidy || !batch.windows.is_empty()).then_some(batch)
    }

    /// After the batch was committed, or has failed.
    pub fn settle(&mut self, batch: Batch, done: Option<bool>, now: Instant, poll_interval: Duration) {
        let pause = now + poll_interval.min(INTERVAL);
        if let Some(more) = done {
            self.written.extend(batch.windows);
            self.from = batch.next.unwrap_or(0);
            if batch.tidy && !more {
                self.tidy_due = now + TIDY_INTERVAL;
            }
        } else {
            self.from = 0;
            self.tidy_due = self.tidy_due.max(pause);
        }
        if self.from == 0 {
            self.due = self.due.max(pause);
        }
    }
}

impl Batch {
    /// Writes it, in a transaction. Tells whether there is more that is old.
    pub fn write(&self) -> Result<bool, SpiError> {
        let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for window in &self.windows {
            let (server, user) = names(window);
            let (minute, count) = window.parts();
            columns.0.push(server);
            columns.1.push(user);
            columns.2.push(minute.cast_signed());
            columns.3.push(count.cast_signed());
        }
        Spi::connect_mut(|client| {
            if !self.windows.is_empty() {
                let arguments = [columns.0.into(), columns.1.into(), columns.2.into(), columns.3.into()];
                client.update("SELECT _nexus_hub.record_rate_limit_windows($1, $2, $3, $4)", None, &arguments)?;
            }
            if !self.tidy {
                return Ok(false);
            }
            let rows = client.update("SELECT _nexus_hub.tidy_rate_limits($1)", None, &[retention().into()])?;
            let deleted = rows.first().get_one::<i32>()?;
            Ok(deleted.is_some_and(|deleted| deleted >= 1000))
        })
    }
}
