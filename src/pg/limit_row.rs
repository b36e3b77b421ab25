//! What a limiter answers, on its way into SQL: a single row, which PostgREST makes an object of.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use std::cell::Cell;
use std::ptr::null_mut;

/// `allowed`, `limit`, `remaining`, `retry_after_seconds`, `reset_seconds`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LimitRow {
    pub allowed: bool,
    pub limit: i32,
    pub remaining: i32,
    pub retry_after: Option<f64>,
    pub reset: f64,
}

const COLUMNS: [(&std::ffi::CStr, pg_sys::Oid); 5] = [
    (c"allowed", pg_sys::BOOLOID),
    (c"limit", pg_sys::INT4OID),
    (c"remaining", pg_sys::INT4OID),
    (c"retry_after_seconds", pg_sys::FLOAT8OID),
    (c"reset_seconds", pg_sys::FLOAT8OID),
];

thread_local! {
    static DESCRIPTION: Cell<pg_sys::TupleDesc> = const { Cell::new(null_mut()) };
}

fn description() -> pg_sys::TupleDesc {
    let made = DESCRIPTION.get();
    if !made.is_null() {
        return made;
    }
    // SAFETY: on the main thread, in a function call; the description is made in memory that lasts as long as the
    // process, and only then kept.
    let made = unsafe {
        let before = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let made = pg_sys::CreateTemplateTupleDesc(COLUMNS.len() as i32);
        for (number, (name, oid)) in (1..).zip(COLUMNS) {
            pg_sys::TupleDescInitEntry(made, number, name.as_ptr(), oid, -1, 0);
        }
        let made = pg_sys::BlessTupleDesc(made);
        pg_sys::MemoryContextSwitchTo(before);
        made
    };
    DESCRIPTION.set(made);
    made
}

// SAFETY: it returns a row of the type that the function's OUT columns make.
unsafe impl BoxRet for LimitRow {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        let mut values = [
            pg_sys::Datum::from(self.allowed),
            pg_sys::Datum::from(self.limit),
            pg_sys::Datum::from(self.remaining),
            // What Float8GetDatum does where a datum has 64 bits.
            pg_sys::Datum::from(self.retry_after.unwrap_or_default().to_bits()),
            pg_sys::Datum::from(self.reset.to_bits()),
        ];
        let mut nulls = [false, false, false, self.retry_after.is_none(), false];
        // SAFETY: as many values as the description has columns; the row is made in the caller's memory.
        unsafe {
            let row = pg_sys::heap_form_tuple(description(), values.as_mut_ptr(), nulls.as_mut_ptr());
            fcinfo.return_raw_datum(pg_sys::HeapTupleHeaderGetDatum((*row).t_data))
        }
    }
}

// SAFETY: see above.
unsafe impl SqlTranslatable for LimitRow {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(LimitRow);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("record"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal("record")));
}
