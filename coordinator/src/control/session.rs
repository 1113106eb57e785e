//! One agent's session.
//!
//! The agent registers, then both sides talk until the stream ends. A session is taken in by one task, which handles
//! the agent's messages in their order and writes the answers; commands from elsewhere reach it through a bounded queue.

use std::sync::Arc;

use baton_proto::control::v1;
use baton_proto::control::v1::agent_message::Message as Said;
use baton_proto::control::v1::coordinator_message::Message as Answer;
use baton_proto::plan::Held;
use baton_proto::{Epoch, TransferId};
use futures::Stream;
use rustls_pki_types::CertificateDer;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use crate::registry::{COMMAND_QUEUE, PeerMap, RegisterError, Registered, Registration};
use crate::state::{BatchError, Coordinator, Ingested};
use crate::tls::is_certificate_of;
use crate::tokenizer::agreement;

/// Answers that may wait for the agent to read them. Past it we stop reading what the agent says.
const ANSWERS: usize = 64;
/// Most peers that an agent is told.
const MAX_PEERS: usize = 256;

type Answers = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// Runs the session in a task of its own and gives what it says.
pub(super) fn start(
    coordinator: Arc<Coordinator>,
    certificate: CertificateDer<'static>,
    said: Streaming<v1::AgentMessage>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<v1::CoordinatorMessage, Status>> {
    let (answers, stream) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = run(&coordinator, &certificate, said, &answers) => ended,
            () = stop.cancelled() => Err(Status::unavailable("the coordinator is stopping")),
        };
        if let Err(status) = ended {
            debug!(code = ?status.code(), reason = status.message(), "session ended");
            let _ = answers.send(Err(status)).await;
        }
    });
    ReceiverStream::new(stream)
}

async fn run(
    coordinator: &Arc<Coordinator>,
    certificate: &CertificateDer<'_>,
    mut said: Streaming<v1::AgentMessage>,
    answers: &Answers,
) -> Result<(), Status> {
    let first = said.message().await?.and_then(|message| message.message);
    let Some(Said::Register(register)) = first else {
        return Err(Status::failed_precondition("the first message must be Register"));
    };
    let (mut commands, mut session) = Session::open(coordinator, certificate, register)?;
    session.greet(answers).await?;
    let mut peers = coordinator.registry.peers();
    peers.mark_changed();
    loop {
        tokio::select! {
            message = said.message() => {
                let Some(message) = message? else { return Ok(()) };
                // A message of a later version of the protocol still shows that the agent lives.
                session.registered.entry.heard(Instant::now());
                let Some(message) = message.message else { continue };
                if let Said::Register(register) = message {
                    let engine = session.registered.entry.id.as_str();
                    if register.engine_id != engine {
                        return Err(Status::invalid_argument(format!("engine_id: this session is {engine}'s")));
                    }
                    // The new queue is made before the old session ends: there is no moment without one.
                    (commands, session) = Session::open(coordinator, certificate, register)?;
                    session.greet(answers).await?;
                    peers.mark_changed();
                } else if let Some(answer) = session.handle(message)? {
                    send(answers, answer).await?;
                }
            }
            command = commands.recv() => match command {
                Some(command) => send(answers, command).await?,
                None => return Err(Status::aborted("the lease ran out or a newer session took over: connect again")),
            },
            Ok(()) = peers.changed() => {
                if let Some(answer) = session.peers(&mut peers) {
                    send(answers, answer).await?;
                }
            }
        }
    }
}

async fn send(answers: &Answers, answer: Answer) -> Result<(), Status> {
    let message = v1::CoordinatorMessage { message: Some(answer) };
    answers.send(Ok(message)).await.map_err(|_| Status::cancelled("the agent went away"))
}

/// A registered session; dropping it ends it.
struct Session<'a> {
    coordinator: &'a Coordinator,
    registered: Registered,
    epoch: u64,
    layout: String,
    told_peers: Option<Vec<v1::Peer>>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.coordinator.registry.disconnected(&self.registered.entry, self.registered.session);
    }
}

impl<'a> Session<'a> {
    fn open(
        coordinator: &'a Arc<Coordinator>,
        certificate: &CertificateDer<'_>,
        register: v1::Register,
    ) -> Result<(mpsc::Receiver<Answer>, Self), Status> {
        let registration =
            Registration::check(register).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let id = registration.engine_id.clone();
        if !is_certificate_of(certificate, &id) {
            return Err(Status::permission_denied(format!(
                "engine_id: the client's certificate does not carry the DNS name {id}: issue one for it"
            )));
        }
        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let (epoch, layout) = (registration.epoch.0, registration.message.layout.clone());
        let can_transfer = registration.message.can_transfer;
        let registered = coordinator.register(registration, sender).map_err(|error| match error {
            RegisterError::OldEpoch { .. } => Status::failed_precondition(error.to_string()),
            RegisterError::Full(_) => Status::resource_exhausted(error.to_string()),
        })?;
        if registered.emptied {
            agreement::check(coordinator.clone(), registered.entry.clone());
        }
        info!(engine = %id, epoch, can_transfer, next_event_seq = registered.next_event_seq, "registered");
        Ok((commands, Self { coordinator, registered, epoch, layout, told_peers: None }))
    }

    async fn greet(&self, answers: &Answers) -> Result<(), Status> {
        let lease_ms = self.coordinator.config.limits.lease_ms;
        let next_event_seq = self.registered.next_event_seq;
        send(answers, Answer::Registered(v1::Registered { lease_ms, next_event_seq })).await
    }

    fn handle(&self, message: Said) -> Result<Option<Answer>, Status> {
        let (coordinator, entry) = (self.coordinator, &self.registered.entry);
        match message {
            Said::Register(_) | Said::Heartbeat(_) => {}
            Said::Events(batch) => {
                let ingested =
                    coordinator.ingest(entry, self.epoch, &batch).map_err(|error| match error {
                        BatchError::OtherEpoch { .. } => Status::failed_precondition(error.to_string()),
                        BatchError::Field(_) | BatchError::Group(_) => {
                            Status::invalid_argument(error.to_string())
                        }
                    })?;
                return Ok(match ingested {
                    Ingested::Upto(seq) => Some(Answer::EventAck(v1::EventAck { epoch: self.epoch, seq })),
                    Ingested::AskAll => {
                        let reason = format!("batch {} came, {} was due", batch.seq, entry.applied_seq() + 1);
                        warn!(engine = %entry.id, reason, "events are missing: asked for all");
                        Some(Answer::Resync(v1::Resync { reason }))
                    }
                    Ingested::Waiting => None,
                });
            }
            Said::Load(load) => entry.report(load),
            Said::HoldTaken(taken) => {
                let id = <[u8; 16]>::try_from(&taken.transfer_id[..]);
                let id = id.map_err(|_| Status::invalid_argument("hold_taken.transfer_id: send 16 bytes"))?;
                entry.hold_taken(Held {
                    transfer_id: TransferId::from_bytes(id),
                    epoch: Epoch(taken.epoch),
                    num_tokens: taken.num_tokens,
                });
            }
            Said::Link(sample) => coordinator.link_sample(entry, &sample),
            Said::Transfer(outcome) => {
                let metrics = &coordinator.metrics;
                match outcome.state() {
                    v1::TransferState::Unspecified => {}
                    v1::TransferState::Completed => {
                        metrics.transfers_completed.inc();
                    }
                    v1::TransferState::Failed => {
                        metrics.transfers_failed.inc();
                        debug!(engine = %entry.id, error = outcome.error, "a transfer failed");
                    }
                    v1::TransferState::Expired => {
                        metrics.transfers_expired.inc();
                    }
                }
            }
        }
        Ok(None)
    }

    /// The agents that this one may pull from, if they changed since it was told.
    fn peers(&mut self, all: &mut watch::Receiver<Arc<PeerMap>>) -> Option<Answer> {
        let own = &self.registered.entry.id;
        let peers: Vec<v1::Peer> = all
            .borrow_and_update()
            .iter()
            .filter(|(id, (_, layout))| *id != own && !layout.is_empty() && *layout == self.layout)
            .take(MAX_PEERS)
            .map(|(id, (address, _))| v1::Peer {
                engine_id: id.to_string(),
                transfer_address: address.clone(),
            })
            .collect();
        if self.told_peers.as_ref() == Some(&peers) {
            return None;
        }
        self.told_peers = Some(peers.clone());
        Some(Answer::Peers(v1::Peers { peers }))
    }
}
