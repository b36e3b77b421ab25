//! How long what servers list counts as fresh.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::time::Duration;

static AUTO_REFRESH: GucSetting<bool> = GucSetting::<bool>::new(true);
static TTL_MIN: GucSetting<i32> = GucSetting::<i32>::new(24 * 60);

/// Announces the settings to PostgreSQL.
pub fn register() {
    GucRegistry::define_bool_guc(
        c"nexus_hub.auto_refresh",
        c"Whether the worker syncs servers again before what is cached of them expires.",
        c"Those that were synced once; not in edge mode. Off, only sync_server and refresh_expired_cache_entries do.",
        &AUTO_REFRESH,
        GucContext::Suset,
        GucFlags::empty(),
    );
    GucRegistry::define_int_guc(
        c"nexus_hub.cache_ttl",
        c"How long what a sync has found in a server counts as fresh.",
        c"The worker syncs the server again when a tenth of it is left, or 15 minutes.",
        &TTL_MIN,
        1,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_MIN,
    );
}

/// The settings as they are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caching {
    /// Whether the worker syncs by itself.
    pub auto_refresh: bool,
    /// Minutes.
    pub ttl: i32,
}

impl Caching {
    /// How long before the end a server is synced again, so that there is no time without fresh entries.
    pub fn lead(self) -> Duration {
        Duration::from_secs(u64::from(self.ttl.unsigned_abs()) * 6).min(Duration::from_secs(15 * 60))
    }
}

/// `nexus_hub.auto_refresh` and `nexus_hub.cache_ttl`.
pub fn settings() -> Caching {
    Caching { auto_refresh: AUTO_REFRESH.get(), ttl: TTL_MIN.get() }
}
