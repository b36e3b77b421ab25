//! Caches of what servers offer: what sync_server needs beyond SQL, and how syncs begin and end for the worker.

use crate::jobs::queue::Completion;
use crate::net::Verdict;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::guc::Caching;
use pgrx::prelude::*;
use pgrx::spi::SpiError;

/// Servers that are synced again in one transaction of the worker.
pub const BATCH: i32 = 50;

/// Raises the error of a server that cannot be synced; see the function's COMMENT.
#[pg_extern(sql = false)]
fn cannot_sync(server_id: Option<&str>, is_theirs: bool) -> Result<Option<pgrx::Uuid>, ErrorReport> {
    let name = server_id.unwrap_or_default();
    Err(if is_theirs {
        error(Kind::BadArgument, format!("the server \"{name}\" is disabled")).set_hint("Enable it first.")
    } else {
        error(Kind::NotAllowed, format!("the server \"{name}\" is everybody's, and not synced by users"))
            .set_hint("The back end syncs it, as service_role.")
    })
}

/// What becomes of a sync's end.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is written as it is.
    AsItIs,
    /// This is written.
    As(Verdict),
    /// A session keeps rows locked: later.
    Locked,
}

/// Writes what a sync has found into the caches, or why it has found nothing. Call it in the transaction that writes the
/// job's end.
pub fn settle(sync: &Completion, ttl_minutes: i32) -> Result<Settled, SpiError> {
    let (catalogue, problem) = match &sync.verdict {
        Verdict::Completed { result } => (Some(result.as_str()), None),
        Verdict::Failed { error, .. } => (None, Some(error.as_str())),
        // Who has taken it over writes the caches, too.
        Verdict::HandedOver => return Ok(Settled::AsItIs),
    };
    let job = pgrx::Uuid::from_bytes(sync.job.into_bytes());
    let lease = pgrx::Uuid::from_bytes(sync.lease.into_bytes());
    Spi::connect_mut(|client| {
        let row = client
            .update(
                "SELECT outcome, answer FROM _nexus_hub.settle_sync($1, $2, $3, $4, $5)",
                Some(1),
                &[job.into(), lease.into(), catalogue.into(), problem.into(), ttl_minutes.into()],
            )?
            .first();
        let answer = row.get::<String>(2)?;
        Ok(match (row.get::<String>(1)?.as_deref(), answer) {
            (Some("written"), None) => Settled::AsItIs,
            (Some("written"), Some(result)) => Settled::As(Verdict::Completed { result }),
            (Some("locked"), _) => Settled::Locked,
            (Some("failed"), Some(error)) if problem.is_none() => Settled::As(Verdict::Failed { error, result: None }),
            _ if problem.is_some() => Settled::AsItIs,
            // The catalogue is not for the job's row.
            _ => {
                Settled::As(Verdict::Failed { error: "the server was deleted, or is synced anew".into(), result: None })
            }
        })
    })
}

/// Begins syncs of servers whose entries expire soon, and tells how many. Call it in a transaction of the worker.
pub fn refresh(caching: Caching) -> Result<i32, SpiError> {
    let lead = i64::try_from(caching.lead().as_secs()).unwrap_or_default();
    // As if it would only read: what finds nothing to begin then takes no transaction id.
    Spi::connect(|client| {
        let begin = "SELECT _nexus_hub.refresh_due($1, make_interval(secs => $2::bigint))";
        Ok(client.select(begin, Some(1), &[BATCH.into(), lead.into()])?.first().get_one::<i32>()?.unwrap_or(0))
    })
}
