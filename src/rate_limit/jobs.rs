//! Rate limits of MCP jobs. A job's request is a call of its user to its server, counted together with those of
//! `check_rate_limit`; but a job that is over the limit is not counted, it waits.

use super::rules::{self, Rule};
use crate::pg::shmem::{self, rates};
use crate::pg::{guc, identity};
use pgrx::spi::SpiError;
use std::time::Duration;

/// Time until jobs are tried again that the table had no room for.
const FULL_TIME: Duration = Duration::from_secs(10);

/// The limit that counts for the jobs of a user at a server whose row says `own`; `None`: none does. Call it in a
/// transaction.
pub fn limit(server: &str, user: Option<&[u8; 16]>, own: Option<i32>) -> Result<Option<i32>, SpiError> {
    Ok(counting(rules::of_server(rates::table(), server, user, rates::now())?, own))
}

/// The same by exemptions and overrides as they were read last, without a transaction.
pub fn limit_as_known(server: &str, user: Option<&[u8; 16]>, own: Option<i32>) -> Option<i32> {
    counting(rules::of_server_as_known(server, user), own)
}

fn counting(rule: Rule, own: Option<i32>) -> Option<i32> {
    match rule {
        Rule::Exempt => None,
        Rule::Limit(limit) => Some(limit),
        Rule::None => own,
    }
}

/// Reads exemptions and overrides again, if they may have changed. Call it in a transaction.
pub fn refresh() -> Result<(), SpiError> {
    rules::refresh(rates::table(), rates::now()).map(|_| ())
}

/// Counts a request and returns the minute it is counted in. The error: how long to wait, because there were too many.
pub fn charge(server: &str, user: Option<&[u8; 16]>, limit: i32) -> Result<u32, Duration> {
    let now = rates::now();
    let Some(table) = rates::table() else { return Ok(0) };
    match table.take(&table.server_key(server, user), now, limit) {
        Some(Ok(minute)) => Ok(minute),
        Some(Err(next)) => Err(Duration::from_nanos(next.saturating_sub(now))),
        None if guc::allows_when_full() => {
            super::admit_when_full(table, now);
            Ok(0)
        }
        None => {
            // It will be asked for again, and is no call that was refused.
            super::warn_when_full(table, now, false);
            Err(FULL_TIME)
        }
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
