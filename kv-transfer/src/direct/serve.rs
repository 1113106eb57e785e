//! The holder's side.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_proto::wire::{Direct, ErrorCode, Frame, PullHeader, Purpose, WireError};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, sleep_until, timeout};

use super::socket::{self, same_user};
use super::{PATIENCE, Tickets};
use crate::hold::HeldBlocks;
use crate::protocol::{Close, Sender, SenderAction, SenderConfig, StreamEnd, UNKNOWN_GRACE};
use crate::quic::{SendReport, Shared, checksum_made, hold_ended};

/// Bytes of frames made ahead of what the socket took.
const AHEAD: usize = 16 << 10;

/// From one look for a hold that a pull has overtaken to the next.
const LOOK: Duration = Duration::from_millis(5);

/// A puller that does not let go of blocks for so long is worth a line in the log.
const SLOW: Duration = Duration::from_secs(10);

/// Accepts connections of agents on this host, until the endpoint closes.
pub(crate) async fn accept(shared: Arc<Shared>, tickets: Arc<Tickets>, listener: UnixListener) {
    loop {
        let accepted = tokio::select! {
            () = shared.closing.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "socket for agents of this host");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = shared.direct.clone().try_acquire_owned() else {
            tracing::warn!("connection of an agent of this host refused: too many are open");
            continue;
        };
        let (shared, tickets) = (shared.clone(), tickets.clone());
        tokio::spawn(async move {
            serve(&shared, &tickets, stream).await;
            drop(permit);
        });
    }
}

async fn serve(shared: &Shared, tickets: &Tickets, mut stream: UnixStream) {
    if let Err(error) = same_user(&stream) {
        return tracing::warn!(%error, "connection of an agent of this host refused");
    }
    let Ok(Some((direct, pull, bytes))) = timeout(PATIENCE, hello(&mut stream)).await else { return };
    if !tickets.admits(&direct.token) {
        return tracing::warn!("connection of an agent of this host refused: it has no ticket");
    }
    match direct.purpose {
        Purpose::Map => map(shared, pull, stream).await,
        Purpose::Copy => match shared.served.try_acquire() {
            Ok(_permit) => copy(shared, bytes, stream).await,
            Err(_) => refuse(&mut stream, ErrorCode::Busy.into()).await,
        },
    }
}

async fn refuse(stream: &mut UnixStream, error: WireError) {
    let _ = timeout(PATIENCE, stream.write_all(Frame::Refused(error).encode().as_ref())).await;
}

/// Who it is, the pull, and all bytes from the pull on; `None` where it says neither.
async fn hello(stream: &mut UnixStream) -> Option<(Direct, PullHeader, Bytes)> {
    let mut bytes = Vec::with_capacity(256);
    loop {
        if let Some((first, len)) = Frame::decode(&bytes).ok()? {
            let Frame::Direct(direct) = first else { return None };
            if let Some((second, _)) = Frame::decode(&bytes[len..]).ok()? {
                let Frame::Pull(pull) = second else { return None };
                return Some((direct, pull, Bytes::from(bytes).slice(len..)));
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// Gives the memory of a held block away, and says when it is another one.
async fn map(shared: &Shared, pull: PullHeader, mut stream: UnixStream) {
    let since = Instant::now();
    let opened = loop {
        match shared.source.open(&pull) {
            Err(error) if error.code == ErrorCode::UnknownTransfer && since.elapsed() < UNKNOWN_GRACE => {
                sleep(LOOK).await;
            }
            opened => break opened,
        }
    };
    let held = match opened {
        Ok(held) => held,
        Err(error) => return refuse(&mut stream, error).await,
    };
    let epoch_ended = held.claim.epoch_ended().clone();
    let Some(given) = held.memory.share() else {
        return refuse(&mut stream, ErrorCode::Elsewhere.into()).await;
    };
    // Who reads a held block has a claim of its own.
    drop(held);
    if let Ok(Ok(())) = timeout(PATIENCE, socket::give(&mut stream, given)).await {
        let mut nothing = [0; 1];
        tokio::select! {
            () = epoch_ended.cancelled() => {}
            () = shared.closing.cancelled() => {}
            _ = stream.read(&mut nothing) => {}
        }
    }
}

/// Serves one pull.
async fn copy(shared: &Shared, hello: Bytes, mut stream: UnixStream) {
    let started = Instant::now();
    let config = SenderConfig { hello: PATIENCE, max_deadline: shared.limits.max_deadline };
    let mut serving = Serving {
        shared,
        sender: Sender::new(started, config),
        held: None,
        outgoing: Vec::new(),
        gathered: None,
        awaited: None,
        checksums: Vec::new(),
    };
    serving.sender.handle_bytes(started, hello);
    let (close, result) = serving.run(&mut stream).await;
    let Serving { sender, held, checksums, mut outgoing, .. } = serving;
    // What is said now is said behind everything else; a puller that reads nothing more hears it by the end.
    if let (Close::Reset(_), Err(error)) = (close, result) {
        outgoing.extend_from_slice(Frame::Refused(error).encode().as_ref());
    }
    let _ = timeout(PATIENCE, stream.write_all(&outgoing)).await;
    let Some(held) = held else { return };
    let pull = sender.pull().copied();
    let report = pull.map(|pull| SendReport {
        transfer_id: pull.transfer_id,
        rank: pull.rank,
        first_block: pull.first_block,
        bytes: sender.sent(),
        repeated: sender.repeated(),
        elapsed: started.elapsed(),
        checksums,
        result,
    });
    // Until here it may read the blocks.
    while timeout(SLOW, closed(&mut stream)).await.is_err() {
        tracing::warn!(?pull, "an agent of this host does not let go of the blocks that it copies");
    }
    drop(held);
    if let Some(report) = report {
        shared.source.served(report);
    }
}

/// Resolves when the puller has closed the connection.
async fn closed(stream: &mut UnixStream) {
    let mut ignored = [0; 256];
    while stream.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
}

struct Serving<'a> {
    shared: &'a Shared,
    sender: Sender,
    held: Option<HeldBlocks>,
    outgoing: Vec<u8>,
    /// The block whose header went out last.
    gathered: Option<u32>,
    /// The block whose checksum is being made.
    awaited: Option<u32>,
    checksums: Vec<u64>,
}

impl Serving<'_> {
    /// Until the pull is over, one way or the other. The guard stays with `self`.
    async fn run(&mut self, stream: &mut UnixStream) -> (Close, Result<(), WireError>) {
        let mut buffer = [0; 4096];
        let timer = sleep_until(Instant::now().into());
        tokio::pin!(timer);
        let (mut from, mut to) = stream.split();
        loop {
            if let Some(done) = self.act() {
                return done;
            }
            let due = self.sender.poll_timeout().unwrap_or_else(Instant::now);
            timer.as_mut().reset(due.into());
            let Self { shared, sender, held, outgoing, awaited, .. } = self;
            tokio::select! {
                biased;
                read = from.read(&mut buffer) => match read {
                    Ok(count) if count > 0 => {
                        sender.handle_bytes(Instant::now(), Bytes::copy_from_slice(&buffer[..count]));
                    }
                    _ => sender.handle_end(StreamEnd::Lost),
                },
                code = hold_ended(held.as_ref()) => sender.handle_hold_ended(code),
                () = shared.closing.cancelled() => sender.handle_hold_ended(ErrorCode::Cancelled),
                () = &mut timer => sender.handle_timeout(Instant::now()),
                (index, checksum) = checksum_made(held.as_ref(), *awaited, None) => {
                    self.gather(index, checksum);
                }
                wrote = to.write(outgoing), if !outgoing.is_empty() => match wrote {
                    Ok(count) => {
                        outgoing.drain(..count);
                    }
                    Err(_) => sender.handle_end(StreamEnd::Lost),
                },
            }
        }
    }

    /// Does what the sender says, until it has nothing more or enough is said.
    fn act(&mut self) -> Option<(Close, Result<(), WireError>)> {
        while self.sender.is_done() || self.outgoing.len() < AHEAD {
            match self.sender.poll()? {
                SenderAction::Open(pull) => {
                    // In another form a block lies nowhere.
                    let opened = self.shared.source.open(&pull);
                    let opened = opened.and_then(|held| match held.lie() {
                        true => Ok(held),
                        false => Err(ErrorCode::Elsewhere.into()),
                    });
                    let accepted = opened.as_ref().map(HeldBlocks::accepted);
                    self.sender.handle_opened(Instant::now(), accepted.map_err(|error| *error));
                    self.held = opened.ok();
                }
                SenderAction::Send(frame) => self.outgoing.extend_from_slice(frame.as_ref()),
                SenderAction::Gather(index) => {
                    let held = self.held.as_ref();
                    match held.and_then(|held| held.checksum(index)) {
                        Some(checksum) => self.gather(index, Some(checksum)),
                        None => {
                            self.sender.handle_not_held(Instant::now());
                            self.awaited = Some(index);
                        }
                    }
                }
                SenderAction::Payload(range) => {
                    self.shared.counters.sent.fetch_add(range.len() as u64, Ordering::Relaxed);
                    let place = self.gathered.take().unwrap_or_default();
                    self.outgoing.extend_from_slice(Frame::Place(place).encode().as_ref());
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

    fn gather(&mut self, index: u32, checksum: Option<u64>) {
        self.awaited = None;
        let held = self.held.as_ref();
        let place = held.and_then(|held| held.block(index));
        let (Some(checksum), Some(place)) = (checksum, place) else {
            return self.sender.handle_block(Err(ErrorCode::Internal.into()));
        };
        self.gathered = Some(place);
        if self.checksums.len() == index as usize {
            self.checksums.push(checksum);
        }
        self.sender.handle_block(Ok(checksum));
    }
}
