//! The puller's side: a pull whose blocks are copied from the holder's memory.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_kernels::{MemoryError, PeerMemory};
use baton_proto::wire::{
    BlockForm, Direct, ErrorCode, Frame, NearReply, PullHeader, Purpose, WireDtype, WireError,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep_until, timeout_at};
use xxhash_rust::xxh3::Xxh3;

use super::mappings::is_final;
use super::socket;
use crate::checksum::of_block;
use crate::protocol::{Received, Receiver, ReceiverAction, ReceiverConfig, Stop, StreamEnd};
use crate::quic::{Job, PullError, PullReport};

/// Bytes copied between two looks at the clock and for a cancel: less than a millisecond, or one block.
const AT_ONCE: usize = 4 << 20;

/// A direct pull that did not come to its end.
pub(crate) enum Failed {
    /// Nothing would come of another way either.
    Settled(PullError),
    /// The pull may go by QUIC. Why this way did not do.
    Way(String),
    /// The pull may go by QUIC: there is no such way for its blocks.
    Elsewhere,
}

impl Failed {
    pub(super) fn way(error: impl ToString) -> Self {
        Self::Way(error.to_string())
    }

    pub(super) fn refused(error: WireError) -> Self {
        match error.code {
            code if is_final(code) => Self::Settled(PullError::Refused(error)),
            ErrorCode::Elsewhere => Self::Elsewhere,
            _ => Self::Way(format!("refused: {error}")),
        }
    }
}

impl From<PullError> for Failed {
    fn from(error: PullError) -> Self {
        Self::Settled(error)
    }
}

/// Waits for the copies under way when dropped, and so before the connection closes whose end tells the holder that
/// there are none.
struct Ended<'a>(&'a Job);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // What is wrong is found by who waits for the copies to use them.
        let _ = self.0.flush();
    }
}

/// Runs a pull by the direct way. `rtt` is the QUIC connection's, for the report.
///
/// # Cancel safety
/// Safe to drop: no copy is under way any more when the drop returns.
pub(crate) async fn attempt(
    job: &Job,
    near: &NearReply,
    pull: PullHeader,
    rtt: Duration,
) -> Result<PullReport, Failed> {
    // Nothing travels, so nothing has to be bounded, or packed.
    let pull = PullHeader { credit: u64::MAX, dtype: WireDtype::AsStored, ..pull };
    let peer =
        job.in_time(job.shared.mappings.get(&job.request.peer.engine_id, near, pull, &job.memory)).await??;
    let mut stream = socket::connect(&near.name).map_err(Failed::way)?;
    // Declared behind what it uses: it is dropped first.
    let ended = Ended(job);
    let config = ReceiverConfig {
        pull,
        block_bytes: job.memory.block_bytes() as u64,
        packed_bytes: None,
        deadline: job.deadline,
        stall: job.shared.limits.stall,
        direct: true,
    };
    let mut receiver = Receiver::new(Instant::now(), config);
    let mut copying = Copying { job, peer: &peer, memory_error: None, on_device: false };
    let direct = Frame::Direct(Direct { token: near.token, purpose: Purpose::Copy });
    let mut outgoing = direct.encode().as_ref().to_vec();
    let result = copying.drive(&mut receiver, &mut stream, &mut outgoing).await;
    let received = match result {
        Ok(received) => received,
        Err(stop) => {
            // Where there is a last word, it ends the hold's part. It comes behind the last copy.
            drop(ended);
            let _ = timeout_at(job.deadline.into(), stream.write_all(&outgoing)).await;
            let unusable = copying.memory_error.map(|error| error.to_string());
            return Err(match (unusable, stop) {
                (Some(error), _) => Failed::Way(error),
                (None, Stop::ByPeer(error)) => Failed::refused(error),
                (None, Stop::Here(error))
                    if matches!(error.code, ErrorCode::Cancelled | ErrorCode::Deadline) =>
                {
                    Failed::Settled(PullError::Stopped(error))
                }
                (None, Stop::Here(error)) => Failed::way(error),
                (None, Stop::Lost) => Failed::way("the holder hung up"),
            });
        }
    };
    if copying.on_device {
        verify(job, &received.checksums).await?;
    }
    drop(ended);
    // Where the holder does not hear of it, the hold stays until its lease ends.
    let _ = timeout_at(job.deadline.into(), stream.write_all(&outgoing)).await;
    let Received { bytes, corrupt, failed, checksums, waited } = received;
    job.shared.counters.corrupt.fetch_add(u64::from(corrupt), Ordering::Relaxed);
    job.shared.counters.direct.fetch_add(bytes, Ordering::Relaxed);
    let (elapsed, form) = (job.started.elapsed(), BlockForm::AsItLies);
    let stopped = None;
    Ok(PullReport { bytes, elapsed, waited, rtt, corrupt, failed, stopped, checksums, form, direct: true })
}

/// Waits for a device's copies, and looks at what lies there now.
async fn verify(job: &Job, checksums: &[u64]) -> Result<(), Failed> {
    let (writes, memory, blocks) = (job.writes(), job.memory.clone(), job.block_ids.clone());
    let look = move || -> Result<Vec<u64>, String> {
        writes.flush().map_err(|error| error.to_string())?;
        let made = memory.checksums(&blocks).unwrap_or_else(|| {
            let guard: baton_kernels::Guard = std::sync::Arc::new(());
            blocks.iter().map(|block| of_block(&memory, *block, &guard)).collect()
        });
        made.map_err(|error| error.to_string())
    };
    let made = tokio::task::spawn_blocking(look).await.map_err(Failed::way)?.map_err(Failed::Way)?;
    if made != checksums {
        return Err(Failed::way("copied blocks do not hold what they should"));
    }
    Ok(())
}

struct Copying<'a> {
    job: &'a Job,
    peer: &'a PeerMemory,
    memory_error: Option<MemoryError>,
    /// Whether copies may be on their way, and their checksums unknown.
    on_device: bool,
}

impl Copying<'_> {
    /// Moves frames between the stream and the receiver, and copies what it asks for, until it is done. The last frame is
    /// left in `outgoing`.
    async fn drive(
        &mut self,
        receiver: &mut Receiver,
        stream: &mut UnixStream,
        outgoing: &mut Vec<u8>,
    ) -> Result<Received, Stop> {
        let mut buffer = [0; 16 << 10];
        let timer = sleep_until(self.job.deadline.into());
        tokio::pin!(timer);
        loop {
            let mut copied = 0;
            let mut done = None;
            while copied < AT_ONCE {
                match receiver.poll() {
                    Some(ReceiverAction::Send(frame)) => outgoing.extend_from_slice(frame.as_ref()),
                    Some(ReceiverAction::Copy { index, from }) => {
                        copied += self.job.memory.block_bytes();
                        self.copy(receiver, index, from);
                    }
                    // Bytes come by the other way only.
                    Some(ReceiverAction::Write { .. }) => receiver.cancel(ErrorCode::Protocol.into()),
                    Some(ReceiverAction::Done(result)) => {
                        done = Some(result);
                        break;
                    }
                    None => break,
                }
            }
            if let Some(result) = done {
                return result;
            }
            if !outgoing.is_empty() {
                // Where this fails, reading fails too.
                let _ = timeout_at(self.job.deadline.into(), stream.write_all(outgoing)).await;
                outgoing.clear();
            }
            let due = receiver.poll_timeout().unwrap_or(self.job.deadline);
            timer.as_mut().reset(due.into());
            tokio::select! {
                biased;
                () = self.job.cancel.cancelled() => receiver.cancel(ErrorCode::Cancelled.into()),
                () = self.job.shared.closing.cancelled() => receiver.handle_end(StreamEnd::Lost),
                () = &mut timer => receiver.handle_timeout(Instant::now()),
                read = stream.read(&mut buffer) => match read {
                    Ok(count) if count > 0 => {
                        receiver.handle_bytes(Instant::now(), Bytes::copy_from_slice(&buffer[..count]));
                    }
                    _ => receiver.handle_end(StreamEnd::Lost),
                },
                () = tokio::task::yield_now(), if copied >= AT_ONCE => {}
            }
        }
    }

    fn copy(&mut self, receiver: &mut Receiver, index: u32, from: u32) {
        let Some(_open) = self.job.gate.enter() else {
            return receiver.cancel(ErrorCode::Cancelled.into());
        };
        let mut hasher = Xxh3::new();
        let mut seen = false;
        let copied =
            self.job.memory.copy(self.job.block_ids[index as usize], self.peer, from, &mut |bytes| {
                seen = true;
                hasher.update(bytes);
            });
        match copied {
            Ok(()) => {
                self.on_device |= !seen;
                let bytes = self.job.memory.block_bytes() as u64;
                self.job.shared.counters.received.fetch_add(bytes, Ordering::Relaxed);
                receiver.handle_copied(Instant::now(), seen.then(|| hasher.digest()));
            }
            Err(error) => {
                self.memory_error = Some(error);
                receiver.cancel(ErrorCode::Internal.into());
            }
        }
    }
}
