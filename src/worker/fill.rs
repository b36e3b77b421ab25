//! The secrets that a batch of jobs names, and their places in the jobs' requests.

use crate::domain::job::JobType;
use crate::domain::placeholder::OPENING;
use crate::domain::secret::Secret;
use crate::jobs::queue::{ClaimedJob, Queue};
use crate::net::endpoint::Headers;
use crate::net::http::HttpCall;
use crate::net::template::{self, Filled, Template};
use crate::secrets::{self, Wanted};
use pgrx::spi::SpiError;
use std::collections::HashMap;

/// What was found of the secrets that jobs name.
#[derive(Debug, Default)]
pub struct Secrets(HashMap<Wanted, Result<Secret, String>>);

impl Secrets {
    /// Reads and opens what the jobs name; nothing at all when they name nothing. `is_edge`: others run the MCP jobs.
    /// Call it in the transaction that claims the jobs.
    pub fn read(queue: &Queue, jobs: &[ClaimedJob], is_edge: bool) -> Result<Self, SpiError> {
        let mut all: Vec<Wanted> = jobs.iter().flat_map(|job| of_job(job, is_edge)).collect();
        if all.is_empty() {
            return Ok(Self::default());
        }
        all.sort();
        all.dedup();
        let found = queue.secrets(&all)?;
        let open = |(wanted, found): (Wanted, _)| {
            let secret = secrets::open(&wanted, found);
            (wanted, secret)
        };
        Ok(Self(all.into_iter().zip(found).map(open).collect()))
    }

    /// Fills in what a job's request wants.
    pub fn fill(&self, job: &ClaimedJob, template: &Template, headers: &Headers) -> Result<Filled, String> {
        let mut values = template::Secrets::new();
        for wanted in wanted(job, template) {
            let found = self.0.get(&wanted).ok_or("the job's secrets were not looked up")?;
            values.insert(wanted.name, found.clone()?);
        }
        template.fill(headers, &values)
    }
}

/// The secrets that a job wants and may have. A user's own server gets the user's own secrets alone: a shared one would
/// go wherever the user says. System servers and http_request jobs are written by people who are trusted with both.
fn wanted(job: &ClaimedJob, template: &Template) -> impl Iterator<Item = Wanted> {
    let may_be_shared = job.job_type == JobType::HTTP_REQUEST || !job.server.is_users_own();
    template.names().iter().map(move |name| Wanted { user: job.user_id, may_be_shared, name: name.clone() })
}

fn of_job(job: &ClaimedJob, is_edge: bool) -> Vec<Wanted> {
    // What is wrong with a job is said when its request is made.
    if job.job_type == JobType::HTTP_REQUEST {
        if !job.params.contains(OPENING) {
            return Vec::new();
        }
        let call = HttpCall::parse(&job.params).ok();
        let template = call.as_ref().and_then(HttpCall::template);
        return template.map(|template| wanted(job, template).collect()).unwrap_or_default();
    }
    if is_edge {
        return Vec::new();
    }
    let endpoint = job.server.endpoint(job.server_id.as_deref().unwrap_or_default()).ok();
    let template = endpoint.and_then(|endpoint| endpoint.template.as_ref());
    template.map(|template| wanted(job, template).collect()).unwrap_or_default()
}
