//! Hosts: how a request ended tells whether one is there, and its breaker what follows from that.

use super::places::{Counted, Parked, Place};
use super::{LaneId, Pick, Schedule, Waiting};
use crate::domain::breaker::{Breaker, Trip};
use std::rc::Rc;
use std::time::{Duration, Instant};

#[derive(Default)]
pub struct Host {
    pub(super) name: String,
    pub(super) in_flight: usize,
    pub(super) breaker: Breaker,
    pub(super) probe: Option<u128>,
    pub(super) is_changed: bool,
    pub(super) parked: Parked,
}

/// Whether a job's host could be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    Reached,
    Unreachable(String),
    /// The time was over, and nobody knows at what.
    Silent(String),
    /// It was not tried.
    Unknown,
}

/// How a breaker stands, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerState {
    pub host: String,
    /// closed, open or half-open.
    pub state: &'static str,
    pub failures: u32,
    pub probe_in: Duration,
    pub error: String,
}

impl Schedule {
    pub(super) fn host(&mut self, name: &str) -> usize {
        self.hosts.place(name, || Host { name: name.to_owned(), ..Host::default() })
    }

    pub(super) fn probe(&mut self, place: usize, job: u128) {
        self.hosts[place].breaker.probe();
        self.hosts[place].probe = Some(job);
        self.changed(place);
    }

    pub(super) fn changed(&mut self, place: usize) {
        let host = &mut self.hosts[place];
        if !std::mem::replace(&mut host.is_changed, true) {
            self.changed.push(place);
        }
        if matches!(host.breaker, Breaker::Closed { .. }) {
            self.tripped.remove(&place);
        } else {
            self.tripped.insert(place);
        }
    }

    /// A job that was picked is no longer in flight, for whatever reason.
    pub fn finished(&mut self, id: LaneId, counted: Counted, job: u128, reach: &Reach, now: Instant) {
        self.count(id, counted, false);
        let Some(place) = counted.host else { return };
        let host = &mut self.hosts[place];
        let is_probe = host.probe.take_if(|probe| *probe == job).is_some();
        let (trip, is_changed) = match reach {
            Reach::Reached => (Trip::Nothing, host.breaker.reached()),
            // A probe that nobody answers is no better than one that nobody takes.
            Reach::Silent(error) if is_probe => (host.breaker.failed(now, error, true, &self.rules), true),
            Reach::Unreachable(error) => {
                let trip = host.breaker.failed(now, error, is_probe, &self.rules);
                (trip, trip != Trip::Nothing)
            }
            Reach::Silent(_) | Reach::Unknown => {
                if is_probe {
                    host.breaker.probe_lost(now);
                }
                (Trip::Nothing, is_probe)
            }
        };
        if is_changed {
            self.changed(place);
        }
        match (trip, reach) {
            (Trip::ProbeFailed, Reach::Unreachable(error) | Reach::Silent(error)) => self.doom(place, error),
            (_, Reach::Reached) if is_changed => self.unpark(Place::Host(place), usize::MAX),
            _ => {}
        }
    }

    /// The probe stood for all that waited for it.
    pub(super) fn doom(&mut self, host: usize, error: &str) {
        let error: Rc<str> = error.into();
        for id in 0..self.lanes.len() {
            // One that rests has waited for something else.
            let Some(lane) = self.lane(id).filter(|lane| lane.host == Some(host) && !lane.rests) else { continue };
            let waiting: Vec<_> = lane.waiting.iter_mut().map(std::mem::take).collect();
            for (priority, positions) in waiting.into_iter().enumerate() {
                let picks = positions.into_iter();
                self.doomed.extend(picks.map(|Waiting { position, bytes }| Pick {
                    position,
                    bytes,
                    lane: id,
                    counted: Counted::default(),
                    priority,
                    charge: None,
                    failure: Some(Rc::clone(&error)),
                }));
                self.look_for_more(id, priority);
            }
        }
        // Those that are empty now are to be forgotten.
        self.unpark(Place::Host(host), usize::MAX);
    }

    /// The breakers that have changed since the last call.
    pub fn breaker_changes(&mut self, now: Instant) -> Vec<BreakerState> {
        let mut changes = Vec::new();
        for place in std::mem::take(&mut self.changed) {
            let host = &mut self.hosts[place];
            host.is_changed = false;
            let (state, failures, until, error) = match &host.breaker {
                Breaker::Closed { failures } => ("closed", *failures, now, ""),
                Breaker::Open { failures, until, error, .. } => ("open", *failures, *until, error.as_str()),
                Breaker::HalfOpen { failures, error, .. } => ("half-open", *failures, now, error.as_str()),
            };
            changes.push(BreakerState {
                host: host.name.clone(),
                state,
                failures,
                probe_in: until.saturating_duration_since(now),
                error: error.to_owned(),
            });
        }
        changes
    }

    /// When a probe may be sent to a host.
    pub fn next_probe(&self) -> Option<Instant> {
        self.tripped.iter().filter_map(|host| self.hosts[*host].breaker.probe_at()).min()
    }

    /// Whether jobs wait for their claim that share a probe's failure.
    pub fn has_doomed(&self) -> bool {
        !self.doomed.is_empty()
    }
}
