//! The direct way: blocks between engines of one host are copied from memory to memory, and do not travel.
//!
//! # Who is near
//! An agent that has connected to another asks it over that connection ([`Frame::Near`]). The answer names an abstract
//! Unix socket, which only processes of the same host and network namespace can reach, and a token that admits to it for
//! as long as the connection lives. So whoever comes by the socket has shown on a QUIC connection, with mutual TLS, that
//! it is an agent of the fleet, and who answers there is the agent whose certificate was asked for. Both sides of the
//! socket see to it besides that the other is a process of the same user: one that could look into their memory in any
//! case. The question tells the port that was dialled: where it is not the holder's own, something between the two is
//! meant to see what passes, and there is no direct way.
//!
//! # What is given away
//! A *map* connection gives the puller what it needs to read the memory in which a held block lies: descriptors that
//! are open for reading only, or a GPU's IPC handles. It carries a pull like any other, and all of the pull's checks are
//! made before. It stays open until the holder's epoch ends; then the puller forgets the memory. One is enough for all
//! pulls from a rank.
//!
//! # A pull
//! A *copy* connection is one pull: the protocol of [`crate::protocol`] with the same two machines, but that a
//! [`Frame::Place`] stands where a block's bytes would, and that the holder stops by [`Frame::Refused`]. Id, epoch, lease,
//! layout, range and content are checked before any place is told, each block's checksum after it was copied, over the
//! bytes as they lie in the puller's memory then.
//!
//! # A closed connection means: no copy is in flight
//! The puller closes a copy connection only behind its last read of the holder's memory, and a dead process does not
//! read. The holder keeps the hold's guard until the connection is closed, whatever it has told the puller before. So a
//! hold is released only when no copy of it is in flight, as with bytes that travel. A puller that hangs keeps the blocks
//! of its pull for as long as it hangs; it is stopped between any two blocks.
//!
//! # Every bit
//! Nothing is packed here, whatever the pull's caller allows: a direct pull asks for KV as it is stored.
//!
//! # Engines of different layout
//! Blocks that would travel in the common order ([`crate::protocol`]) lie nowhere in that order: such pulls go by QUIC.
//!
//! # When it fails
//! What the hold refuses is refused. Whatever else goes wrong, the pull begins anew over QUIC, within its deadline, and
//! the direct way to this peer is left alone for [`PAUSE`].
//!
//! [`Frame::Near`]: baton_proto::wire::Frame::Near
//! [`Frame::Place`]: baton_proto::wire::Frame::Place
//! [`Frame::Refused`]: baton_proto::wire::Frame::Refused

mod mappings;
mod near;
mod pull;
mod serve;
mod socket;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use mappings::Mappings;
pub(crate) use near::{Link, Ticket, Tickets, answer, ask};
pub(crate) use pull::{Failed, attempt};
pub(crate) use serve::accept;
pub(crate) use socket::listen;

/// How long the direct way to a peer is left alone after it failed.
pub const PAUSE: Duration = Duration::from_secs(60);

/// Longest wait for a peer of the same host to answer.
const PATIENCE: Duration = Duration::from_secs(2);
