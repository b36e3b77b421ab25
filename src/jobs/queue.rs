//! The worker's side of the job table: claim, complete, give back. Call everything here in a transaction.

use crate::net::{Outcome, Verdict};
use crate::servers::ServerRow;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiClient, SpiError};
use uuid::Uuid;

/// A job that this worker has to run.
#[derive(Clone, Debug)]
pub struct ClaimedJob {
    pub id: Uuid,
    pub lease: Uuid,
    pub job_type: String,
    pub server_id: Option<String>,
    pub tool_name: Option<String>,
    pub params: String,
    pub server: ServerRow,
}

/// The job table, as the worker works with it. Statements are planned once and kept.
pub struct Queue {
    claim: OwnedPreparedStatement,
    complete: OwnedPreparedStatement,
    release: OwnedPreparedStatement,
}

fn datum(id: Uuid) -> pgrx::Uuid {
    pgrx::Uuid::from_bytes(id.into_bytes())
}

fn id(datum: pgrx::Uuid) -> Uuid {
    Uuid::from_bytes(*datum.as_bytes())
}

impl Queue {
    /// Prepares the statements.
    pub fn open() -> Result<Self, SpiError> {
        Spi::connect_mut(|client| {
            let uuid = PgOid::BuiltIn(PgBuiltInOids::UUIDOID);
            let uuids = PgOid::BuiltIn(PgBuiltInOids::UUIDARRAYOID);
            let texts = PgOid::BuiltIn(PgBuiltInOids::TEXTARRAYOID);
            let number = PgOid::BuiltIn(PgBuiltInOids::INT4OID);
            Ok(Self {
                claim: client
                    .prepare_mut(
                        "SELECT id, job_type, server_id, tool_name, params, user_config, user_enabled, system_config, system_enabled
                           FROM _nexus_hub.claim_jobs($1, $2)",
                        &[uuid, number],
                    )?
                    .keep(),
                complete: client
                    .prepare_mut(
                        "SELECT later FROM _nexus_hub.complete_jobs($1, $2, $3, $4, $5) AS later",
                        &[uuids, uuids, texts, texts, texts],
                    )?
                    .keep(),
                release: client.prepare_mut("SELECT _nexus_hub.release_jobs($1)", &[uuids])?.keep(),
            })
        })
    }

    /// What ALTER DATABASE … SET says for this database, as text to be compared.
    pub fn database_settings() -> Result<String, SpiError> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT coalesce((SELECT s.setconfig::text FROM pg_catalog.pg_db_role_setting s
                   WHERE s.setrole = 0 AND s.setdatabase =
                         (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())), '')",
                Some(1),
                &[],
            )?;
            Ok(rows.first().get_one::<String>()?.unwrap_or_default())
        })
    }

    /// Takes up to `limit` pending jobs, oldest first, under a lease: a fencing token that is used once.
    pub fn claim(&self, lease: Uuid, limit: usize) -> Result<Vec<ClaimedJob>, SpiError> {
        Spi::connect_mut(|client: &mut SpiClient<'_>| {
            let limit = i32::try_from(limit).unwrap_or(i32::MAX);
            let rows = client.update(&self.claim, None, &[datum(lease).into(), limit.into()])?;
            let mut jobs = Vec::with_capacity(rows.len());
            for row in rows {
                let Some(job) = row.get::<pgrx::Uuid>(1)? else { continue };
                jobs.push(ClaimedJob {
                    id: id(job),
                    lease,
                    job_type: row.get(2)?.unwrap_or_default(),
                    server_id: row.get(3)?,
                    tool_name: row.get(4)?,
                    params: row.get(5)?.unwrap_or_default(),
                    server: ServerRow {
                        user_config: row.get(6)?,
                        user_enabled: row.get(7)?,
                        system_config: row.get(8)?,
                        system_enabled: row.get(9)?,
                    },
                });
            }
            Ok(jobs)
        })
    }

    /// Writes outcomes of jobs that are still held under their leases. Returns the jobs whose rows somebody else
    /// keeps locked: theirs must be written later.
    pub fn complete(&self, outcomes: &[&Outcome]) -> Result<Vec<Uuid>, SpiError> {
        let mut ids = Vec::with_capacity(outcomes.len());
        let mut leases = Vec::with_capacity(outcomes.len());
        let mut statuses = Vec::with_capacity(outcomes.len());
        let mut results = Vec::with_capacity(outcomes.len());
        let mut errors = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            let (status, result, error) = match &outcome.verdict {
                Verdict::Completed { result } => ("completed", Some(result.as_str()), None),
                Verdict::Failed { error, result } => ("failed", result.as_deref(), Some(error.as_str())),
            };
            ids.push(datum(outcome.job));
            leases.push(datum(outcome.lease));
            statuses.push(status);
            results.push(result);
            errors.push(error);
        }
        Spi::connect_mut(|client| {
            let rows = client.update(
                &self.complete,
                None,
                &[ids.into(), leases.into(), statuses.into(), results.into(), errors.into()],
            )?;
            let mut later = Vec::new();
            for row in rows {
                later.extend(row.get::<pgrx::Uuid>(1)?.map(id));
            }
            Ok(later)
        })
    }

    /// Gives back the jobs held under other leases than the ones this worker uses: with one worker to a database,
    /// those are of one that is gone.
    pub fn release_abandoned(&self, leases: impl IntoIterator<Item = Uuid>) -> Result<i32, SpiError> {
        let leases: Vec<_> = leases.into_iter().map(datum).collect();
        Spi::connect_mut(|client| {
            let rows = client.update(&self.release, None, &[leases.into()])?;
            Ok(rows.first().get_one::<i32>()?.unwrap_or(0))
        })
    }
}
