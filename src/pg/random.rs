//! Randomness, from the source PostgreSQL itself uses for keys and salts.

use super::error::{ErrorReport, Kind, error};
use pgrx::pg_sys;
use std::cell::RefCell;

/// Bytes taken from the source at a time: a call to it costs more than all the rest of encrypting a short value.
const STOCK: usize = 1024;

thread_local! {
    // Filled only after the process was forked: functions that need it never run in the postmaster.
    static UNUSED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// `N` bytes fit for nonces, each handed out once.
pub fn bytes<const N: usize>() -> Result<[u8; N], ErrorReport> {
    UNUSED.with_borrow_mut(|unused| {
        if unused.len() < N {
            refill(unused, STOCK.max(N))?;
        }
        let at = unused.len() - N;
        let mut bytes = [0u8; N];
        bytes.copy_from_slice(&unused[at..]);
        unused.truncate(at);
        Ok(bytes)
    })
}

fn refill(buffer: &mut Vec<u8>, length: usize) -> Result<(), ErrorReport> {
    buffer.clear();
    buffer.resize(length, 0);
    // SAFETY: the buffer is that long and ours alone.
    if unsafe { pg_sys::pg_strong_random(buffer.as_mut_ptr().cast(), length) } {
        return Ok(());
    }
    buffer.clear();
    Err(error(Kind::Internal, "could not obtain random bytes from the operating system"))
}
