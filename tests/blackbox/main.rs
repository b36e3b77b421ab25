//! Black-box tests: real clusters, real commits, real kills. `make test` installs what they need.

mod architecture;
mod audit;
mod cache;
mod cleanup;
mod edge;
mod egress;
mod guide;
mod handover;
mod health;
mod hostile;
mod http;
mod install;
mod job_errors;
mod job_limits;
mod jobs;
mod lanes;
mod leaks;
mod mcp;
mod metrics;
mod online_rotation;
mod rate_limits;
mod realtime;
// PostgREST's program is for these machines.
mod reference;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod request_limits;
mod retries;
mod rotation;
mod secrets;
mod sql_suites;
mod storm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod supabase;
mod support;
mod upgrade;
mod vault;
mod vault_keys;
mod worker;
