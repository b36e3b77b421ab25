//! Taking secrets that were filled into a request out of what the server answers.
//!
//! A secret is found as it is, percent-encoded in whatever way, and as JSON escapes it, wherever in a text it stands.

use super::needle::{self, Needle};
use super::secret::{SHORTEST_REDACTED, Secret};
use zeroize::Zeroizing;

/// The text would grow beyond what is allowed: something is put in a secret's place that is longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge;

/// Finds secrets in texts, and puts what is to be shown instead in their places.
#[derive(Default)]
pub struct Redactor {
    /// With what takes their places.
    needles: Vec<(Needle, String)>,
}

/// A place in a text, and which needle is there.
type Found = (usize, usize, usize);

impl Redactor {
    /// Looks for secrets, and puts the text that goes with each in its place. Very short ones are not looked for.
    pub fn new<'a>(hidden: impl IntoIterator<Item = (&'a Secret, &'a str)>) -> Self {
        let mut needles = Vec::new();
        for (secret, mark) in hidden {
            let whole = secret.expose().trim();
            if whole.chars().count() < SHORTEST_REDACTED {
                continue;
            }
            // As it is in an error's text, which is one line.
            let words = Zeroizing::new(whole.split_whitespace().collect::<Vec<_>>().join(" "));
            let forms = if words.as_str() == whole { vec![whole] } else { vec![whole, &words] };
            needles.extend(forms.into_iter().map(|form| (Needle::new(form.as_bytes()), mark.to_owned())));
        }
        Self { needles }
    }

    /// Whether there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.needles.is_empty()
    }

    /// The text without the secrets; `None` when there are none in it.
    pub fn text(&self, text: &str, limit: usize) -> Result<Option<String>, TooLarge> {
        let redacted = self.bytes(text.as_bytes(), limit)?;
        Ok(redacted.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The same for bytes that need not be a text.
    pub fn bytes(&self, bytes: &[u8], limit: usize) -> Result<Option<Vec<u8>>, TooLarge> {
        let found = self.find(bytes);
        if found.is_empty() {
            return Ok(None);
        }
        let mut redacted = Vec::with_capacity(bytes.len());
        let mut copied = 0;
        for (start, end, needle) in found {
            redacted.extend_from_slice(&bytes[copied..start]);
            redacted.extend_from_slice(self.needles[needle].1.as_bytes());
            copied = end;
            if redacted.len() > limit {
                return Err(TooLarge);
            }
        }
        redacted.extend_from_slice(&bytes[copied..]);
        if redacted.len() > limit { Err(TooLarge) } else { Ok(Some(redacted)) }
    }

    /// The same for a valid JSON text, which stays one: strings and keys are searched for what they stand for, a number
    /// or literal with a secret in it becomes a string, and what has none in it stays as it is written.
    pub fn json(&self, text: &str, limit: usize) -> Result<Option<String>, TooLarge> {
        let mut redacted = String::new();
        let mut copied = 0;
        let mut at = 0;
        while let Some(token) = token(text, at) {
            at = token.end;
            let inside = &text[token.clone()];
            let changed = match inside.strip_prefix('"').and_then(|inside| inside.strip_suffix('"')) {
                Some(plain) if !plain.contains('\\') => self.text(plain, limit)?,
                Some(plain) => {
                    // Halves of surrogate pairs stand for nothing; the database will not take them.
                    let decoded = serde_json::from_str::<String>(inside).map(Zeroizing::new);
                    self.text(decoded.as_ref().map_or(plain, |decoded| decoded.as_str()), limit)?
                }
                None => self.find(inside.as_bytes()).first().map(|(_, _, needle)| self.needles[*needle].1.clone()),
            };
            if let Some(changed) = changed {
                redacted.push_str(&text[copied..token.start]);
                redacted.push_str(&serde_json::Value::from(changed).to_string());
                copied = token.end;
            }
            if redacted.len() > limit {
                return Err(TooLarge);
            }
        }
        if copied == 0 {
            return Ok(None);
        }
        redacted.push_str(&text[copied..]);
        if redacted.len() > limit { Err(TooLarge) } else { Ok(Some(redacted)) }
    }

    /// Where there are secrets: places that do not touch, each with the longest needle that is there.
    fn find(&self, text: &[u8]) -> Vec<Found> {
        let mut found = Vec::new();
        let has = |byte| text.contains(&byte);
        let (percents, plusses, escapes) = (has(b'%'), has(b'+'), has(b'\\'));
        for (number, needle) in self.needles.iter().map(|(needle, _)| needle).enumerate() {
            let mut note = |start, end| found.push((start, end, number));
            needle.find(text, needle::plain, &mut note);
            if percents {
                needle.find(text, needle::percent_encoded, &mut note);
            }
            if plusses && needle.text().contains(&b' ') {
                needle.find(text, needle::form_encoded, &mut note);
            }
            if escapes {
                needle.find(text, needle::escaped, &mut note);
            }
        }
        found.sort_unstable();
        let mut merged: Vec<Found> = Vec::with_capacity(found.len());
        for (start, end, number) in found {
            let longer = |a: usize, b: usize| {
                if self.needles[a].0.text().len() >= self.needles[b].0.text().len() { a } else { b }
            };
            match merged.last_mut() {
                Some(last) if start < last.1 => *last = (last.0, last.1.max(end), longer(last.2, number)),
                _ => merged.push((start, end, number)),
            }
        }
        merged
    }
}

/// The next string, number or literal of a valid JSON text.
fn token(text: &str, from: usize) -> Option<std::ops::Range<usize>> {
    let bytes = text.as_bytes();
    let is_between = |byte: &u8| matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',' | b' ' | b'\t' | b'\r' | b'\n');
    let start = from + bytes.get(from..)?.iter().position(|byte| !is_between(byte))?;
    let mut end = start + 1;
    if bytes[start] == b'"' {
        while let Some(byte) = bytes.get(end) {
            end += if *byte == b'\\' { 2 } else { 1 };
            if *byte == b'"' {
                break;
            }
        }
    } else {
        while bytes.get(end).is_some_and(|byte| !is_between(byte) && *byte != b'"') {
            end += 1;
        }
    }
    Some(start..end.min(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const LIMIT: usize = 10_000;

    fn redactor(hidden: &[(&str, &str)]) -> Redactor {
        let hidden: Vec<_> = hidden.iter().map(|(secret, mark)| (Secret::new((*secret).into()), *mark)).collect();
        Redactor::new(hidden.iter().map(|(secret, mark)| (secret, *mark)))
    }

    fn text(hidden: &[(&str, &str)], text: &str) -> String {
        redactor(hidden).text(text, LIMIT).expect("small").unwrap_or_else(|| text.to_owned())
    }

    fn json(hidden: &[(&str, &str)], text: &str) -> String {
        let redacted = redactor(hidden).json(text, LIMIT).expect("small").unwrap_or_else(|| text.to_owned());
        assert!(serde_json::from_str::<&serde_json::value::RawValue>(&redacted).is_ok(), "{redacted}");
        redacted
    }

    #[test]
    fn a_secret_is_replaced_wherever_it_stands() {
        let hidden = &[("s3cret", "{{s}}"), ("кл/юч", "{{k}}")];
        assert_eq!(text(hidden, "s3cret, xs3crets3cretx кл/юч"), "{{s}}, x{{s}}{{s}}x {{k}}");
        assert_eq!(text(hidden, "s3cre t3cret"), "s3cre t3cret");
        assert_eq!(redactor(hidden).text("nothing", LIMIT), Ok(None));
        assert_eq!(redactor(hidden).bytes(b"\xff\0s3cret\xfe", LIMIT), Ok(Some(b"\xff\0{{s}}\xfe".to_vec())));
    }

    #[test]
    fn it_is_found_however_it_is_percent_encoded() {
        let hidden = &[("a b/ä%1", "{{s}}")];
        for encoded in ["a%20b%2F%C3%A4%251", "a%20b%2f%c3%a4%251", "a b/%C3%A4%1", "%61+b/ä%251", "a b/ä%1"] {
            assert_eq!(text(hidden, &format!("x={encoded}&y=%20")), "x={{s}}&y=%20", "{encoded}");
        }
        assert_eq!(text(&[("a%41b", "{{s}}")], "a%41b aAb a%2541b"), "{{s}} aAb {{s}}");
    }

    #[test]
    fn it_is_found_as_json_escapes_it_in_a_text_that_is_none() {
        let hidden = &[("a\"b/c&ü🗝\\", "{{s}}")];
        for escaped in [
            r#"a\"b/c&ü🗝\\"#,
            r#"a\"b\/c\u0026ü🗝\\"#,
            r#"a\"b/c&\u00fc\ud83d\udddd\\"#,
            r#"\u0061\u0022b\u002fc\u0026\u00FC\uD83D\uDDDD\u005c"#,
        ] {
            let given = format!(r#"error: {{"t": "\u00e4{escaped}"; \n \ud83d \"#);
            assert_eq!(text(hidden, &given), r#"error: {"t": "\u00e4{{s}}"; \n \ud83d \"#, "{escaped}");
            // A string of JSON that holds JSON.
            let nested = Value::from(format!(r#"{{"k":"{escaped}"}}"#)).to_string();
            assert_eq!(json(hidden, &nested), Value::from(r#"{"k":"{{s}}"}"#).to_string());
        }
        assert_eq!(text(&[("a\\/b", "{{s}}")], r"a\/b a\\/b a/b"), "{{s}} {{s}} a/b");
    }

    #[test]
    fn the_longest_of_several_secrets_in_one_place_is_named_and_nothing_of_any_is_left() {
        let hidden = &[("token", "{{short}}"), ("my-token-1", "{{long}}"), ("1-other", "{{other}}")];
        assert_eq!(text(hidden, "my-token-1 token my-token"), "{{long}} {{short}} my-{{short}}");
        assert_eq!(text(hidden, "my-token-1-other"), "{{long}}");
        assert_eq!(text(&[("aabaab", "{{s}}")], "aabaabaabaab aaabaabb"), "{{s}}{{s}} a{{s}}b");
    }

    #[test]
    fn short_secrets_are_not_looked_for_and_blanks_around_others_do_not_matter() {
        assert!(redactor(&[("abc", "m"), ("", "m"), ("äöü", "m"), ("  ab  ", "m")]).is_empty());
        assert_eq!(text(&[(" s3cret ", "{{s}}")], "(s3cret)"), "({{s}})");
        assert_eq!(text(&[("two  words", "{{s}}")], "two words, two  words"), "{{s}}, {{s}}");
    }

    #[test]
    fn strings_and_keys_of_json_are_searched_for_what_they_stand_for() {
        let hidden = &[("a\"b/c\\ü", "{{s}}")];
        for written in [r#""a\"b/c\\ü""#, r#""a\"b\/c\\\u00fc""#, r#""\u0061\u0022b\u002fc\u005c\u00FC""#] {
            let unchanged = r#""x\u0041\/": 1.10e+5, "n": 123456789012345678901234567890, "l": [true, null, ""]"#;
            let given = format!("{{ {unchanged},\t\"k\": {written}, {written} : [{written}]}}");
            assert_eq!(
                json(hidden, &given),
                format!(r#"{{ {unchanged},{}"k": "{{{{s}}}}", "{{{{s}}}}" : ["{{{{s}}}}"]}}"#, '\t')
            );
        }
        assert_eq!(json(hidden, r#"{"a": "b\\"}"#), r#"{"a": "b\\"}"#);
        assert_eq!(json(&[("s3cret", "{{s}}")], r#""\ud83e\udd80 s3cret\n""#), "\"🦀 {{s}}\\n\"");
    }

    #[test]
    fn numbers_and_literals_with_a_secret_become_strings() {
        let hidden = &[("1234", "{{n}}"), ("true", "{{t}}")];
        assert_eq!(
            json(hidden, r#"[1234,-51234.5e3, 123, true,false,"1234"]"#),
            r#"["{{n}}","{{n}}", 123, "{{t}}",false,"{{n}}"]"#
        );
        assert_eq!(json(hidden, "1234"), r#""{{n}}""#);
    }

    #[test]
    fn marks_are_quoted_as_json_wants_it() {
        let redacted: Value = serde_json::from_str(&json(&[("s3cret", "\"\\")], r#"{"a":"s3cret"}"#)).expect("JSON");
        assert_eq!(redacted["a"], "\"\\");
    }

    #[test]
    fn texts_that_would_grow_too_large_are_refused() {
        let redactor = redactor(&[("abcd", "{{secret:a-long-name}}")]);
        let many = "abcd ".repeat(1000);
        assert_eq!(redactor.text(&many, LIMIT), Err(TooLarge));
        assert_eq!(redactor.json(&format!("[{}1]", "\"abcd\",".repeat(1000)), LIMIT), Err(TooLarge));
        assert!(redactor.text(&many, 3 * LIMIT).is_ok());
    }

    #[test]
    fn a_hostile_answer_takes_no_longer_than_another() {
        let secret = format!("{}b", "a".repeat(9_999));
        let redactor = redactor(&[(&secret, "{{s}}")]);
        assert_eq!(redactor.text(&"a".repeat(1_000_000), usize::MAX), Ok(None));
    }
}
