//! nexus_hub: the back end of an MCP hub inside PostgreSQL.
//!
//! Floors, imports run downward only: `worker` → the façades `audit`, `byok`, `cache`, `cleanup`, `health`, `jobs`, `metrics`, `rate_limit`, `secrets`, `servers`,
//! `vault` → `net` and `pg` → `domain`.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo))]

mod audit;
mod byok;
mod cache;
mod cleanup;
mod domain;
mod health;
mod jobs;
mod metrics;
mod net;
mod pg;
mod rate_limit;
mod secrets;
mod servers;
mod vault;
mod worker;

use pgrx::prelude::*;

pgrx::pg_module_magic!();

// All SQL is written by hand: pgrx would create its functions in whatever schema comes first in the search path.
extension_sql_file!("../sql/bootstrap.sql", name = "bootstrap", bootstrap);
extension_sql_file!("../sql/audit.sql", name = "audit", requires = ["bootstrap"]);
extension_sql_file!("../sql/vault.sql", name = "vault", requires = ["audit"]);
extension_sql_file!("../sql/servers.sql", name = "servers", requires = ["vault"]);
extension_sql_file!("../sql/secrets.sql", name = "secrets", requires = ["servers"]);
extension_sql_file!("../sql/jobs.sql", name = "jobs", requires = ["secrets"]);
extension_sql_file!("../sql/byok.sql", name = "byok", requires = ["jobs"]);
extension_sql_file!("../sql/columns.sql", name = "columns", requires = ["byok"]);
extension_sql_file!("../sql/keys.sql", name = "keys", requires = ["columns"]);
extension_sql_file!("../sql/rotation.sql", name = "rotation", requires = ["columns"]);
extension_sql_file!("../sql/online_rotation.sql", name = "online_rotation", requires = ["rotation"]);
extension_sql_file!("../sql/rate_limit.sql", name = "rate_limit", requires = ["byok"]);
extension_sql_file!("../sql/request_limit.sql", name = "request_limit", requires = ["rate_limit"]);
extension_sql_file!("../sql/cleanup.sql", name = "cleanup", requires = ["request_limit"]);
extension_sql_file!("../sql/cache.sql", name = "cache", requires = ["cleanup"]);
extension_sql_file!("../sql/health.sql", name = "health", requires = ["cache", "keys"]);
extension_sql_file!("../sql/metrics.sql", name = "metrics", requires = ["health"]);
extension_sql_file!("../sql/backup.sql", name = "backup", requires = ["metrics"]);
extension_sql_file!("../sql/finalize.sql", name = "finalize", finalize);

/// Called by PostgreSQL when it loads the library.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::guc::register();
    pg::app_settings::register();
    rate_limit::register();
    if pg::preloading() {
        pg::shmem::register();
        pg::hooks::register();
        worker::register();
    }
}
