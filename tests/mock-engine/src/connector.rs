//! The engine's KV connector: the Rust counterpart of `agent/connector`, with its scheduler and its worker connection.
//!
//! While both are up, the scheduler follows transfer plans. When either is lost, the connector waits until the agent has let go of
//! the worker's memory (its connection is closed then), gives all blocks back, and connects again.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::connector::{self, Hello, Layout, MAX_MESSAGE, Side, ToAgent, ToConnector};
use baton_proto::ids::Epoch;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use crate::engine::{Command, EngineHandle};

/// The agent answers each message of the handshake within this time.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// First wait before connecting again; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait before connecting again.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Wait after a refusal: the same words will be refused again, but the agent may be mended meanwhile.
const REFUSED_WAIT: Duration = Duration::from_secs(5);

/// What the connector tells its agent about the engine.
#[derive(Debug)]
pub struct ConnectorConfig {
    /// The agent's socket.
    pub socket: PathBuf,
    /// Unique to this life of the engine.
    pub instance: String,
    /// Model, as the engine serves it.
    pub model: String,
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks, block 0 included.
    pub num_blocks: u64,
    /// Tokens computed in one step, at most.
    pub chunk_tokens: u32,
    /// The KV storages: file descriptors and lengths.
    pub storages: Vec<(OwnedFd, u64)>,
    /// How blocks lie in them.
    pub layout: Layout,
}

/// Why a connection to the agent did not come about, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectorError {
    /// Reading or writing failed.
    #[error("agent socket: {0}")]
    Io(#[from] io::Error),
    /// A message could not be read.
    #[error("the agent sent what is no message: {0}")]
    Message(#[from] rmp_serde::decode::Error),
    /// A message is too long.
    #[error("the agent announced a message of {0} bytes, more than {MAX_MESSAGE}")]
    TooLong(usize),
    /// The agent refused the connector.
    #[error("the agent refused the engine: {0}")]
    Refused(String),
    /// The handshake went another way.
    #[error("the agent answered the handshake with {0}")]
    Unexpected(String),
    /// The handshake took too long.
    #[error("the agent did not answer within {} s", HANDSHAKE.as_secs())]
    Silent,
}

/// Keeps the engine connected to its agent until the engine stops. Never returns before.
pub async fn run(config: ConnectorConfig, engine: EngineHandle) {
    let mut wait = FIRST_WAIT;
    let mut last_error = String::new();
    while engine.is_alive() {
        match connect(&config).await {
            Ok(connection) => {
                tracing::info!(epoch = %connection.epoch, "connected to the agent");
                wait = FIRST_WAIT;
                last_error.clear();
                serve(connection, &engine).await;
                tracing::warn!(
                    "the connection to the agent is lost; plans are not followed until it is back"
                );
            }
            Err(error) => {
                let refused = matches!(error, ConnectorError::Refused(_));
                let error = error.to_string();
                if error != last_error {
                    tracing::warn!(socket = %config.socket.display(), error, "not connected to the agent");
                    last_error = error;
                }
                if refused {
                    tokio::time::sleep(REFUSED_WAIT).await;
                }
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

struct Connection {
    epoch: Epoch,
    scheduler: UnixStream,
    worker: UnixStream,
}

async fn connect(config: &ConnectorConfig) -> Result<Connection, ConnectorError> {
    let mut scheduler = open(&config.socket, hello(config, Side::Scheduler)).await?;
    let epoch = welcome(&mut scheduler).await?;
    let mut worker = open(&config.socket, hello(config, Side::Worker(0))).await?;
    welcome(&mut worker).await?;
    for (fd, len) in &config.storages {
        send_with_fd(&worker, &frame(&ToAgent::Storage { len: *len }), fd).await?;
    }
    worker.write_all(&frame(&ToAgent::Layout(config.layout.clone()))).await?;
    let registered = welcome(&mut worker).await?;
    if registered != epoch {
        // The epoch changed between the two connections: the scheduler's one is of no use.
        return Err(ConnectorError::Unexpected(format!("epoch {registered} after {epoch}")));
    }
    Ok(Connection { epoch, scheduler, worker })
}

async fn open(socket: &Path, hello: Hello) -> Result<UnixStream, ConnectorError> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(&frame(&ToAgent::Hello(hello))).await?;
    Ok(stream)
}

fn hello(config: &ConnectorConfig, side: Side) -> Hello {
    Hello {
        version: connector::VERSION,
        instance: config.instance.clone(),
        side,
        tp_size: 1,
        model: config.model.clone(),
        block_size: config.block_size,
        num_blocks: config.num_blocks,
        chunk_tokens: config.chunk_tokens,
    }
}

async fn welcome(stream: &mut UnixStream) -> Result<Epoch, ConnectorError> {
    match tokio::time::timeout(HANDSHAKE, read(stream)).await.map_err(|_| ConnectorError::Silent)?? {
        Some(ToConnector::Welcome { version, epoch }) if version == connector::VERSION => Ok(epoch),
        Some(ToConnector::Refused { reason }) => Err(ConnectorError::Refused(reason)),
        Some(other) => Err(ConnectorError::Unexpected(format!("{other:?}"))),
        None => Err(ConnectorError::Unexpected("the end of the connection".into())),
    }
}

/// Runs a connection until the agent has closed the worker's.
async fn serve(connection: Connection, engine: &EngineHandle) {
    let (mut from_scheduler, to_scheduler) = connection.scheduler.into_split();
    let (from_worker, to_worker) = connection.worker.into_split();
    // Both queues are as long as the requests of the engine are many, at most: each sends a message or two.
    let (scheduler, scheduler_queue) = mpsc::unbounded_channel();
    let (worker, worker_queue) = mpsc::unbounded_channel();
    let (sender, mut messages) = mpsc::unbounded_channel();
    let writing = tokio::spawn(write_all(to_scheduler, scheduler_queue));
    let writing_worker = tokio::spawn(write_all(to_worker, worker_queue));
    let mut reading = tokio::spawn(receive(from_worker, engine.clone()));

    engine.send(Command::ConnectorUp(connection.epoch, sender));
    let worker_lost = loop {
        tokio::select! {
            message = messages.recv() => {
                let Some(message) = message else { break false };
                let queue = match message {
                    ToAgent::Pull(_) | ToAgent::Computed(_) => &worker,
                    _ => &scheduler,
                };
                if queue.send(frame(&message)).is_err() {
                    break false;
                }
            }
            () = closed(&mut from_scheduler) => break false,
            _ = &mut reading => break true,
        }
    };
    drop((scheduler, worker, messages));
    writing.abort();
    // The end of our side tells the agent to let go of the memory; it closes its side when it has.
    let _ = writing_worker.await;
    if !worker_lost {
        let _ = reading.await;
    }
    engine.send(Command::ConnectorDown);
}

/// Waits for the end of the scheduler's connection; after its welcome, it is told nothing. Cancel safe.
async fn closed(stream: &mut OwnedReadHalf) {
    let mut ignored = [0; 64];
    while stream.read(&mut ignored).await.is_ok_and(|read| read > 0) {}
}

async fn write_all(mut stream: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = queue.recv().await {
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Hands on what the agent tells the worker, until it closes the connection.
async fn receive(mut stream: OwnedReadHalf, engine: EngineHandle) {
    loop {
        match read(&mut stream).await {
            Ok(Some(ToConnector::PullDone { request_id, failed_blocks, error })) => {
                if !error.is_empty() {
                    tracing::info!(
                        request_id,
                        blocks = failed_blocks.len(),
                        error,
                        "a pull failed; computing"
                    );
                }
                engine.send(Command::PullDone { request_id, failed_blocks, error });
            }
            Ok(Some(ToConnector::Released { request_ids })) => {
                engine.send(Command::Released(request_ids));
            }
            Ok(Some(other)) => tracing::warn!(?other, "an unexpected message from the agent"),
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot read from the agent");
                return;
            }
        }
    }
}

/// A message in its wire form.
pub fn frame<T: serde::Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message).expect("messages have a msgpack form");
    let len = u32::try_from(bytes.len() - 4).expect("messages are bounded");
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Reads one message; `None` at the end of the connection. Not cancel safe.
pub async fn read<T: serde::de::DeserializeOwned>(
    stream: &mut (impl AsyncReadExt + Unpin),
) -> Result<Option<T>, ConnectorError> {
    let mut len = [0; 4];
    match stream.read_exact(&mut len).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_MESSAGE {
        return Err(ConnectorError::TooLong(len));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(rmp_serde::from_slice(&bytes)?))
}

/// Sends bytes, with a file descriptor attached to the first of them.
async fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: &OwnedFd) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        sent += stream
            .async_io(Interest::WRITABLE, || {
                let fds = [fd.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if sent == 0 {
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                }
                let bytes = [IoSlice::new(&bytes[sent..])];
                Ok(rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
            })
            .await?;
    }
    Ok(())
}
