//! Plain HTTP: `http_request` jobs.

use super::body::{self, Held};
use super::endpoint::{self, Headers, sensitive};
use super::failure::{self, Failure, status_text};
use super::outbound::{Outbound, authorized};
use super::outcome::{Ending, Retry, Verdict};
use super::redaction::redacting;
use super::runtime::Limits;
use super::template::{Filled, Template};
use crate::domain::backoff;
use crate::domain::json::is_storable;
use crate::domain::redact::{Redactor, TooLarge};
use crate::domain::schedule::Reach;
use crate::domain::secret::Secret;
use base64::Engine;
use reqwest::header::{
    ACCEPT, ACCEPT_LANGUAGE, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
    USER_AGENT,
};
use reqwest::{Method, Request, Response, StatusCode, Url};
use serde_json::Value;
use serde_json::value::RawValue;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use uuid::Uuid;

/// The header that tells a server that it has seen a job before.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Headers that go along when a redirect leads to another origin: any other may hold a credential.
const HARMLESS: [HeaderName; 5] = [ACCEPT, ACCEPT_LANGUAGE, CONTENT_TYPE, USER_AGENT, IDEMPOTENCY_KEY];

/// When a server asks to be called again, if it does.
pub fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    backoff::retry_after(value, SystemTime::now())
}

/// An `http_request` job, checked.
#[derive(Clone, Debug)]
pub struct HttpCall {
    method: Method,
    url: Url,
    headers: Headers,
    template: Option<Template>,
    body: Option<(String, bool)>,
    pub timeout: Option<Duration>,
    /// What is asked of the server is to take the job over.
    hands_over: bool,
}

impl HttpCall {
    /// Hands a job over to an executor elsewhere.
    pub fn hand_over(url: Url, authorization: Secret, body: String) -> Self {
        Self {
            method: Method::POST,
            url,
            headers: vec![(AUTHORIZATION, authorization)],
            template: None,
            body: Some((body, true)),
            timeout: None,
            hands_over: true,
        }
    }

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
            template: Template::of(params)?,
            body,
            timeout: endpoint::timeout(params)?,
            hands_over: false,
        })
    }

    /// What is to be filled in before it can be sent.
    pub fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    /// The headers, as far as they are known.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The same request to what was filled in.
    pub fn to(self, target: Filled) -> Self {
        Self { url: target.url, headers: target.headers, template: None, ..self }
    }

    /// Where it goes.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The secrets that must not come out in a text.
    pub fn secrets(&self) -> Vec<Secret> {
        endpoint::secrets(&self.url, &self.headers)
    }

    /// Makes the request, and follows redirects. What `redactor` finds stays out of the answer.
    pub async fn perform(
        &self,
        outbound: &Outbound,
        job: Uuid,
        limits: &Arc<Limits>,
        redactor: &Arc<Redactor>,
    ) -> Result<Ending, Failure> {
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
        let body = self.body.as_ref().map(|(body, _)| body.clone());
        // Once: a redirect within the origin keeps the header, but may lose what is in the URL.
        let mut first = Request::new(self.method.clone(), self.url.clone());
        *first.headers_mut() = headers;
        let mut first = authorized(first);
        let headers = std::mem::take(first.headers_mut());
        let mut hop = Hop { method: self.method.clone(), url: first.url().clone(), headers, body };
        let max_redirects = if self.hands_over { 0 } else { limits.max_redirects() };
        let mut followed = 0;
        let response = loop {
            let response = match outbound.send(|| hop.request()).await {
                Ok(response) => response,
                // The host that the job was for was there, wherever it has sent us.
                Err(failure) if followed > 0 => return Ok(Ending { reach: Reach::Reached, ..failure.into() }),
                Err(failure) => return Err(failure),
            };
            if max_redirects == 0 || !hop.follow(&response)? {
                break response;
            }
            followed += 1;
            if followed > max_redirects {
                return Err(Failure::Redirect(format!("there are more than {max_redirects} of them")));
            }
        };
        self.judge(response, limits, redactor).await
    }

    async fn judge(
        &self,
        response: Response,
        limits: &Arc<Limits>,
        redactor: &Arc<Redactor>,
    ) -> Result<Ending, Failure> {
        let status = response.status();
        let retry_after = retry_after(&response);
        let headers = response.headers().clone();
        let held = Held::default();
        let body = body::read(response, limits, &held).await?;
        let is_failure = status.is_client_error() || status.is_server_error();
        let limit = limits.max_response_bytes();
        let redactor = Arc::clone(redactor);
        let answer = async move || {
            let size = if redactor.is_empty() { 0 } else { body.len() };
            let write = move || answer(status.as_u16(), &headers, &body, &redactor, limit);
            redacting(size, write).await?.map_err(|TooLarge| Failure::TooLarge { limit })
        };
        let (verdict, retry) = if is_failure {
            let error = format!("the server answered {}", status_text(status.as_u16()));
            let result = if self.hands_over { None } else { Some(answer().await?) };
            (Verdict::Failed { error, result }, failure::retry(status.as_u16(), retry_after))
        } else if !self.hands_over {
            (Verdict::Completed { result: answer().await? }, Retry::Never)
        } else if status == StatusCode::ACCEPTED {
            (Verdict::HandedOver, Retry::Never)
        } else {
            // Where it has written the job's end, this one finds the lease gone and changes nothing.
            let error = format!("the executor answered {} and left the job unfinished", status_text(status.as_u16()));
            (Verdict::Failed { error, result: None }, Retry::Never)
        };
        Ok(Ending { verdict, retry, reach: Reach::Reached, http_status: is_failure.then_some(status.as_u16()), held })
    }
}

/// A request on its way along redirects.
struct Hop {
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Option<String>,
}

impl Hop {
    fn request(&self) -> Request {
        let mut request = Request::new(self.method.clone(), self.url.clone());
        *request.headers_mut() = self.headers.clone();
        *request.body_mut() = self.body.clone().map(Into::into);
        request
    }

    /// Turns to where a response redirects, if it does. (Fetch standard, "HTTP-redirect fetch".)
    fn follow(&mut self, response: &Response) -> Result<bool, Failure> {
        let status = response.status();
        let Some(next) = redirect(&self.url, response)? else { return Ok(false) };
        let becomes_get = match status {
            StatusCode::SEE_OTHER => self.method != Method::HEAD,
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND => self.method == Method::POST,
            _ => false,
        };
        if becomes_get {
            self.method = Method::GET;
            self.body = None;
            self.headers.remove(CONTENT_TYPE);
        }
        if next.origin() != self.url.origin() {
            let mut before = std::mem::take(&mut self.headers);
            self.headers =
                HARMLESS.into_iter().filter_map(|name| before.remove(&name).map(|value| (name, value))).collect();
        }
        self.url = next;
        Ok(true)
    }
}

/// Where a response redirects to, if it does.
pub fn redirect(from: &Url, response: &Response) -> Result<Option<Url>, Failure> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let Some(location) = response.headers().get(LOCATION) else { return Ok(None) };
    // Its text may hold a secret: it is not quoted.
    let next = location.to_str().ok().and_then(|location| from.join(location).ok());
    let next = next.ok_or_else(|| Failure::Redirect("its location is not a valid URL".into()))?;
    match (from.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => Ok(Some(next)),
        ("https", "http") => Err(Failure::Redirect("it leads from https to http".into())),
        _ => Err(Failure::Redirect("it does not lead to an http or https URL".into())),
    }
}

/// `{"status", "headers", "body"}` as JSON text: a JSON body as the server wrote it, a text as a string, and bytes
/// that are neither as base64 under "body_base64". An empty body has neither key.
fn answer(
    status: u16,
    headers: &HeaderMap,
    body: &[u8],
    redactor: &Redactor,
    limit: usize,
) -> Result<String, TooLarge> {
    let shown = |text: String| Ok(redactor.text(&text, limit)?.unwrap_or(text));
    let mut answer = String::with_capacity(256 + body.len());
    let _ = write!(answer, "{{\"status\":{status},\"headers\":{{");
    for (number, name) in headers.keys().enumerate() {
        let mut values = headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
        let mut text = values.next().unwrap_or_default().into_owned();
        for value in values {
            text.push_str(", ");
            text.push_str(&value);
        }
        text.retain(|character| character != '\0');
        let comma = if number > 0 { "," } else { "" };
        let _ =
            write!(answer, "{comma}{}:{}", Value::from(shown(name.as_str().to_owned())?), Value::from(shown(text)?));
    }
    answer.push('}');
    let is_json = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().ends_with("json")));
    if !body.is_empty() {
        match std::str::from_utf8(body) {
            Ok(text) if is_json && is_storable(text) => {
                answer.push_str(",\"body\":");
                answer.push_str(redactor.json(text, limit)?.as_deref().unwrap_or(text));
            }
            Ok(text) if !text.contains('\0') => {
                // JSON under another name, or such as the database does not take.
                let is_json = !redactor.is_empty()
                    && text.trim_start().starts_with(['{', '[', '"'])
                    && serde_json::from_str::<&RawValue>(text).is_ok();
                let redacted = if is_json { redactor.json(text, limit)? } else { redactor.text(text, limit)? };
                let _ = write!(answer, ",\"body\":{}", Value::from(redacted.as_deref().unwrap_or(text)));
            }
            _ => {
                answer.push_str(",\"body_base64\":\"");
                let redacted = redactor.bytes(body, limit)?;
                let bytes = redacted.as_deref().unwrap_or(body);
                base64::engine::general_purpose::STANDARD.encode_string(bytes, &mut answer);
                answer.push('"');
            }
        }
    }
    answer.push('}');
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answered(kind: &'static str, body: &[u8]) -> Value {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        let text = answer(200, &headers, body, &Redactor::default(), 1000).expect("small");
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
        let number = b"123456789012345678901234567890.10";
        let text = answer(200, &headers, number, &Redactor::default(), 1000).expect("small");
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
