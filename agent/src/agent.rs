//! All parts of one agent, put together.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_kv_transfer::tls::Identity as TransferIdentity;
use baton_kv_transfer::{BindError, Endpoint, EndpointConfig, Limits};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::engine::connector::{self, Holds, SocketError};
use crate::engine::kv_events::{self, Endpoints};
use crate::engine::stats::{Poller, Status};
use crate::http;
use crate::metrics::Metrics;
use crate::session::{self, Identity, MAX_REPORTS, Wiring};
use crate::tls::{Pem, TlsError};

/// Batches of the engine's events that may wait to be applied.
const HEARD: usize = 64;
/// Longest wait for the last copies when the agent stops.
const LAST_COPIES: Duration = Duration::from_secs(5);
/// Longest wait for everything else.
const FAREWELL: Duration = Duration::from_secs(2);

/// An agent that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Certificates, as the transfer endpoint reads them.
    #[error(transparent)]
    TransferTls(#[from] baton_kv_transfer::tls::TlsError),
    /// The QUIC endpoint.
    #[error(transparent)]
    Transfer(#[from] BindError),
    /// The connector's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The metrics listener.
    #[error("metrics_listen {addr}: {error}; choose a free address of this host")]
    Metrics {
        /// The address.
        addr: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The coordinator's URL or certificates.
    #[error("coordinator: {0}")]
    Coordinator(#[from] tonic::transport::Error),
    /// The engine id as a name in certificates.
    #[error("engine_id: {0}")]
    Name(#[from] rustls_pki_types::InvalidDnsNameError),
}

/// A running agent. Dropping it stops it without waiting; see [`Agent::stop`].
pub struct Agent {
    stop: CancellationToken,
    endpoint: Arc<Endpoint>,
    connectors: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
    metrics_addr: SocketAddr,
}

impl Agent {
    /// Opens everything and starts to serve. Neither the engine nor the coordinator need to be there.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let pem = Pem::load(&config.tls)?;
        let https = pem.https()?;
        let tls = TransferIdentity::load(&config.tls.ca, &config.tls.cert, &config.tls.key)?;
        let coordinator = tonic::transport::Endpoint::from_shared(config.coordinator.clone())?
            .tls_config(pem.coordinator())?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        let poller = Poller::new(&config.engine.url, &config.engine_id, https)?;
        let metrics_error = |error| StartError::Metrics { addr: config.metrics_listen, error };
        let metrics_listener = TcpListener::bind(config.metrics_listen).await.map_err(metrics_error)?;
        let metrics_addr = metrics_listener.local_addr().map_err(metrics_error)?;

        let metrics = Metrics::default();
        let holds = Holds::new();
        let endpoint = Arc::new(Endpoint::bind(
            EndpointConfig { listen: config.transfer.listen, identity: tls, limits: Limits::default() },
            holds.clone(),
        )?);
        let transfer_address = match &config.transfer.advertise {
            Some(address) => address.clone(),
            // The port may have been left to the system.
            None => endpoint.local_addr().to_string(),
        };
        let stop = CancellationToken::new();
        let (reports, reported) = mpsc::channel(MAX_REPORTS);
        let connectors = connector::start(
            &config.engine.socket,
            config.transfer.wire_dtype,
            &holds,
            Endpoint::clone(&endpoint),
            reports,
            metrics.clone(),
            stop.clone(),
        )?;
        let (heard, hears) = mpsc::channel(HEARD);
        let (status, watched) = watch::channel(Status::default());
        let events = Endpoints { events: config.engine.kv_events, replay: config.engine.kv_events_replay };
        let identity = Identity {
            engine_id: config.engine_id,
            role: config.role,
            engine_url: config.engine.url,
            transfer_address,
        };
        tracing::info!(engine_id = %identity.engine_id, transfer = identity.transfer_address, metrics = %metrics_addr, "the agent is up");
        let wiring = Wiring {
            heard: hears,
            attachment: connectors.attachment,
            status: watched,
            reports: reported,
            release: connectors.release,
            endpoint: Endpoint::clone(&endpoint),
            metrics: metrics.clone(),
        };
        let serve = http::serve(
            metrics_listener,
            metrics.clone(),
            Arc::downgrade(&endpoint),
            stop.clone().cancelled_owned(),
        );
        let tasks = vec![
            tokio::spawn(kv_events::read(events, heard, metrics.clone(), stop.clone())),
            tokio::spawn(poller.run(status, metrics, stop.clone())),
            tokio::spawn(session::run(identity, coordinator, wiring, stop.clone())),
            tokio::spawn(async move {
                if let Err(error) = serve.await {
                    tracing::error!(%error, "metrics_listen");
                }
            }),
        ];
        Ok(Self { stop, endpoint, connectors: connectors.task, tasks, metrics_addr })
    }

    /// Where it serves its metrics.
    pub fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }

    /// Where its QUIC endpoint listens.
    pub fn transfer_addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Ends all holds and pulls, waits for their last copies, tells the engine's connectors, and closes everything:
    /// in some seconds at most.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // The connectors' connections close behind the last copy. Where a copy hangs, the end of the process is its end.
        if timeout(LAST_COPIES, &mut self.connectors).await.is_err() {
            tracing::warn!("copies are still in flight");
        }
        self.endpoint.close().await;
        for task in std::mem::take(&mut self.tasks) {
            let abort = task.abort_handle();
            if timeout(FAREWELL, task).await.is_err() {
                abort.abort();
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
