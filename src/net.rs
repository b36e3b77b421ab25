//! The floor that touches the network: plain data in, plain data out, on a thread of its own.
//!
//! Nothing here knows PostgreSQL, and nothing here may call it: the thread is not PostgreSQL's.

pub mod endpoint;
pub mod failure;
pub mod http;
pub mod mcp;
mod outcome;
mod runtime;

pub use outcome::{Outcome, Verdict};
pub use runtime::{Limits, Net, Request, ThreadGone, Work};
