//! The agent's session with the coordinator: what the engine is and owns, how loaded it is, how transfers went.
//!
//! One task selects what happens next and applies it. It begins a session only while the engine answers, ends it when
//! the engine does not, and otherwise tries for ever, with growing pauses. Holds and pulls do not depend on it.
//!
//! # Bounds
//! Reports that wait for a session: [`MAX_REPORTS`], the oldest of more are dropped. Changes to what the engine owns:
//! see [`outbox`].

pub mod outbox;
mod warm;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_kv_transfer::{Endpoint, Peer};
use baton_proto::control::v1;
use baton_proto::control::v1::control_client::ControlClient;
use baton_proto::{EngineId, TransferId};
use rand::Rng;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use v1::agent_message::Message as Say;
use v1::coordinator_message::Message as Said;

use self::outbox::Outbox;
use crate::config::Role;
use crate::engine::connector::Report;
use crate::engine::connector::core::Attachment;
use crate::engine::kv_events::Heard;
use crate::engine::stats::Status;
use crate::metrics::Metrics;
use crate::ownership::{Applied, Attention, CacheGroup, Ownership};

/// Reports that may wait for a session.
pub const MAX_REPORTS: usize = 1024;
/// Messages that may wait for the connection to take them.
const QUEUE: usize = 16;
/// Changes are collected for this long.
const FLUSH: Duration = Duration::from_millis(5);
/// First and longest pause before a new attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Longest wait for a session to begin.
const BEGIN: Duration = Duration::from_secs(10);
/// Bytes of a probe.
const PROBE: u32 = 1 << 20;
/// Probes at a time; more are ignored, the coordinator asks again.
const PROBES: usize = 2;

/// What an agent says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Unique in the fleet.
    pub engine_id: EngineId,
    /// What the engine is for.
    pub role: Role,
    /// Its OpenAI server, as the coordinator reaches it.
    pub engine_url: String,
    /// host:port of the QUIC endpoint.
    pub transfer_address: String,
}

/// What a session takes in and gives out.
pub struct Wiring {
    /// The engine's events.
    pub heard: mpsc::Receiver<Heard>,
    /// The engine, as its connectors describe it.
    pub attachment: watch::Receiver<Attachment>,
    /// The engine, as its HTTP server describes it.
    pub status: watch::Receiver<Status>,
    /// Transfers.
    pub reports: mpsc::Receiver<Report>,
    /// Holds that the coordinator releases.
    pub release: mpsc::Sender<TransferId>,
    /// For probes and warm connections.
    pub endpoint: Endpoint,
    /// Metrics.
    pub metrics: Metrics,
}

type Attempt = Pin<Box<dyn Future<Output = Result<Streaming<v1::CoordinatorMessage>, tonic::Status>> + Send>>;

enum Link {
    Down { until: Instant },
    Beginning { attempt: Attempt, messages: mpsc::Sender<v1::AgentMessage> },
    Up { said: Box<Streaming<v1::CoordinatorMessage>>, messages: mpsc::Sender<v1::AgentMessage> },
}

enum Event {
    Heard(Heard),
    Attachment,
    Status,
    Report(Report),
    Flush,
    Retry,
    Begun(Result<Streaming<v1::CoordinatorMessage>, tonic::Status>),
    Said(Result<Option<v1::CoordinatorMessage>, tonic::Status>),
    Room,
    Heartbeat,
    Stop,
}

struct Session {
    identity: Identity,
    coordinator: tonic::transport::Endpoint,
    wiring: Wiring,
    /// `None` until model and block size are known.
    ownership: Option<(String, u32, Ownership)>,
    outbox: Outbox,
    flush_at: Option<Instant>,
    link: Link,
    backoff: Duration,
    /// The failure that was logged last.
    complaint: String,
    /// As it was sent last, in this session.
    registered: Option<v1::Register>,
    /// Whether it may have to be sent anew.
    redescribed: bool,
    /// Registers that were not answered yet.
    unanswered: u32,
    heartbeat: Duration,
    heartbeat_at: Instant,
    load_due: bool,
    reports: VecDeque<Say>,
    peers: watch::Sender<Vec<Peer>>,
    probes: Arc<Semaphore>,
    /// Results of probes.
    measured: (mpsc::Sender<Report>, mpsc::Receiver<Report>),
}

/// Runs until `stop` is cancelled.
pub async fn run(
    identity: Identity,
    coordinator: tonic::transport::Endpoint,
    wiring: Wiring,
    stop: CancellationToken,
) {
    let (peers, listed) = watch::channel(Vec::new());
    let warmer = tokio::spawn(warm::keep(wiring.endpoint.clone(), listed, stop.clone()));
    let epoch = wiring.attachment.borrow().epoch;
    let now = Instant::now();
    let mut session = Session {
        identity,
        coordinator,
        wiring,
        ownership: None,
        outbox: Outbox::new(epoch),
        flush_at: None,
        link: Link::Down { until: now },
        backoff: BACKOFF.0,
        complaint: String::new(),
        registered: None,
        redescribed: false,
        unanswered: 0,
        heartbeat: Duration::from_secs(1),
        heartbeat_at: now,
        load_due: false,
        reports: VecDeque::new(),
        peers,
        probes: Arc::new(Semaphore::new(PROBES)),
        measured: mpsc::channel(PROBES),
    };
    loop {
        let event = session.select(&stop).await;
        if matches!(event, Event::Stop) {
            break;
        }
        session.apply(event);
        session.pump();
    }
    drop(session);
    let _ = warmer.await;
}

impl Session {
    async fn select(&mut self, stop: &CancellationToken) -> Event {
        let wiring = &mut self.wiring;
        let listens = self.ownership.is_some();
        let wants = wiring.status.borrow().up && listens;
        let flush_at = self.flush_at;
        let settled = self.unanswered == 0 && (self.load_due || self.outbox.has_batch());
        let waiting = self.redescribed || !self.reports.is_empty() || settled;
        let link = async {
            match &mut self.link {
                Link::Down { until } => {
                    if !wants {
                        return std::future::pending().await;
                    }
                    sleep_until(*until).await;
                    Event::Retry
                }
                Link::Beginning { attempt, .. } => Event::Begun(attempt.await),
                Link::Up { said, messages } => tokio::select! {
                    message = said.message() => Event::Said(message),
                    Ok(_) = messages.reserve(), if waiting => Event::Room,
                    () = sleep_until(self.heartbeat_at) => Event::Heartbeat,
                },
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Event::Stop,
            event = link => event,
            Ok(()) = wiring.attachment.changed() => Event::Attachment,
            Ok(()) = wiring.status.changed() => Event::Status,
            Some(report) = wiring.reports.recv() => Event::Report(report),
            Some(report) = self.measured.1.recv() => Event::Report(report),
            () = sleep_until(flush_at.unwrap_or_else(Instant::now)), if flush_at.is_some() => Event::Flush,
            Some(heard) = wiring.heard.recv(), if listens => Event::Heard(heard),
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Heard(heard) => self.heard(heard),
            Event::Attachment => {
                let epoch = self.wiring.attachment.borrow_and_update().epoch;
                if epoch != self.outbox.epoch() {
                    self.outbox = Outbox::new(epoch);
                    self.flush_at = None;
                }
                self.described();
            }
            Event::Status => {
                self.load_due = true;
                self.described();
                if !self.wiring.status.borrow().up && !matches!(self.link, Link::Down { .. }) {
                    tracing::info!("the session ends: the engine is down");
                    self.down(Duration::ZERO);
                }
            }
            Event::Report(report) => {
                if self.reports.len() == MAX_REPORTS {
                    self.reports.pop_front();
                }
                self.reports.push_back(match report {
                    Report::Outcome(outcome) => Say::Transfer(outcome),
                    Report::HoldTaken(taken) => Say::HoldTaken(taken),
                    Report::Link(sample) => Say::Link(sample),
                });
            }
            Event::Flush => {
                self.flush_at = None;
                self.outbox.flush();
            }
            Event::Retry => self.begin(),
            Event::Begun(Ok(said)) => {
                let Link::Beginning { messages, .. } = &self.link else { return };
                self.link = Link::Up { said: Box::new(said), messages: messages.clone() };
                self.heartbeat_at = Instant::now() + self.heartbeat;
            }
            Event::Begun(Err(status)) | Event::Said(Err(status)) => {
                self.failed(&format!("{:?}: {}", status.code(), status.message()));
            }
            Event::Said(Ok(None)) => self.failed("the coordinator ended it"),
            Event::Said(Ok(Some(message))) => {
                if let Some(said) = message.message {
                    self.said(said);
                }
            }
            Event::Heartbeat => {
                if let Link::Up { messages, .. } = &self.link {
                    // Where there is no room, other messages say as well that the agent lives.
                    let _ = messages.try_send(message(Say::Heartbeat(v1::Heartbeat {})));
                }
                self.heartbeat_at = Instant::now() + self.heartbeat;
            }
            Event::Room | Event::Stop => {}
        }
    }

    fn heard(&mut self, heard: Heard) {
        let Some((_, _, ownership)) = &mut self.ownership else { return };
        let mut applied = Applied::default();
        match heard {
            Heard::Events(events) => {
                for event in &events {
                    ownership.apply(event, &mut applied);
                }
            }
            Heard::Lost => ownership.forget(&mut applied),
        }
        // Ahead of the events, which the coordinator could not place: it asks for all then.
        self.redescribed |= applied.regrouped;
        self.wiring.metrics.set_owned(ownership.len());
        for reason in applied.ignored {
            self.wiring.metrics.event_ignored(reason);
        }
        for change in applied.changes {
            self.outbox.push(change);
        }
        if self.outbox.is_open() && self.flush_at.is_none() {
            self.flush_at = Some(Instant::now() + FLUSH);
        }
    }

    /// What is known of the engine may have changed.
    fn described(&mut self) {
        let (status, attachment) = (self.wiring.status.borrow(), self.wiring.attachment.borrow());
        let block_size = attachment.engine.as_ref().map(|engine| engine.block_size).or(status.block_size);
        let (Some(model), Some(block_size)) = (status.models.first(), block_size) else { return };
        self.redescribed = true;
        let known = self.ownership.as_ref().map(|(model, size, _)| (model.as_str(), *size));
        if known != Some((model, block_size)) {
            if let Some(engine) = &attachment.engine
                && engine.model != *model
            {
                tracing::warn!(
                    served = model,
                    connector = engine.model,
                    "the engine's first model name is not its connector's: blocks are owned under the first"
                );
            }
            tracing::info!(model, block_size, "block hashes are made for this model");
            let renewed = known.is_some();
            self.ownership = Some((model.clone(), block_size, Ownership::new(model, block_size)));
            if renewed {
                self.outbox.push(crate::ownership::Change::Cleared);
                self.outbox.flush();
            }
        }
        let num_blocks = attachment.engine.as_ref().map(|engine| engine.num_blocks).or(status.num_blocks);
        let num_blocks = num_blocks.filter(|blocks| *blocks > 0);
        if let (Some((_, _, ownership)), Some(blocks)) = (&mut self.ownership, num_blocks) {
            ownership.set_capacity(blocks);
        }
    }

    fn register(&self) -> v1::Register {
        let (status, attachment) = (self.wiring.status.borrow(), self.wiring.attachment.borrow());
        let engine = attachment.engine.as_ref();
        let block_size = self.ownership.as_ref().map_or(0, |(_, block_size, _)| *block_size);
        v1::Register {
            engine_id: self.identity.engine_id.to_string(),
            epoch: self.outbox.epoch().0,
            models: status.models.clone(),
            adapters: status.adapters.clone(),
            engine_url: self.identity.engine_url.clone(),
            transfer_address: self.identity.transfer_address.clone(),
            block_size,
            num_blocks: engine.map(|engine| engine.num_blocks).or(status.num_blocks).unwrap_or(0),
            block_bytes: attachment.block_bytes,
            wire_block_bytes: attachment.wire_block_bytes,
            chunk_tokens: match &attachment.engine {
                Some(engine) if attachment.can_transfer => engine.chunk_tokens,
                _ => 0,
            },
            role: v1::Role::from(self.identity.role).into(),
            can_transfer: attachment.can_transfer,
            layout: attachment.layout.clone(),
            last_event_seq: self.outbox.last_seq(),
            groups: self
                .ownership
                .iter()
                .flat_map(|(_, _, ownership)| ownership.groups())
                .map(group)
                .collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn begin(&mut self) {
        let (messages, queue) = mpsc::channel(QUEUE);
        let register = self.register();
        // There is room: the queue is new.
        let _ = messages.try_send(message(Say::Register(register.clone())));
        self.registered = Some(register);
        self.redescribed = false;
        self.unanswered = 1;
        let coordinator = self.coordinator.clone();
        let attempt = Box::pin(async move {
            let begin = async {
                let channel = coordinator
                    .connect()
                    .await
                    .map_err(|error| tonic::Status::unavailable(crate::causes(&error)))?;
                ControlClient::new(channel).session(ReceiverStream::new(queue)).await
            };
            match tokio::time::timeout(BEGIN, begin).await {
                Ok(answer) => Ok(answer?.into_inner()),
                Err(_) => Err(tonic::Status::deadline_exceeded("no answer")),
            }
        });
        self.link = Link::Beginning { attempt, messages };
    }

    fn failed(&mut self, why: &str) {
        if self.complaint != why {
            tracing::warn!(coordinator = %self.coordinator.uri(), why, "no session with the coordinator; trying again");
            why.clone_into(&mut self.complaint);
        }
        let pause = self.backoff.mul_f64(rand::rng().random_range(0.5..1.0));
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        self.down(pause);
    }

    fn down(&mut self, pause: Duration) {
        self.link = Link::Down { until: Instant::now() + pause };
        self.outbox.suspend();
        self.registered = None;
        self.unanswered = 0;
        self.wiring.metrics.set_coordinator_up(false);
    }

    fn said(&mut self, said: Said) {
        match said {
            Said::Registered(v1::Registered { lease_ms, next_event_seq }) => {
                self.unanswered = self.unanswered.saturating_sub(1);
                self.heartbeat = Duration::from_millis(u64::from(lease_ms) / 3)
                    .clamp(Duration::from_millis(20), Duration::from_secs(10));
                self.heartbeat_at = self.heartbeat_at.min(Instant::now() + self.heartbeat);
                if self.unanswered > 0 {
                    return;
                }
                tracing::info!(epoch = %self.outbox.epoch(), lease_ms, next_event_seq, "registered with the coordinator");
                self.outbox.resume(next_event_seq);
                self.backoff = BACKOFF.0;
                self.complaint.clear();
                self.load_due = true;
                self.wiring.metrics.set_coordinator_up(true);
            }
            Said::EventAck(v1::EventAck { epoch, seq }) => tracing::trace!(epoch, seq, "events are applied"),
            Said::Resync(v1::Resync { reason }) => {
                tracing::info!(reason, "the coordinator asks for all that the engine owns");
                self.outbox.demand_snapshot();
            }
            Said::ReleaseHold(v1::ReleaseHold { transfer_id }) => {
                match <[u8; 16]>::try_from(&transfer_id[..]) {
                    Ok(bytes) => {
                        // Where there is no room, the lease ends the hold.
                        let _ = self.wiring.release.try_send(TransferId::from_bytes(bytes));
                    }
                    Err(_) => {
                        tracing::warn!(bytes = transfer_id.len(), "release_hold.transfer_id: not 16 bytes")
                    }
                }
            }
            Said::ProbeLink(v1::ProbeLink { engine_id, transfer_address }) => {
                self.probe(&engine_id, transfer_address);
            }
            Said::Peers(list) => {
                let peers = warm::peers(&self.identity.engine_id, list);
                self.peers.send_if_modified(|known| {
                    let changed = *known != peers;
                    *known = peers;
                    changed
                });
            }
        }
    }

    fn probe(&self, engine_id: &str, address: String) {
        let Ok(engine_id) = engine_id.parse::<EngineId>() else {
            tracing::warn!(engine_id, "probe_link.engine_id: no engine id");
            return;
        };
        let Ok(permit) = self.probes.clone().try_acquire_owned() else { return };
        let (endpoint, measured) = (self.wiring.endpoint.clone(), self.measured.0.clone());
        tokio::spawn(async move {
            let peer = Peer { engine_id, address };
            let began = Instant::now();
            let path = endpoint.probe(&peer, PROBE).await;
            let source = peer.engine_id.into();
            let sample = match path {
                Ok(path) => v1::LinkSample {
                    source,
                    bytes: path.bytes,
                    seconds: path.elapsed.as_secs_f64(),
                    rtt_seconds: path.rtt.as_secs_f64(),
                    given_up: false,
                },
                Err(error) => {
                    tracing::debug!(%error, "probe");
                    let seconds = began.elapsed().as_secs_f64();
                    v1::LinkSample { source, bytes: 0, seconds, rtt_seconds: 0.0, given_up: true }
                }
            };
            let _ = measured.send(Report::Link(sample)).await;
            drop(permit);
        });
    }

    /// Sends what there is, as far as there is room.
    fn pump(&mut self) {
        let Link::Up { messages, .. } = &self.link else { return };
        let messages = messages.clone();
        while let Ok(permit) = messages.try_reserve() {
            let Some(say) = self.next_message() else { break };
            permit.send(message(say));
            self.heartbeat_at = Instant::now() + self.heartbeat;
        }
    }

    fn next_message(&mut self) -> Option<Say> {
        if std::mem::take(&mut self.redescribed) {
            let register = self.register();
            let unchanged = self.registered.as_ref().is_some_and(|known| {
                let last_event_seq = known.last_event_seq;
                *known == v1::Register { last_event_seq, ..register.clone() }
            });
            if !unchanged {
                self.outbox.suspend();
                self.unanswered += 1;
                self.registered = Some(register.clone());
                return Some(Say::Register(register));
            }
        }
        if let Some(report) = self.reports.pop_front() {
            return Some(report);
        }
        if self.unanswered > 0 {
            return None;
        }
        if std::mem::take(&mut self.load_due) {
            return Some(Say::Load(self.wiring.status.borrow().load));
        }
        let owned = self.ownership.as_ref().map(|(_, _, ownership)| ownership);
        let metrics = &self.wiring.metrics;
        let batch =
            self.outbox.take(|| owned.into_iter().flat_map(Ownership::iter), || metrics.snapshot())?;
        Some(Say::Events(batch))
    }
}

fn group(group: &CacheGroup) -> v1::CacheGroup {
    let (attention, window) = match group.attention {
        Attention::Full => (v1::Attention::Full, 0),
        Attention::SlidingWindow(window) => (v1::Attention::SlidingWindow, window),
        Attention::State => (v1::Attention::State, 0),
    };
    v1::CacheGroup { attention: attention.into(), window, block_size: group.block_size }
}

fn message(say: Say) -> v1::AgentMessage {
    v1::AgentMessage { message: Some(say) }
}
