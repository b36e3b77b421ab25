//! A decrypted text on its way into SQL: copied once, and wiped on this side.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use zeroize::Zeroizing;

/// A text that a function returns as `text`.
pub struct Plaintext(pub Zeroizing<String>);

// SAFETY: what a `&str` does, which copies into memory of PostgreSQL's.
unsafe impl BoxRet for Plaintext {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: see above.
        unsafe { self.0.as_str().box_into(fcinfo) }
    }
}

// SAFETY: it is returned as `text`.
unsafe impl SqlTranslatable for Plaintext {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Plaintext);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("text"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal("text")));
}
