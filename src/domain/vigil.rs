//! How the state of a worker is judged from outside.

use std::time::Duration;

/// What a worker that is waiting may be late.
const GRACE: Duration = Duration::from_secs(60);
/// Looks that a worker may miss.
const MISSED_POLLS: u32 = 3;
/// Workers that may end soon after their start before the next one is not trusted.
const RESTARTS: u32 = 2;
/// After this time a worker is trusted, and the start of the next one is not held back by failures before.
pub const HEALTHY_TIME: Duration = Duration::from_secs(60);

/// What is seen of a worker.
#[derive(Clone, Copy, Debug)]
pub struct Vigil {
    /// Since it was asked for.
    pub age: Duration,
    /// Since it has done its work, or was asked for.
    pub unseen_for: Duration,
    /// Workers before it that ended soon after their start, in a row.
    pub restarts: u32,
}

impl Vigil {
    /// Whether it gets nowhere. A worker looks at the job table at least every `poll_interval`, unless somebody has locked
    /// it or the machine has no time for it.
    pub fn is_stuck(self, poll_interval: Duration) -> bool {
        let is_late = self.unseen_for > GRACE + poll_interval * MISSED_POLLS;
        is_late || (self.restarts >= RESTARTS && self.age < HEALTHY_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vigil(age: u64, unseen_for: u64, restarts: u32) -> Vigil {
        Vigil { age: Duration::from_secs(age), unseen_for: Duration::from_secs(unseen_for), restarts }
    }

    #[test]
    fn a_worker_is_stuck_when_it_has_missed_three_looks_and_a_minute() {
        let poll_interval = Duration::from_secs(10);
        assert!(!vigil(1000, 90, 0).is_stuck(poll_interval));
        assert!(vigil(1000, 91, 0).is_stuck(poll_interval));
        assert!(!vigil(1000, 91, 0).is_stuck(Duration::from_secs(3600)));
        assert!(!vigil(0, 0, 0).is_stuck(Duration::ZERO));
    }

    #[test]
    fn a_worker_whose_forerunners_have_failed_has_to_last_a_minute() {
        let poll_interval = Duration::from_secs(10);
        assert!(!vigil(1, 0, 1).is_stuck(poll_interval));
        assert!(vigil(1, 0, 2).is_stuck(poll_interval));
        assert!(vigil(59, 0, 5).is_stuck(poll_interval));
        assert!(!vigil(60, 0, 5).is_stuck(poll_interval));
    }
}
