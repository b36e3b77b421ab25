//! Transactions of a background worker.

use super::bgworker;
use pgrx::PgTryBuilder;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use std::panic::AssertUnwindSafe;

/// Why a transaction was rolled back.
#[derive(Clone, Debug)]
pub struct Failure {
    pub message: String,
    /// Somebody else was in the way (a lock, a deadlock, a cancel request): the same may succeed in a while.
    pub transient: bool,
    /// It was a cancel request, or a time limit.
    pub canceled: bool,
}

/// When a commit is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Before it returns, as the settings say.
    AtCommit,
    /// After [`make_durable`], or when PostgreSQL gets to it.
    Later,
}

/// Puts what this process has committed on disk, unless the settings ask for no durable commits at all.
pub fn make_durable() {
    // SAFETY: globals of this process, and a call that waits for a write at most; it returns at once when there is
    // nothing to be written.
    unsafe {
        if pg_sys::synchronous_commit > pg_sys::SyncCommitLevel::SYNCHRONOUS_COMMIT_OFF as i32 {
            pg_sys::XLogFlush(pg_sys::XactLastCommitEnd);
        }
    }
}

/// [`run_with`], durable at commit.
pub fn run<R>(activity: &std::ffi::CStr, work: impl FnOnce() -> Result<R, String>) -> Result<R, Failure> {
    run_with(activity, Durability::AtCommit, work)
}

/// Runs `work` in one transaction and commits it. An error that `work` returns, an SQL error and a panic roll it back
/// and come out as a value, so that a deadlock, say, does not cost the worker what it holds in memory.
pub fn run_with<R>(
    activity: &std::ffi::CStr,
    durability: Durability,
    work: impl FnOnce() -> Result<R, String>,
) -> Result<R, Failure> {
    // SAFETY: the worker is connected to a database and in no transaction; calls come in the order PostgreSQL's own
    // workers use, and whatever goes wrong ends in AbortCurrentTransaction.
    let result = PgTryBuilder::new(AssertUnwindSafe(|| unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, activity.as_ptr());
        if durability == Durability::Later {
            pg_sys::set_config_option(
                c"synchronous_commit".as_ptr(),
                c"off".as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_LOCAL,
                true,
                0,
                false,
            );
        }
        match work() {
            Ok(result) => {
                pg_sys::PopActiveSnapshot();
                pg_sys::CommitTransactionCommand();
                Ok(result)
            }
            Err(message) => {
                pg_sys::AbortCurrentTransaction();
                Err(Failure { message, transient: false, canceled: false })
            }
        }
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
    // Also where it has failed.
    bgworker::end_of_commit();
    // SAFETY: outside a transaction, as these want it. Without the report autovacuum never learns what was written.
    unsafe {
        pg_sys::pgstat_report_stat(false);
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
    result
}

fn describe(error: CaughtError) -> Failure {
    let report = match error {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report,
        CaughtError::RustPanic { ereport, .. } => ereport,
    };
    let transient = matches!(
        report.sql_error_code(),
        PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE
            | PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED
            | PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
            | PgSqlErrorCode::ERRCODE_QUERY_CANCELED
    );
    let canceled = report.sql_error_code() == PgSqlErrorCode::ERRCODE_QUERY_CANCELED;
    Failure { message: report.message().to_owned(), transient, canceled }
}
