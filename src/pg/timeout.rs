//! A time limit for what a background worker runs: in one, PostgreSQL's own setting limits nothing.

use super::bgworker::milliseconds;
use std::time::Duration;

/// Its place in PostgreSQL's enum TimeoutId, the same in all supported versions; not among pgrx's bindings.
const STATEMENT_TIMEOUT: std::ffi::c_int = 3;

unsafe extern "C-unwind" {
    fn enable_timeout_after(id: std::ffi::c_int, delay_ms: std::ffi::c_int);
    fn disable_timeout(id: std::ffi::c_int, keep_indicator: bool);
}

/// Has whatever runs canceled after that time, with an error (57014).
pub fn start(time: Duration) {
    let time = milliseconds(time).min(i32::MAX.into()) as std::ffi::c_int;
    // SAFETY: on the main thread, in a process that is connected to a database, which has the timeout registered.
    unsafe { enable_timeout_after(STATEMENT_TIMEOUT, time) }
}

/// Takes the limit back.
pub fn stop() {
    // SAFETY: see above.
    unsafe { disable_timeout(STATEMENT_TIMEOUT, false) }
}
