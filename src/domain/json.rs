//! JSON texts on their way into the database.

use serde_json::Value;
use serde_json::value::RawValue;

/// Whether a text is JSON that `jsonb` takes too: it refuses the escape of the zero character and half surrogates.
pub fn is_storable(text: &str) -> bool {
    if !text.contains("\\u") {
        return serde_json::from_str::<&RawValue>(text).is_ok();
    }
    !text.contains("\\u0000") && serde_json::from_str::<Value>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::is_storable;

    #[test]
    fn json_passes_and_what_jsonb_refuses_does_not() {
        for text in ["{}", " [1.10, null] ", "\"\\u00e4\"", "1"] {
            assert!(is_storable(text), "{text}");
        }
        for text in ["", "{broken", "\"\\u0000\"", "\"\\ud800\"", "{} {}", "'a'"] {
            assert!(!is_storable(text), "{text}");
        }
    }
}
