//! Restores of dumps: a session that loads one is known, so that no job is run before what it needs is there.
//!
//! Such a session holds an advisory lock until it ends, in whatever way; other locks of a session would outlive it. A dump
//! says itself that it is one: its settings, taken together, are nobody else's.

use super::identity;
use pgrx::prelude::*;
use std::ffi::CStr;

/// The lock's key: none that SQL can take, because there the last field is 1 or 2.
fn tag() -> pg_sys::LOCKTAG {
    pg_sys::LOCKTAG {
        locktag_field1: identity::database().to_u32(),
        locktag_field2: pg_sys::ExtensionRelationId.to_u32(),
        locktag_field3: 0,
        locktag_field4: 3,
        locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
        locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
    }
}

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
        // SAFETY: an ordinary lock of the session; taken once more it is counted.
        unsafe { pg_sys::LockAcquire(&tag(), pg_sys::ShareLock as i32, true, false) };
    }
}

/// Whether a session of this database loads a dump. Call it in a transaction.
pub fn is_under_way() -> bool {
    // In the way of those who load a dump, and not of another worker that looks.
    let mode = pg_sys::RowExclusiveLock as i32;
    // SAFETY: an ordinary lock of the running transaction, which is not waited for, and given back at once.
    unsafe {
        let got = pg_sys::LockAcquire(&tag(), mode, false, true);
        got == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL || {
            pg_sys::LockRelease(&tag(), mode, false);
            false
        }
    }
}
