//! Rate limits: who rests, until when, and who does not.

use super::*;
use std::cell::RefCell;

const WINDOW: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Book {
    /// The time since the test began.
    clock: Duration,
    counts: BTreeMap<(u32, String, Option<u128>), i32>,
}

/// Windows of a minute, by a clock that the test sets.
#[derive(Clone, Default)]
pub struct Windows(Rc<RefCell<Book>>);

impl Book {
    fn window(&self) -> u32 {
        (self.clock.as_secs() / WINDOW.as_secs()) as u32
    }
}

impl Meter for Windows {
    fn charge(&mut self, lane: &LaneKey, own: Option<i32>) -> Result<Option<Charge>, Duration> {
        let Some(limit) = own else { return Ok(None) };
        let mut book = self.0.borrow_mut();
        let window = book.window();
        let end = WINDOW * (window + 1) - book.clock;
        let count = book.counts.entry((window, lane.target.clone(), lane.user)).or_default();
        if *count >= limit {
            return Err(end);
        }
        *count += 1;
        Ok(Some(Charge { window, limit }))
    }

    fn refund(&mut self, lane: &LaneKey, charge: Charge) {
        *self.0.borrow_mut().counts.entry((charge.window, lane.target.clone(), lane.user)).or_default() -= 1;
    }
}

struct Limited {
    table: super::Table,
    schedule: Schedule,
    windows: Windows,
    start: Instant,
}

impl Limited {
    fn new(total: usize) -> Self {
        let windows = Windows::default();
        let caps = Caps { total, per_host: usize::MAX };
        let schedule = Schedule::new(caps, RULES, Box::new(windows.clone()));
        Self { table: super::Table::default(), schedule, windows, start: Instant::now() }
    }

    fn limit(&mut self, key: &LaneKey, own: Option<i32>) {
        let lane = self.schedule.lane_of[key];
        let route = Route { host: format!("{}:1", key.target), server: None, rate: Rate::Metered(own) };
        self.schedule.route(lane, Some(&route));
    }

    fn pick_at(&mut self, seconds: u64) -> Vec<Pick> {
        self.windows.0.borrow_mut().clock = Duration::from_secs(seconds);
        self.schedule.pick(1000, self.now())
    }

    fn now(&self) -> Instant {
        self.start + self.windows.0.borrow().clock
    }

    /// Picks, claims, and ends what was sent. Returns the ids.
    fn run_at(&mut self, seconds: u64) -> Vec<u128> {
        let picks = self.pick_at(seconds);
        let sent = self.table.claim(&mut self.schedule, &picks);
        let now = self.now();
        for pick in &picks {
            self.schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now);
        }
        sent
    }
}

#[test]
fn a_lane_over_its_limit_rests_until_the_next_window_and_others_go_on() {
    let mut test = Limited::new(100);
    let (limited, other, free) = (mcp(1, "s"), mcp(2, "s"), mcp(1, "t"));
    let ids: Vec<_> = (0..5).map(|time| test.table.insert(5, time, &limited)).collect();
    let late: Vec<_> = (10..13).map(|time| test.table.insert(5, time, &other)).collect();
    test.table.read_all(&mut test.schedule);
    test.limit(&limited, Some(2));
    test.limit(&other, Some(2));
    assert_eq!(test.run_at(10), [ids[0], late[0], ids[1], late[1]], "each user has a limit of his own");
    assert_eq!(test.schedule.window_at(), Some(test.start + WINDOW));
    let urgent = test.table.insert(1, 20, &limited);
    let unlimited: Vec<_> = (20..25).map(|time| test.table.insert(5, time, &free)).collect();
    test.table.read_all(&mut test.schedule);
    assert_eq!(test.run_at(59), unlimited, "nobody else waits");
    assert_eq!(test.run_at(60), [urgent, ids[2], late[2]], "smaller priorities first, in the next window, too");
    assert_eq!(test.run_at(120), [ids[3], ids[4]]);
    assert_eq!(test.run_at(180), []);
    assert_eq!(test.schedule.window_at(), None);
    test.schedule.retire(test.start);
    assert!(test.schedule.lane_of.is_empty());
}

#[test]
fn a_limit_that_is_changed_counts_at_once() {
    let mut test = Limited::new(100);
    let lane = mcp(1, "s");
    (0..9).for_each(|time| _ = test.table.insert(5, time, &lane));
    test.table.read_all(&mut test.schedule);
    test.limit(&lane, Some(0));
    assert!(test.run_at(1).is_empty(), "a limit of 0 allows nothing");
    assert!(test.run_at(61).is_empty());
    test.limit(&lane, Some(2));
    assert_eq!(test.run_at(62).len(), 2);
    test.limit(&lane, Some(3));
    assert_eq!(test.run_at(63).len(), 1);
    test.windows.0.borrow_mut().counts.clear();
    assert!(test.run_at(64).is_empty(), "it rests");
    test.schedule.end_rest();
    assert_eq!(test.run_at(65).len(), 3, "somebody has reset the limit");
    test.limit(&lane, None);
    assert_eq!(test.run_at(66).len(), 3);
}

#[test]
fn what_is_picked_and_not_sent_uses_nothing_up_and_the_lane_goes_on() {
    let mut test = Limited::new(100);
    let lane = mcp(1, "s");
    let jobs: Vec<_> = (0..20).map(|time| test.table.insert(5, time, &lane)).collect();
    test.table.read_all(&mut test.schedule);
    test.limit(&lane, Some(3));
    for _ in 0..3 {
        // The claim fails, and is tried again at once.
        let picks = test.pick_at(1);
        assert_eq!(ids(&picks), jobs[..3]);
        test.schedule.put_back(picks, test.start);
    }
    for round in 0..5 {
        // They are found to be cancelled.
        let picks = test.pick_at(2);
        assert_eq!(ids(&picks), jobs[3 * round..3 * round + 3]);
        test.table.claim(&mut test.schedule, &picks);
        let now = test.now();
        picks.iter().for_each(|pick| test.schedule.not_sent(pick, now));
    }
    assert_eq!(test.run_at(3), jobs[15..18]);
    assert_eq!(test.run_at(4), []);
}

#[test]
fn what_is_found_to_be_over_the_limit_when_it_is_claimed_waits_in_its_place() {
    let mut test = Limited::new(100);
    let lane = mcp(1, "s");
    let jobs: Vec<_> = (0..6).map(|time| test.table.insert(5, time, &lane)).collect();
    test.table.read_all(&mut test.schedule);
    test.limit(&lane, None);
    let mut picks = test.pick_at(1);
    assert_eq!(ids(&picks), jobs);
    // Four may go after all.
    let held_back = picks.split_off(4);
    test.table.claim(&mut test.schedule, &picks);
    test.limit(&lane, Some(4));
    let now = test.now();
    for pick in held_back.into_iter().rev() {
        test.schedule.hold_back(pick, test.start + WINDOW, now);
    }
    let urgent = test.table.insert(1, 9, &lane);
    test.table.read_all(&mut test.schedule);
    assert_eq!(test.run_at(2), [], "the whole lane rests");
    assert_eq!(test.schedule.window_at(), Some(test.start + WINDOW));
    assert_eq!(test.run_at(60), [urgent, jobs[4], jobs[5]]);
}

#[test]
fn a_job_that_is_moved_to_another_server_does_not_rest_with_the_old_one() {
    let mut test = Limited::new(100);
    let (shut, open) = (mcp(1, "shut"), mcp(1, "open"));
    (0..5).for_each(|time| _ = test.table.insert(5, time, &shut));
    test.table.read_all(&mut test.schedule);
    test.limit(&shut, Some(0));
    assert_eq!(test.run_at(1), []);
    test.table.pending.values_mut().for_each(|key| *key = open.clone());
    test.table.read_all(&mut test.schedule);
    assert_eq!(test.run_at(2).len(), 5);
    assert!(test.schedule.known.is_empty());
}

#[test]
fn a_memory_that_is_full_of_lanes_that_come_to_rest_later_is_read_into_again() {
    let mut test = Limited::new(100);
    test.schedule.room = Room { total: 60, worthwhile: 10, ..ROOM };
    let now = test.start;
    let host = test.schedule.host("down:1");
    for _ in 0..RULES.threshold {
        test.schedule.hosts[host].breaker.failed(now, "refused", false, &RULES);
    }
    test.schedule.changed(host);
    (0..100).for_each(|user| _ = test.table.insert(5, user as i64, &mcp(user, "down")));
    let read = |test: &mut Limited, own: Option<i32>| {
        test.schedule.wake();
        for _ in 0..20 {
            for read in test.schedule.reads(true, true) {
                let rows = test.table.pending.range((read.priority, read.from)..);
                let rows = rows.take_while(|((priority, _), _)| *priority == read.priority).take(read.limit);
                let rows =
                    rows.map(|((_, position), key)| Row { position: *position, bytes: 1, key: Some(key.clone()) });
                test.schedule.take(&read, rows.collect());
            }
            for (lane, key) in test.schedule.take_unrouted() {
                let rate = Rate::Metered(if key.target == "down" { own } else { None });
                let host = if own.is_some() { "elsewhere:1".to_owned() } else { format!("{}:1", key.target) };
                let route = Route { host, server: None, rate };
                test.schedule.route(lane, Some(&route));
            }
            let picks = test.pick_at(1);
            if let Some(pick) = picks.first() {
                return Some(pick.position.id);
            }
        }
        None
    };
    assert_eq!(read(&mut test, None), None, "its host is down");
    assert!(test.schedule.is_full);
    for (lane, _) in test.schedule.mcp_lanes(usize::MAX) {
        let route = Route { host: "elsewhere:1".into(), server: None, rate: Rate::Metered(Some(0)) };
        test.schedule.route(lane, Some(&route));
    }
    assert!(test.pick_at(1).is_empty(), "and now their limit is 0");
    let free = test.table.insert(5, 1_000, &mcp(1, "free"));
    assert_eq!(read(&mut test, Some(0)), Some(free));
}

#[test]
fn lanes_that_rest_hide_nobodys_jobs_however_many_they_are() {
    let mut test = Limited::new(1000);
    let insert = |test: &mut Limited, users: std::ops::Range<u128>| {
        users.for_each(|user| _ = test.table.insert(5, user as i64, &mcp(user, "shut")));
    };
    // Reads as the worker does; all that is found new is shut.
    let read = |test: &mut Limited, own: Option<i32>, seconds: u64| {
        let mut sent = 0;
        for round in 0.. {
            let reads = test.schedule.reads(true, true);
            for read in &reads {
                let rows = test.table.pending.range((read.priority, read.from)..);
                let rows = rows.take_while(|((priority, _), _)| *priority == read.priority).take(read.limit);
                let row = |((_, position), key): (&(usize, Position), &LaneKey)| Row {
                    position: *position,
                    bytes: 1,
                    key: Some(key.clone()),
                };
                let rows = rows.map(row).collect();
                test.schedule.take(read, rows);
            }
            for (lane, key) in test.schedule.take_unrouted() {
                let own = if key.target == "shut" { own } else { None };
                test.schedule.route(lane, Some(&Route { host: "h:1".into(), server: None, rate: Rate::Metered(own) }));
            }
            let ids = test.run_at(seconds);
            sent += ids.len();
            assert!(own.is_none() || test.schedule.lanes.len() <= 203_000, "the memory has its bounds");
            if reads.is_empty() && ids.is_empty() {
                return sent;
            }
            assert!(round < 10_000, "it comes to an end");
        }
        sent
    };
    insert(&mut test, 1..210_000);
    test.schedule.wake();
    assert_eq!(read(&mut test, Some(0), 1), 0);
    let free = test.table.insert(5, 300_000, &mcp(1, "free"));
    insert(&mut test, 300_000..310_000);
    test.schedule.wake();
    assert_eq!(read(&mut test, Some(0), 2), 1);
    assert!(!test.table.pending.values().any(|key| key.target == "free"), "{free} was hidden");
    // All of them go when they may.
    test.schedule.end_rest();
    for lane in test.schedule.mcp_lanes(usize::MAX) {
        test.schedule.route(lane.0, Some(&Route { host: "h:1".into(), server: None, rate: Rate::Metered(None) }));
    }
    let sent = read(&mut test, None, 3);
    assert_eq!((sent, test.table.pending.len()), (219_999, 0));
}

#[test]
fn a_lane_that_rests_leaves_the_probe_to_another_and_does_not_share_its_failure() {
    let mut test = Limited::new(100);
    let (resting, other) = (mcp(1, "s"), mcp(2, "s"));
    let kept: Vec<_> = (0..3).map(|time| test.table.insert(5, time, &resting)).collect();
    let tried: Vec<_> = (10..13).map(|time| test.table.insert(5, time, &other)).collect();
    test.table.read_all(&mut test.schedule);
    test.limit(&resting, Some(0));
    test.limit(&other, Some(9));
    let picks = test.pick_at(1);
    test.table.claim(&mut test.schedule, &picks);
    let refused = Reach::Unreachable("refused".into());
    for pick in &picks {
        test.schedule.finished(pick.lane, pick.counted, pick.position.id, &refused, test.start);
    }
    assert_eq!(ids(&picks), tried, "three failures open the breaker");
    let probe = test.table.insert(5, 20, &other);
    let waiting = test.table.insert(5, 21, &other);
    test.table.read_all(&mut test.schedule);
    let picks = test.pick_at(10);
    assert_eq!(ids(&picks), [probe]);
    test.table.claim(&mut test.schedule, &picks);
    let now = test.now();
    test.schedule.finished(picks[0].lane, picks[0].counted, probe, &refused, now);
    let doomed = test.pick_at(11);
    assert_eq!(ids(&doomed), [waiting]);
    test.table.claim(&mut test.schedule, &doomed);
    test.limit(&resting, None);
    // The next probe is one of those that rested.
    assert_eq!(ids(&test.pick_at(100)), [kept[0]]);
}

#[test]
fn no_window_gets_more_than_its_limit_and_every_job_its_turn() {
    for seed in 0..20 {
        let mut state = seed;
        let mut test = Limited::new(40);
        let lanes: Vec<_> = (0..8).map(|n| mcp(n, &format!("s{}", n % 3))).collect();
        let limits: Vec<_> = (0..8).map(|_| Some(1 + next(&mut state, 30) as i32)).collect();
        let mut sent = HashSet::new();
        let mut in_flight: Vec<Pick> = Vec::new();
        let (mut left, mut seconds) = (1500, 0);
        while left > 0 || !test.table.pending.is_empty() || !in_flight.is_empty() {
            let fresh = next(&mut state, 60).min(left);
            left -= fresh;
            for _ in 0..fresh {
                let lane = &lanes[next(&mut state, 8) as usize];
                test.table.insert(1 + next(&mut state, 9) as usize, seconds as i64, lane);
            }
            test.table.read_all(&mut test.schedule);
            for (lane, limit) in lanes.iter().zip(&limits) {
                if test.schedule.lane_of.contains_key(lane) {
                    test.limit(lane, *limit);
                }
            }
            seconds += next(&mut state, 25);
            let picks = test.pick_at(seconds);
            if next(&mut state, 5) == 0 {
                let now = test.now();
                test.schedule.put_back(picks, now);
            } else {
                for id in test.table.claim(&mut test.schedule, &picks) {
                    assert!(sent.insert(id), "picked twice");
                }
                in_flight.extend(picks);
            }
            let ending = next(&mut state, 1 + in_flight.len() as u64) as usize;
            let now = test.now();
            for pick in in_flight.drain(ending..) {
                test.schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now);
            }
            assert!(seconds < 1_000_000, "seed {seed}: {} are left", test.table.pending.len());
        }
        assert_eq!(sent.len(), 1500);
        let book = test.windows.0.borrow();
        let most = |lane: usize| limits[lane].expect("a limit");
        let of_lane = |user: &Option<u128>| user.expect("a user") as usize;
        assert!(book.counts.iter().all(|((_, _, user), count)| (0..=most(of_lane(user))).contains(count)));
        assert_eq!(book.counts.values().sum::<i32>(), 1500, "each was counted once");
    }
}
