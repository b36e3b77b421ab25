//! How a worker comes to be, and what it makes of the settings.

use super::assign::Edge;
use super::backlog::Backlog;
use super::feed::Feed;
use super::limits::SharedMeter;
use super::prune::Pruner;
use super::record::Records;
use super::refresh::Refresher;
use super::rotate;
use super::run::{GONE, RESTART, Worker};
use super::sync::Syncs;
use crate::domain::breaker::Rules;
use crate::domain::schedule::{Caps, Schedule};
use crate::jobs::queue::Queue;
use crate::net::outbound::{Egress, Outbound};
use crate::net::{LimitValues, Limits, Net};
use crate::pg::bgworker::Waiter;
use crate::pg::catalog::Extension;
use crate::pg::guc::database::DatabaseSettings;
use crate::pg::guc::{self, Executor, WorkerSettings};
use crate::pg::shmem::{self, WorkerState};
use crate::pg::{bgworker, catalog, transaction};
use crate::rate_limit::Recorder;
use crate::vault;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Descriptors that are not for requests: files of PostgreSQL, sessions, the way to the network thread.
const OTHER_DESCRIPTORS: usize = 200;
/// A worker that starts within this time of its server starts with it.
const PROMPT_START: Duration = Duration::from_secs(10);
/// How long to wait before the first transaction is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// How long a worker is wary that was started later.
const WARY_TIME: Duration = Duration::from_secs(60);

/// Runs the worker of a slot until it has to end, and returns its exit code.
pub fn main(slot: usize) -> i32 {
    let Some(database) = shmem::attach_worker(slot) else { return GONE };
    // Before any claim: others must know that jobs under these leases are held by somebody alive.
    let (holder, _) = Uuid::new_v4().as_u64_pair();
    shmem::set_holder(holder);
    let place = shmem::own_place();
    bgworker::start(Some(database));
    bgworker::pin_session_settings();
    let open = |extension: Extension| {
        let queue = Queue::open((place.number, place.of))?;
        queue.show_breakers(None)?;
        // What is set from here on, the polls notice.
        let database_settings = DatabaseSettings::read()?;
        let is_reset = database_settings.catch_up()?;
        Ok::<_, pgrx::spi::SpiError>((extension, queue, (database_settings, is_reset), edge()?))
    };
    let mut has_waited = false;
    let opened = loop {
        let opened = transaction::run(c"nexus_hub: starting", || {
            // The same lock as in every later transaction: the extension can't go while its functions are looked up.
            match catalog::extension().filter(|extension| catalog::hold_extension(*extension)) {
                Some(extension) => open(extension).map(Some).map_err(|problem| problem.to_string()),
                None => Ok(None),
            }
        });
        match opened {
            // Somebody makes, changes or drops the extension, and takes longer than a lock is waited for.
            Err(problem) if problem.transient && !bgworker::stop_requested() => {
                if !std::mem::replace(&mut has_waited, true) {
                    log!("nexus_hub: the worker waits before it starts: {}", problem.message);
                }
                if shmem::leave_requested() {
                    shmem::set_worker_state(WorkerState::Left);
                    return GONE;
                }
                bgworker::wait(RETRY_DELAY);
                bgworker::handle_interrupts_of_others();
            }
            // What was set and reset in all that time, one that connects now knows.
            Ok(Some(_)) if has_waited => {
                shmem::set_worker_state(WorkerState::Replaced);
                return GONE;
            }
            opened => break opened,
        }
    };
    let (extension, queue, (database_settings, is_reset), edge) = match opened {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            shmem::audit::forget(database);
            shmem::set_worker_state(WorkerState::NoExtension);
            return GONE;
        }
        Err(problem) => {
            log!("nexus_hub: the worker could not start: {}", problem.message);
            return RESTART;
        }
    };
    let descriptors = bgworker::raise_descriptor_limit();
    let settings = settings(descriptors);
    let limits = Arc::new(Limits::new(limit_values(&settings)));
    let started = Outbound::new(egress(&settings, descriptors)).and_then(|outbound| {
        let outbound = Arc::new(outbound);
        let net = bgworker::with_signals_blocked(|| Net::start(Arc::clone(&limits), Arc::clone(&outbound)));
        Ok((outbound, net.map_err(|problem| problem.to_string())?))
    });
    let (outbound, net) = match started {
        Ok(started) => started,
        Err(problem) => {
            log!("nexus_hub: could not start the network thread: {problem}");
            return RESTART;
        }
    };
    let edge = (settings.executor == Executor::Edge).then_some(edge);
    if let Some(Err(problem)) = &edge {
        log!("nexus_hub: {problem}");
    }
    tell_of_vault_keys(extension);
    // From here on commits wake this worker. What was committed before is found by the first claim.
    shmem::set_worker_state(WorkerState::Running);
    let now = Instant::now();
    Worker {
        extension,
        database,
        place,
        holder,
        leases: 0,
        queue,
        waiter: Waiter::new(net.wake_descriptor()),
        net,
        outbound,
        limits,
        descriptors,
        settings,
        edge,
        database_settings,
        outdated: is_reset,
        recorder: Recorder::new(now),
        drains: false,
        drain_until: None,
        settings_due: false,
        restoring_until: None,
        schedule: Schedule::new(caps(&settings), rules(&settings), Box::new(SharedMeter)),
        feed: Feed::new(now),
        in_flight: HashMap::new(),
        backlog: Backlog::new(now),
        syncs: Syncs::new(now),
        tried: HashSet::new(),
        picks: Vec::new(),
        breakers: Vec::new(),
        outcomes_due: false,
        picks_due: false,
        was_woken: false,
        looked_at: now,
        look_due: false,
        flush_at: None,
        // Later than the server: after a crash, as like as not.
        wary_until: (bgworker::server_uptime() > PROMPT_START).then(|| now + WARY_TIME),
        careful_until: None,
        trims_due: 0,
        // At once: jobs of a worker that is gone are given back by the poll.
        next_poll: now,
        records: Records::new(now),
        pruner: Pruner::new(now),
        refresher: Refresher::new(now),
        failures: 0,
        not_before: None,
        rotation: rotate::Post::default(),
    }
    .work()
}

/// Says in the log what is wrong with the vault's keys: that they cannot be used, or are not this database's.
pub fn tell_of_vault_keys(extension: Extension) {
    let stranger = || {
        transaction::run(c"nexus_hub: looking at the vault's keys", || {
            if !catalog::hold_extension(extension) {
                return Ok(None);
            }
            vault::stranger().map_err(|problem| problem.to_string())
        })
        .unwrap_or_else(|failure| Some(format!("could not look at the vault's keys: {}", failure.message)))
    };
    if let Some(problem) = vault::problem().or_else(stranger) {
        log!("nexus_hub: {problem}");
    }
}

/// The executor elsewhere, as the settings name it. Call it in a transaction.
pub fn edge() -> Result<Result<Edge, String>, pgrx::spi::SpiError> {
    Ok(Edge::new(&Queue::app_setting("edge_function_url")?, &Queue::app_setting("service_role_key")?))
}

/// The settings, with no more requests in flight than there are descriptors for: one for each, and one for a
/// connection that is kept for the next request.
pub fn settings(descriptors: usize) -> WorkerSettings {
    let mut settings = guc::worker_settings();
    let most = (descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).max(1);
    if settings.max_in_flight > most {
        log!("nexus_hub: only {most} requests at a time: the limit of open files is {descriptors}");
        settings.max_in_flight = most;
    }
    settings
}

/// What may be in flight.
pub fn caps(settings: &WorkerSettings) -> Caps {
    Caps { total: settings.max_in_flight, per_host: settings.max_in_flight_per_host }
}

/// When breakers open.
pub fn rules(settings: &WorkerSettings) -> Rules {
    Rules { threshold: settings.breaker_threshold, cooldown: settings.breaker_cooldown }
}

/// What bounds requests and answers.
pub fn limit_values(settings: &WorkerSettings) -> LimitValues {
    LimitValues {
        max_in_flight: settings.max_in_flight,
        max_response_bytes: settings.max_response_bytes,
        response_memory: settings.response_memory,
        max_redirects: settings.max_redirects,
        session_idle_timeout: settings.session_idle_timeout,
    }
}

/// What requests go by; a file that cannot be read leaves the system's authorities.
pub fn egress(settings: &WorkerSettings, descriptors: usize) -> Egress {
    let authorities = guc::ca_file().map_or_else(Vec::new, |path| {
        std::fs::read(&path).unwrap_or_else(|problem| {
            log!("nexus_hub: nexus_hub.ca_file {} cannot be read: {problem}", path.display());
            Vec::new()
        })
    });
    // What is kept for later requests must leave room for as many as may be in flight.
    let most_open = descriptors.saturating_sub(settings.max_in_flight + OTHER_DESCRIPTORS / 2);
    Egress { policy: guc::egress_policy(), authorities, max_idle: settings.max_in_flight, most_open }
}
