//! MCP calls: which session they go over, and what their answers mean.

mod catalogue;
mod session;
mod tag;
mod transport;
mod wire;

use session::Session;
pub use session::Sessions;

use super::endpoint::Endpoint;
use super::failure::{Failure, words};
use super::outcome::{Ending, Verdict};
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, CancelledNotificationParam, ClientRequest, CustomResult, GetPromptRequest,
    GetPromptRequestParams, ReadResourceRequest, ReadResourceRequestParams, ServerResult,
};
use rmcp::service::{PeerRequestOptions, ServiceError};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::time::Duration;
use tag::CallTag;
use tokio::sync::oneshot;
use uuid::Uuid;

/// What is asked of an MCP server.
#[derive(Clone, Debug)]
pub enum McpCall {
    /// The arguments are the text of a JSON object.
    Tool {
        name: String,
        arguments: String,
    },
    Resource {
        uri: String,
    },
    /// The arguments are the text of a JSON object.
    Prompt {
        name: String,
        arguments: String,
    },
    /// All that the server offers.
    Catalogue,
}

/// One request of a job, and what travels with it.
type Asked = (ClientRequest, CallTag);

/// A tool call, with a stand-in for the arguments, which the transport replaces by their text.
fn call_tool(job: Uuid, name: String, arguments: String) -> Asked {
    let tag = CallTag::new(job, Some(arguments));
    let params = CallToolRequestParams::new(name).with_arguments(wire::stand_in(job));
    let mut request = CallToolRequest::new(params);
    request.extensions.insert(tag.clone());
    (ClientRequest::CallToolRequest(request), tag)
}

fn read_resource(job: Uuid, uri: String) -> Asked {
    let tag = CallTag::new(job, None);
    let mut request = ReadResourceRequest::new(ReadResourceRequestParams::new(uri));
    request.extensions.insert(tag.clone());
    (ClientRequest::ReadResourceRequest(request), tag)
}

/// As [`call_tool`].
fn get_prompt(job: Uuid, name: String, arguments: String) -> Asked {
    let tag = CallTag::new(job, Some(arguments));
    let params = GetPromptRequestParams::new(name).with_arguments(wire::stand_in(job));
    let mut request = GetPromptRequest::new(params);
    request.extensions.insert(tag.clone());
    (ClientRequest::GetPromptRequest(request), tag)
}

/// Makes one call over the session with the server, which is opened if need be. `None`: it was broken off.
pub async fn perform(
    sessions: &Sessions,
    endpoint: &Endpoint,
    call: McpCall,
    job: Uuid,
    time: Duration,
    mut cancelled: oneshot::Receiver<()>,
) -> Result<Option<Ending>, Failure> {
    let deadline = tokio::time::Instant::now() + time;
    // Held for the call: a session in use is not idle, however long the call takes.
    let session = tokio::select! {
        session = sessions.get(endpoint) => session?,
        Ok(()) = &mut cancelled => return Ok(None),
    };
    let mut line = Line { session: &session, deadline, time, cancelled };
    let (request, tag) = match call {
        McpCall::Tool { name, arguments } => call_tool(job, name, arguments),
        McpCall::Resource { uri } => read_resource(job, uri),
        McpCall::Prompt { name, arguments } => get_prompt(job, name, arguments),
        McpCall::Catalogue => return catalogue::fetch(&mut line, job, sessions.max_response_bytes()).await,
    };
    let held = tag.held.clone();
    let Some(result) = line.ask(request, tag).await? else { return Ok(None) };
    let mut ending = Ending::answered(judge(result)?);
    ending.held = held;
    Ok(Some(ending))
}

/// The line to a server, for as long as a job may take.
struct Line<'a> {
    session: &'a Session,
    deadline: tokio::time::Instant,
    /// What the job was given in all, to be told.
    time: Duration,
    cancelled: oneshot::Receiver<()>,
}

impl Line<'_> {
    /// Asks, and returns the text of the result. `None`: it was broken off.
    async fn ask(&mut self, request: ClientRequest, tag: CallTag) -> Result<Option<String>, Failure> {
        let remaining = self.deadline.saturating_duration_since(tokio::time::Instant::now());
        // With its own time-out the library also tells the server that the call is off.
        let options = PeerRequestOptions::with_timeout(remaining);
        let time = self.time;
        let explained = |error| tag.take().unwrap_or_else(|| describe(error, time));
        let handle = self.session.peer().send_cancellable_request(request, options).await.map_err(explained)?;
        let (id, peer) = (handle.id.clone(), handle.peer.clone());
        tokio::select! {
            // What the transport noted is more telling than what the library makes of it.
            biased;
            failure = tag.failed() => Err(failure),
            answer = handle.await_response() => match answer {
                Ok(ServerResult::CustomResult(CustomResult(wrapped))) => wire::unwrap(wrapped).map(Some),
                Ok(_) => Err(Failure::NotMcp("the answer does not fit the call".into())),
                Err(error) => Err(explained(error)),
            },
            Ok(()) = &mut self.cancelled => {
                let off = CancelledNotificationParam::new(Some(id), Some("the job was cancelled".into()));
                // If the server cannot be told, it finds nobody listening.
                let _ = tokio::time::timeout(GOODBYE, peer.notify_cancelled(off)).await;
                Ok(None)
            }
        }
    }
}

/// How long a server may take to hear that a call is off.
const GOODBYE: Duration = Duration::from_millis(500);

fn describe(error: ServiceError, time: Duration) -> Failure {
    match error {
        // Not the server's words but the library's, for calls that were open when it had to begin a new session.
        ServiceError::McpError(error) if error.message.contains("re-initialized before the response") => {
            Failure::Broken("the server forgot the session while the call was running".into())
        }
        ServiceError::McpError(error) => Failure::Rpc { code: error.code.0, message: words(&error.message) },
        ServiceError::Timeout { .. } => Failure::Timeout(time),
        ServiceError::TransportClosed => Failure::Broken("the MCP session was closed".into()),
        other => Failure::Broken(words(&other.to_string())),
    }
}

/// The parts of a result that decide whether the job succeeded.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Gist<'a> {
    #[serde(default)]
    is_error: Option<bool>,
    #[serde(default)]
    result_type: Option<String>,
    /// Looked into only where it is an error's text.
    #[serde(default, borrow)]
    content: Option<&'a RawValue>,
}

fn judge(result: String) -> Result<Verdict, Failure> {
    // serde would read the members from an array, too.
    let gist: Option<Gist<'_>> =
        if result.trim_start().starts_with('{') { serde_json::from_str(&result).ok() } else { None };
    let gist = gist.ok_or_else(|| Failure::NotMcp("the result is not an object of the expected form".into()))?;
    let failed = |error: String, result| Ok(Verdict::Failed { error, result: Some(result) });
    match gist.result_type.as_deref() {
        None | Some("complete") => {}
        Some("input_required") => {
            return failed(
                "the server asks for input from a person, which a background job cannot give".into(),
                result,
            );
        }
        Some(other) => {
            return failed(format!("the server answered with \"{}\", which is not supported", words(other)), result);
        }
    }
    if gist.is_error == Some(true) {
        let error = error_text(gist.content.map_or("", RawValue::get));
        return failed(error, result);
    }
    Ok(Verdict::Completed { result })
}

/// A content above this size is not searched for the text of an error.
const MAX_ERROR_CONTENT: usize = 1024 * 1024;

/// The texts of a tool's error, joined.
fn error_text(content: &str) -> String {
    let short = Some(content).filter(|content| content.len() <= MAX_ERROR_CONTENT);
    let content: Value = short.and_then(|content| serde_json::from_str(content).ok()).unwrap_or_default();
    let texts: Vec<&str> = content
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|block| block.get("text").and_then(Value::as_str))
        .collect();
    match words(&texts.join(" ")) {
        text if text.is_empty() => "the tool reported an error without a text".into(),
        text => format!("the tool reported an error: {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_kept_and_judged() {
        let text = r#"{"content":[{"type":"text","text":"5"}],"x":1.10}"#.to_owned();
        assert_eq!(judge(text.clone()), Ok(Verdict::Completed { result: text }));
        let text = r#"{"content":[{"type":"text","text":"no\nway"}],"isError":true}"#.to_owned();
        assert_eq!(
            judge(text.clone()),
            Ok(Verdict::Failed { error: "the tool reported an error: no way".into(), result: Some(text) })
        );
    }

    #[test]
    fn an_error_without_a_text_and_a_request_for_input_are_failures() {
        for (text, word) in [
            (r#"{"isError":true,"content":[]}"#, "without a text"),
            (r#"{"resultType":"input_required"}"#, "input from a person"),
            (r#"{"resultType":"task","task":{}}"#, "not supported"),
        ] {
            match judge(text.to_owned()) {
                Ok(Verdict::Failed { error, result: Some(_) }) => assert!(error.contains(word), "{error}"),
                other => panic!("{other:?}"),
            }
        }
        assert!(judge("[]".into()).is_err());
    }
}
