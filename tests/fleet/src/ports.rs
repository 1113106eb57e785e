//! Free ports on loopback.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use rand::Rng;

/// Hands out ports that are free for TCP and UDP on 127.0.0.1, none twice. They lie below the range from which
/// Linux gives ports to outgoing connections, so that only another server can take one before its owner binds it.
#[derive(Default)]
pub(crate) struct Ports {
    given: HashSet<u16>,
}

impl Ports {
    /// Never hands out this port.
    pub(crate) fn reserve(&mut self, port: u16) {
        self.given.insert(port);
    }

    /// A free port, or `None` where a thousand tries found none.
    pub(crate) fn free(&mut self) -> Option<u16> {
        let mut rng = rand::rng();
        (0..1000).map(|_| rng.random_range(10_000..20_000)).find(|&port| {
            let free = !self.given.contains(&port)
                && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
            free && self.given.insert(port)
        })
    }
}
