//! The vault: sealing and opening tokens and configs under keys that SQL can't see.

mod columns;
mod custody;
mod keys;
pub mod online;
mod rotation;
mod sweep;
mod wear;

pub use custody::stranger;
pub use wear::{worn, write as write_wear};

use crate::audit::{self, Kind as Use};
use crate::domain::envelope::MIN_LENGTH;
use crate::domain::json::is_storable;
use crate::domain::metrics::{Counter, Vault as Operation};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::plaintext::Plaintext;
use crate::pg::random;
use crate::pg::shmem::counters;
use pgrx::prelude::*;
use zeroize::Zeroizing;

/// Encrypts a text; see the function's COMMENT.
#[pg_extern(sql = false)]
fn encrypt_token(token: Option<&str>, context: Option<&str>) -> Result<Option<Vec<u8>>, ErrorReport> {
    token.map(|token| seal(token, context)).transpose()
}

/// Decrypts a text; see the function's COMMENT.
#[pg_extern(sql = false)]
fn decrypt_token(encrypted: Option<&[u8]>, context: Option<&str>) -> Result<Option<Plaintext>, ErrorReport> {
    let Some(encrypted) = encrypted else { return Ok(None) };
    let opened = open(encrypted, context);
    audit::note_result(Use::Decrypt, context, &opened);
    opened.map(Plaintext).map(Some)
}

/// Decrypts a text that must be JSON; see the function's COMMENT.
#[pg_extern(sql = false)]
fn decrypt_json(encrypted: Option<&[u8]>, context: Option<&str>) -> Result<Option<Plaintext>, ErrorReport> {
    let Some(encrypted) = encrypted else { return Ok(None) };
    let opened = open(encrypted, context).and_then(|text| {
        if is_storable(&text) {
            return Ok(text);
        }
        Err(error(Kind::BadArgument, "the decrypted value is not JSON")
            .set_hint("decrypt_token opens values that are plain text."))
    });
    audit::note_result(Use::Decrypt, context, &opened);
    opened.map(Plaintext).map(Some)
}

/// Decrypts a stored secret; see the function's COMMENT.
#[pg_extern(sql = false)]
fn open_secret(
    encrypted: Option<&[u8]>,
    context: Option<&str>,
    object: Option<&str>,
) -> Result<Option<Plaintext>, ErrorReport> {
    let Some(encrypted) = encrypted else { return Ok(None) };
    let opened = open(encrypted, context);
    audit::note_result(Use::Get, object, &opened);
    opened.map(Plaintext).map(Some)
}

/// Why the configured keys can't be used, if so: for the log, at a reload. That none is configured is no problem.
pub fn problem() -> Option<String> {
    keys::configured().then(|| keys::ring().err())?.map(|report| described(&report))
}

fn described(report: &ErrorReport) -> String {
    let detail = report.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    format!("{}{detail}", report.message())
}

/// Why the vault cannot be used in this database, if so; see the function's COMMENT.
#[pg_extern(sql = false)]
fn vault_problem() -> Result<Option<String>, pgrx::spi::SpiError> {
    if !keys::configured() {
        return Ok(custody::is_used()?.then(|| "no vault key is configured".to_owned()));
    }
    match keys::known() {
        None => Ok(None),
        Some(Ok(_)) => stranger(),
        Some(Err(report)) => Ok(Some(described(&report))),
    }
}

/// Encrypts a text under the first vault key, bound to `context` where one is given.
pub fn seal(text: &str, context: Option<&str>) -> Result<Vec<u8>, ErrorReport> {
    let sealed = try_seal(text, context);
    let what = if sealed.is_ok() { Operation::Encrypted } else { Operation::NotEncrypted };
    counters::add(Counter::Vault(what), 1);
    sealed
}

fn try_seal(text: &str, context: Option<&str>) -> Result<Vec<u8>, ErrorReport> {
    let ring = keys::ring()?;
    custody::admit(&ring)?;
    let iv = random::bytes()?;
    let sealed = ring
        .seal(iv, text.as_bytes(), context.unwrap_or_default().as_bytes())
        .ok_or_else(|| error(Kind::BadArgument, "the value is too long to be encrypted"))?;
    wear::note(&ring);
    Ok(sealed)
}

/// Decrypts a text with whichever vault key fits.
pub fn open(encrypted: &[u8], context: Option<&str>) -> Result<Zeroizing<String>, ErrorReport> {
    let opened = try_open(encrypted, context);
    let what = if opened.is_ok() { Operation::Decrypted } else { Operation::NotDecrypted };
    counters::add(Counter::Vault(what), 1);
    opened
}

fn try_open(encrypted: &[u8], context: Option<&str>) -> Result<Zeroizing<String>, ErrorReport> {
    if encrypted.len() < MIN_LENGTH {
        return Err(error(Kind::BadArgument, "the value is too short to be a ciphertext").set_detail(format!(
            "It has {} bytes; a ciphertext has at least {MIN_LENGTH}: 12 of IV and 16 of authentication tag.",
            encrypted.len()
        )));
    }
    // One constant message, whatever the reason: telling a wrong key from a changed ciphertext would help an attacker.
    let mut bytes = keys::ring()?.open(encrypted, context.unwrap_or_default().as_bytes()).ok_or_else(|| {
        error(Kind::Undecipherable, "the value cannot be decrypted")
            .set_detail("No vault key opens it with this context: it was encrypted under another key or context, or was changed.")
            .set_hint("Check that every key still in use is in the vault key file, and that the context is the one given to encrypt.")
    })?;
    // The same memory, not a copy that would have to be wiped, too.
    let text = String::from_utf8(std::mem::take(&mut *bytes)).map_err(|problem| Zeroizing::new(problem.into_bytes()));
    match text.map(Zeroizing::new) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(error(Kind::BadArgument, "the decrypted value is not text")),
    }
}
