//! Vault keys that a command has printed, so that it runs once a configuration load and not once a session.
//!
//! Atomics, like all of the shared memory: a process that is killed at any point leaves nothing locked.

use super::shared;
use pgrx::pg_sys;
use std::sync::atomic::{
    AtomicI32, AtomicI64, AtomicU64,
    Ordering::{Relaxed, SeqCst},
    fence,
};
use zeroize::Zeroizing;

/// Bytes of keys that there is room for.
pub const MAX_BYTES: usize = 1024;

#[repr(C)]
pub(super) struct Keys {
    /// Times that the configuration was loaded.
    loads: AtomicU64,
    /// The process that runs the command; 0: none.
    loader: AtomicI32,
    /// When the command failed last, in microseconds of PostgreSQL's, and what it was to print.
    failed_at: AtomicI64,
    failed_for: AtomicU64,
    /// Odd while the rest is being written (a sequence lock).
    version: AtomicU64,
    /// What the keys are: a hash of the command and the load; 0: there are none.
    loaded_for: AtomicU64,
    length: AtomicU64,
    words: [AtomicU64; MAX_BYTES / 8],
}

/// How often the configuration was loaded since the server started; `None` without shared memory.
pub fn loads() -> Option<u64> {
    shared().map(|shared| shared.keys.loads.load(SeqCst) + 1)
}

/// Called when the configuration is being loaded: nobody asks for what was stored any more. In other processes than the
/// postmaster it does nothing.
pub fn note_load() {
    // SAFETY: plain globals of this process.
    let is_postmaster = unsafe { pg_sys::IsPostmasterEnvironment && !pg_sys::IsUnderPostmaster };
    if let Some(shared) = shared().filter(|_| is_postmaster) {
        shared.keys.loads.fetch_add(1, SeqCst);
    }
}

/// Wipes what is stored, where there is no command any more.
pub fn wipe() {
    if shared().is_some_and(|shared| shared.keys.loaded_for.load(SeqCst) != 0)
        && let Some(loading) = begin()
    {
        write(loading.0, 0, &[]);
    }
}

/// Only by the one process that has the right to.
fn write(keys: &Keys, loaded_for: u64, bytes: &[u8]) {
    keys.version.fetch_add(1, SeqCst);
    fence(SeqCst);
    for (index, word) in keys.words.iter().enumerate() {
        let mut eight = Zeroizing::new([0; 8]);
        let part = bytes.chunks(8).nth(index).unwrap_or_default();
        eight[..part.len()].copy_from_slice(part);
        word.store(u64::from_ne_bytes(*eight), Relaxed);
    }
    keys.length.store(bytes.len() as u64, Relaxed);
    keys.loaded_for.store(loaded_for, Relaxed);
    keys.version.fetch_add(1, SeqCst);
}

/// The keys that are wanted, if they are there.
pub fn stored(wanted: u64) -> Option<Zeroizing<Vec<u8>>> {
    let keys = &shared()?.keys;
    // A few tries: the next load could begin meanwhile.
    for _ in 0..8 {
        let version = keys.version.load(SeqCst);
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES));
        keys.words.iter().for_each(|word| bytes.extend_from_slice(&word.load(Relaxed).to_ne_bytes()));
        let (length, loaded_for) = (keys.length.load(Relaxed), keys.loaded_for.load(Relaxed));
        fence(SeqCst);
        if version % 2 == 0 && keys.version.load(SeqCst) == version {
            bytes.truncate(usize::try_from(length).ok()?);
            return (loaded_for == wanted).then_some(bytes);
        }
        std::hint::spin_loop();
    }
    None
}

/// How many microseconds ago the command failed, if it did, to print what is wanted.
pub fn failed_ago(wanted: u64) -> Option<i64> {
    let keys = &shared()?.keys;
    // SAFETY: a look at the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    (keys.failed_for.load(SeqCst) == wanted).then(|| now - keys.failed_at.load(SeqCst))
}

/// The right to run the command, which one process has at a time.
pub struct Loading(&'static Keys);

/// Takes that right; `None` while another process has it.
pub fn begin() -> Option<Loading> {
    let keys = &shared()?.keys;
    // SAFETY: a plain global of this process.
    let own = unsafe { pg_sys::MyProcPid };
    let taken = keys.loader.compare_exchange(0, own, SeqCst, SeqCst);
    let taken = taken.or_else(|holder| {
        // SAFETY: no signal is sent; it is only asked whether the process is there.
        let is_gone = unsafe { libc::kill(holder, 0) } != 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        // A session that was told to end in the middle of it.
        if is_gone { keys.loader.compare_exchange(holder, own, SeqCst, SeqCst) } else { Err(holder) }
    });
    taken.ok().map(|_| Loading(keys))
}

impl Loading {
    /// Stores the keys that were wanted.
    pub fn store(&self, wanted: u64, bytes: &[u8]) {
        if bytes.len() <= MAX_BYTES {
            write(self.0, wanted, bytes);
        }
    }

    /// Notes that the command has failed.
    pub fn fail(&self, wanted: u64) {
        // SAFETY: a look at the clock.
        self.0.failed_at.store(unsafe { pg_sys::GetCurrentTimestamp() }, SeqCst);
        self.0.failed_for.store(wanted, SeqCst);
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.loader.store(0, SeqCst);
    }
}
