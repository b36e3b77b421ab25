//! Cleanup: what the SQL functions need beyond SQL, and the batches that the worker does by itself.

use crate::domain::sweep::Swept;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::guc::{self, Retention};
use crate::pg::{identity, shmem};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use uuid::Uuid;

/// Rows that are deleted in one transaction of the worker at most: some milliseconds.
pub const MAX_BATCH: i32 = 500;
/// Bytes of values that are deleted in one transaction of the worker. A large one is many rows elsewhere.
const BATCH_BYTES: i64 = 4 * 1024 * 1024;
/// How long rows are deleted one by one in one transaction of the worker, where one of them cannot be.
const ONE_BY_ONE_TIME: &str = "100 milliseconds";
/// More are no date any more.
const MAX_DAYS: i32 = 1_000_000;

/// Whether a worker that is alive has claimed jobs under the lease; see the function's COMMENT.
#[pg_extern(sql = false)]
fn is_lease_live(lease: Option<pgrx::Uuid>) -> bool {
    lease.is_some_and(|lease| {
        let (holder, _) = Uuid::from_bytes(*lease.as_bytes()).as_u64_pair();
        shmem::is_live_holder(identity::database(), holder)
    })
}

/// What a setting says; see the function's COMMENT.
#[pg_extern(sql = false)]
fn job_retention(kind: Option<&str>) -> Result<Option<Interval>, ErrorReport> {
    let settings = guc::retention();
    match kind {
        Some("completed") => minutes(settings.completed),
        Some("orphaned") => minutes(settings.orphaned),
        _ => Err(error(Kind::BadArgument, "kind must be completed or orphaned")),
    }
}

fn minutes(minutes: i32) -> Result<Option<Interval>, ErrorReport> {
    (minutes > 0).then(|| interval(0, minutes)).transpose()
}

/// The argument, if it is fit to be a number of days.
#[pg_extern(sql = false)]
fn days(days: Option<i32>, argument: Option<&str>) -> Result<Option<Interval>, ErrorReport> {
    match days {
        Some(days) if days < 0 => {
            Err(error(Kind::BadArgument, format!("{} must be 0 or more, not {days}", argument.unwrap_or("days")))
                .set_hint("0 means whatever the age, NULL none."))
        }
        days => days.map(|days| interval(days.min(MAX_DAYS), 0)).transpose(),
    }
}

fn interval(days: i32, minutes: i32) -> Result<Interval, ErrorReport> {
    Interval::new(0, days, i64::from(minutes) * 60_000_000)
        .map_err(|problem| error(Kind::Internal, format!("no interval: {problem}")))
}

/// What the worker cleans up, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Jobs that have ended in this way.
    Ended(&'static str),
    /// Attempts that have failed.
    Attempts,
    /// Jobs that were handed over and whose end nobody has written.
    Orphans,
}

impl Stage {
    pub const ALL: [Self; 5] =
        [Self::Ended("completed"), Self::Ended("failed"), Self::Ended("cancelled"), Self::Attempts, Self::Orphans];
}

/// Where a batch begins: after the job that ended then and has this id.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    at: TimestampWithTimeZone,
    id: pgrx::Uuid,
}

impl Place {
    /// Before all jobs.
    pub fn start() -> Self {
        Self { at: TimestampWithTimeZone::negative_infinity(), id: pgrx::Uuid::from_bytes([0; 16]) }
    }
}

/// What a batch has done.
#[derive(Debug)]
pub struct Done {
    pub swept: Swept<Place>,
    /// Rows that were deleted, or ended.
    pub rows: u64,
    /// Rows that could not be deleted, and why the first could not.
    pub kept: Option<(i32, String)>,
}

/// Does a batch of so many rows at most, beginning at a place. Call it in a transaction of the worker.
pub fn batch(stage: Stage, from: Place, rows: i32, retention: Retention) -> Result<Done, SpiError> {
    let minutes = match stage {
        Stage::Ended(_) => retention.completed,
        Stage::Attempts => retention.attempts,
        Stage::Orphans => retention.orphaned,
    };
    let mut done = Done { swept: Swept { next: from, more: false, kept: false }, rows: 0, kept: None };
    if minutes == 0 {
        return Ok(done);
    }
    // As if it would only read: what finds nothing to delete then takes no transaction id.
    Spi::connect(|client| {
        match stage {
            Stage::Ended(status) => {
                let delete = "SELECT deleted, kept, problem, next, next_id, more FROM _nexus_hub.prune_jobs($1, $2, $3, $4, $5, $6, $7::interval)";
                let arguments = [
                    status.into(),
                    minutes.into(),
                    from.at.into(),
                    from.id.into(),
                    rows.into(),
                    BATCH_BYTES.into(),
                    ONE_BY_ONE_TIME.into(),
                ];
                let row = client.select(delete, Some(1), &arguments)?.first();
                done.rows = u64::from(row.get::<i32>(1)?.unwrap_or(0).unsigned_abs());
                let kept = row.get::<i32>(2)?.filter(|kept| *kept > 0);
                done.kept = kept.zip(row.get::<String>(3)?);
                let next = Place { at: row.get(4)?.unwrap_or(from.at), id: row.get(5)?.unwrap_or(from.id) };
                done.swept = Swept { next, more: row.get(6)? == Some(true), kept: kept.is_some() };
            }
            Stage::Attempts => {
                let delete = "SELECT _nexus_hub.delete_old_attempts(now() - make_interval(mins => $1), $2)";
                (done.rows, done.swept.more) =
                    count(client.select(delete, Some(1), &[minutes.into(), rows.into()])?, rows)?;
            }
            Stage::Orphans => {
                let fail = "SELECT _nexus_hub.fail_orphans(make_interval(mins => $1), $2)";
                (done.rows, done.swept.more) =
                    count(client.select(fail, Some(1), &[minutes.into(), rows.into()])?, rows)?;
            }
        }
        Ok(done)
    })
}

/// How many rows it was, and whether there may be more.
fn count(answer: pgrx::spi::SpiTupleTable<'_>, limit: i32) -> Result<(u64, bool), SpiError> {
    let count = answer.first().get_one::<i32>()?.unwrap_or(0);
    Ok((u64::from(count.unsigned_abs()), count == limit))
}
