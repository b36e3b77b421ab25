//! The floor that touches PostgreSQL: the only place with `unsafe`, and the only one that knows its C API.
//!
//! Everything here runs on the process's main thread; nothing here knows the network.

pub mod advisory;
pub mod app_settings;
pub mod bgworker;
pub mod catalog;
pub mod claims;
pub mod error;
pub mod guc;
pub mod hooks;
pub mod identity;
pub mod limit_row;
pub mod plaintext;
pub mod process;
pub mod quick_call;
pub mod random;
pub mod restore;
pub mod shmem;
pub mod snapshot;
pub mod timeout;
pub mod transaction;
pub mod xact;

/// Whether the postmaster is loading the library, so that shared memory and workers can be asked for.
pub fn preloading() -> bool {
    // SAFETY: a plain global, read on the main thread.
    unsafe { pgrx::pg_sys::process_shared_preload_libraries_in_progress }
}
