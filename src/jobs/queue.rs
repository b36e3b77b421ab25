//! The worker's side of the job table: read, claim, complete, give back. Call everything here in a transaction.

use crate::domain::job::JobType;
use crate::domain::schedule::{BreakerState, LaneKey, Position, Read, Row};
use crate::net::Verdict;
use crate::secrets::{Sealed, Wanted};
use crate::servers::ServerRow;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiClient, SpiError, SpiHeapTupleData};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use uuid::Uuid;

/// A job that this worker has to run.
#[derive(Clone, Debug)]
pub struct ClaimedJob {
    pub id: Uuid,
    pub user_id: Option<Uuid>,
    pub job_type: String,
    pub server_id: Option<String>,
    pub tool_name: Option<String>,
    pub params: String,
    pub timeout: Option<Duration>,
    /// Attempts with this one, crashes left out.
    pub attempts: i32,
    pub max_attempts: Option<i32>,
    /// Where an MCP job goes.
    pub server: Rc<ServerRow>,
}

/// A job, and the lease that it is held under.
pub type Claim = (Uuid, Uuid);

/// What is to be written of a job that was run.
#[derive(Clone, Debug)]
pub struct Completion {
    pub job: Uuid,
    pub lease: Uuid,
    /// Whether it is a sync, whose result belongs into the caches.
    pub is_sync: bool,
    pub verdict: Verdict,
    pub http_status: Option<u16>,
    /// The job is not finished, but tried again after this time.
    pub retry_in: Option<Duration>,
}

impl Completion {
    /// What the job is held under.
    pub fn claim(&self) -> Claim {
        (self.job, self.lease)
    }
}

/// The job table, as the worker works with it. Statements are planned once and kept.
pub struct Queue {
    read: OwnedPreparedStatement,
    next_due: OwnedPreparedStatement,
    servers: OwnedPreparedStatement,
    secrets: OwnedPreparedStatement,
    claim: OwnedPreparedStatement,
    unclaim: OwnedPreparedStatement,
    complete: OwnedPreparedStatement,
    lost: OwnedPreparedStatement,
    held: OwnedPreparedStatement,
    release: OwnedPreparedStatement,
    breakers: OwnedPreparedStatement,
    /// Which of the database's workers this is, and how many there are.
    share: (i32, i32),
}

fn datum(id: Uuid) -> pgrx::Uuid {
    pgrx::Uuid::from_bytes(id.into_bytes())
}

fn id(datum: pgrx::Uuid) -> Uuid {
    Uuid::from_bytes(*datum.as_bytes())
}

fn number(id: pgrx::Uuid) -> u128 {
    u128::from_be_bytes(*id.as_bytes())
}

fn time(microseconds: i64) -> TimestampWithTimeZone {
    TimestampWithTimeZone::try_from(microseconds).unwrap_or_else(|_| TimestampWithTimeZone::negative_infinity())
}

fn server(row: &SpiHeapTupleData<'_>, first: usize) -> Result<ServerRow, SpiError> {
    Ok(ServerRow {
        user_config: row.get(first)?,
        user_enabled: row.get(first + 1)?,
        user_rate_limit: row.get(first + 2)?,
        system_config: row.get(first + 3)?,
        system_enabled: row.get(first + 4)?,
        system_rate_limit: row.get(first + 5)?,
        ..ServerRow::default()
    })
}

impl Queue {
    /// Prepares the statements of the worker that is number `share.0` of `share.1`.
    pub fn open(share: (u16, u16)) -> Result<Self, SpiError> {
        use PgBuiltInOids as Oids;
        Spi::connect_mut(|client| {
            let prepare = |statement: &str, arguments: &[PgBuiltInOids]| {
                let arguments: Vec<_> = arguments.iter().map(|oid| PgOid::BuiltIn(*oid)).collect();
                client.prepare_mut(statement, &arguments).map(|prepared| prepared.keep())
            };
            Ok(Self {
                read: prepare(
                    "SELECT read, run_at, id, user_id, is_mcp, target, bytes FROM _nexus_hub.read_pending($1, $2, $3, $4, $5, $6)",
                    &[
                        Oids::INT2ARRAYOID,
                        Oids::TIMESTAMPTZARRAYOID,
                        Oids::UUIDARRAYOID,
                        Oids::INT4ARRAYOID,
                        Oids::INT4OID,
                        Oids::INT4OID,
                    ],
                )?,
                next_due: prepare("SELECT seconds FROM _nexus_hub.next_due()", &[])?,
                servers: prepare(
                    "SELECT lane, user_config, user_enabled, user_rate_limit, system_config, system_enabled, system_rate_limit
                       FROM _nexus_hub.read_servers($1, $2)",
                    &[Oids::UUIDARRAYOID, Oids::TEXTARRAYOID],
                )?,
                secrets: prepare(
                    "SELECT place, value_encrypted, context FROM _nexus_hub.read_secrets($1, $2, $3)",
                    &[Oids::UUIDARRAYOID, Oids::BOOLARRAYOID, Oids::TEXTARRAYOID],
                )?,
                claim: prepare(
                    "SELECT id, user_id, job_type, server_id, tool_name, params, timeout_ms, attempts, max_attempts
                       FROM _nexus_hub.claim_jobs($1, $2, $3)",
                    &[Oids::UUIDOID, Oids::UUIDARRAYOID, Oids::BOOLOID],
                )?,
                unclaim: prepare(
                    "SELECT _nexus_hub.unclaim_jobs($1, $2)",
                    &[Oids::UUIDOID, Oids::UUIDARRAYOID],
                )?,
                complete: prepare(
                    "SELECT id, lease FROM _nexus_hub.complete_jobs($1, $2, $3, $4, $5, $6, $7)",
                    &[
                        Oids::UUIDARRAYOID,
                        Oids::UUIDARRAYOID,
                        Oids::TEXTARRAYOID,
                        Oids::TEXTARRAYOID,
                        Oids::TEXTARRAYOID,
                        Oids::INT4ARRAYOID,
                        Oids::INT8ARRAYOID,
                    ],
                )?,
                lost: prepare(
                    "SELECT id, lease FROM _nexus_hub.lost_jobs($1, $2)",
                    &[Oids::UUIDARRAYOID, Oids::UUIDARRAYOID],
                )?,
                held: prepare("SELECT held FROM _nexus_hub.held_leases() AS held", &[])?,
                release: prepare("SELECT _nexus_hub.release_jobs($1, $2)", &[Oids::UUIDARRAYOID, Oids::INT4OID])?,
                breakers: prepare(
                    "SELECT _nexus_hub.write_breakers($1, $2, $3, $4, $5, $6, $7)",
                    &[
                        Oids::INT4OID,
                        Oids::INT4OID,
                        Oids::TEXTARRAYOID,
                        Oids::TEXTARRAYOID,
                        Oids::INT4ARRAYOID,
                        Oids::INT8ARRAYOID,
                        Oids::TEXTARRAYOID,
                    ],
                )?,
                share: (share.0.into(), share.1.into()),
            })
        })
    }

    /// A setting of the seeds' own, `app.…`; empty when it is not set.
    pub fn app_setting(name: &str) -> Result<String, SpiError> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT pg_catalog.current_setting($1, true)",
                Some(1),
                &[format!("app.{name}").into()],
            )?;
            Ok(rows.first().get_one::<String>()?.unwrap_or_default())
        })
    }

    /// Reads pending jobs that are due: what each of the reads has found.
    pub fn read(&self, reads: &[Read]) -> Result<Vec<Vec<Row>>, SpiError> {
        let priorities: Vec<i16> = reads.iter().map(|read| read.priority as i16 + 1).collect();
        let times: Vec<_> = reads.iter().map(|read| time(read.from.run_at)).collect();
        let ids: Vec<_> = reads.iter().map(|read| pgrx::Uuid::from_bytes(read.from.id.to_be_bytes())).collect();
        let limits: Vec<i32> = reads.iter().map(|read| read.limit as i32).collect();
        let mut found: Vec<Vec<Row>> = reads.iter().map(|_| Vec::new()).collect();
        Spi::connect(|client| {
            let arguments =
                [priorities.into(), times.into(), ids.into(), limits.into(), self.share.0.into(), self.share.1.into()];
            for row in client.select(&self.read, None, &arguments)? {
                let (read, run_at) = (row.get::<i32>(1)?, row.get::<TimestampWithTimeZone>(2)?);
                let (Some(read), Some(run_at), Some(id)) = (read, run_at, row.get::<pgrx::Uuid>(3)?) else { continue };
                let (user, is_mcp) = (row.get::<pgrx::Uuid>(4)?.map(number), row.get(5)?.unwrap_or_default());
                let key = row.get(6)?.map(|target| LaneKey { user, target, is_mcp });
                let bytes = row.get::<i32>(7)?.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default();
                let position = Position { run_at: run_at.into(), id: number(id) };
                if let Some(rows) = usize::try_from(read - 1).ok().and_then(|read| found.get_mut(read)) {
                    rows.push(Row { position, bytes, key });
                }
            }
            Ok(found)
        })
    }

    /// Time until the next job is due that is not due yet.
    pub fn next_due(&self) -> Result<Option<Duration>, SpiError> {
        Spi::connect(|client| {
            let seconds = client.select(&self.next_due, Some(1), &[])?.first().get_one::<f64>()?;
            Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)))
        })
    }

    /// The servers that the jobs of MCP lanes go to.
    pub fn servers(&self, lanes: &[LaneKey]) -> Result<Vec<ServerRow>, SpiError> {
        let users: Vec<_> =
            lanes.iter().map(|lane| lane.user.map(|user| pgrx::Uuid::from_bytes(user.to_be_bytes()))).collect();
        let targets: Vec<_> = lanes.iter().map(|lane| lane.target.clone()).collect();
        let mut servers = vec![ServerRow::default(); lanes.len()];
        Spi::connect(|client| {
            for row in client.select(&self.servers, None, &[users.into(), targets.into()])? {
                let lane = row.get::<i32>(1)?.and_then(|lane| usize::try_from(lane - 1).ok());
                if let Some(place) = lane.and_then(|lane| servers.get_mut(lane)) {
                    *place = server(&row, 2)?;
                }
            }
            Ok(servers)
        })
    }

    /// Jobs of servers that run under other leases than those that begin with `own`, by lane.
    pub fn elsewhere(own: u64) -> Result<Vec<(LaneKey, usize)>, SpiError> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT j.user_id, j.server_id, pg_catalog.count(*) FROM _nexus_hub.job_results j
                  WHERE j.status = 'running' AND j.lease IS NOT NULL AND j.server_id IS NOT NULL
                    AND NOT pg_catalog.starts_with(pg_catalog.replace(j.lease::pg_catalog.text, '-', ''), $1)
                  GROUP BY 1, 2",
                None,
                &[format!("{own:016x}").into()],
            )?;
            let lane = |row: SpiHeapTupleData<'_>| {
                let user = row.get::<pgrx::Uuid>(1)?.map(number);
                let target = row.get(2)?.unwrap_or_default();
                let count = row.get::<i64>(3)?.and_then(|count| usize::try_from(count).ok()).unwrap_or_default();
                Ok((LaneKey { user, target, is_mcp: true }, count))
            };
            rows.map(lane).collect()
        })
    }

    /// The secrets that jobs name; `None` for those that are not there.
    pub fn secrets(&self, wanted: &[Wanted]) -> Result<Vec<Option<Sealed>>, SpiError> {
        let users: Vec<_> = wanted.iter().map(|wanted| wanted.user.map(datum)).collect();
        let shared: Vec<_> = wanted.iter().map(|wanted| wanted.may_be_shared).collect();
        let names: Vec<_> = wanted.iter().map(|wanted| wanted.name.clone()).collect();
        let mut found = vec![None; wanted.len()];
        Spi::connect(|client| {
            for row in client.select(&self.secrets, None, &[users.into(), shared.into(), names.into()])? {
                let place = row.get::<i32>(1)?.and_then(|place| usize::try_from(place - 1).ok());
                let Some((value, context)) = row.get(2)?.zip(row.get(3)?) else { continue };
                if let Some(place) = place.and_then(|place| found.get_mut(place)) {
                    *place = Some(Sealed { value, context });
                }
            }
            Ok(found)
        })
    }

    /// Takes those of the jobs that are still pending, under a lease: a fencing token that is used once. `careful`:
    /// passes over rows that somebody keeps locked, instead of failing.
    pub fn claim(&self, lease: Uuid, jobs: &[u128], careful: bool) -> Result<Vec<ClaimedJob>, SpiError> {
        let jobs: Vec<_> = jobs.iter().map(|job| pgrx::Uuid::from_bytes(job.to_be_bytes())).collect();
        let mut claimed = Spi::connect_mut(|client: &mut SpiClient<'_>| {
            let rows = client.update(&self.claim, None, &[datum(lease).into(), jobs.into(), careful.into()])?;
            let mut jobs = Vec::with_capacity(rows.len());
            for row in rows {
                let Some(job) = row.get::<pgrx::Uuid>(1)? else { continue };
                let timeout = row.get::<i32>(7)?.map(|time| Duration::from_millis(time.unsigned_abs().into()));
                jobs.push(ClaimedJob {
                    id: id(job),
                    user_id: row.get::<pgrx::Uuid>(2)?.map(id),
                    job_type: row.get(3)?.unwrap_or_default(),
                    server_id: row.get(4)?,
                    tool_name: row.get(5)?,
                    params: row.get(6)?.unwrap_or_default(),
                    timeout,
                    attempts: row.get(8)?.unwrap_or(1),
                    max_attempts: row.get(9)?,
                    server: Rc::default(),
                });
            }
            Ok::<_, SpiError>(jobs)
        })?;
        self.add_servers(&mut claimed)?;
        Ok(claimed)
    }

    /// Gives jobs back that were claimed in this transaction, as if they had not been.
    pub fn unclaim(&self, lease: Uuid, jobs: impl Iterator<Item = u128>) -> Result<(), SpiError> {
        let jobs: Vec<_> = jobs.map(|job| pgrx::Uuid::from_bytes(job.to_be_bytes())).collect();
        Spi::connect_mut(|client| client.update(&self.unclaim, None, &[datum(lease).into(), jobs.into()]).map(|_| ()))
    }

    /// Gives MCP jobs their servers, each of which is read once.
    fn add_servers(&self, jobs: &mut [ClaimedJob]) -> Result<(), SpiError> {
        let lane = |job: &ClaimedJob| {
            let target = Some(job.server_id.clone()?).filter(|_| job.job_type != JobType::HTTP_REQUEST)?;
            Some(LaneKey { user: job.user_id.map(|user| user.as_u128()), target, is_mcp: true })
        };
        let mut servers: HashMap<LaneKey, Rc<ServerRow>> =
            jobs.iter().filter_map(lane).map(|lane| (lane, Rc::default())).collect();
        if servers.is_empty() {
            return Ok(());
        }
        let lanes: Vec<_> = servers.keys().cloned().collect();
        let rows = self.servers(&lanes)?;
        servers.extend(lanes.into_iter().zip(rows.into_iter().map(Rc::new)));
        for job in jobs {
            if let Some(server) = lane(job).and_then(|lane| servers.get(&lane)) {
                job.server = Rc::clone(server);
            }
        }
        Ok(())
    }

    /// Writes outcomes of jobs that are still held under their leases. Returns those whose rows somebody else
    /// keeps locked: theirs must be written later.
    pub fn complete(&self, completions: &[&Completion]) -> Result<Vec<Claim>, SpiError> {
        let mut ids = Vec::with_capacity(completions.len());
        let mut leases = Vec::with_capacity(completions.len());
        let mut statuses = Vec::with_capacity(completions.len());
        let mut results = Vec::with_capacity(completions.len());
        let mut errors = Vec::with_capacity(completions.len());
        let mut http_statuses = Vec::with_capacity(completions.len());
        let mut delays = Vec::with_capacity(completions.len());
        for completion in completions {
            let (status, result, error) = match &completion.verdict {
                Verdict::Completed { result } => ("completed", Some(result.as_str()), None),
                Verdict::Failed { error, .. } if completion.retry_in.is_some() => {
                    ("pending", None, Some(error.as_str()))
                }
                Verdict::Failed { error, result } => ("failed", result.as_deref(), Some(error.as_str())),
                Verdict::HandedOver => ("running", None, None),
            };
            ids.push(datum(completion.job));
            leases.push(datum(completion.lease));
            statuses.push(status);
            results.push(result);
            errors.push(error);
            http_statuses.push(completion.http_status.map(i32::from));
            delays.push(completion.retry_in.map(|delay| i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)));
        }
        Spi::connect_mut(|client| {
            let arguments = [
                ids.into(),
                leases.into(),
                statuses.into(),
                results.into(),
                errors.into(),
                http_statuses.into(),
                delays.into(),
            ];
            claims_of(client.update(&self.complete, None, &arguments)?)
        })
    }

    /// Those of the jobs that are no longer held under their leases.
    pub fn lost(&self, held: impl IntoIterator<Item = Claim>) -> Result<Vec<Claim>, SpiError> {
        let (ids, leases): (Vec<_>, Vec<_>) = held.into_iter().map(|(job, lease)| (datum(job), datum(lease))).unzip();
        Spi::connect(|client| claims_of(client.select(&self.lost, None, &[ids.into(), leases.into()])?))
    }

    /// The leases of all running jobs.
    pub fn held_leases(&self) -> Result<Vec<Uuid>, SpiError> {
        Spi::connect(|client| ids_of(client.select(&self.held, None, &[])?))
    }

    /// Gives back the jobs held under these leases. `max_crashes`: their worker is gone, which so many times sets a
    /// job aside.
    pub fn release(&self, leases: Vec<Uuid>, max_crashes: Option<i32>) -> Result<i32, SpiError> {
        let leases: Vec<_> = leases.into_iter().map(datum).collect();
        Spi::connect_mut(|client| {
            let rows = client.update(&self.release, None, &[leases.into(), max_crashes.into()])?;
            Ok(rows.first().get_one::<i32>()?.unwrap_or(0))
        })
    }

    /// Shows how breakers stand that have changed; `None`: all are closed.
    pub fn show_breakers(&self, changes: Option<&[BreakerState]>) -> Result<(), SpiError> {
        let hosts = changes.map(|changes| changes.iter().map(|change| change.host.as_str()).collect::<Vec<_>>());
        let changes = changes.unwrap_or_default();
        let states: Vec<_> = changes.iter().map(|change| change.state).collect();
        let failures: Vec<_> = changes.iter().map(|change| change.failures as i32).collect();
        let delays: Vec<_> = changes.iter().map(|change| change.probe_in.as_millis() as i64).collect();
        let errors: Vec<_> = changes.iter().map(|change| change.error.as_str()).collect();
        Spi::connect_mut(|client| {
            let arguments = [
                self.share.0.into(),
                self.share.1.into(),
                hosts.into(),
                states.into(),
                failures.into(),
                delays.into(),
                errors.into(),
            ];
            client.update(&self.breakers, None, &arguments).map(drop)
        })
    }
}

fn claims_of(rows: pgrx::spi::SpiTupleTable<'_>) -> Result<Vec<Claim>, SpiError> {
    let mut claims = Vec::new();
    for row in rows {
        claims.extend(row.get::<pgrx::Uuid>(1)?.map(id).zip(row.get::<pgrx::Uuid>(2)?.map(id)));
    }
    Ok(claims)
}

fn ids_of(rows: pgrx::spi::SpiTupleTable<'_>) -> Result<Vec<Uuid>, SpiError> {
    let mut ids = Vec::new();
    for row in rows {
        ids.extend(row.get::<pgrx::Uuid>(1)?.map(id));
    }
    Ok(ids)
}
