//! What is done when a transaction ends: the worker is woken at its commit, once, without polling or NOTIFY.

use super::{bgworker, shmem};
use pgrx::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

// One thread owns PostgreSQL, so these are plain flags of the process.
static REGISTERED: AtomicBool = AtomicBool::new(false);
static AT_COMMIT: AtomicU8 = AtomicU8::new(NOTHING);

thread_local! {
    static AT_END: Cell<Option<fn()>> = const { Cell::new(None) };
}

const NOTHING: u8 = 0;
const NUDGE: u8 = 1;
const WAKE: u8 = 2;
const LOOK: u8 = 4;
const POLL: u8 = 8;
const RATE_RULES: u8 = 16;

/// Has the worker of this database woken when the running transaction commits, or started if there is none. A rollback
/// forgets it.
pub fn wake_worker_at_commit() {
    at_commit(WAKE);
}

/// The same, but where there is no worker none is started.
pub fn nudge_worker_at_commit() {
    at_commit(NUDGE);
}

/// The same as [`wake_worker_at_commit`], and has it look whether what it runs is still to be run.
pub fn have_worker_look_at_commit() {
    at_commit(WAKE | LOOK);
}

/// The same as [`wake_worker_at_commit`], and has it look at everything now, as it does from time to time.
pub fn have_worker_poll_at_commit() {
    at_commit(WAKE | POLL);
}

/// Has every session read the exemptions and overrides of rate limits again when the running transaction ends, in
/// whatever way: this one may have read its own.
pub fn rate_rules_change() {
    at_commit(RATE_RULES);
}

/// Has `forget` called when the running transaction ends, in whatever way. One at a time.
pub fn at_end(forget: fn()) {
    register();
    AT_END.set(Some(forget));
}

fn at_commit(action: u8) {
    register();
    AT_COMMIT.fetch_or(action, Relaxed);
}

/// Has the callback called from now on.
pub fn register() {
    if !REGISTERED.swap(true, Relaxed) {
        // SAFETY: registers a callback of this library, which stays loaded, once per process.
        unsafe { pg_sys::RegisterXactCallback(Some(on_transaction_end), std::ptr::null_mut()) };
    }
}

fn tell_of_rules(action: u8) {
    if action & RATE_RULES != 0
        && let Some(rates) = shmem::rates::table()
    {
        rates.rules_changed();
    }
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
        pg_sys::XactEvent::XACT_EVENT_COMMIT => {
            // SAFETY: a plain global of this process.
            let database = unsafe { pg_sys::MyDatabaseId };
            let action = AT_COMMIT.swap(NOTHING, Relaxed);
            tell_of_rules(action);
            if action & POLL != 0 {
                shmem::ask_for_poll(database);
            }
            if action & WAKE != 0 {
                shmem::wake(database, action & LOOK != 0);
            } else if action & NUDGE != 0 {
                shmem::nudge(database, false);
            }
        }
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
            tell_of_rules(AT_COMMIT.swap(NOTHING, Relaxed));
        }
        // After deferred triggers, which may be interrupted.
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => return bgworker::begin_of_commit(),
        _ => return,
    }
    if let Some(forget) = AT_END.take() {
        forget();
    }
}
