//! The circuit breaker of a host: after repeated connection failures its jobs wait, and one at a time is sent as a
//! probe. (Nygard, "Release It!"; the states have their usual names.)

use std::time::{Duration, Instant};

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Connection failures in a row that open it; 0: it never opens.
    pub threshold: u32,
    /// Time until the first probe; it doubles with each probe that fails, up to [`Rules::MAX_TIMES`] times this.
    pub cooldown: Duration,
}

impl Rules {
    const MAX_TIMES: u32 = 16;

    fn wait(&self, failed_probes: u32) -> Duration {
        self.cooldown * 2u32.saturating_pow(failed_probes).min(Self::MAX_TIMES)
    }
}

/// How a host stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Jobs are sent.
    Closed { failures: u32 },
    /// Jobs wait until `until`; then one is sent as a probe.
    Open { failures: u32, failed_probes: u32, until: Instant, error: String },
    /// The probe is on its way.
    HalfOpen { failures: u32, failed_probes: u32, error: String },
}

/// What may be sent to a host now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    All,
    One,
    Nothing,
}

/// What a failure did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trip {
    Nothing,
    Opened,
    /// The probe failed: so would have all that waited for it.
    ProbeFailed,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker::Closed { failures: 0 }
    }
}

impl Breaker {
    /// What may be sent now. After [`Pass::One`] call [`Breaker::probe`].
    pub fn pass(&self, now: Instant) -> Pass {
        match self {
            Breaker::Closed { .. } => Pass::All,
            Breaker::Open { until, .. } if now >= *until => Pass::One,
            Breaker::Open { .. } | Breaker::HalfOpen { .. } => Pass::Nothing,
        }
    }

    /// A probe is sent.
    pub fn probe(&mut self) {
        if let Breaker::Open { failures, failed_probes, error, .. } = self {
            *self =
                Breaker::HalfOpen { failures: *failures, failed_probes: *failed_probes, error: std::mem::take(error) };
        }
    }

    /// The probe came to nothing, neither good nor bad: another may be sent.
    pub fn probe_lost(&mut self, now: Instant) {
        if let Breaker::HalfOpen { failures, failed_probes, error } = self {
            *self = Breaker::Open {
                failures: *failures,
                failed_probes: *failed_probes,
                until: now,
                error: std::mem::take(error),
            };
        }
    }

    /// The host was reached. Tells whether that changes what is to be seen.
    pub fn reached(&mut self) -> bool {
        let was_open = !matches!(self, Breaker::Closed { .. });
        *self = Breaker::default();
        was_open
    }

    /// A connection failed, that of the probe or another's.
    pub fn failed(&mut self, now: Instant, error: &str, is_probe: bool, rules: &Rules) -> Trip {
        match self {
            Breaker::Closed { failures } => {
                *failures = failures.saturating_add(1);
                if rules.threshold == 0 || *failures < rules.threshold {
                    return Trip::Nothing;
                }
                *self = Breaker::Open {
                    failures: *failures,
                    failed_probes: 0,
                    until: now + rules.wait(0),
                    error: error.to_owned(),
                };
                Trip::Opened
            }
            Breaker::HalfOpen { failures, failed_probes, .. } if is_probe => {
                let failed_probes = failed_probes.saturating_add(1);
                *self = Breaker::Open {
                    failures: failures.saturating_add(1),
                    failed_probes,
                    until: now + rules.wait(failed_probes),
                    error: error.to_owned(),
                };
                Trip::ProbeFailed
            }
            Breaker::Open { failures, .. } | Breaker::HalfOpen { failures, .. } => {
                *failures = failures.saturating_add(1);
                Trip::Nothing
            }
        }
    }

    /// When a probe may be sent, if the breaker is open.
    pub fn probe_at(&self) -> Option<Instant> {
        match self {
            Breaker::Open { until, .. } => Some(*until),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { threshold: 3, cooldown: Duration::from_secs(5) };

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        assert_eq!(breaker.failed(now, "refused", false, &RULES), Trip::Nothing);
        assert_eq!(breaker.failed(now, "refused", false, &RULES), Trip::Nothing);
        assert_eq!(breaker.failed(now, "refused", false, &RULES), Trip::Opened);
        breaker
    }

    #[test]
    fn it_opens_after_so_many_failures_in_a_row_and_an_answer_begins_anew() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(now, "refused", false, &RULES);
            breaker.failed(now, "refused", false, &RULES);
            assert!(!breaker.reached());
        }
        assert_eq!(breaker.pass(now), Pass::All);
        assert_eq!(opened(now).pass(now), Pass::Nothing);
        assert!(opened(now).reached());
    }

    #[test]
    fn an_open_one_lets_a_single_probe_through_when_its_time_is_over() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + RULES.cooldown;
        assert_eq!(breaker.probe_at(), Some(later));
        assert_eq!(breaker.pass(later), Pass::One);
        breaker.probe();
        assert_eq!(breaker.pass(later), Pass::Nothing);
        assert!(breaker.reached());
        assert_eq!(breaker.pass(later), Pass::All);
    }

    #[test]
    fn each_probe_that_fails_doubles_the_wait_up_to_a_bound() {
        let now = Instant::now();
        let mut breaker = opened(now);
        for times in [2, 4, 8, 16, 16, 16] {
            breaker.probe();
            assert_eq!(breaker.failed(now, "refused", false, &RULES), Trip::Nothing, "another's");
            assert_eq!(breaker.failed(now, "refused", true, &RULES), Trip::ProbeFailed);
            assert_eq!(breaker.probe_at(), Some(now + RULES.cooldown * times));
        }
    }

    #[test]
    fn a_lost_probe_makes_room_for_another() {
        let now = Instant::now();
        let mut breaker = opened(now);
        breaker.probe();
        breaker.probe_lost(now);
        assert_eq!(breaker.pass(now), Pass::One);
    }

    #[test]
    fn a_threshold_of_zero_never_opens_it() {
        let mut breaker = Breaker::default();
        let rules = Rules { threshold: 0, ..RULES };
        for _ in 0..100 {
            assert_eq!(breaker.failed(Instant::now(), "refused", false, &rules), Trip::Nothing);
        }
        assert_eq!(breaker.pass(Instant::now()), Pass::All);
    }
}
