//! What is done when a transaction ends: the worker is woken at its commit, once, without polling or NOTIFY.

use super::{bgworker, shmem};
use crate::domain::audit::End;
use pgrx::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

// One thread owns PostgreSQL, so these are plain flags of the process.
static REGISTERED: AtomicBool = AtomicBool::new(false);
static AT_COMMIT: AtomicU8 = AtomicU8::new(NOTHING);

type Watcher = fn(End);
/// Those who want to know of each transaction's end.
const MAX_WATCHERS: usize = 4;

thread_local! {
    static AT_END: Cell<Option<fn()>> = const { Cell::new(None) };
    static WATCHERS: [Cell<Option<Watcher>>; MAX_WATCHERS] = const { [const { Cell::new(None) }; MAX_WATCHERS] };
    static NESTED: Cell<Option<fn(Nested)>> = const { Cell::new(None) };
}

const NOTHING: u8 = 0;
const NUDGE: u8 = 1;
const WAKE: u8 = 2;
const LOOK: u8 = 4;
const POLL: u8 = 8;
const RATE_RULES: u8 = 16;

/// How a subtransaction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nested {
    /// It is part of the one around it now.
    Committed {
        own: u32,
        parent: u32,
    },
    RolledBack {
        own: u32,
    },
}

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
/// whatever way: this one may have read its own. The worker does so at its commit.
pub fn rate_rules_change() {
    at_commit(RATE_RULES | NUDGE | POLL);
}

/// Has `forget` called when the running transaction ends, in whatever way. One at a time.
pub fn at_end(forget: fn()) {
    register();
    AT_END.set(Some(forget));
}

/// Has `watcher` called at the end of the running transaction and of all later ones, parallel workers' included. It runs
/// where an error would be a PANIC, so it must have no way to fail: no allocation, nothing of PostgreSQL's that raises.
pub fn watch(watcher: Watcher) {
    register();
    WATCHERS.with(|watchers| {
        if let Some(free) = watchers.iter().find(|place| place.get().is_none()) {
            free.set(Some(watcher));
        }
    });
}

/// The same for subtransactions. One at a time.
pub fn watch_nested(watcher: fn(Nested)) {
    if NESTED.replace(Some(watcher)).is_none() {
        // SAFETY: registers a callback of this library, which stays loaded, once per process.
        unsafe { pg_sys::RegisterSubXactCallback(Some(on_nested_end), std::ptr::null_mut()) };
    }
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

// After XACT_EVENT_COMMIT an error would be a PANIC: `wake` neither allocates nor fails, nor do watchers.
#[pg_guard]
unsafe extern "C-unwind" fn on_transaction_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    let end = match event {
        pg_sys::XactEvent::XACT_EVENT_COMMIT | pg_sys::XactEvent::XACT_EVENT_PARALLEL_COMMIT => End::Committed,
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_PARALLEL_ABORT => End::RolledBack,
        pg_sys::XactEvent::XACT_EVENT_PREPARE => End::Prepared,
        // After deferred triggers, which may be interrupted.
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => return bgworker::begin_of_commit(),
        _ => return,
    };
    WATCHERS.with(|watchers| watchers.iter().filter_map(Cell::get).for_each(|watcher| watcher(end)));
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
        _ => return,
    }
    if let Some(forget) = AT_END.take() {
        forget();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_nested_end(
    event: pg_sys::SubXactEvent::Type,
    own: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    let end = match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => Nested::Committed { own, parent },
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => Nested::RolledBack { own },
        _ => return,
    };
    if let Some(watcher) = NESTED.get() {
        watcher(end);
    }
}
