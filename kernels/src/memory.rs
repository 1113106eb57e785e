//! An engine's KV memory, shared with it by file descriptor.
//!
//! # Who may touch what, and when
//! The memory belongs to the engine's process, which reads and writes it at any time; Baton's right to a block
//! rests on the connector's protocol. The engine does not write a *held* block until it is released, and that
//! happens only when the guards given to [`BlockMemory::read`] are gone; it neither reads nor writes the blocks of a
//! *pull* until the pull is done.
//!
//! Rust cannot check the other process. What an engine that breaks the protocol can do is change bytes while they
//! are read here. That is outside what Rust's memory model describes, as with any file that is mapped; here the
//! bytes have no structure, no decision is made on them, and each use of them reads each byte as it happens to be:
//! the result is wrong bytes, which the checksum made when the hold was taken finds out. A process that truncates
//! the file below the mapped length ends ours by SIGBUS; the next agent has a new epoch.
//!
//! *Within* this process everything is checked: runs of bytes of different blocks and pieces never overlap, storages
//! are different files, and [`Usage`] refuses to write a block that is being read, or to read one that is being
//! written. So no `&[u8]` into the memory ever coexists with a write through it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_proto::connector::Layout;
use bytes::Bytes;

use crate::bounds::{self, LayoutError, Run};
use crate::storage::Storage;
use crate::usage::Usage;
use crate::{BlockMemory, Guard};

/// A memory that cannot be used, or an access it refuses.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The layout does not fit the storages.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A storage cannot be mapped.
    #[error("storage {index}: {error}")]
    Map {
        /// Index of the storage.
        index: usize,
        /// Why.
        error: io::Error,
    },
    /// Two storages are the same file, so a block could overlap another unseen.
    #[error("storages {0} and {1} are the same file: send each file once")]
    SameFile(usize, usize),
    /// No such block.
    #[error("block {block}: there are {num_blocks}")]
    Block {
        /// The block asked for.
        block: u32,
        /// Blocks there are.
        num_blocks: u64,
    },
    /// Bytes behind the end of a block.
    #[error("{len} bytes at {offset} of a block of {block_bytes}")]
    Range {
        /// Where within the block.
        offset: usize,
        /// How many bytes.
        len: usize,
        /// Bytes in a block.
        block_bytes: usize,
    },
    /// A block that is being read cannot be written, and the reverse.
    #[error("block {0} is in use by another transfer")]
    InUse(u32),
}

/// KV memory that an engine's worker shares by file descriptor. See the module for who may touch it when.
pub struct EngineMemory {
    storages: Vec<Storage>,
    runs: Vec<Run>,
    block_bytes: usize,
    num_blocks: u64,
    usage: Usage,
}

impl std::fmt::Debug for EngineMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineMemory")
            .field("storages", &self.storages.len())
            .field("block_bytes", &self.block_bytes)
            .field("num_blocks", &self.num_blocks)
            .finish_non_exhaustive()
    }
}

impl EngineMemory {
    /// Maps the storages (descriptor and length in bytes, in the order of their messages) and checks the layout
    /// against them. All pages are touched, about 0.1 s for each GiB: call it where blocking is fine. Takes four bytes
    /// for each block besides.
    pub fn new(
        storages: Vec<(OwnedFd, u64)>,
        layout: &Layout,
        num_blocks: u64,
    ) -> Result<Arc<Self>, MemoryError> {
        let lens: Vec<u64> = storages.iter().map(|(_, len)| *len).collect();
        let (runs, block_bytes) = bounds::check(layout, &lens, num_blocks)?;
        let mut mapped: Vec<Storage> = Vec::with_capacity(storages.len());
        for (index, (fd, len)) in storages.into_iter().enumerate() {
            let storage = Storage::map(fd, len).map_err(|error| MemoryError::Map { index, error })?;
            if let Some(other) = mapped.iter().position(|other| other.file == storage.file) {
                return Err(MemoryError::SameFile(other, index));
            }
            mapped.push(storage);
        }
        let usage = Usage::new(usize::try_from(num_blocks).map_err(|_| LayoutError::BlockBytes)?);
        Ok(Arc::new(Self { storages: mapped, runs, block_bytes, num_blocks, usage }))
    }

    fn check_block(&self, block: u32) -> Result<usize, MemoryError> {
        if u64::from(block) < self.num_blocks {
            Ok(block as usize)
        } else {
            Err(MemoryError::Block { block, num_blocks: self.num_blocks })
        }
    }
}

impl BlockMemory for EngineMemory {
    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        let index = self.check_block(block)?;
        if !self.usage.begin_read(index, self.runs.len() as u32) {
            return Err(MemoryError::InUse(block));
        }
        let piece = |run| {
            Bytes::from_owner(Borrowed { memory: self.clone(), block: index, run, _guard: guard.clone() })
        };
        Ok((0..self.runs.len()).map(piece).collect())
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let index = self.check_block(block)?;
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.block_bytes) {
            return Err(MemoryError::Range { offset, len: bytes.len(), block_bytes: self.block_bytes });
        }
        let copy = || {
            let mut at = offset;
            let mut rest = bytes;
            let first = self.runs.partition_point(|run| run.start + run.len <= offset);
            for run in &self.runs[first..] {
                if rest.is_empty() {
                    break;
                }
                let skip = at - run.start;
                let (now, later) = rest.split_at(rest.len().min(run.len - skip));
                let target = self.storages[run.storage].at(run.offset + index * run.stride + skip);
                // SAFETY: `bounds::check` saw to it that all of the run lies in the storage, and `now` ends within
                // the run. No reference into this block exists in this process while `usage` gives it to us, and
                // `now` therefore does not lie in it either.
                unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), target.as_ptr(), now.len()) };
                at += now.len();
                rest = later;
            }
        };
        if self.usage.write(index, copy) { Ok(()) } else { Err(MemoryError::InUse(block)) }
    }
}

/// One run of a block that is being read; counted as one reader of the block.
struct Borrowed {
    memory: Arc<EngineMemory>,
    block: usize,
    run: usize,
    _guard: Guard,
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        let run = &self.memory.runs[self.run];
        let start = self.memory.storages[run.storage].at(run.offset + self.block * run.stride);
        // SAFETY: `bounds::check` saw to it that all of the run lies in the storage, which `self.memory` keeps mapped.
        // `self` is counted as a reader of the block, so nothing in this process writes to it; for the engine's
        // process see the module.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), run.len) }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // The guard is dropped after this, so whoever waits for it finds the block free to write.
        self.memory.usage.end_read(self.block);
    }
}
