//! What a job is, and whether its fields fit its type.

/// The kinds of job a worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobType {
    ToolInvoke,
    ResourceFetch,
    PromptExecute,
    /// Lists what a server offers, for the caches.
    ServerSync,
    HttpRequest,
}

impl JobType {
    /// The name of the type that is no MCP call.
    pub const HTTP_REQUEST: &str = "http_request";

    /// The type of that name, as the column `job_type` holds it.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "tool_invoke" => Some(Self::ToolInvoke),
            "resource_fetch" => Some(Self::ResourceFetch),
            "prompt_execute" => Some(Self::PromptExecute),
            "server_sync" => Some(Self::ServerSync),
            Self::HTTP_REQUEST => Some(Self::HttpRequest),
            _ => None,
        }
    }

    /// Attempts that are made at most, unless the job says: a tool call may not be one to be made twice.
    pub fn max_attempts(self) -> i32 {
        match self {
            Self::HttpRequest => 5,
            Self::ResourceFetch | Self::PromptExecute | Self::ServerSync => 3,
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

/// What the names of a job's fields begin with in texts: those of its columns, or those of a function's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    Columns,
    Arguments,
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Arguments { "p_" } else { "" })
    }
}

/// Checks a job's options.
pub fn check_options(names: Names, options: &Options<'_>) -> Result<(), Misfit> {
    let outside =
        |value: Option<i32>, range: std::ops::RangeInclusive<i32>| value.filter(|value| !range.contains(value));
    let fault = |problem: String, advice| Err(Misfit { problem, advice });
    if let Some(value) = outside(options.priority, 1..=9) {
        return fault(
            format!("{names}priority must be between 1 and 9, not {value}"),
            "1 is first, 5 is usual, 9 is last.",
        );
    }
    if let Some(value) = outside(options.timeout_ms, 1..=3_600_000) {
        return fault(
            format!("{names}timeout_ms must be between 1 and 3600000, not {value}"),
            "It is the time an attempt may take in all, in milliseconds.",
        );
    }
    if let Some(value) = outside(options.max_attempts, 1..=100) {
        return fault(
            format!("{names}max_attempts must be between 1 and 100, not {value}"),
            "1 means that the job is not tried again.",
        );
    }
    match options.idempotency_key.map(|key| key.chars().count()) {
        None | Some(1..=255) => Ok(()),
        Some(length) => fault(
            format!("{names}idempotency_key must have 1 to 255 characters, not {length}"),
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

/// Checks whether a job's fields fit its type. `has_param` tells whether `params` has a key with a text.
pub fn check(
    names: Names,
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
        return misfit(
            format!("{names}params must be a JSON object"),
            "Pass the arguments by name, such as {\"a\": 1}.",
        );
    }
    for (name, value) in [("server_id", server_id), ("tool_name", tool_name)] {
        let length = value.map_or(0, |value| value.chars().count());
        if length > MAX_NAME_LENGTH {
            let problem = format!("{names}{name} must have {MAX_NAME_LENGTH} characters at most, not {length}");
            return misfit(problem, "Pass the name alone; arguments belong into the params.");
        }
    }
    if kind != JobType::HttpRequest && missing(server_id) {
        return misfit(
            format!("{names}server_id is required for this job type"),
            "list_servers() shows the servers there are.",
        );
    }
    match kind {
        JobType::ToolInvoke if missing(tool_name) => {
            misfit(format!("{names}tool_name is required for a tool_invoke job"), "Pass the name of the tool to call.")
        }
        JobType::PromptExecute if missing(tool_name) => {
            misfit(format!("{names}tool_name is required for a prompt_execute job"), "Pass the name of the prompt.")
        }
        JobType::ResourceFetch if !has_param("uri") => misfit(
            format!("{names}params has no \"uri\" that is a string"),
            "A resource_fetch job takes {\"uri\": \"…\"}.",
        ),
        JobType::HttpRequest if !has_param("url") => misfit(
            format!("{names}params has no \"url\" that is a string"),
            "An http_request job takes {\"url\": \"…\", \"method\": \"GET\", …}.",
        ),
        JobType::ServerSync if names == Names::Arguments => {
            misfit("server_sync jobs are not made by hand", "Call sync_server(p_server_ref_id).")
        }
        _ => Ok(kind),
    }
}

/// Whether there is such a status, and what else a job has fits it: when it was started, when it ended, the lease that
/// it is held under, and a result or an error.
pub fn is_state(status: &str, started: bool, ended: bool, leased: bool, has_outcome: bool) -> bool {
    match status {
        "pending" => !started && !ended && !leased && !has_outcome,
        "running" => started && !ended && !has_outcome,
        "completed" | "failed" | "cancelled" => ended && !leased,
        _ => false,
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
        assert_eq!(
            check(Names::Arguments, Some("tool_invoke"), Some("s"), Some("t"), true, |_| false),
            Ok(JobType::ToolInvoke)
        );
        assert_eq!(
            check(Names::Arguments, Some("prompt_execute"), Some("s"), Some("t"), true, |_| false),
            Ok(JobType::PromptExecute)
        );
        assert_eq!(
            check(Names::Arguments, Some("resource_fetch"), Some("s"), None, true, |key| key == "uri"),
            Ok(JobType::ResourceFetch)
        );
        assert_eq!(
            check(Names::Arguments, Some("http_request"), None, None, true, |key| key == "url"),
            Ok(JobType::HttpRequest)
        );
    }

    #[test]
    fn options_out_of_range_are_named_with_their_value() {
        let problem = |options: Options<'_>| {
            check_options(Names::Arguments, &options).err().map(|misfit| misfit.problem).unwrap_or_default()
        };
        let long = "x".repeat(256);
        assert_eq!(problem(Options::default()), "");
        assert!(problem(Options { priority: Some(0), ..Options::default() }).ends_with("between 1 and 9, not 0"));
        assert!(problem(Options { timeout_ms: Some(-1), ..Options::default() }).ends_with("not -1"));
        assert!(problem(Options { max_attempts: Some(101), ..Options::default() }).ends_with("not 101"));
        assert!(problem(Options { idempotency_key: Some(""), ..Options::default() }).ends_with("not 0"));
        assert!(problem(Options { idempotency_key: Some(&long), ..Options::default() }).ends_with("not 256"));
    }

    #[test]
    fn columns_are_named_as_they_are() {
        let options = Options { priority: Some(0), ..Options::default() };
        let problem_of = |names| check_options(names, &options).err().map(|misfit| misfit.problem);
        assert_eq!(problem_of(Names::Columns).as_deref(), Some("priority must be between 1 and 9, not 0"));
        assert_eq!(problem_of(Names::Arguments).as_deref(), Some("p_priority must be between 1 and 9, not 0"));
    }

    #[test]
    fn a_state_is_what_the_worker_and_the_functions_write() {
        assert!(is_state("pending", false, false, false, false));
        assert!(is_state("running", true, false, true, false) && is_state("running", true, false, false, false));
        for ended in ["completed", "failed", "cancelled"] {
            assert!(is_state(ended, true, true, false, true) && is_state(ended, false, true, false, false));
            assert!(!is_state(ended, true, false, false, false) && !is_state(ended, true, true, true, false));
        }
        for (started, ended, leased, told) in [
            (true, false, false, false),
            (false, true, false, false),
            (false, false, true, false),
            (false, false, false, true),
        ] {
            assert!(!is_state("pending", started, ended, leased, told));
        }
        for (started, ended, told) in [(false, false, false), (true, true, false), (true, false, true)] {
            assert!(!is_state("running", started, ended, true, told));
        }
        assert!(!is_state("paused", false, false, false, false));
    }

    #[test]
    fn every_misfit_says_what_is_wrong() {
        assert_eq!(
            problem(check(Names::Arguments, Some("dance"), None, None, true, |_| true)),
            "unknown job type \"dance\""
        );
        assert_eq!(problem(check(Names::Arguments, None, None, None, true, |_| true)), "unknown job type \"NULL\"");
        assert!(
            problem(check(Names::Arguments, Some("tool_invoke"), None, Some("t"), true, |_| true))
                .contains("p_server_id")
        );
        assert!(
            problem(check(Names::Arguments, Some("tool_invoke"), Some("s"), Some(""), true, |_| true))
                .contains("p_tool_name")
        );
        assert!(
            problem(check(Names::Arguments, Some("prompt_execute"), Some("s"), None, true, |_| true))
                .contains("p_tool_name")
        );
        assert!(
            problem(check(Names::Arguments, Some("resource_fetch"), Some("s"), None, true, |_| false)).contains("uri")
        );
        assert!(problem(check(Names::Arguments, Some("http_request"), None, None, true, |_| false)).contains("url"));
        assert!(
            problem(check(Names::Arguments, Some("http_request"), None, None, false, |_| true)).contains("JSON object")
        );
    }
}
