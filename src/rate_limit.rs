//! Rate limits: calls per clock minute of a server and a user, and a general limiter, both in shared memory. Without
//! shared memory, in a table.

mod answer;
mod fallback;
pub mod jobs;
mod requests;
mod rules;
mod tracking;

pub use tracking::Recorder;

use crate::domain::rate::SECOND;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::limit_row::LimitRow;
use crate::pg::shmem::rates::{self, Rates};
use crate::pg::{guc, quick_call, xact};
use answer::{Request, row};
use pgrx::prelude::*;
use rules::Rule;

fn bad(message: impl Into<String>, hint: &str) -> ErrorReport {
    error(Kind::BadArgument, message).set_hint(hint)
}

/// Has `check_rate_limit` go the quick way.
pub fn register() {
    quick_call::register(count_quickly);
}

/// What a call of `check_rate_limit` usually comes to; `None`: this one is not usual.
fn count_quickly(server: &[u8], user: Option<&[u8; 16]>, limit: i32) -> Option<bool> {
    let table = rates::table()?;
    let now = rates::now();
    if server.is_empty() || !rules::are_none(table, now) {
        return None;
    }
    table.count_known(server, user, now, limit)
}

/// Counts a call in the running clock minute; see the function's COMMENT. In SQL it goes by [`quick_call`].
#[pg_extern(sql = false)]
fn check_rate_limit(server: Option<&str>, user: Option<pgrx::Uuid>, limit: Option<i32>) -> Result<bool, ErrorReport> {
    let server = server_name(server)?;
    let limit = limit.ok_or_else(|| {
        bad("p_limit_per_minute is NULL", "Pass the number of calls that are allowed in a minute; 0 allows none.")
    })?;
    count(server, user.as_ref().map(|user| user.as_bytes()), limit, rates::now())
}

fn server_name(server: Option<&str>) -> Result<&str, ErrorReport> {
    server.filter(|server| !server.is_empty()).ok_or_else(|| {
        let what = if server.is_none() { "NULL" } else { "empty" };
        bad(
            format!("p_server_id is {what}"),
            "Pass the server's id; for calls that are no server's there is rate_limit.",
        )
    })
}

fn count(server: &str, user: Option<&[u8; 16]>, limit: i32, now: u64) -> Result<bool, ErrorReport> {
    let table = rates::table();
    let limit = match rules::of_server(table, server, user, now).map_err(rules::unreadable)? {
        Rule::Exempt => {
            note_exempt(table);
            return Ok(true);
        }
        Rule::Limit(limit) => limit,
        Rule::None => limit,
    };
    let Some(table) = table else { return fallback::count(server, user, limit, now) };
    let key = table.server_key(server, user);
    Ok(table.count(&key, now, limit).unwrap_or_else(|| {
        if limit > 0 {
            return admit_when_full(table, now);
        }
        table.note_denied();
        false
    }))
}

fn note_exempt(table: Option<Rates>) {
    if let Some(table) = table {
        table.note_exempt();
    }
}

/// Whether a call goes that there is no room for.
fn admit_when_full(table: Rates, now: u64) -> bool {
    let allows = guc::allows_when_full();
    table.note_full();
    warn_when_full(table, now, allows);
    allows
}

/// Has the log tell that there is no room, at most once a minute.
fn warn_when_full(table: Rates, now: u64, allows: bool) {
    if table.is_warning_due(now) {
        log!(
            "nexus_hub: the table of rate limits is full, and calls with new keys are {}: raise nexus_hub.rate_limit_max_keys",
            if allows { "allowed" } else { "refused" }
        );
    }
}

/// Charges a call to a key; see the function's COMMENT.
#[pg_extern(sql = false)]
fn rate_limit(
    key: Option<&str>,
    limit: Option<i32>,
    window: Option<i32>,
    cost: Option<i32>,
    burst: Option<i32>,
) -> Result<LimitRow, ErrorReport> {
    let request = Request::new(key, limit, window, cost, burst)?;
    limited(&request, true)
}

/// What `rate_limit` would answer; see the function's COMMENT.
#[pg_extern(sql = false)]
fn rate_limit_peek(
    key: Option<&str>,
    limit: Option<i32>,
    window: Option<i32>,
    cost: Option<i32>,
    burst: Option<i32>,
) -> Result<LimitRow, ErrorReport> {
    let request = Request::new(key, limit, window, cost, burst)?;
    limited(&request, false)
}

fn limited(request: &Request<'_>, charge: bool) -> Result<LimitRow, ErrorReport> {
    let (now, table) = (rates::now(), rates::table());
    let (limit, policy) = match rules::of_text(table, request.key, now).map_err(rules::unreadable)? {
        Rule::Exempt => {
            note_exempt(table.filter(|_| charge));
            return Ok(request.exempt());
        }
        Rule::Limit(limit) => (limit, request.policy(limit)?),
        Rule::None => (request.limit, request.policy(request.limit)?),
    };
    let Some(policy) = policy else {
        if let Some(table) = table.filter(|_| charge) {
            table.note_denied();
        }
        return Ok(answer::never(limit));
    };
    let Some(table) = table else {
        let answer = fallback::limited(request, policy, now, charge)?;
        return Ok(row(limit, answer));
    };
    let key = table.text_key(request.key, request.window);
    if !charge {
        return Ok(row(limit, table.peek(&key, now, policy, request.cost)));
    }
    let answer = table.charge(&key, now, policy, request.cost);
    Ok(answer
        .map_or_else(|| request.when_full(limit, policy, admit_when_full(table, now)), |answer| row(limit, answer)))
}

/// Charges a call to several keys or to none; see the function's COMMENT.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn rate_limit_all(
    keys: Option<Vec<Option<String>>>,
    limits: Option<Vec<Option<i32>>>,
    windows: Option<Vec<Option<i32>>>,
    costs: Option<Vec<Option<i32>>>,
    bursts: Option<Vec<Option<i32>>>,
) -> Result<
    TableIterator<
        'static,
        (
            name!(key, String),
            name!(allowed, bool),
            name!(limit, i32),
            name!(remaining, i32),
            name!(retry_after_seconds, Option<f64>),
            name!(reset_seconds, f64),
        ),
    >,
    ErrorReport,
> {
    let keys = answer::keys(keys)?;
    let requests = answer::requests(&keys, limits, windows, costs, bursts)?;
    let rows = limited_together(&requests)?;
    let rows: Vec<_> = requests
        .iter()
        .zip(rows)
        .map(|(request, row)| {
            (request.key.to_owned(), row.allowed, row.limit, row.remaining, row.retry_after, row.reset)
        })
        .collect();
    Ok(TableIterator::new(rows))
}

fn limited_together(requests: &[Request<'_>]) -> Result<Vec<LimitRow>, ErrorReport> {
    let (now, table) = (rates::now(), rates::table());
    // Of those that something is to be charged to, where they stand in the answer.
    let (mut rows, mut charges) = (Vec::with_capacity(requests.len()), Vec::new());
    for (place, request) in requests.iter().enumerate() {
        let limit = match rules::of_text(table, request.key, now).map_err(rules::unreadable)? {
            Rule::Exempt => {
                note_exempt(table);
                rows.push(request.exempt());
                continue;
            }
            Rule::Limit(limit) => limit,
            Rule::None => request.limit,
        };
        rows.push(answer::never(limit));
        if let Some(policy) = request.policy(limit)? {
            charges.push((place, limit, policy));
        }
    }
    // One that never allows denies all the others.
    let is_barred = rows.iter().enumerate().any(|(place, row)| !row.allowed && charges.iter().all(|c| c.0 != place));
    if is_barred {
        if let Some(table) = table {
            table.note_denied();
        }
        for (place, limit, policy) in charges {
            let (request, free) = (&requests[place], requests[place].free());
            let asked = |request: &Request<'_>| match table {
                Some(table) => Ok(table.peek(&table.text_key(request.key, request.window), now, policy, request.cost)),
                None => fallback::limited(request, policy, now, false),
            };
            let answer = asked(request)?;
            rows[place] = row(limit, if answer.allowed { asked(&free)? } else { answer });
        }
        return Ok(rows);
    }
    let Some(table) = table else {
        let answers = fallback::limited_together(requests, &charges, now)?;
        charges.iter().zip(answers).for_each(|((place, limit, _), answer)| rows[*place] = row(*limit, answer));
        return Ok(rows);
    };
    let charged: Vec<_> = charges
        .iter()
        .map(|(place, _, policy)| {
            let request = &requests[*place];
            rates::Charge { key: table.text_key(request.key, request.window), policy: *policy, cost: request.cost }
        })
        .collect();
    let answers = table.charge_all(&charged, now, !guc::allows_when_full());
    let mut when_full = None;
    for ((place, limit, policy), answer) in charges.into_iter().zip(answers) {
        rows[place] = match answer {
            Some(answer) => row(limit, answer),
            None => {
                let allows = *when_full.get_or_insert_with(|| admit_when_full(table, now));
                requests[place].when_full(limit, policy, allows)
            }
        };
    }
    Ok(rows)
}

/// Forgets what was charged to a key; see the function's COMMENT.
#[pg_extern(sql = false)]
fn reset_rate_limit(key: Option<&str>) -> Result<bool, ErrorReport> {
    let key = answer::key(key)?;
    match rates::table() {
        Some(table) => Ok(table.forget(&table.text_key(key, 0))),
        None => fallback::forget(key),
    }
}

/// Forgets the calls of the running minute; see the function's COMMENT.
#[pg_extern(sql = false)]
fn reset_server_rate_limit(server: Option<&str>, user: Option<pgrx::Uuid>) -> Result<bool, ErrorReport> {
    let server = server_name(server)?;
    let user = user.as_ref().map(|user| user.as_bytes());
    let now = rates::now();
    match rates::table() {
        Some(table) => {
            let found = table.forget_minute(&table.server_key(server, user), now);
            jobs::may_go_on();
            Ok(found)
        }
        None => fallback::forget_minute(server, user, now),
    }
}

/// Has all sessions read the exemptions and overrides again, after a statement that changed them.
#[pg_trigger(sql = false)]
fn rate_limit_rules_changed<'a>(
    _trigger: &'a pgrx::PgTrigger<'a>,
) -> Result<Option<PgHeapTuple<'a, impl WhoAllocated>>, ErrorReport> {
    xact::rate_rules_change();
    Ok(None::<PgHeapTuple<'a, pgrx::pgbox::AllocatedByRust>>)
}

fn seconds(time: u64) -> f64 {
    time as f64 / SECOND as f64
}
