//! A double of the coordinator: a real gRPC server with mutual TLS, which applies event batches as the control plane's
//! contract says.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use baton_proto::BlockHash;
use baton_proto::control::unpack_hashes;
use baton_proto::control::v1::control_server::{Control, ControlServer};
use baton_proto::control::v1::{self, agent_message::Message as Say, coordinator_message::Message as Said};
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use crate::fleet::{Site, eventually};

/// What it knows of its one agent.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) registers: Vec<v1::Register>,
    pub(crate) epoch: u64,
    pub(crate) applied: u64,
    pub(crate) owned: BTreeSet<(BlockHash, i32)>,
    /// Batches that began with Cleared.
    pub(crate) snapshots: usize,
    pub(crate) batches: usize,
    pub(crate) loads: Vec<v1::EngineLoad>,
    pub(crate) heartbeats: usize,
    pub(crate) links: Vec<v1::LinkSample>,
    pub(crate) transfers: Vec<v1::TransferOutcome>,
    pub(crate) taken: Vec<v1::HoldTaken>,
    tell: Option<mpsc::Sender<Result<v1::CoordinatorMessage, Status>>>,
}

pub(crate) struct Coordinator {
    pub(crate) url: String,
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    sessions: TaskTracker,
    tls: ServerTlsConfig,
}

#[derive(Clone)]
struct Service {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    sessions: TaskTracker,
}

impl Coordinator {
    pub(crate) async fn start(site: &Site) -> Self {
        let (ca, cert, key) = site.certify("coordinator");
        let tls = ServerTlsConfig::new()
            .client_ca_root(Certificate::from_pem(ca))
            .identity(Identity::from_pem(cert, key));
        let seen = Arc::new(Mutex::new(Seen::default()));
        Self::serve("127.0.0.1:0".parse().unwrap(), seen, tls).await
    }

    async fn serve(address: SocketAddr, seen: Arc<Mutex<Seen>>, tls: ServerTlsConfig) -> Self {
        let listener = eventually("the coordinator's port", || TcpListener::bind(address).into_ok()).await;
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let sessions = TaskTracker::new();
        let service = ControlServer::new(Service {
            seen: seen.clone(),
            stop: stop.clone(),
            sessions: sessions.clone(),
        });
        let server = Server::builder().tls_config(tls.clone()).unwrap().add_service(service);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                result = server.serve_with_incoming(TcpListenerStream::new(listener)) => result.unwrap(),
            }
        });
        Self { url: format!("https://{address}"), address, seen, stop, task, sessions, tls }
    }

    /// Ends it with all its connections, and starts it again, with or without what it knew.
    pub(crate) async fn restart(self, remembers: bool) -> Self {
        self.kill().await;
        if !remembers {
            let registers = std::mem::take(&mut lock(&self.seen).registers);
            *lock(&self.seen) = Seen { registers, ..Seen::default() };
        }
        Self::serve(self.address, self.seen.clone(), self.tls.clone()).await
    }

    /// Ends it with all its connections.
    pub(crate) async fn kill(&self) {
        self.stop.cancel();
        eventually("the coordinator's end", || async { self.task.is_finished().then_some(()) }).await;
        self.sessions.close();
        self.sessions.wait().await;
        lock(&self.seen).tell = None;
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    pub(crate) async fn tell(&self, said: Said) {
        let tell = self.seen().tell.clone().expect("no session");
        tell.send(Ok(v1::CoordinatorMessage { message: Some(said) })).await.unwrap();
    }

    /// Waits until what it has seen gives something.
    pub(crate) async fn wait<T>(&self, what: &str, mut probe: impl FnMut(&Seen) -> Option<T>) -> T {
        eventually(what, || {
            let found = probe(&self.seen());
            async move { found }
        })
        .await
    }

    /// Waits until exactly these blocks are known to be owned.
    pub(crate) async fn owns(&self, blocks: &[BlockHash]) {
        let expected: BTreeSet<_> = blocks.iter().map(|hash| (*hash, v1::Tier::Gpu as i32)).collect();
        self.wait(&format!("{} owned blocks", blocks.len()), |seen| (seen.owned == expected).then_some(()))
            .await;
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

trait IntoOk<T> {
    fn into_ok(self) -> impl Future<Output = Option<T>>;
}

impl<T, E, F: Future<Output = Result<T, E>>> IntoOk<T> for F {
    async fn into_ok(self) -> Option<T> {
        self.await.ok()
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap()
}

impl Seen {
    fn take(&mut self, say: Say) -> Option<Said> {
        match say {
            Say::Register(register) => {
                if register.epoch != self.epoch {
                    assert!(register.epoch > self.epoch, "epochs grow");
                    self.epoch = register.epoch;
                    self.applied = 0;
                    self.owned.clear();
                }
                self.registers.push(register);
                let next_event_seq = if self.applied == 0 { 0 } else { self.applied + 1 };
                Some(Said::Registered(v1::Registered { lease_ms: 300, next_event_seq }))
            }
            Say::Heartbeat(_) => {
                self.heartbeats += 1;
                None
            }
            Say::Events(batch) => {
                assert_eq!(batch.epoch, self.epoch);
                self.batches += 1;
                let whole = matches!(batch.events[0].event, Some(v1::kv_event::Event::Cleared(_)));
                self.snapshots += usize::from(whole);
                if batch.seq <= self.applied {
                    return None;
                }
                assert!(whole || batch.seq == self.applied + 1, "{} after {}", batch.seq, self.applied);
                self.applied = batch.seq;
                for event in batch.events {
                    self.apply(event.event.unwrap());
                }
                Some(Said::EventAck(v1::EventAck { epoch: self.epoch, seq: self.applied }))
            }
            Say::Load(load) => {
                self.loads.push(load);
                None
            }
            Say::Link(link) => {
                self.links.push(link);
                None
            }
            Say::Transfer(transfer) => {
                self.transfers.push(transfer);
                None
            }
            Say::HoldTaken(taken) => {
                self.taken.push(taken);
                None
            }
        }
    }

    fn apply(&mut self, event: v1::kv_event::Event) {
        use v1::kv_event::Event;
        match event {
            Event::Cleared(_) => self.owned.clear(),
            Event::Stored(run) => {
                self.owned.extend(unpack_hashes(&run.hashes).unwrap().map(|hash| (hash, run.tier)));
            }
            Event::Removed(run) => {
                for hash in unpack_hashes(&run.hashes).unwrap() {
                    self.owned.remove(&(hash, run.tier));
                }
            }
        }
    }
}

#[tonic::async_trait]
impl Control for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::CoordinatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (seen, stop) = (self.seen.clone(), self.stop.clone());
        let mut messages = request.into_inner();
        let (tell, told) = mpsc::channel(64);
        lock(&seen).tell = Some(tell.clone());
        self.sessions.spawn(async move {
            loop {
                let message = tokio::select! {
                    () = stop.cancelled() => return,
                    message = messages.message() => message,
                };
                let Ok(Some(message)) = message else { return };
                let answer = lock(&seen).take(message.message.unwrap());
                if let Some(said) = answer
                    && tell.send(Ok(v1::CoordinatorMessage { message: Some(said) })).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn route(&self, _: Request<v1::RouteRequest>) -> Result<Response<v1::RouteReply>, Status> {
        Err(Status::unimplemented("no operator calls here"))
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetReply>, Status> {
        Err(Status::unimplemented("no operator calls here"))
    }
}
