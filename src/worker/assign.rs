//! From a claimed job to the request that the network thread makes, and from its end to what is written.

use super::fill::Secrets;
use crate::domain::backoff;
use crate::domain::job::JobType;
use crate::domain::schedule::{Rate, Route};
use crate::domain::secret::Secret;
use crate::jobs::queue::{ClaimedJob, Completion};
use crate::net::endpoint;
use crate::net::http::HttpCall;
use crate::net::mcp::McpCall;
use crate::net::template::Hidden;
use crate::net::{Ending, Request, Retry, Work};
use crate::pg::guc::WorkerSettings;
use crate::servers::ServerRow;
use reqwest::Url;
use serde_json::{Value, json, value::RawValue};
use std::time::Duration;
use uuid::Uuid;

/// The executor that runs MCP jobs in edge mode, or why it cannot.
#[derive(Clone, Debug)]
pub struct Edge {
    url: Url,
    authorization: Secret,
}

impl Edge {
    /// The executor that the settings `app.edge_function_url` and `app.service_role_key` name.
    pub fn new(url: &str, key: &str) -> Result<Self, String> {
        if url.is_empty() || key.is_empty() {
            return Err(
                "nexus_hub.executor is edge, but app.edge_function_url or app.service_role_key is not set".into()
            );
        }
        let url = endpoint::parse_url(&format!("{}/internal/job-executor", url.trim_end_matches('/')))
            .map_err(|problem| format!("app.edge_function_url cannot be used: {problem}"))?;
        let authorization = Secret::new(format!("Bearer {key}"));
        if endpoint::sensitive(&authorization).is_none() {
            return Err("app.service_role_key has characters that are not allowed in a header".into());
        }
        Ok(Self { url, authorization })
    }

    /// Where all MCP jobs go.
    pub fn route(&self) -> Route {
        // Rate limits are the executor's business, which has check_rate_limit for them.
        Route { host: endpoint::authority(&self.url), server: None, rate: Rate::Unmetered }
    }
}

/// Where the jobs of a server go; `None` when that cannot be told.
pub fn route(user: Option<u128>, server_id: &str, row: &ServerRow) -> Option<Route> {
    let endpoint = row.endpoint(server_id).ok()?;
    // A server of everybody's has one cap for all of them.
    let owner = user.filter(|_| row.is_users_own()).map(|user| Uuid::from_u128(user).to_string()).unwrap_or_default();
    let cap = endpoint.max_in_flight.unwrap_or(usize::MAX);
    let server = Some((format!("{owner}/{server_id}"), cap));
    let rate = Rate::Metered(row.rate_limit());
    Some(Route { host: endpoint::authority(&endpoint.url), server, rate })
}

/// Attempts that a job may have in all.
pub fn max_attempts(job: &ClaimedJob) -> i32 {
    job.max_attempts.unwrap_or_else(|| JobType::parse(&job.job_type).map_or(1, JobType::max_attempts))
}

/// The request of a job, or why there can't be one.
pub fn request(
    job: ClaimedJob,
    lease: Uuid,
    default_timeout: Duration,
    edge: Option<&Result<Edge, String>>,
    secrets: &Secrets,
) -> Result<Request, String> {
    let kind = JobType::parse(&job.job_type).ok_or_else(|| format!("unknown job type \"{}\"", job.job_type))?;
    if kind == JobType::HttpRequest {
        let call = HttpCall::parse(&job.params).map_err(|problem| format!("bad request: {problem}"))?;
        let timeout = job.timeout.or(call.timeout).unwrap_or(default_timeout);
        let Some(template) = call.template() else {
            return Ok(Request { job: job.id, lease, timeout, work: Work::Http(call), hidden: Hidden::new() });
        };
        let mut filled = secrets.fill(&job, template, call.headers())?;
        let hidden = std::mem::take(&mut filled.hidden);
        return Ok(Request { job: job.id, lease, timeout, work: Work::Http(call.to(filled)), hidden });
    }
    if let Some(edge) = edge {
        let edge = edge.as_ref().map_err(String::clone)?;
        let timeout = job.timeout.unwrap_or(default_timeout);
        let call = HttpCall::hand_over(edge.url.clone(), edge.authorization.clone(), edge_body(&job)?);
        return Ok(Request { job: job.id, lease, timeout, work: Work::Http(call), hidden: Hidden::new() });
    }
    // A system server of the same name would answer for it.
    if kind == JobType::ServerSync && job.user_id.is_some() && !job.server.is_users_own() {
        return Err(format!("the server \"{}\" is disabled or gone", job.server_id.unwrap_or_default()));
    }
    let mut endpoint = job.server.endpoint(job.server_id.as_deref().unwrap_or_default())?.clone();
    let mut hidden = Hidden::new();
    if let Some(template) = endpoint.template.take() {
        let filled = secrets.fill(&job, &template, &endpoint.headers)?;
        (endpoint.url, endpoint.headers, hidden) = (filled.url, filled.headers, filled.hidden);
    }
    let tool_name = job.tool_name;
    let name = || tool_name.clone().ok_or_else(|| "the job has no tool_name".to_owned());
    let call = match kind {
        JobType::ToolInvoke => McpCall::Tool { name: name()?, arguments: job.params },
        JobType::PromptExecute => McpCall::Prompt { name: name()?, arguments: job.params },
        JobType::ServerSync => McpCall::Catalogue,
        JobType::ResourceFetch | JobType::HttpRequest => {
            let params = endpoint::members(&job.params, &["uri"])?.0;
            let uri = params.get("uri").and_then(Value::as_str);
            let uri = uri.ok_or("the job's params have no \"uri\" that is a string")?;
            McpCall::Resource { uri: uri.to_owned() }
        }
    };
    let timeout = job.timeout.or(endpoint.timeout).unwrap_or(default_timeout);
    Ok(Request { job: job.id, lease, timeout, work: Work::Mcp { endpoint, call }, hidden })
}

/// What the executor is sent. The arguments go as they stand in the job.
fn edge_body(job: &ClaimedJob) -> Result<String, String> {
    let params: Box<RawValue> =
        serde_json::from_str(&job.params).map_err(|_| "the job's params cannot be read".to_owned())?;
    let head = json!({
        "job_id": job.id.to_string(),
        "job_type": job.job_type,
        "server_id": job.server_id,
        "tool_name": job.tool_name,
        "user_id": job.user_id.map(|user| user.to_string()),
    });
    let head = head.to_string();
    Ok(format!("{},\"params\":{}}}", head.trim_end_matches('}'), params.get()))
}

/// What is to be written of an attempt: the job's end, or when it is tried again.
pub fn completion(
    job: Uuid,
    lease: Uuid,
    kind: Option<JobType>,
    ending: Ending,
    (attempts, max_attempts): (i32, i32),
    settings: &WorkerSettings,
    jitter: f64,
) -> Completion {
    let delay = |jitter| {
        let attempts = attempts.max(1).unsigned_abs();
        backoff::delay(attempts, settings.retry_base_delay, settings.retry_max_delay, jitter)
    };
    let retry_in = match ending.retry {
        _ if attempts >= max_attempts => None,
        Retry::Never => None,
        Retry::Later => Some(delay(jitter)),
        // Never at once, even where the server says so.
        Retry::After(time) => Some(time.min(settings.retry_max_delay).max(delay(0.0))),
    };
    let is_sync = kind == Some(JobType::ServerSync);
    Completion { job, lease, is_sync, verdict: ending.verdict, http_status: ending.http_status, retry_in }
}
