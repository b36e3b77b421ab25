//! When a failed attempt is made again.

use std::time::{Duration, SystemTime};

/// More doublings than it takes from the shortest duration, a nanosecond, to the longest.
const MOST_DOUBLINGS: u32 = 95;

/// Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"), but never less than
/// a tenth of the shortest ceiling, so that nothing is tried again at once. `attempt` counts the attempts made so far,
/// 1 or more; `jitter` is uniform in [0, 1).
pub fn delay(attempt: u32, base: Duration, cap: Duration, jitter: f64) -> Duration {
    let first = base.min(cap);
    let doublings = attempt.saturating_sub(1).min(MOST_DOUBLINGS);
    let ceiling = (0..doublings).fold(first, |ceiling, _| ceiling.saturating_mul(2).min(cap));
    let jitter = if jitter.is_nan() { 1.0 } else { jitter.clamp(0.0, 1.0) };
    // `mul_f64` panics when rounding takes it past the longest duration.
    let spread = Duration::try_from_secs_f64(ceiling.as_secs_f64() * jitter).unwrap_or(ceiling);
    spread.clamp(first / 10, ceiling)
}

/// The wait that a Retry-After header asks for (RFC 9110, 10.2.3): seconds or an HTTP date, measured from `now`. A date
/// in the past is zero, seconds beyond measure are the most there can be. `None` when it is neither.
pub fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // Of digits alone, only too many are no number.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_secs(2);
    const CAP: Duration = Duration::from_secs(60);

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let seconds = |attempt| delay(attempt, BASE, CAP, 1.0).as_secs();
        assert_eq!([1, 2, 3, 4, 5, 6, 7, 100].map(seconds), [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(seconds(0), 2);
        assert_eq!(seconds(u32::MAX), 60);
    }

    #[test]
    fn the_jitter_spreads_the_delay_over_all_below_the_ceiling() {
        assert_eq!(delay(3, BASE, CAP, 0.5), Duration::from_secs(4));
        assert_eq!(delay(4, BASE, CAP, 0.25), Duration::from_secs(4));
        assert_eq!(delay(1, BASE, CAP, 0.75), Duration::from_millis(1500));
    }

    #[test]
    fn no_delay_is_below_the_floor() {
        assert_eq!(delay(1, BASE, CAP, 0.0), Duration::from_millis(200));
        assert_eq!(delay(1, BASE, CAP, 0.099), Duration::from_millis(200));
        assert_eq!(delay(1, BASE, CAP, 0.2), Duration::from_millis(400));
        assert_eq!(delay(9, BASE, CAP, 0.0), Duration::from_millis(200));
    }

    #[test]
    fn a_cap_below_the_base_bounds_ceiling_and_floor() {
        assert_eq!(delay(1, CAP, BASE, 1.0), BASE);
        assert_eq!(delay(5, CAP, BASE, 1.0), BASE);
        assert_eq!(delay(5, CAP, BASE, 0.0), BASE / 10);
        assert_eq!(delay(5, BASE, Duration::ZERO, 0.5), Duration::ZERO);
    }

    #[test]
    fn jitter_out_of_bounds_is_clamped_and_no_number_is_one() {
        for (jitter, seconds) in [(-1.0, 0.2), (f64::NEG_INFINITY, 0.2), (-0.0, 0.2), (1.5, 2.0), (f64::INFINITY, 2.0)]
        {
            assert_eq!(delay(1, BASE, CAP, jitter), Duration::from_secs_f64(seconds), "{jitter}");
        }
        assert_eq!(delay(1, BASE, CAP, f64::NAN), BASE);
    }

    #[test]
    fn the_extremes_overflow_nothing() {
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(delay(u32::MAX, Duration::MAX, Duration::MAX, 1.0), Duration::MAX);
        assert_eq!(delay(u32::MAX, nanosecond, Duration::MAX, 1.0), Duration::MAX);
        assert_eq!(delay(41, nanosecond, Duration::MAX, 1.0), Duration::from_nanos(1 << 40));
        assert_eq!(delay(u32::MAX, Duration::ZERO, Duration::MAX, 1.0), Duration::ZERO);
        assert_eq!(delay(1, nanosecond, CAP, 0.0), Duration::ZERO);
    }

    /// RFC 9110's example of a date, 5.6.7, in its three notations.
    const DATES: [&str; 3] =
        ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"];

    /// The time of that date.
    fn then() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    #[test]
    fn seconds_are_digits_and_nothing_else() {
        for (value, seconds) in [("0", 0), ("120", 120), (" 5\t", 5), ("007", 7), ("18446744073709551615", u64::MAX)] {
            assert_eq!(retry_after(value, then()), Some(Duration::from_secs(seconds)), "{value}");
        }
        for value in ["", "  ", "-1", "+1", "1.5", "1e3", "0x10", "1 2", "12s", "soon", "\u{0663}", "1_000"] {
            assert_eq!(retry_after(value, then()), None, "{value}");
        }
    }

    #[test]
    fn seconds_beyond_measure_saturate() {
        let most = Some(Duration::from_secs(u64::MAX));
        assert_eq!(retry_after("18446744073709551616", then()), most);
        assert_eq!(retry_after(&"9".repeat(1000), then()), most);
    }

    #[test]
    fn a_date_is_measured_from_now_and_the_past_is_zero() {
        for date in DATES {
            assert_eq!(retry_after(date, then() - Duration::from_secs(90)), Some(Duration::from_secs(90)), "{date}");
            assert_eq!(retry_after(date, then()), Some(Duration::ZERO), "{date}");
            assert_eq!(retry_after(date, then() + Duration::from_secs(90)), Some(Duration::ZERO), "{date}");
        }
        let padded = format!(" {}\t", DATES[0]);
        assert_eq!(retry_after(&padded, then() - Duration::from_millis(1)), Some(Duration::from_millis(1)));
    }

    #[test]
    fn what_is_no_date_is_nothing() {
        for value in [
            "Mon, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Nov 1994 25:49:37 GMT",
            "Wed, 30 Feb 1994 08:49:37 GMT",
            "06 Nov 1994",
            "1994-11-06T08:49:37Z",
            "Sun, 06 Növ 1994 08:49:37 GMT",
        ] {
            assert_eq!(retry_after(value, then()), None, "{value}");
        }
    }
}
