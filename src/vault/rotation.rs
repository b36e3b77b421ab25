//! Rotation of the vault's keys in one transaction: what `rotate_vault_key` needs beyond SQL.

use super::sweep::Locked;
use super::{columns, custody, keys, sweep, wear};
use crate::audit;
use crate::domain::envelope::Fingerprint;
use crate::domain::keyring::{self, KeyRing, RawKey, Resealed};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::{app_settings, random, snapshot, xact};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;
use zeroize::Zeroizing;

/// Errors that are told one by one; of the rest only the number is.
const MAX_ERRORS: usize = 1000;

/// A rotation of this transaction.
struct Rotation {
    ring: Rc<KeyRing>,
    resealed: i32,
    errors: Vec<String>,
    untold: usize,
}

impl Rotation {
    /// Notes a value that no key opens.
    fn note(&mut self, item: String, reason: &str) {
        if self.errors.len() == MAX_ERRORS {
            self.untold += 1;
        } else {
            self.errors.push(format!("{item}: {reason}"));
        }
    }
}

thread_local! {
    static ROTATION: RefCell<Option<Rotation>> = const { RefCell::new(None) };
}

fn forget() {
    ROTATION.set(None);
}

/// Takes the keys of a rotation up, for the rest of the transaction.
#[pg_extern(sql = false)]
fn begin_key_rotation() -> Result<(), ErrorReport> {
    let begun = begin();
    let to = begun.as_ref().ok().and_then(|ring| ring.fingerprints().first()).map(Fingerprint::to_string);
    audit::note_result(audit::Kind::Rotate, to.as_deref(), &begun);
    let ring = begun?;
    xact::at_end(forget);
    ROTATION.set(Some(Rotation { ring, resealed: 0, errors: Vec::new(), untold: 0 }));
    Ok(())
}

fn begin() -> Result<Rc<KeyRing>, ErrorReport> {
    if snapshot::is_frozen() {
        return Err(error(Kind::NotReady, "a rotation needs the isolation level READ COMMITTED")
            .set_detail("This transaction does not see what others have committed since it began, and would leave it under the old key.")
            .set_hint("Call rotate_vault_key() in a transaction of its own."));
    }
    let ring = match (app_settings::vault_old_key(), app_settings::vault_new_key()) {
        (Some(old), Some(new)) => {
            let (old, new) = (key("app.vault_old_key", &old)?, key("app.vault_new_key", &new)?);
            Rc::new(KeyRing::new(&*Zeroizing::new([*new, *old])))
        }
        (None, None) if keys::configured() => Some(keys::ring()?).filter(|ring| ring.len() > 1).ok_or_else(no_keys)?,
        _ => return Err(no_keys()),
    };
    custody::adopt(&ring)?;
    Ok(ring)
}

fn key(setting: &str, text: &str) -> Result<Zeroizing<RawKey>, ErrorReport> {
    match keyring::parse(text).as_deref().map(Vec::as_slice) {
        Ok([key]) => Ok(Zeroizing::new(*key)),
        _ => Err(error(Kind::KeyNotConfigured, format!("{setting} is not 64 hex characters"))
            .set_hint("A key is 64 hex characters, as `openssl rand -hex 32` makes them.")),
    }
}

fn no_keys() -> ErrorReport {
    error(Kind::KeyNotConfigured, "Both app.vault_old_key and app.vault_new_key must be set for rotation")
        .set_detail("One of them is not set, and the source of the vault's keys does not have an old key after a new one.")
        .set_hint("Put the new key above the old one in the vault's key file and reload; or set both settings as a superuser.")
}

/// The value under the first key of the rotation; as it was when that cannot be, which is noted.
#[pg_extern(sql = false)]
fn reseal(
    encrypted: Option<&[u8]>,
    context: Option<&str>,
    kind: Option<&str>,
    id: Option<pgrx::Uuid>,
) -> Result<Option<Vec<u8>>, ErrorReport> {
    let Some(encrypted) = encrypted else { return Ok(None) };
    ROTATION.with_borrow_mut(|rotation| {
        let Some(rotation) = rotation else {
            return Err(none_is_going_on());
        };
        let context = context.unwrap_or_default().as_bytes();
        match rotation.ring.reseal(encrypted, context, random::bytes)? {
            Resealed::Anew(anew) => {
                rotation.resealed += 1;
                wear::note(&rotation.ring);
                return Ok(Some(anew));
            }
            Resealed::Already => {}
            Resealed::Unopened => {
                let id = id.map(|id| uuid::Uuid::from_bytes(*id.as_bytes()).to_string()).unwrap_or_default();
                rotation.note(format!("{} {id}", kind.unwrap_or_default()), sweep::reason(encrypted));
            }
        }
        Ok(Some(encrypted.to_vec()))
    })
}

fn none_is_going_on() -> ErrorReport {
    error(Kind::NotReady, "no rotation is going on").set_hint("Call rotate_vault_key().")
}

/// The values of a user's own column under the first key of the rotation. The table is locked.
#[pg_extern(sql = false)]
fn reseal_column(relation: Option<pg_sys::Oid>, column: Option<&str>) -> Result<(), ErrorReport> {
    // Not held while the owners' expressions run: one of them could call back.
    let ring = ROTATION.with_borrow(|rotation| rotation.as_ref().map(|rotation| Rc::clone(&rotation.ring)));
    let ring = ring.ok_or_else(none_is_going_on)?;
    let leaves = columns::leaves()
        .map_err(|problem| error(Kind::Internal, format!("could not read the vault's columns: {problem}")))?;
    let is_this = |leaf: &&columns::Leaf| Some(leaf.relation) == relation && Some(leaf.column.as_str()) == column;
    for leaf in leaves.iter().filter(is_this) {
        for blocks in sweep::ranges(leaf.blocks) {
            let note = |item, reason: &str| {
                ROTATION.with_borrow_mut(|rotation| {
                    if let Some(rotation) = rotation {
                        rotation.note(item, reason);
                    }
                });
            };
            sweep::reseal(leaf, blocks, &ring, Locked::AreWaitedFor, note)?;
        }
    }
    Ok(())
}

/// Notes what could not be encrypted anew.
#[pg_extern(sql = false)]
fn note_rotation_error(item: Option<&str>, reason: Option<&str>) -> Result<(), ErrorReport> {
    ROTATION.with_borrow_mut(|rotation| {
        let rotation = rotation.as_mut().ok_or_else(none_is_going_on)?;
        rotation.note(item.unwrap_or_default().to_owned(), reason.unwrap_or_default());
        Ok(())
    })
}

/// How many values were encrypted anew since this was asked last.
#[pg_extern(sql = false)]
fn resealed() -> i32 {
    ROTATION.with_borrow_mut(|rotation| rotation.as_mut().map_or(0, |rotation| std::mem::take(&mut rotation.resealed)))
}

/// Ends the rotation, and tells what could not be encrypted anew.
#[pg_extern(sql = false)]
fn end_key_rotation() -> Vec<String> {
    let Some(mut rotation) = ROTATION.take() else { return Vec::new() };
    if rotation.untold > 0 {
        rotation.errors.push(format!("and {} more", rotation.untold));
    }
    rotation.errors
}
