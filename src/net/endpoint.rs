//! Where a request goes and what credentials go with it: URLs, headers and the config of a server.

use super::template::Template;
use crate::domain::percent;
use crate::domain::secret::Secret;
use base64::Engine;
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::time::Duration;
use zeroize::Zeroizing;

/// Longest time-out a config or a job may ask for.
const MAX_TIMEOUT_MS: u64 = 3_600_000;
/// Characters that a host name may have (RFC 1035, 2.3.4).
const MAX_HOST_LENGTH: usize = 253;
/// Most requests in flight that a config may allow.
const MAX_IN_FLIGHT: u64 = 100_000;

/// Headers that belong to the protocol: a config that sets them would break the session or the message framing.
const RESERVED: [&str; 6] = ["accept", "content-type", "host", "idempotency-key", "last-event-id", "mcp-"];

/// Headers that frame a message on its connection: nobody may set them.
const FRAMING: [&str; 3] = ["connection", "content-length", "transfer-encoding"];

/// Headers by name.
pub type Headers = Vec<(HeaderName, Secret)>;

/// An MCP server: the plaintext of a config, checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub url: Url,
    pub headers: Headers,
    /// What is to be filled in before it can be called.
    pub template: Option<Template>,
    pub timeout: Option<Duration>,
    /// Requests that may be in flight to the server.
    pub max_in_flight: Option<usize>,
}

impl Endpoint {
    /// Reads `{"url": …, "headers": {…}, "timeout_ms": …, "max_in_flight": …}`; other keys are left to others. The problem, if there is
    /// one, names keys but never quotes a value: any may hold a secret.
    pub fn parse(config: &str) -> Result<Self, String> {
        let config = &members(config, &["url", "headers", "timeout_ms", "max_in_flight"])?.0;
        let headers = headers(config)?;
        let reserved = |name: &str| {
            RESERVED.iter().any(|entry| name == *entry || (entry.ends_with('-') && name.starts_with(entry)))
        };
        if let Some((name, _)) = headers.iter().find(|(name, _)| reserved(name.as_str())) {
            return Err(format!("the header \"{name}\" is set by the protocol and cannot be given"));
        }
        let (url, template) = (url(config)?, Template::of(config)?);
        Ok(Self { url, headers, template, timeout: timeout(config)?, max_in_flight: max_in_flight(config)? })
    }

    /// The secrets that must not come out in a text.
    pub fn secrets(&self) -> Vec<Secret> {
        secrets(&self.url, &self.headers)
    }
}

/// The host and port of a URL, which also name it among hosts; the scheme goes before them where it is not the usual one
/// of the port, because what fails over one need not fail over the other.
pub fn authority(url: &Url) -> String {
    let authority = host_and_port(url);
    let is_usual = (url.scheme() == "https") == (url.port_or_known_default() == Some(443));
    if is_usual { authority } else { format!("{}://{authority}", url.scheme()) }
}

/// The host and port of a URL, for people.
pub fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port_or_known_default().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The same of a URL's text, empty where that is no URL. Worked out for every job that is written, so the usual ones
/// are not parsed.
pub fn authority_of(text: &str) -> String {
    plain_authority(text).unwrap_or_else(|| parse_url(text).map(|url| authority(&url)).unwrap_or_default())
}

/// The authority of a URL that is written as plainly as can be: `http://host:8080/…`.
fn plain_authority(text: &str) -> Option<String> {
    let (rest, default_port) = match text.strip_prefix("https://") {
        Some(rest) => (rest, "443"),
        None => (text.strip_prefix("http://")?, "80"),
    };
    let (authority, path) = rest.split_at(rest.find('/')?);
    let (host, port) = authority.split_once(':').unwrap_or((authority, default_port));
    let is_plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-');
    let last = host.rsplit('.').next()?;
    // What ends in a number is an address, in one notation of many; "xn--" is for the parser to check.
    let is_name =
        host.bytes().all(is_plain) && last.starts_with(|c: char| c.is_ascii_lowercase()) && !host.contains("--");
    let is_host = !host.starts_with('.') && (is_name || host.parse::<std::net::Ipv4Addr>().is_ok());
    let is_port =
        !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    // Tabs and line ends would be taken out.
    let is_path = path.bytes().all(|byte| byte.is_ascii_graphic());
    let is_usual = (port == "443") == (default_port == "443");
    (is_host && is_port && is_path && is_usual && host.len() <= MAX_HOST_LENGTH).then(|| format!("{host}:{port}"))
}

/// What may be secret in a request's target: the values of its headers, and the password and query of its URL.
pub fn secrets(url: &Url, headers: &Headers) -> Vec<Secret> {
    let in_headers = headers.iter().map(|(_, value)| value.clone());
    let in_query = url.query_pairs().map(|(_, value)| Secret::new(value.into_owned()));
    let password = url.password().map(|password| Secret::new(password.to_owned()));
    in_headers.chain(in_query).chain(password).chain(basic(url)).collect()
}

/// What the user name and password of a URL are sent as (RFC 7617), if it has any.
pub fn basic(url: &Url) -> Option<Secret> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let (user, password) = (percent::decode(url.username()), percent::decode(url.password().unwrap_or_default()));
    let credentials = Zeroizing::new([&user[..], b":", &password[..]].concat());
    Some(Secret::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(&*credentials))))
}

/// The members of a JSON object as they are written.
pub type RawMembers<'a> = BTreeMap<String, &'a RawValue>;

/// The members of a JSON object that are `known`, and the object's parts as they are written. The values of others are
/// not looked into: they may be larger or deeper than serde_json takes.
pub fn members<'a>(text: &'a str, known: &[&str]) -> Result<(Map<String, Value>, RawMembers<'a>), String> {
    let raw: RawMembers<'a> = serde_json::from_str(text).map_err(|_| "it is not a JSON object")?;
    let mut members = Map::new();
    for key in known {
        if let Some(value) = raw.get(*key) {
            let value = serde_json::from_str(value.get()).map_err(|_| format!("\"{key}\" cannot be read"))?;
            members.insert((*key).to_owned(), value);
        }
    }
    Ok((members, raw))
}

/// The key "url": absolute, http or https, with a host.
pub fn url(object: &Map<String, Value>) -> Result<Url, String> {
    match object.get("url") {
        Some(Value::String(text)) => parse_url(text),
        Some(_) => Err("\"url\" is not a string".into()),
        None => Err("\"url\" is missing".into()),
    }
}

/// A URL: absolute, http or https, with a host.
pub fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).map_err(|problem| format!("\"url\" is not a valid URL: {problem}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("\"url\" must begin with http:// or https://".into());
    }
    if url.host_str().is_some_and(|host| host.len() > MAX_HOST_LENGTH) {
        return Err(format!("\"url\" has a host name of more than {MAX_HOST_LENGTH} characters"));
    }
    Ok(url)
}

/// The key "headers": an object of strings that are fit to be sent.
pub fn headers(object: &Map<String, Value>) -> Result<Headers, String> {
    let given = match object.get("headers") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(given)) => given,
        Some(_) => return Err("\"headers\" is not a JSON object".into()),
    };
    let mut headers = Vec::with_capacity(given.len());
    for (name, value) in given {
        let parsed = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| "\"headers\" has a name that is not a valid header name".to_owned())?;
        let Value::String(value) = value else {
            return Err(format!("the header \"{name}\" is not a string"));
        };
        // Control characters would let a value end the line and begin another header.
        if HeaderValue::from_str(value).is_err() {
            return Err(format!("the header \"{name}\" has characters that are not allowed in a header"));
        }
        if FRAMING.contains(&parsed.as_str()) {
            return Err(format!("the header \"{name}\" cannot be given"));
        }
        headers.push((parsed, Secret::new(value.clone())));
    }
    Ok(headers)
}

/// The key "timeout_ms": 1 to 3600000.
pub fn timeout(object: &Map<String, Value>) -> Result<Option<Duration>, String> {
    match object.get("timeout_ms") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(milliseconds @ 1..=MAX_TIMEOUT_MS) => Ok(Some(Duration::from_millis(milliseconds))),
            _ => Err(format!("\"timeout_ms\" is not a whole number from 1 to {MAX_TIMEOUT_MS}")),
        },
    }
}

/// The key "max_in_flight": 1 to 100000.
fn max_in_flight(object: &Map<String, Value>) -> Result<Option<usize>, String> {
    match object.get("max_in_flight") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(number @ 1..=MAX_IN_FLIGHT) => Ok(usize::try_from(number).ok()),
            _ => Err(format!("\"max_in_flight\" is not a whole number from 1 to {MAX_IN_FLIGHT}")),
        },
    }
}

/// A header's value for sending; marked so that the HTTP library keeps it out of its own debug output.
pub fn sensitive(value: &Secret) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value.expose()).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn problem(config: Value) -> String {
        Endpoint::parse(&config.to_string()).err().unwrap_or_default()
    }

    #[test]
    fn a_config_is_read_and_unknown_keys_are_left_alone() {
        let config = json!({"url": "https://host.example/mcp", "headers": {"Authorization": "Bearer t"}, "timeout_ms": 5, "note": 1});
        let endpoint = Endpoint::parse(&config.to_string()).unwrap_or_else(|problem| panic!("{problem}"));
        assert_eq!(endpoint.url.as_str(), "https://host.example/mcp");
        assert_eq!(endpoint.timeout, Some(Duration::from_millis(5)));
        assert_eq!(endpoint.headers[0].0, "authorization");
        assert!(!format!("{endpoint:?}").contains("Bearer"));
    }

    #[test]
    fn an_authority_is_the_one_the_parser_finds_however_the_url_is_written() {
        let texts = [
            "http://example.com/",
            "https://example.com/a?b",
            "http://example.com:8080/x",
            "http://127.0.0.1:1/",
            "https://a.b-c.d:443/",
            "https://a:80/",
            "http://a:443/",
            "https://a:8443/",
            "http://EXAMPLE.com/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://127.1/",
            "http://1.2.3.4.5/",
            "http://010.0.0.1/",
            "http://a:0080/",
            "http://a:99999/",
            "http://a:/",
            "http://a",
            "http://a:80@b/",
            "http://[::1]:5/",
            "http://xn--nxasmq6b/",
            "http://xn--/",
            "http://a..b/",
            "http://.a/",
            "http://a./",
            "http://-a/",
            "http://a_b/",
            "http://a%2eb/",
            "http://a\\b/",
            "http:///a/",
            "ftp://a/",
            "http://a.1/",
            "http://a.1b/",
            "http://1a/",
            "http://a/\tb",
            " http://a/ ",
            "http://a:080/",
            "http://a:0/",
            "",
        ];
        for text in texts {
            let parsed = parse_url(text).map(|url| authority(&url)).unwrap_or_default();
            assert_eq!(authority_of(text), parsed, "{text}");
        }
        assert!(
            plain_authority("http://example.com:8080/x").is_some() && plain_authority("http://127.0.0.1:1/").is_some()
        );
    }

    #[test]
    fn problems_name_the_key_and_never_quote_a_value() {
        assert_eq!(problem(json!([])), "it is not a JSON object");
        assert_eq!(problem(json!({})), "\"url\" is missing");
        assert_eq!(problem(json!({"url": 1})), "\"url\" is not a string");
        assert_eq!(problem(json!({"url": "file:///etc/passwd"})), "\"url\" must begin with http:// or https://");
        for text in ["not a url", "http://", "http://[::1", "https://secret host/"] {
            let problem = problem(json!({"url": text}));
            assert!(problem.contains("not a valid URL") && !problem.contains("secret"), "{text}: {problem}");
        }
        let url = "http://host/";
        for value in ["a\r\nX-Evil: 1", "a\nb", "a\u{0}b"] {
            let problem = problem(json!({"url": url, "headers": {"X-Token": value}}));
            assert_eq!(problem, "the header \"X-Token\" has characters that are not allowed in a header");
        }
        assert!(problem(json!({"url": url, "headers": {"X\r\nEvil": "1"}})).contains("not a valid header name"));
        assert!(problem(json!({"url": url, "headers": {"X": 1}})).contains("not a string"));
        assert!(problem(json!({"url": url, "headers": []})).contains("not a JSON object"));
        assert!(problem(json!({"url": url, "headers": {"Mcp-Session-Id": "1"}})).contains("set by the protocol"));
        assert!(problem(json!({"url": url, "headers": {"Mcp-Name": "1"}})).contains("set by the protocol"));
        assert!(problem(json!({"url": url, "headers": {"Content-Length": "1"}})).contains("cannot be given"));
        let url_and = |rest: &str| Endpoint::parse(&format!("{{\"url\": \"http://host/\", {rest}}}"));
        assert_eq!(url_and("\"timeout_ms\": 1e400").err().as_deref(), Some("\"timeout_ms\" cannot be read"));
        assert!(url_and("\"note\": 1e400").is_ok(), "unknown keys are not looked into");
        for value in [json!(0), json!(-1), json!(1.5), json!("9"), json!(3_600_001)] {
            assert!(problem(json!({"url": url, "timeout_ms": value})).contains("timeout_ms"), "{value}");
        }
        for value in [json!(0), json!(-1), json!(1.5), json!("9"), json!(100_001)] {
            assert!(problem(json!({"url": url, "max_in_flight": value})).contains("max_in_flight"), "{value}");
        }
    }
}
