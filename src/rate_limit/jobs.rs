//! Rate limits of MCP jobs. A job's request is a call of its user to its server, counted together with those of
//! `check_rate_limit`; but a job that is over the limit is not counted, it waits.

use super::rules::{self, Rule};
use crate::pg::identity;
use crate::pg::shmem::{self, rates};
use pgrx::spi::SpiError;
use std::time::Duration;

/// Time until jobs are tried again that the table had no room for.
const FULL_TIME: Duration = Duration::from_secs(1);

/// The limit that counts for the jobs of a user at a server whose row says `own`; `None`: none does. Call it in a
/// transaction.
pub fn limit(server: &str, user: Option<&[u8; 16]>, own: Option<i32>) -> Result<Option<i32>, SpiError> {
    Ok(match rules::of_server(rates::table(), server, user, rates::now())? {
        Rule::Exempt => None,
        Rule::Limit(limit) => Some(limit),
        Rule::None => own,
    })
}

/// Counts a request and returns the minute it is counted in. The error: how long to wait, because there were too many.
pub fn charge(server: &str, user: Option<&[u8; 16]>, limit: i32) -> Result<u32, Duration> {
    let now = rates::now();
    let Some(table) = rates::table() else { return Ok(0) };
    match table.take(&table.server_key(server, user), now, limit) {
        Some(Ok(minute)) => Ok(minute),
        Some(Err(next)) => Err(Duration::from_nanos(next.saturating_sub(now))),
        None if super::admit_when_full(table, now) => Ok(0),
        None => Err(FULL_TIME),
    }
}

/// Takes back what [`charge`] has counted: the request was not made.
pub fn refund(server: &str, user: Option<&[u8; 16]>, minute: u32) {
    if let Some(table) = rates::table() {
        table.refund(&table.server_key(server, user), minute);
    }
}

/// Has the worker look whether jobs that wait may go on.
pub fn may_go_on() {
    let database = identity::database();
    shmem::ask_for_poll(database);
    shmem::nudge(database, false);
}
