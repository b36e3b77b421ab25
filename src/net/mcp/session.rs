//! MCP sessions: one per server and credentials, kept over jobs, opened again when lost, closed when idle.

use super::tag::Noted;
use super::transport::Transport;
use crate::net::endpoint::{Endpoint, sensitive};
use crate::net::failure::{Failure, words};
use crate::net::outbound::Outbound;
use crate::net::runtime::Limits;
use reqwest::header::{HeaderName, HeaderValue};
use rmcp::model::{ClientCapabilities, ClientConfig, Implementation, ProtocolVersion, ServerCapabilities};
use rmcp::service::{ClientInitializeError, ClientLifecycleMode, ClientServiceExt, Peer, RoleClient, RunningService};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a session that is being closed may take to say goodbye.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// An open session.
pub struct Session {
    service: RunningService<RoleClient, ClientConfig>,
    used: Mutex<Instant>,
}

impl Session {
    /// The handle to call the server.
    pub fn peer(&self) -> &Peer<RoleClient> {
        self.service.peer()
    }

    /// What the server says it has.
    pub fn capabilities(&self) -> ServerCapabilities {
        self.peer().peer_info().map(|info| info.capabilities.clone()).unwrap_or_default()
    }

    fn is_alive(&self) -> bool {
        !self.service.is_closed() && !self.service.is_transport_closed()
    }

    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn idle_for(&self) -> Duration {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// A session in the hands of a call: it is not closed meanwhile, and its idle time begins afterwards.
pub struct InUse(Arc<Session>);

impl std::ops::Deref for InUse {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
    }
}

#[derive(Default)]
struct State {
    open: Option<Arc<Session>>,
    /// The last attempt to open, if it failed: those who waited for it share its failure instead of trying in turn.
    failed: Option<(Instant, Failure)>,
}

/// The sessions of the process, by server and credentials.
pub struct Sessions {
    outbound: Arc<Outbound>,
    limits: Arc<Limits>,
    sessions: Mutex<HashMap<Endpoint, Arc<tokio::sync::Mutex<State>>>>,
}

impl Sessions {
    pub fn new(outbound: Arc<Outbound>, limits: Arc<Limits>) -> Self {
        Self { outbound, limits, sessions: Mutex::default() }
    }

    /// Bytes that an answer may have.
    pub fn max_response_bytes(&self) -> usize {
        self.limits.max_response_bytes()
    }

    /// The session with a server; opened when there is none that lives.
    pub async fn get(&self, endpoint: &Endpoint) -> Result<InUse, Failure> {
        let asked = Instant::now();
        let place = {
            let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(sessions.entry(endpoint.clone()).or_default())
        };
        let mut state = place.lock().await;
        if let Some(session) = state.open.take_if(|session| session.is_alive()) {
            state.open = Some(Arc::clone(&session));
            return Ok(InUse(session));
        }
        state.open = None;
        if let Some((at, failure)) = &state.failed
            && *at > asked
        {
            return Err(failure.clone());
        }
        match self.open(endpoint).await {
            Ok(service) => {
                let session = Arc::new(Session { service, used: Mutex::new(Instant::now()) });
                *state = State { open: Some(Arc::clone(&session)), failed: None };
                Ok(InUse(session))
            }
            Err(failure) => {
                state.failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    async fn open(&self, endpoint: &Endpoint) -> Result<RunningService<RoleClient, ClientConfig>, Failure> {
        let noted = Noted::default();
        let transport = Transport::new(Arc::clone(&self.outbound), Arc::clone(&self.limits), noted.clone());
        let mut config = StreamableHttpClientTransportConfig::with_uri(endpoint.url.as_str());
        config.max_concurrent_requests = self.limits.max_in_flight();
        config.max_sse_event_size = self.limits.max_response_bytes();
        config.custom_headers = endpoint
            .headers
            .iter()
            .filter_map(|(name, value)| sensitive(value).map(|value| (name.clone(), value)))
            .collect::<HashMap<HeaderName, HeaderValue>>();
        let info = ClientConfig::new(
            ClientCapabilities::default(),
            Implementation::new("nexus_hub", env!("CARGO_PKG_VERSION")),
        );
        let lifecycle =
            ClientLifecycleMode::Auto { preferred_versions: vec![ProtocolVersion::V_2026_07_28], legacy_version: None };
        let transport = StreamableHttpClientTransport::with_client(transport, config);
        info.serve_with_lifecycle(transport, lifecycle)
            .await
            .map_err(|error| noted.take().unwrap_or_else(|| describe(&error)))
    }

    /// Closes the sessions that no job has used for `time`.
    pub async fn close_idle(&self, time: Duration) {
        let sessions: Vec<_> = {
            let map = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            map.iter().map(|(endpoint, place)| (endpoint.clone(), Arc::clone(place))).collect()
        };
        for (endpoint, place) in sessions {
            // One that is locked is being opened.
            let Ok(mut state) = place.try_lock() else { continue };
            let idle = match &state.open {
                // Nobody else holds it, so no call is under way.
                Some(session) => !session.is_alive() || (Arc::strong_count(session) == 1 && session.idle_for() >= time),
                None => state.failed.as_ref().is_none_or(|(at, _)| at.elapsed() >= time),
            };
            if !idle {
                continue;
            }
            let open = state.open.take();
            drop(state);
            self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&endpoint);
            if let Some(mut session) = open.and_then(Arc::into_inner) {
                // A server that does not answer the goodbye forgets the session by itself in time.
                let _ = session.service.close_with_timeout(CLOSE_TIME).await;
            }
        }
    }
}

fn describe(error: &ClientInitializeError) -> Failure {
    match error {
        ClientInitializeError::JsonRpcError(error) => {
            Failure::Rpc { code: error.code.0, message: words(&error.message) }
        }
        ClientInitializeError::LegacyFallbackFailed { fallback, .. } => describe(fallback),
        ClientInitializeError::NoCompatibleProtocolVersion { .. } => {
            Failure::NotMcp("client and server have no protocol version in common".into())
        }
        ClientInitializeError::ExpectedInitResponse(_) | ClientInitializeError::ExpectedInitResult(_) => {
            Failure::NotMcp("the answer to the handshake is not the one expected".into())
        }
        other => Failure::Broken(words(&other.to_string())),
    }
}
