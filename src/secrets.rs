//! Named secrets: what their SQL functions check, and how the worker opens them.

use crate::domain::placeholder::{self, MAX_NAME_LENGTH};
use crate::domain::secret::Secret;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::vault;
use pgrx::prelude::*;
use uuid::Uuid;

const MAX_VALUE_LENGTH: usize = 10_000;

/// Raises an error when a name or a value is not fit to be a secret's. Neither is quoted: they may have been mixed up.
#[pg_extern(sql = false)]
fn check_secret(name: Option<&str>, value: Option<&str>) -> Result<(), ErrorReport> {
    if !name.is_some_and(placeholder::is_name) {
        return Err(error(
            Kind::BadArgument,
            format!("p_name must have 1 to {MAX_NAME_LENGTH} letters, digits, \"_\", \".\" and \"-\", and no other characters"),
        )
        .set_hint("It is what placeholders call the secret, such as \"github_token\" in {{secret:github_token}}."));
    }
    let value = value.unwrap_or_default();
    if value.is_empty() {
        return Err(error(Kind::BadArgument, "p_value is empty")
            .set_hint("Pass the secret itself; delete_secret takes one away."));
    }
    let length = value.chars().count();
    if length > MAX_VALUE_LENGTH {
        return Err(error(
            Kind::TooLarge,
            format!("p_value has {length} characters, and at most {MAX_VALUE_LENGTH} are allowed"),
        ));
    }
    if value.chars().any(char::is_control) {
        return Err(error(Kind::BadArgument, "p_value has control characters")
            .set_hint("It will be sent in a header or a URL: pass it without the end of line it was read with."));
    }
    Ok(())
}

/// Encrypts a secret's value.
#[pg_extern(sql = false)]
fn seal_secret(value: &str, context: &str) -> Result<Vec<u8>, ErrorReport> {
    vault::seal(value, Some(context))
}

/// Raises the error of a secret that is there already.
#[pg_extern(sql = false)]
fn secret_exists(name: Option<&str>) -> Result<Option<pgrx::Uuid>, ErrorReport> {
    let name = name.unwrap_or_default();
    Err(error(Kind::Duplicate, format!("there is a secret \"{name}\" already"))
        .set_hint("update_secret changes its value; list_secrets shows whose it is."))
}

/// A secret that a job names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wanted {
    pub user: Option<Uuid>,
    /// Where the user has none, the shared one is used.
    pub may_be_shared: bool,
    pub name: String,
}

/// A secret as it is stored.
#[derive(Clone, Debug)]
pub struct Sealed {
    pub value: Vec<u8>,
    pub context: String,
}

/// The secret that a job has named, opened. The error is for the job's row.
pub fn open(wanted: &Wanted, found: Option<Sealed>) -> Result<Secret, String> {
    let name = &wanted.name;
    let Some(sealed) = found else {
        return Err(match (wanted.user, wanted.may_be_shared) {
            (Some(_), false) => format!(
                "the user has no secret \"{name}\", and in a user's own server shared ones are not used: add it with create_secret"
            ),
            (Some(_), true) => {
                format!("there is no secret \"{name}\", the user's own or shared: add it with create_secret")
            }
            (None, _) => format!("there is no shared secret \"{name}\": add it with create_secret, as service_role"),
        });
    };
    // Without the HINT, which is for the one who runs the server.
    vault::open(&sealed.value, Some(&sealed.context)).map(Secret::from).map_err(|report| {
        format!("the secret \"{name}\" cannot be used: {}; update_secret sets it anew", report.message())
    })
}
