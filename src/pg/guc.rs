//! The settings, `nexus_hub.*`: private statics with typed getters.

mod cache;
pub mod database;
mod retention;

pub use cache::Caching;
pub use retention::{Retention, rate_limit_retention, settings as retention};

use super::shmem;
use crate::domain::egress::Policy;
use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

static VAULT_KEY_COMMAND: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static VAULT_KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static VAULT_ROTATION_PACE: GucSetting<i32> = GucSetting::<i32>::new(10);
static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
static EXECUTOR: GucSetting<Executor> = GucSetting::<Executor>::new(Executor::Worker);
static WORKERS_PER_DATABASE: GucSetting<i32> = GucSetting::<i32>::new(1);
static EGRESS_ALLOW: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static CA_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static MAX_IN_FLIGHT: GucSetting<i32> = GucSetting::<i32>::new(1024);
static MAX_IN_FLIGHT_PER_HOST: GucSetting<i32> = GucSetting::<i32>::new(0);
static RETRY_BASE_DELAY_MS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static RETRY_MAX_DELAY_MS: GucSetting<i32> = GucSetting::<i32>::new(3_600_000);
static MAX_CRASHES: GucSetting<i32> = GucSetting::<i32>::new(5);
static BREAKER_THRESHOLD: GucSetting<i32> = GucSetting::<i32>::new(5);
static BREAKER_COOLDOWN_MS: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static MAX_REDIRECTS: GucSetting<i32> = GucSetting::<i32>::new(5);
static RESPONSE_MEMORY_KB: GucSetting<i32> = GucSetting::<i32>::new(256 * 1024);
static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256);
static REQUEST_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static MAX_RESPONSE_BYTES: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024 * 1024);
static SESSION_IDLE_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(300_000);
static RATE_LIMIT_MAX_KEYS: GucSetting<i32> = GucSetting::<i32>::new(65_536);
static RATE_LIMIT_WHEN_FULL: GucSetting<WhenFull> = GucSetting::<WhenFull>::new(WhenFull::Allow);
static POLL_INTERVAL_MS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static AUDIT: GucSetting<bool> = GucSetting::<bool>::new(true);

/// Who makes the calls to MCP servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types)]
pub enum Executor {
    #[name = c"worker"]
    Worker,
    #[name = c"edge"]
    Edge,
}

/// What becomes of calls that the table of rate limits has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types)]
pub enum WhenFull {
    #[name = c"allow"]
    Allow,
    #[name = c"refuse"]
    Refuse,
}

/// Announces the settings to PostgreSQL. Called once, from `_PG_init`.
pub fn register() {
    // SAFETY: the hook is guarded, and only counts in shared memory.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            c"nexus_hub.vault_key_command",
            c"Shell command that prints the vault keys: 64 hex characters a line, the first encrypts, all decrypt.",
            c"Run by the server's user, once after the start and after each configuration reload, when a key is needed; it has 10 seconds. It goes before nexus_hub.vault_key_file.",
            &VAULT_KEY_COMMAND,
            GucContext::Sighup,
            GucFlags::SUPERUSER_ONLY,
            None,
            Some(note_load),
            None,
        );
    }
    GucRegistry::define_string_guc(
        c"nexus_hub.vault_key_file",
        c"File with the vault keys: 64 hex characters a line, the first encrypts, all decrypt.",
        c"Absolute, or relative to the data directory. Refused when readable by group or others. Read again after a configuration reload. Without it the environment variable VAULT_ENCRYPTION_KEY of the server is used, and without that the setting app.vault_key.",
        &VAULT_KEY_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.vault_rotation_pace",
        c"Share of the time, in percent, that a rotation of the vault's keys in the background is at work.",
        c"It rests for the remainder, after each small batch.",
        &VAULT_ROTATION_PACE,
        1,
        100,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_bool_guc(
        c"nexus_hub.enabled",
        c"Whether the worker takes jobs.",
        c"Off, jobs stay pending; what is in flight is finished. ALTER DATABASE ... SET it off before a dump is restored into a copy that must not call anybody.",
        &ENABLED,
        GucContext::Suset,
        GucFlags::empty(),
    );
    GucRegistry::define_enum_guc(
        c"nexus_hub.executor",
        c"Who makes the calls to MCP servers: worker, or edge, the executor at app.edge_function_url.",
        c"In edge mode an MCP job is posted to app.edge_function_url || '/internal/job-executor' with app.service_role_key as bearer token; the executor writes its end.",
        &EXECUTOR,
        GucContext::Suset,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.workers_per_database",
        c"Workers of each database that has the extension.",
        c"Each has its own share of the targets, so that no job is claimed twice and the cap of a server holds for all of them together; those of hosts and in all hold for each.",
        &WORKERS_PER_DATABASE,
        1,
        16,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    // SAFETY: the hook is guarded and does what a check hook may: it reads the new value and sets the detail.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            c"nexus_hub.egress_allow",
            c"Hosts, addresses and networks that jobs may reach besides the public Internet.",
            c"Separated by commas: example.internal, *.example.internal:443, 10.0.0.0/8, 127.0.0.1:8000-8999, [fd00::/8]:443. By default no loopback, private, link-local, metadata, carrier-NAT, multicast or reserved address.",
            &EGRESS_ALLOW,
            GucContext::Sighup,
            GucFlags::SUPERUSER_ONLY,
            Some(check_egress_allow),
            None,
            None,
        );
    }
    GucRegistry::define_string_guc(
        c"nexus_hub.ca_file",
        c"File with certificates, in PEM, of authorities that are trusted besides the system's.",
        c"Absolute, or relative to the data directory. Read again after a configuration reload.",
        &CA_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_in_flight_per_host",
        c"Requests that a worker has in flight to one host at most; 0: no cap but the host's fair share.",
        c"The fair share of a host, and of a user, is four times what is free: four fifths of nexus_hub.max_in_flight when it is alone.",
        &MAX_IN_FLIGHT_PER_HOST,
        0,
        100_000,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.retry_base_delay",
        c"Longest time between the first attempt of a job and the second; it doubles with each attempt.",
        c"The time is drawn at random up to that (full jitter). A Retry-After of the server is obeyed instead.",
        &RETRY_BASE_DELAY_MS,
        1,
        86_400_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.retry_max_delay",
        c"Longest time between two attempts of a job, whatever the server asks for.",
        c"",
        &RETRY_MAX_DELAY_MS,
        1,
        604_800_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_crashes",
        c"Crashes of the worker after which a job that was in flight in all of them is set aside as failed.",
        c"",
        &MAX_CRASHES,
        1,
        1000,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.breaker_threshold",
        c"Connection failures in a row after which a host's jobs wait; 0: never.",
        c"",
        &BREAKER_THRESHOLD,
        0,
        10_000,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.breaker_cooldown",
        c"Time until one job is sent to such a host as a probe; it doubles with each probe that fails, up to 16 times this.",
        c"",
        &BREAKER_COOLDOWN_MS,
        10,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_redirects",
        c"Redirects that a request follows at most; 0: none, and the redirect itself is the answer.",
        c"",
        &MAX_REDIRECTS,
        0,
        20,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.response_memory",
        c"Memory for all answers above 256 kB together; further ones wait until there is room.",
        c"There is room for as many as have nexus_hub.max_response_bytes each, and for one at least.",
        &RESPONSE_MEMORY_KB,
        1024,
        64 * 1024 * 1024,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.max_in_flight",
        c"Requests that a worker has in flight at most.",
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
    GucRegistry::define_bool_guc(
        c"nexus_hub.audit",
        c"Whether the use of the vault is noted in the view vault_audit.",
        c"",
        &AUDIT,
        GucContext::Suset,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.rate_limit_max_keys",
        c"Keys of rate limits that there is room for in shared memory, of all databases together.",
        c"Each takes about 260 bytes. Entries that are of no more use make room for others.",
        &RATE_LIMIT_MAX_KEYS,
        1024,
        16_777_216,
        // Of no use then, and PostgreSQL lets nobody announce such a setting after the start.
        if super::preloading() { GucContext::Postmaster } else { GucContext::Sighup },
        GucFlags::empty(),
    );
    GucRegistry::define_enum_guc(
        c"nexus_hub.rate_limit_when_full",
        c"What becomes of calls that the table of rate limits has no room for: allow or refuse.",
        c"They are counted in rate_limit_stats, and the log tells of them once a minute at most.",
        &RATE_LIMIT_WHEN_FULL,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    retention::register();
    cache::register();
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

// PostgreSQL assigns a setting of a configuration file at each load, changed or not.
#[pg_guard]
unsafe extern "C-unwind" fn note_load(_value: *const std::ffi::c_char, _extra: *mut std::ffi::c_void) {
    shmem::keys::note_load();
}

#[pg_guard]
unsafe extern "C-unwind" fn check_egress_allow(
    value: *mut *mut std::ffi::c_char,
    _extra: *mut *mut std::ffi::c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes the new value, a C string or NULL.
    let text = unsafe { if (*value).is_null() { c"" } else { std::ffi::CStr::from_ptr(*value) } };
    match text.to_str().map_err(|_| "it is not valid UTF-8".to_owned()).and_then(Policy::parse) {
        Ok(_) => true,
        Err(problem) => {
            if let Ok(problem) = CString::new(problem) {
                // SAFETY: what GUC_check_errdetail does; the copy lives as long as the error is being made.
                unsafe { pg_sys::GUC_check_errdetail_string = pg_sys::pstrdup(problem.as_ptr()) };
            }
            false
        }
    }
}

/// `nexus_hub.egress_allow`.
pub fn egress_policy() -> Policy {
    let text = EGRESS_ALLOW.get().unwrap_or_default();
    // The hook has checked it.
    text.to_str().ok().and_then(|text| Policy::parse(text).ok()).unwrap_or_default()
}

/// `nexus_hub.workers_per_database`.
pub fn workers_per_database() -> u16 {
    u16::try_from(WORKERS_PER_DATABASE.get()).unwrap_or(1)
}

/// How long a rotation rests after so much work, as `nexus_hub.vault_rotation_pace` says.
pub fn vault_rotation_rest(work: Duration) -> Duration {
    let pace = VAULT_ROTATION_PACE.get().clamp(1, 100).unsigned_abs();
    work * (100 - pace) / pace
}

/// `nexus_hub.rate_limit_max_keys`.
pub fn rate_limit_max_keys() -> u32 {
    RATE_LIMIT_MAX_KEYS.get().unsigned_abs()
}

/// Whether a call that there is no room for is allowed: `nexus_hub.rate_limit_when_full`.
pub fn allows_when_full() -> bool {
    RATE_LIMIT_WHEN_FULL.get() == WhenFull::Allow
}

/// `nexus_hub.ca_file`, NULL and the empty string being the same.
pub fn ca_file() -> Option<PathBuf> {
    path(&CA_FILE)
}

/// `nexus_hub.vault_key_command`, NULL and the empty string being the same.
pub fn vault_key_command() -> Option<OsString> {
    os_string(&VAULT_KEY_COMMAND)
}

/// `nexus_hub.vault_key_file`, NULL and the empty string being the same.
pub fn vault_key_file() -> Option<PathBuf> {
    path(&VAULT_KEY_FILE)
}

fn path(setting: &GucSetting<Option<CString>>) -> Option<PathBuf> {
    os_string(setting).map(PathBuf::from)
}

fn os_string(setting: &GucSetting<Option<CString>>) -> Option<OsString> {
    setting.get().map(CString::into_bytes).filter(|text| !text.is_empty()).map(OsString::from_vec)
}

/// `nexus_hub.audit`.
pub fn audit() -> bool {
    AUDIT.get()
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
    pub executor: Executor,
    pub workers: u16,
    pub max_in_flight: usize,
    /// `usize::MAX`: no cap.
    pub max_in_flight_per_host: usize,
    pub retry_base_delay: Duration,
    pub retry_max_delay: Duration,
    pub max_crashes: i32,
    pub breaker_threshold: u32,
    pub breaker_cooldown: Duration,
    pub max_redirects: usize,
    pub response_memory: usize,
    pub batch_size: usize,
    pub request_timeout: Duration,
    pub max_response_bytes: usize,
    pub session_idle_timeout: Duration,
    pub poll_interval: Duration,
    pub retention: Retention,
    pub caching: Caching,
}

/// The worker's settings as they are now.
pub fn worker_settings() -> WorkerSettings {
    let size = |setting: &GucSetting<i32>| usize::try_from(setting.get()).unwrap_or(1);
    let time = |setting: &GucSetting<i32>| Duration::from_millis(setting.get().max(1) as u64);
    WorkerSettings {
        enabled: ENABLED.get(),
        executor: EXECUTOR.get(),
        workers: workers_per_database(),
        max_in_flight_per_host: Some(size(&MAX_IN_FLIGHT_PER_HOST)).filter(|cap| *cap > 0).unwrap_or(usize::MAX),
        retry_base_delay: time(&RETRY_BASE_DELAY_MS),
        retry_max_delay: time(&RETRY_MAX_DELAY_MS),
        max_crashes: MAX_CRASHES.get(),
        breaker_threshold: BREAKER_THRESHOLD.get().unsigned_abs(),
        breaker_cooldown: time(&BREAKER_COOLDOWN_MS),
        max_redirects: size(&MAX_REDIRECTS),
        response_memory: size(&RESPONSE_MEMORY_KB) * 1024,
        max_in_flight: size(&MAX_IN_FLIGHT),
        batch_size: size(&BATCH_SIZE),
        request_timeout: time(&REQUEST_TIMEOUT_MS),
        max_response_bytes: size(&MAX_RESPONSE_BYTES),
        session_idle_timeout: time(&SESSION_IDLE_TIMEOUT_MS),
        poll_interval: time(&POLL_INTERVAL_MS),
        retention: retention::settings(),
        caching: cache::settings(),
    }
}
