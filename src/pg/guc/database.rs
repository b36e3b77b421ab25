//! What ALTER DATABASE … SET says, and ALTER ROLE … SET: a session takes it in when it connects, and never again by itself.

use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::ffi::CString;

/// A setting that only a new process can take in: keys in memory are those of its first value.
const OF_KEYS: &str = "app.vault_";

/// One of the settings, in the order in which they go before each other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    /// 0: of all; 1: of this database; 2: of this user; 3: of this user in this database.
    rank: i32,
    /// In lower case.
    name: String,
    value: String,
}

impl Setting {
    fn source(&self) -> pg_sys::GucSource::Type {
        match self.rank {
            0 => pg_sys::GucSource::PGC_S_GLOBAL,
            1 => pg_sys::GucSource::PGC_S_DATABASE,
            2 => pg_sys::GucSource::PGC_S_USER,
            _ => pg_sys::GucSource::PGC_S_DATABASE_USER,
        }
    }

    fn set(&self) {
        let (Ok(name), Ok(value)) = (CString::new(&*self.name), CString::new(&*self.value)) else { return };
        // SAFETY: C strings. As connecting does it: what cannot be set is a warning in the log. It stays, whatever becomes
        // of the transaction.
        unsafe {
            pg_sys::set_config_option(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                self.source(),
                pg_sys::GucAction::GUC_ACTION_SET,
                true,
                0,
                false,
            );
        }
    }
}

/// The settings of ours that hold for this user in this database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatabaseSettings(Vec<Setting>);

impl DatabaseSettings {
    /// As they are now. Call it in a transaction.
    pub fn read() -> Result<Self, SpiError> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT (s.setrole <> 0)::integer * 2 + (s.setdatabase <> 0)::integer, n.name,
                        pg_catalog.substr(c.setting, pg_catalog.strpos(c.setting, '=') + 1)
                   FROM pg_catalog.pg_db_role_setting s,
                        pg_catalog.unnest(s.setconfig) AS c (setting),
                        pg_catalog.lower(pg_catalog.split_part(c.setting, '=', 1)) AS n (name)
                  WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
                    AND (s.setrole = 0 OR pg_catalog.pg_get_userbyid(s.setrole) = session_user)
                    AND (pg_catalog.starts_with(n.name, 'nexus_hub.') OR pg_catalog.starts_with(n.name, 'app.'))
                  ORDER BY 1, 2",
                None,
                &[],
            )?;
            let setting = |row: pgrx::spi::SpiHeapTupleData<'_>| {
                let (rank, name, value) = (row.get(1)?, row.get(2)?, row.get(3)?);
                Ok(Setting {
                    rank: rank.unwrap_or_default(),
                    name: name.unwrap_or_default(),
                    value: value.unwrap_or_default(),
                })
            };
            rows.map(setting).collect::<Result<_, SpiError>>().map(Self)
        })
    }

    /// Sets in this process what was set since it connected, and tells whether something was reset since, which only a new
    /// process can take in; placeholders aside, which do not say what they come from. Call it in a transaction.
    pub fn catch_up(&self) -> Result<bool, SpiError> {
        self.0.iter().for_each(Setting::set);
        Spi::connect(|client| {
            let names: Vec<_> = self.0.iter().map(|setting| setting.name.clone()).collect();
            let ranks: Vec<_> = self.0.iter().map(|setting| setting.rank).collect();
            let rows = client.select(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_settings s
                   JOIN (VALUES (0, 'global'), (1, 'database'), (2, 'user'), (3, 'database user')) AS k (rank, source) USING (source)
                  WHERE pg_catalog.starts_with(s.name, 'nexus_hub.')
                    AND NOT EXISTS (SELECT FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS c (name, rank)
                                     WHERE c.name = s.name AND c.rank = k.rank))",
                Some(1),
                &[names.into(), ranks.into()],
            )?;
            Ok(rows.first().get_one()?.unwrap_or_default())
        })
    }

    /// Sets in this process what is new in these, which are those of later, and tells whether that needs a new process.
    pub fn follow(&self, later: &Self) -> bool {
        let is_there =
            |setting: &Setting| later.0.iter().any(|other| other.rank == setting.rank && other.name == setting.name);
        let is_reset = !self.0.iter().all(is_there);
        let mut is_of_keys = false;
        for setting in later.0.iter().filter(|setting| !self.0.contains(setting)) {
            setting.set();
            is_of_keys |= setting.name.starts_with(OF_KEYS);
        }
        is_reset || is_of_keys
    }
}
