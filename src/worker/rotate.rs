//! The process that rotates the vault's keys in the background: batch, commit, rest.
//!
//! Apart from the worker, so that neither a user's expression nor a large table holds up jobs. It ends with the rotation;
//! the worker starts it, and starts another one should it end before that.

use super::{ROTATION, ROTATION_MAIN};
use crate::pg::advisory::Lock;
use crate::pg::bgworker::{self, Launched};
use crate::pg::catalog::Extension;
use crate::pg::error::ErrorReport;
use crate::pg::transaction::{self, Durability, Failure};
use crate::pg::{catalog, guc, shmem, timeout};
use crate::vault::online::{self, Rotation, Turn};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// How long one statement on a table may take: an expression that hangs must not hang the rotation.
const STATEMENT_TIME: Duration = Duration::from_secs(30);
/// How long to wait for others, and after something went wrong.
const PAUSE: Duration = Duration::from_secs(1);
/// How often the same is tried, unless somebody else is in the way.
const MAX_TRIES: u32 = 2;

/// The worker's side: the process, if it has started one.
#[derive(Default)]
pub struct Post {
    process: Option<Launched>,
    told_no_room: bool,
}

impl Post {
    /// Starts the process where a rotation needs one and there is none.
    pub fn fill(&mut self, database: pg_sys::Oid) {
        self.process.take_if(|process| process.is_over());
        if self.process.is_some() {
            return;
        }
        self.process = Launched::start(ROTATION, ROTATION_MAIN, database.to_u32() as usize);
        if self.process.is_none() && !self.told_no_room {
            log!("nexus_hub: no free background worker to rotate the vault's keys; raise max_worker_processes");
        }
        self.told_no_room = self.process.is_none();
    }
}

/// Runs until the rotation is over, or the worker of the database is gone.
pub fn main(database: pg_sys::Oid) {
    bgworker::start(Some(database));
    bgworker::end_at_once_when_told();
    bgworker::pin_session_settings();
    // The same plaintexts as before: no trigger needs to know.
    bgworker::pin_setting(c"session_replication_role", c"replica");
    // The worker that started another one before this may be gone, and that one still at work.
    let extension =
        transaction::run(c"nexus_hub: starting", || Ok(catalog::extension().filter(|_| Lock::Rotation.take())));
    let Ok(Some(extension)) = extension else { return };
    let process = Process { database, extension };
    let mut rotation = Rotation::new();
    let mut tries = 0;
    while !process.is_to_end() {
        bgworker::handle_interrupts_of_others();
        if bgworker::reload_configuration() {
            rotation.look_anew();
        }
        let begin = Instant::now();
        let turn = match process.run(|| rotation.step()) {
            Ok(Turn::ToCheck) => process.check(&mut rotation),
            turn => turn,
        };
        match turn {
            Ok(Turn::Over) => return,
            Ok(Turn::Done(what)) => {
                log!("nexus_hub: {what}");
                return;
            }
            Ok(Turn::Sweeping | Turn::ToCheck) => {
                tries = 0;
                process.rest(begin.elapsed());
            }
            Ok(Turn::Waiting) => bgworker::wait(PAUSE),
            Err(failure) => {
                let is_in_the_way = failure.transient && !failure.canceled;
                tries += u32::from(!is_in_the_way);
                rotation.look_anew();
                process.note(&mut rotation, &failure, !is_in_the_way && tries >= MAX_TRIES);
                bgworker::wait(PAUSE);
            }
        }
    }
}

struct Process {
    database: pg_sys::Oid,
    extension: Extension,
}

impl Process {
    fn is_to_end(&self) -> bool {
        bgworker::stop_requested() || !shmem::has_worker(self.database)
    }

    /// Rests after so much work, as the setting says; no longer than until a reload, which may have changed it.
    fn rest(&self, work: Duration) {
        let until = Instant::now() + guc::vault_rotation_rest(work);
        loop {
            let time = until.saturating_duration_since(Instant::now());
            if time.is_zero() || self.is_to_end() || bgworker::reload_requested() {
                return;
            }
            bgworker::wait(time.min(PAUSE));
        }
    }

    /// A transaction. A crash that forgets its commit forgets both what was encrypted anew and that it was.
    fn run(&self, work: impl FnOnce() -> Result<Turn, ErrorReport>) -> Result<Turn, Failure> {
        self.run_with(Durability::Later, work)
    }

    fn run_with(
        &self,
        durability: Durability,
        work: impl FnOnce() -> Result<Turn, ErrorReport>,
    ) -> Result<Turn, Failure> {
        let done = transaction::run_with(c"nexus_hub: rotating the vault's keys", durability, || {
            if !catalog::hold_extension(self.extension) {
                return Ok(Turn::Over);
            }
            timeout::start(STATEMENT_TIME);
            work().map_err(|problem| problem.message().to_owned())
        });
        timeout::stop();
        done
    }

    /// Looks whether anything is left, and ends the rotation if not.
    fn check(&self, rotation: &mut Rotation) -> Result<Turn, Failure> {
        let waiting = self.run(|| Ok(if rotation.is_to_wait()? { Turn::Waiting } else { Turn::ToCheck }))?;
        if waiting != Turn::ToCheck {
            return Ok(waiting);
        }
        let check = transaction::run(c"nexus_hub: looking for values under older vault keys", || {
            timeout::start(STATEMENT_TIME);
            let pause = |time: Duration| {
                timeout::stop();
                if !time.is_zero() {
                    bgworker::wait(time);
                }
                // For the pace. That the keys may be others is noticed afterwards.
                bgworker::reload_configuration();
                timeout::start(STATEMENT_TIME);
                !self.is_to_end()
            };
            rotation.check(pause).map_err(|problem| problem.message().to_owned())
        });
        timeout::stop();
        match check? {
            // On disk, with all batches before it, ere anybody reads that a key can go.
            Some(check) => self.run_with(Durability::AtCommit, || rotation.conclude(check)),
            None => Ok(Turn::Waiting),
        }
    }

    /// Shows what went wrong, and passes over the column where it did, if it will go wrong again.
    fn note(&self, rotation: &mut Rotation, failure: &Failure, is_lasting: bool) {
        let noted = self.run(|| {
            if !is_lasting || !rotation.give_column_up(&failure.message)? {
                online::note_problem(&failure.message)?;
            }
            Ok(Turn::Waiting)
        });
        if let Err(second) = noted {
            log!("nexus_hub: the rotation of the vault's keys: {}; {}", failure.message, second.message);
        }
    }
}
