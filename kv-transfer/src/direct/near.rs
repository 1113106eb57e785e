//! Finding out whether a peer is on this host.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use baton_proto::wire::{ErrorCode, Frame, Near, NearReply};
use quinn::{Connection, SendStream};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::timeout;
use xxhash_rust::xxh3::xxh3_128;

use super::{PATIENCE, PAUSE};
use crate::quic::Shared;

/// Names this host's kernel and network namespace, in which abstract sockets live; `None` where the system does not
/// tell.
pub(crate) fn host() -> Option<[u8; 16]> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let network = std::fs::read_link("/proc/self/ns/net").ok()?;
    Some(xxh3_128(format!("{} {}", boot.trim(), network.display()).as_bytes()).to_le_bytes())
}

/// 128 random bits.
fn random() -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}

/// Who may come by the socket of this endpoint.
pub(crate) struct Tickets {
    host: [u8; 16],
    /// Names the socket.
    pub(crate) name: [u8; 16],
    /// One for each connection that is open; it bounds them.
    tokens: Mutex<HashSet<[u8; 16]>>,
}

impl Tickets {
    /// None yet.
    pub(crate) fn new(host: [u8; 16]) -> Option<Arc<Self>> {
        Some(Arc::new(Self { host, name: random()?, tokens: Mutex::default() }))
    }

    /// For a connection that was accepted, as long as it is open.
    pub(crate) fn issue(self: &Arc<Self>) -> Option<Ticket> {
        let token = random()?;
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(token);
        Some(Ticket { tickets: self.clone(), token })
    }

    pub(super) fn admits(&self, token: &[u8; 16]) -> bool {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).contains(token)
    }
}

/// What one connection's peer is admitted by. Void when dropped.
pub(crate) struct Ticket {
    tickets: Arc<Tickets>,
    token: [u8; 16],
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.tickets.tokens.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.token);
    }
}

/// The holder's side.
pub(crate) async fn answer(shared: &Shared, ticket: Option<&Ticket>, asked: Near, send: &mut SendStream) {
    let own_port = shared.quic.local_addr().is_ok_and(|own| own.port() == asked.port);
    let near = ticket.filter(|ticket| own_port && asked.host == ticket.tickets.host);
    let reply = match near {
        Some(Ticket { tickets, token }) => Frame::NearReply(NearReply { name: tickets.name, token: *token }),
        None => Frame::Refused(ErrorCode::Elsewhere.into()),
    };
    let _ = send.write_all(reply.encode().as_ref()).await;
    let _ = send.finish();
}

/// A connection to a peer, and the direct way to it where there is one.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    near: Option<NearReply>,
    /// When the direct way may be tried again.
    paused: Arc<Mutex<Option<Instant>>>,
}

impl Link {
    /// The direct way, unless it failed a short while ago.
    pub(crate) fn near(&self) -> Option<NearReply> {
        let until = *self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.near.filter(|_| until.is_none_or(|until| until <= Instant::now()))
    }

    /// It failed.
    pub(crate) fn pause(&self) {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + PAUSE);
    }
}

/// Asks on a new connection, where `host` is this one's.
pub(crate) async fn ask(connection: Connection, host: Option<[u8; 16]>) -> Link {
    let near = match host {
        Some(host) => timeout(PATIENCE, reply(&connection, host)).await.ok().flatten(),
        None => None,
    };
    Link { connection, near, paused: Arc::default() }
}

async fn reply(connection: &Connection, host: [u8; 16]) -> Option<NearReply> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    let port = connection.remote_address().port();
    send.write_all(Frame::Near(Near { host, port }).encode().as_ref()).await.ok()?;
    let _ = send.finish();
    let bytes = recv.read_to_end(256).await.ok()?;
    match Frame::decode(&bytes) {
        Ok(Some((Frame::NearReply(reply), _))) => Some(reply),
        _ => None,
    }
}
