//! What ALTER DATABASE … SET says. A session takes it in when it connects, and never again.

use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::ffi::CString;

/// The settings of this database, to be compared with what they are later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatabaseSettings(Vec<String>);

impl DatabaseSettings {
    /// As they are now. Call it in a transaction.
    pub fn read() -> Result<Self, SpiError> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT coalesce((SELECT s.setconfig FROM pg_catalog.pg_db_role_setting s
                   WHERE s.setrole = 0 AND s.setdatabase =
                         (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())), '{}')",
                Some(1),
                &[],
            )?;
            Ok(Self(rows.first().get_one()?.unwrap_or_default()))
        })
    }

    /// Sets in this process what was set since it connected, as connecting does; and returns whether something of ours
    /// was reset since, which only a new process can do. Call it in a transaction.
    pub fn catch_up(&self) -> Result<bool, SpiError> {
        for (name, value) in self.0.iter().filter_map(|setting| setting.split_once('=')) {
            let (Ok(name), Ok(value)) = (CString::new(name), CString::new(value)) else { continue };
            // SAFETY: C strings. What cannot be set is a warning in the log.
            unsafe {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    pg_sys::GucContext::PGC_SUSET,
                    pg_sys::GucSource::PGC_S_DATABASE,
                    pg_sys::GucAction::GUC_ACTION_SET,
                    true,
                    0,
                    false,
                );
            }
        }
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_settings s
                  WHERE s.source = 'database' AND pg_catalog.starts_with(s.name, 'nexus_hub.')
                    AND NOT EXISTS (SELECT FROM pg_catalog.unnest($1) AS c (setting)
                                     WHERE pg_catalog.starts_with(c.setting, s.name || '=')))",
                Some(1),
                &[self.0.clone().into()],
            )?;
            Ok(rows.first().get_one()?.unwrap_or_default())
        })
    }
}
