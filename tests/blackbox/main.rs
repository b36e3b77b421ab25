//! Black-box tests: real clusters, real commits, real kills. `make test` installs what they need.

mod architecture;
mod http;
mod install;
mod job_errors;
mod jobs;
mod mcp;
mod sql_suites;
mod support;
mod vault;
mod worker;
