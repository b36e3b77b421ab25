//! What travels with a call through the MCP library: there to its HTTP request, and back with what went wrong.

use crate::net::body::Held;
use crate::net::failure::Failure;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;

/// A place for the failure that explains what the library reports.
#[derive(Clone, Debug, Default)]
pub struct Noted(Arc<(Mutex<Option<Failure>>, tokio::sync::Notify)>);

impl Noted {
    /// Notes a failure, and tells who waits for one.
    pub fn set(&self, failure: Failure) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
        self.0.1.notify_one();
    }

    /// Notes a failure, unless one was noted before, which explains this one.
    pub fn set_first(&self, failure: Failure) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
        self.0.1.notify_one();
    }

    /// The failure, if one was noted.
    pub fn take(&self) -> Option<Failure> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Travels with a call from the job to its HTTP request, and with a failure back.
#[derive(Clone, Debug)]
pub struct CallTag {
    pub job: Uuid,
    /// Whether the job makes other requests than this one, so that its id tells none of them apart.
    pub is_one_of_many: bool,
    /// What the arguments' stand-in is to be replaced by.
    pub arguments: Option<Arc<str>>,
    pub noted: Noted,
    /// The memory that the answer was given.
    pub held: Held,
}

impl CallTag {
    pub fn new(job: Uuid, arguments: Option<String>) -> Self {
        let (noted, held) = (Noted::default(), Held::default());
        Self { job, is_one_of_many: false, arguments: arguments.map(Arc::from), noted, held }
    }

    /// That of one of several requests, whose answers are given memory together.
    pub fn one_of_many(job: Uuid, held: Held) -> Self {
        Self { is_one_of_many: true, held, ..Self::new(job, None) }
    }

    /// Waits for the transport to note a failure.
    pub async fn failed(&self) -> Failure {
        loop {
            if let Some(failure) = self.take() {
                return failure;
            }
            self.noted.0.1.notified().await;
        }
    }

    /// The failure, if one was noted.
    pub fn take(&self) -> Option<Failure> {
        self.noted.take()
    }
}
