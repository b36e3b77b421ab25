//! Rate limits: the arithmetic of one key, on a word of state that the caller reads and swaps.
//!
//! Two kinds: a count per clock minute ([`minute`]), and the generic cell rate algorithm ([`Policy`]), as ITU-T I.371
//! defines it and redis-cell answers it.

pub mod fields;
pub mod key;
pub mod minute;
#[cfg(test)]
mod tests;

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;
/// A clock that is behind an entry by more than this was set back; by less, another process was quicker.
pub const CLOCK_SKEW: u64 = 60 * SECOND;
/// No limit may take longer than this to refill, so that all times fit into a word: a hundred years.
const LONGEST_REFILL: u128 = 100 * 366 * 86_400 * SECOND as u128;

/// So many calls in so much time, with bursts of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Nanoseconds between two calls at the full rate, rounded up: never one call too many.
    interval: u64,
    /// How far ahead of the clock the calls made may be.
    tolerance: u64,
}

/// What a limiter says of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub allowed: bool,
    /// Calls of cost 1 that would be allowed right after this one.
    pub remaining: u32,
    /// Nanoseconds until the same call would be allowed; `None`: never, because it costs more than a burst.
    pub retry_after: Option<u64>,
    /// Nanoseconds until the limit is full again.
    pub reset: u64,
    /// The state to store, where the call is allowed.
    pub state: u64,
}

impl Policy {
    /// `None`: the burst takes more than a hundred years to refill.
    pub fn new(limit: u32, window_seconds: u32, burst: u32) -> Option<Self> {
        let window = u64::from(window_seconds) * SECOND;
        let interval = window.div_ceil(u64::from(limit.max(1))).max(1);
        let tolerance = u128::from(interval) * u128::from(burst);
        let tolerance = u64::try_from(tolerance).ok().filter(|time| u128::from(*time) <= LONGEST_REFILL)?;
        Some(Self { interval, tolerance })
    }

    /// Judges a call of some cost. `state` is the theoretical arrival time that the last one has left, in nanoseconds
    /// as `now` is; 0: there was none.
    pub fn judge(&self, state: u64, now: u64, cost: u32) -> Answer {
        let arrival = state.max(now);
        let increment = u128::from(self.interval) * u128::from(cost);
        let next = u128::from(arrival) + increment;
        let limit = u128::from(now) + u128::from(self.tolerance);
        // What costs nothing may always be asked for, also by one that a larger burst has brought beyond this one's.
        let allowed = next <= limit || cost == 0;
        let state = if allowed { u64::try_from(next).unwrap_or(u64::MAX) } else { arrival };
        let reset = state - now;
        let room = self.tolerance.saturating_sub(reset);
        let retry_after = if allowed {
            Some(0)
        } else if increment > u128::from(self.tolerance) {
            None
        } else {
            Some(u64::try_from(next - limit).unwrap_or(u64::MAX))
        };
        let remaining = u32::try_from(room / self.interval).unwrap_or(u32::MAX);
        Answer { allowed, remaining, retry_after, reset, state }
    }
}

/// The state that counts: none, once the clock was set back to before it was made.
pub fn valid_state(state: u64, charged_at: u64, now: u64) -> u64 {
    if charged_at > now.saturating_add(CLOCK_SKEW) { 0 } else { state }
}
