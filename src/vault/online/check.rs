//! Whether a rotation in the background has left anything under an older key: the check at its end.

use super::{At, Rotation, State, Turn, at, first, internal, note_failed_column, note_problem, write};
use crate::domain::keyring::KeyRing;
use crate::pg::error::ErrorReport;
use crate::pg::{catalog, guc, snapshot};
use crate::vault::columns::{self, Leaf};
use crate::vault::{keys, sweep};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Blocks with values under older keys that a check notes; where there are more, it is made again.
const MAX_LEFT: usize = 10_000;
/// How often a check looks whether it is still wanted, and in nobody's way.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a look at everything has found.
pub struct Check {
    ring: Rc<KeyRing>,
    seen: i64,
    unopened: i64,
    /// Blocks with values under older keys.
    left: Vec<(At, i64)>,
    /// Columns that could be read, and those that could not.
    read: Vec<String>,
    failed: Vec<(String, String)>,
}

impl Rotation {
    /// Looks at everything under one snapshot. Call it in a transaction that writes nothing. `pause` is to wait
    /// so long; false: the check is to be broken off. `None`: it has to be made again.
    pub fn check(&mut self, pause: impl FnMut(Duration) -> bool) -> Result<Option<Check>, ErrorReport> {
        self.current = None;
        // Locked before the snapshot is taken: to one that is older, a table that is rewritten in between looks empty.
        let locked: HashSet<_> = columns::leaves().map_err(internal)?.into_iter().map(|leaf| leaf.relation).collect();
        locked.iter().for_each(|table| catalog::hold_table(*table));
        snapshot::with_fresh(|| {
            let leaves = columns::leaves().map_err(internal)?;
            if leaves.iter().any(|leaf| !locked.contains(&leaf.relation)) {
                return Ok(None);
            }
            self.look(leaves, pause)
        })
    }

    fn look(
        &mut self,
        leaves: Vec<Leaf>,
        mut pause: impl FnMut(Duration) -> bool,
    ) -> Result<Option<Check>, ErrorReport> {
        let ring = keys::ring()?;
        let mut check = Check {
            ring: Rc::clone(&ring),
            seen: 0,
            unopened: 0,
            left: Vec::new(),
            read: Vec::new(),
            failed: Vec::new(),
        };
        let mut looked = Instant::now();
        for leaf in leaves {
            if let Some(problem) = self.problem(&leaf) {
                check.failed.push((leaf.noun.clone(), problem));
                continue;
            }
            let column = at(&leaf);
            self.current = Some(leaf.clone());
            check.read.push(leaf.noun.clone());
            for blocks in sweep::ranges(leaf.blocks) {
                let begin = Instant::now();
                sweep::look(&leaf, blocks, Some(&ring), |block, opener| {
                    check.seen += 1;
                    check.unopened += i64::from(opener.is_none());
                    let is_noted =
                        || check.left.last().is_some_and(|(last, number)| *last == column && *number == block);
                    if opener.is_some_and(|place| place > 0) && !is_noted() {
                        check.left.push((column.clone(), block));
                    }
                    true
                })?;
                if check.left.len() > MAX_LEFT {
                    return Ok(Some(check));
                }
                let mut due = guc::vault_rotation_rest(begin.elapsed());
                loop {
                    let part = due.min(LOOK_INTERVAL);
                    if !pause(part) {
                        return Ok(None);
                    }
                    if looked.elapsed() >= LOOK_INTERVAL {
                        looked = Instant::now();
                        if !snapshot::with_fresh(may_check_on).map_err(internal)? {
                            return Ok(None);
                        }
                    }
                    due -= part;
                    if due.is_zero() {
                        break;
                    }
                }
            }
        }
        self.current = None;
        Ok(Some(check))
    }

    /// Takes up what a check has found, and ends the rotation when that is nothing. Call it in another transaction.
    pub fn conclude(&mut self, check: Check) -> Result<Turn, ErrorReport> {
        let Some(state) = Spi::connect_mut(State::lock).map_err(internal)? else { return Ok(Turn::Over) };
        let ring = keys::ring()?;
        if state.fingerprint != first(&check.ring) || ring.fingerprints() != check.ring.fingerprints() {
            return Ok(Turn::Sweeping);
        }
        if !check.left.is_empty() {
            self.left = check.left.into();
            return Ok(Turn::Sweeping);
        }
        write("DELETE FROM _nexus_hub.vault_rotation_errors WHERE item = ANY ($1)", &[check.read.into()])?;
        for (noun, problem) in &check.failed {
            note_failed_column(noun, problem)?;
        }
        let failed = check.failed.len() as i32;
        let resealed = Spi::connect_mut(|client| {
            let end = "UPDATE _nexus_hub.vault_rotation_state s
                          SET state = CASE WHEN $1 = 0 THEN 'done' ELSE 'incomplete' END, ended_at = clock_timestamp(),
                              done = $2, total = $2, unopened = $3, failed_columns = $1, problem = NULL
                    RETURNING s.resealed";
            let arguments = [failed.into(), check.seen.into(), check.unopened.into()];
            client.update(end, Some(1), &arguments)?.first().get_one::<i64>()
        });
        let resealed = resealed.map_err(internal)?.unwrap_or_default();
        let what =
            format!("{resealed} of the vault's values were encrypted anew, all are under key {} now", first(&ring));
        let unopened =
            if check.unopened > 0 { format!(", but {} that no key opens", check.unopened) } else { String::new() };
        Ok(Turn::Done(if failed == 0 {
            let older: Vec<_> = ring.fingerprints().iter().skip(1).map(ToString::to_string).collect();
            format!("{what}{unopened}: the older keys ({}) are free to be removed", older.join(", "))
        } else {
            format!(
                "{resealed} of the vault's values were encrypted anew, but {failed} columns could not be taken along: see vault_rotation_errors, and keep the older keys"
            )
        }))
    }
}

/// What a check has to wait for: a transaction that may yet commit what it has encrypted under an older key. Notes it.
/// Call it in a transaction.
pub fn in_the_way() -> Result<bool, ErrorReport> {
    let found = Spi::connect(|client| {
        let query = "SELECT _nexus_hub.oldest_transaction(s.swept_at) FROM _nexus_hub.vault_rotation_state s WHERE s.state = 'running'";
        let rows = client.select(query, Some(1), &[])?;
        if rows.is_empty() { Ok(None) } else { rows.first().get_one::<String>() }
    });
    let Some(transaction) = found.map_err(internal)? else { return Ok(false) };
    note_problem(&format!("waits for {transaction}, which began before all was gone through"))?;
    Ok(true)
}

fn may_check_on() -> Result<bool, SpiError> {
    Spi::connect(|client| {
        Ok(client.select("SELECT _nexus_hub.may_check_on()", Some(1), &[])?.first().get_one()?.unwrap_or_default())
    })
}
