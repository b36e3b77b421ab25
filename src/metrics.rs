//! Metrics for Prometheus: what is counted in shared memory, and what a look at the tables adds.

use crate::domain::metrics::{self, Gauges, RateGauges, WorkerGauge};
use crate::pg::shmem::{WorkerState, counters, pulse, rates};
use crate::pg::{guc, identity};
use pgrx::prelude::*;
use pgrx::spi::SpiError;

/// Seconds from 1970 to 2000, from when PostgreSQL counts.
const EPOCH: f64 = 946_684_800.0;

/// The page that Prometheus reads; see the function's COMMENT.
#[pg_extern(sql = false)]
fn metrics_page() -> Result<String, SpiError> {
    let mut gauges = tables()?;
    gauges.version = env!("CARGO_PKG_VERSION");
    gauges.workers = workers();
    gauges.rate = rates::table().map(|table| {
        let is = table.statistics();
        RateGauges {
            allowed: is.allowed,
            denied: is.denied,
            exempt: is.exempt,
            no_room: is.full,
            keys: is.keys.into(),
            max_keys: is.max_keys.into(),
        }
    });
    Ok(match counters::of(identity::database()) {
        Some(count) => metrics::page(Some(&count), &gauges),
        None => metrics::page(None, &gauges),
    })
}

fn tables() -> Result<Gauges, SpiError> {
    Spi::connect(|client| {
        let query = "SELECT database, pending, oldest_pending_seconds, job_rows, job_bytes, unreachable_hosts,
                            cache_entries, cache_expired_share, failing_syncs
                       FROM _nexus_hub.gauges()";
        let row = client.select(query, Some(1), &[])?.first();
        Ok(Gauges {
            database: row.get(1)?.unwrap_or_default(),
            pending: row.get(2)?,
            oldest_pending_seconds: row.get(3)?,
            table_rows: row.get(4)?,
            table_bytes: row.get(5)?,
            unreachable_hosts: row.get(6)?,
            cache_entries: row.get(7)?,
            cache_expired_share: row.get(8)?,
            failing_syncs: row.get(9)?,
            ..Gauges::default()
        })
    })
}

fn workers() -> Vec<WorkerGauge> {
    let database = identity::database();
    let poll_interval = guc::worker_settings().poll_interval;
    let own = pulse::sightings().into_iter().filter(|is| is.database == database);
    let mut workers: Vec<_> = own
        .map(|is| WorkerGauge {
            number: is.place.number,
            is_up: is.state == WorkerState::Running && !is.vigil().is_stuck(poll_interval),
            last_loop: Some(EPOCH + is.last_loop as f64 / 1e6),
            in_flight: if matches!(is.state, WorkerState::Running | WorkerState::Draining) { is.in_flight } else { 0 },
        })
        .collect();
    // One that drains or has ended may be there beside the one in its place.
    workers.sort_by_key(|worker| (worker.number, !worker.is_up));
    workers.dedup_by(|other, worker| {
        let is_same = other.number == worker.number;
        if is_same {
            worker.in_flight += other.in_flight;
        }
        is_same
    });
    // One that is missing is not up.
    for number in 0..guc::workers_per_database() {
        if !workers.iter().any(|worker| worker.number == number) {
            workers.push(WorkerGauge { number, is_up: false, last_loop: None, in_flight: 0 });
        }
    }
    workers
}
