//! A UDP relay between two agents, which slows their link down, flips bytes on it, or goes silent.
//!
//! It stands where a bad network would: below QUIC, seeing ciphertext only. One task owns all state; each client
//! address gets a socket of its own towards the target, at most [`MAX_CLIENTS`] of them. A rate limit delays
//! datagrams in a queue of bounded length; what does not fit is lost, as in a switch.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Client addresses that one relay serves.
const MAX_CLIENTS: usize = 64;

/// Datagrams that wait for the rate limit, in each direction.
const QUEUE: usize = 256;

/// What the relay does to what passes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Bytes a second towards the client; unlimited where `None`.
    pub bytes_per_second: Option<u64>,
    /// Every n-th datagram, in both directions, has one byte flipped; none where 0.
    pub flip_every: u64,
}

/// A running relay; it ends when dropped.
pub struct Relay {
    address: SocketAddr,
    counters: Arc<Counters>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Counters {
    to_client: AtomicU64,
    datagrams: AtomicU64,
    flipped: AtomicU64,
}

impl Relay {
    /// Relays between a fresh loopback port and `target`.
    pub async fn start(target: SocketAddr, weather: Weather) -> anyhow::Result<Self> {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.context("relay: no socket")?);
        let address = front.local_addr()?;
        let counters = Arc::new(Counters::default());
        let (to_clients, queue) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(drain(queue, front.clone(), weather, counters.clone()));
        tasks.spawn(serve(front, target, weather, to_clients, counters.clone()));
        Ok(Self { address, counters, _tasks: tasks })
    }

    /// Where clients send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes passed towards clients so far.
    pub fn bytes_to_client(&self) -> u64 {
        self.counters.to_client.load(Ordering::Relaxed)
    }

    /// Datagrams with a flipped byte so far.
    pub fn flipped(&self) -> u64 {
        self.counters.flipped.load(Ordering::Relaxed)
    }

    /// Returns when that many bytes have passed towards clients, or fails at the deadline.
    pub async fn passed(&self, bytes: u64, within: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        while self.bytes_to_client() < bytes {
            anyhow::ensure!(
                Instant::now() < deadline,
                "relay: {} of {bytes} bytes passed in {within:?}",
                self.bytes_to_client()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }
}

fn batter(datagram: &mut [u8], weather: Weather, counters: &Counters) {
    let n = counters.datagrams.fetch_add(1, Ordering::Relaxed) + 1;
    if weather.flip_every > 0 && n.is_multiple_of(weather.flip_every) && !datagram.is_empty() {
        // Spreads over headers, payload and tag alike; 0x9e37… is odd, so every offset comes up.
        let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % datagram.len();
        datagram[at] ^= 0x40;
        counters.flipped.fetch_add(1, Ordering::Relaxed);
    }
}

async fn serve(
    front: Arc<UdpSocket>,
    target: SocketAddr,
    weather: Weather,
    to_clients: mpsc::Sender<(SocketAddr, Bytes)>,
    counters: Arc<Counters>,
) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut readers = JoinSet::new();
    let mut buffer = vec![0u8; 65_536];
    loop {
        // An ICMP "port unreachable" of an earlier datagram may surface as an error here: not ours to act on.
        let Ok((len, client)) = front.recv_from(&mut buffer).await else { continue };
        let back = match backs.get(&client) {
            Some(back) => back.clone(),
            None if backs.len() == MAX_CLIENTS => continue,
            None => {
                let Ok(back) = UdpSocket::bind("127.0.0.1:0").await else { continue };
                if back.connect(target).await.is_err() {
                    continue;
                }
                let back = Arc::new(back);
                backs.insert(client, back.clone());
                readers.spawn(answers(back.clone(), client, weather, to_clients.clone(), counters.clone()));
                back
            }
        };
        batter(&mut buffer[..len], weather, &counters);
        // A target that is gone loses datagrams; the peer's timers deal with that.
        let _ = back.send(&buffer[..len]).await;
    }
}

async fn answers(
    back: Arc<UdpSocket>,
    client: SocketAddr,
    weather: Weather,
    to_clients: mpsc::Sender<(SocketAddr, Bytes)>,
    counters: Arc<Counters>,
) {
    let mut buffer = vec![0u8; 65_536];
    loop {
        match back.recv(&mut buffer).await {
            Ok(len) => {
                batter(&mut buffer[..len], weather, &counters);
                // A full queue drops, as a switch does.
                let _ = to_clients.try_send((client, Bytes::copy_from_slice(&buffer[..len])));
            }
            // The target's port is closed just now; it may come back.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn drain(
    mut queue: mpsc::Receiver<(SocketAddr, Bytes)>,
    front: Arc<UdpSocket>,
    weather: Weather,
    counters: Arc<Counters>,
) {
    let mut free_at = Instant::now();
    while let Some((client, datagram)) = queue.recv().await {
        if let Some(rate) = weather.bytes_per_second {
            free_at = free_at.max(Instant::now());
            tokio::time::sleep_until(free_at).await;
            free_at += Duration::from_secs_f64(datagram.len() as f64 / rate as f64);
        }
        if front.send_to(&datagram, client).await.is_ok() {
            counters.to_client.fetch_add(datagram.len() as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0u8; 2048];
            while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                let _ = socket.send_to(&buffer[..len], from).await;
            }
        });
        address
    }

    #[tokio::test]
    async fn passes_both_ways_and_flips_one_byte_of_every_second_datagram() {
        let relay =
            Relay::start(echo().await, Weather { flip_every: 2, ..Weather::default() }).await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(relay.address()).await.unwrap();
        let mut buffer = [0u8; 2048];
        for _ in 0..8 {
            client.send(&[7; 100]).await.unwrap();
            let len = client.recv(&mut buffer).await.unwrap();
            // One of every two datagrams: there or back, so each echo has exactly one bad byte.
            assert_eq!(buffer[..len].iter().filter(|byte| **byte != 7).count(), 1);
        }
        assert_eq!(relay.flipped(), 8);
        assert_eq!(relay.bytes_to_client(), 800);
    }
}
