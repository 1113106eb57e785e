//! What the endpoint's users see.

use std::net::SocketAddr;
use std::time::Duration;

use baton_kernels::BlockLayout;
use baton_proto::wire::{BlockForm, PullHeader, WireDtype, WireError};
use baton_proto::{BlockHash, EngineId, Epoch, TransferId};

use crate::hold::HeldBlocks;
use crate::tls::{Identity, TlsError};

/// Whose blocks an endpoint serves: an agent's session, on top of its [`crate::HoldTable`].
pub trait Source: Send + Sync + 'static {
    /// Opens the blocks that a pull asks for. Called on the endpoint's threads: must not block for longer than a
    /// mutex is held.
    fn open(&self, pull: &PullHeader) -> Result<HeldBlocks, WireError>;

    /// A pull that was opened is over. Same threads.
    fn served(&self, report: SendReport) {
        let _ = report;
    }
}

/// What became of a pull that was served.
#[derive(Clone, Debug)]
pub struct SendReport {
    /// Names the handoff.
    pub transfer_id: TransferId,
    /// The pulling worker's rank.
    pub rank: u32,
    /// The first block asked for, counted from the prompt's start.
    pub first_block: u32,
    /// Checksums of the blocks asked for that were sent at least once, in order; see [`crate::checksum::digest`].
    pub checksums: Vec<u64>,
    /// KV bytes given to the connection, or told the place of, repetitions included.
    pub bytes: u64,
    /// Blocks that were asked for again.
    pub repeated: u32,
    /// From the request to the end.
    pub elapsed: Duration,
    /// `Ok` where the puller said that it has all it needs.
    pub result: Result<(), WireError>,
}

/// Caps of an endpoint.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Pulls that this endpoint runs at once; more wait for their turn, up to their deadline. One in the common order, or
    /// packed, holds two blocks' bytes.
    pub max_pulls: usize,
    /// Pulls that it serves at once, over all peers; more are refused with `busy`. One in the common order, or packed, holds
    /// copies of what was sent and not acknowledged, and of blocks that come next: `window_bytes` and three blocks at most.
    pub max_served: usize,
    /// Pulls that it serves at once for one peer; more wait at the peer.
    pub max_served_per_peer: u32,
    /// Connections in each direction; more are refused.
    pub max_connections: usize,
    /// KV bytes that may be under way to this endpoint in one pull, and on one connection. Pulls read at once what
    /// arrives, so this much is buffered only for connections that lose packets: at worst `max_connections` times this.
    pub window_bytes: u64,
    /// How long the holder may send nothing in a pull before it counts as gone.
    pub stall: Duration,
    /// Longest deadline that a served pull may have.
    pub max_deadline: Duration,
    /// Threads of the endpoint.
    pub threads: usize,
    /// Whether blocks of engines on this host are copied from memory to memory; see [`crate::direct`].
    pub direct: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_pulls: 16,
            max_served: 64,
            max_served_per_peer: 16,
            max_connections: 1024,
            window_bytes: 8 << 20,
            stall: Duration::from_secs(2),
            max_deadline: Duration::from_secs(600),
            threads: 2,
            direct: true,
        }
    }
}

/// How an endpoint is set up.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// UDP address to listen on; port 0 for any.
    pub listen: SocketAddr,
    /// Certificates.
    pub identity: Identity,
    /// Caps.
    pub limits: Limits,
}

/// An endpoint that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket.
    #[error("transfer.listen {addr}: {error}")]
    Socket {
        /// The address asked for.
        addr: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its threads.
    #[error("threads of the transfer endpoint: {0}")]
    Threads(std::io::Error),
}

/// Another agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its engine; its certificate has to carry this name.
    pub engine_id: EngineId,
    /// host:port of its endpoint.
    pub address: String,
}

/// Blocks to fetch.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// Who holds them.
    pub peer: Peer,
    /// Names the handoff.
    pub transfer_id: TransferId,
    /// The peer's epoch when it held them.
    pub epoch: Epoch,
    /// How blocks lie in this worker's memory.
    pub layout: BlockLayout,
    /// What values may travel as. Blocks that are copied directly, those whose layout cannot be packed, and those of a
    /// holder that cannot, come as they are stored all the same.
    pub dtype: WireDtype,
    /// The first block to fetch, counted from the prompt's start.
    pub first_block: u32,
    /// Hash of the last block to fetch.
    pub last_hash: BlockHash,
    /// The worker's tensor-parallel rank.
    pub rank: u32,
    /// Ranks of this engine.
    pub ranks: u32,
    /// From now; at most 2^32 ms.
    pub deadline: Duration,
}

/// What a pull brought: all that it was to, unless [`Self::stopped`] says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullReport {
    /// KV bytes received, as they travelled, repetitions included.
    pub bytes: u64,
    /// From the call to the last byte.
    pub elapsed: Duration,
    /// Of that, how long the holder had nothing to send, since its engine had not computed it yet.
    pub waited: Duration,
    /// The connection's round trip as measured at the end.
    pub rtt: Duration,
    /// Blocks that arrived corrupt, repetitions included.
    pub corrupt: u32,
    /// Indices into the block ids, in ascending order, of blocks that do not hold what they should: they arrived corrupt twice, or not at
    /// all. Empty when all went well.
    pub failed: Vec<usize>,
    /// Why it ended before all blocks had come, if it did. Those that are not among [`Self::failed`] may be used.
    pub stopped: Option<PullError>,
    /// Checksums of all blocks, in order, as the holder sent them; 0 for those that did not come.
    pub checksums: Vec<u64>,
    /// The form of the blocks that these are of. Of packed ones they are of the packed bytes, and the blocks that lie in
    /// memory now are not, bit by bit, those of the holder.
    pub form: BlockForm,
    /// Whether they were copied from memory to memory, and did not travel.
    pub direct: bool,
}

/// Why a pull did not come to its end. Where it is all that is said of a pull, none of its blocks may be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PullError {
    /// The peer's address does not resolve, or no connection came about.
    #[error("peer {peer} at {address}: {reason}")]
    Unreachable {
        /// The peer's engine id.
        peer: EngineId,
        /// Its address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The connection broke during the pull.
    #[error("connection lost: {0}")]
    ConnectionLost(String),
    /// The peer refused or stopped.
    #[error("refused by the peer: {0}")]
    Refused(WireError),
    /// This side stopped: deadline, cancel, a silent peer, a broken protocol.
    #[error("{0}")]
    Stopped(WireError),
    /// Blocks that cannot be written.
    #[error("memory: {0}")]
    Memory(String),
}

impl PullError {
    /// A snake_case name for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::ConnectionLost(_) => "connection_lost",
            Self::Refused(error) | Self::Stopped(error) => error.code.name(),
            Self::Memory(_) => "memory",
        }
    }
}

/// What a path was found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathReport {
    /// Round trip, smoothed.
    pub rtt: Duration,
    /// Bytes that the peer sent for this measurement.
    pub bytes: u64,
    /// From the request to the last of them.
    pub elapsed: Duration,
    /// Largest UDP payload the peer has found the path to carry, in bytes.
    pub mtu: u16,
}

/// Running totals of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// KV bytes given to connections, or told the place of.
    pub sent_bytes: u64,
    /// KV bytes received.
    pub received_bytes: u64,
    /// Those of them that were copied from the memory of an engine on this host.
    pub direct_bytes: u64,
    /// Those of them that came packed.
    pub packed_bytes: u64,
    /// Blocks that arrived corrupt.
    pub corrupt_blocks: u64,
    /// Connections open now.
    pub connections: u64,
}
