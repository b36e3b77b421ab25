//! The seeds' own settings that hold keys, `app.vault_key` and those of a rotation. They are announced so that nobody can
//! show them, and only superusers set them.

use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::ffi::{CString, c_char, c_void};
use zeroize::Zeroizing;

static VAULT_KEY: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static VAULT_OLD_KEY: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static VAULT_NEW_KEY: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);

/// Announces the settings to PostgreSQL. Called once, from `_PG_init`.
pub fn register() {
    let flags = GucFlags::NO_SHOW_ALL | GucFlags::SUPERUSER_ONLY;
    let settings: [(_, _, _, pg_sys::GucShowHook); 3] = [
        (c"app.vault_key", c"The vault's key, where no other source names one.", &VAULT_KEY, Some(show_vault_key)),
        (
            c"app.vault_old_key",
            c"The key that rotate_vault_key rotates from.",
            &VAULT_OLD_KEY,
            Some(show_vault_old_key),
        ),
        (c"app.vault_new_key", c"The key that rotate_vault_key rotates to.", &VAULT_NEW_KEY, Some(show_vault_new_key)),
    ];
    for (name, description, setting, show) in settings {
        // SAFETY: the hooks are guarded; the check hook does what one may, and those that show return static texts.
        unsafe {
            GucRegistry::define_string_guc_with_hooks(
                name,
                description,
                c"64 hex characters. Shown to nobody; not taken from configuration files, which pg_file_settings shows.",
                setting,
                GucContext::Suset,
                flags,
                Some(check_source),
                None,
                show,
            );
        }
    }
}

/// `app.vault_key`.
pub fn vault_key() -> Option<Zeroizing<String>> {
    text(&VAULT_KEY)
}

/// `app.vault_old_key`.
pub fn vault_old_key() -> Option<Zeroizing<String>> {
    text(&VAULT_OLD_KEY)
}

/// `app.vault_new_key`.
pub fn vault_new_key() -> Option<Zeroizing<String>> {
    text(&VAULT_NEW_KEY)
}

fn text(setting: &GucSetting<Option<CString>>) -> Option<Zeroizing<String>> {
    let bytes = Zeroizing::new(setting.get()?.into_bytes());
    let text = Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned());
    (!text.trim().is_empty()).then_some(text)
}

fn masked(setting: &GucSetting<Option<CString>>) -> *const c_char {
    if text(setting).is_some() { c"********".as_ptr() } else { c"".as_ptr() }
}

#[pg_guard]
unsafe extern "C-unwind" fn show_vault_key() -> *const c_char {
    masked(&VAULT_KEY)
}

#[pg_guard]
unsafe extern "C-unwind" fn show_vault_old_key() -> *const c_char {
    masked(&VAULT_OLD_KEY)
}

#[pg_guard]
unsafe extern "C-unwind" fn show_vault_new_key() -> *const c_char {
    masked(&VAULT_NEW_KEY)
}

/// Refuses configuration files, with a text of its own: PostgreSQL's would quote the key into the log.
#[pg_guard]
unsafe extern "C-unwind" fn check_source(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes the new value, a C string or NULL.
    let is_empty = unsafe { (*value).is_null() || **value == 0 };
    if is_empty || source != pg_sys::GucSource::PGC_S_FILE {
        return true;
    }
    // SAFETY: what the macros GUC_check_errmsg and GUC_check_errhint do; the copies live as long as the error is made.
    unsafe {
        pg_sys::GUC_check_errmsg_string = pg_sys::pstrdup(
            c"a vault key in a configuration file is not used, because SQL can show such a file".as_ptr(),
        );
        pg_sys::GUC_check_errhint_string =
            pg_sys::pstrdup(c"Put the key into a file of its own, and name that in nexus_hub.vault_key_file.".as_ptr());
    }
    false
}
