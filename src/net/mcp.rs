//! MCP calls: which session they go over, and what their answers mean.

mod session;
mod tag;
mod transport;
mod wire;

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
}

impl McpCall {
    /// The request, with a stand-in for the arguments, which the transport replaces by their text.
    fn into_request(self, job: Uuid) -> (ClientRequest, CallTag) {
        let stand_in = wire::stand_in(job);
        match self {
            McpCall::Tool { name, arguments } => {
                let tag = CallTag::new(job, Some(arguments));
                let mut request = CallToolRequest::new(CallToolRequestParams::new(name).with_arguments(stand_in));
                request.extensions.insert(tag.clone());
                (ClientRequest::CallToolRequest(request), tag)
            }
            McpCall::Resource { uri } => {
                let tag = CallTag::new(job, None);
                let mut request = ReadResourceRequest::new(ReadResourceRequestParams::new(uri));
                request.extensions.insert(tag.clone());
                (ClientRequest::ReadResourceRequest(request), tag)
            }
            McpCall::Prompt { name, arguments } => {
                let tag = CallTag::new(job, Some(arguments));
                let mut request = GetPromptRequest::new(GetPromptRequestParams::new(name).with_arguments(stand_in));
                request.extensions.insert(tag.clone());
                (ClientRequest::GetPromptRequest(request), tag)
            }
        }
    }
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
    let remaining = deadline.saturating_duration_since(tokio::time::Instant::now());
    // With its own time-out the library also tells the server that the call is off.
    let options = PeerRequestOptions::with_timeout(remaining);
    let (request, tag) = call.into_request(job);
    let explained = |error| tag.take().unwrap_or_else(|| describe(error, time));
    let handle = session.peer().send_cancellable_request(request, options).await.map_err(explained)?;
    let (id, peer) = (handle.id.clone(), handle.peer.clone());
    let verdict = tokio::select! {
        // What the transport noted is more telling than what the library makes of it.
        biased;
        failure = tag.failed() => Err(failure),
        answer = handle.await_response() => match answer {
            Ok(ServerResult::CustomResult(CustomResult(wrapped))) => wire::unwrap(wrapped).and_then(judge),
            Ok(_) => Err(Failure::NotMcp("the answer does not fit the call".into())),
            Err(error) => Err(explained(error)),
        },
        Ok(()) = cancelled => {
            let off = CancelledNotificationParam::new(Some(id), Some("the job was cancelled".into()));
            // If the server cannot be told, it finds nobody listening.
            let _ = tokio::time::timeout(GOODBYE, peer.notify_cancelled(off)).await;
            return Ok(None);
        }
    };
    let mut ending = Ending::answered(verdict?);
    ending.held = tag.held.clone();
    Ok(Some(ending))
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
