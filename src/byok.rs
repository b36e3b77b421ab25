//! Users' own API keys: what their SQL functions check, and the errors they raise. Nothing here sees a stored key.

use crate::audit::{self, Outcome};
use crate::domain::provider::{self, GATEWAY, Model, OPENROUTER, SERVICES};
use crate::pg::error::{ErrorReport, Kind, error};
use pgrx::prelude::*;
use reqwest::Url;

const MAX_KEY_LENGTH: usize = 10_000;

/// Raises an error for callers that row-level security holds; see the function's COMMENT.
#[pg_extern(sql = false)]
fn require_service_role(bound: bool) -> Result<(), ErrorReport> {
    if bound {
        return Err(error(Kind::NotAllowed, "Must be called as service role")
            .set_hint("Call it as the role service_role: over PostgREST, with a JWT whose role is service_role."));
    }
    Ok(())
}

/// The same, noted in the audit for a user's key; see the function's COMMENT.
#[pg_extern(sql = false)]
fn require_service_role_for(
    bound: bool,
    kind: Option<&str>,
    user_id: Option<pgrx::Uuid>,
    service: Option<&str>,
) -> Result<(), ErrorReport> {
    let required = require_service_role(bound);
    if required.is_err()
        && let Some(kind) = kind.and_then(audit::Kind::named)
    {
        let user = user_id.map_or("team".into(), |user| uuid::Uuid::from_bytes(*user.as_bytes()).to_string());
        // What is no service may be a key, where the arguments were mixed up.
        let object = format!("{user}/{}", service.and_then(provider::service).unwrap_or("?"));
        audit::note(kind, Some(&object), Outcome::Refused);
    }
    required
}

/// A service's name as it is stored.
#[pg_extern(sql = false)]
fn api_service(service: Option<&str>) -> Result<&'static str, ErrorReport> {
    // Not quoted: it may be a key, where the arguments were mixed up.
    service.and_then(provider::service).ok_or_else(|| {
        error(Kind::BadArgument, "p_service is not a service that keys are kept for")
            .set_hint(format!("The services are {}.", SERVICES.join(", ")))
    })
}

/// Its argument, if it can be an API key.
#[pg_extern(sql = false)]
fn api_key(key: Option<&str>) -> Result<&str, ErrorReport> {
    let key = key.unwrap_or_default();
    if key.trim().is_empty() {
        return Err(error(Kind::BadArgument, "p_api_key is empty")
            .set_hint("Pass the key that the service gave out; delete_user_api_key takes a key away."));
    }
    let length = key.chars().count();
    if length > MAX_KEY_LENGTH {
        return Err(error(
            Kind::TooLarge,
            format!("p_api_key has {length} characters, and at most {MAX_KEY_LENGTH} are allowed"),
        ));
    }
    if key.chars().any(char::is_control) {
        return Err(error(Kind::BadArgument, "p_api_key has control characters")
            .set_hint("It will be sent in a header: pass it without the end of line it was read with."));
    }
    Ok(key)
}

/// A gateway's base URL without blanks around it, if it can be one.
#[pg_extern(sql = false)]
fn gateway_base_url(base_url: Option<&str>) -> Result<&str, ErrorReport> {
    let url = base_url.unwrap_or_default().trim();
    let problem = provider::base_url_problem(url)
        .or_else(|| Url::parse(url).err().map(|problem| format!("it is not a valid URL: {problem}")));
    problem.map_or(Ok(url), |problem| {
        Err(error(Kind::BadArgument, format!("bad base URL: {problem}"))
            .set_hint("A base URL is such as \"https://gateway.example/v1\"; its key goes into insert_user_api_key."))
    })
}

fn known(model: Option<&str>) -> Result<Model<'_>, ErrorReport> {
    model.and_then(Model::parse).ok_or_else(|| {
        error(Kind::BadArgument, "the provider of p_model is not known").set_hint(
            "Put it in front, as in openai/gpt-4o or meta-llama/llama-4 (by way of OpenRouter); gpt-…, o3…, claude… and grok… need none.",
        )
    })
}

/// Whose a model is.
#[pg_extern(sql = false)]
fn model_provider(model: Option<&str>) -> Result<&'static str, ErrorReport> {
    known(model).map(|model| model.provider)
}

/// What a service calls a model.
#[pg_extern(sql = false)]
fn model_name(model: Option<&str>, service: &str) -> Result<String, ErrorReport> {
    known(model).map(|model| model.name_at(service))
}

/// Raises the error of a model that nobody's key is for.
#[pg_extern(sql = false)]
fn no_api_key(provider: &str, user_id: Option<pgrx::Uuid>, may_fall_back: bool) -> Result<Option<String>, ErrorReport> {
    let add = |whose: &str| format!("insert_user_api_key({whose}, '{provider}', …)");
    let (message, hint) = match user_id.map(|user| format!("'{user}'")) {
        None => (format!("the team has no key for {provider}"), format!("{} adds one", add("NULL"))),
        Some(user) if may_fall_back => (
            format!("neither the user nor the team has a key for {provider}"),
            format!("{} adds the user's, {} the team's", add(&user), add("NULL")),
        ),
        Some(user) => (
            format!("the user has no key for {provider}, and fallback to the team's keys is off"),
            format!("{} adds one, user_settings.allow_gateway_fallback = true allows the team's", add(&user)),
        ),
    };
    let hint = format!(
        "{hint}. A key for {OPENROUTER} serves any model, and so does one for {GATEWAY} once upsert_user_gateway_config has set where it is."
    );
    Err(error(Kind::NotReady, message).set_hint(hint))
}
