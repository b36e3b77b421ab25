//! The floor that touches the network: plain data in, plain data out, on a thread of its own.
//!
//! Nothing here knows PostgreSQL, and nothing here may call it: the thread is not PostgreSQL's.

mod body;
pub mod endpoint;
pub mod failure;
pub mod http;
pub mod mcp;
pub mod outbound;
mod outcome;
mod redaction;
mod runtime;
pub mod template;

pub use body::Held;
pub use outcome::{Ending, Retry, Verdict};
pub use runtime::{LimitValues, Limits, Net, Request, ThreadGone, Work};
