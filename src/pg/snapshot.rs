//! Reading what others have committed since the running statement began.

use pgrx::prelude::*;

/// Runs read-only SPI with a snapshot of its own. Under READ COMMITTED it sees all that is committed by now; no
/// transaction id is taken, so it works on a standby too.
pub fn with_fresh<R>(read: impl FnOnce() -> R) -> R {
    // SAFETY: pushed and popped in a pair; an error in between aborts the transaction, which pops all snapshots.
    unsafe {
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let result = read();
        pg_sys::PopActiveSnapshot();
        result
    }
}

/// Runs read-only SPI with a snapshot of what is committed by now, at any isolation level. In a parallel query, which may
/// take none, with the transaction's.
pub fn with_latest<R>(read: impl FnOnce() -> R) -> R {
    // SAFETY: as above.
    unsafe {
        let snapshot =
            if pg_sys::IsInParallelMode() { pg_sys::GetTransactionSnapshot() } else { pg_sys::GetLatestSnapshot() };
        pg_sys::PushActiveSnapshot(snapshot);
        let result = read();
        pg_sys::PopActiveSnapshot();
        result
    }
}

/// Whether the transaction goes by one snapshot for its whole life (REPEATABLE READ, SERIALIZABLE).
pub fn is_frozen() -> bool {
    // SAFETY: a plain global of this process.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 }
}

/// Runs what must not write: with the first row that is written the transaction would get an id, and SPI would read by a
/// new snapshot from then on.
pub fn without_writing<R>(read: impl FnOnce() -> R) -> R {
    // SAFETY: a plain global of this process, put back afterwards; an error in between aborts the (sub)transaction, which
    // puts it back, too.
    unsafe {
        let before = pg_sys::XactReadOnly;
        pg_sys::XactReadOnly = true;
        let result = read();
        pg_sys::XactReadOnly = before;
        result
    }
}
