//! Randomness, from the source PostgreSQL itself uses for keys and salts.

use super::error::{ErrorReport, Kind, error};
use pgrx::pg_sys;

/// `N` bytes fit for nonces.
pub fn bytes<const N: usize>() -> Result<[u8; N], ErrorReport> {
    let mut buffer = [0u8; N];
    // SAFETY: the buffer is N bytes long and ours alone.
    let ok = unsafe { pg_sys::pg_strong_random(buffer.as_mut_ptr().cast(), N) };
    if ok { Ok(buffer) } else { Err(error(Kind::Internal, "could not obtain random bytes from the operating system")) }
}
