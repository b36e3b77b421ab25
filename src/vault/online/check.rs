//! Whether a rotation in the background has left anything under an older key: the check at its end.

use super::{At, Rotation, State, Turn, at, first, internal, names, note_failed_column, note_problem, write};
use crate::domain::keyring::KeyRing;
use crate::pg::error::ErrorReport;
use crate::pg::{catalog, guc, shmem, snapshot};
use crate::vault::columns::{self, Leaf};
use crate::vault::{keys, sweep};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Blocks with values under older keys that a check notes; where there are more, it is made again.
const MAX_LEFT: usize = 10_000;
/// How long a session may take to hear that the configuration was loaded.
const HEARSAY_TIME: Duration = Duration::from_millis(200);
/// How often a check looks whether it is still wanted, and in nobody's way.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a look at everything has found.
pub struct Check {
    ring: Rc<KeyRing>,
    seen: i64,
    unopened: i64,
    /// Blocks with values under older keys.
    left: Vec<(At, i64)>,
    /// Of the unopened, those of registered columns, which may have been given another context.
    doubtful: i64,
    /// Columns that could be read, and those that could not.
    read: Vec<String>,
    failed: Vec<(String, String)>,
    /// How often the configuration had been loaded.
    loads: Option<u64>,
}

/// What has to be over before a check says anything: transactions that ran when the sweep was over, or the configuration
/// was loaded, because they may have encrypted under another key; of these, what was prepared.
pub struct Earlier {
    loads: Option<u64>,
    running: Vec<String>,
    prepared: Option<Vec<String>>,
}

fn list(query: &str) -> Result<Vec<String>, ErrorReport> {
    let found = Spi::connect(|client| client.select(query, Some(1), &[])?.first().get_one());
    Ok(found.map_err(internal)?.unwrap_or_default())
}

impl Rotation {
    /// What a check has to wait for: a transaction that may yet commit what it has encrypted under another key. Notes it.
    /// Call it in a transaction.
    pub fn is_to_wait(&mut self) -> Result<bool, ErrorReport> {
        let loads = shmem::keys::loads();
        if self.earlier.as_ref().is_none_or(|earlier| earlier.loads != loads) {
            // A session has heard of a load when it begins its next transaction, or a moment later.
            std::thread::sleep(HEARSAY_TIME);
            let running = list("SELECT _nexus_hub.running_transactions()")?;
            self.earlier = Some(Earlier { loads, running, prepared: None });
        }
        let Some(earlier) = &mut self.earlier else { return Ok(true) };
        let still = |of: &mut Vec<String>, there: &[String]| {
            of.retain(|transaction| there.contains(transaction));
            of.first().cloned()
        };
        if !earlier.running.is_empty()
            && let Some(left) = still(&mut earlier.running, &list("SELECT _nexus_hub.running_transactions()")?)
        {
            let process = left.split(' ').nth(1).unwrap_or_default();
            note_problem(&format!(
                "waits for the transaction of process {process}, which may have encrypted under another key"
            ))?;
            return Ok(true);
        }
        // Those that ran before are over, or prepared by now.
        let there = list("SELECT _nexus_hub.prepared_transactions()")?;
        if let Some(left) = still(earlier.prepared.get_or_insert_with(|| there.clone()), &there) {
            note_problem(&format!(
                "waits for the prepared transaction {left}, which may have encrypted under another key"
            ))?;
            return Ok(true);
        }
        write("UPDATE _nexus_hub.vault_rotation_state SET problem = NULL WHERE problem IS NOT NULL", &[])?;
        Ok(false)
    }

    /// Looks at everything under one snapshot. Call it in a transaction that writes nothing. `pause` is to wait
    /// so long; false: the check is to be broken off. `None`: it has to be made again.
    pub fn check(&mut self, pause: impl FnMut(Duration) -> bool) -> Result<Option<Check>, ErrorReport> {
        self.current = None;
        let loads = shmem::keys::loads();
        // Locked before the snapshot is taken: to one that is older, a table that is rewritten in between looks empty.
        let locked: HashSet<_> = columns::leaves().map_err(internal)?.into_iter().map(|leaf| leaf.relation).collect();
        locked.iter().for_each(|table| catalog::hold_table(*table));
        snapshot::with_fresh(|| {
            let leaves = columns::leaves().map_err(internal)?;
            if leaves.iter().any(|leaf| !locked.contains(&leaf.relation)) {
                return Ok(None);
            }
            self.look(leaves, loads, pause)
        })
    }

    fn look(
        &mut self,
        leaves: Vec<Leaf>,
        loads: Option<u64>,
        mut pause: impl FnMut(Duration) -> bool,
    ) -> Result<Option<Check>, ErrorReport> {
        let ring = keys::ring()?;
        let mut check = Check {
            ring: Rc::clone(&ring),
            seen: 0,
            unopened: 0,
            doubtful: 0,
            left: Vec::new(),
            read: Vec::new(),
            failed: Vec::new(),
            loads,
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
                    check.doubtful += i64::from(opener.is_none() && leaf.is_registered);
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
        // Of this rotation, and with no other key in between, or it says nothing.
        let is_of_now = state.is_swept
            && state.ring.first() == names(&ring).first()
            && ring.fingerprints() == check.ring.fingerprints()
            && self.earlier.as_ref().is_some_and(|earlier| earlier.loads == check.loads)
            && check.loads == shmem::keys::loads()
            && self.checked == state.started_at;
        if !is_of_now {
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
        let is_complete = failed == 0 && check.doubtful == 0;
        let resealed = Spi::connect_mut(|client| {
            let end = "UPDATE _nexus_hub.vault_rotation_state s
                          SET state = CASE WHEN $4 THEN 'done' ELSE 'incomplete' END, ended_at = clock_timestamp(),
                              done = $2, total = $2, unopened = $3, failed_columns = $1, problem = NULL
                    RETURNING s.resealed";
            let arguments = [failed.into(), check.seen.into(), check.unopened.into(), is_complete.into()];
            client.update(end, Some(1), &arguments)?.first().get_one::<i64>()
        });
        let resealed = resealed.map_err(internal)?.unwrap_or_default();
        let what =
            format!("{resealed} of the vault's values were encrypted anew, all are under key {} now", first(&ring));
        let unopened =
            if check.unopened > 0 { format!(", but {} that no key opens", check.unopened) } else { String::new() };
        Ok(Turn::Done(if is_complete {
            let older: Vec<_> = ring.fingerprints().iter().skip(1).map(ToString::to_string).collect();
            format!("{what}{unopened}: the older keys ({}) are free to be removed", older.join(", "))
        } else {
            format!(
                "{resealed} of the vault's values were encrypted anew, but {failed} columns could not be taken along, and {} values of registered ones cannot be decrypted: see vault_rotation_errors, and keep the older keys",
                check.doubtful
            )
        }))
    }
}

fn may_check_on() -> Result<bool, SpiError> {
    Spi::connect(|client| {
        Ok(client.select("SELECT _nexus_hub.may_check_on()", Some(1), &[])?.first().get_one()?.unwrap_or_default())
    })
}
