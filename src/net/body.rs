//! The bodies of answers, of bounded size each and bounded memory together.

use super::failure::Failure;
use super::runtime::Limits;
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::Response;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OwnedSemaphorePermit;

/// An answer up to this size is small: every request may have one.
const SMALL: usize = 256 * 1024;

/// One of the few places for large answers, kept until the answer is in its row.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Held {
    /// Waits for a place, unless it has one: who holds one and waits for another may wait for ever.
    async fn fill(&self, limits: &Limits) -> Result<(), Failure> {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            let place = limits.place_for_large_answer().await?;
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
        }
        Ok(())
    }
}

/// A response's body, decompressed, up to the size that is allowed. Beyond a small size it waits for a place among
/// the large answers, which `held` keeps.
pub fn chunks(
    response: Response,
    limits: &Arc<Limits>,
    held: &Held,
) -> impl Stream<Item = Result<Bytes, Failure>> + Send + 'static + use<> {
    let (limits, held) = (Arc::clone(limits), held.clone());
    let mut size = 0;
    response.bytes_stream().map_err(Failure::from).and_then(move |chunk| {
        let limit = limits.max_response_bytes();
        let before = size;
        size += chunk.len();
        let (limits, held) = (Arc::clone(&limits), held.clone());
        let is_large = before <= SMALL && before + chunk.len() > SMALL;
        let is_too_large = before + chunk.len() > limit;
        async move {
            if is_too_large {
                return Err(Failure::TooLarge { limit });
            }
            if is_large {
                held.fill(&limits).await?;
            }
            Ok(chunk)
        }
    })
}

/// A response's whole body.
pub async fn read(response: Response, limits: &Arc<Limits>, held: &Held) -> Result<Vec<u8>, Failure> {
    check_length(&response, limits)?;
    read_up_to(response, usize::MAX, limits, held).await
}

/// Fails where the head of a response says that its body is larger than allowed.
pub fn check_length(response: &Response, limits: &Limits) -> Result<(), Failure> {
    let limit = limits.max_response_bytes();
    let is_too_large = response.content_length().is_some_and(|length| length > limit as u64);
    if is_too_large { Err(Failure::TooLarge { limit }) } else { Ok(()) }
}

/// The beginning of a response's body: what comes after `most` bytes is not waited for.
pub async fn read_up_to(
    response: Response,
    most: usize,
    limits: &Arc<Limits>,
    held: &Held,
) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    let mut chunks = Box::pin(chunks(response, limits, held));
    while body.len() < most
        && let Some(chunk) = chunks.next().await
    {
        let chunk = chunk?;
        body.extend_from_slice(&chunk[..chunk.len().min(most - body.len())]);
    }
    Ok(body)
}
