//! Rate limits as HTTP fields, by draft-ietf-httpapi-ratelimit-headers (`RateLimit-Policy`, `RateLimit`), whose values
//! are structured fields (RFC 9651).

use std::fmt::Write;

/// Characters of a policy's name at most.
pub const MAX_NAME: usize = 64;

/// A policy and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota<'a> {
    /// As [`is_name`] takes it.
    pub name: &'a str,
    /// Calls that are allowed in a window.
    pub limit: i32,
    /// Seconds.
    pub window: u32,
    pub remaining: i32,
    /// Seconds until the limit is full again; `None`: there is never anything of it.
    pub reset: Option<f64>,
}

/// Whether a policy may have that name: 1 to 64 printable characters of ASCII, which is what a string of a structured
/// field may hold.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// The value of `RateLimit-Policy`.
pub fn policies(quotas: &[Quota<'_>]) -> String {
    list(quotas, |text, quota| {
        let limit = quota.limit.max(0);
        write!(text, ";q={limit};w={}", quota.window)
    })
}

/// The value of `RateLimit`.
pub fn limits(quotas: &[Quota<'_>]) -> String {
    list(quotas, |text, quota| {
        let remaining = quota.remaining.max(0);
        write!(text, ";r={remaining}")?;
        quota.reset.map_or(Ok(()), |time| write!(text, ";t={}", whole_seconds(time)))
    })
}

/// Seconds, rounded up, as fields have them.
pub fn whole_seconds(seconds: f64) -> i64 {
    // Sixty years in nanoseconds are exact enough; what is above an integer becomes the highest one.
    seconds.max(0.0).ceil() as i64
}

fn list(quotas: &[Quota<'_>], parameters: impl Fn(&mut String, &Quota<'_>) -> std::fmt::Result) -> String {
    let mut text = String::new();
    for quota in quotas {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push('"');
        for character in quota.name.chars() {
            if matches!(character, '"' | '\\') {
                text.push('\\');
            }
            text.push(character);
        }
        text.push('"');
        // A String takes everything.
        let _ = parameters(&mut text, quota);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: Quota<'_> = Quota { name: "burst", limit: 100, window: 60, remaining: 50, reset: Some(29.2) };

    #[test]
    fn fields_are_those_of_the_draft() {
        let day = Quota { name: "per day", limit: 1000, window: 86_400, remaining: 0, reset: Some(86_399.000001) };
        assert_eq!(policies(&[BURST]), "\"burst\";q=100;w=60");
        assert_eq!(limits(&[BURST]), "\"burst\";r=50;t=30");
        assert_eq!(policies(&[BURST, day]), "\"burst\";q=100;w=60, \"per day\";q=1000;w=86400");
        assert_eq!(limits(&[BURST, day]), "\"burst\";r=50;t=30, \"per day\";r=0;t=86400");
        assert_eq!(policies(&[]), "");
        assert_eq!(limits(&[Quota { reset: None, ..BURST }]), "\"burst\";r=50");
    }

    #[test]
    fn a_name_cannot_break_out_of_its_quotes_nor_a_number_below_zero() {
        let odd = Quota { name: "a\"; q=9\\", limit: -3, window: 1, remaining: -1, reset: Some(-0.5) };
        assert_eq!(policies(&[odd]), "\"a\\\"; q=9\\\\\";q=0;w=1");
        assert_eq!(limits(&[odd]), "\"a\\\"; q=9\\\\\";r=0;t=0");
    }

    #[test]
    fn names_are_printable_ascii_of_some_length() {
        assert!(is_name("x") && is_name(&"~".repeat(MAX_NAME)) && is_name(" "));
        for name in ["", "é", "a\nb", "a\u{7f}", "a\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(!is_name(name), "{name:?}");
        }
    }
}
