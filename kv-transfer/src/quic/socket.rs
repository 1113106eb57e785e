//! The UDP socket under an endpoint.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::net::sockopt;

/// Largest UDP payload over IPv4, and the most that one GSO call may carry.
pub(super) const MAX_UDP_PAYLOAD: u16 = 65_507;

/// What every path carries.
const SMALLEST_MTU: usize = 1_200;

/// What a path carries whose MTU the system does not tell: that of plain Ethernet.
const PLAIN_PAYLOAD: u16 = 1_452;

/// Socket buffer asked for in each direction, in bytes of kernel memory. It has to hold what peers may have under way,
/// or packets are lost where the reader is a moment late.
const SOCKET_BUFFER: usize = 32 << 20;

/// Opens a socket for an endpoint, with buffers as large as the system allows.
pub(super) fn open(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(listen)?;
    // A privileged agent may exceed net.core.{r,w}mem_max; any other gets what they allow.
    if sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER)?;
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER)?;
    }
    let got = sockopt::socket_recv_buffer_size(&socket)?;
    if got < SOCKET_BUFFER {
        tracing::debug!(
            wanted = SOCKET_BUFFER,
            got,
            "small UDP receive buffer: raise net.core.rmem_max, or give the agent CAP_NET_ADMIN"
        );
    }
    Ok(socket)
}

/// Largest UDP payload that the first hop towards `peer` carries: an upper bound for the path's.
pub(super) fn route_payload(peer: SocketAddr) -> u16 {
    let route = || -> io::Result<u32> {
        let any: SocketAddr = match peer {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(peer)?;
        let (mtu, headers) = match peer {
            SocketAddr::V4(_) => (sockopt::ip_mtu(&socket)?, 20 + 8),
            SocketAddr::V6(_) => (sockopt::ipv6_mtu(&socket)?, 40 + 8),
        };
        Ok(mtu.saturating_sub(headers))
    };
    match route() {
        Ok(payload) => payload.clamp(SMALLEST_MTU as u32, u32::from(MAX_UDP_PAYLOAD)) as u16,
        Err(_) => PLAIN_PAYLOAD,
    }
}

/// A socket that cuts what is too long for one GSO call.
///
/// quinn asks for ten segments at once, whatever their size. With large segments that exceeds what the kernel takes
/// (EMSGSIZE), which quinn then reads as a path that does not carry the MTU.
pub(super) struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Size of the segments sent last.
    segment: AtomicUsize,
}

impl Socket {
    /// Must be called within the runtime that drives it.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        Ok(Arc::new(Self { inner, segment: AtomicUsize::new(SMALLEST_MTU) }))
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        // Small ones are acknowledgements and the like, and say nothing about the next batch.
        if segment >= SMALLEST_MTU {
            self.segment.store(segment, Ordering::Relaxed);
        }
        let most = (usize::from(MAX_UDP_PAYLOAD) / segment).max(1) * segment;
        if transmit.contents.len() <= most {
            return self.inner.try_send(transmit);
        }
        // Where the socket fills up midway, quinn sends all of it again: the peer drops the duplicates, which costs
        // less than the loss of the rest would.
        transmit.contents.chunks(most).try_for_each(|contents| {
            self.inner.try_send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: (contents.len() > segment).then_some(segment),
                src_ip: transmit.src_ip,
            })
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }

    /// As many as fit one call, as far as the last ones tell: batches beyond that only cost cache.
    fn max_transmit_segments(&self) -> usize {
        let fit = usize::from(MAX_UDP_PAYLOAD) / self.segment.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(fit.max(1))
    }

    /// quinn multiplies its receive buffer, which holds the largest UDP payload 32 times, by this. What GRO joins never
    /// exceeds one such payload, so once is enough: 2 MiB.
    fn max_receive_segments(&self) -> usize {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_tells_loopback_from_the_rest() {
        assert_eq!(route_payload("127.0.0.1:9".parse().unwrap()), MAX_UDP_PAYLOAD);
    }

    #[tokio::test]
    async fn what_exceeds_one_call_is_cut_into_several() {
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        target.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let socket = Socket::new(open("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
        assert_eq!(socket.max_receive_segments(), 1);
        let contents: Vec<u8> = (0..105_000u32).map(|at| (at / 20_000) as u8).collect();
        let transmit = Transmit {
            destination: target.local_addr().unwrap(),
            ecn: None,
            contents: &contents,
            segment_size: Some(20_000),
            src_ip: None,
        };
        let mut poller = socket.clone().create_io_poller();
        std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
        socket.try_send(&transmit).unwrap();
        assert_eq!(socket.max_transmit_segments(), 3);
        let mut buffer = vec![0; 65_536];
        for (number, len) in [20_000, 20_000, 20_000, 20_000, 20_000, 5_000].into_iter().enumerate() {
            assert_eq!(target.recv(&mut buffer).unwrap(), len);
            assert!(buffer[..len].iter().all(|byte| usize::from(*byte) == number));
        }
    }
}
