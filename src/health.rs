//! Health: what only this library knows of how things stand. The judgement is in `sql/health.sql`.

use crate::pg::guc;
use crate::pg::shmem::{self, WorkerState, pulse};
use pgrx::prelude::*;

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
    let poll_interval = guc::worker_settings().poll_interval;
    let describe = move |is: pulse::Sighting| {
        let state = match is.state {
            WorkerState::Starting | WorkerState::Running if is.vigil().is_stuck(poll_interval) => "stuck",
            WorkerState::Starting | WorkerState::Replaced => "starting",
            WorkerState::Running => "running",
            WorkerState::Draining => "draining",
            WorkerState::NoExtension | WorkerState::Left | WorkerState::Stopped => "ended",
        };
        let last_loop = TimestampWithTimeZone::try_from(is.last_loop).ok();
        let in_flight = i32::try_from(is.in_flight).unwrap_or(i32::MAX);
        (is.database, i32::from(is.place.number), i32::from(is.place.of), state, is.pid, last_loop, in_flight)
    };
    TableIterator::new(pulse::sightings().into_iter().map(describe))
}
