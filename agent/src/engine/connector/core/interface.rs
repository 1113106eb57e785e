//! What goes into the core and what comes out.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use baton_kernels::BlockMemory;
use baton_kernels::cuda::{CudaStorage, IpcHandle};
use baton_kv_transfer::Making;
use baton_kv_transfer::{PullError, PullReport, PullRequest};
use baton_proto::connector::{Layout, ToAgent, ToConnector};
use baton_proto::control::v1;
use baton_proto::{BlockHash, Epoch, TransferId};

/// One connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// One pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PullId(pub u64);

/// The present, as the core is told it.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For leases and durations.
    pub instant: Instant,
    /// For epochs.
    pub unix_ms: u64,
}

/// What happens to the core.
#[derive(Debug)]
pub enum Input {
    /// A connection was accepted.
    Connected(ConnId),
    /// It sent a message.
    Message(ConnId, ToAgent, Extra),
    /// It sent what is no message.
    Malformed(ConnId, String),
    /// It sends nothing more.
    Ended(ConnId),
    /// The memory asked for by [`Action::Map`].
    Mapped(ConnId, Mapped),
    /// A pull is over; nothing writes to its blocks any more.
    PullEnded(PullId, Result<PullReport, PullError>),
    /// The coordinator does not need a hold any more.
    Release(TransferId),
    /// The hold table called, or its time has come.
    Woken,
    /// The agent stops.
    Stop,
}

/// What comes with a message, or follows from it alone.
#[derive(Debug, Default)]
pub struct Extra {
    /// File descriptor of a `Storage`.
    pub fd: Option<OwnedFd>,
    /// Block hashes of the content of a `Hold` or a `Pull`.
    pub hashes: Vec<BlockHash>,
}

/// A worker's memory, or why it cannot be used.
pub struct Mapped(pub Result<Arc<dyn BlockMemory>, String>);

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mapped").field(&self.0.as_ref().map(|_| ())).finish()
    }
}

/// The storages that a worker sent.
#[derive(Debug)]
pub enum Storages {
    /// Files of shared memory, each with its length in bytes.
    Host(Vec<(OwnedFd, u64)>),
    /// Memory of a GPU.
    Gpu {
        /// Which.
        uuid: [u8; 16],
        /// The event behind the worker's forward passes.
        ready: IpcHandle,
        /// Allocations.
        storages: Vec<CudaStorage>,
    },
}

impl Storages {
    /// None yet.
    pub(super) fn new() -> Self {
        Self::Host(Vec::new())
    }

    /// How many came.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Host(storages) => storages.len(),
            Self::Gpu { storages, .. } => storages.len(),
        }
    }

    /// Takes in a message about them. `Err` says what is wrong with it.
    pub(super) fn add(&mut self, message: ToAgent, fd: Option<OwnedFd>) -> Result<(), String> {
        match (self, message) {
            (Self::Host(storages), ToAgent::Storage { len }) => {
                let fd = fd.ok_or(
                    "storage: no file descriptor came with it; send one as ancillary data, and see the agent's limit of open files",
                )?;
                storages.push((fd, len));
            }
            (this @ Self::Host(_), ToAgent::Gpu { uuid, ready }) if this.len() == 0 => {
                let uuid = uuid.try_into().map_err(|_| "gpu.uuid: it has 16 bytes")?;
                let ready = ready.try_into().map_err(|_| "gpu.ready: a CUDA IPC handle has 64 bytes")?;
                *this = Self::Gpu { uuid, ready, storages: Vec::new() };
            }
            (Self::Gpu { storages, .. }, ToAgent::CudaStorage { handle, len }) => {
                let handle =
                    handle.try_into().map_err(|_| "cuda_storage.handle: a CUDA IPC handle has 64 bytes")?;
                storages.push(CudaStorage { handle, len });
            }
            (_, message) => {
                let kind = kind(&message);
                return Err(format!("{kind}: send `storage`s alone, or `gpu` and then `cuda_storage`s"));
            }
        }
        Ok(())
    }
}

/// What is to be done, in order.
pub enum Action {
    /// Send a message.
    Send(ConnId, ToConnector),
    /// Close the connection when what was sent is written. It is not named again.
    Close(ConnId),
    /// Map a worker's memory, and answer with [`Input::Mapped`].
    Map(ConnId, Storages, Layout, u64),
    /// Make checksums of held blocks, then drop the guard.
    Checksum(ChecksumJob),
    /// Start a pull, and answer with [`Input::PullEnded`].
    Pull(PullId, PullRequest, Arc<dyn BlockMemory>, Vec<u32>),
    /// Cancel it; it still ends.
    CancelPull(PullId),
    /// Tell the coordinator.
    Outcome(v1::TransferOutcome),
    /// Tell the coordinator.
    HoldTaken(v1::HoldTaken),
    /// Tell the coordinator.
    Link(v1::LinkSample),
}

/// Checksums to make.
pub struct ChecksumJob {
    /// Of which blocks of which rank.
    pub making: Making,
    /// When they came to be held.
    pub taken: Instant,
}

/// What the rest of the agent sees of the engine through its connectors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attachment {
    /// The engine's present epoch.
    pub epoch: Epoch,
    /// As the scheduler or a worker described it; `None` without a connector.
    pub engine: Option<EngineShape>,
    /// Whether all ranks and the scheduler are there.
    pub can_transfer: bool,
    /// Bytes of one block over all ranks; 0 until then.
    pub block_bytes: u64,
    /// Bytes that one takes on its way here from another host, likewise.
    pub wire_block_bytes: u64,
    /// See [`crate::layout::describe`]; empty until then.
    pub layout: String,
}

/// The facts that all connections of a life agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineShape {
    /// Model, as the engine serves it.
    pub model: String,
    /// Tokens in one block.
    pub block_size: u32,
    /// Blocks in the GPU cache.
    pub num_blocks: u64,
    /// Worker ranks.
    pub tp_size: u32,
    /// Most tokens of a prompt that one step computes; 0 where a prompt is computed at once.
    pub chunk_tokens: u32,
}

/// Name of a message, as in its `type`.
pub(super) fn kind(message: &ToAgent) -> &'static str {
    match message {
        ToAgent::Hello(_) => "hello",
        ToAgent::Storage { .. } => "storage",
        ToAgent::Gpu { .. } => "gpu",
        ToAgent::CudaStorage { .. } => "cuda_storage",
        ToAgent::Layout(_) => "layout",
        ToAgent::Computed(_) => "computed",
        ToAgent::Hold(_) => "hold",
        ToAgent::Pull(_) => "pull",
        ToAgent::Cancel { .. } => "cancel",
    }
}
