//! The endpoint and its threads.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_kernels::BlockMemory;
use quinn::TokioRuntime;
use quinn::crypto::rustls::QuicServerConfig;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::api::{
    BindError, EndpointConfig, Limits, PathReport, Peer, PullError, PullRequest, Source, Stats,
};
use super::peers::Peers;
use super::pull::Pull;
use super::socket::{self, Socket};
use super::{probe, pull, serve, transport};
use crate::direct::{self, Mappings, Tickets};

/// Longest wait for peers to hear of a close.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves pulls of what a [`Source`] holds and pulls from others, on threads of its own. Clones are one endpoint;
/// when the last is dropped, its connections close and its pulls end.
#[derive(Clone)]
pub struct Endpoint {
    running: Arc<Running>,
}

/// Stops all when dropped.
struct Running {
    shared: Arc<Shared>,
    runtime: Mutex<Option<Runtime>>,
    handle: tokio::runtime::Handle,
    local_addr: SocketAddr,
}

/// What the endpoint's tasks share.
pub(crate) struct Shared {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) limits: Limits,
    pub(crate) source: Arc<dyn Source>,
    pub(crate) peers: Peers,
    pub(super) server_tls: Arc<QuicServerConfig>,
    /// A permit for each pull that runs.
    pub(super) pulls: Semaphore,
    /// A permit for each pull that is served.
    pub(crate) served: Semaphore,
    /// A permit for each connection that was accepted.
    pub(super) accepted: Arc<Semaphore>,
    /// A permit for each connection of an agent on this host that was accepted.
    pub(crate) direct: Arc<Semaphore>,
    /// Who may open those; `None` where this endpoint knows no direct way.
    pub(super) tickets: Option<Arc<Tickets>>,
    /// Memories of engines on this host.
    pub(crate) mappings: Mappings,
    /// Cancelled when the endpoint closes.
    pub(crate) closing: CancellationToken,
    pub(crate) counters: Counters,
}

/// Running totals.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) direct: AtomicU64,
    pub(crate) packed: AtomicU64,
    pub(crate) corrupt: AtomicU64,
}

impl Endpoint {
    /// Opens the socket and starts to serve.
    pub fn bind(config: EndpointConfig, source: Arc<dyn Source>) -> Result<Self, BindError> {
        let EndpointConfig { listen, identity, limits } = config;
        let socket_error = |error| BindError::Socket { addr: listen, error };
        let server_tls = Arc::new(identity.server()?);
        let client_tls = Arc::new(identity.client()?);
        let socket = socket::open(listen).map_err(socket_error)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(limits.threads.max(1))
            .max_blocking_threads(4)
            .thread_name("baton-transfer")
            .enable_all()
            .build()
            .map_err(BindError::Threads)?;
        let quic = {
            let _inside = runtime.enter();
            quinn::Endpoint::new_with_abstract_socket(
                transport::endpoint(identity.reset_key()),
                Some(serve::server_config(&server_tls, &limits, None)),
                Socket::new(socket).map_err(socket_error)?,
                Arc::new(TokioRuntime),
            )
            .map_err(socket_error)?
        };
        let local_addr = quic.local_addr().map_err(socket_error)?;
        let near = limits.direct.then(Tickets::new).flatten().and_then(|tickets| {
            let _inside = runtime.enter();
            let listener = direct::listen(&tickets.name);
            let listener = listener.inspect_err(
                |error| tracing::warn!(%error, "no socket for agents of this host: blocks travel by QUIC"),
            );
            Some((tickets, listener.ok()?))
        });
        let shared = Arc::new(Shared {
            peers: Peers::new(quic.clone(), client_tls, limits.clone()),
            quic,
            source,
            server_tls,
            pulls: Semaphore::new(limits.max_pulls),
            served: Semaphore::new(limits.max_served),
            accepted: Arc::new(Semaphore::new(limits.max_connections)),
            direct: Arc::new(Semaphore::new(limits.max_connections)),
            tickets: near.as_ref().map(|(tickets, _)| tickets.clone()),
            mappings: Mappings::default(),
            closing: CancellationToken::new(),
            limits,
            counters: Counters::default(),
        });
        runtime.spawn(serve::accept(shared.clone()));
        if let Some((tickets, listener)) = near {
            runtime.spawn(direct::accept(shared.clone(), tickets, listener));
        }
        let handle = runtime.handle().clone();
        Ok(Self {
            running: Arc::new(Running { shared, runtime: Mutex::new(Some(runtime)), handle, local_addr }),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.running.local_addr
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.running.shared
    }

    /// Starts to fetch blocks into `memory`: block `i` of the run goes to `block_ids[i]`.
    pub fn pull(&self, request: PullRequest, memory: Arc<dyn BlockMemory>, block_ids: Vec<u32>) -> Pull {
        pull::start(&self.running.handle, self.running.shared.clone(), request, memory, block_ids)
    }

    /// Connects to a peer, unless connected, and waits until the path's MTU is known, a second at most, so that a first
    /// pull is fast.
    ///
    /// # Cancel safety
    /// Safe to drop; the work goes on for its second.
    pub async fn warm(&self, peer: &Peer) -> Result<PathReport, PullError> {
        let (shared, peer) = (self.running.shared.clone(), peer.clone());
        self.run(async move { probe::warm(&shared, &peer).await }).await
    }

    /// Measures the path from a peer to here with at most `bytes` bytes, and no more than 1 MiB. The peer sends fewer
    /// where it limits probes, to 1 MiB a second for each connection.
    ///
    /// # Cancel safety
    /// Safe to drop; the work goes on.
    pub async fn probe(&self, peer: &Peer, bytes: u32) -> Result<PathReport, PullError> {
        let (shared, peer) = (self.running.shared.clone(), peer.clone());
        self.run(async move { probe::probe(&shared, &peer, bytes).await }).await
    }

    async fn run(
        &self,
        work: impl Future<Output = Result<PathReport, PullError>> + Send + 'static,
    ) -> Result<PathReport, PullError> {
        let work = self.running.handle.spawn(work);
        work.await.unwrap_or_else(|_| Err(PullError::ConnectionLost("the endpoint closed".into())))
    }

    /// Running totals.
    pub fn stats(&self) -> Stats {
        let Shared { counters, quic, .. } = &*self.running.shared;
        Stats {
            sent_bytes: counters.sent.load(Ordering::Relaxed),
            received_bytes: counters.received.load(Ordering::Relaxed),
            direct_bytes: counters.direct.load(Ordering::Relaxed),
            packed_bytes: counters.packed.load(Ordering::Relaxed),
            corrupt_blocks: counters.corrupt.load(Ordering::Relaxed),
            connections: quic.open_connections() as u64,
        }
    }

    /// Closes all connections and waits, at most a second, until the peers were told, and at most another until nothing of
    /// the endpoint runs any more. Pulls in both directions end. The port is free when the last clone is dropped then.
    pub async fn close(&self) {
        self.running.shared.closing.cancel();
        let quic = self.running.shared.quic.clone();
        quic.close(0u8.into(), b"closed");
        let farewell =
            self.running.handle.spawn(async move { tokio::time::timeout(FAREWELL, quic.wait_idle()).await });
        let _ = farewell.await;
        let runtime = self.running.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            // Tasks hold the socket too.
            let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(FAREWELL));
            let _ = ended.await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.quic.close(0u8.into(), b"closed");
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            runtime.shutdown_background();
        }
    }
}
