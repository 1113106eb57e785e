//! Serving pulls and probes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_kernels::{MemoryError, Staged};
use baton_proto::wire::{ErrorCode, Frame, PREFIX, WireError};
use bytes::Bytes;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Incoming, ReadError, RecvStream, SendStream, ServerConfig, WriteError};
use tokio::time::{sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::api::{Limits, SendReport};
use super::endpoint::Shared;
use super::probe::Allowance;
use super::{probe, socket, transport};
use crate::checksum::Made;
use crate::direct::{self, Ticket};
use crate::hold::HeldBlocks;
use crate::protocol::{Close, Sender, SenderAction, SenderConfig, StreamEnd};

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Longest wait for what a stream is about.
const HELLO: Duration = Duration::from_secs(5);

/// Connections that are in their handshake at once.
const MAX_INCOMING: usize = 256;

/// KV bytes gathered ahead of what the connection took.
const BATCH: usize = 1 << 20;

/// Blocks that are put together at once, the one that is sent next among them.
const MAKING: usize = 2;

/// From one look for a free buffer of the memory to the next.
const BUFFER_POLL: Duration = Duration::from_millis(1);

/// How connections are accepted; `payload` is what the first hop back carries, where the peer is known.
pub(super) fn server_config(
    tls: &Arc<QuicServerConfig>,
    limits: &Limits,
    payload: Option<u16>,
) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(tls.clone());
    config
        .transport_config(transport::transport(limits, payload.unwrap_or(1_200), true))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(64 << 10)
        .incoming_buffer_size_total(4 << 20)
        .migration(false);
    config
}

/// Accepts connections until the endpoint closes.
pub(super) async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.quic.accept().await {
        let Ok(permit) = shared.accepted.clone().try_acquire_owned() else {
            tracing::warn!(peer = %incoming.remote_address(), "connection refused: too many are open");
            incoming.refuse();
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            match handshake(&shared, incoming).await {
                Ok(connection) => serve_connection(&shared, &connection).await,
                Err(error) => tracing::debug!(%peer, error, "no connection came about"),
            }
            drop(permit);
        });
    }
}

async fn handshake(shared: &Shared, incoming: Incoming) -> Result<Connection, String> {
    let payload = socket::route_payload(incoming.remote_address());
    let config = server_config(&shared.server_tls, &shared.limits, Some(payload));
    let connecting = incoming.accept_with(Arc::new(config)).map_err(|error| error.to_string())?;
    match timeout(HANDSHAKE, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the handshake takes too long".into()),
    }
}

/// Serves streams until the connection closes. The transport's cap on streams bounds the tasks.
async fn serve_connection(shared: &Arc<Shared>, connection: &Connection) {
    let allowance = Arc::new(Allowance::new(Instant::now()));
    let ticket = Arc::new(shared.tickets.as_ref().and_then(|tickets| tickets.issue()));
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (shared, connection) = (shared.clone(), connection.clone());
        let (allowance, ticket) = (allowance.clone(), ticket.clone());
        tokio::spawn(async move {
            serve_stream(&shared, &connection, &allowance, ticket.as_ref().as_ref(), send, recv).await;
        });
    }
}

async fn serve_stream(
    shared: &Shared,
    connection: &Connection,
    allowance: &Allowance,
    ticket: Option<&Ticket>,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let started = Instant::now();
    match timeout(HELLO, hello(&mut recv)).await {
        Ok(Some((Frame::Probe(asked), _))) => probe::answer(connection, allowance, asked, &mut send).await,
        Ok(Some((Frame::Near(asked), _))) => direct::answer(shared, ticket, asked, &mut send).await,
        Ok(Some((_, bytes))) => {
            let Ok(_permit) = shared.served.try_acquire() else {
                let refused = Frame::Refused(ErrorCode::Busy.into()).encode();
                let _ = send.write_all(refused.as_ref()).await;
                let _ = send.finish();
                return;
            };
            let serve = Serve::new(shared, started);
            serve.run(bytes, send, recv).await;
        }
        Ok(None) | Err(_) => {
            let _ = send.reset((ErrorCode::Protocol as u16).into());
        }
    }
}

/// The first frame, and all bytes read for it; `None` where there is none.
async fn hello(recv: &mut RecvStream) -> Option<(Frame, Bytes)> {
    let mut bytes = Vec::with_capacity(PREFIX);
    loop {
        let chunk = recv.read_chunk(usize::from(u16::MAX), true).await.ok()??;
        bytes.extend_from_slice(&chunk.bytes);
        if let Some((frame, _)) = Frame::decode(&bytes).ok()? {
            return Some((frame, bytes.into()));
        }
    }
}

/// One pull that is served.
struct Serve<'a> {
    shared: &'a Shared,
    started: Instant,
    sender: Sender,
    held: Option<HeldBlocks>,
    /// The block that payload is taken from, and where each of its pieces begins.
    gathered: Vec<(usize, Bytes)>,
    /// To be written, from `batch[written]` on.
    batch: Vec<Bytes>,
    written: usize,
    /// Bytes in the batch that are not written.
    batched: usize,
    /// The block to send next, whose checksum is being made, or which is being put together, or for which no buffer is free.
    awaited: Option<u32>,
    /// When to look for a buffer again.
    retry_at: Option<Instant>,
    /// Blocks on their way from the memory, in order, each with its index.
    ahead: VecDeque<(u32, Staged)>,
    /// Blocks that are being put together, likewise.
    making: VecDeque<(u32, AbortOnDropHandle<Option<Made>>)>,
    checksums: Vec<u64>,
}

impl<'a> Serve<'a> {
    fn new(shared: &'a Shared, started: Instant) -> Self {
        let config = SenderConfig { hello: HELLO, max_deadline: shared.limits.max_deadline };
        Self {
            shared,
            started,
            sender: Sender::new(started, config),
            held: None,
            gathered: Vec::new(),
            batch: Vec::new(),
            written: 0,
            batched: 0,
            awaited: None,
            retry_at: None,
            ahead: VecDeque::new(),
            making: VecDeque::new(),
            checksums: Vec::new(),
        }
    }

    async fn run(mut self, hello: Bytes, mut send: SendStream, mut recv: RecvStream) {
        self.sender.handle_bytes(Instant::now(), hello);
        let timer = sleep_until(Instant::now().into());
        tokio::pin!(timer);
        let (mut reading, mut writing) = (true, true);
        let (close, result) = loop {
            if let Some(done) = self.act() {
                break done;
            }
            let due = self.sender.poll_timeout().unwrap_or(self.started);
            if timer.deadline().into_std() != due {
                timer.as_mut().reset(due.into());
            }
            let Self { sender, held, batch, written, awaited, retry_at, making, .. } = &mut self;
            let pending = &mut batch[*written..];
            tokio::select! {
                biased;
                read = recv.read_chunk(usize::from(u16::MAX), true), if reading => match read {
                    Ok(Some(chunk)) => sender.handle_bytes(Instant::now(), chunk.bytes),
                    end => {
                        reading = false;
                        sender.handle_end(stream_end(end.map(|_| ())));
                    }
                },
                code = hold_ended(held.as_ref()) => sender.handle_hold_ended(code),
                () = &mut timer => sender.handle_timeout(Instant::now()),
                (index, checksum) = checksum_made(held.as_ref(), *awaited, *retry_at) => self.gather(index, checksum),
                (index, made) = block_made(making, *awaited) => self.made(index, made),
                wrote = send.write_chunks(pending), if writing && !pending.is_empty() => match wrote {
                    Ok(wrote) => self.wrote(wrote),
                    // The puller may still say how it ended.
                    Err(WriteError::Stopped(_)) => writing = false,
                    Err(_) => sender.handle_end(StreamEnd::Lost),
                },
            }
        };
        match close {
            Close::Finish => {
                let rest = &mut self.batch[self.written..];
                let _ = timeout(HELLO, send.write_all_chunks(rest)).await;
                let _ = send.finish();
            }
            Close::Reset(code) => {
                let _ = send.reset((code as u16).into());
            }
        }
        self.report(result);
    }

    /// Does what the sender says, until it has nothing more or enough is gathered.
    fn act(&mut self) -> Option<(Close, Result<(), WireError>)> {
        while self.sender.is_done() || self.batched < BATCH {
            match self.sender.poll()? {
                SenderAction::Open(pull) => {
                    let opened = self.shared.source.open(&pull);
                    let accepted = opened.as_ref().map(HeldBlocks::accepted);
                    self.sender.handle_opened(Instant::now(), accepted.map_err(|error| *error));
                    self.held = opened.ok();
                }
                SenderAction::Send(frame) => {
                    self.batched += frame.as_ref().len();
                    self.batch.push(Bytes::copy_from_slice(frame.as_ref()));
                }
                SenderAction::Gather(index) => {
                    if self.held.as_ref().is_some_and(|held| !held.is_there(index)) {
                        self.sender.handle_not_held(Instant::now());
                    }
                    match &self.held {
                        Some(held) if !held.lie() => self.make(index),
                        held => match held.as_ref().and_then(|held| held.checksum(index)) {
                            Some(checksum) => self.gather(index, Some(checksum)),
                            None => self.awaited = Some(index),
                        },
                    }
                }
                SenderAction::Payload(range) => {
                    self.batched += range.len();
                    self.shared.counters.sent.fetch_add(range.len() as u64, Ordering::Relaxed);
                    for (start, piece) in &self.gathered {
                        let from = range.start.max(*start);
                        let to = range.end.min(start + piece.len());
                        if from < to {
                            self.batch.push(piece.slice(from - start..to - start));
                        }
                    }
                }
                SenderAction::Finished => {
                    if let Some(held) = &self.held {
                        held.claim.finish();
                    }
                }
                SenderAction::Done(close, result) => return Some((close, result)),
            }
        }
        None
    }

    /// Takes a block's bytes from memory, where its checksum could be made.
    fn gather(&mut self, index: u32, checksum: Option<u64>) {
        self.awaited = None;
        self.retry_at = None;
        self.gathered.clear();
        let Some(checksum) = checksum else {
            return self.sender.handle_block(Err(ErrorCode::Internal.into()));
        };
        let staged = match self.ahead.front() {
            Some((at, _)) if *at == index => self.ahead.pop_front().map(|(_, staged)| Ok(staged)),
            _ => self.stage(index),
        };
        if let Some(Ok(_)) = &staged {
            self.stage_ahead();
        }
        let Some(taken) = staged.map(|staged| staged.and_then(Staged::take)) else {
            return self.sender.handle_block(Err(ErrorCode::Internal.into()));
        };
        match taken {
            Ok(pieces) => self.take(index, pieces, checksum),
            // They come back as fast as the network takes what was sent; those of later blocks have to at once.
            Err(MemoryError::NoBuffer) => {
                self.ahead.clear();
                self.awaited = Some(index);
                self.retry_at = Some(Instant::now() + BUFFER_POLL);
            }
            Err(error) => {
                tracing::warn!(%error, "a held block cannot be read");
                self.sender.handle_block(Err(ErrorCode::Internal.into()));
            }
        }
    }

    /// A block's bytes are at hand.
    fn take(&mut self, index: u32, pieces: Vec<Bytes>, checksum: u64) {
        let mut start = 0;
        for piece in pieces {
            let len = piece.len();
            self.gathered.push((start, piece));
            start += len;
        }
        if self.checksums.len() == index as usize {
            self.checksums.push(checksum);
        }
        self.sender.handle_block(Ok(checksum));
    }

    /// Has a block put together, and those that come next.
    fn make(&mut self, index: u32) {
        let Some(held) = &self.held else { return };
        let begin = |index| (index, AbortOnDropHandle::new(tokio::spawn(held.make(index))));
        self.awaited = Some(index);
        if self.making.front().is_none_or(|(at, _)| *at != index) {
            self.making.push_front(begin(index));
        }
        let last = self.making.iter().map(|(at, _)| at + 1).max();
        let next = last.map_or(0, |last| last.max(self.sender.begun()))..held.count();
        self.making.extend(next.take(MAKING.saturating_sub(self.making.len())).map(begin));
    }

    /// A block was put together, or cannot be.
    fn made(&mut self, index: u32, made: Option<Made>) {
        self.awaited = None;
        self.making.pop_front();
        self.gathered.clear();
        match made {
            Some(Made { pieces, checksum }) => self.take(index, pieces, checksum),
            None => self.sender.handle_block(Err(ErrorCode::Internal.into())),
        }
    }

    /// Begins to take a block from memory; `None` where nothing is held.
    fn stage(&self, index: u32) -> Option<Result<Staged, MemoryError>> {
        let held = self.held.as_ref()?;
        let block = held.block(index)?;
        Some(held.memory.clone().stage(block, held.claim.guard()))
    }

    /// Begins to take the blocks that come next, as many as the memory is the faster for.
    fn stage_ahead(&mut self) {
        let most = self.held.as_ref().map_or(0, |held| held.memory.ahead());
        while self.ahead.len() < most {
            let next = self.ahead.back().map_or(self.sender.begun(), |(at, _)| at + 1);
            // One that is not computed yet would be read too early.
            if self.held.as_ref().is_none_or(|held| held.checksum(next).is_none()) {
                return;
            }
            match self.stage(next) {
                Some(Ok(staged)) => self.ahead.push_back((next, staged)),
                // What is wrong shows when it is that block's turn.
                Some(Err(_)) | None => return,
            }
        }
    }

    fn wrote(&mut self, wrote: quinn::Written) {
        self.batched -= wrote.bytes;
        self.written += wrote.chunks;
        if self.written == self.batch.len() {
            self.batch.clear();
            self.written = 0;
        }
    }

    fn report(self, result: Result<(), WireError>) {
        let (Some(pull), Some(_)) = (self.sender.pull(), &self.held) else { return };
        let report = SendReport {
            transfer_id: pull.transfer_id,
            rank: pull.rank,
            first_block: pull.first_block,
            bytes: self.sender.sent(),
            repeated: self.sender.repeated(),
            elapsed: self.started.elapsed(),
            checksums: self.checksums,
            result,
        };
        self.shared.source.served(report);
    }
}

fn stream_end(end: Result<(), ReadError>) -> StreamEnd {
    match end {
        Ok(()) => StreamEnd::Finished,
        Err(ReadError::Reset(number)) => StreamEnd::Reset(number.into_inner()),
        Err(_) => StreamEnd::Lost,
    }
}

/// Resolves when the hold ends, with what to tell the puller.
pub(crate) async fn hold_ended(held: Option<&HeldBlocks>) -> ErrorCode {
    let Some(held) = held else { return std::future::pending().await };
    held.claim.ended().cancelled().await;
    held.claim.end().map_or(ErrorCode::Released, |end| end.code())
}

/// Resolves when the checksum of the awaited block, which travels as it lies, is made, or will not be; and not before
/// `retry_at`.
pub(crate) async fn checksum_made(
    held: Option<&HeldBlocks>,
    awaited: Option<u32>,
    retry_at: Option<Instant>,
) -> (u32, Option<u64>) {
    let (Some(held), Some(index)) = (held.filter(|held| held.lie()), awaited) else {
        return std::future::pending().await;
    };
    if let Some(at) = retry_at {
        sleep_until(at.into()).await;
    }
    (index, held.checksum_made(index).await)
}

/// Resolves when the awaited block, the first of these, is put together, or cannot be.
async fn block_made(
    making: &mut VecDeque<(u32, AbortOnDropHandle<Option<Made>>)>,
    awaited: Option<u32>,
) -> (u32, Option<Made>) {
    match making.front_mut() {
        Some((index, made)) if awaited == Some(*index) => (*index, made.await.ok().flatten()),
        _ => std::future::pending().await,
    }
}
