use super::key::{BYTES, Key, Secrets};
use super::{CLOCK_SKEW, Policy, SECOND, minute, valid_state};

const NOW: u64 = 846_000_000 * SECOND;
const SECRETS: Secrets = [1, 2, 3, 4, 5, 6];

fn policy(limit: u32, window: u32, burst: u32) -> Policy {
    Policy::new(limit, window, burst).expect("a policy that fits")
}

/// Calls at the same moment until one is denied.
fn spend(policy: &Policy, state: &mut u64, now: u64) -> u32 {
    for calls in 0.. {
        let answer = policy.judge(*state, now, 1);
        if !answer.allowed {
            return calls;
        }
        *state = answer.state;
    }
    unreachable!()
}

#[test]
fn a_burst_is_exact_and_refills_at_the_rate() {
    for (limit, window, burst) in [(5, 60, 5), (7, 60, 7), (3, 1, 10), (1000, 1, 1), (1, 86_400, 3), (97, 13, 97)] {
        let policy = policy(limit, window, burst);
        let mut state = 0;
        assert_eq!(spend(&policy, &mut state, NOW), burst);
        let denied = policy.judge(state, NOW, 1);
        let wait = denied.retry_after.expect("possible later");
        assert!(!policy.judge(state, NOW + wait - 1, 1).allowed);
        assert!(policy.judge(state, NOW + wait, 1).allowed);
        assert_eq!(spend(&policy, &mut state, NOW + denied.reset), burst, "full again after reset");
    }
}

#[test]
fn no_window_of_any_kind_sees_more_than_a_burst_and_the_rate() {
    let policy = policy(7, 60, 7);
    let (mut state, mut allowed) = (0, 0);
    // A call every 100 ms for an hour.
    for tick in 0..36_000u64 {
        let answer = policy.judge(state, NOW + tick * SECOND / 10, 1);
        if answer.allowed {
            allowed += 1;
            state = answer.state;
        }
    }
    assert!((7 + 60 * 7 - 8..=7 + 60 * 7).contains(&allowed), "{allowed}");
}

#[test]
fn the_answers_are_those_of_redis_cell() {
    // CL.THROTTLE key 14 30 60 1 is 15 in a burst, 30 in 60 s.
    let policy = policy(30, 60, 15);
    let first = policy.judge(0, NOW, 1);
    assert_eq!((first.allowed, first.remaining, first.retry_after, first.reset), (true, 14, Some(0), 2 * SECOND));
    let five = policy.judge(first.state, NOW, 5);
    assert_eq!((five.remaining, five.reset), (9, 12 * SECOND));
    let much = policy.judge(five.state, NOW, 10);
    assert_eq!((much.allowed, much.remaining, much.retry_after), (false, 9, Some(2 * SECOND)));
    assert_eq!(much.reset, 12 * SECOND);
    let never = policy.judge(five.state, NOW, 16);
    assert_eq!((never.allowed, never.retry_after), (false, None));
    let later = policy.judge(five.state, NOW + 3 * SECOND, 1);
    assert_eq!((later.remaining, later.reset), (9, 11 * SECOND));
}

#[test]
fn what_costs_nothing_is_allowed_and_changes_nothing() {
    let policy = policy(2, 60, 2);
    let mut state = 0;
    spend(&policy, &mut state, NOW);
    let free = policy.judge(state, NOW, 0);
    assert_eq!((free.allowed, free.remaining, free.state), (true, 0, state));
    // Beyond this policy's burst by the charges of one with a larger burst.
    assert!(policy.judge(NOW + 1000 * SECOND, NOW, 0).allowed);
    assert_eq!(policy.judge(NOW + 1000 * SECOND, NOW, 1).remaining, 0);
}

#[test]
fn the_largest_arguments_do_not_overflow() {
    let largest = i32::MAX as u32;
    let fast = policy(largest, 1, largest);
    let all = fast.judge(0, NOW, largest);
    assert_eq!((all.allowed, all.remaining), (true, 0));
    assert!(!fast.judge(all.state, NOW, 1).allowed);
    assert_eq!(policy(1, largest, 1).judge(0, NOW, largest).retry_after, None);
    assert_eq!(policy(1, largest, 1).judge(u64::MAX, NOW, largest).remaining, 0);
    assert!(Policy::new(1, largest, largest).is_none());
    assert!(Policy::new(1, largest, 2).is_none(), "136 years");
    assert!(Policy::new(largest, largest, largest).is_some());
    assert_eq!(policy(1, 1, 1).judge(0, 0, 1).state, SECOND);
}

#[test]
fn a_clock_that_was_set_back_starts_anew_and_one_that_is_a_bit_behind_does_not() {
    assert_eq!(valid_state(7, NOW, NOW), 7);
    assert_eq!(valid_state(7, NOW + CLOCK_SKEW, NOW), 7);
    assert_eq!(valid_state(7, NOW + CLOCK_SKEW + 1, NOW), 0);
    assert_eq!(valid_state(7, u64::MAX, u64::MAX), 7);

    let state = minute::count(0, 1000, 5).state;
    let behind = minute::count(state, 999, 5);
    assert_eq!(minute::parts(behind.state), (1000, 2), "the next minute has begun for others");
    let set_back = minute::count(state, 998, 5);
    assert_eq!(minute::parts(set_back.state), (998, 1));
    assert_eq!(set_back.closed, Some(state), "what was counted is written down all the same");
}

#[test]
fn a_minute_allows_the_limit_and_counts_all() {
    for limit in [i32::MIN, -1, 0, 1, 5] {
        let mut state = 0;
        let mut allowed = 0;
        for _ in 0..10 {
            let step = minute::count(state, 1000, limit);
            allowed += i32::from(step.allowed);
            state = step.state;
        }
        assert_eq!((allowed, minute::parts(state)), (limit.max(0), (1000, 10)));
    }
}

#[test]
fn the_next_minute_begins_at_one_and_hands_over_the_last() {
    let last = minute::count(minute::count(0, 1000, 1).state, 1000, 1);
    assert!(!last.allowed);
    let next = minute::count(last.state, 1001, 1);
    assert_eq!((next.allowed, next.closed, minute::parts(next.state)), (true, Some(last.state), (1001, 1)));
    let recorded = minute::recorded(last.state);
    assert!(minute::is_unrecorded(last.state) && !minute::is_unrecorded(recorded));
    assert_eq!(minute::count(recorded, 1001, 1).closed, None);
    assert_eq!(minute::parts(recorded), minute::parts(last.state));
    assert!(minute::is_over(last.state, 1001) && !minute::is_over(last.state, 1000));
    assert!(!minute::is_over(last.state, 999) && minute::is_over(last.state, 998));
    assert_eq!(minute::of(minute::end(1000)), 1001);
    assert_eq!(minute::of(minute::end(1000) - 1), 1000);
}

#[test]
fn a_count_stays_at_its_highest() {
    let highest = (1000u64 << 32) | 0x7fff_fffe;
    let step = minute::count(highest, 1000, i32::MAX);
    assert_eq!((step.allowed, minute::parts(step.state)), (false, (1000, i32::MAX as u32)));
    assert_eq!(minute::count(step.state, 1000, i32::MAX).state, step.state);
    assert!(minute::is_unrecorded(step.state));
    assert_eq!(minute::of(u64::MAX), u32::try_from(u64::MAX / (60 * SECOND)).unwrap_or(u32::MAX));
}

#[test]
fn keys_are_compared_in_full() {
    let key = |database, server: &str, user| Key::server(&SECRETS, database, server, user);
    let user = [7; 16];
    assert!(key(1, "a", None).is(&key(1, "a", None)));
    assert!(!key(1, "a", None).is(&key(2, "a", None)));
    assert!(!key(1, "a", None).is(&key(1, "a", Some(&[0; 16]))), "no user is nobody's id");
    assert!(!key(1, "a", Some(&user)).is(&key(1, "a", Some(&[8; 16]))));
    assert!(!key(1, "a", None).is(&Key::text(&SECRETS, 1, "a", 0)));
    // The same hash does not make two keys one.
    let mut other = key(1, "b", None);
    other.hash = key(1, "a", None).hash;
    assert!(!other.is(&key(1, "a", None)));
    // Nor do the bytes that a user's id and a name make together.
    let mut name = "x".repeat(16);
    name.push('a');
    assert!(!key(1, "a", Some(b"xxxxxxxxxxxxxxxx")).is(&key(1, &name, None)));
}

#[test]
fn windows_of_a_text_are_apart_but_found_together() {
    let (short, long) = (Key::text(&SECRETS, 1, "t", 1), Key::text(&SECRETS, 1, "t", 60));
    assert!(!short.is(&long) && short.has_text_of(&long) && short.hash == long.hash);
}

#[test]
fn long_keys_are_told_apart_by_their_ends() {
    let text = |text: &str| Key::text(&SECRETS, 1, text, 60);
    let long = "ä".repeat(200);
    assert!(text(&format!("{long}1")).is(&text(&format!("{long}1"))));
    assert!(!text(&format!("{long}1")).is(&text(&format!("{long}2"))));
    let fits = "x".repeat(BYTES);
    assert!(!text(&fits).is_hashed && text(&format!("{fits}x")).is_hashed);
    assert_eq!(text(&fits).bytes().len(), BYTES);
    // A short key that looks like a long one's remains.
    let remains = text(&format!("{fits}x"));
    let mut forged = remains;
    forged.is_hashed = false;
    assert!(!forged.is(&remains));
}

#[test]
fn the_name_of_a_server_comes_back() {
    let user = [9; 16];
    assert_eq!(Key::server(&SECRETS, 1, "github", Some(&user)).server_and_user(), Some(("github".into(), Some(user))));
    assert_eq!(Key::server(&SECRETS, 1, "github", None).server_and_user(), Some(("github".into(), None)));
    assert_eq!(Key::text(&SECRETS, 1, "github", 60).server_and_user(), None);
    let (name, _) = Key::server(&SECRETS, 1, &"ä".repeat(300), Some(&user)).server_and_user().expect("a name");
    assert!(name.starts_with("äää") && name.contains('…') && name.len() < 2 * BYTES, "{name}");
}

#[test]
fn a_call_that_is_taken_is_counted_only_within_the_limit_and_can_be_given_back_in_its_minute() {
    let clock = minute::of(NOW);
    let mut state = 0;
    for _ in 0..3 {
        let step = minute::take(state, clock, 3);
        assert!(step.allowed);
        state = step.state;
    }
    let denied = minute::take(state, clock, 3);
    assert_eq!((denied.allowed, denied.state, denied.closed), (false, state, None));
    assert_eq!(minute::refund(state, clock).map(minute::parts), Some((clock, 2)));
    assert_eq!(minute::refund(state, clock - 1), None);
    assert_eq!(minute::refund(minute::emptied(state), clock), None);
    let next = minute::take(state, clock + 1, 3);
    assert_eq!((next.allowed, minute::parts(next.state), next.closed), (true, (clock + 1, 1), Some(state)));
    // Denied at once in a new minute: what the last one has counted stays where it is found.
    let barred = minute::take(state, clock + 1, 0);
    assert_eq!((barred.allowed, barred.state, barred.closed), (false, state, None));
}
