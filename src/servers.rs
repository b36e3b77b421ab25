//! Servers: what add_server and update_server need beyond SQL, and how a config is read back for the worker.

use crate::audit::{self, Outcome};
use crate::net::endpoint::Endpoint;
use crate::net::outbound;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::guc;
use crate::vault;
use pgrx::prelude::*;
use reqwest::Url;
use std::cell::OnceCell;

const MAX_SERVER_ID_LENGTH: usize = 200;
const MAX_CONFIG_BYTES: usize = 64 * 1024;

/// The owner of a new server or job; see the function's COMMENT.
#[pg_extern(sql = false)]
fn owner(
    user_id: Option<pgrx::Uuid>,
    caller: Option<pgrx::Uuid>,
    bound: bool,
    required: bool,
) -> Result<Option<pgrx::Uuid>, ErrorReport> {
    let owner = user_id.or(caller);
    if bound && owner.is_some() && owner != caller {
        // Servers need an owner, jobs do not.
        if required {
            audit::note(audit::Kind::Change, Some("server"), Outcome::Refused);
        }
        return Err(error(Kind::NotAllowed, "p_user_id is not the caller's own")
            .set_hint("Leave p_user_id NULL, or act as service_role."));
    }
    if owner.is_none() && (required || bound) {
        return Err(error(Kind::BadArgument, "the owner is not known")
            .set_detail("p_user_id is NULL, and the caller has no user id of its own.")
            .set_hint(
                "Pass p_user_id, or call with the setting request.jwt.claims holding a \"sub\" that is a uuid.",
            ));
    }
    Ok(owner)
}

/// Raises the error of a server that is there already.
#[pg_extern(sql = false)]
fn server_exists(server_id: Option<&str>) -> Result<Option<pgrx::Uuid>, ErrorReport> {
    let name = server_id.unwrap_or_default();
    Err(error(Kind::Duplicate, format!("the user has a server \"{name}\" already"))
        .set_hint("update_server changes it; list_servers shows its id."))
}

/// Its argument, if it is fit to be a server's id.
#[pg_extern(sql = false)]
fn server_id(server_id: Option<&str>) -> Result<String, ErrorReport> {
    match server_id {
        Some(id) if (1..=MAX_SERVER_ID_LENGTH).contains(&id.chars().count()) => Ok(id.to_owned()),
        other => Err(error(
            Kind::BadArgument,
            format!(
                "p_server_id must have 1 to {MAX_SERVER_ID_LENGTH} characters, not {}",
                other.map_or(0, |id| id.chars().count())
            ),
        )
        .set_hint("It is the name that jobs use as server_id, such as \"github\".")),
    }
}

/// Checks a config and encrypts it, so that only the ciphertext ever reaches a table.
#[pg_extern(sql = false)]
fn seal_server_config(config: Option<&str>) -> Result<Vec<u8>, ErrorReport> {
    let text = config.unwrap_or("null");
    if text.len() > MAX_CONFIG_BYTES {
        return Err(error(
            Kind::TooLarge,
            format!("the server config has {} bytes, and at most {MAX_CONFIG_BYTES} are allowed", text.len()),
        ));
    }
    let endpoint = Endpoint::parse(text).map_err(|problem| {
        error(Kind::BadArgument, format!("bad server config: {problem}")).set_hint(
            "A config is {\"url\": \"https://host/mcp\", \"headers\": {\"Authorization\": \"Bearer …\"}, \"timeout_ms\": 30000}; only url is required.",
        )
    })?;
    check_egress(&endpoint.url)?;
    vault::seal(text, None)
}

/// Raises an error for a URL that the egress policy denies, as far as that can be told without resolving a name.
pub fn check_egress(url: &Url) -> Result<(), ErrorReport> {
    match outbound::refusal(&guc::egress_policy(), url) {
        None => Ok(()),
        Some(what) => Err(error(Kind::NotAllowed, format!("the egress policy does not allow {what}"))
            .set_hint("A superuser opens hosts, addresses and networks with the setting nexus_hub.egress_allow.")),
    }
}

/// What claim_jobs found of a job's server.
#[derive(Clone, Debug, Default)]
pub struct ServerRow {
    pub user_config: Option<Vec<u8>>,
    pub user_enabled: Option<bool>,
    pub system_config: Option<String>,
    pub system_enabled: Option<bool>,
    pub user_rate_limit: Option<i32>,
    pub system_rate_limit: Option<i32>,
    /// What the config says, for all jobs of a batch that go there.
    pub endpoint: OnceCell<Result<Endpoint, String>>,
}

impl ServerRow {
    /// Whether the server is the user's own.
    pub fn is_users_own(&self) -> bool {
        self.user_enabled == Some(true)
    }

    /// Requests a minute that its row allows a user's jobs; `None`: any number.
    pub fn rate_limit(&self) -> Option<i32> {
        if self.is_users_own() {
            return self.user_rate_limit;
        }
        self.system_rate_limit.filter(|_| self.system_enabled == Some(true))
    }

    /// The server that jobs with this server id go to, its placeholders not filled in. The error is for the job's row.
    pub fn endpoint(&self, server_id: &str) -> Result<&Endpoint, String> {
        self.endpoint.get_or_init(|| resolve(server_id, self)).as_ref().map_err(String::clone)
    }
}

/// The user's own server if enabled, else the system's if enabled.
fn resolve(server_id: &str, row: &ServerRow) -> Result<Endpoint, String> {
    let bad_config = |problem: String| format!("the config of server \"{server_id}\" cannot be used: {problem}");
    if row.is_users_own() {
        let sealed = row.user_config.as_deref().ok_or_else(|| bad_config("it is missing".into()))?;
        // Without the HINT, which is for the one who runs the server.
        let text = vault::open(sealed, None).map_err(|report| bad_config(report.message().to_owned()))?;
        return Endpoint::parse(&text).map_err(bad_config);
    }
    if row.system_enabled == Some(true) {
        let text = row.system_config.as_deref().unwrap_or_default();
        return Endpoint::parse(text).map_err(bad_config);
    }
    if row.user_enabled.is_some() || row.system_enabled.is_some() {
        return Err(format!("the server \"{server_id}\" is disabled"));
    }
    Err(format!("there is no server \"{server_id}\" for this user: add it with add_server, or check the name"))
}
