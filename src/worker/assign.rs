//! From a claimed job to the request that the network thread makes.

use crate::domain::job::JobType;
use crate::jobs::queue::ClaimedJob;
use crate::net::endpoint;
use crate::net::http::HttpCall;
use crate::net::mcp::McpCall;
use crate::net::{Request, Work};
use crate::servers;
use serde_json::Value;
use std::time::Duration;

/// The request of a job, or why there can't be one.
pub fn request(job: ClaimedJob, default_timeout: Duration) -> Result<Request, String> {
    let kind = JobType::parse(&job.job_type).ok_or_else(|| format!("unknown job type \"{}\"", job.job_type))?;
    let tool_name = job.tool_name;
    let name = || tool_name.clone().ok_or_else(|| "the job has no tool_name".to_owned());
    let call = match kind {
        JobType::HttpRequest => {
            let call = HttpCall::parse(&job.params).map_err(|problem| format!("bad request: {problem}"))?;
            let timeout = call.timeout.unwrap_or(default_timeout);
            return Ok(Request { job: job.id, lease: job.lease, timeout, work: Work::Http(call) });
        }
        JobType::ToolInvoke => McpCall::Tool { name: name()?, arguments: job.params },
        JobType::PromptExecute => McpCall::Prompt { name: name()?, arguments: job.params },
        JobType::ResourceFetch => {
            let params = endpoint::members(&job.params, &["uri"])?.0;
            let uri = params.get("uri").and_then(Value::as_str);
            let uri = uri.ok_or("the job's params have no \"uri\" that is a string")?;
            McpCall::Resource { uri: uri.to_owned() }
        }
    };
    let endpoint = servers::resolve(job.server_id.as_deref().unwrap_or_default(), &job.server)?;
    let timeout = endpoint.timeout.unwrap_or(default_timeout);
    Ok(Request { job: job.id, lease: job.lease, timeout, work: Work::Mcp { endpoint, call } })
}
