//! Everything goes wrong at once.

use crate::support::*;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const JOBS: i64 = 20_000;

/// What a server has seen of a job.
#[derive(Clone, Copy, Default)]
struct Seen {
    requests: i32,
    /// Answers with status 200 that were written whole.
    successes: i32,
}

/// A server that answers well, answers badly, asks for patience, hangs up, stalls and drips, by turns that look random.
#[derive(Clone, Default)]
struct Moody {
    seen: Arc<Mutex<HashMap<String, Seen>>>,
    turn: Arc<AtomicU64>,
}

impl Moody {
    fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let moody = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let moody = moody.clone();
                std::thread::spawn(move || moody.serve(&stream));
            }
        });
        url
    }

    /// What it has seen of a job.
    fn of(&self, id: &str) -> Seen {
        self.seen.lock().expect("not poisoned").get(id).copied().unwrap_or_default()
    }

    /// One request after the other; an error is a client that is gone.
    fn serve(&self, stream: &TcpStream) -> Option<()> {
        let _ = stream.set_nodelay(true);
        let mut reader = BufReader::new(stream);
        let mut writer = stream;
        loop {
            let mut key = String::new();
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                if reader.read_line(&mut line).ok()? == 0 {
                    return None;
                }
                if let Some(value) = line.strip_prefix("idempotency-key: ") {
                    key = value.trim().to_owned();
                }
            }
            let note =
                |change: fn(&mut Seen)| change(self.seen.lock().expect("not poisoned").entry(key.clone()).or_default());
            note(|seen| seen.requests += 1);
            let mut answer = |text: &str| writer.write_all(text.as_bytes()).ok();
            // Spread by the golden ratio.
            let mood = self.turn.fetch_add(1, SeqCst).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
            match mood % 1000 {
                0..800 => {
                    answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")?;
                    note(|seen| seen.successes += 1);
                }
                800..880 => answer("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")?,
                880..940 => answer("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")?,
                940..970 => return None,
                970..980 => {
                    answer("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut")?;
                    return None;
                }
                980..990 => {
                    std::thread::sleep(Duration::from_secs(2));
                    return None;
                }
                _ => {
                    answer("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")?;
                    for _ in 0..8 {
                        std::thread::sleep(Duration::from_millis(250));
                        answer("x")?;
                    }
                    return None;
                }
            }
        }
    }
}

#[test]
fn in_a_storm_every_job_ends_and_nothing_is_sent_more_often_than_the_books_say() {
    let cluster = Cluster::start(&[
        "nexus_hub.max_in_flight = 256",
        "nexus_hub.request_timeout = 1000",
        "nexus_hub.retry_base_delay = 50",
        "nexus_hub.retry_max_delay = 1000",
        "nexus_hub.max_crashes = 100",
        "restart_after_crash = on",
    ]);
    let moody = Moody::default();
    let url = moody.start();
    let database = cluster.database();
    let mut client = database.connect();
    client
        .execute(
            "INSERT INTO job_results (job_type, params, max_attempts)
             SELECT 'http_request', jsonb_build_object('url', $1::text), 3 + (n % 5)::integer FROM generate_series(1, $2::bigint) n",
            &[&url, &JOBS],
        )
        .expect("INSERT");
    // The worker is killed, which takes the server with it, and the server is stopped without a chance to write.
    let blows = [(0, JOBS / 8), (1, JOBS / 4), (0, JOBS / 2), (1, JOBS * 3 / 4)];
    for (blow, ended) in blows {
        wait_until("a part of the jobs has ended", || {
            count_jobs(&mut client, "completed") + count_jobs(&mut client, "failed") >= ended
        });
        if blow == 0 {
            cluster.signal("KILL", database.wait_for_worker());
            wait_until("the server has noticed", || client.batch_execute("SELECT 1").is_err());
        } else {
            cluster.pg_ctl(&["stop", "-m", "immediate"]);
            cluster.pg_ctl(&["start"]);
        }
        client = cluster.reconnect(&database.name);
    }
    wait_until("every job has ended", || {
        count_jobs(&mut client, "completed") + count_jobs(&mut client, "failed") == JOBS
    });

    let gone = "count(*) FILTER (WHERE a.error = 'the worker was gone before the answer was there')";
    let late = "count(*) FILTER (WHERE a.error LIKE 'timed out: %')";
    let query = format!(
        "SELECT j.id::text, j.status, j.attempt, j.crashes, j.max_attempts, count(a)::integer, ({gone})::integer, ({late})::integer
           FROM job_results j LEFT JOIN job_attempts a ON a.job_id = j.id GROUP BY j.id"
    );
    let kills = blows.len() as i32;
    let (mut forgotten, mut crashes, mut failed) = (0, 0, 0);
    for row in client.query(&query, &[]).expect("the books") {
        let (id, status): (String, String) = (row.get(0), row.get(1));
        let [attempt, crashed, max, kept, gone, late]: [i32; 6] = std::array::from_fn(|column| row.get(column + 2));
        assert_eq!(crashed, gone, "{id}: each crash is an attempt that was kept");
        match status.as_str() {
            "completed" => {
                // Noted after it was sent.
                wait_until(&format!("{id} has the answer it completed with"), || moody.of(&id).successes >= 1);
                assert_eq!(kept, attempt - 1, "{id}: all attempts but the last have failed");
            }
            _ => {
                assert_eq!((attempt - crashed, kept), (max, attempt), "{id} has failed before its last attempt");
                failed += 1;
            }
        }
        // A request is sent before its claim is on disk, a moment later: a kill in between forgets that it was.
        let seen = moody.of(&id);
        let lost = (seen.requests - attempt).max(0);
        assert!(lost <= kills, "{id} was sent {} times in {attempt} attempts", seen.requests);
        // Answered again was only what was in flight when the worker died, or what was answered too late.
        assert!(seen.successes - 1 <= crashed + lost + late, "{id} was answered {} times", seen.successes);
        forgotten += lost;
        crashes += crashed;
    }
    assert!(crashes + forgotten <= kills * 256, "{crashes} and {forgotten} in flight at the kills");
    assert!(failed < JOBS / 10, "{failed} failed");
}
