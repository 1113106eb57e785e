//! The engine's connectors: accepts them on a Unix socket and does what [`core`] decides.
//!
//! # Bounds
//! [`MAX_CONNECTIONS`] connections; for each, one message of [`MAX_MESSAGE`](baton_proto::connector::MAX_MESSAGE)
//! that is being read and [`QUEUE`] that wait to be written. One whose connector does not read that many is cut off,
//! which ends the engine's epoch.

pub mod core;
mod outcomes;
mod socket;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use baton_kernels::cuda::{CudaMemory, DEFAULT_PINNED_BYTES};
use baton_kernels::{BlockMemory, EngineMemory, MemoryError, Sliced};
use baton_kv_transfer::checksum::{digest, of_block};
use baton_kv_transfer::{Canceller, Endpoint, HeldBlocks, HoldTable, PullRequest, SendReport, Source};
use baton_proto::block_hash::BlockHasher;
use baton_proto::connector::{Content, Hello, Layout, ToAgent, ToConnector};
use baton_proto::control::v1;
use baton_proto::wire::{PullHeader, WireDtype, WireError};
use baton_proto::{BlockHash, Epoch, TransferId};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Level;

use self::core::{
    Action, Attachment, ChecksumJob, ConnId, Core, Extra, Input, MAX_HOLDS, Mapped, Now, PullId, Storages,
    lock,
};
pub use self::socket::SocketError;
use self::socket::{Listener, Reader, encode};
use crate::metrics::Metrics;

/// Connections at a time.
pub const MAX_CONNECTIONS: usize = 128;
/// Messages that may wait for a connector to read them.
pub const QUEUE: usize = 4096;
/// A connection that says no hello in this time is cut off.
const HELLO: Duration = Duration::from_secs(10);
/// A closed connection that takes no last word in this time is cut off.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Content of more tokens is hashed off the connection's own task.
const HASH_INLINE: usize = 64 << 10;

/// Target of the audit log: one line for each side of a transfer, at debug level.
const AUDIT: &str = "baton::audit";

/// What the connectors' side tells the coordinator's.
#[derive(Debug)]
pub enum Report {
    /// A handoff ended.
    Outcome(v1::TransferOutcome),
    /// A prompt's blocks may be pulled as they are computed.
    HoldTaken(v1::HoldTaken),
    /// A transfer measured a link.
    Link(v1::LinkSample),
}

/// Serves pulls of what the engine holds.
pub struct Holds {
    table: Arc<Mutex<HoldTable>>,
    woken: Arc<Notify>,
}

impl Holds {
    /// None, in the agent's first epoch.
    pub fn new() -> Arc<Self> {
        let woken = Arc::new(Notify::new());
        let wake = {
            let woken = woken.clone();
            Arc::new(move || woken.notify_one())
        };
        let table = HoldTable::new(Epoch(unix_ms()), MAX_HOLDS, wake);
        Arc::new(Self { table: Arc::new(Mutex::new(table)), woken })
    }
}

impl Source for Holds {
    fn open(&self, pull: &PullHeader) -> Result<HeldBlocks, WireError> {
        lock(&self.table).open(Instant::now(), pull)
    }

    fn served(&self, report: SendReport) {
        if let Err(error) = report.result {
            tracing::info!(transfer_id = %report.transfer_id, rank = report.rank, %error, "a pull from here failed");
        }
        if tracing::enabled!(target: AUDIT, Level::DEBUG) {
            audit(report.transfer_id, "sent", report.rank, &report.checksums);
        }
    }
}

fn audit(transfer_id: TransferId, side: &str, rank: u32, checksums: &[u64]) {
    let digest = format!("{:032x}", digest(checksums));
    tracing::debug!(target: AUDIT, %transfer_id, side, rank, blocks = checksums.len(), digest);
}

/// A running connectors' side.
pub struct Connectors {
    /// What the engine is, as its connectors say.
    pub attachment: watch::Receiver<Attachment>,
    /// Holds that the coordinator releases.
    pub release: mpsc::Sender<TransferId>,
    /// Ends when all copies are over and all connections closed.
    pub task: JoinHandle<()>,
}

/// Opens the socket and starts to serve it, until `stop` is cancelled. KV is pulled as `dtype`. Reports are dropped while
/// their queue is full.
pub fn start(
    path: &std::path::Path,
    dtype: WireDtype,
    holds: &Arc<Holds>,
    endpoint: Endpoint,
    reports: mpsc::Sender<Report>,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<Connectors, SocketError> {
    let listener = Listener::bind(path)?;
    let core = Core::new(dtype, holds.table.clone(), metrics.clone());
    let (attachment, watched) = watch::channel(core.attachment());
    let (release, releases) = mpsc::channel(1024);
    let (inputs, received) = mpsc::channel(1024);
    let hub = Hub {
        core,
        woken: holds.woken.clone(),
        endpoint,
        reports,
        metrics,
        attachment,
        inputs,
        connections: BTreeMap::new(),
        cancellers: BTreeMap::new(),
        // Checksums leave most cores to the engine.
        checksummers: Arc::new(Semaphore::new(2)),
        next_conn: 0,
    };
    let (accepts, accepted) = mpsc::channel(16);
    tokio::spawn(accept(listener, accepts, stop.clone()));
    let task = tokio::spawn(hub.run(accepted, received, releases, stop));
    Ok(Connectors { attachment: watched, release, task })
}

struct Connection {
    messages: mpsc::Sender<ToConnector>,
    closed: CancellationToken,
}

struct Hub {
    core: Core,
    woken: Arc<Notify>,
    endpoint: Endpoint,
    reports: mpsc::Sender<Report>,
    metrics: Metrics,
    attachment: watch::Sender<Attachment>,
    inputs: mpsc::Sender<Input>,
    connections: BTreeMap<ConnId, Connection>,
    cancellers: BTreeMap<PullId, Canceller>,
    checksummers: Arc<Semaphore>,
    next_conn: u64,
}

impl Hub {
    async fn run(
        mut self,
        mut accepted: mpsc::Receiver<UnixStream>,
        mut inputs: mpsc::Receiver<Input>,
        mut releases: mpsc::Receiver<TransferId>,
        stop: CancellationToken,
    ) {
        let mut stopped = false;
        while !self.core.has_stopped() {
            let due = self.core.poll_timeout().map(tokio::time::Instant::from_std);
            let input = tokio::select! {
                () = stop.cancelled(), if !stopped => {
                    stopped = true;
                    Input::Stop
                }
                Some(input) = inputs.recv() => input,
                () = self.woken.notified() => Input::Woken,
                Some(transfer_id) = releases.recv() => Input::Release(transfer_id),
                () = sleep_until(due.unwrap_or_else(tokio::time::Instant::now)), if due.is_some() => Input::Woken,
                Some(stream) = accepted.recv() => {
                    if self.connections.len() >= MAX_CONNECTIONS {
                        tracing::warn!(max = MAX_CONNECTIONS, "too many connections of the engine's connector");
                        continue;
                    }
                    self.connected(stream)
                }
            };
            self.apply(input);
        }
    }

    fn connected(&mut self, stream: UnixStream) -> Input {
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        let (messages, queue) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let stream = Arc::new(stream);
        tokio::spawn(read(conn, stream.clone(), self.inputs.clone(), closed.clone()));
        tokio::spawn(write(conn, stream, queue, self.inputs.clone(), closed.clone()));
        self.connections.insert(conn, Connection { messages, closed });
        Input::Connected(conn)
    }

    fn apply(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            if let Input::PullEnded(id, _) = &input {
                self.cancellers.remove(id);
            }
            for action in self.core.handle(now(), input) {
                if let Some(consequence) = self.act(action) {
                    inputs.push(consequence);
                }
            }
        }
        let attachment = self.core.attachment();
        self.attachment.send_if_modified(|known| {
            let changed = *known != attachment;
            *known = attachment;
            changed
        });
    }

    fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Send(conn, message) => {
                let full = self.connections.get(&conn)?.messages.try_send(message).is_err();
                return full.then(|| {
                    tracing::warn!("the engine's connector does not read what it is sent");
                    Input::Ended(conn)
                });
            }
            Action::Close(conn) => {
                let connection = self.connections.remove(&conn)?;
                connection.closed.cancel();
            }
            Action::Map(conn, storages, layout, num_blocks) => {
                let inputs = self.inputs.clone();
                tokio::spawn(async move {
                    let mapped = tokio::task::spawn_blocking(move || map(storages, &layout, num_blocks));
                    let result = match mapped.await {
                        Ok(Ok(memory)) => Ok(memory),
                        Ok(Err(error)) => Err(format!("layout: {error}")),
                        Err(error) => Err(format!("layout: {error}")),
                    };
                    let _ = inputs.send(Input::Mapped(conn, Mapped(result))).await;
                });
            }
            Action::Checksum(job) => {
                let (permits, metrics) = (self.checksummers.clone(), self.metrics.clone());
                tokio::spawn(async move {
                    let permit = permits.acquire_owned().await;
                    tokio::task::spawn_blocking(move || {
                        make_checksums(job, &metrics);
                        drop(permit);
                    });
                });
            }
            Action::Pull(id, request, memory, block_ids) => self.pull(id, request, memory, block_ids),
            Action::CancelPull(id) => {
                if let Some(canceller) = self.cancellers.get(&id) {
                    canceller.cancel();
                }
            }
            Action::Outcome(outcome) => self.report(Report::Outcome(outcome)),
            Action::HoldTaken(taken) => self.report(Report::HoldTaken(taken)),
            Action::Link(sample) => self.report(Report::Link(sample)),
        }
        None
    }

    fn pull(&mut self, id: PullId, request: PullRequest, memory: Arc<dyn BlockMemory>, block_ids: Vec<u32>) {
        let (transfer_id, rank) = (request.transfer_id, request.rank);
        let heads = request.layout.heads.clone();
        let pull = self.endpoint.pull(request, memory.clone(), block_ids.clone());
        self.cancellers.insert(id, pull.canceller());
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let result = pull.await;
            if let Ok(report) = &result
                && report.failed.is_empty()
                && tracing::enabled!(target: AUDIT, Level::DEBUG)
            {
                // Before the engine is told, and so may write to the blocks itself.
                let form = report.form;
                let read = move || match Sliced::as_it_came(memory, heads.as_ref(), form) {
                    Ok(memory) => audit_received(transfer_id, rank, &memory, &block_ids),
                    Err(error) => {
                        tracing::warn!(target: AUDIT, %transfer_id, %error, "received blocks cannot be read back")
                    }
                };
                let _ = tokio::task::spawn_blocking(read).await;
            }
            let _ = inputs.send(Input::PullEnded(id, result)).await;
        });
    }

    fn report(&self, report: Report) {
        if self.reports.try_send(report).is_err() {
            tracing::debug!("a report to the coordinator was dropped");
        }
    }
}

/// Maps a worker's memory. Blocks for a second or so.
fn map(storages: Storages, layout: &Layout, num_blocks: u64) -> Result<Arc<dyn BlockMemory>, MemoryError> {
    match storages {
        Storages::Host(storages) => Ok(EngineMemory::new(storages, layout, num_blocks)?),
        Storages::Gpu { uuid, ready, storages } => {
            let ready = Some(&ready);
            let memory = CudaMemory::open(uuid, &storages, ready, layout, num_blocks, DEFAULT_PINNED_BYTES)?;
            if let Some(why) = memory.device().fallback() {
                tracing::warn!(%why, "the GPU's driver takes no kernels: blocks are copied piece by piece, which is slower");
            }
            Ok(memory)
        }
    }
}

async fn accept(listener: Listener, accepted: mpsc::Sender<UnixStream>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            stream = listener.accept() => stream,
        };
        match stream {
            Ok(stream) => {
                if accepted.send(stream).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "engine.socket");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn make_checksums(job: ChecksumJob, metrics: &Metrics) {
    if let Err(error) = job.making.run() {
        tracing::warn!(%error, "checksums of held blocks");
    }
    metrics.checksums_made(job.taken.elapsed());
}

fn audit_received(transfer_id: TransferId, rank: u32, memory: &Arc<dyn BlockMemory>, block_ids: &[u32]) {
    let guard: baton_kernels::Guard = Arc::new(());
    let checksums: Result<Vec<u64>, _> =
        block_ids.iter().map(|block| of_block(memory, *block, &guard)).collect();
    match checksums {
        Ok(checksums) => audit(transfer_id, "received", rank, &checksums),
        Err(error) => {
            tracing::warn!(target: AUDIT, %transfer_id, %error, "received blocks cannot be read back")
        }
    }
}

async fn read(conn: ConnId, stream: Arc<UnixStream>, inputs: mpsc::Sender<Input>, closed: CancellationToken) {
    tokio::select! {
        () = closed.cancelled() => {}
        last = read_to_end(conn, &stream, &inputs) => {
            let _ = inputs.send(last).await;
        }
    }
}

/// Passes on all messages, and says how it ended.
async fn read_to_end(conn: ConnId, stream: &UnixStream, inputs: &mpsc::Sender<Input>) -> Input {
    let mut reader = Reader::new(stream);
    let mut hasher = None;
    loop {
        let next = match hasher {
            Some(_) => reader.next().await,
            None => match timeout(HELLO, reader.next()).await {
                Ok(next) => next,
                Err(_) => return Input::Malformed(conn, format!("no hello within {} s", HELLO.as_secs())),
            },
        };
        let (message, fd) = match next {
            Ok(Some(next)) => next,
            Ok(None) => return Input::Ended(conn),
            Err(socket::ReadError::Io(error)) => {
                tracing::warn!(%error, "engine.socket");
                return Input::Ended(conn);
            }
            Err(error) => return Input::Malformed(conn, error.to_string()),
        };
        if let ToAgent::Hello(Hello { model, block_size, .. }) = &message {
            hasher = Some((BlockHasher::new(model), *block_size as usize));
        }
        let content = match &message {
            ToAgent::Hold(hold) => Some(&hold.content),
            ToAgent::Pull(pull) => Some(&pull.content),
            _ => None,
        };
        let hashes = match (content, &hasher) {
            (Some(content), Some((hasher, block_size))) => match chain(hasher, *block_size, content).await {
                Some(hashes) => hashes,
                None => {
                    return Input::Malformed(conn, "content.tokens: no whole number of 32-bit ids".into());
                }
            },
            _ => Vec::new(),
        };
        if inputs.send(Input::Message(conn, message, Extra { fd, hashes })).await.is_err() {
            return Input::Ended(conn);
        }
    }
}

async fn chain(hasher: &BlockHasher, block_size: usize, content: &Content) -> Option<Vec<BlockHash>> {
    let tokens = content.token_ids()?;
    if block_size == 0 {
        return Some(Vec::new());
    }
    if tokens.len() <= HASH_INLINE {
        return Some(hasher.chain(&tokens, block_size, &content.keys));
    }
    let (hasher, keys) = (hasher.clone(), content.keys.clone());
    tokio::task::spawn_blocking(move || hasher.chain(&tokens, block_size, &keys)).await.ok()
}

/// Writes until the connection is closed and all is written. Only then is the socket itself closed.
async fn write(
    conn: ConnId,
    stream: Arc<UnixStream>,
    mut queue: mpsc::Receiver<ToConnector>,
    inputs: mpsc::Sender<Input>,
    closed: CancellationToken,
) {
    let drain = async {
        while let Some(message) = queue.recv().await {
            let written = match encode(&message) {
                Ok(bytes) => write_all(&stream, &bytes).await,
                Err(error) => Err(std::io::Error::other(error)),
            };
            if let Err(error) = written {
                tracing::debug!(%error, "engine.socket");
                let _ = inputs.send(Input::Ended(conn)).await;
                // The socket stays open until the last copy is over.
                closed.cancelled().await;
                return;
            }
        }
    };
    let cut_off = async {
        closed.cancelled().await;
        sleep(LAST_WORD).await;
    };
    tokio::select! {
        () = drain => {}
        () = cut_off => {}
    }
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn now() -> Now {
    Now { instant: Instant::now(), unix_ms: unix_ms() }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
