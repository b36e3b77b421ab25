//! Every SQLSTATE the extension raises is chosen here, and nowhere else.

use pgrx::prelude::*;

/// What an SQL function raises.
pub use pgrx::pg_sys::panic::ErrorReport;

/// The kinds of error a caller can meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A bad argument or a malformed ciphertext (22023).
    BadArgument,
    /// A ciphertext that no vault key opens (22000).
    Undecipherable,
    /// The caller may not do that (42501).
    NotAllowed,
    /// There is one already (23505).
    Duplicate,
    /// Somebody else was quicker; the same again will succeed (40001).
    Conflict,
    /// More than is allowed (54000).
    TooLarge,
    /// No usable vault key is configured (F0000).
    KeyNotConfigured,
    /// The extension is not preloaded, its worker is down, or the call makes no sense in this transaction (55000).
    NotReady,
    /// The server can't do its part: no randomness, say (XX000).
    Internal,
}

impl Kind {
    fn sqlstate(self) -> PgSqlErrorCode {
        match self {
            Kind::BadArgument => PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            Kind::Undecipherable => PgSqlErrorCode::ERRCODE_DATA_EXCEPTION,
            Kind::NotAllowed => PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            Kind::Duplicate => PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
            Kind::Conflict => PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            Kind::TooLarge => PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            Kind::KeyNotConfigured => PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
            Kind::NotReady => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Kind::Internal => PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        }
    }
}

/// An error to raise: lower case, without a full stop, never quoting what may be secret.
pub fn error(kind: Kind, message: impl Into<String>) -> ErrorReport {
    ErrorReport::new(kind.sqlstate(), message.into(), "nexus_hub")
}

/// The error of every function that needs shared memory when the library is not preloaded.
pub fn not_preloaded() -> ErrorReport {
    error(Kind::NotReady, "nexus_hub is not preloaded")
        .set_detail("Without it no worker runs: jobs stay pending.")
        .set_hint("Add nexus_hub to shared_preload_libraries in postgresql.conf and restart the server.")
}
