//! Who is calling, by the claims of the request: read for each value that is decrypted, so in nanoseconds.

use crate::domain::claims;
use std::ffi::{CStr, CString, c_char};

/// One of the settings that hold claims, as it was when it was looked at last.
struct Setting {
    name: &'static CStr,
    text: CString,
    #[cfg(any(feature = "pg14", feature = "pg15"))]
    record: record::Record,
}

impl Setting {
    fn new(name: &'static CStr) -> Self {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        return Self { name, text: CString::default(), record: record::Record::default() };
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        return Self { name, text: CString::default() };
    }

    /// Whether it has changed since.
    fn look(&mut self) -> bool {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let now = self.record.value(self.name);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let now = value(self.name);
        let now = if now.is_null() { c"".as_ptr() } else { now };
        // SAFETY: a C string. Most sessions without claims have none for good.
        if self.text.is_empty() && unsafe { *now } == 0 {
            return false;
        }
        // SAFETY: both are C strings; a setting's stays until it is set anew.
        let has_changed = unsafe { libc::strcmp(now, self.text.as_ptr()) } != 0;
        if has_changed {
            // SAFETY: see above.
            self.text = unsafe { CStr::from_ptr(now) }.to_owned();
        }
        has_changed
    }

    fn text(&self) -> &str {
        self.text.to_str().unwrap_or_default()
    }
}

// pgrx's bindings put a guard around each call, which takes longer than the call. These raise no error.
unsafe extern "C-unwind" {
    #[cfg(not(any(feature = "pg14", feature = "pg15")))]
    #[allow(non_snake_case)]
    fn GetConfigOption(name: *const c_char, missing_ok: bool, restrict_privileged: bool) -> *const c_char;
}

#[cfg(not(any(feature = "pg14", feature = "pg15")))]
fn value(name: &CStr) -> *const c_char {
    // SAFETY: a look-up of a C string, with all that could raise an error switched off.
    unsafe { GetConfigOption(name.as_ptr(), true, false) }
}

/// Until 15 a look-up compares names for longer than the rest takes. So the place that was found is kept.
#[cfg(any(feature = "pg14", feature = "pg15"))]
mod record {
    use super::*;
    use pgrx::pg_sys;
    use std::ptr::null_mut;

    unsafe extern "C-unwind" {
        fn get_guc_variables() -> *mut *mut pg_sys::config_generic;
        #[allow(non_snake_case)]
        fn GetNumConfigOptions() -> std::ffi::c_int;
    }

    /// Where PostgreSQL has a setting.
    pub struct Record {
        /// How many settings there were when it was searched.
        among: usize,
        index: usize,
        /// NULL: there was none of that name.
        record: *mut pg_sys::config_generic,
    }

    impl Default for Record {
        fn default() -> Self {
            Self { among: 0, index: 0, record: null_mut() }
        }
    }

    impl Record {
        /// The setting's text; NULL where nobody has ever set it.
        pub fn value(&mut self, name: &CStr) -> *const c_char {
            // SAFETY: PostgreSQL's list of settings and its length: what it points to is alive. It is looked at each
            // time, because a setting's record is another one once an extension has announced the setting.
            unsafe {
                let (list, count) = (get_guc_variables(), usize::try_from(GetNumConfigOptions()).unwrap_or(0));
                let is_where_it_was =
                    count == self.among && (self.record.is_null() || *list.add(self.index) == self.record);
                if !is_where_it_was {
                    self.among = count;
                    let is_it = |index: &usize| {
                        CStr::from_ptr((**list.add(*index)).name).to_bytes().eq_ignore_ascii_case(name.to_bytes())
                    };
                    self.index = (0..count).find(is_it).unwrap_or(0);
                    self.record = if count > 0 && is_it(&self.index) { *list.add(self.index) } else { null_mut() };
                }
                if self.record.is_null() || (*self.record).vartype != pg_sys::config_type::PGC_STRING {
                    return null_mut();
                }
                *(*self.record.cast::<pg_sys::config_string>()).variable
            }
        }
    }
}

/// The claims as they were last, and whom they name.
pub struct Reader {
    claims: Setting,
    older: Setting,
    by_claims: Option<Option<[u8; 16]>>,
    by_older: Option<[u8; 16]>,
}

impl Default for Reader {
    fn default() -> Self {
        let (claims, older) = (Setting::new(c"request.jwt.claims"), Setting::new(c"request.jwt.claim.sub"));
        Self { claims, older, by_claims: None, by_older: None }
    }
}

impl Reader {
    /// The caller's id, as of now: what `nexus_hub_uid()` would return.
    pub fn caller(&mut self) -> Option<[u8; 16]> {
        if self.claims.look() {
            self.by_claims = claims::named_by_claims(self.claims.text());
        }
        if self.by_claims.is_none() && self.older.look() {
            self.by_older = claims::named_by_sub(self.older.text());
        }
        self.by_claims.unwrap_or(self.by_older)
    }
}
