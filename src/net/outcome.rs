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

impl Verdict {
    /// What it takes to write it.
    pub fn bytes(&self) -> usize {
        match self {
            Verdict::Completed { result } => result.len(),
            Verdict::Failed { error, result } => error.len() + result.as_ref().map_or(0, String::len),
        }
    }
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
    /// The lease that the job was claimed under.
    pub lease: Uuid,
    pub verdict: Verdict,
}
