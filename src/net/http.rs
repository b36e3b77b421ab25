//! Plain HTTP: the client that everything shares, and `http_request` jobs.

use super::endpoint::{self, sensitive};
use super::failure::{Failure, status_text};
use super::outcome::Verdict;
use crate::domain::json::is_storable;
use crate::domain::secret::Secret;
use base64::Engine;
use futures::StreamExt;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response, Url};
use serde_json::{Map, Value};
use std::time::Duration;
use uuid::Uuid;

/// The header that tells a server that it has seen a job before.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The HTTP client of the process: no redirects, no proxies from the environment, TLS verified by the system's roots.
pub fn client(max_idle: usize) -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder()
        .user_agent(concat!("nexus_hub/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .pool_max_idle_per_host(max_idle)
        .pool_idle_timeout(Duration::from_secs(30))
        .tcp_keepalive(Duration::from_secs(60))
        .build()
}

/// A response's body, decompressed, up to a size.
pub async fn read_body(response: Response, limit: usize) -> Result<Vec<u8>, Failure> {
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Err(Failure::TooLarge { limit });
    }
    let mut body = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        if body.len() + chunk.len() > limit {
            return Err(Failure::TooLarge { limit });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// An `http_request` job, checked.
#[derive(Clone, Debug)]
pub struct HttpCall {
    method: Method,
    url: Url,
    headers: Vec<(HeaderName, Secret)>,
    body: Option<(String, bool)>,
    pub timeout: Option<Duration>,
}

impl HttpCall {
    /// Reads a job's `params`: url, and optionally method, headers, body (a string is sent as it is, anything else as
    /// the JSON it is) and timeout_ms.
    pub fn parse(params: &str) -> Result<Self, String> {
        let (params, raw) = endpoint::members(params, &["url", "method", "headers", "timeout_ms"])?;
        let params = &params;
        let body = match raw.get("body").map(|body| body.get()) {
            None | Some("null") => None,
            Some(text) if text.starts_with('"') => {
                Some((serde_json::from_str(text).map_err(|_| "\"body\" cannot be read")?, false))
            }
            Some(json) => Some((json.to_owned(), true)),
        };
        let method = match params.get("method") {
            None | Some(Value::Null) if body.is_some() => Method::POST,
            None | Some(Value::Null) => Method::GET,
            Some(Value::String(name)) => Method::from_bytes(name.to_ascii_uppercase().as_bytes())
                .map_err(|_| "\"method\" is not an HTTP method".to_owned())?,
            Some(_) => return Err("\"method\" is not a string".into()),
        };
        Ok(Self {
            method,
            url: endpoint::url(params)?,
            headers: endpoint::headers(params)?,
            body,
            timeout: endpoint::timeout(params)?,
        })
    }

    /// The secrets that must not come out in a text.
    pub fn secrets(&self) -> Vec<Secret> {
        endpoint::secrets(&self.url, &self.headers)
    }

    /// Makes the request.
    pub async fn perform(&self, client: &reqwest::Client, job: Uuid, limit: usize) -> Result<Verdict, Failure> {
        let mut headers = HeaderMap::new();
        if let Ok(key) = HeaderValue::from_str(&job.to_string()) {
            headers.insert(IDEMPOTENCY_KEY, key);
        }
        if self.body.as_ref().is_some_and(|(_, is_json)| *is_json) {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        for (name, value) in &self.headers {
            if let Some(value) = sensitive(value) {
                headers.insert(name, value);
            }
        }
        let mut request = client.request(self.method.clone(), self.url.clone()).headers(headers);
        if let Some((body, _)) = &self.body {
            request = request.body(body.clone());
        }
        let response = request.send().await?;
        let status = response.status();
        let headers = response.headers().clone();
        let body = read_body(response, limit).await?;
        let result = answer(status.as_u16(), &headers, &body);
        Ok(if status.is_client_error() || status.is_server_error() {
            let error = format!("the server answered {}", status_text(status.as_u16()));
            Verdict::Failed { error, result: Some(result) }
        } else {
            Verdict::Completed { result }
        })
    }
}

/// `{"status", "headers", "body"}` as JSON text: a JSON body as the server wrote it, a text as a string, and bytes
/// that are neither as base64 under "body_base64". An empty body has neither key.
fn answer(status: u16, headers: &HeaderMap, body: &[u8]) -> String {
    let mut head = Map::new();
    for name in headers.keys() {
        let values: Vec<_> = headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).replace('\0', ""))
            .collect();
        head.insert(name.as_str().to_owned(), Value::String(values.join(", ")));
    }
    let mut answer = format!("{{\"status\":{status},\"headers\":{}", Value::Object(head));
    let is_json = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().ends_with("json")));
    if !body.is_empty() {
        match std::str::from_utf8(body) {
            Ok(text) if is_json && is_storable(text) => answer.push_str(&format!(",\"body\":{text}")),
            Ok(text) if !text.contains('\0') => answer.push_str(&format!(",\"body\":{}", Value::from(text))),
            _ => {
                let encoded = base64::engine::general_purpose::STANDARD.encode(body);
                answer.push_str(&format!(",\"body_base64\":\"{encoded}\""));
            }
        }
    }
    answer.push('}');
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answered(kind: &'static str, body: &[u8]) -> Value {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        let text = answer(200, &headers, body);
        serde_json::from_str(&text).unwrap_or_else(|problem| panic!("{problem}: {text}"))
    }

    #[test]
    fn bodies_are_kept_as_json_text_or_base64() {
        assert_eq!(answered("application/json; charset=utf-8", b"{\"a\": 1.10}")["body"], json!({"a": 1.10}));
        assert_eq!(answered("application/problem+json", b"[1]")["body"], json!([1]));
        assert_eq!(answered("application/json", b"{broken")["body"], json!("{broken"));
        assert_eq!(answered("text/plain", "grüße".as_bytes())["body"], json!("grüße"));
        assert_eq!(answered("text/plain", &[0xff, 0xfe])["body_base64"], json!("//4="));
        assert_eq!(answered("text/plain", b"a\0b")["body_base64"], json!("YQBi"));
        let empty = answered("text/plain", b"");
        assert!(empty.get("body").is_none() && empty.get("body_base64").is_none());
    }

    #[test]
    fn json_that_jsonb_refuses_is_kept_as_text() {
        for text in ["{\"a\":\"\\u0000\"}", "\"\\ud800\""] {
            assert_eq!(answered("application/json", text.as_bytes())["body"], json!(text));
        }
    }

    #[test]
    fn numbers_reach_the_row_as_the_server_wrote_them() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let text = answer(200, &headers, b"123456789012345678901234567890.10");
        assert!(text.ends_with("\"body\":123456789012345678901234567890.10}"), "{text}");
    }

    #[test]
    fn the_method_follows_from_the_body_unless_it_is_given() {
        let method = |params: Value| HttpCall::parse(&params.to_string()).map(|call| call.method.to_string());
        assert_eq!(method(json!({"url": "http://h/"})).as_deref(), Ok("GET"));
        assert_eq!(method(json!({"url": "http://h/", "body": {"a": 1}})).as_deref(), Ok("POST"));
        assert_eq!(method(json!({"url": "http://h/", "method": "put", "body": "x"})).as_deref(), Ok("PUT"));
        assert!(method(json!({"url": "http://h/", "method": "G T"})).is_err());
    }
}
