//! The way out: the HTTP client that every request goes through, and the egress policy that no request gets around.
//!
//! The policy judges the address that is connected to: a literal one before the request, the ones a name stands for
//! in the resolver that the client connects with, so a name that changes its addresses gains nothing.

use super::endpoint;
use super::failure::{Failure, causes};
use crate::domain::egress::Policy;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::AUTHORIZATION;
use reqwest::{Client, Request, Response, Url};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;
use url::Host;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests after which the descriptors are counted again.
const GAUGE_INTERVAL: usize = 16;
/// How long to wait for descriptors when the process has run out of them.
const DESCRIPTOR_WAIT: Duration = Duration::from_millis(50);

tokio::task_local! {
    /// The request that a name is resolved for.
    static HOP: Arc<Hop>;
}

/// What the resolver knows of a request, and it of the resolver.
struct Hop {
    port: u16,
    is_resolving: AtomicBool,
}

/// What the client goes by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Egress {
    pub policy: Policy,
    /// Certificates, in PEM, of authorities that are trusted besides the system's.
    pub authorities: Vec<u8>,
    /// Connections to one host that are kept for the next request.
    pub max_idle: usize,
    /// Files that the process may have open for connections to be kept.
    pub most_open: usize,
}

/// The client, which is made anew when what it goes by changes.
pub struct Outbound {
    current: RwLock<Arc<Current>>,
}

struct Current {
    egress: Egress,
    policy: Arc<Policy>,
    client: Client,
    /// Keeps no connection: for when many hosts have made descriptors scarce.
    frugal: Client,
    /// A descriptor whose copies tell how many there are.
    gauge: Option<OwnedFd>,
    /// Whether it told last that they are scarce; it is looked at now and then.
    is_scarce: AtomicBool,
    requests: AtomicUsize,
}

/// A connection that the policy denies.
#[derive(Debug)]
pub struct Denied {
    pub what: &'static str,
}

impl std::fmt::Display for Denied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "denied: {}", self.what)
    }
}

impl std::error::Error for Denied {}

/// Resolves names as the system does, and keeps back the addresses that the policy denies.
struct Resolver {
    policy: Arc<Policy>,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.policy);
        let hop = HOP.try_with(Arc::clone).ok();
        let port = hop.as_ref().map(|hop| hop.port);
        Box::pin(async move {
            let resolving = |is_resolving| {
                if let Some(hop) = &hop {
                    hop.is_resolving.store(is_resolving, SeqCst);
                }
            };
            resolving(true);
            let asked = name.as_str().to_owned();
            let lookup = tokio::task::spawn_blocking(move || (asked.as_str(), 0).to_socket_addrs());
            let found: Vec<SocketAddr> = Lookup(lookup).await??.collect();
            resolving(false);
            let mut denied = None;
            let mut allowed = Vec::with_capacity(found.len());
            for address in found {
                match policy.refusal(name.as_str(), port, address.ip()) {
                    None => allowed.push(address),
                    Some(what) => denied = Some(Denied { what }),
                }
            }
            match denied {
                Some(denied) if allowed.is_empty() => Err(denied.into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

/// A name being looked up; let go of, it does not even begin if it has not yet.
struct Lookup<T>(tokio::task::JoinHandle<T>);

impl<T> Future for Lookup<T> {
    type Output = Result<T, tokio::task::JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl<T> Drop for Lookup<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why a policy denies a URL whose host is an address; a name is judged when it is resolved.
pub fn refusal(policy: &Policy, url: &Url) -> Option<&'static str> {
    let address = match url.host()? {
        Host::Ipv4(address) => IpAddr::V4(address),
        Host::Ipv6(address) => IpAddr::V6(address),
        Host::Domain(_) => return None,
    };
    policy.refusal(url.host_str().unwrap_or_default(), url.port_or_known_default(), address)
}

fn client(egress: &Egress, policy: &Arc<Policy>, max_idle: usize) -> Result<Client, String> {
    // An error means that another library of the process has chosen one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let authorities = reqwest::Certificate::from_pem_bundle(&egress.authorities)
        .map_err(|_| "the file of certificate authorities is not valid PEM")?;
    Client::builder()
        .user_agent(concat!("nexus_hub/", env!("CARGO_PKG_VERSION")))
        // Followed by hand, hop by hop, and a proxy of the environment would connect where the policy does not see.
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .dns_resolver(Resolver { policy: Arc::clone(policy) })
        .tls_certs_merge(authorities)
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_max_idle_per_host(max_idle)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_keepalive(Duration::from_secs(60))
        .build()
        .map_err(|problem| format!("the HTTP client cannot be made: {problem}"))
}

impl Current {
    fn new(egress: Egress) -> Result<Self, String> {
        let policy = Arc::new(egress.policy.clone());
        let (kept, frugal) = (client(&egress, &policy, egress.max_idle)?, client(&egress, &policy, 0)?);
        let gauge = std::fs::File::open("/dev/null").ok().map(OwnedFd::from);
        let (is_scarce, requests) = (AtomicBool::new(false), AtomicUsize::new(0));
        Ok(Self { egress, policy, client: kept, frugal, gauge, is_scarce, requests })
    }

    fn client(&self) -> &Client {
        if !self.requests.fetch_add(1, SeqCst).is_multiple_of(GAUGE_INTERVAL) && !self.is_scarce.load(SeqCst) {
            return &self.client;
        }
        // A copy gets the smallest number that is free.
        let copy = self.gauge.as_ref().map(OwnedFd::try_clone);
        let is_scarce = match copy {
            Some(Ok(copy)) => copy.as_raw_fd().unsigned_abs() as usize > self.egress.most_open,
            Some(Err(_)) => true,
            None => false,
        };
        self.is_scarce.store(is_scarce, SeqCst);
        if is_scarce { &self.frugal } else { &self.client }
    }
}

impl Outbound {
    pub fn new(egress: Egress) -> Result<Self, String> {
        Ok(Self { current: RwLock::new(Arc::new(Current::new(egress)?)) })
    }

    /// Goes by this from the next request on, over new connections.
    pub fn configure(&self, egress: Egress) -> Result<(), String> {
        if self.current().egress != egress {
            let current = Arc::new(Current::new(egress)?);
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = current;
        }
        Ok(())
    }

    fn current(&self) -> Arc<Current> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a request, if the policy allows it, and returns the head of the answer. `request` makes it anew where it
    /// has to be tried again before anything was sent.
    pub async fn send(&self, request: impl Fn() -> Request) -> Result<Response, Failure> {
        let current = self.current();
        loop {
            let attempt = authorized(request());
            let url = attempt.url();
            if let Some(what) = refusal(&current.policy, url) {
                let host = url.host_str().unwrap_or_default().to_owned();
                return Err(Failure::Denied { host, what });
            }
            let port = url.port_or_known_default().unwrap_or_default();
            let hop = Arc::new(Hop { port, is_resolving: AtomicBool::new(false) });
            match HOP.scope(Arc::clone(&hop), current.client().execute(attempt)).await {
                // Nothing was sent. The job's own time bounds the tries.
                Err(error) if is_out_of_descriptors(&error) => tokio::time::sleep(DESCRIPTOR_WAIT).await,
                Err(error) if error.is_timeout() && hop.is_resolving.load(SeqCst) => {
                    let host = error.url().and_then(Url::host_str).unwrap_or_default().to_owned();
                    return Err(Failure::SlowNames { host });
                }
                Err(error) => return Err(error.into()),
                Ok(response) => return Ok(response),
            }
        }
    }
}

/// The request with the user name and password of its URL in a header, where HTTP has them.
pub fn authorized(mut request: Request) -> Request {
    let Some(credentials) = endpoint::basic(request.url()) else { return request };
    if !request.headers().contains_key(AUTHORIZATION)
        && let Some(credentials) = endpoint::sensitive(&credentials)
    {
        request.headers_mut().insert(AUTHORIZATION, credentials);
    }
    // They can be taken from any URL with a host.
    let _ = request.url_mut().set_username("");
    let _ = request.url_mut().set_password(None);
    request
}

/// Whether no connection came about because the process, or the system, has no descriptor left.
fn is_out_of_descriptors(error: &reqwest::Error) -> bool {
    let code = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>()?.raw_os_error();
    error.is_connect() && causes(error).any(|cause| matches!(code(cause), Some(libc::EMFILE | libc::ENFILE)))
}
