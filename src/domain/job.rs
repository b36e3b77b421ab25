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

    /// Attempts that are made at most, unless the job says: a tool call may not be one to be made twice.
    pub fn max_attempts(self) -> i32 {
        match self {
            Self::HttpRequest => 5,
            Self::ResourceFetch | Self::PromptExecute => 3,
            Self::ToolInvoke => 1,
        }
    }
}

/// The options of a job, none of them required.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    pub priority: Option<i32>,
    pub timeout_ms: Option<i32>,
    pub max_attempts: Option<i32>,
    pub idempotency_key: Option<&'a str>,
}

/// The first priority that users may give.
pub const USERS_PRIORITY: i32 = 5;

/// Checks a job's options as the table's constraints do, but with texts that help.
pub fn check_options(options: &Options<'_>) -> Result<(), Misfit> {
    let outside =
        |value: Option<i32>, range: std::ops::RangeInclusive<i32>| value.filter(|value| !range.contains(value));
    let fault = |problem: String, advice| Err(Misfit { problem, advice });
    if let Some(value) = outside(options.priority, 1..=9) {
        return fault(format!("p_priority must be between 1 and 9, not {value}"), "1 is first, 5 is usual, 9 is last.");
    }
    if let Some(value) = outside(options.timeout_ms, 1..=3_600_000) {
        return fault(
            format!("p_timeout_ms must be between 1 and 3600000, not {value}"),
            "It is the time an attempt may take in all, in milliseconds.",
        );
    }
    if let Some(value) = outside(options.max_attempts, 1..=100) {
        return fault(
            format!("p_max_attempts must be between 1 and 100, not {value}"),
            "1 means that the job is not tried again.",
        );
    }
    match options.idempotency_key.map(|key| key.chars().count()) {
        None | Some(1..=255) => Ok(()),
        Some(length) => fault(
            format!("p_idempotency_key must have 1 to 255 characters, not {length}"),
            "Leave it NULL where the job may be made twice.",
        ),
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

/// Characters that a server's or tool's name may have.
const MAX_NAME_LENGTH: usize = 200;

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
    for (name, value) in [("p_server_id", server_id), ("p_tool_name", tool_name)] {
        let length = value.map_or(0, |value| value.chars().count());
        if length > MAX_NAME_LENGTH {
            let problem = format!("{name} must have {MAX_NAME_LENGTH} characters at most, not {length}");
            return misfit(problem, "Pass the name alone; arguments belong into p_params.");
        }
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
    fn options_out_of_range_are_named_with_their_value() {
        let problem =
            |options: Options<'_>| check_options(&options).err().map(|misfit| misfit.problem).unwrap_or_default();
        let long = "x".repeat(256);
        assert_eq!(problem(Options::default()), "");
        assert!(problem(Options { priority: Some(0), ..Options::default() }).ends_with("between 1 and 9, not 0"));
        assert!(problem(Options { timeout_ms: Some(-1), ..Options::default() }).ends_with("not -1"));
        assert!(problem(Options { max_attempts: Some(101), ..Options::default() }).ends_with("not 101"));
        assert!(problem(Options { idempotency_key: Some(""), ..Options::default() }).ends_with("not 0"));
        assert!(problem(Options { idempotency_key: Some(&long), ..Options::default() }).ends_with("not 256"));
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
