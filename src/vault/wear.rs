//! How many values were encrypted under each key. With random IVs, AES-GCM is safe for 2^32 under one (NIST SP 800-38D).
//!
//! They are counted in the process, added up in shared memory when the transaction ends, because a rolled back value has
//! used an IV, too, and written to `known_vault_keys` by the worker.

use super::keys;
use crate::domain::audit::End;
use crate::domain::envelope::Fingerprint;
use crate::domain::keyring::KeyRing;
use crate::pg::shmem::tally::{self, What};
use crate::pg::{identity, shmem, xact};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::cell::Cell;

thread_local! {
    /// The key that has encrypted last, and how many values since they were last added up.
    static SEALED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static IS_WATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Counts a value that was encrypted under the first key of a ring.
pub fn note(ring: &KeyRing) {
    let Some(key) = ring.fingerprints().first().map(|key| u64::from_be_bytes(key.0)) else { return };
    let (last, count) = SEALED.get();
    if last == key && count > 0 {
        SEALED.set((last, count + 1));
        return;
    }
    if !shmem::preloaded() {
        return;
    }
    if !IS_WATCHING.replace(true) {
        xact::watch(at_end);
    }
    at_end(End::Committed);
    SEALED.set((key, 1));
}

// It runs at the end of transactions: no allocation, no error.
fn at_end(_end: End) {
    let (key, count) = SEALED.get();
    if count > 0 && tally::add(identity::database(), What::Sealed(key), count) {
        SEALED.set((key, 0));
    }
}

/// Writes how many values of a database were encrypted, and returns what is to be taken from the numbers in shared memory
/// once that is committed. Call it in a transaction of the worker.
pub fn write(database: pg_sys::Oid) -> Result<Vec<(What, u64)>, SpiError> {
    let mut written = Vec::new();
    for (what, count) in tally::of(database) {
        let What::Sealed(key) = what else { continue };
        let fingerprint = Fingerprint(key.to_be_bytes()).to_string();
        let arguments = [fingerprint.into(), i64::try_from(count).unwrap_or(i64::MAX).into()];
        // Looked at first: a statement that might write takes a transaction id.
        let known = "SELECT EXISTS (SELECT FROM _nexus_hub.known_vault_keys k WHERE k.fingerprint = $1)";
        let is_there =
            Spi::connect(|client| client.select(known, Some(1), &arguments[..1])?.first().get_one::<bool>())?;
        if is_there != Some(true) {
            // What was to note it was rolled back. It waits until the database knows the key.
            continue;
        }
        let query = "SELECT _nexus_hub.count_sealed_values($1, $2)";
        let is_known = Spi::connect_mut(|client| client.update(query, Some(1), &arguments)?.first().get_one::<bool>())?;
        if is_known == Some(true) {
            written.push((what, count));
        }
    }
    Ok(written)
}

/// The fingerprint of the key that encrypts, if it has encrypted so much that there should be another. Call it in a
/// transaction.
pub fn worn() -> Result<Option<String>, SpiError> {
    let Some(ring) = keys::configured().then(keys::ring).and_then(Result::ok) else { return Ok(None) };
    let Some(first) = ring.fingerprints().first().map(Fingerprint::to_string) else { return Ok(None) };
    let query = "SELECT _nexus_hub.is_vault_key_worn($1)";
    let is_worn =
        Spi::connect(|client| client.select(query, Some(1), &[first.as_str().into()])?.first().get_one::<bool>())?;
    Ok(is_worn.unwrap_or_default().then_some(first))
}
