//! Restores of dumps: a session that loads one is known, so that no job is run before what it needs is there.
//!
//! Such a session holds an advisory lock until it ends. A dump says itself that it is one: its settings, taken together, are
//! nobody else's.

use super::advisory::Lock;
use pgrx::prelude::*;
use std::ffi::CStr;

/// Whether the settings of this session are those that pg_dump writes at the top of a dump, and pg_restore makes, and its
/// user is one who can load a dump.
fn loads_a_dump() -> bool {
    // SAFETY: plain globals of this process; the search path is a C string, or not yet there. Inside a transaction.
    unsafe {
        let path = pg_sys::namespace_search_path;
        !pg_sys::check_function_bodies
            && !path.is_null()
            && CStr::from_ptr(path).is_empty()
            // Anybody can set these; nobody else shall keep the worker from its jobs.
            && pg_sys::has_bypassrls_privilege(pg_sys::GetUserId())
    }
}

/// Makes known that this session loads a dump, if it does. Call it in a transaction.
pub fn note() {
    if loads_a_dump() {
        Lock::Restore.share();
    }
}

/// Whether a session of this database loads a dump. Call it in a transaction.
pub fn is_under_way() -> bool {
    Lock::Restore.is_shared()
}
