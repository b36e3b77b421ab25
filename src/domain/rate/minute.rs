//! Calls in a clock minute. The word of state: the minute since 2000-01-01, whether its count was written down, and the
//! count.

use super::SECOND;

const COUNT: u64 = 0x7fff_ffff;
const RECORDED: u64 = 0x8000_0000;

/// The clock minute of a time in nanoseconds since 2000-01-01.
pub fn of(now: u64) -> u32 {
    u32::try_from(now / (60 * SECOND)).unwrap_or(u32::MAX)
}

/// When a minute ends, in nanoseconds since 2000-01-01.
pub fn end(minute: u32) -> u64 {
    (u64::from(minute) + 1) * 60 * SECOND
}

/// The minute and the count of a state.
pub fn parts(state: u64) -> (u32, u32) {
    ((state >> 32) as u32, (state & COUNT) as u32)
}

/// Whether a state has calls that are not written down.
pub fn is_unrecorded(state: u64) -> bool {
    state & COUNT != 0 && state & RECORDED == 0
}

/// The same state, its count written down.
pub fn recorded(state: u64) -> u64 {
    state | RECORDED
}

/// A state with no calls in the running minute.
pub fn emptied(state: u64) -> u64 {
    state & !COUNT
}

/// The minute that counts: the clock's, or the next one where another process has seen it begin; a state further ahead
/// is from before the clock was set back.
fn current(state: u64, clock: u32) -> u32 {
    let (minute, _) = parts(state);
    if minute == clock.saturating_add(1) { minute } else { clock }
}

/// Whether a state is of a minute that is over.
pub fn is_over(state: u64, clock: u32) -> bool {
    parts(state).0 != current(state, clock)
}

/// What becomes of a state by a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub state: u64,
    pub allowed: bool,
    /// The state of the minute before, if it has calls to be written down.
    pub closed: Option<u64>,
}

/// Counts a call, allowed or not.
pub fn count(state: u64, clock: u32, limit: i32) -> Step {
    let minute = current(state, clock);
    let (last, calls) = parts(state);
    let (calls, closed) = if last == minute { (calls, None) } else { (0, Some(state).filter(|s| is_unrecorded(*s))) };
    let calls = u64::from(calls).saturating_add(1).min(COUNT);
    // At the highest count nobody knows how many there were.
    let allowed = i64::from(limit) >= calls as i64 && calls < COUNT;
    Step { state: u64::from(minute) << 32 | calls, allowed, closed }
}

/// Counts a call if it is allowed; else the state stays as it is.
pub fn take(state: u64, clock: u32, limit: i32) -> Step {
    let step = count(state, clock, limit);
    if step.allowed { step } else { Step { state, closed: None, ..step } }
}

/// Takes one call of a minute back; `None`: there is none, or another minute runs.
pub fn refund(state: u64, minute: u32) -> Option<u64> {
    let (running, calls) = parts(state);
    (running == minute && calls > 0).then(|| state - 1)
}
