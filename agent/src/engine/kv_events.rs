//! Reads an engine's KV events, exactly: every batch once and in order, or a word that something was lost.
//!
//! One ZMQ `SUB` socket follows the live stream: frames `topic`, 8-byte big-endian number, msgpack batch. One
//! `DEALER` socket asks the engine's replay `ROUTER`: frames empty, 8-byte big-endian number to begin from; the
//! answer is any number of messages empty, `topic` (not in older versions), number, batch, and a last one with number -1.
//!
//! The subscription comes first and the replay second, so that nothing falls between; what comes twice is
//! ignored. After every reconnection, at every gap and after [`QUIET`] without a word, the replay tells
//! whether the stream is still the same and what was missed. Where it cannot, all that was known is forgotten
//! and what the engine can still replay is learnt anew.
//!
//! # Bounds
//! While a replay runs, or the receiver is slow, the live stream is not read: the engine's own queue takes it up,
//! and drops at its high-water mark, which shows as a gap. A batch of more than
//! [`super::event::MAX_BATCH`] bytes is not read.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use zeromq::{DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, SubSocket, ZmqError, ZmqMessage};

use super::event::{KvEvent, read_batch};
use super::sequence::{Sequence, Standing};
use crate::metrics::{GapMend, Metrics};

/// Silence after which the reader asks whether it missed anything.
pub const QUIET: Duration = Duration::from_secs(5);
/// Longest wait for a connection, and for the next message of a replay.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a replay is asked for before all is forgotten.
const REPLAY_ATTEMPTS: usize = 3;
/// Pause before connecting or asking again.
const RECONNECT: Duration = Duration::from_millis(200);

/// What the reader says.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// A batch, in order.
    Events(Vec<KvEvent>),
    /// Events were lost: nothing that was heard before holds any more.
    Lost,
}

/// Where the engine publishes.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// Live stream.
    pub events: String,
    /// Replay.
    pub replay: Option<String>,
}

/// The receiver is gone.
struct Closed;

#[derive(Debug, thiserror::Error)]
enum ReplayError {
    #[error("no replay endpoint is configured")]
    NotConfigured,
    #[error("no answer within {}s", PATIENCE.as_secs())]
    Timeout,
    #[error("{0}")]
    Socket(#[from] ZmqError),
    #[error("the engine closed the connection")]
    Disconnected,
    #[error("answer of {0} frames")]
    Malformed(usize),
}

type Monitor = futures::channel::mpsc::Receiver<SocketEvent>;

/// The socket that asks, and word of its connection.
struct Asker {
    socket: DealerSocket,
    monitor: Monitor,
}

/// Reads until `stop` is cancelled or the receiver is gone; connects anew whenever the engine goes away.
pub async fn read(
    endpoints: Endpoints,
    heard: mpsc::Sender<Heard>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut reader =
        Reader { endpoints, heard, metrics, sequence: Sequence::default(), losses: 0, replay: None };
    tokio::select! {
        () = stop.cancelled() => {}
        Closed = reader.run() => {}
    }
}

struct Reader {
    endpoints: Endpoints,
    heard: mpsc::Sender<Heard>,
    metrics: Metrics,
    sequence: Sequence,
    /// How often all was forgotten.
    losses: u64,
    /// Kept between replays.
    replay: Option<Asker>,
}

impl Reader {
    async fn run(&mut self) -> Closed {
        loop {
            match timeout(PATIENCE, subscribe(&self.endpoints.events)).await {
                Ok(Ok(socket)) => {
                    tracing::info!(endpoint = self.endpoints.events, "reading the engine's KV events");
                    if let Err(closed) = self.follow(socket).await {
                        return closed;
                    }
                    tracing::info!(endpoint = self.endpoints.events, "the engine's KV events ended");
                }
                Ok(Err(error)) => {
                    tracing::warn!(endpoint = self.endpoints.events, %error, "engine's KV events")
                }
                // The engine is not up; its other interfaces tell so.
                Err(_) => {}
            }
            self.replay = None;
            sleep(RECONNECT).await;
        }
    }

    /// Reads one connection to its end.
    async fn follow(&mut self, Subscription { mut socket, mut monitor }: Subscription) -> Result<(), Closed> {
        self.catch_up(REPLAY_ATTEMPTS).await?;
        loop {
            tokio::select! {
                biased;
                // Before any message: what comes after this one may be of another life of the engine.
                event = monitor.next() => match event {
                    Some(SocketEvent::Disconnected(_)) | None => return Ok(()),
                    Some(_) => {}
                },
                message = timeout(QUIET, socket.recv()) => match message {
                    Ok(Ok(message)) => self.live(message).await?,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "engine's KV events");
                        return Ok(());
                    }
                    // Silence is no sign of a loss: where the replay fails, all stays as it is.
                    Err(_) if self.endpoints.replay.is_some() => self.catch_up(0).await?,
                    Err(_) => {}
                },
            }
        }
    }

    async fn live(&mut self, message: ZmqMessage) -> Result<(), Closed> {
        let frames = message.into_vec();
        let [_, seq, payload] = &frames[..] else {
            tracing::warn!(frames = frames.len(), "KV event message with other than three frames");
            return Ok(());
        };
        let Some(seq) = number(seq) else {
            tracing::warn!(bytes = seq.len(), "KV event message whose number is not of 8 bytes");
            return Ok(());
        };
        match self.sequence.judge(seq) {
            Standing::Duplicate => Ok(()),
            Standing::Next => self.apply(seq, payload).await,
            Standing::Gap => self.mend_gap(seq, payload).await,
        }
    }

    async fn mend_gap(&mut self, seq: u64, payload: &Bytes) -> Result<(), Closed> {
        let (last, losses) = (self.sequence.last(), self.losses);
        self.catch_up(REPLAY_ATTEMPTS).await?;
        match self.sequence.judge(seq) {
            Standing::Duplicate => {}
            Standing::Next => self.apply(seq, payload).await?,
            Standing::Gap => {
                self.forget().await?;
                self.apply(seq, payload).await?;
            }
        }
        // Before the first batch there was nothing to lose.
        if last.is_some() {
            let mend = if self.losses == losses { GapMend::Replayed } else { GapMend::Resynced };
            tracing::warn!(last, seq, mend = mend.label(), "KV events were lost");
            self.metrics.event_gap(mend);
        }
        Ok(())
    }

    /// Learns from the replay what was missed. Where it cannot be had in `attempts` attempts, or belongs to
    /// another life of the engine, all is forgotten; with none, it is tried once and a failure changes nothing.
    async fn catch_up(&mut self, attempts: usize) -> Result<(), Closed> {
        let Some(last) = self.sequence.last() else { return self.learn_anew(attempts > 0).await };
        for attempt in 1..=attempts.max(1) {
            match self.replay_from(last).await? {
                Ok(true) => return Ok(()),
                Ok(false) => break,
                Err(ReplayError::NotConfigured) => break,
                Err(error) if attempts == 0 => {
                    tracing::debug!(%error, "replay of KV events");
                    return Ok(());
                }
                Err(error) => tracing::warn!(%error, attempt, "replay of KV events"),
            }
            if attempt < attempts {
                sleep(RECONNECT).await;
            }
        }
        self.forget().await?;
        self.learn_anew(true).await
    }

    /// Applies all that the engine still has, where nothing is known. Where it cannot be had, the next word of the
    /// live stream is a gap and asks again.
    async fn learn_anew(&mut self, complain: bool) -> Result<(), Closed> {
        match self.replay_from(0).await? {
            Ok(_) | Err(ReplayError::NotConfigured) => {}
            Err(error) if complain => tracing::warn!(%error, "replay of KV events"),
            Err(error) => tracing::debug!(%error, "replay of KV events"),
        }
        Ok(())
    }

    /// Applies a replay that begins at `from`: all of it where nothing is known, else only where it begins with
    /// the last batch known. Says whether it was applied.
    async fn replay_from(&mut self, from: u64) -> Result<Result<bool, ReplayError>, Closed> {
        let anew = self.sequence.last().is_none();
        let mut trusted = anew;
        let mut first = true;
        if let Err(error) = self.ask_replay(from).await {
            self.replay = None;
            return Ok(Err(error));
        }
        loop {
            let (seq, payload) = match self.next_replayed().await {
                Ok(Some(batch)) => batch,
                Ok(None) => return Ok(Ok(trusted)),
                Err(error) => {
                    self.replay = None;
                    return Ok(Err(error));
                }
            };
            let standing = self.sequence.judge(seq);
            if std::mem::take(&mut first) {
                if !anew {
                    trusted = self.sequence.is_last(seq, &payload);
                } else if standing == Standing::Gap {
                    tracing::warn!(
                        seq,
                        "the engine replays its KV events from here only: older blocks are not known"
                    );
                    self.apply(seq, &payload).await?;
                    continue;
                }
            }
            match standing {
                _ if !trusted => {}
                Standing::Duplicate => {}
                Standing::Next => self.apply(seq, &payload).await?,
                Standing::Gap => {
                    // The engine itself has lost some.
                    self.forget().await?;
                    self.apply(seq, &payload).await?;
                }
            }
        }
    }

    async fn ask_replay(&mut self, from: u64) -> Result<(), ReplayError> {
        let endpoint = self.endpoints.replay.as_deref().ok_or(ReplayError::NotConfigured)?;
        let asker = match &mut self.replay {
            Some(asker) => asker,
            None => {
                let mut socket = DealerSocket::new();
                let monitor = socket.monitor();
                timeout(PATIENCE, socket.connect(endpoint)).await.map_err(|_| ReplayError::Timeout)??;
                self.replay.insert(Asker { socket, monitor })
            }
        };
        let mut request = ZmqMessage::from(Bytes::new());
        request.push_back(Bytes::copy_from_slice(&from.to_be_bytes()));
        timeout(PATIENCE, asker.socket.send(request)).await.map_err(|_| ReplayError::Timeout)??;
        Ok(())
    }

    /// The next batch of the replay that was asked for; `None` at its end.
    async fn next_replayed(&mut self) -> Result<Option<(u64, Bytes)>, ReplayError> {
        let asker = self.replay.as_mut().ok_or(ReplayError::NotConfigured)?;
        let message = loop {
            tokio::select! {
                event = asker.monitor.next() => match event {
                    Some(SocketEvent::Disconnected(_)) | None => return Err(ReplayError::Disconnected),
                    Some(_) => {}
                },
                message = timeout(PATIENCE, asker.socket.recv()) => {
                    break message.map_err(|_| ReplayError::Timeout)??;
                }
            }
        };
        let frames = message.into_vec();
        let (seq, payload) = match &frames[..] {
            [_, seq, payload] | [_, _, seq, payload] => (seq, payload),
            _ => return Err(ReplayError::Malformed(frames.len())),
        };
        match number(seq) {
            Some(u64::MAX) => Ok(None),
            Some(seq) => Ok(Some((seq, payload.clone()))),
            None => Err(ReplayError::Malformed(frames.len())),
        }
    }

    async fn apply(&mut self, seq: u64, payload: &Bytes) -> Result<(), Closed> {
        let heard = match read_batch(payload) {
            Ok(events) => Heard::Events(events),
            Err(error) => {
                // What it said is not known: it may have been a removal.
                tracing::warn!(seq, %error, "KV events cannot be read");
                self.metrics.event_gap(GapMend::Resynced);
                Heard::Lost
            }
        };
        self.sequence.applied(seq, payload);
        self.heard.send(heard).await.map_err(|_| Closed)
    }

    async fn forget(&mut self) -> Result<(), Closed> {
        self.losses += 1;
        self.sequence.forget();
        self.heard.send(Heard::Lost).await.map_err(|_| Closed)
    }
}

/// The socket that listens, and word of its connection from its beginning on.
struct Subscription {
    socket: SubSocket,
    monitor: Monitor,
}

async fn subscribe(endpoint: &str) -> Result<Subscription, ZmqError> {
    let mut socket = SubSocket::new();
    let monitor = socket.monitor();
    socket.subscribe("").await?;
    socket.connect(endpoint).await?;
    Ok(Subscription { socket, monitor })
}

fn number(frame: &[u8]) -> Option<u64> {
    frame.try_into().ok().map(u64::from_be_bytes)
}
