mod rest;

use super::*;
use std::collections::BTreeMap;
use std::time::Duration;

const RULES: Rules = Rules { threshold: 3, cooldown: Duration::from_secs(5) };

fn schedule(total: usize) -> Schedule {
    capped(Caps { total, per_host: usize::MAX })
}

fn capped(caps: Caps) -> Schedule {
    Schedule::new(caps, RULES, Box::new(rest::Windows::default()))
}

fn http(host: &str) -> LaneKey {
    LaneKey { user: None, target: host.to_owned(), is_mcp: false }
}

fn mcp(user: u128, server: &str) -> LaneKey {
    LaneKey { user: Some(user), target: server.to_owned(), is_mcp: true }
}

/// A table of pending jobs, read as the worker reads its own.
#[derive(Default)]
struct Table {
    pending: BTreeMap<(usize, Position), LaneKey>,
    last_id: u128,
}

impl Table {
    fn insert(&mut self, priority: usize, run_at: i64, key: &LaneKey) -> u128 {
        self.last_id += 1;
        self.pending.insert((priority - 1, Position { run_at, id: self.last_id }), key.clone());
        self.last_id
    }

    fn read(&self, schedule: &mut Schedule, ahead: bool, behind: bool) -> bool {
        let reads = schedule.reads(ahead, behind);
        for read in &reads {
            let rows = self
                .pending
                .range((read.priority, read.from)..)
                .take_while(|((priority, _), _)| *priority == read.priority);
            let rows = rows.take(read.limit).map(|((_, position), key)| Row {
                position: *position,
                bytes: 100,
                key: Some(key.clone()),
            });
            let rows = rows.collect();
            schedule.take(read, rows);
        }
        for (lane, key) in schedule.take_unrouted() {
            schedule.route(lane, Some(&Route { host: key.target.clone(), server: None, rate: Rate::Unmetered }));
        }
        !reads.is_empty()
    }

    fn read_all(&self, schedule: &mut Schedule) {
        schedule.wake();
        while self.read(schedule, true, true) && schedule.is_ahead_due() {}
    }

    /// Claims picks, and returns the ids of those that are to be sent.
    fn claim(&mut self, schedule: &mut Schedule, picks: &[Pick]) -> Vec<u128> {
        for pick in picks {
            assert!(self.pending.remove(&(pick.priority, pick.position)).is_some(), "{pick:?} is not pending");
        }
        schedule.claimed(picks);
        picks.iter().filter(|pick| pick.failure.is_none()).map(|pick| pick.position.id).collect()
    }
}

fn ids(picks: &[Pick]) -> Vec<u128> {
    picks.iter().map(|pick| pick.position.id).collect()
}

#[test]
fn smaller_priorities_go_first_and_within_one_the_lanes_take_turns() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    let busy: Vec<_> = (0..4).map(|time| table.insert(5, time, &http("busy:80"))).collect();
    let quiet = table.insert(5, 9, &http("quiet:80"));
    let urgent = table.insert(1, 10, &http("busy:80"));
    table.read_all(&mut schedule);
    assert_eq!(ids(&schedule.pick(9, now)), [urgent, busy[0], quiet, busy[1], busy[2], busy[3]]);
}

#[test]
fn a_server_never_has_more_in_flight_than_its_cap_whoever_calls_it() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(1000), Instant::now());
    for user in 0..10 {
        for time in 0..10 {
            table.insert(5, time, &mcp(user, "s"));
        }
    }
    let reads = schedule.reads(true, true);
    for read in reads {
        let rows = table.pending.iter().filter(|_| read.priority == 4);
        let rows =
            rows.map(|((_, position), key)| Row { position: *position, bytes: 100, key: Some(key.clone()) }).collect();
        schedule.take(&read, rows);
    }
    assert!(schedule.pick(9, now).is_empty(), "their routes are not known");
    let route = Route { host: "h:1".into(), server: Some(("s".into(), 3)), rate: Rate::Unmetered };
    for (lane, _) in schedule.take_unrouted() {
        schedule.route(lane, Some(&route));
    }
    let mut done = 0;
    while done < 100 {
        let picks = schedule.pick(1000, now);
        assert_eq!(picks.len(), 3.min(100 - done));
        table.claim(&mut schedule, &picks);
        for pick in &picks {
            schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now);
        }
        done += picks.len();
    }
}

#[test]
fn a_host_alone_gets_most_places_and_never_all() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for time in 0..200 {
        table.insert(5, time, &http("slow:80"));
    }
    table.read_all(&mut schedule);
    let slow = schedule.pick(1000, now);
    assert_eq!(slow.len(), 80);
    table.claim(&mut schedule, &slow);
    for time in 0..200 {
        table.insert(5, time, &http("other:80"));
    }
    table.read_all(&mut schedule);
    assert_eq!(schedule.pick(1000, now).len(), 16, "four fifths of what is left");
    assert_eq!(schedule.room(), 4);
}

#[test]
fn what_is_in_flight_elsewhere_counts_towards_a_servers_cap() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(1000), Instant::now());
    let elsewhere = |number| HashMap::from([("s".to_owned(), number)]);
    schedule.set_elsewhere(elsewhere(2));
    for user in 0..10 {
        table.insert(5, 0, &mcp(user, "s"));
    }
    table.read_all(&mut schedule);
    for lane in 0..10 {
        let route = Route { host: "h:1".into(), server: Some(("s".into(), 3)), rate: Rate::Unmetered };
        schedule.route(lane, Some(&route));
    }
    let first = schedule.pick(9, now);
    table.claim(&mut schedule, &first);
    assert_eq!(first.len(), 1);
    schedule.set_elsewhere(elsewhere(1));
    assert!(schedule.has_elsewhere());
    assert_eq!(schedule.pick(9, now).len(), 1);
    schedule.set_elsewhere(HashMap::new());
    assert!(!schedule.has_elsewhere());
    assert_eq!(schedule.pick(9, now).len(), 1);
}

#[test]
fn a_host_has_no_more_in_flight_than_its_cap() {
    let caps = Caps { total: 100, per_host: 7 };
    let (mut table, mut schedule, now) = (Table::default(), capped(caps), Instant::now());
    for host in ["a:1", "b:1"] {
        for time in 0..50 {
            table.insert(5, time, &http(host));
        }
    }
    table.read_all(&mut schedule);
    assert_eq!(schedule.pick(1000, now).len(), 14);
}

#[test]
fn even_a_single_place_is_used() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(1), Instant::now());
    for time in 0..3 {
        table.insert(5, time, &mcp(1, "s"));
    }
    table.read_all(&mut schedule);
    assert_eq!(schedule.pick(9, now).len(), 1);
    assert_eq!(schedule.pick(9, now).len(), 0);
}

#[test]
fn a_dead_hosts_jobs_wait_for_a_probe_and_share_its_failure() {
    let (mut table, mut schedule, start) = (Table::default(), schedule(100), Instant::now());
    for time in 0..20 {
        table.insert(5, time, &http("dead:80"));
    }
    table.read_all(&mut schedule);
    let first = schedule.pick(3, start);
    table.claim(&mut schedule, &first);
    let refused = Reach::Unreachable("refused".into());
    first.iter().for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &refused, start));
    let change = schedule.breaker_changes(start).remove(0);
    assert_eq!((change.state, change.failures, change.probe_in), ("open", 3, RULES.cooldown));
    assert!(schedule.pick(9, start).is_empty());
    assert_eq!(schedule.next_probe(), Some(start + RULES.cooldown));
    let good = table.insert(9, 0, &http("good:80"));
    table.read_all(&mut schedule);
    assert_eq!(ids(&schedule.pick(9, start)), [good], "others are not held up");

    let later = start + RULES.cooldown;
    let probe = schedule.pick(9, later);
    assert_eq!(probe.len(), 1);
    table.claim(&mut schedule, &probe);
    assert!(schedule.pick(9, later).is_empty(), "one probe at a time");
    schedule.finished(probe[0].lane, probe[0].counted, probe[0].position.id, &refused, later);
    let doomed = schedule.pick(100, later);
    assert_eq!(doomed.len(), 16);
    assert!(doomed.iter().all(|pick| pick.failure.as_deref() == Some("refused")));
    table.claim(&mut schedule, &doomed);

    table.insert(5, 30, &http("dead:80"));
    table.insert(5, 31, &http("dead:80"));
    table.read_all(&mut schedule);
    let probe = schedule.pick(9, later + 2 * RULES.cooldown);
    assert_eq!(probe.len(), 1);
    schedule.finished(probe[0].lane, probe[0].counted, probe[0].position.id, &Reach::Reached, later);
    assert_eq!(schedule.breaker_changes(later)[0].state, "closed");
    assert_eq!(schedule.pick(9, later).len(), 1);
}

#[test]
fn picks_that_could_not_be_claimed_keep_their_place_and_a_lost_probe_is_made_again() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for time in 0..5 {
        table.insert(5, time, &http("h:1"));
    }
    table.read_all(&mut schedule);
    let picks = schedule.pick(3, now);
    schedule.put_back(picks.clone(), now);
    assert_eq!(schedule.room(), 100);
    assert_eq!(schedule.pick(3, now), picks);
    let refused = Reach::Unreachable("refused".into());
    picks.iter().for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &refused, now));
    let later = now + RULES.cooldown;
    let probe = schedule.pick(9, later);
    schedule.put_back(probe.clone(), later);
    assert_eq!(schedule.pick(9, later), probe);
}

#[test]
fn what_nothing_is_known_of_any_more_is_forgotten() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for user in 0..50 {
        table.insert(5, 0, &mcp(user, &format!("server {user}")));
    }
    table.read_all(&mut schedule);
    let picks = schedule.pick(100, now);
    assert_eq!(picks.len(), 50);
    table.claim(&mut schedule, &picks);
    schedule.retire(now);
    picks[1..]
        .iter()
        .for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now));
    schedule.retire(now);
    assert_eq!((schedule.lane_of.len(), schedule.hosts.len()), (1, 1), "one is in flight");
    table.insert(5, 1, &mcp(77, "another"));
    table.read_all(&mut schedule);
    assert_eq!(schedule.pick(9, now).len(), 1);
}

/// A pseudo-random number below `bound`.
fn next(state: &mut u64, bound: u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) % bound
}

#[test]
fn every_job_is_picked_once_however_lanes_fill_up_and_commits_come_late() {
    pick_every_job_once(0..6, ROOM, 25_000);
}

#[test]
fn every_job_is_picked_once_in_hardly_any_memory() {
    let small = Room { lane: 40, low: 8, short: 3, total: 20_000, chunk: 16, large_chunk: 40, worthwhile: 40 };
    pick_every_job_once(0..40, small, 4_000);
    pick_every_job_once(40..80, Room { total: 300, ..small }, 4_000);
}

fn pick_every_job_once(seeds: std::ops::Range<u64>, room: Room, jobs: u64) {
    for seed in seeds {
        let mut state = seed;
        let caps = Caps { total: 200, per_host: 30 + 100 * (seed % 6) as usize };
        let (mut table, mut schedule, now) = (Table::default(), capped(caps), Instant::now());
        schedule.room = room;
        // A few lanes with far more jobs than there is room for, some of them broken for now, and many small ones.
        let lanes = [http("a:1"), http("b:1"), http("dead:1"), mcp(1, "x"), mcp(2, "x")];
        let mut left = jobs;
        let (mut sent, mut time) = (HashSet::new(), 0);
        let refused = Reach::Unreachable("refused".into());
        let (mut doomed, mut in_flight) = (0, Vec::new());
        for round in 0.. {
            let fresh = next(&mut state, jobs / 6).min(left);
            left -= fresh;
            for _ in 0..fresh {
                time += 1;
                let late = if next(&mut state, 50) == 0 { next(&mut state, 20_000) as i64 } else { 0 };
                let lane = match next(&mut state, 12) {
                    0 => http(&format!("small{}:1", next(&mut state, 500))),
                    1..7 => lanes[(seed % 5) as usize].clone(),
                    number => lanes[(number % 5) as usize].clone(),
                };
                table.insert(1 + next(&mut state, 2) as usize * 4, time - late, &lane);
            }
            schedule.wake();
            for _ in 0..4 {
                let clock = now + round * RULES.cooldown;
                table.read(&mut schedule, true, next(&mut state, 3) == 0);
                let picks = schedule.pick(next(&mut state, 600) as usize, clock);
                if next(&mut state, 9) == 0 {
                    schedule.put_back(picks, clock);
                    continue;
                }
                doomed += picks.iter().filter(|pick| pick.failure.is_some()).count();
                for id in table.claim(&mut schedule, &picks) {
                    assert!(sent.insert(id), "picked twice");
                }
                in_flight.extend(picks.into_iter().filter(|pick| pick.failure.is_none()));
                // Some end at once, some stay for long, and in the end none is left.
                let ending = if left == 0 { 0 } else { next(&mut state, 1 + in_flight.len() as u64) as usize };
                for pick in in_flight.drain(ending..) {
                    let is_dead = schedule.lane_of.get(&lanes[2]) == Some(&pick.lane);
                    let reach = if is_dead && round < 300 { &refused } else { &Reach::Reached };
                    schedule.finished(pick.lane, pick.counted, pick.position.id, reach, clock);
                }
            }
            if round % 7 == 0 {
                schedule.retire(now);
            }
            if left == 0 && table.pending.is_empty() && in_flight.is_empty() {
                break;
            }
            assert!(round < 3_000, "seed {seed}: {} are left", table.pending.len());
        }
        assert_eq!(sent.len() + doomed, jobs as usize, "seed {seed}");
        assert_eq!((schedule.room(), schedule.known.len()), (200, 0));
    }
}

#[test]
fn a_full_memory_hides_nobodys_jobs() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(1000), Instant::now());
    // One user's jobs for servers that take one at a time, in so many lanes that they fill the memory.
    for server in 0..150 {
        for time in 0..2_000 {
            table.insert(5, time, &mcp(1, &format!("s{server}")));
        }
    }
    let narrow = |schedule: &mut Schedule| {
        for (lane, key) in schedule.take_unrouted() {
            let server = Some((key.target.clone(), 1));
            schedule.route(lane, Some(&Route { host: "h:1".into(), server, rate: Rate::Unmetered }));
        }
    };
    let read = |table: &Table, schedule: &mut Schedule| {
        let reads = schedule.reads(true, true);
        for read in reads {
            let rows = table
                .pending
                .range((read.priority, read.from)..)
                .take_while(|((priority, _), _)| *priority == read.priority);
            let rows = rows.take(read.limit).map(|((_, position), key)| Row {
                position: *position,
                bytes: 1,
                key: Some(key.clone()),
            });
            schedule.take(&read, rows.collect());
        }
    };
    schedule.wake();
    while schedule.is_ahead_due() {
        read(&table, &mut schedule);
        narrow(&mut schedule);
    }
    let first = schedule.pick(1000, now);
    assert_eq!(first.len(), 150);
    table.claim(&mut schedule, &first);
    assert!(schedule.known.len() <= ROOM.total);
    let urgent = table.insert(1, 5_000, &http("new:1"));
    let usual = table.insert(5, 5_000, &http("new:1"));
    schedule.wake();
    for _ in 0..1_000 {
        read(&table, &mut schedule);
        if !schedule.is_ahead_due() {
            break;
        }
    }
    let found = schedule.pick(1000, now);
    assert_eq!(ids(&found), [urgent, usual]);
    table.claim(&mut schedule, &found);
    // And what was forgotten for their sake is read again: all are sent in the end.
    let mut running: Vec<_> = first.into_iter().chain(found).collect();
    let mut left = table.pending.len();
    while left > 0 {
        running
            .drain(..)
            .for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now));
        read(&table, &mut schedule);
        running = schedule.pick(1000, now);
        assert!(!running.is_empty() || schedule.is_refill_due() || schedule.is_ahead_due(), "{left} are left");
        table.claim(&mut schedule, &running);
        left = table.pending.len();
    }
}

#[test]
fn a_pass_over_what_lies_behind_comes_to_its_end_however_often_it_is_asked_for() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(1), Instant::now());
    for time in 0..10_000 {
        table.insert(5, time, &http(&format!("h{}:1", time % 5)));
    }
    table.read_all(&mut schedule);
    let late = table.insert(5, 9_000, &http("late:1"));
    for _ in 0..20 {
        schedule.wake();
        table.read(&mut schedule, true, true);
    }
    assert!(schedule.known.contains_key(&late));
    assert_eq!(schedule.pick(1, now).len(), 1);
}

#[test]
fn a_lane_that_is_led_elsewhere_leaves_its_requests_and_its_probe_where_they_were_sent() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for time in 0..20 {
        table.insert(5, time, &mcp(1, "shared:1"));
        table.insert(5, time, &mcp(2, "shared:1"));
    }
    table.read_all(&mut schedule);
    let lanes: Vec<_> = schedule.mcp_lanes(9).into_iter().map(|(lane, _)| lane).collect();
    let refused = Reach::Unreachable("refused".into());
    let picks = schedule.pick(3, now);
    table.claim(&mut schedule, &picks);
    picks.iter().for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &refused, now));
    let later = now + RULES.cooldown;
    let probe = schedule.pick(9, later).remove(0);
    table.claim(&mut schedule, std::slice::from_ref(&probe));
    schedule.route(probe.lane, Some(&Route { host: "elsewhere:1".into(), server: None, rate: Rate::Unmetered }));
    let elsewhere = schedule.pick(3, later);
    assert!(elsewhere.iter().all(|pick| pick.lane == probe.lane) && elsewhere.len() == 3, "the lane goes on there");
    table.claim(&mut schedule, &elsewhere);
    schedule.finished(probe.lane, probe.counted, probe.position.id, &Reach::Reached, later);
    let other = lanes.into_iter().find(|lane| *lane != probe.lane);
    assert!(schedule.pick(9, later).iter().any(|pick| Some(pick.lane) == other), "the first host is open again");
}

#[test]
fn a_lane_gets_its_share_of_places_that_others_leave() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for time in 0..200 {
        table.insert(5, time, &http("slow:80"));
        table.insert(5, time, &http("quick:80"));
    }
    table.read_all(&mut schedule);
    let picks = schedule.pick(1000, now);
    table.claim(&mut schedule, &picks);
    let slow = picks.iter().filter(|pick| pick.lane == 0).count();
    picks.iter().filter(|pick| pick.lane != 0).for_each(|pick| {
        schedule.finished(pick.lane, pick.counted, pick.position.id, &Reach::Reached, now);
    });
    let more = schedule.pick(1000, now);
    let more_of_slow = more.iter().filter(|pick| pick.lane == 0).count();
    assert!(more_of_slow > 0, "none of its own {slow} has ended, and it gets more");
    assert!(more.len() > 40);
}

#[test]
fn a_probe_that_nobody_answers_has_failed_and_a_host_that_nobody_wants_is_forgotten() {
    let (mut table, mut schedule, now) = (Table::default(), schedule(100), Instant::now());
    for time in 0..4 {
        table.insert(5, time, &http("dead:80"));
    }
    table.read_all(&mut schedule);
    let picks = schedule.pick(3, now);
    table.claim(&mut schedule, &picks);
    let refused = Reach::Unreachable("refused".into());
    picks.iter().for_each(|pick| schedule.finished(pick.lane, pick.counted, pick.position.id, &refused, now));
    let later = now + RULES.cooldown;
    let probe = schedule.pick(9, later);
    table.claim(&mut schedule, &probe);
    let silent = Reach::Silent("timed out".into());
    schedule.finished(probe[0].lane, probe[0].counted, probe[0].position.id, &silent, later);
    assert_eq!(schedule.next_probe(), Some(later + 2 * RULES.cooldown));
    schedule.breaker_changes(later);
    schedule.retire(later);
    assert_eq!(schedule.hosts.len(), 1);
    let much_later = later + 3 * RULES.cooldown;
    schedule.pick(9, much_later);
    schedule.retire(much_later);
    schedule.retire(much_later);
    assert_eq!(schedule.breaker_changes(much_later)[0].state, "closed");
    schedule.retire(much_later);
    assert_eq!((schedule.hosts.len(), schedule.next_probe()), (0, None));
}
