//! The KV cache: real bytes in shared memory that an agent can map.
//!
//! Each layer is one storage of the form `[block][K, V][token][head][byte]`, so a block is made of two pieces per layer.
//!
//! The storages are memory files named `baton-kv-0`, `baton-kv-1` and so on: a test that wants a byte to be wrong finds them
//! among the process's open files (`/proc/PID/fd`) and writes to one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use baton_proto::connector::{HeadSpan, Heads, Layout, Piece};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::block_pool::BlockId;

/// Sizes of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers; each has K and V.
    pub layers: u32,
    /// KV heads of a layer.
    pub heads: u32,
    /// Bytes of one token in one head.
    pub head_bytes: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks, block 0 included.
    pub num_blocks: u32,
}

impl KvShape {
    /// Bytes of one token in K or V of one layer.
    pub fn token_bytes(&self) -> usize {
        self.heads as usize * self.head_bytes as usize
    }

    /// Bytes of K or V of one layer in a block.
    pub fn piece_bytes(&self) -> usize {
        self.block_size as usize * self.token_bytes()
    }

    /// Bytes of one token in all layers.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.layers as usize * self.token_bytes()
    }

    fn storage_bytes(&self) -> u64 {
        self.num_blocks as u64 * 2 * self.piece_bytes() as u64
    }

    /// What a connector tells its agent about this cache.
    pub fn layout(&self) -> Layout {
        let facts = [
            ("engine", "baton-mock".to_owned()),
            ("dtype", "uint8".to_owned()),
            ("block_size", self.block_size.to_string()),
            ("layers", self.layers.to_string()),
            ("head_size", self.head_bytes.to_string()),
        ];
        let order = [
            ("block_bytes", (self.block_size as usize * self.kv_bytes_per_token()).to_string()),
            ("inner", "token,head,byte".to_owned()),
            ("tp_rank", "0".to_owned()),
            ("tp_size", "1".to_owned()),
        ];
        let owned = |(name, value): (&str, String)| (name.to_owned(), value);
        let len = self.piece_bytes() as u64;
        let piece = |storage, part| Piece {
            storage,
            offset: part * len,
            stride: 2 * len,
            len: u32::try_from(len).expect("the shape was checked"),
        };
        let (token, half) = (self.token_bytes() as u32, self.piece_bytes() as u32);
        let span = |layer| HeadSpan {
            start: layer * 2 * half,
            head_stride: self.head_bytes,
            dims: vec![(self.block_size, token), (2, half)],
            len: self.head_bytes,
        };
        Layout {
            facts: facts.into_iter().map(owned).collect(),
            order: order.into_iter().map(owned).collect(),
            heads: Some(Heads {
                total: self.heads,
                count: self.heads,
                spans: (0..self.layers).map(span).collect(),
            }),
            pieces: (0..self.layers).flat_map(|layer| [piece(layer, 0), piece(layer, 1)]).collect(),
        }
    }
}

/// The storages of one engine.
#[derive(Debug)]
pub struct KvMemory {
    shape: KvShape,
    storages: Vec<OwnedFd>,
}

impl KvMemory {
    /// Makes the storages; pages take memory once they are written.
    pub fn new(shape: KvShape) -> io::Result<Self> {
        let storages = (0..shape.layers)
            .map(|layer| {
                let fd = memfd_create(format!("baton-kv-{layer}"), MemfdFlags::CLOEXEC)?;
                ftruncate(&fd, shape.storage_bytes())?;
                Ok(fd)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shape, storages })
    }

    /// Its sizes.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The storages in order of layers, each with its length in bytes.
    pub fn storages(&self) -> impl Iterator<Item = (BorrowedFd<'_>, u64)> {
        self.storages.iter().map(|fd| (fd.as_fd(), self.shape.storage_bytes()))
    }

    /// Duplicates of the storages' file descriptors, for whoever shares the memory.
    pub fn share(&self) -> io::Result<Vec<(OwnedFd, u64)>> {
        self.storages().map(|(fd, len)| Ok((fd.try_clone_to_owned()?, len))).collect()
    }

    /// Reads whole blocks `first ..` of a layer: each K, then V. `into` is a multiple of a block's bytes long.
    pub fn read_blocks(&self, layer: u32, first: BlockId, into: &mut [u8]) -> io::Result<()> {
        let mut offset = self.offset(first, 0, 0);
        let mut rest = into;
        while !rest.is_empty() {
            match rustix::io::pread(self.storage(layer), &mut *rest, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => {
                    offset += read as u64;
                    rest = &mut rest[read..];
                }
            }
        }
        Ok(())
    }

    /// Writes whole blocks `first ..` of a layer: each K, then V.
    pub fn write_blocks(&self, layer: u32, first: BlockId, bytes: &[u8]) -> io::Result<()> {
        self.write_at(layer, self.offset(first, 0, 0), bytes)
    }

    /// Writes the tokens from slot `slot` of a block: `part` 0 is K, 1 is V.
    pub fn write_slots(
        &self,
        layer: u32,
        block: BlockId,
        part: usize,
        slot: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        self.write_at(layer, self.offset(block, part, slot), bytes)
    }

    fn write_at(&self, layer: u32, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = rustix::io::pwrite(self.storage(layer), bytes, offset)?;
            offset += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    fn storage(&self, layer: u32) -> &OwnedFd {
        &self.storages[layer as usize]
    }

    fn offset(&self, block: BlockId, part: usize, slot: usize) -> u64 {
        let piece = self.shape.piece_bytes();
        (block as usize * 2 * piece + part * piece + slot * self.shape.token_bytes()) as u64
    }
}
