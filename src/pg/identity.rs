//! On whose behalf a piece of work is done.

use pgrx::pg_sys;

/// PostgreSQL's first superuser, who always is.
const BOOTSTRAP_SUPERUSER: u32 = 10;

/// Runs statements of the extension's own with the rights they need, whoever is calling. They must name everything with
/// its schema.
pub fn as_superuser<R>(work: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: set and put back in a pair; an error in between aborts the (sub)transaction, which puts them back, too. The
    // context keeps what is called from changing the session's settings or user for good.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        let restricted = (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32;
        pg_sys::SetUserIdAndSecContext(pg_sys::Oid::from(BOOTSTRAP_SUPERUSER), context | restricted);
        let result = work();
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Whether the running transaction may write rows.
pub fn may_write() -> bool {
    // SAFETY: plain globals of this process, and looks at its state.
    unsafe { !pg_sys::XactReadOnly && !pg_sys::RecoveryInProgress() && !pg_sys::IsInParallelMode() }
}

/// A number that the running transaction has, and no other of this session.
pub fn transaction() -> u32 {
    // SAFETY: this process's own entry, which only it changes.
    unsafe {
        #[cfg(not(any(feature = "pg17", feature = "pg18")))]
        return (*pg_sys::MyProc).lxid;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        return (*pg_sys::MyProc).vxid.lxid;
    }
}
