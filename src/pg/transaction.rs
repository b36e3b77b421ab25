//! Transactions of a background worker.

use pgrx::PgTryBuilder;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use std::panic::AssertUnwindSafe;

/// Runs `work` in one transaction and commits it. An SQL error or a panic rolls back and comes out as text, so that a
/// deadlock, say, does not cost the worker what it holds in memory.
pub fn run<R>(activity: &std::ffi::CStr, work: impl FnOnce() -> R) -> Result<R, String> {
    // SAFETY: the worker is connected to a database and in no transaction; calls come in the order PostgreSQL's own
    // workers use, and whatever raises an error ends in AbortCurrentTransaction.
    let result = PgTryBuilder::new(AssertUnwindSafe(|| unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, activity.as_ptr());
        let result = work();
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
        Ok(result)
    }))
    .catch_others(|error| {
        // SAFETY: see above.
        unsafe { pg_sys::AbortCurrentTransaction() };
        Err(describe(error))
    })
    .catch_rust_panic(|error| {
        // SAFETY: see above.
        unsafe { pg_sys::AbortCurrentTransaction() };
        Err(describe(error))
    })
    .execute();
    // SAFETY: outside a transaction, as these want it. Without the report autovacuum never learns what was written.
    unsafe {
        pg_sys::pgstat_report_stat(false);
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
    result
}

fn describe(error: CaughtError) -> String {
    match error {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report.message().to_owned(),
        CaughtError::RustPanic { ereport, .. } => ereport.message().to_owned(),
    }
}
