//! How the state of a worker is judged from outside.

use std::time::Duration;

/// What a worker that is waiting may be late.
const GRACE: Duration = Duration::from_secs(60);
/// Looks that a worker may miss.
const MISSED_POLLS: u32 = 3;

/// Whether a worker that was seen at work so long ago is stuck: it looks at the job table at least every `poll_interval`,
/// unless somebody has locked it or the machine has no time for it.
pub fn is_stuck(unseen_for: Duration, poll_interval: Duration) -> bool {
    unseen_for > GRACE + poll_interval * MISSED_POLLS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_stuck_when_it_has_missed_three_looks_and_a_minute() {
        let poll_interval = Duration::from_secs(10);
        assert!(!is_stuck(Duration::from_secs(90), poll_interval));
        assert!(is_stuck(Duration::from_secs(91), poll_interval));
        assert!(!is_stuck(Duration::from_secs(91), Duration::from_secs(3600)));
        assert!(!is_stuck(Duration::ZERO, Duration::ZERO));
    }
}
