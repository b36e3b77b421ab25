//! A look at utility statements: some need the worker of a database gone before they can run, some make it useless.

use super::{catalog, restore, shmem, xact};
use pgrx::prelude::*;
use std::ffi::CStr;

static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

/// Installs the hook. Only from `_PG_init` of a preloaded library.
pub fn register() {
    // SAFETY: the postmaster runs this before it has children or threads; the hook chains to the one before.
    unsafe {
        PREVIOUS = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
    }
}

// pgrx's binding would catch an error and raise it anew, which loses its position, its context and the names of
// objects. So the C function itself is called, outside of any guard: an error jumps over a frame with nothing to drop.
unsafe extern "C-unwind" {
    #[link_name = "standard_ProcessUtility"]
    fn standard_process_utility(
        statement: *mut pg_sys::PlannedStmt,
        query: *const std::ffi::c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const std::ffi::c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: PostgreSQL hands a valid statement, and whatever comes goes on unchanged.
    unsafe {
        look_at((*statement).utilityStmt);
        let dropped = dropped_database((*statement).utilityStmt);
        let next = PREVIOUS.unwrap_or(standard_process_utility);
        next(statement, query, read_only_tree, context, params, environment, receiver, completion);
        if dropped != pg_sys::InvalidOid {
            forget(dropped);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn look_at(parse_tree: *mut pg_sys::Node) {
    // SAFETY: a valid statement's parse tree.
    unsafe {
        if let Some(database) = emptied_database(parse_tree)
            && catalog::owns_database(database)
        {
            shmem::ask_to_leave(database);
        }
        // The worker looks whether the extension is still there; if not, it ends. An abort forgets the nudge.
        if may_drop_extension(parse_tree) && catalog_is_reachable() {
            xact::nudge_worker_at_commit();
        }
        if may_load_a_dump(parse_tree) && catalog_is_reachable() {
            restore::note();
        }
    }
}

/// The database that a statement drops.
#[pg_guard]
unsafe extern "C-unwind" fn dropped_database(node: *mut pg_sys::Node) -> pg_sys::Oid {
    // SAFETY: a valid statement's parse tree; the cast is to the struct that the node's tag names.
    unsafe {
        if (*node).type_ != pg_sys::NodeTag::T_DropdbStmt {
            return pg_sys::InvalidOid;
        }
        catalog::database(CStr::from_ptr((*node.cast::<pg_sys::DropdbStmt>()).dbname)).unwrap_or(pg_sys::InvalidOid)
    }
}

/// Forgets what shared memory holds of a database: another one may get its number.
#[pg_guard]
unsafe extern "C-unwind" fn forget(database: pg_sys::Oid) {
    if let Some(rates) = shmem::rates::table() {
        rates.forget_database(database.to_u32());
    }
}

/// Whether a statement can take the extension with it.
///
/// # Safety
/// `node` points to a utility statement's parse tree.
unsafe fn may_drop_extension(node: *mut pg_sys::Node) -> bool {
    // SAFETY: each cast is to the struct that the node's tag names.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_DropOwnedStmt => true,
            pg_sys::NodeTag::T_DropStmt => matches!(
                (*node.cast::<pg_sys::DropStmt>()).removeType,
                pg_sys::ObjectType::OBJECT_EXTENSION | pg_sys::ObjectType::OBJECT_SCHEMA
            ),
            _ => false,
        }
    }
}

/// Whether a statement is one with which a dump brings the extension, or rows of any table. Triggers may be disabled.
///
/// # Safety
/// `node` points to a utility statement's parse tree.
unsafe fn may_load_a_dump(node: *mut pg_sys::Node) -> bool {
    // SAFETY: each cast is to the struct that the node's tag names.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_CopyStmt => (*node.cast::<pg_sys::CopyStmt>()).is_from,
            pg_sys::NodeTag::T_CreateExtensionStmt => {
                CStr::from_ptr((*node.cast::<pg_sys::CreateExtensionStmt>()).extname) == c"nexus_hub"
            }
            _ => false,
        }
    }
}

fn catalog_is_reachable() -> bool {
    // SAFETY: plain globals of this process.
    unsafe { pg_sys::MyDatabaseId != pg_sys::InvalidOid && pg_sys::IsTransactionState() }
}

/// The database that a statement can only work on when nobody is connected to it.
///
/// # Safety
/// `node` points to a utility statement's parse tree.
unsafe fn emptied_database(node: *mut pg_sys::Node) -> Option<pg_sys::Oid> {
    // SAFETY: each cast is to the struct that the node's tag names.
    let name = unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_DropdbStmt => (*node.cast::<pg_sys::DropdbStmt>()).dbname,
            pg_sys::NodeTag::T_RenameStmt => {
                let rename = node.cast::<pg_sys::RenameStmt>();
                if (*rename).renameType != pg_sys::ObjectType::OBJECT_DATABASE {
                    return None;
                }
                (*rename).subname
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt => {
                let alter = node.cast::<pg_sys::AlterDatabaseStmt>();
                option_text((*alter).options, c"tablespace")?;
                (*alter).dbname
            }
            pg_sys::NodeTag::T_CreatedbStmt => {
                option_text((*node.cast::<pg_sys::CreatedbStmt>()).options, c"template")?
            }
            _ => return None,
        }
    };
    if name.is_null() {
        return None;
    }
    // SAFETY: a C string of the parse tree; inside the statement's transaction.
    catalog::database(unsafe { CStr::from_ptr(name) })
}

/// The value of an option like `TEMPLATE name`.
///
/// # Safety
/// `options` is NIL or a list of `DefElem`.
unsafe fn option_text(options: *mut pg_sys::List, name: &CStr) -> Option<*mut std::ffi::c_char> {
    // SAFETY: the list holds what the caller says; defGetString returns a string of the tree or a palloc'd one.
    unsafe {
        let length = if options.is_null() { 0 } else { (*options).length };
        (0..length)
            .map(|index| (*(*options).elements.add(index as usize)).ptr_value.cast::<pg_sys::DefElem>())
            .find(|option| CStr::from_ptr((**option).defname) == name)
            .filter(|option| !(**option).arg.is_null())
            .map(|option| pg_sys::defGetString(option))
    }
}
