//! Ciphertexts of a table, a range of its blocks at a time: read, opened, sealed anew, written back. Everything is done
//! with the rights of the table's owner: what runs there (a context's expression, a CHECK) is the owner's.

use super::columns::Leaf;
use crate::domain::envelope::MIN_LENGTH;
use crate::domain::keyring::{KeyRing, Resealed};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::{identity, random};
use pgrx::prelude::*;
use pgrx::spi::{SpiError, SpiHeapTupleData};
use std::ops::Range;

/// Blocks that are read at a time where nobody waits.
const BLOCKS: i64 = 64;
/// Rows that are in memory at a time where they are only looked at.
const ROWS: std::ffi::c_long = 1000;

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

/// Encrypts the values of a range of blocks anew under the ring's first key, passing over rows that somebody keeps
/// locked. `unopened` is told of each value that no key opens, and why.
pub fn reseal(
    leaf: &Leaf,
    blocks: Range<i64>,
    ring: &KeyRing,
    mut unopened: impl FnMut(String, &'static str),
) -> Result<Tally, ErrorReport> {
    let mut tally = Tally::default();
    let (mut rows, mut sealed) = (Vec::new(), Vec::new());
    let [first, end] = places(&blocks);
    identity::as_user(leaf.owner, || {
        Spi::connect_mut(|client| {
            for row in client.update(leaf.lock.as_str(), None, &[first.into(), end.into()]).map_err(failed)? {
                let value = Value::of(&row).map_err(failed)?;
                tally.seen += 1;
                match ring.reseal(&value.encrypted, value.context.as_bytes(), random::bytes)? {
                    Resealed::Already => {}
                    Resealed::Anew(anew) => {
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
                return Ok(());
            }
            tally.resealed = rows.len() as i64;
            let written =
                client.update(leaf.write.as_str(), None, &[rows.into(), sealed.into()]).map_err(failed)?.len();
            if written as i64 == tally.resealed {
                return Ok(());
            }
            // A rule, or a trigger that fires always.
            Err(error(Kind::NotReady, format!("only {written} of {} rows could be written", tally.resealed)))
        })
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
    let [first, end] = places(&blocks);
    identity::as_user(leaf.owner, || {
        Spi::connect(|client| {
            // Not all rows at once; and a cursor takes one statement only, whatever is in the expression.
            let mut cursor = client.open_cursor(leaf.look.as_str(), &[first.into(), end.into()]);
            loop {
                let rows = cursor.fetch(ROWS).map_err(failed)?;
                if rows.is_empty() {
                    return Ok(());
                }
                for row in rows {
                    let value = Value::of(&row).map_err(failed)?;
                    let place = ring.and_then(|ring| ring.opener(&value.encrypted, value.context.as_bytes()));
                    let block =
                        value.row.trim_start_matches('(').split(',').next().and_then(|block| block.parse().ok());
                    if !each(block.unwrap_or(blocks.start), place) {
                        return Ok(());
                    }
                }
            }
        })
    })
}

fn failed(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not go through the vault's values: {problem}"))
}
