//! Ciphertexts of a table, a range of its blocks at a time: read, opened, sealed anew, written back. Everything is done
//! with the rights of the table's owner: what runs there (a context's expression, a CHECK) is the owner's.

use super::columns::Leaf;
use super::wear;
use crate::domain::envelope::MIN_LENGTH;
use crate::domain::keyring::{KeyRing, Resealed};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::{identity, random, snapshot};
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, SpiCursor, SpiError, SpiHeapTupleData};
use std::ops::Range;

/// Blocks that are gone through at a time where nobody waits.
const BLOCKS: i64 = 64;
/// Rows that are in memory at a time: fewer where they are large.
const FIRST_ROWS: usize = 8;
const MAX_ROWS: usize = 256;
const MANY_BYTES: usize = 1024 * 1024;

/// What was found in a range of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub seen: i64,
    pub resealed: i64,
    pub unopened: i64,
}

/// The blocks of a table in ranges of a moderate size.
pub fn ranges(blocks: i64) -> impl Iterator<Item = Range<i64>> {
    (0..blocks).step_by(BLOCKS as usize).map(move |first| first..blocks.min(first + BLOCKS))
}

/// A row of the statements of a [`Leaf`].
struct Value {
    row: String,
    encrypted: Vec<u8>,
    context: String,
    label: String,
}

impl Value {
    fn of(row: &SpiHeapTupleData<'_>) -> Result<Self, SpiError> {
        Ok(Self {
            row: row.get(1)?.unwrap_or_default(),
            encrypted: row.get(2)?.unwrap_or_default(),
            context: row.get(3)?.unwrap_or_default(),
            label: row.get(4)?.unwrap_or_default(),
        })
    }
}

/// Where the rows of a range of blocks begin and end.
fn places(blocks: &Range<i64>) -> [String; 2] {
    [blocks.start, blocks.end].map(|block| format!("({block},0)"))
}

/// What is done with the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Look,
    Write(Locked),
}

/// What becomes of rows that somebody keeps locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    AreWaitedFor,
    ArePassedOver,
}

/// Goes through the rows of a range of blocks, a moderate number at a time; until it is told to stop.
fn walk(
    leaf: &Leaf,
    access: Access,
    blocks: &Range<i64>,
    mut each: impl FnMut(&mut SpiClient<'_>, Vec<Value>) -> Result<bool, ErrorReport>,
) -> Result<(), ErrorReport> {
    let [first, end] = places(blocks);
    identity::as_user(leaf.owner, || {
        // A cursor takes one statement only, whatever is in the expression.
        let arguments = [first.into(), end.into()];
        let cursor = Spi::connect_mut(|client| {
            let cursor = match access {
                Access::Look => client.try_open_cursor(leaf.look.as_str(), &arguments),
                // Says that something will be written: what is read is read as of now.
                Access::Write(Locked::AreWaitedFor) => client.try_open_cursor_mut(leaf.lock.as_str(), &arguments),
                Access::Write(Locked::ArePassedOver) => client.try_open_cursor_mut(leaf.pass.as_str(), &arguments),
            };
            cursor.map(SpiCursor::detach_into_name)
        });
        let mut cursor = cursor.map_err(failed)?;
        let mut most = FIRST_ROWS;
        loop {
            // One by one, because what SPI has read is freed at the end of each.
            let next = Spi::connect_mut(|client| {
                let mut found = client.find_cursor(&cursor).map_err(failed)?;
                let rows = found.fetch(most as std::ffi::c_long).map_err(failed)?;
                let values: Vec<_> = rows.map(|row| Value::of(&row)).collect::<Result<_, _>>().map_err(failed)?;
                let bytes: usize = values.iter().map(|value| value.encrypted.len()).sum();
                let is_last = values.len() < most;
                most = if bytes > MANY_BYTES { (most / 2).max(1) } else { (most * 2).min(MAX_ROWS) };
                let goes_on = each(client, values)? && !is_last;
                Ok::<_, ErrorReport>(goes_on.then(|| found.detach_into_name()))
            })?;
            let Some(next) = next else { return Ok(()) };
            cursor = next;
        }
    })
}

/// Encrypts the values of a range of blocks anew under the ring's first key. `unopened` is told of each value
/// that no key opens, and why.
pub fn reseal(
    leaf: &Leaf,
    blocks: Range<i64>,
    ring: &KeyRing,
    locked: Locked,
    mut unopened: impl FnMut(String, &'static str),
) -> Result<Tally, ErrorReport> {
    let mut tally = Tally::default();
    walk(leaf, Access::Write(locked), &blocks, |client, values| {
        let (mut rows, mut sealed) = (Vec::new(), Vec::new());
        for value in values {
            tally.seen += 1;
            match ring.reseal(&value.encrypted, value.context.as_bytes(), random::bytes)? {
                Resealed::Already => {}
                Resealed::Anew(anew) => {
                    wear::note(ring);
                    rows.push(value.row);
                    sealed.push(anew);
                }
                Resealed::Unopened => {
                    tally.unopened += 1;
                    unopened(format!("{} {}", leaf.noun, value.label), reason(&value.encrypted));
                }
            }
        }
        if rows.is_empty() {
            return Ok(true);
        }
        let expected = rows.len();
        let arguments = [rows.into(), sealed.into()];
        let written = client.update(leaf.write.as_str(), None, &arguments).map_err(failed)?;
        let written = written.filter(|row| matches!(row.get::<bool>(1), Ok(Some(true)))).count();
        tally.resealed += written as i64;
        if written == expected {
            return Ok(true);
        }
        Err(error(Kind::NotReady, format!("only {written} of {expected} rows could be written"))
            .set_detail("A rule, or a trigger that is enabled always, changes what is written."))
    })?;
    Ok(tally)
}

/// Why a value that no key opens is none.
pub fn reason(encrypted: &[u8]) -> &'static str {
    if encrypted.len() < MIN_LENGTH {
        "the value is too short to be a ciphertext"
    } else {
        "the value cannot be decrypted"
    }
}

/// Tells of each value of a range of blocks in which block it is, and which of the ring's keys opens it, if any; until it
/// is told to stop.
pub fn look(
    leaf: &Leaf,
    blocks: Range<i64>,
    ring: Option<&KeyRing>,
    mut each: impl FnMut(i64, Option<usize>) -> bool,
) -> Result<(), ErrorReport> {
    let look = |_: &mut SpiClient<'_>, values: Vec<Value>| {
        for value in values {
            let place = ring.and_then(|ring| ring.opener(&value.encrypted, value.context.as_bytes()));
            let block = value.row.trim_start_matches('(').split(',').next().and_then(|block| block.parse().ok());
            if !each(block.unwrap_or(blocks.start), place) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    snapshot::without_writing(|| walk(leaf, Access::Look, &blocks, look))
}

fn failed(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not go through the vault's values: {problem}"))
}
