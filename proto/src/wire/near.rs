//! What agents of one host say to each other besides, so that blocks need not travel: see
//! `baton_kv_transfer::direct`.

use serde::{Deserialize, Serialize};

use crate::connector::Piece;

/// Asks for the direct way, which is open where the two agents are on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Near {
    /// The UDP port that the puller has dialled: where it is not the holder's own, something between the two is meant to
    /// see what passes.
    pub port: u16,
}

/// Where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NearReply {
    /// Names the holder's abstract Unix socket, which its own host alone can reach.
    pub name: [u8; 16],
    /// Admits the puller there, for as long as the connection lives that carries this frame.
    pub token: [u8; 16],
}

/// Opens a connection between agents of one host; the pull follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// From the [`NearReply`].
    pub token: [u8; 16],
    /// What for.
    pub purpose: Purpose,
}

/// What a connection between agents of one host is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be told where the blocks of the pull lie, as they are ready, and copy them.
    Copy,
    /// To be given the memory in which they lie. The connection then stays, until the holder does not share it any more.
    Map,
}

/// A worker's memory as another agent of the host is given it, to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Blocks; ids run from 0 to one less.
    pub num_blocks: u64,
    /// The contiguous runs that make up a block, in order.
    pub pieces: Vec<Piece>,
    /// What they lie in.
    pub storages: SharedStorages,
}

/// Storages of a [`SharedMemory`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedStorages {
    /// Files of shared memory, of so many bytes; their descriptors, open for reading, come with the message in order.
    Files(Vec<u64>),
    /// Allocations on a GPU.
    Gpu(Vec<SharedAllocation>),
}

/// An allocation on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedAllocation {
    /// CUDA IPC handle, 64 bytes.
    #[serde(with = "serde_bytes")]
    pub handle: Vec<u8>,
    /// Bytes of it that may be used.
    pub len: u64,
}
