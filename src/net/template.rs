//! Placeholders in a URL and in header values, and how secrets are filled in for them.
//!
//! A value may be anything, so it must change nothing but its own place: a header's value stays one value, and in a URL
//! it can decide neither the scheme, host and port nor where a part of the path, the query or the credentials ends.

use super::endpoint::{self, Headers};
use crate::domain::percent;
use crate::domain::placeholder::{self, Piece};
use crate::domain::secret::{REDACTED, Secret};
use reqwest::Url;
use reqwest::header::HeaderValue;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// Secrets that one request may have: each of them is looked for in its answer.
const MAX_SECRETS: usize = 16;
/// Bytes that a URL with all its secrets may have, and so the headers together.
const MAX_FILLED: usize = 256 * 1024;

/// Secrets by their names.
pub type Secrets = BTreeMap<String, Secret>;

/// What a text must not show, and what it shows instead.
pub type Hidden = Vec<(Secret, String)>;

/// A URL with placeholders as it was written, and the names of the secrets that it and the headers want.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    url: Secret,
    names: Vec<String>,
}

/// A request's target with everything filled in.
#[derive(Clone, Debug)]
pub struct Filled {
    pub url: Url,
    pub headers: Headers,
    pub hidden: Hidden,
}

impl Template {
    /// Looks at the members "url" and "headers" of an object, which have been found to be of the right form.
    /// `None`: there is no placeholder.
    pub fn of(object: &Map<String, Value>) -> Result<Option<Self>, String> {
        let url = object.get("url").and_then(Value::as_str).unwrap_or_default();
        let pieces = pieces_of("\"url\"", url)?;
        let mut names: Vec<_> = names_of(&pieces).map(str::to_owned).collect();
        for (name, value) in object.get("headers").and_then(Value::as_object).into_iter().flatten() {
            let pieces = pieces_of(&format!("the header \"{name}\""), value.as_str().unwrap_or_default())?;
            names.extend(names_of(&pieces).map(str::to_owned));
        }
        if names.is_empty() {
            return Ok(None);
        }
        mark(url, &pieces)?;
        names.sort();
        names.dedup();
        if names.len() > MAX_SECRETS {
            return Err(format!("there are {} secrets in it, and at most {MAX_SECRETS} are allowed", names.len()));
        }
        Ok(Some(Self { url: Secret::new(url.to_owned()), names }))
    }

    /// The secrets it wants.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Fills the secrets in, which must be all it wants.
    pub fn fill(&self, headers: &Headers, secrets: &Secrets) -> Result<Filled, String> {
        let pieces = |text| placeholder::pieces(text).map_err(|problem| problem.to_string());
        let value = |name: &str| secrets.get(name).map(Secret::expose).unwrap_or_default();
        let url = fill_url(self.url.expose(), &pieces(self.url.expose())?, value)?;
        let mut room = MAX_FILLED;
        let mut filled = Vec::with_capacity(headers.len());
        for (name, text) in headers {
            let pieces = pieces(text.expose())?;
            let text = placeholder::fill(&pieces, value, room).ok_or_else(too_long)?;
            room -= text.len();
            if HeaderValue::from_str(&text).is_err() {
                let secrets = list(&pieces);
                return Err(format!("{secrets} cannot be sent in the header \"{name}\": it has control characters"));
            }
            filled.push((name.clone(), Secret::from(text)));
        }
        let mut hidden: Hidden = secrets.iter().map(|(name, secret)| (secret.clone(), placeholder::of(name))).collect();
        // What becomes of the credentials in the URL.
        hidden.extend(endpoint::basic(&url).map(|credentials| (credentials.last_word(), REDACTED.to_owned())));
        Ok(Filled { url, headers: filled, hidden })
    }
}

fn pieces_of<'a>(what: &str, text: &'a str) -> Result<Vec<Piece<'a>>, String> {
    placeholder::pieces(text).map_err(|problem| format!("{what} has {problem}"))
}

fn names_of<'a>(pieces: &[Piece<'a>]) -> impl Iterator<Item = &'a str> {
    pieces.iter().filter_map(|piece| match piece {
        Piece::Secret(name) => Some(*name),
        Piece::Text(_) => None,
    })
}

fn too_long() -> String {
    format!("with its secrets, the URL or the headers would have more than {MAX_FILLED} bytes")
}

/// The secrets of a text, for people.
fn list(pieces: &[Piece<'_>]) -> String {
    let names: Vec<_> = names_of(pieces).map(|name| format!("\"{name}\"")).collect();
    format!("the secret {}", names.join(" or "))
}

/// The URL with a mark in each placeholder's stead, and the mark. The parser leaves marks alone, wherever they stand;
/// they may stand behind the host, or in the credentials before it.
fn mark(text: &str, pieces: &[Piece<'_>]) -> Result<(Url, String), String> {
    let plain = text.to_ascii_lowercase();
    let mark = (0_u32..).map(|number| format!("nexushub{number}secret")).find(|mark| !plain.contains(mark.as_str()));
    let mark = mark.unwrap_or_default();
    let refused = || {
        "\"url\" has a placeholder where none can be: they can stand in the path, the query, the user name and the password"
            .to_owned()
    };
    let marked = placeholder::fill(pieces, |_| &mark, usize::MAX).unwrap_or_default();
    let marked = endpoint::parse_url(&marked).map_err(|_| refused())?;
    let written = endpoint::parse_url(text).map_err(|_| refused())?;
    let in_host = marked.host_str().unwrap_or_default().contains(&mark);
    // ".." takes away the part before it, which may have been a placeholder.
    let is_whole = marked.as_str().matches(&mark).count() == names_of(pieces).count();
    if in_host || !is_whole || !is_same_origin(&marked, &written) {
        return Err(refused());
    }
    Ok((marked, mark))
}

fn is_same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

fn fill_url<'a>(text: &str, pieces: &[Piece<'_>], value: impl Fn(&str) -> &'a str) -> Result<Url, String> {
    if names_of(pieces).next().is_none() {
        return endpoint::parse_url(text);
    }
    let (marked, mark) = mark(text, pieces)?;
    // Each byte may take three.
    if names_of(pieces).map(|name| 3 * value(name).len()).sum::<usize>() > MAX_FILLED {
        return Err(too_long());
    }
    let values: Vec<_> = names_of(pieces).map(|name| percent::encode(value(name))).collect();
    let length = marked.as_str().len() + values.iter().map(|value| value.len()).sum::<usize>();
    let mut filled = Zeroizing::new(String::with_capacity(length));
    // The parser keeps the order.
    let mut parts = marked.as_str().split(mark.as_str());
    filled.push_str(parts.next().unwrap_or_default());
    for (value, part) in values.iter().zip(parts) {
        filled.push_str(value);
        filled.push_str(part);
    }
    match Url::parse(&filled) {
        // Not so for "." and "..", which the parser takes for what they are in a path, encoded or not.
        Ok(url) if url.as_str() == filled.as_str() && is_same_origin(&url, &marked) => Ok(url),
        _ => Err(format!("{} cannot stand in \"url\": with its value, the URL would lead elsewhere", list(pieces))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fill(object: Value, secrets: &[(&str, &str)]) -> Result<Filled, String> {
        let object = object.as_object().expect("an object");
        let secrets = secrets.iter().map(|(name, value)| ((*name).into(), Secret::new((*value).into()))).collect();
        let template = Template::of(object)?.expect("a placeholder");
        template.fill(&endpoint::headers(object)?, &secrets)
    }

    fn url(text: &str, secrets: &[(&str, &str)]) -> String {
        fill(json!({"url": text}), secrets).map_or_else(|problem| problem, |filled| filled.url.to_string())
    }

    #[test]
    fn a_secret_is_filled_in_behind_the_host_and_in_the_credentials_before_it() {
        let secrets = &[("a", "ä/?#@:&=% +\\"), ("b", "x.y-z_~9")];
        let a = "%C3%A4%2F%3F%23%40%3A%26%3D%25%20%2B%5C";
        for (text, filled) in [
            ("https://h/{{secret:a}}", format!("https://h/{a}")),
            ("https://h/x/{{secret:a}}/y?k={{secret:b}}&l={{secret:a}}", format!("https://h/x/{a}/y?k=x.y-z_~9&l={a}")),
            ("https://h/?{{secret:b}}={{secret:a}}", format!("https://h/?x.y-z_~9={a}")),
            ("https://{{secret:b}}:{{secret:a}}@h:8443/p", format!("https://x.y-z_~9:{a}@h:8443/p")),
            ("https://{{secret:a}}@h/", format!("https://{a}@h/")),
            ("https://u:{{secret:a}}@h/", format!("https://u:{a}@h/")),
            ("  https://H/bot{{secret:b}}/send  ", "https://h/botx.y-z_~9/send".into()),
            ("https://h/nexushub0secret/{{secret:b}}", "https://h/nexushub0secret/x.y-z_~9".into()),
        ] {
            assert_eq!(url(text, secrets), filled, "{text}");
        }
    }

    #[test]
    fn a_placeholder_cannot_stand_where_it_would_decide_where_the_request_goes() {
        for text in [
            "https://{{secret:b}}/",
            "https://{{secret:b}}",
            "https://{{secret:b}}.example/",
            "https://h:{{secret:b}}/",
            "https://h{{secret:b}}/",
            "https://h.{{secret:b}}?x",
            "https://ü{{secret:b}}/",
            "{{secret:b}}://h/",
            "{{secret:b}}",
            "https:{{secret:b}}/",
            "https:/{{secret:b}}/",
            "https:\\\\{{secret:b}}/",
            "https://[{{secret:b}}]/",
            "https://u@{{secret:b}}/",
            "https://h/{{secret:b}}/../x",
            "https://h/x/{{secret:b}}/%2e%2E",
        ] {
            for value in ["evil.example", "1", "::1", "../..", "@evil.example/"] {
                let problem = url(text, &[("b", value)]);
                assert!(problem.contains("where none can be") && !problem.contains("evil"), "{text}: {problem}");
            }
        }
    }

    #[test]
    fn a_value_that_would_change_the_path_is_refused_without_being_shown() {
        for (text, value) in [
            ("https://h/a/{{secret:x}}/b", ".."),
            ("https://h/a/{{secret:x}}", "."),
            ("https://h/a/{{secret:x}}", ".."),
            ("https://h/a/{{secret:x}}{{secret:x}}/b", "."),
            ("https://h/a/.{{secret:x}}/b", "."),
            ("https://h/a/%2e{{secret:x}}?q", "."),
        ] {
            let problem = "the secret \"x\"";
            let found = url(text, &[("x", value)]);
            assert!(found.starts_with(problem) && found.ends_with("the URL would lead elsewhere"), "{text}: {found}");
        }
        assert_eq!(url("https://h/{{secret:x}}/b", &[("x", "../..")]), "https://h/..%2F../b");
        assert_eq!(url("https://h/{{secret:x}}/b", &[("x", "...")]), "https://h/.../b");
        assert_eq!(url("https://h/?q={{secret:x}}", &[("x", "..")]), "https://h/?q=..");
        assert_eq!(url("https://h/{{secret:x}}", &[("x", "%2e%2e")]), "https://h/%252e%252e");
    }

    #[test]
    fn a_value_is_not_searched_for_placeholders_and_marks() {
        let secrets = &[("a", "{{secret:b}}"), ("b", "nexushub0secret"), ("c", "nexushub1secret")];
        assert_eq!(
            url("https://h/{{secret:a}}/{{secret:b}}/{{secret:c}}/{{secret:b}}", secrets),
            "https://h/%7B%7Bsecret%3Ab%7D%7D/nexushub0secret/nexushub1secret/nexushub0secret"
        );
        let headers = json!({"url": "https://h/", "headers": {"X": "{{secret:a}} {{secret:b}}"}});
        let filled = fill(headers, secrets).expect("filled");
        assert_eq!(filled.headers[0].1.expose(), "{{secret:b}} nexushub0secret");
    }

    #[test]
    fn a_header_is_filled_in_and_stays_one_header() {
        let object = json!({"url": "https://h/", "headers": {"Authorization": "Bearer {{secret:a}}"}});
        let filled = fill(object.clone(), &[("a", "tök en")]).expect("filled");
        assert_eq!(filled.headers[0].1.expose(), "Bearer tök en");
        for value in ["a\r\nX-Evil: 1", "a\nb", "a\0b", "a\u{7f}"] {
            let problem = fill(object.clone(), &[("a", value)]).expect_err("refused");
            assert_eq!(
                problem,
                "the secret \"a\" cannot be sent in the header \"authorization\": it has control characters"
            );
        }
    }

    #[test]
    fn a_request_does_not_grow_without_bounds() {
        let long = "x".repeat(10_000);
        let url = format!("https://h/{}", "{{secret:a}}".repeat(100));
        let headers: Map<String, Value> = (0..100).map(|n| (format!("x-{n}"), json!("{{secret:a}}"))).collect();
        for object in [json!({"url": url}), json!({"url": "https://h/", "headers": headers})] {
            let problem = fill(object, &[("a", &long)]).expect_err("too long");
            assert!(problem.ends_with("would have more than 262144 bytes"), "{problem}");
        }
        let long = "🗝".repeat(10_000);
        assert!(fill(json!({"url": "https://h/{{secret:a}}{{secret:a}}"}), &[("a", &long)]).is_ok());
        let url = |count| (0..count).map(|n| format!("{{{{secret:s{n}}}}}")).collect::<String>();
        let of =
            |count| Template::of(json!({"url": format!("https://h/{}", url(count))}).as_object().expect("an object"));
        assert_eq!(of(17), Err("there are 17 secrets in it, and at most 16 are allowed".into()));
        assert!(of(16).is_ok());
    }

    #[test]
    fn malformed_placeholders_are_refused_where_they_stand() {
        let problem = |object: Value| Template::of(object.as_object().expect("an object")).expect_err("malformed");
        assert!(problem(json!({"url": "https://h/{{secret:}}"})).starts_with("\"url\" has a placeholder that is not"));
        let headers = json!({"url": "https://h/", "headers": {"X": "{{secret:a"}});
        assert!(problem(headers).starts_with("the header \"X\" has a placeholder that is not"));
    }

    #[test]
    fn what_is_filled_in_is_to_be_hidden_and_so_is_what_the_credentials_become() {
        let object = json!({"url": "https://u:{{secret:a}}@h/", "headers": {"X": "{{secret:b}}"}});
        let filled = fill(object, &[("a", "pass word"), ("b", "other")]).expect("filled");
        let hidden: Vec<_> = filled.hidden.iter().map(|(secret, mark)| (secret.expose(), mark.as_str())).collect();
        assert_eq!(hidden, [("pass word", "{{secret:a}}"), ("other", "{{secret:b}}"), ("dTpwYXNzIHdvcmQ=", REDACTED)]);
    }
}
