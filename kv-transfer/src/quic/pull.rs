//! Running a pull.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_kernels::{BlockMemory, Filling, Guard, HeadMap, MemoryError, Sliced};
use baton_proto::wire::{BlockForm, ErrorCode, PullHeader, WireDtype, WireError};
use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::api::{PullError, PullReport, PullRequest};
use super::endpoint::Shared;
use super::gate::Gate;
use crate::checksum::of_block;
use crate::direct::{self, Failed, Link};
use crate::protocol::{Received, Receiver, ReceiverAction, ReceiverConfig, Stop, StreamEnd};

/// Chunks taken from a stream at once: a datagram's worth each, so at most 1 MiB between two looks at the clock.
const CHUNKS: usize = 16;

/// A pull under way; resolves when it is over and nothing is written to the memory any more.
///
/// Dropping it cancels the pull. The drop waits for the write at hand, and for copies of a device that are under way, a
/// millisecond or so: when it returns, nothing is written any more either.
#[must_use = "a pull that is dropped is cancelled"]
#[derive(Debug)]
pub struct Pull {
    result: oneshot::Receiver<Result<PullReport, PullError>>,
    writes: Writes,
    cancel: CancellationToken,
}

/// What a pull writes to, and the right to do so.
#[derive(Clone)]
pub(crate) struct Writes {
    /// Absent once the pull is over.
    memory: Option<Arc<dyn BlockMemory>>,
    block_ids: Arc<[u32]>,
    /// Where heads lie in the memory, where that is known.
    heads: Option<Arc<HeadMap>>,
    gate: Arc<Gate>,
}

impl std::fmt::Debug for Writes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writes").field("blocks", &self.block_ids.len()).finish_non_exhaustive()
    }
}

impl Writes {
    /// Ends what was written. See [`BlockMemory::flush`].
    pub(crate) fn flush(&self) -> Result<(), PullError> {
        let _alone = self.gate.hold();
        let Some(memory) = &self.memory else { return Ok(()) };
        memory.flush(&self.block_ids).map_err(|error| PullError::Memory(error.to_string()))
    }

    /// Which of the blocks do not hold what they should, where the memory is not written where it lies. Of packed ones, those
    /// that would not be packed to what came.
    fn verify(&self, checksums: &[u64], form: BlockForm) -> Result<Vec<usize>, PullError> {
        let Some(memory) = &self.memory else { return Ok(Vec::new()) };
        let made = match form {
            BlockForm::AsItLies => memory.checksums(&self.block_ids),
            BlockForm::Common | BlockForm::Packed if memory.ahead() > 0 => {
                let view = Sliced::as_it_came(memory.clone(), self.heads.as_ref(), form);
                let view = view.map_err(|error| PullError::Memory(error.to_string()))?;
                let guard: Guard = Arc::new(());
                Some(self.block_ids.iter().map(|block| of_block(&view, *block, &guard)).collect())
            }
            BlockForm::Common | BlockForm::Packed => None,
        };
        match made {
            None => Ok(Vec::new()),
            Some(Ok(made)) => Ok((0..made.len()).filter(|i| made[*i] != checksums[*i]).collect()),
            Some(Err(error)) => Err(PullError::Memory(error.to_string())),
        }
    }
}

impl Pull {
    /// Cancels the pull from elsewhere.
    pub fn canceller(&self) -> Canceller {
        Canceller { cancel: self.cancel.clone() }
    }
}

impl Future for Pull {
    type Output = Result<PullReport, PullError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.result).poll(cx).map(|result| {
            // Others may write to its blocks from now on.
            self.writes.memory = None;
            result.unwrap_or_else(|_| Err(PullError::ConnectionLost("the endpoint closed".into())))
        })
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.writes.gate.shut();
        self.cancel.cancel();
        // An error is of no interest: the blocks count as lost.
        let _ = self.writes.flush();
    }
}

/// Cancels a [`Pull`], which then resolves soon, with `Stopped(cancelled)` unless it was over already.
#[derive(Clone, Debug)]
pub struct Canceller {
    cancel: CancellationToken,
}

impl Canceller {
    /// Cancels.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

/// One pull's part of the world.
pub(crate) struct Job {
    pub(crate) shared: Arc<Shared>,
    pub(crate) request: PullRequest,
    pub(crate) memory: Arc<dyn BlockMemory>,
    pub(crate) block_ids: Arc<[u32]>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) cancel: CancellationToken,
    pub(crate) started: Instant,
    pub(crate) deadline: Instant,
}

pub(super) fn start(
    handle: &Handle,
    shared: Arc<Shared>,
    request: PullRequest,
    memory: Arc<dyn BlockMemory>,
    block_ids: Vec<u32>,
) -> Pull {
    let (done, result) = oneshot::channel();
    let (gate, cancel) = (Arc::new(Gate::default()), CancellationToken::new());
    let block_ids: Arc<[u32]> = block_ids.into();
    let heads = request.layout.heads.clone();
    let writes =
        Writes { memory: Some(memory.clone()), block_ids: block_ids.clone(), heads, gate: gate.clone() };
    let started = Instant::now();
    // More than that does not fit the wire's field.
    let deadline = started + request.deadline.min(Duration::from_millis(u64::from(u32::MAX)));
    let job = Job { shared, request, memory, block_ids, gate, cancel: cancel.clone(), started, deadline };
    let ending = writes.clone();
    handle.spawn(async move {
        let result = end(ending, job.run().await).await;
        // Memory and gate are let go before the pull counts as over.
        drop(job);
        let _ = done.send(result);
    });
    Pull { result, writes, cancel }
}

/// Waits for what is on its way to the memory, and looks at what arrived there.
async fn end(writes: Writes, result: Result<PullReport, PullError>) -> Result<PullReport, PullError> {
    let on_device = writes.memory.as_ref().is_some_and(|memory| memory.ahead() > 0);
    let ends = move || {
        let flushed = writes.flush();
        let mut report = result?;
        flushed?;
        // What was copied directly was looked at before the holder was told.
        if !report.direct {
            report.failed.extend(writes.verify(&report.checksums, report.form)?);
            report.failed.sort_unstable();
            report.failed.dedup();
        }
        Ok(report)
    };
    // A memory that is written where it lies has nothing to wait for.
    if !on_device {
        return ends();
    }
    match tokio::task::spawn_blocking(ends).await {
        Ok(result) => result,
        Err(error) => Err(PullError::Memory(error.to_string())),
    }
}

/// Whether a pull ended since its time was over.
fn is_late(error: WireError) -> bool {
    matches!(error.code, ErrorCode::Deadline | ErrorCode::Stalled)
}

/// A pull that broke, and whether asking again on another connection may help.
struct Broken {
    error: PullError,
    unanswered: bool,
}

impl From<PullError> for Broken {
    fn from(error: PullError) -> Self {
        Self { error, unanswered: false }
    }
}

impl Job {
    async fn run(&self) -> Result<PullReport, PullError> {
        self.check()?;
        if self.block_ids.is_empty() {
            return Ok(PullReport {
                bytes: 0,
                elapsed: Duration::ZERO,
                waited: Duration::ZERO,
                rtt: Duration::ZERO,
                corrupt: 0,
                failed: Vec::new(),
                stopped: None,
                checksums: Vec::new(),
                form: BlockForm::AsItLies,
                direct: false,
            });
        }
        let _permit = self.in_time(self.shared.pulls.acquire()).await?;
        let (link, reused) = self.connect().await?;
        if let Some(result) = self.direct(&link).await {
            return result;
        }
        match self.attempt(&link.connection).await {
            // The connection may have died unseen while nobody used it, or the peer may have another life by now.
            Err(Broken { unanswered: true, .. }) if reused => {
                link.connection.close(0u8.into(), b"broken");
                let (link, _) = self.connect().await?;
                self.attempt(&link.connection).await.map_err(|broken| broken.error)
            }
            result => result.map_err(|broken| broken.error),
        }
    }

    /// Runs it by the direct way, where there is one and it does.
    async fn direct(&self, link: &Link) -> Option<Result<PullReport, PullError>> {
        let near = link.near()?;
        match direct::attempt(self, &near, self.header(), link.connection.rtt()).await {
            Ok(report) => Some(Ok(report)),
            Err(Failed::Settled(error)) => Some(Err(error)),
            Err(Failed::Elsewhere) => {
                link.pause();
                let peer = self.request.peer.engine_id.as_str();
                tracing::debug!(peer, "blocks of this engine are not for copying: they travel by QUIC");
                None
            }
            Err(Failed::Way(why)) => {
                link.pause();
                let peer = self.request.peer.engine_id.as_str();
                tracing::warn!(
                    peer,
                    why,
                    "blocks of an engine on this host cannot be copied directly: they travel by QUIC"
                );
                None
            }
        }
    }

    /// What is asked for.
    fn header(&self) -> PullHeader {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let request = &self.request;
        PullHeader {
            transfer_id: request.transfer_id,
            epoch: request.epoch,
            layout: request.layout.fingerprint,
            content: request.layout.content(),
            dtype: self.packed_bytes().map_or(WireDtype::AsStored, |_| WireDtype::Fp8),
            last_hash: request.last_hash,
            first_block: request.first_block,
            blocks: self.block_ids.len() as u32,
            rank: request.rank,
            ranks: request.ranks,
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            credit: self.shared.limits.window_bytes,
        }
    }

    /// Bytes of a block that comes packed, where it may and can.
    fn packed_bytes(&self) -> Option<u64> {
        let packed = || self.request.layout.packed_bytes().ok().map(|bytes| bytes as u64);
        match self.request.dtype {
            WireDtype::AsStored => None,
            WireDtype::Fp8 => packed(),
        }
    }

    /// What it writes to.
    pub(crate) fn writes(&self) -> Writes {
        let (memory, block_ids, gate) = (self.memory.clone(), self.block_ids.clone(), self.gate.clone());
        Writes { memory: Some(memory), block_ids, heads: self.request.layout.heads.clone(), gate }
    }

    /// Waits for the copies under way.
    pub(crate) fn flush(&self) -> Result<(), PullError> {
        self.writes().flush()
    }

    /// What the caller may have got wrong.
    fn check(&self) -> Result<(), PullError> {
        let blocks = self.memory.num_blocks();
        let mut sorted = self.block_ids.to_vec();
        sorted.sort_unstable();
        if let Some(last) = sorted.last().filter(|last| u64::from(**last) >= blocks) {
            return Err(PullError::Memory(format!("block {last}: there are {blocks}")));
        }
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(PullError::Memory(format!("block {} is listed twice", pair[0]))),
            None => Ok(()),
        }
    }

    async fn connect(&self) -> Result<(Link, bool), PullError> {
        self.in_time(self.shared.peers.get(&self.request.peer)).await?
    }

    /// The result of `work`, unless the pull is cancelled or its deadline passes first.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, PullError> {
        let stopped = |code: ErrorCode| Err(PullError::Stopped(code.into()));
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => stopped(ErrorCode::Cancelled),
            result = timeout_at(self.deadline.into(), work) => match result {
                Ok(result) => Ok(result),
                Err(_) => stopped(ErrorCode::Deadline),
            },
        }
    }

    async fn attempt(&self, connection: &Connection) -> Result<PullReport, Broken> {
        let lost = |error: String| Broken { error: PullError::ConnectionLost(error), unanswered: true };
        let (mut send, mut recv) = match self.in_time(connection.open_bi()).await? {
            Ok(streams) => streams,
            Err(error) => return Err(lost(error.to_string())),
        };
        let mut receiver = Receiver::new(
            Instant::now(),
            ReceiverConfig {
                pull: self.header(),
                block_bytes: self.memory.block_bytes() as u64,
                packed_bytes: self.packed_bytes(),
                deadline: self.deadline,
                stall: self.shared.limits.stall,
                direct: false,
            },
        );
        let mut memory_error = None;
        let result = self.drive(&mut receiver, &mut send, &mut recv, &mut memory_error).await;
        let (received, stopped) = match result {
            Ok(received) => (received, None),
            Err(stop) => {
                // Both sides have the same deadline, and see that nothing moves: it is the same whose clock is ahead.
                let stop = match stop {
                    Stop::ByPeer(error) if is_late(error) => Stop::Here(error),
                    stop => stop,
                };
                let code = match stop {
                    Stop::ByPeer(error) | Stop::Here(error) => error.code,
                    Stop::Lost => ErrorCode::Cancelled,
                };
                let _ = recv.stop((code as u16).into());
                if code == ErrorCode::Stalled {
                    connection.close(0u8.into(), b"stalled");
                }
                let stalled = matches!(stop, Stop::Here(WireError { code: ErrorCode::Stalled, .. }));
                let unanswered = !receiver.answered() && (stop == Stop::Lost || stalled);
                let received = receiver.so_far(Instant::now());
                let brought = match stop {
                    // What has come says how fast, even where it is nothing.
                    Stop::Here(error) => is_late(error),
                    Stop::ByPeer(_) | Stop::Lost => received.failed.len() < self.block_ids.len(),
                };
                let brought = brought && memory_error.is_none() && !unanswered;
                let error = match (memory_error, stop) {
                    (Some(error), _) => PullError::Memory(error),
                    (None, Stop::ByPeer(error)) => PullError::Refused(error),
                    (None, Stop::Here(error)) => PullError::Stopped(error),
                    (None, Stop::Lost) => PullError::ConnectionLost(
                        connection.close_reason().map_or("stream closed".into(), |reason| reason.to_string()),
                    ),
                };
                if !brought {
                    return Err(Broken { error, unanswered });
                }
                (received, Some(error))
            }
        };
        let Received { bytes, corrupt, failed, checksums, waited } = received;
        let counters = &self.shared.counters;
        counters.corrupt.fetch_add(u64::from(corrupt), Ordering::Relaxed);
        Ok(PullReport {
            bytes,
            elapsed: self.started.elapsed(),
            waited,
            rtt: connection.rtt(),
            corrupt,
            failed,
            stopped,
            checksums,
            form: receiver.form(),
            direct: false,
        })
    }

    /// Writes bytes of a block as it travels.
    fn write(
        &self,
        filling: &mut Option<Filling>,
        form: BlockForm,
        block: u32,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), String> {
        let written = |result: Result<(), MemoryError>| result.map_err(|error| error.to_string());
        if form == BlockForm::AsItLies {
            return written(self.memory.write(block, offset, bytes));
        }
        if filling.is_none() {
            // The receiver takes such forms where they were offered, and that is where the heads are known.
            let map = self.request.layout.heads.clone().ok_or("heads of unknown places")?;
            let new = Filling::new(self.memory.clone(), map, form.dtype());
            *filling = Some(new.map_err(|error| error.to_string())?);
        }
        filling.as_mut().map_or(Ok(()), |filling| written(filling.write(block, offset, bytes)))
    }

    /// Moves bytes between the streams, the memory and the receiver until the receiver is done.
    async fn drive(
        &self,
        receiver: &mut Receiver,
        send: &mut SendStream,
        recv: &mut RecvStream,
        memory_error: &mut Option<String>,
    ) -> Result<Received, Stop> {
        let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
        let mut outgoing: Vec<u8> = Vec::new();
        let mut filling = None;
        let timer = sleep_until(self.deadline.into());
        tokio::pin!(timer);
        loop {
            let mut done = None;
            {
                let mut open = self.gate.enter();
                while let Some(action) = receiver.poll() {
                    match action {
                        ReceiverAction::Send(frame) => outgoing.extend_from_slice(frame.as_ref()),
                        ReceiverAction::Write { index, offset, bytes } => {
                            if open.is_none() {
                                receiver.cancel(ErrorCode::Cancelled.into());
                                continue;
                            }
                            let counters = &self.shared.counters;
                            counters.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                            if receiver.form() == BlockForm::Packed {
                                counters.packed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                            }
                            let block = self.block_ids[index as usize];
                            let wrote = self.write(&mut filling, receiver.form(), block, offset, &bytes);
                            if let Err(error) = wrote {
                                open = None;
                                *memory_error = Some(error);
                                receiver.cancel(ErrorCode::Internal.into());
                            }
                        }
                        // Places are told on Unix sockets only.
                        ReceiverAction::Copy { .. } => receiver.cancel(ErrorCode::Protocol.into()),
                        ReceiverAction::Done(result) => done = Some(result),
                    }
                }
            }
            if !outgoing.is_empty() {
                // Where this fails, reading fails too, and says more.
                let _ = timeout_at(self.deadline.into(), send.write_all(&outgoing)).await;
                outgoing.clear();
            }
            if let Some(result) = done {
                let _ = send.finish();
                return result;
            }
            let due = receiver.poll_timeout().unwrap_or(self.deadline);
            if timer.deadline().into_std() > due {
                timer.as_mut().reset(due.into());
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => receiver.cancel(ErrorCode::Cancelled.into()),
                read = recv.read_chunks(&mut chunks) => {
                    let now = Instant::now();
                    match read {
                        Ok(Some(count)) => for chunk in &mut chunks[..count] {
                            receiver.handle_bytes(now, std::mem::take(chunk));
                        },
                        Ok(None) => receiver.handle_end(StreamEnd::Finished),
                        Err(ReadError::Reset(number)) => {
                            receiver.handle_end(StreamEnd::Reset(number.into_inner()));
                        }
                        Err(_) => receiver.handle_end(StreamEnd::Lost),
                    }
                }
                () = &mut timer => {
                    receiver.handle_timeout(Instant::now());
                    timer.as_mut().reset(receiver.poll_timeout().unwrap_or(self.deadline).into());
                }
            }
        }
    }
}
