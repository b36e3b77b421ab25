//! The audit of the vault: who has used it, when, what for and with what outcome, never a value.
//!
//! What a transaction does is gathered in memory and put into shared memory when it ends, in whatever way: so it is seen
//! in spite of a rollback, in read-only transactions, too, and takes next to no time. The worker writes it to the table.

use crate::domain::audit::{Deed, End, Event, Object, Pending};
pub use crate::domain::audit::{Kind, Outcome};
use crate::pg::error::{self, ErrorReport, error};
use crate::pg::shmem::tally::What;
use crate::pg::shmem::{self, tally};
use crate::pg::xact::{self, Nested};
use crate::pg::{claims, guc, identity};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::cell::RefCell;

/// Entries that are deleted in one transaction of the worker.
const PRUNE_BATCH: i32 = 1000;

/// One, because each takes as long to find as all the rest.
#[derive(Default)]
struct Noted {
    pending: Pending,
    claims: claims::Reader,
    is_watching: bool,
}

thread_local! {
    static NOTED: RefCell<Noted> = RefCell::default();
}

/// Notes what the caller has done with the vault. `object` names what it was done to, and is no secret.
pub fn note(kind: Kind, object: Option<&str>, outcome: Outcome) {
    if !guc::audit() || !shmem::preloaded() {
        return;
    }
    NOTED.with_borrow_mut(|noted| {
        if !std::mem::replace(&mut noted.is_watching, true) {
            xact::watch(at_end);
            xact::watch_nested(at_nested_end);
        }
        let nest = if kind.is_undoable() { identity::nest() } else { 0 };
        let deed = Deed { kind, outcome, object, role: identity::caller(), sub: noted.claims.caller(), nest };
        noted.pending.note(deed, identity::now);
    });
}

/// [`note`] for what has just succeeded or failed.
pub fn note_result<T, E>(kind: Kind, object: Option<&str>, result: &Result<T, E>) {
    note(kind, object, if result.is_ok() { Outcome::Allowed } else { Outcome::Failed });
}

// These run at the end of transactions: no allocation, no error.

fn at_end(end: End) {
    NOTED.with_borrow_mut(|Noted { pending, .. }| {
        if pending.is_empty() {
            return;
        }
        let (database, mut count) = (identity::database(), 0);
        pending.finish(end, |event| {
            shmem::audit::put(database, event);
            count += 1;
        });
        shmem::audit::wake(database, count);
    });
}

fn at_nested_end(end: Nested) {
    NOTED.with_borrow_mut(|Noted { pending, .. }| match end {
        Nested::Committed { own, parent } => pending.nested_committed(own, parent),
        Nested::RolledBack { own } => pending.nested_rolled_back(own),
    });
}

/// Notes a use of the vault that SQL makes; see the function's COMMENT.
#[pg_extern(sql = false)]
fn note_vault_use(kind: Option<&str>, object: Option<&str>) -> Result<(), ErrorReport> {
    let kind = kind.and_then(Kind::named).ok_or_else(|| {
        let names = Kind::ALL.map(Kind::name).join(", ");
        error(error::Kind::BadArgument, "kind is not one of the audit's").set_hint(format!("The kinds are {names}."))
    })?;
    note(kind, object, Outcome::Allowed);
    Ok(())
}

/// Writes entries, and how many were lost. Call it in a transaction of the worker.
pub fn write(events: &[Event], lost: u64) -> Result<(), SpiError> {
    let time = |at| TimestampWithTimeZone::try_from(at).unwrap_or_else(|_| TimestampWithTimeZone::negative_infinity());
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let is_some_lost = lost > 0;
    let lost_at = is_some_lost.then(|| time(identity::now()));
    let object = |object: &Object| std::str::from_utf8(object.bytes()).unwrap_or_default().to_owned();
    let at: Vec<_> = events.iter().map(|event| time(event.at)).chain(lost_at).collect();
    let kind: Vec<_> = events.iter().map(|event| event.kind.name()).chain(is_some_lost.then_some("lost")).collect();
    let objects: Vec<_> = events.iter().map(|event| event.object.as_ref().map(object)).collect();
    let outcome: Vec<_> = events.iter().map(|event| event.outcome.name()).collect();
    let count: Vec<_> =
        events.iter().map(|event| event.count).chain(is_some_lost.then_some(lost)).map(number).collect();
    let role: Vec<_> = events.iter().map(|event| (event.role != 0).then(|| pg_sys::Oid::from(event.role))).collect();
    let sub: Vec<_> = events.iter().map(|event| event.sub.map(pgrx::Uuid::from_bytes)).collect();
    let arguments = [at.into(), kind.into(), objects.into(), outcome.into(), count.into(), role.into(), sub.into()];
    Spi::connect_mut(|client| {
        client.update("SELECT _nexus_hub.write_vault_audit($1, $2, $3, $4, $5, $6, $7)", None, &arguments).map(|_| ())
    })
}

/// Deletes entries that are older than so many minutes, up to a batch, and tells whether there may be more. Call it in a
/// transaction of the worker.
pub fn prune(minutes: i32) -> Result<bool, SpiError> {
    // Looked at first: a statement that might write takes a transaction id.
    let is_due = "SELECT _nexus_hub.is_vault_audit_older(make_interval(mins => $1))";
    let delete = "SELECT _nexus_hub.prune_vault_audit(make_interval(mins => $1), $2)";
    if minutes == 0
        || Spi::connect(|client| client.select(is_due, Some(1), &[minutes.into()])?.first().get_one())? != Some(true)
    {
        return Ok(false);
    }
    let deleted = Spi::connect_mut(|client| {
        client.update(delete, Some(1), &[minutes.into(), PRUNE_BATCH.into()])?.first().get_one::<i32>()
    })?;
    Ok(deleted == Some(PRUNE_BATCH))
}

/// How many entries of a database were lost, and not written yet.
pub fn lost(database: pg_sys::Oid) -> u64 {
    tally::of(database).into_iter().find(|(what, _)| *what == What::Lost).map_or(0, |(_, count)| count)
}
