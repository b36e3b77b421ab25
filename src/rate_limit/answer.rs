//! What callers of the limiter ask, and what they are told.

use super::{bad, seconds};
use crate::domain::rate::{Answer, Policy, SECOND};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::limit_row::LimitRow;
use crate::pg::shmem::rates::MAX_POLICIES;

const KEY_HINT: &str = "Pass what is limited, such as 'user:42' or 'user:42 POST /orders'.";

/// Arguments that make sense.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub key: &'a str,
    pub limit: i32,
    pub window: u32,
    pub cost: u32,
    burst: Option<u32>,
}

/// A key that is one.
pub fn key(key: Option<&str>) -> Result<&str, ErrorReport> {
    let key = key.ok_or_else(|| bad("p_key is NULL", KEY_HINT))?;
    if key.is_empty() { Err(bad("p_key is empty", KEY_HINT)) } else { Ok(key) }
}

/// A number that is not below `least`.
fn number(name: &str, value: Option<i32>, least: i32, hint: &str) -> Result<u32, ErrorReport> {
    let value = value.ok_or_else(|| bad(format!("{name} is NULL"), hint))?;
    let fitting = u32::try_from(value).ok().filter(|_| value >= least);
    fitting.ok_or_else(|| bad(format!("{name} is {value}, and must be at least {least}"), hint))
}

impl<'a> Request<'a> {
    /// Checks the arguments of a call.
    pub fn new(
        name: Option<&'a str>,
        limit: Option<i32>,
        window: Option<i32>,
        cost: Option<i32>,
        burst: Option<i32>,
    ) -> Result<Self, ErrorReport> {
        let key = key(name)?;
        let limit = limit.ok_or_else(|| {
            bad("p_limit is NULL", "Pass the number of calls that are allowed in a window; 0 allows none.")
        })?;
        let window = number("p_window_seconds", window, 1, "The window's length in seconds; 60 where it is left out.")?;
        let cost = number("p_cost", cost, 0, "What the call uses up of the limit; 1 where it is left out.")?;
        let burst = burst
            .map(|burst| {
                number("p_burst", Some(burst), 1, "What may be used at once; the limit where it is left out or NULL.")
            })
            .transpose()?;
        let request = Self { key, limit, window, cost, burst };
        request.policy(limit)?;
        Ok(request)
    }

    /// The same, with no cost.
    pub fn free(&self) -> Self {
        Self { cost: 0, ..*self }
    }

    /// The policy under a limit; `None`: it allows nothing.
    pub fn policy(&self, limit: i32) -> Result<Option<Policy>, ErrorReport> {
        let Some(limit) = u32::try_from(limit).ok().filter(|limit| *limit > 0) else { return Ok(None) };
        Policy::new(limit, self.window, self.burst.unwrap_or(limit)).map(Some).ok_or_else(|| {
            bad(
                "the burst takes more than a hundred years to refill",
                "Lower p_burst or p_window_seconds, or raise p_limit.",
            )
        })
    }

    /// The answer where no limit is for it.
    pub fn exempt(&self) -> LimitRow {
        let remaining = self.burst.map_or(self.limit.max(0), |burst| i32::try_from(burst).unwrap_or(i32::MAX));
        LimitRow { allowed: true, limit: self.limit, remaining, retry_after: Some(0.0), reset: 0.0 }
    }

    /// The answer where there was no room for it.
    pub fn when_full(&self, limit: i32, policy: Policy, allows: bool) -> LimitRow {
        let answer = policy.judge(0, 0, self.cost);
        if answer.allowed && allows {
            return row(limit, Answer { reset: 0, ..answer });
        }
        // What costs more than a burst is never allowed.
        let retry_after = answer.allowed.then_some(SECOND);
        row(limit, Answer { allowed: false, remaining: 0, retry_after, reset: SECOND, state: 0 })
    }
}

/// The answer of a limit that allows nothing, ever.
pub fn never(limit: i32) -> LimitRow {
    LimitRow { allowed: false, limit, remaining: 0, retry_after: None, reset: 0.0 }
}

/// An answer as a row.
pub fn row(limit: i32, answer: Answer) -> LimitRow {
    LimitRow {
        allowed: answer.allowed,
        limit,
        remaining: i32::try_from(answer.remaining).unwrap_or(i32::MAX),
        retry_after: answer.retry_after.map(seconds),
        reset: seconds(answer.reset),
    }
}

/// Keys of several policies.
pub fn keys(keys: Option<Vec<Option<String>>>) -> Result<Vec<Option<String>>, ErrorReport> {
    let keys = keys.ok_or_else(|| bad("p_keys is NULL", "Pass the keys as an array, one for each policy."))?;
    if keys.len() > MAX_POLICIES {
        let message = format!("p_keys has {} keys, and at most {MAX_POLICIES} are allowed", keys.len());
        return Err(error(Kind::TooLarge, message));
    }
    Ok(keys)
}

/// One request for each key. Arrays that are left out stand for their function's defaults; no key and window twice.
pub fn requests(
    keys: &[Option<String>],
    limits: Option<Vec<Option<i32>>>,
    windows: Option<Vec<Option<i32>>>,
    costs: Option<Vec<Option<i32>>>,
    bursts: Option<Vec<Option<i32>>>,
) -> Result<Vec<Request<'_>>, ErrorReport> {
    let as_long = |name: &str, array: Option<Vec<Option<i32>>>, default: Option<i32>| {
        let array = array.unwrap_or_else(|| vec![default; keys.len()]);
        if array.len() == keys.len() {
            return Ok(array);
        }
        Err(bad(
            format!("{name} has {} elements, and p_keys has {}", array.len(), keys.len()),
            "The arrays must be of the same length: one element for each policy.",
        ))
    };
    let limits =
        as_long("p_limits", Some(limits.ok_or_else(|| bad("p_limits is NULL", "Pass a limit for each key."))?), None)?;
    let windows = as_long("p_windows_seconds", windows, Some(60))?;
    let costs = as_long("p_costs", costs, Some(1))?;
    let bursts = as_long("p_bursts", bursts, None)?;
    let mut requests = Vec::with_capacity(keys.len());
    for (place, key) in keys.iter().enumerate() {
        let request = Request::new(key.as_deref(), limits[place], windows[place], costs[place], bursts[place])?;
        let is_known = |other: &Request<'_>| other.key == request.key && other.window == request.window;
        if requests.iter().any(is_known) {
            return Err(bad(
                "a key is there twice with the same window",
                "Policies of one key need different windows.",
            ));
        }
        requests.push(request);
    }
    Ok(requests)
}
