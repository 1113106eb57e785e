//! Measuring a path.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_proto::wire::{ErrorCode, Frame, MAX_FRAME, Probe, ProbeReply};
use bytes::Bytes;
use quinn::{Connection, SendStream};
use tokio::time::timeout;

use super::api::{PathReport, Peer, PullError};
use super::endpoint::Shared;
use super::socket::MAX_UDP_PAYLOAD;

/// Most bytes of one probe.
const MAX_PROBE: u32 = 1 << 20;

/// Bytes of probes that are answered in each second on one connection.
const PROBE_RATE: f64 = 1024.0 * 1024.0;

/// Bytes that may be answered at once after a while without probes.
const PROBE_BURST: f64 = 4.0 * 1024.0 * 1024.0;

/// Longest wait for a probe.
const PROBE: Duration = Duration::from_secs(3);

/// Longest search for a path's MTU.
const WARM: Duration = Duration::from_secs(1);

/// The path's MTU is taken as found when it did not grow for so many round trips.
const SETTLED: u32 = 8;

/// Opens the congestion window at the end of a warm-up: a few round trips of slow start.
const WARM_BYTES: u32 = 1 << 20;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How much of probing a connection may still cause.
pub(super) struct Allowance {
    bucket: Mutex<(f64, Instant)>,
}

impl Allowance {
    pub(super) fn new(now: Instant) -> Self {
        Self { bucket: Mutex::new((PROBE_BURST, now)) }
    }

    /// As many of the bytes as may be sent now.
    fn take(&self, now: Instant, bytes: u32) -> u32 {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, since) = *bucket;
        let earned = now.saturating_duration_since(since).as_secs_f64() * PROBE_RATE;
        let left = (left + earned).min(PROBE_BURST);
        let taken = bytes.min(MAX_PROBE).min(left as u32);
        *bucket = (left - f64::from(taken), now);
        taken
    }
}

/// The peer's side.
pub(super) async fn answer(
    connection: &Connection,
    allowance: &Allowance,
    asked: Probe,
    send: &mut SendStream,
) {
    let bytes = allowance.take(Instant::now(), asked.bytes);
    let mtu = connection.stats().path.current_mtu;
    let reply = Frame::ProbeReply(ProbeReply { bytes, mtu }).encode();
    let answer = async {
        send.write_all(reply.as_ref()).await?;
        let mut left = bytes as usize;
        while left > 0 {
            let now = left.min(ZEROES.len());
            send.write_chunk(Bytes::from_static(&ZEROES[..now])).await?;
            left -= now;
        }
        let _ = send.finish();
        Ok::<_, quinn::WriteError>(())
    };
    // A puller that is gone, or does not read, is no news.
    let _ = timeout(PROBE, answer).await;
}

pub(super) async fn probe(shared: &Shared, peer: &Peer, bytes: u32) -> Result<PathReport, PullError> {
    let (link, reused) = shared.peers.get(peer).await?;
    match on(&link.connection, bytes).await {
        Err(PullError::ConnectionLost(_)) if reused => {
            link.connection.close(0u8.into(), b"broken");
            let (link, _) = shared.peers.get(peer).await?;
            on(&link.connection, bytes).await
        }
        result => result,
    }
}

pub(super) async fn warm(shared: &Shared, peer: &Peer) -> Result<PathReport, PullError> {
    let started = Instant::now();
    let mut report = probe(shared, peer, 0).await?;
    let mut unchanged = 0;
    while unchanged < SETTLED && report.mtu < MAX_UDP_PAYLOAD && started.elapsed() < WARM {
        let next = probe(shared, peer, 0).await?;
        unchanged = if next.mtu == report.mtu { unchanged + 1 } else { 0 };
        report = next;
    }
    probe(shared, peer, WARM_BYTES).await
}

/// One probe on one connection.
async fn on(connection: &Connection, bytes: u32) -> Result<PathReport, PullError> {
    let lost = |error: String| PullError::ConnectionLost(error);
    let work = async {
        let started = Instant::now();
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| lost(error.to_string()))?;
        let frame = Frame::Probe(Probe { bytes: bytes.min(MAX_PROBE) }).encode();
        send.write_all(frame.as_ref()).await.map_err(|error| lost(error.to_string()))?;
        let _ = send.finish();
        let mut head = Vec::new();
        let mut received = 0u64;
        let mut reply = None;
        while let Some(chunk) =
            recv.read_chunk(usize::MAX, true).await.map_err(|error| lost(error.to_string()))?
        {
            received += chunk.bytes.len() as u64;
            if reply.is_none() {
                head.extend_from_slice(&chunk.bytes[..chunk.bytes.len().min(MAX_FRAME)]);
                match Frame::decode(&head) {
                    Ok(None) => {}
                    Ok(Some((Frame::ProbeReply(body), len))) => reply = Some((body, len as u64)),
                    _ => return Err(PullError::Stopped(ErrorCode::Protocol.into())),
                }
            }
        }
        let elapsed = started.elapsed();
        match reply {
            Some((ProbeReply { bytes, mtu }, len)) if received == len + u64::from(bytes) => {
                Ok(PathReport { rtt: connection.rtt(), bytes: bytes.into(), elapsed, mtu })
            }
            _ => Err(PullError::Stopped(ErrorCode::Protocol.into())),
        }
    };
    match timeout(PROBE, work).await {
        Ok(result) => result,
        Err(_) => {
            // The next one begins on a new connection.
            connection.close(0u8.into(), b"stalled");
            Err(PullError::Stopped(ErrorCode::Stalled.into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_cost_at_most_the_allowance() {
        let start = Instant::now();
        let allowance = Allowance::new(start);
        let first: u32 = (0..10).map(|_| allowance.take(start, u32::MAX)).sum();
        assert_eq!(f64::from(first), PROBE_BURST);
        assert_eq!(allowance.take(start + Duration::from_millis(500), 1 << 20), 1 << 19);
        assert_eq!(allowance.take(start + Duration::from_secs(3600), 7), 7);
    }
}
