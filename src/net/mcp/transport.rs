//! Streamable HTTP for the MCP library, over the client that plain HTTP uses too: same limits, same policy, and
//! failures in our own words.

use super::tag::{CallTag, Noted};
use super::wire;
use crate::net::body::{self, Held};
use crate::net::failure::{Failure, words};
use crate::net::http::{IDEMPOTENCY_KEY, redirect, retry_after};
use crate::net::outbound::{Outbound, authorized};
use crate::net::runtime::Limits;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Method, Request, Response, StatusCode, Url};
use rmcp::model::{ClientJsonRpcMessage, ClientRequest, ErrorData, GetExtensions, ServerJsonRpcMessage};
use rmcp::transport::streamable_http_client::{
    SseError, StreamableHttpClient, StreamableHttpError, StreamableHttpPostResponse,
};
use sse_stream::{Sse, SseStream};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Bytes of an answer that is not that of a job's call.
const MAX_HANDSHAKE: usize = 1024 * 1024;
/// Bytes of a refusal that are looked at.
const MAX_REFUSAL: usize = 64 * 1024;
const JSON: &str = "application/json";
const EVENT_STREAM: &str = "text/event-stream";
const ACCEPTED_KINDS: &str = "application/json, text/event-stream";

/// The HTTP of one session.
#[derive(Clone)]
pub struct Transport {
    outbound: Arc<Outbound>,
    limits: Arc<Limits>,
    noted: Noted,
    /// The streams that can be taken up again, by their last event.
    resumable: Arc<Mutex<HashMap<String, Noted>>>,
}

type Failed = StreamableHttpError<Failure>;
type Headers = HashMap<HeaderName, HeaderValue>;
type Events = BoxStream<'static, Result<Sse, SseError>>;

impl Transport {
    /// A transport that notes in `noted` what goes wrong outside of calls: in the handshake.
    pub fn new(outbound: Arc<Outbound>, limits: Arc<Limits>, noted: Noted) -> Self {
        Self { outbound, limits, noted, resumable: Arc::default() }
    }

    async fn post(
        &self,
        mut request: Request,
        message: &ClientJsonRpcMessage,
        has_session: bool,
    ) -> Result<StreamableHttpPostResponse, Failed> {
        let tag = call_tag(message);
        let mut text = serde_json::to_string(message)?;
        if let Some(CallTag { job, arguments: Some(arguments), .. }) = &tag {
            text = wire::with_arguments(&text, *job, arguments);
        }
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
        *request.body_mut() = Some(text.into());
        let response = self.send(request).await?;
        let status = response.status();
        if status == StatusCode::NOT_FOUND && has_session {
            // The library opens a new session and sends the call again.
            return Err(StreamableHttpError::SessionExpired);
        }
        let is_request = matches!(message, ClientJsonRpcMessage::Request(_));
        if matches!(status, StatusCode::ACCEPTED | StatusCode::NO_CONTENT) || (status.is_success() && !is_request) {
            return Ok(StreamableHttpPostResponse::Accepted);
        }
        let session = response.headers().get(SESSION_ID).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let kind = content_type(&response);
        let is_call = tag.is_some();
        if status.is_success() && kind.starts_with(EVENT_STREAM) {
            return Ok(StreamableHttpPostResponse::Sse(
                self.events(response, self.place(message), tag.map(|tag| tag.held)),
                session,
            ));
        }
        let held = tag.map(|tag| tag.held).unwrap_or_default();
        let retry_after = retry_after(&response);
        // The library makes far more of an answer's text than it is long, and our own words of a refusal are few.
        let most = match (is_call, status.is_success()) {
            (true, true) => usize::MAX,
            (false, true) => MAX_HANDSHAKE,
            (_, false) => MAX_REFUSAL,
        };
        if status.is_success() {
            body::check_length(&response, &self.limits)?;
        }
        let body = body::read_up_to(response, most, &self.limits, &held).await?;
        if status.is_success() && body.len() == most {
            return Err(Failure::NotMcp(format!("its answer to the handshake is larger than {most} bytes")).into());
        }
        let text = String::from_utf8_lossy(&body);
        if !status.is_success() {
            return refused(message, status, retry_after, &text, has_session, session);
        }
        if !kind.starts_with(JSON) {
            let kind =
                if kind.is_empty() { "no content type".into() } else { format!("content type {}", words(&kind)) };
            return Err(Failure::NotMcp(format!("it answered with {kind}")).into());
        }
        let wrapped = if is_call { wire::wrap(&text) } else { None };
        parse(wrapped.as_deref().unwrap_or(&text)).map(|message| StreamableHttpPostResponse::Json(message, session))
    }

    /// Sends a request, and follows redirects that change neither its method nor its origin: a credential must not go
    /// to another, and a call that becomes a GET is none.
    async fn send(&self, request: Request) -> Result<Response, Failure> {
        let mut request = authorized(request);
        for _ in 0..=self.limits.max_redirects() {
            let url = request.url().clone();
            let response = self.outbound.send(|| copy(&request)).await?;
            let Some(next) = redirect(&url, &response)? else { return Ok(response) };
            let elsewhere = next.origin() != url.origin();
            if elsewhere || !matches!(response.status().as_u16(), 307 | 308) {
                let place = if elsewhere { next.origin().ascii_serialization() } else { "another path".into() };
                return Err(Failure::Redirect(format!("it leads to {place}; is that the server's URL?")));
            }
            *request.url_mut() = next;
        }
        Err(Failure::Redirect(format!("there are more than {} of them", self.limits.max_redirects())))
    }

    /// The events of a response, up to the size that a whole answer may have. A stream that ends without an answer
    /// and can't be taken up again is a failure.
    fn events(&self, response: Response, noted: Noted, held: Option<Held>) -> Events {
        let has_result = held.is_some();
        let note = noted.clone();
        let capped = body::chunks(response, &self.limits, &held.unwrap_or_default());
        let capped = capped.map(move |chunk| chunk.inspect_err(|failure| note.set(failure.clone())));
        // Reached only when the server has ended the stream, not when somebody lets go of it.
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let capped = capped.chain(futures::stream::poll_fn(move |_| {
            over.store(true, Relaxed);
            Poll::Ready(None)
        }));
        let mut place =
            Place { resumable: Arc::clone(&self.resumable), last_event: None, answered: false, is_over, noted };
        SseStream::from_bytes_stream(capped)
            .map_ok(move |mut event| {
                place.pass(&event);
                if has_result && let Some(wrapped) = event.data.as_deref().and_then(wire::wrap) {
                    event.data = Some(wrapped);
                }
                event
            })
            .boxed()
    }

    /// Where failures of a message are noted: with its call, or with the session for those of the handshake.
    fn place(&self, message: &ClientJsonRpcMessage) -> Noted {
        call_tag(message).map_or_else(|| self.noted.clone(), |tag| tag.noted)
    }
}

/// Where a stream of events stands; dropped with the stream.
struct Place {
    resumable: Arc<Mutex<HashMap<String, Noted>>>,
    last_event: Option<String>,
    answered: bool,
    is_over: Arc<AtomicBool>,
    noted: Noted,
}

impl Place {
    fn pass(&mut self, event: &Sse) {
        self.answered |= event.data.as_deref().is_some_and(is_answer);
        if let Some(id) = event.id.as_ref().filter(|id| !id.is_empty()) {
            let mut resumable = self.resumable.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(before) = self.last_event.replace(id.clone()) {
                resumable.remove(&before);
            }
            resumable.insert(id.clone(), self.noted.clone());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        match &self.last_event {
            Some(id) if self.answered => {
                self.resumable.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
            }
            None if !self.answered && self.is_over.load(Relaxed) => {
                self.noted.set_first(Failure::Broken("the server ended the stream without an answer".into()));
            }
            _ => {}
        }
    }
}

/// Whether a message is a response: it has an id and no method.
fn is_answer(message: &str) -> bool {
    let members: Option<HashMap<String, &serde_json::value::RawValue>> = serde_json::from_str(message).ok();
    members.is_some_and(|members| {
        !members.contains_key("method") && (members.contains_key("result") || members.contains_key("error"))
    })
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        StreamableHttpError::Client(failure)
    }
}

/// What an answer with an error status means: a JSON-RPC error where there is one in it, else the status.
fn refused(
    message: &ClientJsonRpcMessage,
    status: StatusCode,
    retry_after: Option<Duration>,
    text: &str,
    has_session: bool,
    session: Option<String>,
) -> Result<StreamableHttpPostResponse, Failed> {
    let is_auth = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    let rpc_error = match serde_json::from_str(text) {
        Ok(ServerJsonRpcMessage::Error(error)) if !is_auth => Some(error),
        _ => None,
    };
    if let ClientJsonRpcMessage::Request(request) = message
        && matches!(request.request, ClientRequest::DiscoverRequest(_))
        && status.is_client_error()
        && !is_auth
        && !has_session
    {
        // A server of the older protocol does not know the question; told so in its own terms, the library goes on to
        // the older handshake. The id is the question's, because such answers often come without it.
        let error = rpc_error.map_or_else(
            || ErrorData::invalid_request(format!("server/discover was answered with {status}"), None),
            |error| error.error,
        );
        let message = ServerJsonRpcMessage::error(error, Some(request.id.clone()));
        return Ok(StreamableHttpPostResponse::Json(message, None));
    }
    match rpc_error {
        Some(error) => Ok(StreamableHttpPostResponse::Json(ServerJsonRpcMessage::Error(error), session)),
        None => Err(Failure::Status { status: status.as_u16(), body: words(&plain_words(text)), retry_after }.into()),
    }
}

/// What a refusal says: the message of a JSON body, a plain text; of a page of HTML, nothing.
fn plain_words(text: &str) -> String {
    if text.trim_start().starts_with('<') {
        return String::new();
    }
    let json: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let message = json.as_ref().and_then(|json| {
        [json.pointer("/error/message"), json.get("message"), json.get("error_description"), json.get("error")]
            .into_iter()
            .flatten()
            .find_map(|value| value.as_str())
    });
    message.unwrap_or(text).to_owned()
}

fn parse(text: &str) -> Result<ServerJsonRpcMessage, Failed> {
    serde_json::from_str(text).map_err(|problem| {
        let what = if problem.is_data() {
            "it answered with JSON that is not JSON-RPC"
        } else {
            "it answered with text that is not JSON"
        };
        Failure::NotMcp(what.into()).into()
    })
}

fn content_type(response: &Response) -> String {
    let value = response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    String::from_utf8_lossy(value).to_ascii_lowercase()
}

fn call_tag(message: &ClientJsonRpcMessage) -> Option<CallTag> {
    match message {
        ClientJsonRpcMessage::Request(request) => request.request.extensions().get::<CallTag>().cloned(),
        _ => None,
    }
}

/// The same request. Its body is a text, or there is none.
fn copy(request: &Request) -> Request {
    request.try_clone().unwrap_or_else(|| Request::new(request.method().clone(), request.url().clone()))
}

fn request(method: Method, uri: &str, session: Option<&str>, headers: Headers) -> Result<Request, Failed> {
    let bad = |what: &str| Failed::from(Failure::BadRequest(format!("the request cannot be built: {what}")));
    let url = Url::parse(uri).map_err(|_| bad("the URL"))?;
    let mut request = Request::new(method, url);
    request.headers_mut().extend(headers);
    if let Some(session) = session {
        let session = HeaderValue::from_str(session).map_err(|_| bad("the session's id"))?;
        request.headers_mut().insert(SESSION_ID, session);
    }
    Ok(request)
}

impl StreamableHttpClient for Transport {
    type Error = Failure;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        session_id: Option<Arc<str>>,
        _auth_header: Option<String>,
        custom_headers: Headers,
    ) -> Result<StreamableHttpPostResponse, Failed> {
        let mut request = request(Method::POST, &uri, session_id.as_deref(), custom_headers)?;
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(ACCEPTED_KINDS));
        let key = call_tag(&message).filter(|tag| !tag.is_one_of_many);
        if let Some(key) = key.and_then(|tag| HeaderValue::from_str(&tag.job.to_string()).ok()) {
            request.headers_mut().insert(IDEMPOTENCY_KEY, key);
        }
        let result = self.post(request, &message, session_id.is_some()).await;
        if let Err(StreamableHttpError::Client(failure)) = &result {
            self.place(&message).set(failure.clone());
        }
        result
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session_id: Arc<str>,
        _auth_header: Option<String>,
        custom_headers: Headers,
    ) -> Result<(), Failed> {
        let request = request(Method::DELETE, &uri, Some(&session_id), custom_headers)?;
        self.outbound.send(|| copy(&request)).await?;
        Ok(())
    }

    async fn get_stream(
        &self,
        uri: Arc<str>,
        session_id: Option<Arc<str>>,
        last_event_id: Option<String>,
        _auth_header: Option<String>,
        custom_headers: Headers,
    ) -> Result<Events, Failed> {
        // Without an event to go on from this is the stream of unasked messages: no job needs them, and each such
        // stream would hold a connection for as long as the session lives.
        let Some(last_event_id) = last_event_id else {
            return Err(StreamableHttpError::ServerDoesNotSupportSse);
        };
        let noted = self.resumable.lock().unwrap_or_else(PoisonError::into_inner).remove(&last_event_id);
        let noted = noted.unwrap_or_default();
        let mut request = request(Method::GET, &uri, session_id.as_deref(), custom_headers)?;
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(EVENT_STREAM));
        if let Ok(last_event_id) = HeaderValue::from_str(&last_event_id) {
            request.headers_mut().insert(LAST_EVENT_ID, last_event_id);
        }
        let response = self.outbound.send(|| copy(&request)).await;
        let failure = match response {
            Ok(response) if response.status().is_success() && content_type(&response).starts_with(EVENT_STREAM) => {
                return Ok(self.events(response, noted, Some(Held::default())));
            }
            Ok(response) => {
                let status = response.status();
                Failure::Broken(format!("the server ended the stream and does not take it up again ({status})"))
            }
            Err(failure) => failure,
        };
        noted.set(failure.clone());
        Err(failure.into())
    }
}
