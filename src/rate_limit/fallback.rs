//! Rate limits without shared memory: the same states in a table, a row's lock instead of an atomic. Exact, but slow, and
//! not in read-only transactions; a rollback gives the calls back.

use super::answer::Request;
use crate::domain::rate::key::Kind as KeyKind;
use crate::domain::rate::{Answer, Policy, minute};
use crate::pg::error::{ErrorReport, Kind, error, not_preloaded};
use crate::pg::identity;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::cell::Cell;

/// One call in so many clears up.
const TIDY_INTERVAL: u32 = 100;

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

/// Which row.
#[derive(Clone, Copy)]
struct Entry<'a> {
    kind: KeyKind,
    name: &'a str,
    user: Option<&'a [u8; 16]>,
    window: u32,
}

impl<'a> Entry<'a> {
    fn server(name: &'a str, user: Option<&'a [u8; 16]>) -> Self {
        let kind = if user.is_some() { KeyKind::ServerUser } else { KeyKind::Server };
        Self { kind, name, user, window: 0 }
    }

    fn text(request: &Request<'a>) -> Self {
        Self { kind: KeyKind::Text, name: request.key, user: None, window: request.window }
    }

    fn arguments(&self) -> [DatumWithOid<'a>; 4] {
        [
            (self.kind as i32).into(),
            self.name.into(),
            self.user.map(|user| pgrx::Uuid::from_bytes(*user)).into(),
            // Windows come from an integer.
            (self.window as i32).into(),
        ]
    }

    fn state(&self, query: &str) -> Result<u64, ErrorReport> {
        let read =
            || Spi::connect_mut(|client| client.update(query, None, &self.arguments())?.first().get_one::<i64>());
        let state = identity::as_superuser(read).map_err(internal)?;
        Ok(state.unwrap_or_default().cast_unsigned())
    }

    /// The state, which stays as it is: no row is locked, and nothing written.
    fn peek(&self) -> Result<u64, ErrorReport> {
        let query = "SELECT _nexus_hub.rate_limit_state($1, $2, $3, $4)";
        let read = || Spi::connect(|client| client.select(query, Some(1), &self.arguments())?.first().get_one::<i64>());
        let state = identity::as_superuser(read).map_err(internal)?;
        Ok(state.unwrap_or_default().cast_unsigned())
    }

    /// The state; nobody else gets at it until the transaction ends.
    fn lock(&self) -> Result<u64, ErrorReport> {
        self.state("SELECT _nexus_hub.lock_rate_limit_state($1, $2, $3, $4)")
    }

    fn store(&self, state: u64, expires: u64) -> Result<(), ErrorReport> {
        let microseconds = i64::try_from(expires / 1000).unwrap_or(i64::MAX);
        let [kind, name, user, window] = self.arguments();
        let arguments = [kind, name, user, window, state.cast_signed().into(), microseconds.into()];
        run("SELECT true FROM _nexus_hub.set_rate_limit_state($1, $2, $3, $4, $5, $6)", &arguments).map(|_| ())
    }
}

fn internal(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not read or write the states of rate limits: {problem}"))
}

fn run(query: &str, arguments: &[DatumWithOid<'_>]) -> Result<Option<bool>, ErrorReport> {
    let run = || {
        Spi::connect_mut(|client| {
            let rows = client.update(query, None, arguments)?;
            if rows.is_empty() { Ok(None) } else { rows.first().get_one::<bool>() }
        })
    };
    identity::as_superuser(run).map_err(internal)
}

fn cannot_write() -> ErrorReport {
    not_preloaded().set_detail(
        "Without it rate limits are counted in a table, which cannot be done in a read-only transaction, on a standby, or in a parallel query.",
    )
}

/// Refuses what could not write, and clears up now and then.
fn begin() -> Result<(), ErrorReport> {
    if !identity::may_write() {
        return Err(cannot_write());
    }
    let calls = CALLS.get().wrapping_add(1);
    CALLS.set(calls);
    if calls.is_multiple_of(TIDY_INTERVAL) {
        run("SELECT _nexus_hub.tidy_rate_limits($1) > 0", &[super::tracking::retention().into()])?;
    }
    Ok(())
}

/// Counts a call.
pub fn count(server: &str, user: Option<&[u8; 16]>, limit: i32, now: u64) -> Result<bool, ErrorReport> {
    begin()?;
    let entry = Entry::server(server, user);
    let state = entry.lock()?;
    let step = minute::count(state, minute::of(now), limit);
    if let Some(closed) = step.closed {
        let (minute, calls) = minute::parts(closed);
        let [_, name, user, _] = entry.arguments();
        let arguments = [name, user, minute.cast_signed().into(), calls.cast_signed().into()];
        run("SELECT true FROM _nexus_hub.record_rate_limit_window($1, $2, $3, $4)", &arguments)?;
    }
    entry.store(step.state, minute::end(minute::of(now)))?;
    Ok(step.allowed)
}

/// Charges a call, or tells what would be answered.
pub fn limited(request: &Request<'_>, policy: Policy, now: u64, charge: bool) -> Result<Answer, ErrorReport> {
    let entry = Entry::text(request);
    if !charge && identity::on_standby() {
        return Err(cannot_write());
    }
    if !charge {
        return Ok(policy.judge(entry.peek()?, now, request.cost));
    }
    begin()?;
    let answer = policy.judge(entry.lock()?, now, request.cost);
    if answer.allowed && request.cost > 0 {
        entry.store(answer.state, answer.state)?;
    }
    Ok(answer)
}

/// Charges all or none.
pub fn limited_together(
    requests: &[Request<'_>],
    charges: &[(usize, i32, Policy)],
    now: u64,
) -> Result<Vec<Answer>, ErrorReport> {
    begin()?;
    // Always locked in the same order, so that nobody waits in a circle.
    let mut order: Vec<_> = (0..charges.len()).collect();
    order.sort_unstable_by_key(|charge| (requests[charges[*charge].0].key, requests[charges[*charge].0].window));
    let mut states = vec![0; charges.len()];
    for charge in order {
        states[charge] = Entry::text(&requests[charges[charge].0]).lock()?;
    }
    let judge = |(place, _, policy): &(usize, i32, Policy), state, is_free: bool| {
        policy.judge(state, now, if is_free { 0 } else { requests[*place].cost })
    };
    let mut answers: Vec<_> = charges.iter().zip(&states).map(|(charge, state)| judge(charge, *state, false)).collect();
    if answers.iter().all(|answer| answer.allowed) {
        for ((place, ..), answer) in charges.iter().zip(&answers) {
            Entry::text(&requests[*place]).store(answer.state, answer.state)?;
        }
    } else {
        for ((charge, state), answer) in charges.iter().zip(&states).zip(&mut answers) {
            if answer.allowed {
                *answer = judge(charge, *state, true);
            }
        }
    }
    Ok(answers)
}

/// Forgets a text's state, under all windows.
pub fn forget(key: &str) -> Result<bool, ErrorReport> {
    begin()?;
    run("SELECT _nexus_hub.forget_rate_limit_state($1)", &[key.into()]).map(|found| found == Some(true))
}

/// Takes back the calls of the running minute.
pub fn forget_minute(server: &str, user: Option<&[u8; 16]>, now: u64) -> Result<bool, ErrorReport> {
    begin()?;
    let entry = Entry::server(server, user);
    let state = entry.lock()?;
    if minute::is_over(state, minute::of(now)) || minute::parts(state).1 == 0 {
        return Ok(false);
    }
    entry.store(minute::emptied(state), minute::end(minute::of(now)))?;
    Ok(true)
}
