//! The settings, `nexus_hub.*`: private statics with typed getters.

use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::ffi::CString;
use std::path::PathBuf;
use std::time::Duration;

static VAULT_KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
static MAX_IN_FLIGHT: GucSetting<i32> = GucSetting::<i32>::new(512);
static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256);
static REQUEST_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static MAX_RESPONSE_BYTES: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024 * 1024);
static SESSION_IDLE_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(300_000);
static POLL_INTERVAL_MS: GucSetting<i32> = GucSetting::<i32>::new(10_000);

/// Announces the settings to PostgreSQL. Called once, from `_PG_init`.
pub fn register() {
    GucRegistry::define_string_guc(
        c"nexus_hub.vault_key_file",
        c"File with the vault keys: 64 hex characters a line, the first encrypts, all decrypt.",
        c"Absolute, or relative to the data directory. Refused when readable by group or others. Read again after a configuration reload. Without it the environment variable VAULT_ENCRYPTION_KEY of the server is used.",
        &VAULT_KEY_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_bool_guc(
        c"nexus_hub.enabled",
        c"Whether the worker takes jobs.",
        c"Off, jobs stay pending; what is in flight is finished. ALTER DATABASE ... SET it off before a dump is restored into a copy that must not call anybody.",
        &ENABLED,
        GucContext::Suset,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_in_flight",
        c"Requests that the worker of a database has in flight at most.",
        c"Each needs a file descriptor.",
        &MAX_IN_FLIGHT,
        1,
        100_000,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.batch_size",
        c"Jobs that the worker claims or completes in one transaction at most.",
        c"",
        &BATCH_SIZE,
        1,
        10_000,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.request_timeout",
        c"Time a job may take when neither the job nor its server says.",
        c"",
        &REQUEST_TIMEOUT_MS,
        1,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_response_bytes",
        c"Size of an answer, after decompression, above which a job fails.",
        c"",
        &MAX_RESPONSE_BYTES,
        1024,
        64 * 1024 * 1024,
        GucContext::Sighup,
        GucFlags::UNIT_BYTE,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.session_idle_timeout",
        c"Time after which an MCP session that no job uses is closed.",
        c"",
        &SESSION_IDLE_TIMEOUT_MS,
        1000,
        86_400_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.poll_interval",
        c"Time between two looks of an idle worker at the job table.",
        c"Commits wake the worker at once; this finds what came in without one, such as a prepared transaction.",
        &POLL_INTERVAL_MS,
        100,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    // Misspelt settings in postgresql.conf are reported instead of ignored.
    #[cfg(feature = "pg14")]
    // SAFETY: the prefix is a static C string.
    unsafe {
        pg_sys::EmitWarningsOnPlaceholders(c"nexus_hub".as_ptr());
    }
    #[cfg(not(feature = "pg14"))]
    // SAFETY: the prefix is a static C string.
    unsafe {
        pg_sys::MarkGUCPrefixReserved(c"nexus_hub".as_ptr());
    }
}

/// `nexus_hub.vault_key_file`, NULL and the empty string being the same.
pub fn vault_key_file() -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    VAULT_KEY_FILE
        .get()
        .map(CString::into_bytes)
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path)))
}

/// When this process last read the configuration files: caches of what they name are good until it changes.
pub fn configuration_loaded_at() -> i64 {
    // SAFETY: a plain global of this process, written only by its main thread.
    unsafe { pg_sys::PgReloadTime }
}

/// What the worker goes by: read once per loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerSettings {
    pub enabled: bool,
    pub max_in_flight: usize,
    pub batch_size: usize,
    pub request_timeout: Duration,
    pub max_response_bytes: usize,
    pub session_idle_timeout: Duration,
    pub poll_interval: Duration,
}

/// The worker's settings as they are now.
pub fn worker_settings() -> WorkerSettings {
    let size = |setting: &GucSetting<i32>| usize::try_from(setting.get()).unwrap_or(1);
    let time = |setting: &GucSetting<i32>| Duration::from_millis(setting.get().max(1) as u64);
    WorkerSettings {
        enabled: ENABLED.get(),
        max_in_flight: size(&MAX_IN_FLIGHT),
        batch_size: size(&BATCH_SIZE),
        request_timeout: time(&REQUEST_TIMEOUT_MS),
        max_response_bytes: size(&MAX_RESPONSE_BYTES),
        session_idle_timeout: time(&SESSION_IDLE_TIMEOUT_MS),
        poll_interval: time(&POLL_INTERVAL_MS),
    }
}
