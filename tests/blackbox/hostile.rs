//! Servers that mean harm: a clear error or a faithfully kept answer each, in bounded memory, and nobody else is harmed.

use crate::metrics::{page, sample};
use crate::support::*;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// A database whose hostile jobs have a neighbour each: a job to a good server, made in the same statement.
struct Scene<'a> {
    database: Database<'a>,
    client: postgres::Client,
    good: FakeServer,
    neighbours: usize,
    worker: i32,
}

impl<'a> Scene<'a> {
    fn on(cluster: &'a Cluster) -> Self {
        let database = cluster.database();
        let client = database.connect();
        let good = FakeServer::start(|_| Some(Answer::json("{\"good\": true}")));
        let worker = database.wait_for_worker();
        Self { database, client, good, neighbours: 0, worker }
    }

    /// Runs jobs with one attempt each, and a neighbour for each, which is sent once, completes and finds its worker
    /// alive.
    fn run(&mut self, jobs: &[Value]) -> Vec<Job> {
        let ids: Vec<_> = jobs.iter().map(|_| Uuid::new_v4()).collect();
        let neighbours: Vec<_> = jobs.iter().map(|_| Uuid::new_v4()).collect();
        let user: Uuid = ALICE.parse().expect("a uuid");
        self.client
            .execute(
                "INSERT INTO job_results (id, user_id, job_type, server_id, tool_name, params, timeout_ms, max_attempts)
                 SELECT id, $1::uuid, coalesce(job ->> 'job_type', 'http_request'), job ->> 'server_id', 't',
                        coalesce(job -> 'params', '{}'), (job ->> 'timeout_ms')::integer, 1
                   FROM unnest($2::uuid[], $3::jsonb[]) AS j (id, job)
                 UNION ALL
                 SELECT id, NULL, 'http_request', NULL, NULL, $5::jsonb, NULL, NULL FROM unnest($4::uuid[]) AS n (id)",
                &[&user, &ids, &jobs, &neighbours, &json!({"url": self.good.url})],
            )
            .expect("INSERT");
        for neighbour in &neighbours {
            assert_eq!(wait_for_job(&mut self.client, *neighbour).completed()["body"], json!({"good": true}));
        }
        let ends = ids.iter().map(|job| wait_for_job(&mut self.client, *job)).collect();
        self.neighbours += neighbours.len();
        let requests = self.good.requests();
        assert_eq!(requests.len(), self.neighbours, "a neighbour was sent again");
        for neighbour in neighbours {
            let key = format!("\r\nidempotency-key: {neighbour}\r\n");
            assert_eq!(requests.iter().filter(|request| request.contains(&key)).count(), 1);
        }
        assert_eq!(self.database.worker(), Some(self.worker), "the worker has started anew");
        ends
    }

    /// The end of a job to a server that answers a request as a closure does.
    fn answered(&mut self, answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> Job {
        let server = answering(answer);
        self.run(&[http(&server)]).remove(0)
    }

    /// The end of a job to a server that answers with some bytes and then waits.
    fn answered_with(&mut self, bytes: impl Into<Vec<u8>>) -> Job {
        let bytes = bytes.into();
        self.answered(move |stream| {
            let _ = stream.write_all(&bytes);
            wait_for_goodbye(stream);
        })
    }

    /// The same, but the server closes the connection.
    fn answered_and_closed(&mut self, bytes: impl Into<Vec<u8>>) -> Job {
        let bytes = bytes.into();
        self.answered(move |stream| {
            let _ = stream.write_all(&bytes);
        })
    }

    /// The end of a tool call to a server that answers it as a closure does.
    fn called(&mut self, answer: impl Fn(&mut TcpStream, &Value) + Send + Sync + 'static) -> Job {
        let server = mcp(answer);
        self.called_at(&server.url, json!({}))
    }

    fn called_at(&mut self, url: &str, options: Value) -> Job {
        let name = Uuid::new_v4().to_string();
        add_server(&mut self.client, &name, json!({"url": url}));
        let mut job = json!({"job_type": "tool_invoke", "server_id": name});
        if let (Value::Object(job), Value::Object(options)) = (&mut job, options) {
            job.extend(options);
        }
        self.run(&[job]).remove(0)
    }

    /// Transactions of the worker that have failed.
    fn failed_transactions(&mut self) -> f64 {
        sample(&page(&mut self.client), "nexus_hub_worker_failed_transactions_total")
    }

    /// Milliseconds that the last hostile job took.
    fn longest_time(&mut self) -> f64 {
        value(
            &mut self.client,
            "SELECT max(extract(epoch FROM completed_at - started_at) * 1000)::float8 FROM job_results WHERE status = 'failed'",
        )
    }
}

fn http(server: &RawServer) -> Value {
    json!({"params": {"url": server.url}})
}

/// A server that reads a request, and leaves the rest to a closure.
fn answering(answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> RawServer {
    RawServer::start(move |mut stream| {
        if read_request(&mut stream).is_some() {
            answer(&mut stream);
        }
    })
}

/// Returns when the other side has closed the connection.
fn wait_for_goodbye(stream: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while matches!(stream.read(&mut buffer), Ok(length) if length > 0) {}
}

/// Sends bytes again and again until the other side has closed the connection.
fn for_ever(stream: &mut TcpStream, bytes: &[u8]) {
    let many = bytes.repeat((64 * 1024 / bytes.len()).max(1));
    while stream.write_all(&many).is_ok() {}
}

/// Sends bytes one by one, with time between them, until there are no more or the other side has closed.
fn drip(stream: &mut TcpStream, bytes: impl IntoIterator<Item = u8>, pause: Duration) {
    for byte in bytes {
        if stream.write_all(&[byte]).is_err() {
            return;
        }
        std::thread::sleep(pause);
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\n";

fn ok(rest: &str) -> Vec<u8> {
    format!("{OK}{rest}").into_bytes()
}

/// An answer of JSON with its length.
fn ok_json(body: &str) -> Vec<u8> {
    ok(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
}

const TOO_LARGE: &str = "the answer is larger than 16777216 bytes (nexus_hub.max_response_bytes)";
const UNSTORABLE: &str = "the answer cannot be stored as jsonb: ";
const BROKEN: &str = "the connection broke before the answer was complete: ";

/// The error of a job whose connection broke.
fn broken(job: Job, what: &str) -> String {
    let error = job.failed();
    let reason = error.strip_prefix(BROKEN).unwrap_or_else(|| panic!("{what}: {error}"));
    assert!(!reason.is_empty(), "{what}");
    reason.to_owned()
}

#[test]
fn a_body_larger_than_the_cap_is_not_kept_however_its_length_is_told() {
    let mut scene = Scene::on(shared());
    // Refused before any of it is sent.
    let job = scene.answered_with(ok("Content-Length: 16777217\r\n\r\n"));
    assert_eq!(job.failed(), TOO_LARGE);
    let job = scene.answered_with(ok("Content-Length: 18446744073709551615\r\n\r\n"));
    assert!(
        [TOO_LARGE, BROKEN].iter().any(|start| job.error.as_deref().unwrap_or_default().starts_with(start)),
        "{job:?}"
    );
    let endless = scene.answered(|stream| {
        let _ = stream.write_all(&ok("\r\n"));
        for_ever(stream, b"endless ");
    });
    assert_eq!(endless.failed(), TOO_LARGE);
    let chunked = scene.answered(|stream| {
        let _ = stream.write_all(&ok("Transfer-Encoding: chunked\r\n\r\n"));
        for_ever(stream, format!("1000\r\n{}\r\n", "x".repeat(4096)).as_bytes());
    });
    assert_eq!(chunked.failed(), TOO_LARGE);
}

#[test]
fn a_body_as_large_as_the_cap_is_kept() {
    let mut scene = Scene::on(shared());
    let job = scene.answered(|stream| {
        let _ = stream.write_all(&ok("Content-Length: 16777216\r\n\r\n"));
        let _ = stream.write_all(&vec![b'x'; 16 << 20]);
        wait_for_goodbye(stream);
    });
    let result = job.completed();
    assert_eq!(result["body"].as_str().map(str::len), Some(16 << 20));
}

#[test]
fn a_bomb_of_gzip_goes_off_in_nobodys_memory() {
    let bomb = Command::new("sh").args(["-c", "head -c 67108864 /dev/zero | gzip -1"]).output().expect("gzip").stdout;
    let mut scene = Scene::on(shared());
    let mut answer = ok(&format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", bomb.len()));
    answer.extend_from_slice(&bomb);
    assert_eq!(scene.answered_with(answer).failed(), TOO_LARGE);
    let empty = Command::new("sh").args(["-c", "gzip </dev/null"]).output().expect("gzip").stdout;
    let job = scene.answered(move |stream| {
        let _ = stream.write_all(&ok("Content-Encoding: gzip\r\n\r\n"));
        for_ever(stream, &empty);
    });
    broken(job, "nothing, compressed again and again");
    let whole = Command::new("sh").args(["-c", "seq 999 | gzip"]).output().expect("gzip").stdout;
    for garbage in [&b"this is no gzip"[..], &whole[..9], &whole[..whole.len() - 9]] {
        let mut answer = ok(&format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", garbage.len()));
        answer.extend_from_slice(garbage);
        broken(scene.answered_with(answer), "broken gzip");
    }
}

#[test]
fn a_head_without_end_or_reason_is_refused() {
    let mut scene = Scene::on(shared());
    type Misdeed = Box<dyn Fn(&mut TcpStream) + Send + Sync>;
    let misdeeds: [(&str, Misdeed); 7] = [
        ("one value without end", Box::new(|stream| for_ever(stream, b"x"))),
        ("one name without end", Box::new(|stream| for_ever(stream, b"X-"))),
        ("headers without end", Box::new(|stream| for_ever(stream, b"X-Header: something\r\n"))),
        ("a folded header without end", Box::new(|stream| for_ever(stream, b"\r\n folded"))),
        ("5000 headers", Box::new(|stream| drop(stream.write_all(&b"X-Header: 1\r\n".repeat(5000))))),
        ("4 MB in one header", Box::new(|stream| drop(stream.write_all(&[b'x'; 4 << 20])))),
        ("spaces without end", Box::new(|stream| for_ever(stream, b" "))),
    ];
    for (what, misdeed) in misdeeds {
        let job = scene.answered(move |stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX-Begin: ");
            if what.ends_with("headers") || what.starts_with("headers") {
                let _ = stream.write_all(b"1\r\n");
            }
            misdeed(stream);
            let _ = stream.write_all(b"\r\nContent-Length: 0\r\n\r\n");
            wait_for_goodbye(stream);
        });
        broken(job, what);
    }
    let job = scene.answered(|stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 ");
        for_ever(stream, b"OK");
    });
    broken(job, "a reason without end");
}

#[test]
fn what_is_not_http_is_told_at_once() {
    let mut scene = Scene::on(shared());
    for (what, bytes) in [
        ("an SSH server", &b"SSH-2.0-OpenSSH_9.6\r\n"[..]),
        ("a mail server", b"220 mail.example ESMTP\r\n"),
        ("an FTP server", b"220 (vsFTPd 3.0.5)\r\n"),
        ("a TLS alert", b"\x15\x03\x03\x00\x02\x02\x28"),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
        ("zero bytes", &[0; 64]),
        ("high bytes", &[0xff; 64]),
        ("a status of letters", b"HTTP/1.1 abc OK\r\n\r\n"),
        ("a status of two digits", b"HTTP/1.1 99 Low\r\n\r\n"),
        ("a status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n"),
        ("a negative status", b"HTTP/1.1 -20 OK\r\n\r\n"),
        ("no status", b"HTTP/1.1\r\n\r\n"),
        ("status zero", b"HTTP/1.1 000 Zero\r\n\r\n"),
        ("a version of the future", b"HTTP/9.9 200 OK\r\n\r\n"),
        ("no version", b"200 OK\r\n\r\n"),
        ("a radio", b"ICY 200 OK\r\n\r\n"),
        ("a zero byte in the status line", b"HTTP/1.1 200 O\0K\r\n\r\n"),
        ("a request", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a header without a name", b"HTTP/1.1 200 OK\r\n: x\r\n\r\n"),
        ("a header without a colon", b"HTTP/1.1 200 OK\r\nnothing\r\n\r\n"),
        ("a zero byte in a header", b"HTTP/1.1 200 OK\r\nX-Note: a\0b\r\nContent-Length: 0\r\n\r\n"),
        ("a zero byte in a name", b"HTTP/1.1 200 OK\r\nX\0Note: a\r\nContent-Length: 0\r\n\r\n"),
        ("a control character in a header", b"HTTP/1.1 200 OK\r\nX-Note: a\x07b\r\nContent-Length: 0\r\n\r\n"),
        ("high bytes in a name", b"HTTP/1.1 200 OK\r\nX-N\xc3\xb6te: a\r\nContent-Length: 0\r\n\r\n"),
        ("a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n"),
        ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        ("two lengths in one", b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\nab"),
        ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
        ("a signed length", b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na"),
        ("a length of letters", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
        ("a length beyond all", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
    ] {
        broken(scene.answered_with(bytes), what);
    }
    assert!(scene.longest_time() < 25_000.0, "no job has waited for its time-out of 30 s");
}

#[test]
fn an_answer_that_is_cut_off_is_no_answer() {
    let mut scene = Scene::on(shared());
    for (what, bytes) in [
        ("nothing", &b""[..]),
        ("half a status line", b"HTTP/1.1 20"),
        ("a status line", b"HTTP/1.1 200 OK\r\n"),
        ("half a head", b"HTTP/1.1 200 OK\r\nContent-Type: text/pl"),
        ("no body", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
        ("half a body", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"),
        ("no chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("half a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"),
        ("no last chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
        ("half a last chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"),
    ] {
        broken(scene.answered_and_closed(bytes), what);
    }
    let server = RawServer::start(drop);
    broken(scene.run(&[http(&server)]).remove(0), "closed after the accept");
    let server = RawServer::start(|mut stream| drop(stream.read(&mut [0])));
    broken(scene.run(&[http(&server)]).remove(0), "reset");
}

#[test]
fn chunks_that_are_broken_are_no_answer() {
    let mut scene = Scene::on(shared());
    for chunks in [
        "hello\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello world\r\n0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "\r\n\r\n",
        "ffffffffffffffff\r\nx",
        "fffffffffffffffff\r\nx",
        "10000000000000000000000000000000000005\r\nhello\r\n0\r\n\r\n",
    ] {
        let job = scene.answered_and_closed(ok(&format!("Transfer-Encoding: chunked\r\n\r\n{chunks}")));
        let error = job.failed();
        assert!(error.starts_with(BROKEN) || error == TOO_LARGE, "{chunks:?}: {error}");
    }
    for endless in ["5;extension=", "5\r\nhello\r\n0\r\nTrailer: "] {
        let job = scene.answered(move |stream| {
            let _ = stream.write_all(&ok(&format!("Transfer-Encoding: chunked\r\n\r\n{endless}")));
            for_ever(stream, b"x");
        });
        broken(job, endless);
    }
    // A length beside chunks is passed over, as the standard has it, or refused.
    let both = "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let job = scene.answered_with(ok(both));
    match job.status.as_str() {
        "completed" => assert_eq!(job.completed()["body"], "hello"),
        _ => drop(broken(job, both)),
    }
}

#[test]
fn what_comes_after_an_answer_is_nobodys_answer() {
    let server = answering(|stream| {
        let _ = stream.write_all(&ok("Content-Length: 5\r\n\r\nfirst"));
        let _ = stream.write_all(&ok("Content-Length: 8\r\n\r\nsmuggled"));
        wait_for_goodbye(stream);
    });
    let mut scene = Scene::on(shared());
    for _ in 0..5 {
        assert_eq!(scene.run(&[http(&server)]).remove(0).completed()["body"], "first");
    }
}

#[test]
fn odd_answers_are_kept_as_they_are() {
    let mut scene = Scene::on(shared());
    let body = "grüße aus dem äther";
    let whole = ok(&format!("Content-Type: text/plain\r\nX-Odd: a\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    let job = scene.answered(move |stream| drip(stream, whole.clone(), Duration::from_micros(200)));
    let result = job.completed();
    assert_eq!((&result["body"], &result["headers"]["x-odd"]), (&json!(body), &json!("a")), "in pieces of one byte");
    let chunked: String = body.chars().map(|c| format!("{:x}\r\n{c}\r\n", c.len_utf8())).collect();
    let job = scene.answered_with(ok(&format!("Transfer-Encoding: chunked\r\n\r\n{chunked}0\r\n\r\n")));
    assert_eq!(job.completed()["body"], body, "in chunks of one character");
    let job = scene.answered_with(ok("Content-Length: 5\r\n\r\na\0b\0c"));
    assert_eq!(job.completed()["body_base64"], "YQBiAGM=", "zero bytes");
    let mut bytes = ok("Content-Type: application/json\r\nX-Note: gr\u{fc}n\r\nContent-Length: 4\r\n\r\n");
    bytes.extend([b'"', 0xff, 0xfe, b'"']);
    let result = scene.answered_with(bytes).completed();
    assert_eq!((&result["body_base64"], &result["headers"]["x-note"]), (&json!("Iv/+Ig=="), &json!("grün")));
    let mut bytes = b"HTTP/1.1 200 \xff\xfe\r\nX-Note: \xff\xc3(\r\n".to_vec();
    bytes.extend(b"Content-Length: 0\r\n\r\n");
    let result = scene.answered_with(bytes).completed();
    assert_eq!(result["headers"]["x-note"], "\u{fffd}\u{fffd}(", "no UTF-8");
    for (status, code) in [("299 Strange", 299), ("399 Strange", 399), ("999 Strange", 999), ("600", 600)] {
        let job = scene.answered_with(format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nhi"));
        assert_eq!(job.result.expect("kept")["status"], code);
    }
    let job = scene.answered_with("HTTP/1.0 200 OK\nX-Note: bare line feeds\nContent-Length: 2\n\nhi");
    assert_eq!(job.completed()["body"], "hi");
    let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx";
    assert_eq!(scene.answered_with(switch).completed()["status"], 101);
    let job = scene.answered_with("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(job.completed().get("body"), None);
}

/// Texts that are JSON, but none that jsonb takes.
fn monsters() -> Vec<(&'static str, String)> {
    let nested = |open: &str, close: &str, depth| format!("{}1{}", open.repeat(depth), close.repeat(depth));
    vec![
        ("100,000 arrays", nested("[", "]", 100_000)),
        ("100,000 objects", nested("{\"a\":", "}", 100_000)),
        ("5,000,000 arrays", nested("[", "]", 5_000_000)),
        ("a number beyond numeric", "1e200000".into()),
        ("a small number beyond numeric", "[1e-200000]".into()),
        ("a number of 200,000 digits", "9".repeat(200_000)),
        ("an exponent beyond all", "{\"a\": 1e99999999999999999999}".into()),
        ("half a character", "[\"\\ud800\"]".into()),
        ("a zero character", "[\"\\u0000\"]".into()),
        ("a key with a zero character", "{\"\\u0000\": 1}".into()),
    ]
}

#[test]
fn json_that_the_database_does_not_take_is_kept_as_text_or_told() {
    let mut scene = Scene::on(shared());
    for (what, body) in monsters() {
        let job = scene.answered_with(ok_json(&body));
        match job.status.as_str() {
            "completed" => {
                let kept = job.completed();
                assert!(kept["body"] == Value::String(body) || what.contains("small"), "{what}");
            }
            _ => {
                let error = job.failed();
                assert!(error.starts_with(UNSTORABLE), "{what}: {error}");
            }
        }
    }
}

#[test]
fn many_such_answers_at_once_hold_up_nobody() {
    let server = answering(|stream| {
        let _ = stream.write_all(&ok("Connection: close\r\nContent-Type: application/json\r\n\r\n1e200000"));
    });
    let mut scene = Scene::on(shared());
    let jobs = vec![http(&server); 32];
    let before = scene.failed_transactions();
    for job in scene.run(&jobs) {
        assert!(job.failed().starts_with(UNSTORABLE));
    }
    // The worker waits a while after each transaction that fails. One that meets such answers does not fail; if it took
    // a failure to find out about each of them, there would be 32 at least.
    let failures = scene.failed_transactions() - before;
    assert!(failures < 32.0, "{failures}");
}

#[test]
fn a_server_that_drips_does_not_stretch_a_jobs_time() {
    let mut scene = Scene::on(shared());
    let pause = Duration::from_millis(5);
    type Misdeed = Box<dyn Fn(&mut TcpStream) + Send + Sync>;
    let endless = |byte: u8| std::iter::repeat(byte);
    let misdeeds: Vec<(&str, Misdeed)> = vec![
        ("a head", Box::new(move |stream| drip(stream, ok("X-Drip: ").into_iter().chain(endless(b'x')), pause))),
        ("a body", Box::new(move |stream| drip(stream, ok("\r\n").into_iter().chain(endless(b'x')), pause))),
        (
            "spaces before a status",
            Box::new(move |stream| drip(stream, b"HTTP/1.1 ".iter().copied().chain(endless(b' ')), pause)),
        ),
        (
            "chunks",
            Box::new(move |stream| {
                let chunks = std::iter::repeat(*b"1\r\nx\r\n").flatten();
                drip(stream, ok("Transfer-Encoding: chunked\r\n\r\n").into_iter().chain(chunks), pause);
            }),
        ),
        (
            "answers that come before the answer",
            Box::new(move |stream| {
                while stream.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n").is_ok() {
                    std::thread::sleep(pause);
                }
            }),
        ),
        ("promises without end", Box::new(|stream| for_ever(stream, b"HTTP/1.1 100 Continue\r\n\r\n"))),
        ("nothing", Box::new(wait_for_goodbye)),
        (
            "redirects",
            Box::new(move |stream| {
                let hop = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                drip(stream, hop.iter().copied(), pause);
            }),
        ),
    ];
    for (what, misdeed) in misdeeds {
        let server = answering(misdeed);
        let mut job = http(&server);
        job["timeout_ms"] = json!(300);
        let error = scene.run(&[job]).remove(0).failed();
        let is_over = error == "timed out: no answer within 300 ms";
        assert!(is_over || (what == "promises without end" && error.starts_with(BROKEN)), "{what}: {error}");
    }
    assert!(scene.longest_time() < 25_000.0, "{}", scene.longest_time());
}

#[test]
fn a_loop_of_redirects_harms_nobody() {
    let mut scene = Scene::on(shared());
    let hop = "HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let job = scene.answered_and_closed(hop);
    assert_eq!(job.failed(), "the redirect was not followed: there are more than 5 of them");
    // The body of a redirect is nobody's answer, however long.
    let job = scene.answered(|stream| {
        let _ = stream.write_all(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n");
        for_ever(stream, b"x");
    });
    assert_eq!(job.failed(), "the redirect was not followed: there are more than 5 of them");
}

/// An MCP server of the older protocol that leaves calls, and the streams that are taken up again, to a closure.
fn mcp(answer: impl Fn(&mut TcpStream, &Value) + Send + Sync + 'static) -> RawServer {
    RawServer::start(move |mut stream| {
        while let Some(request) = read_request(&mut stream) {
            let body = request.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
            let message: Value = serde_json::from_str(body).unwrap_or_default();
            let reply = match message["method"].as_str() {
                Some("server/discover") => json!({"error": {"code": -32601, "message": "unknown method"}}),
                Some("initialize") => json!({"result": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                             "serverInfo": {"name": "hostile", "version": "1"}}}),
                Some("tools/call") | None if request.starts_with("POST") || request.starts_with("GET") => {
                    return answer(&mut stream, &message["id"]);
                }
                _ => {
                    let _ = stream.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n");
                    continue;
                }
            };
            let mut reply = reply;
            reply["jsonrpc"] = json!("2.0");
            reply["id"] = message["id"].clone();
            let _ = stream.write_all(&ok_json(&reply.to_string()));
        }
    })
}

/// The head of a stream of events.
fn events() -> Vec<u8> {
    ok("Content-Type: text/event-stream\r\n\r\n")
}

#[test]
fn streams_of_events_without_end_are_cut_at_the_cap() {
    let mut scene = Scene::on(shared());
    let progress =
        "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"info\",\"data\":\"x\"}}";
    for (what, begin, bytes) in [
        ("comments", "", ": nothing\n\n".to_owned()),
        ("empty lines", "", "\n".into()),
        ("one event", "data: ", "x".into()),
        ("lines of one event", "", "data: x\n".into()),
        ("empty events", "", "data:\n\n".into()),
        ("events that are not JSON", "", "event: message\ndata: {broken\n\n".into()),
        ("messages", "", format!("data: {}{progress}\n\n", " ".repeat(4000))),
    ] {
        let job = scene.called(move |stream, _| {
            let _ = stream.write_all(&events());
            let _ = stream.write_all(begin.as_bytes());
            for_ever(stream, bytes.as_bytes());
        });
        assert_eq!(job.failed(), TOO_LARGE, "{what}");
    }
    let job = scene.called(|stream, _| {
        let answer = "data: {\"jsonrpc\":\"2.0\",\"id\":99,\"result\":{}}";
        let _ = stream.write_all(&events());
        for_ever(stream, format!("{answer}{}\n\n", " ".repeat(4000)).as_bytes());
    });
    let error = job.failed();
    assert!(error == TOO_LARGE || error.starts_with(BROKEN), "answers to nothing: {error}");
}

#[test]
fn streams_of_events_that_drip_or_stall_do_not_stretch_a_jobs_time() {
    let mut scene = Scene::on(shared());
    for event in [
        "",
        ": still here\n\n",
        "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"info\",\"data\":1}}\n\n",
    ] {
        let server = mcp(move |stream, _| {
            let _ = stream.write_all(&events());
            if event.is_empty() {
                wait_for_goodbye(stream);
            }
            while stream.write_all(event.as_bytes()).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let job = scene.called_at(&server.url, json!({"timeout_ms": 300}));
        assert_eq!(job.failed(), "timed out: no answer within 300 ms", "{event}");
    }
    assert!(scene.longest_time() < 25_000.0, "{}", scene.longest_time());
}

#[test]
fn a_stream_that_breaks_off_again_and_again_is_not_taken_up_for_ever() {
    let server = mcp(|stream, _| {
        let _ = stream.write_all(&ok("Content-Type: text/event-stream\r\nConnection: close\r\n\r\n"));
        let _ = stream.write_all(b"id: 1\nretry: 0\ndata:\n\n");
    });
    let mut scene = Scene::on(shared());
    let job = scene.called_at(&server.url, json!({"timeout_ms": 300}));
    assert_eq!(job.failed(), "timed out: no answer within 300 ms");
    let mut before = 0;
    wait_until("the stream is given up", || {
        // As long as it is taken up, there are connections while other jobs run.
        scene.answered_with(ok("Content-Length: 0\r\n\r\n")).completed();
        let now = server.connections();
        std::mem::replace(&mut before, now) == now
    });
}

#[test]
fn a_handshake_that_means_harm_fails_the_call() {
    let mut scene = Scene::on(shared());
    type Misdeed = Box<dyn Fn(&mut TcpStream) + Send + Sync>;
    let misdeeds: [(&str, Misdeed); 6] = [
        (
            "a body without end",
            Box::new(|stream| {
                let _ = stream.write_all(&ok("Content-Type: application/json\r\n\r\n"));
                for_ever(stream, b"[");
            }),
        ),
        (
            "events without end",
            Box::new(|stream| {
                let _ = stream.write_all(&events());
                for_ever(stream, b": x\n\n");
            }),
        ),
        ("100,000 arrays", Box::new(|stream| drop(stream.write_all(&ok_json(&"[".repeat(100_000)))))),
        (
            "a session of megabytes",
            Box::new(|stream| {
                let _ = stream.write_all(&ok("Mcp-Session-Id: "));
                for_ever(stream, b"x");
            }),
        ),
        (
            "an error of megabytes",
            Box::new(|stream| {
                let _ = stream.write_all(b"HTTP/1.1 500 Oh No\r\n\r\n");
                let _ = stream.write_all(&vec![b'x'; 8 << 20]);
            }),
        ),
        ("no HTTP", Box::new(|stream| drop(stream.write_all(b"SSH-2.0-OpenSSH_9.6\r\n")))),
    ];
    for (what, misdeed) in misdeeds {
        let server = answering(misdeed);
        let error = scene.called_at(&server.url, json!({})).failed();
        let is_clear = [TOO_LARGE, BROKEN, "the server does not speak MCP at that URL: ", "the server answered 500"];
        assert!(
            is_clear.iter().any(|start| error.starts_with(start)) && error.chars().count() < 800,
            "{what}: {error}"
        );
    }
}

#[test]
fn answers_of_huge_or_monstrous_json_to_a_call_are_kept_or_told() {
    let mut scene = Scene::on(shared());
    let job = scene.called(|stream, id| {
        let text = "x".repeat(17 << 20);
        let _ =
            stream.write_all(&ok_json(&format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{{\"a\":\"{text}\"}}}}")));
    });
    assert_eq!(job.failed(), TOO_LARGE);
    for (what, monster) in monsters() {
        let body = monster.clone();
        let job = scene.called(move |stream, id| {
            let result = format!("{{\"content\":[],\"structuredContent\":{{\"a\":{body}}}}}");
            let _ = stream.write_all(&ok_json(&format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{result}}}")));
            wait_for_goodbye(stream);
        });
        if job.status == "completed" {
            assert!(["small", "a zero", "zero character"].iter().any(|word| what.contains(word)), "{what}");
        } else {
            let error = job.failed();
            let is_clear = [UNSTORABLE, "the server does not speak MCP at that URL: "];
            assert!(is_clear.iter().any(|start| error.starts_with(start)), "{what}: {error}");
        }
        let job = scene.called(move |stream, id| {
            let _ = stream.write_all(&ok_json(&format!(
                "{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{{\"content\":{monster}}}}}"
            )));
            wait_for_goodbye(stream);
        });
        assert!(job.status == "completed" || job.error.is_some(), "{what}");
    }
}

/// The most memory of its own that a process had, in MB, while something ran.
fn peak_memory(pid: i32, run: impl FnOnce()) -> u64 {
    let is_over = AtomicBool::new(false);
    let now = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the worker lives");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
    };
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = 0;
            while !is_over.load(Ordering::SeqCst) {
                peak = peak.max(now());
                std::thread::sleep(Duration::from_millis(1));
            }
            peak
        });
        run();
        is_over.store(true, Ordering::SeqCst);
        sampler.join().expect("no panic")
    })
}

#[test]
fn many_large_answers_at_once_share_a_bounded_memory() {
    let cluster = Cluster::start(&["nexus_hub.response_memory = '64MB'"]);
    let mut scene = Scene::on(&cluster);
    let under = answering(|stream| {
        let _ = stream.write_all(&ok("Connection: close\r\nContent-Length: 16777216\r\n\r\n"));
        let _ = stream.write_all(&vec![b'x'; 16 << 20]);
        wait_for_goodbye(stream);
    });
    let beyond = answering(|stream| {
        let _ = stream.write_all(&ok("\r\n"));
        for_ever(stream, b"endless ");
    });
    let jobs: Vec<_> = (0..64)
        .map(|number| {
            let mut job = http(if number % 16 == 0 { &under } else { &beyond });
            // The wait for a place is part of it.
            job["timeout_ms"] = json!(300_000);
            job
        })
        .collect();
    let mut ends = Vec::new();
    let peak = peak_memory(scene.worker, || ends = scene.run(&jobs));
    for (number, end) in ends.into_iter().enumerate() {
        if number % 16 == 0 {
            assert_eq!(end.completed()["body"].as_str().map(str::len), Some(16 << 20));
        } else {
            assert_eq!(end.failed(), TOO_LARGE);
        }
    }
    // 64 MB hold 4 answers of 16 MB. Each is there up to 4 times at once, as a body and as the text of its result, both
    // in buffers that have doubled: 256 MB. One at a time is written, which takes up to 12 copies in PostgreSQL
    // (datum, array, slice, element, jsonb in parts and as a whole, its compressed form): 192 MB. The others have no
    // more than 256 kB and a connection's buffers each, 64 MB in all, and the worker itself has 32 MB. Without the
    // places it would be 64 times 16 MB in 2 copies: 2048 MB.
    assert!(peak < 544, "{peak} MB");
}

#[test]
fn json_of_millions_of_parts_takes_a_bounded_multiple_of_its_size() {
    let cluster = Cluster::start(&["nexus_hub.max_response_bytes = '2MB'"]);
    let mut scene = Scene::on(&cluster);
    let wide = |open: &str, item: &str, close: &str| {
        format!("{open}{item}{}{close}", format!(",{item}").repeat(2_000_000 / (item.len() + 1)))
    };
    let (numbers, arrays) = (wide("[", "0", "]"), wide("[", "[]", "]"));
    type Misdeed = Box<dyn Fn(&mut TcpStream, &Value) + Send + Sync>;
    let result = |members: String| -> Misdeed {
        Box::new(move |stream, id| {
            let message = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{{{members}}}}}");
            let _ = stream.write_all(&ok_json(&message));
            wait_for_goodbye(stream);
        })
    };
    let refusal = numbers.clone();
    let calls: [(&str, Misdeed); 5] = [
        ("numbers in the content", result(format!("\"content\":{numbers}"))),
        ("arrays in the content", result(format!("\"content\":{arrays}"))),
        ("arrays elsewhere", result(format!("\"x\":{arrays}"))),
        ("members", result(format!("\"x\":{}", wide("{", "\"\":0", "}")))),
        (
            "a refusal",
            Box::new(move |stream, _| {
                let length = refusal.len();
                let _ = stream
                    .write_all(format!("HTTP/1.1 500 No\r\nContent-Length: {length}\r\n\r\n{refusal}").as_bytes());
                wait_for_goodbye(stream);
            }),
        ),
    ];
    // What PostgreSQL makes of the smallest parts on their way into jsonb: up to 110 bytes of each byte, for a moment and
    // of one answer at a time. So it is 220 MB here, and a quarter more for good measure; the worker itself has 32 MB.
    let bound = 308;
    for (what, misdeed) in calls {
        let server = mcp(misdeed);
        let peak = peak_memory(scene.worker, || drop(scene.called_at(&server.url, json!({}))));
        assert!(peak < bound, "{what}: {peak} MB");
    }
    for body in [numbers.clone(), arrays.clone()] {
        let peak = peak_memory(scene.worker, || drop(scene.answered_with(ok_json(&body)).completed()));
        assert!(peak < bound, "plain HTTP: {peak} MB");
    }
    let handshake = result(format!("\"x\":{numbers}"));
    let server = answering(move |stream| handshake(stream, &json!(0)));
    let peak = peak_memory(scene.worker, || drop(scene.called_at(&server.url, json!({})).failed()));
    assert!(peak < bound, "the handshake: {peak} MB");
}
