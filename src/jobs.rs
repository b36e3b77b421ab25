//! Jobs: what their SQL functions need beyond SQL.

pub mod queue;

use crate::domain::job::{self, JobType, Misfit, Names, Options};
use crate::net::endpoint;
use crate::net::http::HttpCall;
use crate::pg::error::{ErrorReport, Kind, error, not_preloaded};
use crate::pg::{bgworker, restore, shmem, snapshot, xact};
use crate::servers;
use pgrx::prelude::*;
use std::cell::Cell;
use std::time::{Duration, Instant};

const MAX_WAIT_MS: i32 = 3_600_000;
/// A waiting session looks again this often even when nobody wakes it: on a standby nobody does.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A new UUIDv7.
#[pg_extern(sql = false)]
fn uuid_v7() -> pgrx::Uuid {
    pgrx::Uuid::from_bytes(uuid::Uuid::now_v7().into_bytes())
}

fn bad(misfit: Misfit) -> ErrorReport {
    error(Kind::BadArgument, misfit.problem).set_hint(misfit.advice)
}

fn options(
    names: Names,
    priority: Option<i32>,
    run_at: Option<TimestampWithTimeZone>,
    timeout_ms: Option<i32>,
    max_attempts: Option<i32>,
    idempotency_key: Option<&str>,
) -> Result<(), ErrorReport> {
    job::check_options(names, &Options { priority, timeout_ms, max_attempts, idempotency_key }).map_err(bad)?;
    if run_at.is_some_and(|time| time.is_infinity() || time.is_neg_infinity()) {
        return Err(error(Kind::BadArgument, format!("{names}run_at must be a time, not infinity"))
            .set_hint("A job that shall not run for now is one that has not been made yet."));
    }
    Ok(())
}

/// For a CHECK: true, or raises a helpful error when a job's columns do not fit its type.
#[pg_extern(sql = false)]
fn is_job(
    job_type: Option<&str>,
    server_id: Option<&str>,
    tool_name: Option<&str>,
    has_uri: bool,
    has_url: bool,
) -> Result<bool, ErrorReport> {
    let has_param = |key: &str| if key == "uri" { has_uri } else { has_url };
    job::check(Names::Columns, job_type, server_id, tool_name, true, has_param).map(|_| true).map_err(bad)
}

/// For a CHECK: true, or raises a helpful error when an option is out of its range.
#[pg_extern(sql = false)]
fn are_job_options(
    priority: Option<i32>,
    run_at: Option<TimestampWithTimeZone>,
    timeout_ms: Option<i32>,
    max_attempts: Option<i32>,
    idempotency_key: Option<&str>,
) -> Result<bool, ErrorReport> {
    options(Names::Columns, priority, run_at, timeout_ms, max_attempts, idempotency_key).map(|()| true)
}

/// For a CHECK: whether there is such a status, and the rest of the row fits it.
#[pg_extern(sql = false)]
fn is_job_state(status: Option<&str>, started: bool, ended: bool, leased: bool, has_outcome: bool) -> bool {
    status.is_some_and(|status| job::is_state(status, started, ended, leased, has_outcome))
}

/// Raises a helpful error when a job's fields do not fit its type.
#[pg_extern(sql = false)]
fn check_job(
    job_type: Option<&str>,
    server_id: Option<&str>,
    tool_name: Option<&str>,
    params: Option<&str>,
    bound: bool,
) -> Result<(), ErrorReport> {
    let text = params.unwrap_or("{}");
    let members = endpoint::members(text, &[]).map(|(_, raw)| raw);
    let has_param = |key: &str| {
        members.as_ref().is_ok_and(|members| members.get(key).is_some_and(|value| value.get().starts_with('"')))
    };
    let kind = job::check(Names::Arguments, job_type, server_id, tool_name, members.is_ok(), has_param).map_err(bad)?;
    if kind == JobType::HttpRequest {
        if bound {
            return Err(
                error(Kind::NotAllowed, "http_request jobs are not for users").set_hint("Create them as service_role.")
            );
        }
        let call = HttpCall::parse(text)
            .map_err(|problem| error(Kind::BadArgument, format!("bad request in p_params: {problem}")))?;
        servers::check_egress(call.url())?;
    }
    Ok(())
}

/// Raises a helpful error when an option of a job is out of its range.
#[pg_extern(sql = false)]
fn check_job_options(
    priority: Option<i32>,
    run_at: Option<TimestampWithTimeZone>,
    timeout_ms: Option<i32>,
    max_attempts: Option<i32>,
    idempotency_key: Option<&str>,
    bound: bool,
) -> Result<(), ErrorReport> {
    options(Names::Arguments, priority, run_at, timeout_ms, max_attempts, idempotency_key)?;
    if bound && priority.is_some_and(|priority| priority < job::USERS_PRIORITY) {
        return Err(error(Kind::NotAllowed, format!("p_priority must be {} or more for users", job::USERS_PRIORITY))
            .set_hint("Smaller numbers go before all others; create such jobs as service_role."));
    }
    Ok(())
}

/// Raises the error of an idempotency key whose job went away.
#[pg_extern(sql = false)]
fn job_of_key_gone(idempotency_key: Option<&str>) -> Result<Option<pgrx::Uuid>, ErrorReport> {
    let key = idempotency_key.unwrap_or_default();
    Err(error(Kind::Conflict, format!("the job with the idempotency key \"{key}\" was deleted meanwhile"))
        .set_hint("Try again."))
}

/// The host and port that a URL leads to; empty for what is no URL.
#[pg_extern(sql = false, immutable, parallel_safe, strict)]
fn url_authority(url: &str) -> String {
    endpoint::authority_of(url)
}

/// Wakes the worker of this database when the transaction commits.
#[pg_extern(sql = false)]
fn wake_worker() -> Result<(), ErrorReport> {
    if !shmem::preloaded() {
        return Err(not_preloaded());
    }
    xact::wake_worker_at_commit();
    Ok(())
}

/// Called at the end of the install script: the worker starts when CREATE EXTENSION commits.
#[pg_extern(sql = false)]
fn extension_created() {
    if shmem::preloaded() {
        xact::wake_worker_at_commit();
    } else {
        warn_not_preloaded();
    }
}

/// Wakes the worker after a statement that changed jobs. Its own updates need no waking; jobs that a trigger adds do.
#[pg_trigger(sql = false)]
fn wake_on_change<'a>(
    trigger: &'a pgrx::PgTrigger<'a>,
) -> Result<Option<PgHeapTuple<'a, impl WhoAllocated>>, ErrorReport> {
    if shmem::preloaded() {
        let is_insert = matches!(trigger.op(), Ok(PgTriggerOperation::Insert));
        if is_insert {
            restore::note();
            xact::wake_worker_at_commit();
        } else if !bgworker::is_own_worker() {
            // A running job may be among those that were changed.
            xact::have_worker_look_at_commit();
        }
    } else {
        warn_not_preloaded();
    }
    Ok(None::<PgHeapTuple<'a, pgrx::pgbox::AllocatedByRust>>)
}

/// Makes known that the session loads a dump, if it does.
#[pg_trigger(sql = false)]
fn note_restore<'a>(
    _trigger: &'a pgrx::PgTrigger<'a>,
) -> Result<Option<PgHeapTuple<'a, impl WhoAllocated>>, ErrorReport> {
    restore::note();
    Ok(None::<PgHeapTuple<'a, pgrx::pgbox::AllocatedByRust>>)
}

fn warn_not_preloaded() {
    thread_local! {
        static WARNED: Cell<bool> = const { Cell::new(false) };
    }
    if !WARNED.replace(true) {
        ereport!(
            WARNING,
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "nexus_hub is not preloaded: jobs stay pending until it is (add it to shared_preload_libraries and restart)"
        );
    }
}

/// Raises the error of a job that is not there.
#[pg_extern(sql = false)]
fn job_not_found(job_id: Option<pgrx::Uuid>) -> Result<(), ErrorReport> {
    let id = job_id.map_or_else(|| "NULL".into(), |id| uuid::Uuid::from_bytes(*id.as_bytes()).to_string());
    Err(error(Kind::BadArgument, format!("Job {id} not found")))
}

/// Blocks until a job is finished or the time is over. Runs as the extension's owner, for jobs that the calling
/// function has found visible to its caller.
#[pg_extern(sql = false)]
fn await_job(job_id: pgrx::Uuid, timeout_ms: Option<i32>) -> Result<(), ErrorReport> {
    let Some(timeout_ms) = timeout_ms.filter(|timeout_ms| (0..=MAX_WAIT_MS).contains(timeout_ms)) else {
        return Err(error(
            Kind::BadArgument,
            format!(
                "p_timeout_ms must be between 0 and {MAX_WAIT_MS}, not {}",
                timeout_ms.map_or_else(|| "NULL".into(), |timeout_ms| timeout_ms.to_string())
            ),
        ));
    };
    let deadline = Instant::now() + Duration::from_millis(timeout_ms as u64);
    // Take the place in the queue before looking, so that an end in between is not missed.
    let wait = shmem::JobWait::begin();
    loop {
        let (finished, uncommitted) = progress(job_id)?;
        if finished {
            return Ok(());
        }
        if uncommitted {
            return Err(error(Kind::NotReady, "the job cannot finish before this transaction has committed")
                .set_detail("This transaction made or changed the job, and no worker sees that before the commit.")
                .set_hint("Commit first, then wait."));
        }
        if snapshot::is_frozen() {
            return Err(error(Kind::NotReady, "this transaction cannot see the job finish")
                .set_detail("Its isolation level shows the database as it was when the transaction began.")
                .set_hint("Wait in a transaction of isolation level READ COMMITTED."));
        }
        let wait = wait.as_ref().ok_or_else(not_preloaded)?;
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Ok(());
        }
        wait.sleep(remaining.min(LOOK_AGAIN));
    }
}

/// Whether a job is finished (or gone), and whether the running transaction itself wrote it.
fn progress(job_id: pgrx::Uuid) -> Result<(bool, bool), ErrorReport> {
    let row = snapshot::with_fresh(|| {
        Spi::connect(|client| {
            let rows =
                client.select("SELECT finished, writer FROM _nexus_hub.job_progress($1)", Some(1), &[job_id.into()])?;
            rows.first().get_two::<bool, i64>()
        })
    });
    let (finished, writer) =
        row.map_err(|problem| error(Kind::Internal, format!("could not read the job's state: {problem}")))?;
    let uncommitted = writer.and_then(|writer| u32::try_from(writer).ok()).is_some_and(xact::is_current);
    Ok((finished.unwrap_or(true), uncommitted))
}
