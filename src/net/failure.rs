//! What can go wrong on the way to a server and back, in words that a person understands.

use super::endpoint;
use super::outbound::Denied;
use super::outcome::Retry;
use crate::domain::schedule::Reach;
use reqwest::StatusCode;
use std::time::Duration;

/// Characters that an error may have.
const MAX_QUOTE: usize = 700;
/// Characters of a server's own words that are kept until secrets have been taken out of them.
const MAX_WORDS: usize = 20_000;

/// Why there is no good answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The job or the server's config can't be used as it is.
    BadRequest(String),
    /// The egress policy does not allow the connection.
    Denied { host: String, what: &'static str },
    /// The server sends us elsewhere, and we don't go.
    Redirect(String),
    /// The host's name was not looked up in time, which may be others' fault.
    SlowNames { host: String },
    /// The host has no address.
    Resolve { host: String },
    /// No connection came about; whether for reasons of the network, and not of what is spoken over it.
    Connect { authority: String, reason: String, is_network: bool },
    /// The host's certificate is not one to trust.
    Untrusted { authority: String, reason: String },
    /// The connection broke before the answer was whole.
    Broken(String),
    /// The time was over.
    Timeout(Duration),
    /// The server refused, with a snippet of what it said.
    Status { status: u16, body: String, retry_after: Option<Duration> },
    /// The answer was larger than allowed.
    TooLarge { limit: usize },
    /// The answer was no MCP.
    NotMcp(String),
    /// The server answered the call with a JSON-RPC error.
    Rpc { code: i32, message: String },
    /// The worker itself failed.
    Internal(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::BadRequest(problem) => f.write_str(problem),
            Failure::Denied { host, what } => {
                write!(f, "the egress policy does not allow \"{host}\", which is {what} (nexus_hub.egress_allow)")
            }
            Failure::Redirect(problem) => write!(f, "the redirect was not followed: {problem}"),
            Failure::SlowNames { host } => write!(f, "the name \"{host}\" was not resolved in time"),
            Failure::Resolve { host } => write!(f, "could not find the host \"{host}\""),
            Failure::Connect { authority, reason, .. } => write!(f, "could not connect to {authority}: {reason}"),
            Failure::Untrusted { authority, reason } => {
                write!(f, "the certificate of {authority} is not trusted: {reason}")?;
                f.write_str(" (authorities besides the system's: nexus_hub.ca_file)")
            }
            Failure::Broken(reason) => write!(f, "the connection broke before the answer was complete: {reason}"),
            Failure::Timeout(time) => write!(f, "timed out: no answer within {} ms", time.as_millis()),
            Failure::Status { status, body, .. } => {
                write!(f, "the server answered {}", status_text(*status))?;
                match status {
                    401 => f.write_str(": it does not accept the credentials in the server's config")?,
                    403 => f.write_str(": the credentials in the server's config do not allow this")?,
                    404 => f.write_str(": nothing is served at that URL")?,
                    _ => {}
                }
                if body.is_empty() { Ok(()) } else { write!(f, " ({body})") }
            }
            Failure::TooLarge { limit } => {
                write!(f, "the answer is larger than {limit} bytes (nexus_hub.max_response_bytes)")
            }
            Failure::NotMcp(what) => write!(f, "the server does not speak MCP at that URL: {what}"),
            Failure::Rpc { code, message } => write!(f, "the server refused the call: {message} (MCP error {code})"),
            Failure::Internal(what) => write!(f, "internal error: {what}"),
        }
    }
}

impl std::error::Error for Failure {}

/// Whether a request that was answered with this status may succeed later.
pub fn retry(status: u16, retry_after: Option<Duration>) -> Retry {
    match (status, retry_after) {
        (408 | 425 | 429 | 500..=599, Some(time)) => Retry::After(time),
        (408 | 425 | 429 | 500..=599, None) => Retry::Later,
        _ => Retry::Never,
    }
}

impl Failure {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Failure::Resolve { .. }
            | Failure::SlowNames { .. }
            | Failure::Connect { .. }
            | Failure::Untrusted { .. }
            | Failure::Broken(_)
            | Failure::Timeout(_) => Retry::Later,
            Failure::Status { status, retry_after, .. } => retry(*status, *retry_after),
            _ => Retry::Never,
        }
    }

    /// Whether the host was there.
    pub fn reach(&self) -> Reach {
        match self {
            Failure::Resolve { .. } | Failure::Connect { is_network: true, .. } => Reach::Unreachable(self.to_string()),
            Failure::BadRequest(_)
            | Failure::Denied { .. }
            | Failure::Redirect(_)
            | Failure::SlowNames { .. }
            | Failure::Internal(_) => Reach::Unknown,
            Failure::Timeout(_) => Reach::Silent(self.to_string()),
            _ => Reach::Reached,
        }
    }

    /// The status that the server refused with.
    pub fn http_status(&self) -> Option<u16> {
        match self {
            Failure::Status { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// "404 Not Found", or the number alone where it has no name.
pub fn status_text(status: u16) -> String {
    match StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()) {
        Some(reason) => format!("{status} {reason}"),
        None => status.to_string(),
    }
}

/// A server's own words, on one line.
pub fn words(text: &str) -> String {
    one_line(text, MAX_WORDS)
}

/// An error's text as it is stored: on one line and of bounded length.
pub fn quote(text: &str) -> String {
    one_line(text, MAX_QUOTE)
}

fn one_line(text: &str, length: usize) -> String {
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.retain(|c| !c.is_control());
    if line.chars().count() <= length {
        return line;
    }
    line.chars().take(length).chain(['…']).collect()
}

impl From<reqwest::Error> for Failure {
    // The error's own text holds the URL, which may hold a secret: only its causes are used.
    fn from(error: reqwest::Error) -> Self {
        let authority = error.url().map_or_else(|| "the server".into(), endpoint::host_and_port);
        let host = error.url().and_then(|url| url.host_str()).unwrap_or("the server").to_owned();
        // The resolver's refusal comes wrapped in what looks like a name that was not found.
        if let Some(denied) = causes(&error).find_map(|cause| cause.downcast_ref::<Denied>()) {
            return Failure::Denied { host, what: denied.what };
        }
        if let Some(problem) = causes(&error).find_map(|cause| cause.downcast_ref::<rustls::Error>())
            && let rustls::Error::InvalidCertificate(problem) = problem
        {
            return Failure::Untrusted { authority, reason: words(&problem.to_string()) };
        }
        let mut reason = String::new();
        for cause in causes(&error) {
            reason = cause.to_string();
            if reason.contains("dns error") || reason.contains("failed to lookup address") {
                return Failure::Resolve { host };
            }
            if let Some(io) = cause.downcast_ref::<std::io::Error>()
                && let Some(plain) = plain_io_reason(io.kind())
            {
                reason = plain.into();
                break;
            }
        }
        if reason.contains("InvalidContentType") {
            reason = "no TLS is spoken there; is it http:// instead of https://?".into();
        }
        if error.is_connect() && error.is_timeout() {
            reason = "no answer to the connection attempt".into();
        }
        // What failed after the connection, in the handshake of TLS, is not the network's fault.
        let is_network =
            causes(&error).any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(is_network_error));
        if error.is_connect() {
            Failure::Connect { authority, reason: words(&reason), is_network: is_network || error.is_timeout() }
        } else if error.is_builder() {
            Failure::BadRequest(format!("the request cannot be built: {}", words(&reason)))
        } else {
            Failure::Broken(words(if reason.is_empty() { "no reason given" } else { &reason }))
        }
    }
}

/// What an error was caused by, the outermost first; an I/O error hides the cause it carries.
pub fn causes<'a>(error: &'a reqwest::Error) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let inner = |cause: &&'a (dyn std::error::Error + 'static)| match cause.downcast_ref::<std::io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
        None => cause.source(),
    };
    std::iter::successors(std::error::Error::source(error), inner)
}

fn is_network_error(error: &std::io::Error) -> bool {
    error.raw_os_error().is_some()
}

fn plain_io_reason(kind: std::io::ErrorKind) -> Option<&'static str> {
    use std::io::ErrorKind as Kind;
    match kind {
        Kind::ConnectionRefused => Some("connection refused"),
        Kind::ConnectionReset => Some("connection reset by the server"),
        Kind::ConnectionAborted => Some("connection aborted"),
        Kind::HostUnreachable => Some("host unreachable"),
        Kind::NetworkUnreachable => Some("network unreachable"),
        Kind::TimedOut => Some("connection timed out"),
        Kind::UnexpectedEof => Some("connection closed by the server"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_read_like_sentences() {
        let status = |status| Failure::Status { status, body: String::new(), retry_after: None }.to_string();
        assert_eq!(status(500), "the server answered 500 Internal Server Error");
        assert_eq!(status(599), "the server answered 599");
        assert!(status(401).contains("does not accept the credentials"));
        assert_eq!(Failure::Timeout(Duration::from_millis(1500)).to_string(), "timed out: no answer within 1500 ms");
    }

    #[test]
    fn quotes_are_one_bounded_line() {
        assert_eq!(quote("  a\n\tb \u{7}c "), "a b c");
        assert_eq!(quote(&"ä".repeat(900)).chars().count(), 701);
    }
}
