//! The pure floor: no PostgreSQL, no network, no clock and no randomness of its own. Tested by `cargo test --lib`.

pub mod audit;
pub mod backoff;
pub mod breaker;
pub mod claims;
pub mod egress;
pub mod envelope;
pub mod job;
pub mod json;
pub mod keyring;
pub mod metrics;
pub mod needle;
pub mod percent;
pub mod placeholder;
pub mod provider;
pub mod rate;
pub mod redact;
pub mod schedule;
pub mod secret;
pub mod sweep;
pub mod vigil;
