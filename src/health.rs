//! Health: what only this library knows of how things stand. The judgement is in `sql/health.sql`.

use crate::domain::vigil;
use crate::pg::shmem::{self, WorkerState, pulse};
use crate::pg::{guc, identity};
use pgrx::prelude::*;
use std::time::Duration;

/// Whether the library was preloaded; see the function's COMMENT.
#[pg_extern(sql = false)]
fn is_preloaded() -> bool {
    shmem::preloaded()
}

/// The version of the library, which may be another than that of the extension's SQL.
#[pg_extern(sql = false)]
fn library_version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// How many workers this database is to have.
#[pg_extern(sql = false)]
fn workers_wanted() -> i32 {
    guc::workers_per_database().into()
}

/// The workers of all databases; see the function's COMMENT.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn workers() -> TableIterator<
    'static,
    (
        name!(database, pg_sys::Oid),
        name!(number, i32),
        name!(workers, i32),
        name!(state, &'static str),
        name!(pid, i32),
        name!(last_loop, Option<TimestampWithTimeZone>),
        name!(in_flight, i32),
    ),
> {
    let (now, poll_interval) = (identity::now(), guc::worker_settings().poll_interval);
    let describe = move |is: pulse::Sighting| {
        let unseen = is.last_loop.map(|last| Duration::from_micros(now.saturating_sub(last).max(0).unsigned_abs()));
        let state = match is.state {
            WorkerState::Starting => "starting",
            WorkerState::Running if unseen.is_some_and(|unseen| vigil::is_stuck(unseen, poll_interval)) => "stuck",
            WorkerState::Running => "running",
            WorkerState::NoExtension | WorkerState::Left | WorkerState::Replaced | WorkerState::Stopped => "ended",
        };
        let last_loop = is.last_loop.and_then(|last| TimestampWithTimeZone::try_from(last).ok());
        let in_flight = i32::try_from(is.in_flight).unwrap_or(i32::MAX);
        (is.database, i32::from(is.place.number), i32::from(is.place.of), state, is.pid, last_loop, in_flight)
    };
    TableIterator::new(pulse::sightings().into_iter().map(describe))
}
