//! Keeping secrets out of what a job's row will say: its result and its error.

use super::failure::{Failure, quote};
use super::outcome::{Ending, Verdict};
use super::template::Hidden;
use crate::domain::redact::{Redactor, TooLarge};
use crate::domain::schedule::Reach;
use crate::domain::secret::{REDACTED, Secret, redact};
use std::sync::Arc;

/// Up to this size a text is searched right away; a larger one would keep other requests waiting.
const SMALL: usize = 64 * 1024;

/// Runs what searches a text of this size, elsewhere if it is large.
pub async fn redacting<T: Send + 'static>(
    size: usize,
    search: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    if size <= SMALL {
        return Ok(search());
    }
    tokio::task::spawn_blocking(search).await.map_err(|_| Failure::Internal("the answer could not be searched".into()))
}

/// The ending with nothing of the secrets in its result, which is JSON.
pub async fn with_redacted_result(
    mut ending: Ending,
    redactor: &Arc<Redactor>,
    limit: usize,
) -> Result<Ending, Failure> {
    let (Verdict::Completed { result } | Verdict::Failed { result: Some(result), .. }) = &mut ending.verdict else {
        return Ok(ending);
    };
    if redactor.is_empty() {
        return Ok(ending);
    }
    let (text, redactor) = (std::mem::take(result), Arc::clone(redactor));
    let size = text.len();
    let search = move || redactor.json(&text, limit).map(|redacted| redacted.unwrap_or(text));
    *result = redacting(size, search).await?.map_err(|TooLarge| Failure::TooLarge { limit })?;
    Ok(ending)
}

/// Redacted before it is cut to its length: half a secret at the cut would not be found.
pub fn without_secrets(
    ended: Result<Ending, Failure>,
    secrets: impl FnOnce() -> Vec<Secret>,
    hidden: &Hidden,
) -> Ending {
    let mut ending = ended.unwrap_or_else(Ending::from);
    if let Verdict::Failed { error, .. } = &mut ending.verdict {
        let secrets = secrets();
        let shown = |text: &str| {
            if hidden.is_empty() {
                return quote(&redact(text, &secrets));
            }
            // All at once: what one leaves of another could not be found any more.
            let last_words: Vec<_> = secrets.iter().map(Secret::last_word).collect();
            // Content types and hosts are told in lower case.
            let lower: Vec<_> = hidden.iter().map(|(secret, mark)| (secret.to_lower_case(), mark.as_str())).collect();
            let named = hidden.iter().map(|(secret, mark)| (secret, mark.as_str()));
            let named = named.chain(lower.iter().map(|(secret, mark)| (secret, *mark)));
            let others = secrets.iter().chain(&last_words).map(|secret| (secret, REDACTED));
            let redacted = Redactor::new(named.chain(others)).text(text, usize::MAX);
            let redacted = redacted.ok().flatten();
            quote(without_end(redacted.as_deref().unwrap_or(text), text, hidden))
        };
        *error = shown(error);
        if let Reach::Unreachable(error) | Reach::Silent(error) = &mut ending.reach {
            *error = shown(error);
        }
    }
    ending
}

/// Longer texts may have been cut, perhaps in the middle of a secret.
const MAX_WHOLE: usize = 10_000;

/// A redacted text without the end that may be the beginning of a secret.
fn without_end<'a>(redacted: &'a str, text: &str, hidden: &Hidden) -> &'a str {
    if text.len() <= MAX_WHOLE {
        return redacted;
    }
    let longest = hidden.iter().map(|(secret, _)| secret.expose().len()).max().unwrap_or_default();
    let end = redacted.len().saturating_sub(longest + '…'.len_utf8());
    let end = (0..=end).rev().find(|at| redacted.is_char_boundary(*at)).unwrap_or_default();
    &redacted[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::failure::words;

    fn shown(error: &str, secret: &str) -> String {
        let failure = Failure::NotMcp(words(error));
        let hidden = vec![(Secret::new(secret.into()), "{{secret:s}}".to_owned())];
        let header = Secret::new(format!("Bearer {secret}"));
        match without_secrets(Err(failure), || vec![header], &hidden).verdict {
            Verdict::Failed { error, .. } => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_error_shows_a_secret_by_its_name_and_a_header_not_at_all() {
        let error = shown("S3cret-1, bearer S3cret-1, Bearer S3cret-1, s3cret-1", "S3cret-1");
        assert!(error.ends_with("{{secret:s}}, bearer {{secret:s}}, [redacted], {{secret:s}}"), "{error}");
    }

    #[test]
    fn a_secret_that_was_cut_is_not_shown_either() {
        let secret = "0123456789".repeat(1000);
        let error = shown(&format!("{secret} {secret} {secret}"), &secret);
        assert!(error.contains("{{secret:s}}") && !error.contains("0123"), "{error}");
    }
}
