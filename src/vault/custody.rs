//! Which keys a database's values are under. What is encrypted under a key that was configured by mistake would be lost
//! with it; so nothing is, unless the database has no other key, or the one it has is still in the ring, or somebody says so.

use super::keys;
use crate::domain::envelope::Fingerprint;
use crate::domain::keyring::KeyRing;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::identity::{self, Undecided};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::cell::Cell;

thread_local! {
    /// The first key that was found to be known, and as long as what that holds; `None`: for good.
    static ADMITTED: Cell<Option<(Fingerprint, Option<Undecided>)>> = const { Cell::new(None) };
}

/// Raises an error when the first key of the ring must not encrypt in this database.
pub fn admit(ring: &KeyRing) -> Result<(), ErrorReport> {
    let Some(first) = ring.fingerprints().first() else { return Ok(()) };
    if let Some((admitted, undecided)) = ADMITTED.get()
        && admitted == *first
        && undecided.is_none_or(Undecided::is_running)
    {
        return Ok(());
    }
    let (is_known, known) = look(ring, identity::may_write())
        .map_err(|problem| error(Kind::Internal, format!("could not read the vault's known keys: {problem}")))?;
    if !is_known && is_stranger(ring, &known) {
        return Err(error(Kind::KeyNotConfigured, "the vault key is not one that this database knows")
            .set_detail(format!("The key is {first}; the database's values are under {}.", known.join(", ")))
            .set_hint("Configure the database's key, below the new one where there is a new one. To begin with another key all the same, call adopt_vault_key()."));
    }
    // What this very transaction has noted may be rolled back, and where it may not note anything the next one has to.
    let is_for_good = is_known && !identity::has_written();
    ADMITTED.set(Some((*first, (!is_for_good).then(Undecided::here))));
    Ok(())
}

/// Makes the first key of the ring known, because somebody has said so.
pub fn adopt(ring: &KeyRing) -> Result<(), ErrorReport> {
    let first = ring.fingerprints().first().map(Fingerprint::to_string);
    identity::as_superuser(|| {
        Spi::connect_mut(|client| {
            client.update("SELECT _nexus_hub.make_vault_key_known($1)", None, &[first.into()]).map(|_| ())
        })
    })
    .map_err(|problem| error(Kind::Internal, format!("could not note the vault's key: {problem}")))
}

fn is_stranger(ring: &KeyRing, known: &[String]) -> bool {
    !known.is_empty() && !ring.fingerprints().iter().any(|own| known.contains(&own.to_string()))
}

/// Whether the first key is known, and all that are. Notes it where it may be used and is new.
fn look(ring: &KeyRing, may_write: bool) -> Result<(bool, Vec<String>), SpiError> {
    let fingerprints: Vec<_> = ring.fingerprints().iter().map(Fingerprint::to_string).collect();
    let query = "SELECT is_known, known FROM _nexus_hub.admit_vault_key($1, $2)";
    identity::as_superuser(|| {
        let arguments = [fingerprints.into(), may_write.into()];
        let read = |table: pgrx::spi::SpiTupleTable<'_>| table.first().get_two::<bool, Vec<String>>();
        let found = if may_write {
            Spi::connect_mut(|client| read(client.update(query, Some(1), &arguments)?))
        } else {
            Spi::connect(|client| read(client.select(query, Some(1), &arguments)?))
        }?;
        Ok((found.0.unwrap_or_default(), found.1.unwrap_or_default()))
    })
}

/// Whether anything was ever encrypted in this database.
pub fn is_used() -> Result<bool, SpiError> {
    let query = "SELECT EXISTS (SELECT FROM _nexus_hub.known_vault_keys)";
    Ok(Spi::connect(|client| client.select(query, Some(1), &[])?.first().get_one())? == Some(true))
}

/// Why nothing can be encrypted in this database, if the keys are not its own. Call it in a transaction.
pub fn stranger() -> Result<Option<String>, SpiError> {
    let Some(ring) = keys::configured().then(keys::ring).and_then(Result::ok) else { return Ok(None) };
    let (_, known) = look(&ring, false)?;
    let own = ring.fingerprints().first().map(Fingerprint::to_string).unwrap_or_default();
    Ok(is_stranger(&ring, &known).then(|| {
        format!(
            "the vault key {own} is not one that this database knows, whose values are under {}: nothing is encrypted \
             until the right key is configured, or adopt_vault_key() is called",
            known.join(", ")
        )
    }))
}

/// The fingerprint of the key that encrypts.
#[pg_extern(sql = false)]
fn vault_key_fingerprint() -> Result<String, ErrorReport> {
    Ok(keys::ring()?.fingerprints().first().map(Fingerprint::to_string).unwrap_or_default())
}

/// The keys of the ring, in their order, and where they come from.
#[pg_extern(sql = false)]
fn vault_key_ring()
-> Result<TableIterator<'static, (name!(fingerprint, String), name!(place, i32), name!(source, String))>, ErrorReport> {
    let source = keys::source();
    let ring = source.map(|_| keys::ring()).transpose()?;
    let fingerprints = ring.map(|ring| ring.fingerprints().to_vec()).unwrap_or_default();
    let source = source.unwrap_or_default();
    Ok(TableIterator::new(
        fingerprints.into_iter().zip(1..).map(move |(own, place)| (own.to_string(), place, source.to_owned())),
    ))
}
