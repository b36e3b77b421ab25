//! How an attempt ended.

use super::body::Held;
use super::failure::{Failure, quote};
use crate::domain::schedule::Reach;
use std::time::Duration;
use uuid::Uuid;

/// What a job's row will say, if this was its last attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A good answer, as JSON text.
    Completed { result: String },
    /// None; sometimes there is an answer all the same, such as that of a tool which reports an error.
    Failed { error: String, result: Option<String> },
    /// An executor elsewhere has taken the job over, and will write its end.
    HandedOver,
}

impl Verdict {
    /// What it takes to write it.
    pub fn bytes(&self) -> usize {
        match self {
            Verdict::Completed { result } => result.len(),
            Verdict::Failed { error, result } => error.len() + result.as_ref().map_or(0, String::len),
            Verdict::HandedOver => 0,
        }
    }
}

/// Whether the same request may succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    Never,
    Later,
    /// The server said when.
    After(Duration),
}

/// The end of an attempt.
#[derive(Clone, Debug)]
pub struct Ending {
    pub verdict: Verdict,
    pub retry: Retry,
    /// Whether the host was there.
    pub reach: Reach,
    /// The status of an answer that was a failure.
    pub http_status: Option<u16>,
    /// The memory that a large answer was given.
    pub held: Held,
}

impl Ending {
    /// The end of an attempt that had an answer and needs no other.
    pub fn answered(verdict: Verdict) -> Self {
        Self { verdict, retry: Retry::Never, reach: Reach::Reached, http_status: None, held: Held::default() }
    }

    /// The end of an attempt that was never sent.
    pub fn refused(error: &str) -> Self {
        let verdict = Verdict::Failed { error: quote(error), result: None };
        Self { verdict, retry: Retry::Never, reach: Reach::Unknown, http_status: None, held: Held::default() }
    }
}

impl From<Failure> for Ending {
    fn from(failure: Failure) -> Self {
        Self {
            retry: failure.retry(),
            reach: failure.reach(),
            http_status: failure.http_status(),
            held: Held::default(),
            verdict: Verdict::Failed { error: failure.to_string(), result: None },
        }
    }
}

/// A job and how its attempt ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub job: Uuid,
    /// The lease that the job was claimed under.
    pub lease: Uuid,
    pub ending: Ending,
}
