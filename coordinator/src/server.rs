//! Putting the parts together, and taking them down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::ownership::{self, Ownership, StoreError};
use crate::state::Coordinator;
use crate::tls::{Identity, TlsError};
use crate::tokenizer::{ModelError, Models};
use crate::{control, http};

/// How often ownership is written.
const FLUSH: Duration = Duration::from_secs(1);
/// Between two rounds of probes.
const PROBE: Duration = Duration::from_secs(1);
/// Between two plans of what engines are to do.
const PLAN: Duration = Duration::from_secs(1);
/// The longest pause after failed writes.
const FLUSH_AT_LEAST: Duration = Duration::from_secs(10);

/// The coordinator could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No usable certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A model directory cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The store does not answer.
    #[error("store: {0}")]
    Store(#[from] StoreError),
    /// An address cannot be listened on.
    #[error("{field}: {address}: {source}")]
    Listen {
        /// The configuration field.
        field: &'static str,
        /// Its address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A running coordinator.
pub struct Server {
    /// What its parts share.
    pub coordinator: Arc<Coordinator>,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where agents connect.
    pub control_address: SocketAddr,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts everything. When it returns, both addresses are listened on and what the store held is back.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let identity = Identity::load(&config.tls)?;
        identity.check_own_name()?;
        let client_tls = identity.client()?;
        identity.server()?;
        let models = Models::load(&config.models, config.limits.tokenizer_queue)?;
        for model in models.iter() {
            if let Err(why) = model.can_chat() {
                warn!(model = model.name(), why, "chats of this model are placed by load alone");
            }
        }
        let store = ownership::open(&config).await?;
        let (listener, address) = listen("listen", config.listen).await?;
        let (control_listener, control_address) = listen("control_listen", config.control_listen).await?;

        let coordinator = Arc::new(Coordinator::new(config, client_tls, Ownership::new(store), models));
        let restored =
            coordinator.ownership.restore(&coordinator.registry, &coordinator.index, Instant::now()).await?;
        coordinator.restored();
        coordinator.expire(Instant::now());
        info!(
            engines = restored.engines,
            blocks = restored.blocks,
            incomplete = restored.incomplete,
            "ownership restored"
        );

        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        let serving = http::serve(coordinator.clone(), listener, stop.clone());
        let end = stop.clone();
        tasks.push(tokio::spawn(async move {
            if let Err(error) = serving.await {
                error!(%error, "the HTTP server ended");
            }
            end.cancel();
        }));
        let (shared, end) = (coordinator.clone(), stop.clone());
        tasks.push(tokio::spawn(async move {
            if let Err(error) = control::serve(shared, &identity, control_listener, end.clone()).await {
                error!(%error, "the control plane ended");
            }
            end.cancel();
        }));
        tasks.push(tokio::spawn(watch_leases(coordinator.clone(), stop.clone())));
        tasks.push(tokio::spawn(probe_links(coordinator.clone(), stop.clone())));
        tasks.push(tokio::spawn(plan_parts(coordinator.clone(), stop.clone())));
        tasks.push(tokio::spawn(keep_ownership(coordinator.clone(), stop.clone())));
        info!(%address, %control_address, "serving");
        Ok(Self { coordinator, address, control_address, stop, tasks })
    }

    /// Done when the server was stopped, or ended by itself.
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Stops: no new requests, some seconds for those in flight, a last write of ownership.
    pub async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

async fn listen(field: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let error = |source| StartError::Listen { field, address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

async fn watch_leases(coordinator: Arc<Coordinator>, stop: CancellationToken) {
    let mut ticks = interval(coordinator.config.limits.lease() / 4);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => coordinator.expire(Instant::now()),
            () = stop.cancelled() => return,
        }
    }
}

async fn probe_links(coordinator: Arc<Coordinator>, stop: CancellationToken) {
    let mut ticks = interval(PROBE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => coordinator.registry.probe(Instant::now()),
            () = stop.cancelled() => return,
        }
    }
}

async fn plan_parts(coordinator: Arc<Coordinator>, stop: CancellationToken) {
    let mut ticks = interval(PLAN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let planning = coordinator.clone();
                if let Err(error) = tokio::task::spawn_blocking(move || planning.plan()).await {
                    error!(%error, "the planner ended");
                }
            }
            () = stop.cancelled() => return,
        }
    }
}

async fn keep_ownership(coordinator: Arc<Coordinator>, stop: CancellationToken) {
    let mut pause = FLUSH;
    loop {
        let stopped = tokio::select! {
            () = tokio::time::sleep(pause) => false,
            () = stop.cancelled() => true,
        };
        let flushed = coordinator
            .ownership
            .flush(&coordinator.registry, &coordinator.index, &coordinator.metrics)
            .await;
        pause = match flushed {
            Ok(()) => FLUSH,
            Err(error) => {
                warn!(%error, "ownership could not be written; it is tried again");
                (pause * 2).min(FLUSH_AT_LEAST)
            }
        };
        if stopped {
            return;
        }
    }
}
