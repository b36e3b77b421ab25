//! The pure floor: no PostgreSQL, no network, no clock and no randomness of its own. Tested by `cargo test --lib`.

pub mod backoff;
pub mod breaker;
pub mod egress;
pub mod envelope;
pub mod job;
pub mod json;
pub mod keyring;
pub mod provider;
pub mod rate;
pub mod schedule;
pub mod secret;
