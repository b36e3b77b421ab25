//! How long what is of no more use is kept.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::ffi::CStr;
use std::time::Duration;

const DAY: i32 = 24 * 60;

static AUTO_CLEANUP: GucSetting<bool> = GucSetting::<bool>::new(true);
static COMPLETED_MIN: GucSetting<i32> = GucSetting::<i32>::new(7 * DAY);
static ORPHANED_MIN: GucSetting<i32> = GucSetting::<i32>::new(DAY);
static ATTEMPTS_MIN: GucSetting<i32> = GucSetting::<i32>::new(7 * DAY);
static AUDIT_MIN: GucSetting<i32> = GucSetting::<i32>::new(90 * DAY);
static RATE_LIMIT_S: GucSetting<i32> = GucSetting::<i32>::new(86_400);

/// Announces the settings to PostgreSQL.
pub fn register() {
    GucRegistry::define_bool_guc(
        c"nexus_hub.auto_cleanup",
        c"Whether the worker deletes what is older than the settings nexus_hub.*_retention say.",
        c"Off, nothing is deleted but by cleanup_old_job_results, cleanup_job_results_manual, cleanup_vault_audit and cleanup_rate_limit_tracking.",
        &AUTO_CLEANUP,
        GucContext::Suset,
        GucFlags::empty(),
    );
    let minutes =
        |name: &'static CStr, short: &'static CStr, long: &'static CStr, setting: &'static GucSetting<i32>| {
            GucRegistry::define_int_guc(name, short, long, setting, 0, i32::MAX, GucContext::Suset, GucFlags::UNIT_MIN);
        };
    minutes(
        c"nexus_hub.completed_retention",
        c"Time after its end that a completed, failed or cancelled job is kept; 0: for ever.",
        c"",
        &COMPLETED_MIN,
    );
    minutes(
        c"nexus_hub.orphaned_retention",
        c"Time after which a job that nobody runs is an orphan; 0: never.",
        c"The worker ends running jobs that were handed over so long ago, as failed; it leaves pending ones alone, which it will run. cleanup_old_job_results deletes both.",
        &ORPHANED_MIN,
    );
    minutes(
        c"nexus_hub.attempts_retention",
        c"Time that failed attempts are kept; 0: as long as their job.",
        c"",
        &ATTEMPTS_MIN,
    );
    minutes(
        c"nexus_hub.audit_retention",
        c"Time after which the worker deletes entries of vault_audit; 0: never.",
        c"",
        &AUDIT_MIN,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.rate_limit_retention",
        c"How long closed windows stay in rate_limit_tracking.",
        c"",
        &RATE_LIMIT_S,
        60,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
}

/// The settings as they are now. Times in minutes, 0: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Whether the worker deletes anything.
    pub auto_cleanup: bool,
    /// Of jobs that have ended.
    pub completed: i32,
    /// Of jobs that nobody runs.
    pub orphaned: i32,
    /// Of attempts that have failed.
    pub attempts: i32,
    /// Of the vault's audit.
    pub audit: i32,
}

/// `nexus_hub.auto_cleanup` and `nexus_hub.*_retention`.
pub fn settings() -> Retention {
    Retention {
        auto_cleanup: AUTO_CLEANUP.get(),
        completed: COMPLETED_MIN.get(),
        orphaned: ORPHANED_MIN.get(),
        attempts: ATTEMPTS_MIN.get(),
        audit: AUDIT_MIN.get(),
    }
}

/// `nexus_hub.rate_limit_retention`.
pub fn rate_limit_retention() -> Duration {
    Duration::from_secs(RATE_LIMIT_S.get().unsigned_abs().into())
}
