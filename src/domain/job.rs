//! What a job is, and whether its fields fit its type.

/// The kinds of job a worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobType {
    ToolInvoke,
    ResourceFetch,
    PromptExecute,
    HttpRequest,
}

impl JobType {
    /// The type of that name, as the column `job_type` holds it.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "tool_invoke" => Some(Self::ToolInvoke),
            "resource_fetch" => Some(Self::ResourceFetch),
            "prompt_execute" => Some(Self::PromptExecute),
            "http_request" => Some(Self::HttpRequest),
            _ => None,
        }
    }
}

/// What is wrong with a job's fields, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    pub problem: String,
    pub advice: &'static str,
}

fn misfit(problem: impl Into<String>, advice: &'static str) -> Result<JobType, Misfit> {
    Err(Misfit { problem: problem.into(), advice })
}

/// Checks a job's fields as the table's constraints do, but with texts that help. `has_param` tells whether
/// `params` has a key with a text.
pub fn check(
    job_type: Option<&str>,
    server_id: Option<&str>,
    tool_name: Option<&str>,
    params_are_an_object: bool,
    has_param: impl Fn(&str) -> bool,
) -> Result<JobType, Misfit> {
    let Some(kind) = job_type.and_then(JobType::parse) else {
        let given = job_type.unwrap_or("NULL");
        return misfit(
            format!("unknown job type \"{}\"", given.chars().take(50).collect::<String>()),
            "The job types are tool_invoke, resource_fetch, prompt_execute and http_request.",
        );
    };
    let missing = |value: Option<&str>| value.is_none_or(str::is_empty);
    if !params_are_an_object {
        return misfit("p_params must be a JSON object", "Pass the arguments by name, such as {\"a\": 1}.");
    }
    if kind != JobType::HttpRequest && missing(server_id) {
        return misfit("p_server_id is required for this job type", "list_servers() shows the servers there are.");
    }
    match kind {
        JobType::ToolInvoke if missing(tool_name) => {
            misfit("p_tool_name is required for a tool_invoke job", "Pass the name of the tool to call.")
        }
        JobType::PromptExecute if missing(tool_name) => {
            misfit("p_tool_name is required for a prompt_execute job", "Pass the name of the prompt.")
        }
        JobType::ResourceFetch if !has_param("uri") => {
            misfit("p_params has no \"uri\" that is a string", "A resource_fetch job takes {\"uri\": \"…\"}.")
        }
        JobType::HttpRequest if !has_param("url") => misfit(
            "p_params has no \"url\" that is a string",
            "An http_request job takes {\"url\": \"…\", \"method\": \"GET\", …}.",
        ),
        _ => Ok(kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(result: Result<JobType, Misfit>) -> String {
        result.err().map(|misfit| misfit.problem).unwrap_or_default()
    }

    #[test]
    fn fitting_jobs_pass() {
        assert_eq!(check(Some("tool_invoke"), Some("s"), Some("t"), true, |_| false), Ok(JobType::ToolInvoke));
        assert_eq!(check(Some("prompt_execute"), Some("s"), Some("t"), true, |_| false), Ok(JobType::PromptExecute));
        assert_eq!(
            check(Some("resource_fetch"), Some("s"), None, true, |key| key == "uri"),
            Ok(JobType::ResourceFetch)
        );
        assert_eq!(check(Some("http_request"), None, None, true, |key| key == "url"), Ok(JobType::HttpRequest));
    }

    #[test]
    fn every_misfit_says_what_is_wrong() {
        assert_eq!(problem(check(Some("dance"), None, None, true, |_| true)), "unknown job type \"dance\"");
        assert_eq!(problem(check(None, None, None, true, |_| true)), "unknown job type \"NULL\"");
        assert!(problem(check(Some("tool_invoke"), None, Some("t"), true, |_| true)).contains("p_server_id"));
        assert!(problem(check(Some("tool_invoke"), Some("s"), Some(""), true, |_| true)).contains("p_tool_name"));
        assert!(problem(check(Some("prompt_execute"), Some("s"), None, true, |_| true)).contains("p_tool_name"));
        assert!(problem(check(Some("resource_fetch"), Some("s"), None, true, |_| false)).contains("uri"));
        assert!(problem(check(Some("http_request"), None, None, true, |_| false)).contains("url"));
        assert!(problem(check(Some("http_request"), None, None, false, |_| true)).contains("JSON object"));
    }
}
