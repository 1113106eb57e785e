//! Messages between an engine's connector and its agent, over the agent's Unix socket.
//!
//! # Framing
//! Each message is a 32-bit little-endian length and that many bytes of msgpack: a map whose `type` names the
//! variant. A message may be at most [`MAX_MESSAGE`] bytes. The Python half lies in `agent/connector/`.
//!
//! # Connections
//! Each process of the engine that carries a connector opens one connection: the scheduler one, every worker
//! rank one. All name the same `instance`; a new instance means a restarted engine and starts a new epoch. A
//! connection opens with [`ToAgent::Hello`], answered by [`ToConnector::Welcome`] or [`ToConnector::Refused`].
//! A worker then describes its KV memory: one [`ToAgent::Storage`] per storage, each with one file
//! descriptor as ancillary data, or [`ToAgent::Gpu`] and one [`ToAgent::CudaStorage`] per storage; and
//! [`ToAgent::Layout`] last, answered by a second `Welcome` or by `Refused`.
//!
//! # A closed connection means: no copy is in flight
//! The agent closes a worker's connection only after its last read from or write to that worker's memory, and a
//! dead agent does not copy. So the connector may give all blocks back to the engine as soon as the connection is
//! gone: pulls count as failed, holds as released. In the other direction, a lost worker or scheduler connection ends the
//! engine's epoch: the agent drops its holds, and answers no pull for them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::block_hash::ContentKeys;
use crate::ids::{Epoch, TransferId};
use crate::plan::Source;

/// Version of this protocol.
pub const VERSION: u32 = 3;

/// Largest message in either direction: a 1M-token request is 4 MiB of token ids and its block ids.
pub const MAX_MESSAGE: usize = 16 << 20;

/// From the connector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// First on every connection.
    Hello(Hello),
    /// Worker: the next storage of its KV memory; its file descriptor comes with this message.
    Storage {
        /// Bytes that may be mapped.
        len: u64,
    },
    /// Worker: its KV memory lies on a GPU. Comes before its storages.
    Gpu {
        /// The GPU's UUID, 16 bytes.
        #[serde(with = "serde_bytes")]
        uuid: Vec<u8>,
        /// CUDA IPC handle, 64 bytes, of an event that the worker records behind every forward pass. What reads a
        /// held block waits for it.
        #[serde(with = "serde_bytes")]
        ready: Vec<u8>,
    },
    /// Worker: the next storage of its KV memory on the GPU.
    CudaStorage {
        /// CUDA IPC handle, 64 bytes, of an allocation; each allocation comes once.
        #[serde(with = "serde_bytes")]
        handle: Vec<u8>,
        /// Bytes of it that may be used, from its beginning.
        len: u64,
    },
    /// Worker: how blocks lie in the storages.
    Layout(Layout),
    /// Scheduler: a request's blocks stay until released, from now on or as they are computed.
    Hold(Hold),
    /// Worker: more blocks of a held prompt are there.
    Computed(Computed),
    /// Worker: fetch blocks into this worker's memory.
    Pull(Pull),
    /// Scheduler: the request behind a pull, or behind a hold that is not complete, was aborted, or preempted. The pull still
    /// ends with a `PullDone`, the hold with a `Released`.
    Cancel {
        /// The engine's request id.
        request_id: String,
    },
}

/// Who is calling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// Unique to one life of the engine.
    pub instance: String,
    /// Which part of the engine this is.
    pub side: Side,
    /// Worker ranks that will register memory.
    pub tp_size: u32,
    /// Model, as the engine serves it.
    pub model: String,
    /// Tokens in one block.
    pub block_size: u32,
    /// Blocks in the GPU cache.
    pub num_blocks: u64,
    /// Most tokens of a prompt that one step computes: blocks of longer ones come to be held in chunks of so many. 0 where a prompt is
    /// computed at once.
    pub chunk_tokens: u32,
}

/// Part of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The scheduler.
    Scheduler,
    /// A worker, by its tensor-parallel rank.
    Worker(u32),
}

/// How blocks lie in a worker's storages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Facts about what the bytes mean, which must be equal on both sides of any transfer: `dtype`, `block_size`, `layers`,
    /// `attention` and the like.
    pub facts: BTreeMap<String, String>,
    /// Facts about this rank's part and the order within it, which must be equal too where blocks travel as they lie:
    /// `inner` (order of the dimensions inside a piece), `tp_rank`, `tp_size` and the like.
    pub order: BTreeMap<String, String>,
    /// The contiguous runs that make up a block, in the order in which they travel where it travels as it lies.
    pub pieces: Vec<Piece>,
    /// Where heads lie in a block; `None` where they cannot be told apart. Then blocks travel as they lie, or not at all.
    pub heads: Option<Heads>,
}

/// The heads in a worker's blocks, for engines of another number of ranks or order of dimensions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heads {
    /// KV heads of the model; 1 for one latent vector for each token, which every rank has.
    pub total: u32,
    /// Heads on this rank. Rank `r` of `n` has those from `r·total/n` on; where ranks outnumber heads, `n/total` ranks one
    /// after another have the same one.
    pub count: u32,
    /// Their bytes, in the common order of one head: by layer.
    pub spans: Vec<HeadSpan>,
}

/// Where a rank's heads lie in one layer of a block. Places are bytes within the block, its pieces end to end.
///
/// Head `h` has a row of `len` bytes at `start + h·head_stride + i₀·stride₀ + i₁·stride₁ + …` for each `i` within `dims`,
/// the last of them running fastest: tokens, and K before V within each where they are apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadSpan {
    /// Where head 0 begins.
    pub start: u32,
    /// From one head to the next.
    pub head_stride: u32,
    /// How often, and at which stride.
    pub dims: Vec<(u32, u32)>,
    /// Bytes of a row.
    pub len: u32,
}

/// One contiguous run of every block: of block `b`, bytes `offset + b·stride ..` of a storage, `len` long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Index into the storages, in order of their messages.
    pub storage: u32,
    /// Where block 0's run begins, in bytes.
    pub offset: u64,
    /// From one block's run to the next one's, in bytes.
    pub stride: u64,
    /// Length of the run, in bytes.
    pub len: u32,
}

/// What a prompt's KV was computed from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Token ids, 32-bit little-endian.
    #[serde(with = "serde_bytes")]
    pub tokens: Vec<u8>,
    /// What else it depends on.
    #[serde(default)]
    pub keys: ContentKeys,
}

impl Content {
    /// The token ids, or `None` where the bytes are no whole number of them.
    pub fn token_ids(&self) -> Option<Vec<u32>> {
        let (ids, rest) = self.tokens.as_chunks::<4>();
        rest.is_empty().then(|| ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
    }
}

/// Blocks of a request that stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The engine's request id.
    pub request_id: String,
    /// Names the handoff.
    pub transfer_id: TransferId,
    /// From now, or from the last [`Computed`], on the agent's clock.
    pub lease_ms: u32,
    /// The tokens whose KV the blocks hold, from the prompt's start; the last block may be partly filled.
    pub content: Content,
    /// The first blocks, in order, that all ranks have computed already. The others follow as each worker's [`Computed`].
    pub block_ids: Vec<u32>,
}

/// Blocks of a held prompt that a rank has computed, all layers of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Computed {
    /// The engine's request id.
    pub request_id: String,
    /// How many blocks of the prompt come before them.
    pub first_block: u32,
    /// The blocks, in order; the same for all ranks.
    pub block_ids: Vec<u32>,
}

/// Blocks to fetch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pull {
    /// The engine's request id.
    pub request_id: String,
    /// Names the handoff.
    pub transfer_id: TransferId,
    /// Who holds the blocks.
    pub source: Source,
    /// From now, on the agent's clock.
    pub deadline_ms: u32,
    /// The tokens whose KV the blocks are to hold, from the prompt's start; the engine computes those behind them.
    pub content: Content,
    /// Leading blocks that this engine has already; the pull begins behind them.
    pub first_block: u32,
    /// Where to put block `first_block` and those behind it, in order.
    pub block_ids: Vec<u32>,
}

/// To the connector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToConnector {
    /// The hello, or the worker's layout, was accepted.
    Welcome {
        /// [`VERSION`].
        version: u32,
        /// The engine's epoch, to be named in every [`crate::plan::Held`].
        epoch: Epoch,
    },
    /// It was not; the agent closes the connection. Trying again with the same message is of no use.
    Refused {
        /// What is wrong, and what would mend it.
        reason: String,
    },
    /// To workers: holds whose blocks nobody reads any more.
    Released {
        /// The engine's request ids.
        request_ids: Vec<String>,
    },
    /// To the worker that asked: the pull is over, and nothing is written to its blocks any more.
    PullDone {
        /// The engine's request id.
        request_id: String,
        /// Blocks that do not hold what they should; empty when all went well.
        failed_blocks: Vec<u32>,
        /// Why; empty when all went well.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_maps_with_a_type() {
        let pull = ToAgent::Pull(Pull {
            request_id: "r".into(),
            transfer_id: TransferId::from_bytes([7; 16]),
            source: Source {
                engine_id: "p0".parse().unwrap(),
                address: "127.0.0.1:1".into(),
                epoch: Epoch(3),
            },
            deadline_ms: 5,
            content: Content { tokens: vec![1, 0, 0, 0, 2, 0, 0, 0], keys: ContentKeys::default() },
            first_block: 0,
            block_ids: vec![4],
        });
        let bytes = rmp_serde::to_vec_named(&pull).unwrap();
        assert_eq!(rmp_serde::from_slice::<ToAgent>(&bytes).unwrap(), pull);
        let value: serde_json::Value =
            rmp_serde::from_slice(&rmp_serde::to_vec_named(&ToAgent::Storage { len: 9 }).unwrap()).unwrap();
        assert_eq!(value, serde_json::json!({"type": "storage", "len": 9}));
        let storage = ToAgent::CudaStorage { handle: vec![3; 64], len: 9 };
        let bytes = rmp_serde::to_vec_named(&storage).unwrap();
        assert_eq!(rmp_serde::from_slice::<ToAgent>(&bytes).unwrap(), storage);
        let ToAgent::Pull(pull) = pull else { unreachable!() };
        assert_eq!(pull.content.token_ids(), Some(vec![1, 2]));
    }
}
