//! Carrying arguments and results through the MCP library untouched.
//!
//! The library reads results into its own types, which drops what it does not know. A job's result shall be the
//! object as the server sent it, so the text of the result travels as a string inside an object of no known type.

use crate::net::failure::Failure;
use rmcp::model::JsonObject;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use uuid::Uuid;

const WRAPPED: &str = "nexus_hub.result";

/// A JSON-RPC message with its result wrapped, if it is one that holds a result.
pub fn wrap(message: &str) -> Option<String> {
    let members: BTreeMap<String, &RawValue> = serde_json::from_str(message).ok()?;
    if members.contains_key("error") {
        return None;
    }
    let result = members.get("result")?;
    let id = members.get("id")?;
    let wrapped = json!({ WRAPPED: result.get() });
    Some(format!(r#"{{"jsonrpc":"2.0","id":{},"result":{wrapped}}}"#, id.get()))
}

/// The text that [`wrap`] put away, fit to be stored: jsonb has no zero character.
pub fn unwrap(wrapped: Value) -> Result<String, Failure> {
    match wrapped.get(WRAPPED) {
        Some(Value::String(text)) => Ok(without_zero_characters(text)),
        _ => Err(Failure::NotMcp("the answer does not fit the call".into())),
    }
}

const ARGUMENTS: &str = "nexus_hub.arguments";

/// What stands for a call's arguments in the library's request.
pub fn stand_in(job: Uuid) -> JsonObject {
    JsonObject::from_iter([(ARGUMENTS.to_owned(), Value::String(job.to_string()))])
}

/// The text of a request with the arguments in the place of their stand-in: numbers reach the server as they stand in
/// the job, which serde_json's would not.
pub fn with_arguments(request: &str, job: Uuid, arguments: &str) -> String {
    let stand_in = Value::Object(stand_in(job)).to_string();
    request.replacen(&stand_in, arguments, 1)
}

/// Replaces each escape of the zero character by that of the replacement character. An escaped backslash before a
/// plain "u0000" is no such escape.
fn without_zero_characters(text: &str) -> String {
    if !text.contains("\\u0000") {
        return text.to_owned();
    }
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        clean.push_str(before);
        if let Some(after) = escape.strip_prefix("\\u0000") {
            clean.push_str("\\ufffd");
            rest = after;
        } else {
            let end = escape.char_indices().nth(2).map_or(escape.len(), |(index, _)| index);
            clean.push_str(&escape[..end]);
            rest = &escape[end..];
        }
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(result: &str) -> String {
        let message = wrap(&format!(r#"{{"id": 7, "result": {result}, "jsonrpc": "2.0"}}"#)).unwrap_or_default();
        let message: Value = serde_json::from_str(&message).unwrap_or_else(|problem| panic!("{problem}: {message}"));
        assert_eq!(message["id"], json!(7));
        unwrap(message["result"].clone()).unwrap_or_else(|failure| panic!("{failure}"))
    }

    #[test]
    fn results_come_through_to_the_letter() {
        let result = r#"{"b": 1.10, "a": 123456789012345678901234567890, "_x": "\u00e4 \\ \" ü"}"#;
        assert_eq!(round_trip(result), result);
    }

    #[test]
    fn zero_characters_are_replaced_and_only_they() {
        assert_eq!(round_trip(r#"{"a":"x\u0000y"}"#), r#"{"a":"x\ufffdy"}"#);
        assert_eq!(round_trip(r#"{"a":"x\\u0000y\u0000"}"#), r#"{"a":"x\\u0000y\ufffd"}"#);
    }

    #[test]
    fn arguments_are_sent_to_the_letter() {
        let job = Uuid::nil();
        let request = json!({"params": {"name": "t", "arguments": stand_in(job)}}).to_string();
        let sent = with_arguments(&request, job, r#"{"n": 12345678901234567890123, "x": 1.10}"#);
        assert!(sent.contains(r#""arguments":{"n": 12345678901234567890123, "x": 1.10}"#), "{sent}");
    }

    #[test]
    fn errors_notifications_and_other_texts_are_left_alone() {
        for message in
            [r#"{"id":1,"error":{"code":1,"message":""}}"#, r#"{"method":"notifications/x"}"#, "[]", "<html>"]
        {
            assert_eq!(wrap(message), None);
        }
    }
}
