//! Waking the worker when a transaction commits: once per transaction, without polling or NOTIFY.

use super::shmem;
use pgrx::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

// One thread owns PostgreSQL, so these are plain flags of the process.
static REGISTERED: AtomicBool = AtomicBool::new(false);
static WAKE_AT_COMMIT: AtomicBool = AtomicBool::new(false);

/// Has the worker of this database woken when the running transaction commits. A rollback forgets it.
pub fn wake_worker_at_commit() {
    if !REGISTERED.swap(true, Relaxed) {
        // SAFETY: registers a callback of this library, which stays loaded, once per process.
        unsafe { pg_sys::RegisterXactCallback(Some(on_transaction_end), std::ptr::null_mut()) };
    }
    WAKE_AT_COMMIT.store(true, Relaxed);
}

/// Whether a transaction id is that of the running transaction or of one of its subtransactions.
pub fn is_current(id: u32) -> bool {
    // SAFETY: a look-up in the state of the running transaction.
    unsafe { pg_sys::TransactionIdIsCurrentTransactionId(pg_sys::TransactionId::from_inner(id)) }
}

// After XACT_EVENT_COMMIT an error would be a PANIC: `wake` neither allocates nor fails.
#[pg_guard]
unsafe extern "C-unwind" fn on_transaction_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_COMMIT if WAKE_AT_COMMIT.swap(false, Relaxed) => {
            // SAFETY: a plain global of this process.
            shmem::wake(unsafe { pg_sys::MyDatabaseId });
        }
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
            WAKE_AT_COMMIT.store(false, Relaxed);
        }
        _ => {}
    }
}
