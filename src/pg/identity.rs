//! On whose behalf a piece of work is done.

use pgrx::pg_sys;

/// PostgreSQL's first superuser, who always is.
const BOOTSTRAP_SUPERUSER: u32 = 10;

/// Runs statements of the extension's own with the rights they need, whoever is calling. They must name everything with
/// its schema.
pub fn as_superuser<R>(work: impl FnOnce() -> R) -> R {
    as_user(pg_sys::Oid::from(BOOTSTRAP_SUPERUSER), work)
}

/// Runs statements with the rights of a role, as VACUUM runs what is a table owner's: they can do nothing that outlives
/// them to the session, its user and its settings. Names without a schema are found in pg_catalog alone: in the caller's
/// path, and in temporary schemas above all, there may be others of that name.
pub fn as_user<R>(role: pg_sys::Oid, work: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: set and put back in a pair; an error in between aborts the (sub)transaction, which puts them back, too.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let restricted = (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32;
        pg_sys::SetUserIdAndSecContext(role, context | restricted);
        let settings = pg_sys::NewGUCNestLevel();
        pg_sys::set_config_option(
            c"search_path".as_ptr(),
            c"pg_catalog, pg_temp".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        let result = work();
        pg_sys::AtEOXact_GUC(false, settings);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Whether the current user owns a table, directly or as a member of the role that does.
pub fn owns_table(table: pg_sys::Oid) -> bool {
    // SAFETY: a look-up in the catalogue, inside a statement's transaction.
    unsafe {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        return pg_sys::pg_class_ownercheck(table, pg_sys::GetUserId());
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        return pg_sys::object_ownercheck(pg_sys::RelationRelationId, table, pg_sys::GetUserId());
    }
}

// pgrx's bindings put a guard around each call, which takes longer than these, and these raise no error.
unsafe extern "C-unwind" {
    #[allow(non_snake_case)]
    fn GetOuterUserId() -> pg_sys::Oid;
    #[allow(non_snake_case)]
    fn GetCurrentSubTransactionId() -> pg_sys::SubTransactionId;
}

/// Who is calling: the current user outside of all SECURITY DEFINER functions, as the session or SET ROLE has it.
pub fn caller() -> u32 {
    // SAFETY: a plain global of this process.
    unsafe { GetOuterUserId().to_u32() }
}

/// The running subtransaction.
pub fn nest() -> u32 {
    // SAFETY: a look at the state of the running transaction.
    unsafe { GetCurrentSubTransactionId() }
}

/// What time it is, in microseconds of PostgreSQL's.
pub fn now() -> i64 {
    // SAFETY: a look at the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// The database of this process.
pub fn database() -> pg_sys::Oid {
    // SAFETY: a plain global of this process.
    unsafe { pg_sys::MyDatabaseId }
}

/// Whether the running transaction may write rows.
pub fn may_write() -> bool {
    // SAFETY: plain globals of this process, and looks at its state.
    unsafe { !pg_sys::XactReadOnly && !pg_sys::RecoveryInProgress() && !pg_sys::IsInParallelMode() }
}

/// Whether the server is a standby, which can't read unlogged tables either.
pub fn on_standby() -> bool {
    // SAFETY: a look at the server's state.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// A (sub)transaction that may still be rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undecided {
    transaction: u32,
    subtransaction: u32,
}

impl Undecided {
    /// The running one.
    pub fn here() -> Self {
        // SAFETY: looks at the state of the running transaction.
        Self { transaction: transaction(), subtransaction: unsafe { pg_sys::GetCurrentSubTransactionId() } }
    }

    /// Whether it is still running.
    pub fn is_running(self) -> bool {
        // SAFETY: a look at the state of the running transaction.
        self.transaction == transaction() && unsafe { pg_sys::SubTransactionIsActive(self.subtransaction) }
    }
}

/// Whether the running transaction has written anything: what it sees may then be its own, and be rolled back.
pub fn has_written() -> bool {
    // SAFETY: a look at the state of the running transaction.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// A number that the running transaction has, and no other of this session.
fn transaction() -> u32 {
    // SAFETY: this process's own entry, which only it changes.
    unsafe {
        #[cfg(not(any(feature = "pg17", feature = "pg18")))]
        return (*pg_sys::MyProc).lxid;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        return (*pg_sys::MyProc).vxid.lxid;
    }
}
