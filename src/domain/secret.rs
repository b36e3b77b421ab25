//! Texts that must not be shown.

use zeroize::{Zeroize, Zeroizing};

/// What stands in the place of a secret in texts for people.
pub const REDACTED: &str = "[redacted]";

/// Secrets shorter than this are not searched for in texts: replacing every "a" would help nobody.
pub const SHORTEST_REDACTED: usize = 4;

/// A secret text: it has no `Display`, its `Debug` is redacted, and its memory is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// Of several words ("Bearer abc") the last: servers echo the token alone.
    pub fn last_word(&self) -> Self {
        let whole = self.0.trim();
        Self::new(whole.rsplit(char::is_whitespace).next().unwrap_or(whole).to_owned())
    }

    /// The same in lower case, as far as it is ASCII.
    pub fn to_lower_case(&self) -> Self {
        Self::new(self.0.to_ascii_lowercase())
    }

    /// The secret itself. Whoever calls this answers for where it goes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<Zeroizing<String>> for Secret {
    fn from(text: Zeroizing<String>) -> Self {
        Self(text)
    }
}

impl std::hash::Hash for Secret {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(REDACTED)
    }
}

/// A text in which every one of the secrets is replaced. A secret of several words ("Bearer abc") is looked for as a
/// whole and by its last word, because servers echo the token alone.
pub fn redact<'a>(text: &str, secrets: impl IntoIterator<Item = &'a Secret>) -> String {
    let mut text = text.to_owned();
    for secret in secrets {
        let whole = secret.expose().trim();
        let last_word = whole.rsplit(char::is_whitespace).next().unwrap_or(whole);
        for needle in [whole, last_word] {
            if needle.len() >= SHORTEST_REDACTED && text.contains(needle) {
                let replaced = text.replace(needle, REDACTED);
                text.zeroize();
                text = replaced;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_hides_the_secret() {
        let secret = Secret::new("hunter2".into());
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "[redacted] Some([redacted])");
    }

    #[test]
    fn echoed_secrets_are_redacted_whole_and_by_token() {
        let secrets = [Secret::new("Bearer s3cr3t-token".into())];
        let text = "bad header 'Bearer s3cr3t-token', token s3cr3t-token unknown";
        assert_eq!(redact(text, &secrets), "bad header '[redacted]', token [redacted] unknown");
    }

    #[test]
    fn texts_without_secrets_and_very_short_secrets_are_left_alone() {
        assert_eq!(redact("nothing here", &[Secret::new("a".into()), Secret::new(String::new())]), "nothing here");
    }
}
