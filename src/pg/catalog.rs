//! What the workers read from the catalogues without SQL.

use pgrx::prelude::*;

/// The databases, and whether one is to have workers: one can connect to it, and it is no template. For the launcher,
/// which is connected to none: it can read the shared catalogues only, and not through SPI. Call it in a transaction.
pub fn databases() -> Result<Vec<(pg_sys::Oid, bool)>, String> {
    let mut databases = Vec::new();
    // SAFETY: pg_database is a shared catalogue; the scan is closed before the table, and tuples of pg_database are
    // laid out as FormData_pg_database in every supported version.
    unsafe {
        let table = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::table_beginscan_catalog(table, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let row: *const pg_sys::FormData_pg_database = pg_sys::GETSTRUCT(tuple).cast();
            // A limit of -2 marks a database that was half dropped.
            let is_open = (*row).datallowconn && !(*row).datistemplate && (*row).datconnlimit != -2;
            databases.push(((*row).oid, is_open));
        }
        // What the macro table_endscan does.
        if let Some(end) = (*(*(*scan).rs_rd).rd_tableam).scan_end {
            pg_sys::ffi::pg_guard_ffi_boundary(|| end(scan));
        }
        pg_sys::table_close(table, pg_sys::AccessShareLock as i32);
    }
    Ok(databases)
}

/// The extension as installed in this database: another one, once it was dropped and made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    oid: pg_sys::Oid,
    schema: pg_sys::Oid,
}

/// The oid of `_nexus_hub`, which lives and dies with the extension. Unlike an extension it is found in a cache.
fn schema() -> pg_sys::Oid {
    // SAFETY: looks a static C string up in the catalogue.
    unsafe { pg_sys::get_namespace_oid(c"_nexus_hub".as_ptr(), true) }
}

/// The extension, if it is installed in this database. Call it in a transaction.
pub fn extension() -> Option<Extension> {
    // SAFETY: looks a static C string up in the catalogue.
    let oid = unsafe { pg_sys::get_extension_oid(c"nexus_hub".as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then(|| Extension { oid, schema: schema() })
}

/// Holds off DROP EXTENSION until the transaction ends, and tells whether the extension is still the one it was.
pub fn hold_extension(extension: Extension) -> bool {
    // SAFETY: an ordinary lock of the running transaction, on the object that DROP EXTENSION locks first.
    unsafe {
        pg_sys::LockDatabaseObject(pg_sys::ExtensionRelationId, extension.oid, 0, pg_sys::AccessShareLock as i32)
    };
    schema() == extension.schema && extension.schema != pg_sys::InvalidOid
}

/// Keeps a table from being dropped or rewritten until the transaction ends.
pub fn hold_table(table: pg_sys::Oid) {
    // SAFETY: an ordinary lock of the running transaction; it may be of a table that is gone.
    unsafe { pg_sys::LockRelationOid(table, pg_sys::AccessShareLock as i32) }
}

/// The oid of the database of that name. Call it in a transaction.
pub fn database(name: &std::ffi::CStr) -> Option<pg_sys::Oid> {
    // SAFETY: looks a C string up in the catalogue.
    let oid = unsafe { pg_sys::get_database_oid(name.as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Whether the current user owns a database, as all need who may do to it what wants it empty.
pub fn owns_database(database: pg_sys::Oid) -> bool {
    // SAFETY: a look-up in the catalogue, inside a statement's transaction.
    unsafe {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        return pg_sys::pg_database_ownercheck(database, pg_sys::GetUserId());
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        return pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, pg_sys::GetUserId());
    }
}
