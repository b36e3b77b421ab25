//! The way of `check_rate_limit` past pgrx's wrapper. A call of it is to cost little beside `SELECT 1`, and between
//! thirty sessions on two cores all that it touches is cold: the guards of the wrapper are a good part of it. What is
//! here can raise no error and needs none of them; whatever is out of the ordinary goes through the wrapper.

use pgrx::pg_sys;
use std::sync::OnceLock;

/// Counts a call of a user to a server, with the limit; `None`: the usual way has to.
pub type Count = fn(&[u8], Option<&[u8; 16]>, i32) -> Option<bool>;

static COUNT: OnceLock<Count> = OnceLock::new();

/// Sets what counts, once. It must not panic, raise an error or look at interrupts.
pub fn register(count: Count) {
    let _ = COUNT.set(count);
}

unsafe extern "C-unwind" {
    // pgrx's, of the function in `rate_limit`.
    fn check_rate_limit_wrapper(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum;
}

/// What PostgreSQL asks of a function that it calls by the usual convention.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_check_rate_limit() -> *const pg_sys::Pg_finfo_record {
    static VERSION: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &VERSION
}

/// `check_rate_limit(text, uuid, integer)`.
///
/// # Safety
///
/// Only PostgreSQL calls it, with three arguments of these types.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn check_rate_limit(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: see above; the arguments outlive the call.
    unsafe {
        match count(call) {
            Some(allowed) => pg_sys::Datum::from(allowed),
            None => check_rate_limit_wrapper(call),
        }
    }
}

/// # Safety
///
/// As above.
unsafe fn count(call: pg_sys::FunctionCallInfo) -> Option<bool> {
    let count = COUNT.get()?;
    // SAFETY: the call has three arguments; those that are not NULL are a text, a pointer to sixteen bytes, and an
    // integer.
    unsafe {
        let [server, user, limit] = &*(*call).args.as_ptr().cast::<[pg_sys::NullableDatum; 3]>();
        if server.isnull || limit.isnull {
            return None;
        }
        let server = plain(server.value.cast_mut_ptr::<u8>())?;
        let user = (!user.isnull).then(|| &*user.value.cast_mut_ptr::<[u8; 16]>());
        count(server, user, limit.value.value() as i32)
    }
}

/// The bytes of a text that stands where it is pointed to, neither compressed nor elsewhere.
///
/// # Safety
///
/// It must point to a text.
unsafe fn plain<'a>(text: *const u8) -> Option<&'a [u8]> {
    // SAFETY: see above; the macros' counterparts look at the header alone, and the length in it is that of the bytes.
    unsafe {
        let varlena = text.cast::<pg_sys::varlena>();
        if pgrx::varatt_is_1b_e(varlena) || pgrx::varatt_is_4b_c(varlena) {
            return None;
        }
        Some(pgrx::varlena_to_byte_slice(varlena))
    }
}
