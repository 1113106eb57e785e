//! Finding out whether a peer is on this host: whether its socket can be reached.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use baton_proto::wire::{ErrorCode, Frame, Near, NearReply};
use quinn::{Connection, SendStream};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::timeout;

use super::{PATIENCE, PAUSE, socket};
use crate::quic::Shared;

/// 128 random bits.
fn random() -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}

/// Who may come by the socket of this endpoint.
pub(crate) struct Tickets {
    /// Names the socket.
    pub(crate) name: [u8; 16],
    /// One for each connection that is open; it bounds them.
    tokens: Mutex<HashSet<[u8; 16]>>,
}

impl Tickets {
    /// None yet.
    pub(crate) fn new() -> Option<Arc<Self>> {
        Some(Arc::new(Self { name: random()?, tokens: Mutex::default() }))
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
    let reply = match ticket.filter(|_| own_port) {
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

/// Asks on a new connection, unless this endpoint does without.
pub(crate) async fn ask(connection: Connection, direct: bool) -> Link {
    let near = match direct {
        true => timeout(PATIENCE, reply(&connection)).await.ok().flatten(),
        false => None,
    };
    // What cannot be reached is on another host, or in another network namespace.
    let near = near.filter(|near| socket::connect(&near.name).is_ok());
    Link { connection, near, paused: Arc::default() }
}

async fn reply(connection: &Connection) -> Option<NearReply> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    let port = connection.remote_address().port();
    send.write_all(Frame::Near(Near { port }).encode().as_ref()).await.ok()?;
    let _ = send.finish();
    let bytes = recv.read_to_end(256).await.ok()?;
    match Frame::decode(&bytes) {
        Ok(Some((Frame::NearReply(reply), _))) => Some(reply),
        _ => None,
    }
}
