//! Advisory locks that SQL cannot take, because there the last field of their keys is 1 or 2. A session's lock goes with the
//! session, in whatever way that ends; locks of other kinds outlive an error in it.

use super::identity;
use pgrx::prelude::*;

/// What a lock is of, in one database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Sessions that load a dump share it.
    Restore = 3,
    /// The process that rotates the vault's keys.
    Rotation = 4,
}

impl Lock {
    fn tag(self) -> pg_sys::LOCKTAG {
        pg_sys::LOCKTAG {
            locktag_field1: identity::database().to_u32(),
            locktag_field2: pg_sys::ExtensionRelationId.to_u32(),
            locktag_field3: 0,
            locktag_field4: self as u16,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        }
    }

    /// Takes it for the session, together with others who share it. Call it in a transaction.
    pub fn share(self) {
        // SAFETY: an ordinary lock of the session; taken once more it is counted.
        unsafe { pg_sys::LockAcquire(&self.tag(), pg_sys::ShareLock as i32, true, false) };
    }

    /// Takes it for the session alone, and tells whether nobody else has it. Call it in a transaction.
    pub fn take(self) -> bool {
        // SAFETY: an ordinary lock of the session, which is not waited for.
        let got = unsafe { pg_sys::LockAcquire(&self.tag(), pg_sys::ExclusiveLock as i32, true, true) };
        got != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    }

    /// Whether somebody shares it. Call it in a transaction.
    pub fn is_shared(self) -> bool {
        // In the way of those who share it, and not of another one who looks.
        let mode = pg_sys::RowExclusiveLock as i32;
        // SAFETY: an ordinary lock of the running transaction, which is not waited for, and given back at once.
        unsafe {
            let got = pg_sys::LockAcquire(&self.tag(), mode, false, true);
            got == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL || {
                pg_sys::LockRelease(&self.tag(), mode, false);
                false
            }
        }
    }
}
