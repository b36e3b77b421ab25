//! Rate limits of PostgREST's requests: what the answer to one has to say of them.

use super::{answer, bad, limited_together};
use crate::domain::rate::fields::{self, MAX_NAME, Quota};
use crate::pg::error::ErrorReport;
use pgrx::prelude::*;

/// Charges a request to several policies or to none; see the function's COMMENT.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn limit_request(
    policies: Option<Vec<Option<String>>>,
    keys: Option<Vec<Option<String>>>,
    limits: Option<Vec<Option<i32>>>,
    windows: Option<Vec<Option<i32>>>,
    costs: Option<Vec<Option<i32>>>,
    bursts: Option<Vec<Option<i32>>>,
) -> Result<
    TableIterator<
        'static,
        (
            name!(allowed, bool),
            name!(policy_field, String),
            name!(limit_field, String),
            name!(retry_after, Option<i64>),
            name!(details, String),
        ),
    >,
    ErrorReport,
> {
    let keys = answer::keys(keys)?;
    let names = names(policies, keys.len())?;
    let requests = answer::requests(&keys, limits, windows, costs, bursts)?;
    let rows = limited_together(&requests)?;
    let quotas: Vec<_> = names
        .iter()
        .zip(&requests)
        .zip(&rows)
        .map(|((name, request), row)| {
            let reset = (row.limit > 0).then_some(row.reset);
            Quota { name, limit: row.limit, window: request.window, remaining: row.remaining, reset }
        })
        .collect();
    let denied: Vec<_> = quotas.iter().zip(&rows).filter(|(_, row)| !row.allowed).collect();
    // Until all of them would allow it; where one never will, there is no such time.
    let retry_after = denied.iter().map(|(_, row)| row.retry_after).collect::<Option<Vec<_>>>();
    let retry_after = retry_after.and_then(|times| times.into_iter().map(fields::whole_seconds).max());
    let details: Vec<_> = denied
        .iter()
        .map(|(Quota { name, limit, window, .. }, _)| {
            let unit = if *window == 1 { "second" } else { "seconds" };
            format!("policy \"{name}\" allows {} in {window} {unit}", limit.max(&0))
        })
        .collect();
    let row = (
        denied.is_empty(),
        fields::policies(&quotas),
        fields::limits(&quotas),
        retry_after.map(|time| time.max(1)),
        details.join("; "),
    );
    Ok(TableIterator::once(row))
}

/// Names of so many policies, each another one.
fn names(policies: Option<Vec<Option<String>>>, number: usize) -> Result<Vec<String>, ErrorReport> {
    const HINT: &str = "Pass a name for each key, such as 'burst': clients see it in the answer.";
    let policies = policies.ok_or_else(|| bad("p_policies is NULL", HINT))?;
    if policies.len() != number {
        return Err(bad(format!("p_policies has {} elements, and p_keys has {number}", policies.len()), HINT));
    }
    let mut names: Vec<String> = Vec::with_capacity(number);
    for name in policies {
        let name = name.ok_or_else(|| bad("an element of p_policies is NULL", HINT))?;
        if !fields::is_name(&name) {
            let message = "an element of p_policies is not fit to be a policy's name";
            return Err(bad(message, "A name has 1 to 64 printable characters of ASCII."));
        }
        if names.contains(&name) {
            return Err(bad(format!("p_policies has \"{name}\" twice"), "Give each policy a name of its own."));
        }
        names.push(name);
    }
    Ok(names)
}

const _: () = assert!(MAX_NAME == 64, "the HINT says so");
