//! Rotation of the vault's keys in the background: where it stands, and its next step. The state is in a table, written
//! together with each batch, so that a process that is killed loses nothing.
//!
//! First a sweep goes through all tables. What writers have moved past it, or have yet to commit, is found by a check: it
//! reads everything under one snapshot, taken when no transaction is left that began before the sweep was over. What is
//! then under an older key is encrypted anew, and the check is made again, until it finds nothing.

mod check;

use check::Earlier;

use super::columns::{self, Leaf};
use super::sweep::Locked;
use super::{custody, keys, sweep};
use crate::audit;
use crate::domain::keyring::KeyRing;
use crate::pg::error::{ErrorReport, Kind, error, not_preloaded};
use crate::pg::{identity, shmem, xact};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, SpiError};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Errors that are kept one by one; of the rest only the number is.
const MAX_ERRORS: i64 = 1000;
/// How long a batch should take: as long as its rows are locked.
const BATCH_TIME: Duration = Duration::from_millis(5);
const MAX_BLOCKS: i64 = 256;
/// How long the list of columns is good for: making it takes as long as a batch.
const LIST_TIME: Duration = Duration::from_secs(5);

const BEGIN: &str = "SELECT _nexus_hub.begin_rotation($1)";

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// No rotation is running.
    Over,
    /// There is more to do in small steps.
    Sweeping,
    /// The next thing is [`Rotation::check`].
    ToCheck,
    /// Something has to happen elsewhere first.
    Waiting,
    /// That was all; what the log should say.
    Done(String),
}

fn internal(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not read or write how far the rotation is: {problem}"))
}

/// Begins a rotation; see the COMMENT of start_vault_rotation.
#[pg_extern(sql = false)]
fn launch_rotation() -> Result<String, ErrorReport> {
    let launched = launch();
    audit::note_result(audit::Kind::Rotate, launched.as_deref().ok(), &launched);
    launched
}

fn launch() -> Result<String, ErrorReport> {
    if !shmem::preloaded() {
        return Err(not_preloaded());
    }
    let ring = keys::ring()?;
    if ring.len() < 2 {
        return Err(error(Kind::KeyNotConfigured, "there is no older vault key to rotate from")
            .set_detail("The source of the vault's keys has one key.")
            .set_hint("Put the new key above the old one in the vault's key file (or have the command print both), and reload."));
    }
    if keys::comes_from_setting() {
        return Err(error(Kind::NotReady, "the vault's keys come from app.vault_key, which sessions keep")
            .set_detail("A session that has the old key may go on encrypting under it, whatever is rotated.")
            .set_hint("Put the keys into a file, named in nexus_hub.vault_key_file; or call rotate_vault_key()."));
    }
    custody::adopt(&ring)?;
    let fingerprint = first(&ring);
    let is_new = identity::as_superuser(|| {
        Spi::connect_mut(|client| client.update(BEGIN, Some(1), &[names(&ring).into()])?.first().get_one::<bool>())
    })
    .map_err(internal)?
    .unwrap_or_default();
    xact::have_worker_poll_at_commit();
    if is_new {
        notice!("the vault's values come under key {fingerprint} in the background: see vault_rotation");
    } else {
        notice!("a rotation to key {fingerprint} has been started before, and goes on: see vault_rotation");
    }
    Ok(fingerprint)
}

/// Pauses or resumes the rotation; see the COMMENTs of pause_vault_rotation and resume_vault_rotation.
#[pg_extern(sql = false)]
fn set_rotation_paused(paused: bool) -> Result<bool, ErrorReport> {
    let switched = identity::as_superuser(|| {
        Spi::connect_mut(|client| {
            client.update("SELECT _nexus_hub.switch_rotation($1)", Some(1), &[paused.into()])?.first().get_one::<bool>()
        })
    });
    xact::have_worker_poll_at_commit();
    let switched = switched.map_err(internal)?.unwrap_or_default();
    if switched {
        audit::note(audit::Kind::Rotate, Some(if paused { "pause" } else { "resume" }), audit::Outcome::Allowed);
    }
    Ok(switched)
}

/// The fingerprint of the key that encrypts.
#[pg_extern(sql = false)]
fn primary_vault_key() -> Option<String> {
    keys::configured().then(keys::ring)?.ok().map(|ring| first(&ring))
}

fn names(ring: &KeyRing) -> Vec<String> {
    ring.fingerprints().iter().map(ToString::to_string).collect()
}

fn first(ring: &KeyRing) -> String {
    ring.fingerprints().first().map(ToString::to_string).unwrap_or_default()
}

/// Whether a rotation is to be going on. Call it in a transaction.
pub fn is_wanted() -> Result<bool, SpiError> {
    Spi::connect(|client| {
        let query = "SELECT EXISTS (SELECT FROM _nexus_hub.vault_rotation_state s WHERE s.state = 'running')";
        Ok(client.select(query, Some(1), &[])?.first().get_one()?.unwrap_or_default())
    })
}

/// The state's row, locked.
struct State {
    ring: Vec<String>,
    started_at: Option<TimestampWithTimeZone>,
    at: (u32, String),
    next_block: i64,
    end_block: i64,
    done: i64,
    is_swept: bool,
}

impl State {
    fn lock(client: &mut SpiClient<'_>) -> Result<Option<Self>, SpiError> {
        let rows = client.update(
            "SELECT s.ring, s.relation, s.column_name::text, s.next_block, s.end_block, s.done, s.swept_at IS NOT NULL, s.started_at
               FROM _nexus_hub.vault_rotation_state s WHERE s.state = 'running' FOR UPDATE",
            Some(1),
            &[],
        )?;
        if rows.is_empty() {
            return Ok(None);
        }
        let row = rows.first();
        Ok(Some(Self {
            ring: row.get(1)?.unwrap_or_default(),
            at: (row.get::<pg_sys::Oid>(2)?.map_or(0, |oid| oid.to_u32()), row.get(3)?.unwrap_or_default()),
            next_block: row.get(4)?.unwrap_or_default(),
            end_block: row.get(5)?.unwrap_or_default(),
            done: row.get(6)?.unwrap_or_default(),
            is_swept: row.get(7)?.unwrap_or_default(),
            started_at: row.get(8)?,
        }))
    }
}

/// A column, by its table and name.
type At = (u32, String);

fn at(leaf: &Leaf) -> At {
    (leaf.relation.to_u32(), leaf.column.clone())
}

/// A process's part in the rotation.
pub struct Rotation {
    /// Blocks of a batch: as many as take [`BATCH_TIME`].
    blocks: i64,
    /// What the last check has found and is not encrypted anew yet.
    left: VecDeque<(At, i64)>,
    /// How many of these were found locked, one after the other.
    locked: usize,
    /// The column that is worked on, in case something goes wrong there.
    current: Option<Leaf>,
    /// Columns where something did, and what.
    given_up: HashMap<At, String>,
    /// Transactions that may yet commit what they have encrypted under an older key, and with which keys this is known.
    earlier: Option<Earlier>,
    /// When the rotation was started that is to be checked.
    checked: Option<TimestampWithTimeZone>,
    /// The columns, as of a moment ago.
    leaves: Option<(Instant, Rc<[Leaf]>)>,
    /// Since when time is spent that is not in the table yet.
    since: Instant,
}

impl Rotation {
    pub fn new() -> Self {
        Self {
            blocks: 1,
            left: VecDeque::new(),
            locked: 0,
            current: None,
            given_up: HashMap::new(),
            earlier: None,
            checked: None,
            leaves: None,
            since: Instant::now(),
        }
    }

    fn leaves(&mut self) -> Result<Rc<[Leaf]>, ErrorReport> {
        match &self.leaves {
            Some((at, leaves)) if at.elapsed() < LIST_TIME => Ok(Rc::clone(leaves)),
            _ => {
                let leaves: Rc<[Leaf]> = columns::leaves().map_err(internal)?.into();
                self.leaves = Some((Instant::now(), Rc::clone(&leaves)));
                Ok(leaves)
            }
        }
    }

    /// Makes the next batch. Call it in a transaction.
    pub fn step(&mut self) -> Result<Turn, ErrorReport> {
        let turn = self.next_batch()?;
        // What goes wrong from here on is no column's fault.
        self.current = None;
        Ok(turn)
    }

    fn next_batch(&mut self) -> Result<Turn, ErrorReport> {
        let Some(state) = Spi::connect_mut(State::lock).map_err(internal)? else { return Ok(Turn::Over) };
        let ring = keys::ring()?;
        custody::admit(&ring)?;
        if state.ring.first() != names(&ring).first() {
            // The keys were changed in the middle of it: everything comes under the one that encrypts now.
            write(BEGIN, &[names(&ring).into()])?;
            self.left.clear();
            return Ok(Turn::Sweeping);
        }
        if let Some(gone) = state.ring.iter().find(|key| !names(&ring).contains(key)) {
            note_problem(&format!(
                "waits for the key {gone}, which the source of the vault's keys had when this was started"
            ))?;
            return Ok(Turn::Waiting);
        }
        let leaves = self.leaves()?;
        if !state.is_swept {
            return self.sweep(&state, &leaves, &ring);
        }
        let Some((column, block)) = self.left.pop_front() else {
            self.checked = state.started_at;
            return Ok(Turn::ToCheck);
        };
        let known = leaves.iter().find(|leaf| at(leaf) == column && self.problem(leaf).is_none());
        let Some(leaf) = known else { return Ok(Turn::Sweeping) };
        self.current = Some(leaf.clone());
        let tally = self.reseal(leaf, block..block + 1, &ring)?;
        self.note(&state, &column, (0, 0), sweep::Tally { resealed: tally.resealed, ..Default::default() }, None)?;
        let mut is_clean = true;
        sweep::look(leaf, block..block + 1, Some(&ring), |_, opener| {
            is_clean = opener.is_none_or(|place| place == 0);
            is_clean
        })?;
        if is_clean {
            self.locked = 0;
            return Ok(Turn::Sweeping);
        }
        self.left.push_back((column, block));
        self.locked += 1;
        if self.locked < self.left.len() {
            return Ok(Turn::Sweeping);
        }
        self.locked = 0;
        note_problem(&format!("waits for a session that keeps a row of {} locked", leaf.noun))?;
        Ok(Turn::Waiting)
    }

    /// Why a column cannot be taken along.
    fn problem(&self, leaf: &Leaf) -> Option<String> {
        leaf.problem.clone().or_else(|| self.given_up.get(&at(leaf)).cloned())
    }

    fn sweep(&mut self, state: &State, leaves: &[Leaf], ring: &KeyRing) -> Result<Turn, ErrorReport> {
        let has_more = state.next_block < state.end_block;
        let next_leaf =
            leaves.iter().position(|leaf| if has_more { at(leaf) >= state.at } else { at(leaf) > state.at });
        let Some((index, leaf)) = next_leaf.and_then(|index| Some((index, leaves.get(index)?))) else {
            let swept = "UPDATE _nexus_hub.vault_rotation_state SET swept_at = clock_timestamp(), total = done";
            return write(swept, &[]).map(|()| Turn::Sweeping);
        };
        self.current = Some(leaf.clone());
        let goes_on = has_more && at(leaf) == state.at;
        let (from, end) = if goes_on { (state.next_block, state.end_block) } else { (0, leaf.blocks) };
        if let Some(problem) = self.problem(leaf) {
            note_failed_column(&leaf.noun, &problem)?;
            return self.note(state, &at(leaf), (end, end), sweep::Tally::default(), None).map(|()| Turn::Sweeping);
        }
        let next = end.min(from + self.blocks);
        let begin = Instant::now();
        let tally = self.reseal(leaf, from..next, ring)?;
        self.blocks = match begin.elapsed() {
            time if time > BATCH_TIME => (self.blocks / 2).max(1),
            time if time < BATCH_TIME / 2 && next < end => (self.blocks * 2).min(MAX_BLOCKS),
            _ => self.blocks,
        };
        let size = |leaves: &[Leaf]| leaves.iter().map(|leaf| leaf.blocks).sum::<i64>();
        let behind = size(leaves.get(..index).unwrap_or_default()) + next;
        let ahead = size(leaves.get(index + 1..).unwrap_or_default()) + end - next;
        let done = state.done + tally.seen;
        let total = done + (ahead as f64 * done as f64 / behind.max(1) as f64) as i64;
        self.note(state, &at(leaf), (next, end), tally, Some(total))?;
        Ok(Turn::Sweeping)
    }

    fn reseal(&self, leaf: &Leaf, blocks: Range<i64>, ring: &KeyRing) -> Result<sweep::Tally, ErrorReport> {
        let mut unopened = Vec::new();
        let tally =
            sweep::reseal(leaf, blocks, ring, Locked::ArePassedOver, |item, reason| unopened.push((item, reason)))?;
        for (item, reason) in unopened {
            note_error(&item, reason)?;
        }
        Ok(tally)
    }

    /// Writes how far it is.
    fn note(
        &mut self,
        state: &State,
        column: &At,
        (next, end): (i64, i64),
        tally: sweep::Tally,
        total: Option<i64>,
    ) -> Result<(), ErrorReport> {
        let spent = self.since.elapsed().as_secs_f64();
        self.since = Instant::now();
        write(
            "UPDATE _nexus_hub.vault_rotation_state s
                SET relation = $1, column_name = $2::name, next_block = $3, end_block = $4, done = $5,
                    total = greatest(coalesce($6, s.total), $5), resealed = s.resealed + $7, unopened = s.unopened + $8,
                    spent = s.spent + $9 * interval '1 second', problem = NULL",
            &[
                pg_sys::Oid::from(column.0).into(),
                column.1.as_str().into(),
                next.into(),
                end.into(),
                (state.done + tally.seen).into(),
                total.into(),
                tally.resealed.into(),
                tally.unopened.into(),
                spent.into(),
            ],
        )
    }

    /// After something went wrong, or the configuration was loaded: nothing is taken for granted.
    pub fn look_anew(&mut self) {
        self.leaves = None;
        self.earlier = None;
    }

    /// Passes over the column that was worked on when something went wrong, and tells whether there was one. Call it in a
    /// transaction.
    pub fn give_column_up(&mut self, problem: &str) -> Result<bool, ErrorReport> {
        let Some(leaf) = self.current.take() else { return Ok(false) };
        note_failed_column(&leaf.noun, problem)?;
        self.left.retain(|(column, _)| *column != at(&leaf));
        self.given_up.insert(at(&leaf), problem.to_owned());
        Ok(true)
    }
}

/// Notes why it does not go on at once. Call it in a transaction.
pub fn note_problem(problem: &str) -> Result<(), ErrorReport> {
    write(
        "UPDATE _nexus_hub.vault_rotation_state SET problem = $1 WHERE problem IS DISTINCT FROM $1",
        &[problem.into()],
    )
}

fn note_error(item: &str, reason: &str) -> Result<(), ErrorReport> {
    write(
        "INSERT INTO _nexus_hub.vault_rotation_errors (item, reason)
         SELECT $1, $2 WHERE (SELECT count(*) FROM _nexus_hub.vault_rotation_errors) < $3 ON CONFLICT DO NOTHING",
        &[item.into(), reason.into(), MAX_ERRORS.into()],
    )
}

fn note_failed_column(noun: &str, problem: &str) -> Result<(), ErrorReport> {
    write(
        "WITH noted AS (
             INSERT INTO _nexus_hub.vault_rotation_errors (item, reason) VALUES ($1, $2)
             ON CONFLICT (item) DO NOTHING RETURNING 1)
         UPDATE _nexus_hub.vault_rotation_state s SET failed_columns = s.failed_columns + 1 WHERE EXISTS (SELECT FROM noted)",
        &[noun.into(), problem.into()],
    )
}

fn write(statement: &str, arguments: &[DatumWithOid<'_>]) -> Result<(), ErrorReport> {
    Spi::connect_mut(|client| client.update(statement, None, arguments).map(|_| ())).map_err(internal)
}
