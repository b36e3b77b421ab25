//! JSON texts on their way into the database.

use serde_json::value::RawValue;

/// Whether a text is JSON whose strings `jsonb` takes: it refuses the escape of the zero character and halves of
/// surrogate pairs. (Numbers beyond `numeric` and extreme depth are left for it to refuse.)
pub fn is_storable(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text).is_ok() && has_only_whole_characters(text)
}

/// Looks at the `\u` escapes of a valid JSON text; in such a text a backslash stands only in strings.
fn has_only_whole_characters(text: &str) -> bool {
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        rest = &rest[at + 1..];
        let Some(code) = rest.strip_prefix('u').and_then(code_unit) else {
            // Over the character after the backslash, which may be one itself.
            rest = &rest[rest.chars().next().map_or(0, char::len_utf8)..];
            continue;
        };
        rest = &rest[5..];
        match code {
            0 | 0xDC00..=0xDFFF => return false,
            0xD800..=0xDBFF => match rest.strip_prefix("\\u").and_then(code_unit) {
                Some(0xDC00..=0xDFFF) => rest = &rest[6..],
                _ => return false,
            },
            _ => {}
        }
    }
    true
}

fn code_unit(text: &str) -> Option<u16> {
    u16::from_str_radix(text.get(..4)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::is_storable;

    #[test]
    fn json_passes_and_what_jsonb_refuses_does_not() {
        for text in [
            "{}",
            " [1.10, null] ",
            r#""\u00e4""#,
            r#""\\u0000""#,
            r#""\\\\u0000""#,
            r#""\ud83e\udd80""#,
            r#"{"p": "\\u", "n": 1e400}"#,
            "1",
        ] {
            assert!(is_storable(text), "{text}");
        }
        for text in [
            "",
            "{broken",
            "{} {}",
            "'a'",
            r#""\u0000""#,
            r#""\\\u0000""#,
            r#""\ud800""#,
            r#""\ud800x""#,
            r#""\udd80""#,
        ] {
            assert!(!is_storable(text), "{text}");
        }
    }
}
