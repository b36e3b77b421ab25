//! How a job ended.

use super::failure::Failure;
use uuid::Uuid;

/// What a job's row will say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A good answer, as JSON text.
    Completed { result: String },
    /// None; sometimes there is an answer all the same, such as that of a tool which reports an error.
    Failed { error: String, result: Option<String> },
}

impl From<Failure> for Verdict {
    fn from(failure: Failure) -> Self {
        Verdict::Failed { error: failure.to_string(), result: None }
    }
}

/// A job and its verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub job: Uuid,
    pub verdict: Verdict,
}
