//! `{{secret:name}}`: where a named secret is to be filled in.

use zeroize::Zeroizing;

/// What a placeholder begins with. A text without it has none.
pub const OPENING: &str = "{{secret:";
const CLOSING: &str = "}}";

/// Characters that a secret's name may have.
pub const MAX_NAME_LENGTH: usize = 100;

/// Whether a secret may be called so: 1 to 100 of `A-Z a-z 0-9 _ . -`.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_LENGTH).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// The placeholder of a secret.
pub fn of(name: &str) -> String {
    format!("{OPENING}{name}{CLOSING}")
}

/// A text begins like a placeholder somewhere, but does not go on like one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "a placeholder that is not {OPENING}name{CLOSING} with a name of 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 _ . -"
        )
    }
}

/// A part of a text with placeholders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    Text(&'a str),
    Secret(&'a str),
}

/// A text's parts, in their order.
pub fn pieces(text: &str) -> Result<Vec<Piece<'_>>, Malformed> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(OPENING) {
        let (name, after) = after.split_once(CLOSING).filter(|(name, _)| is_name(name)).ok_or(Malformed)?;
        pieces.extend([Piece::Text(before), Piece::Secret(name)]);
        rest = after;
    }
    pieces.push(Piece::Text(rest));
    Ok(pieces)
}

/// The text with a value in the place of each secret. Values are not looked into for more placeholders. `None`: it would
/// have more than so many bytes.
pub fn fill<'a>(pieces: &[Piece<'a>], value: impl Fn(&str) -> &'a str, limit: usize) -> Option<Zeroizing<String>> {
    let values: Vec<&str> = pieces
        .iter()
        .map(|piece| match piece {
            Piece::Text(text) => text,
            Piece::Secret(name) => value(name),
        })
        .collect();
    let length = values.iter().map(|value| value.len()).sum();
    if length > limit {
        return None;
    }
    // Of its final size at once: a text that grows leaves copies behind that nobody wipes.
    let mut filled = Zeroizing::new(String::with_capacity(length));
    values.iter().for_each(|value| filled.push_str(value));
    Some(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(text: &str) -> String {
        let values = |name: &str| match name {
            "a" => "1",
            "b.c-d_E9" => "{{secret:a}}",
            other => panic!("{other}"),
        };
        let pieces = pieces(text).unwrap_or_else(|problem| panic!("{text}: {problem}"));
        fill(&pieces, values, 1000).map(|text| text.to_string()).expect("short")
    }

    #[test]
    fn placeholders_are_replaced_wherever_they_stand() {
        assert_eq!(filled("{{secret:a}}"), "1");
        assert_eq!(filled("Bearer {{secret:a}}{{secret:a}}, {{secret:a}}!"), "Bearer 11, 1!");
        assert_eq!(filled("{{{secret:a}}}"), "{1}");
        assert_eq!(filled("ü{{secret:a}}ü"), "ü1ü");
    }

    #[test]
    fn a_value_that_looks_like_a_placeholder_is_left_as_it_is() {
        assert_eq!(filled("{{secret:b.c-d_E9}}{{secret:a}}"), "{{secret:a}}1");
    }

    #[test]
    fn a_text_does_not_grow_beyond_its_limit() {
        let pieces = pieces("{{secret:a}}-{{secret:a}}").expect("well-formed");
        assert!(fill(&pieces, |_| "1234", 9).is_some() && fill(&pieces, |_| "1234", 8).is_none());
    }

    #[test]
    fn other_braces_are_plain_text() {
        for text in ["", "{{name}}", "{{ secret:a}}", "{{Secret:a}}", "{secret:a}", "}}{{", "{{secret", "secret:a}}"] {
            assert_eq!(filled(text), text);
        }
    }

    #[test]
    fn what_only_begins_like_a_placeholder_is_malformed() {
        let long = of(&"x".repeat(101));
        for text in [
            "{{secret:",
            "{{secret:}}",
            "{{secret:a}",
            "{{secret:a} }",
            "{{secret:a b}}",
            "{{secret:ä}}",
            "{{secret: a}}",
            "{{secret:a/b}}",
            "{{secret:{{secret:a}}}}",
            "{{secret:a\n}}",
            "x {{secret:a}} {{secret:",
            &long,
        ] {
            assert_eq!(pieces(text), Err(Malformed), "{text}");
        }
        assert!(pieces(&of(&"x".repeat(100))).is_ok());
    }
}
