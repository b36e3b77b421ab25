//! Plain HTTP jobs.

use crate::support::*;
use serde_json::json;

fn answered(
    answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
) -> (FakeServer, Database<'static>, postgres::Client) {
    let server = FakeServer::start(move |request| Some(answer(request)));
    let database = shared().database();
    let client = database.connect();
    (server, database, client)
}

#[test]
fn the_result_holds_status_headers_and_a_json_body() {
    let (server, _database, mut client) = answered(|_| {
        let mut answer = Answer::json("{\"price\": 1.10}");
        answer.headers.push(("X-Many", "a".into()));
        answer.headers.push(("X-Many", "b".into()));
        answer
    });
    let result = run_http(&mut client, json!({"url": server.url})).completed();
    assert_eq!(result["status"], 200);
    assert_eq!(result["headers"]["content-type"], "application/json");
    assert_eq!(result["headers"]["x-many"], "a, b");
    let body: String = value(&mut client, "SELECT result ->> 'body' FROM job_results");
    assert_eq!(body, "{\"price\": 1.10}");
}

#[test]
fn texts_stay_text_and_other_bytes_become_base64() {
    let (server, _database, mut client) = answered(|request| {
        if request.starts_with("GET /text ") {
            Answer::new("200 OK", "text/plain", "grüße")
        } else {
            Answer::new("200 OK", "image/png", vec![0x89, b'P', b'N', b'G', 0, 0xff])
        }
    });
    let text = run_http(&mut client, json!({"url": format!("{}text", server.url)})).completed();
    assert_eq!(text["body"], "grüße");
    let bytes = run_http(&mut client, json!({"url": server.url})).completed();
    assert_eq!(bytes["body_base64"], "iVBORwD/");
    assert_eq!(bytes.get("body"), None);
}

#[test]
fn method_headers_and_body_are_sent_and_the_jobs_id_with_them() {
    let (server, _database, mut client) = answered(|_| Answer::json("{}"));
    let params = json!({"url": server.url, "method": "put", "headers": {"X-Token": "t"}, "body": {"a": [1]}});
    run_http(&mut client, params).completed();
    let request = server.requests().remove(0);
    let job: uuid::Uuid = value(&mut client, "SELECT id FROM job_results");
    assert!(request.starts_with("PUT / HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("\r\nx-token: t\r\n"), "{request}");
    assert!(request.contains("\r\ncontent-type: application/json\r\n"), "{request}");
    assert!(request.contains(&format!("\r\nidempotency-key: {job}\r\n")), "{request}");
    assert!(request.ends_with("\r\n\r\n{\"a\": [1]}"), "{request}");
}

#[test]
fn an_error_status_fails_the_job_and_keeps_the_answer() {
    let (server, _database, mut client) = answered(|_| Answer::new("404 Not Found", "text/plain", "gone"));
    let job = run_http(&mut client, json!({"url": server.url}));
    assert_eq!(job.result.as_ref().expect("kept")["body"], "gone");
    assert_eq!(job.failed(), "the server answered 404 Not Found");
}

#[test]
fn a_bad_request_is_a_failed_job_and_nothing_is_sent() {
    let (server, _database, mut client) = answered(|_| Answer::json("{}"));
    for (params, problem) in [
        (json!({"url": server.url, "headers": {"X": "a\r\nY: b"}}), "the header \"X\" has characters"),
        (json!({"url": server.url, "headers": {"X\r\nY": "b"}}), "not a valid header name"),
        (json!({"url": server.url, "method": "G T"}), "\"method\" is not an HTTP method"),
        (json!({"url": server.url, "timeout_ms": 0}), "\"timeout_ms\" is not a whole number"),
        (json!({"url": "file:///etc/passwd"}), "must begin with http:// or https://"),
        (json!({"url": 7}), "\"url\" is not a string"),
    ] {
        let error = run_http(&mut client, params.clone()).failed();
        assert!(error.starts_with("bad request: ") && error.contains(problem), "{params}: {error}");
    }
    assert!(server.requests().is_empty());
}

#[test]
fn compressed_answers_are_read_and_capped_by_their_true_size() {
    // gzip of 64 MiB of zero bytes is 64 KiB.
    let bomb =
        std::process::Command::new("sh").args(["-c", "head -c 67108864 /dev/zero | gzip -9"]).output().expect("gzip");
    let bomb = bomb.stdout;
    let (server, _database, mut client) = answered(move |_| {
        let mut answer = Answer::new("200 OK", "application/octet-stream", bomb.clone());
        answer.headers.push(("Content-Encoding", "gzip".into()));
        answer
    });
    let error = run_http(&mut client, json!({"url": server.url})).failed();
    assert_eq!(error, "the answer is larger than 16777216 bytes (nexus_hub.max_response_bytes)");
}

#[test]
fn a_jobs_own_time_out_is_kept() {
    let (server, _database, mut client) = answered(|_| {
        std::thread::park();
        Answer::json("{}")
    });
    let error = run_http(&mut client, json!({"url": server.url, "timeout_ms": 200})).failed();
    assert_eq!(error, "timed out: no answer within 200 ms");
}
