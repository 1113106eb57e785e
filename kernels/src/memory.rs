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

use baton_proto::connector::{Layout, Piece};
use baton_proto::wire::{SharedMemory, SharedStorages};
use bytes::Bytes;

use crate::bounds::{self, LayoutError, Run};
use crate::cuda::DeviceError;
use crate::peer::{MAX_SHARED_FILES, Peer, PeerFiles, PeerMemory, Shared, for_reading};
use crate::reference::fp8::BadScale;
use crate::reslice::Unpackable;
use crate::storage::{Access, Storage};
use crate::usage::Usage;
use crate::{BlockMemory, Guard};

/// Bytes copied at a time from another engine's memory: what was written is still in the cache when it is looked at.
const COPY: usize = 32 << 10;

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
    /// All pinned buffers are under way. They come back by themselves: try again.
    #[error("no pinned buffer is free")]
    NoBuffer,
    /// A block of a GPU is written from its beginning on, without gaps.
    #[error("block {block}: bytes at {offset} came behind {filled}")]
    Order {
        /// The block.
        block: u32,
        /// Where the bytes belong.
        offset: usize,
        /// Bytes that came before.
        filled: usize,
    },
    /// Bytes that no packing makes.
    #[error("block {block} is packed wrongly: {error}")]
    Packed {
        /// The block.
        block: u32,
        /// What is wrong.
        error: BadScale,
    },
    /// KV that nobody can pack.
    #[error(transparent)]
    Unpackable(#[from] Unpackable),
    /// What is for reading only.
    #[error("heads of several ranks cannot be written together")]
    ReadOnly,
    /// Memories of two kinds, or one that cannot be shared.
    #[error("the two memories cannot be copied between directly")]
    NotShared,
    /// The GPU.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// KV memory that an engine's worker shares by file descriptor. See the module for who may touch it when.
pub struct EngineMemory {
    storages: Vec<Storage>,
    pieces: Vec<Piece>,
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
            let storage = Storage::map(fd, len, Access::ReadWrite)
                .map_err(|error| MemoryError::Map { index, error })?;
            if let Some(other) = mapped.iter().position(|other| other.file == storage.file) {
                return Err(MemoryError::SameFile(other, index));
            }
            mapped.push(storage);
        }
        let usage = Usage::new(usize::try_from(num_blocks).map_err(|_| LayoutError::BlockBytes)?);
        let pieces = layout.pieces.clone();
        Ok(Arc::new(Self { storages: mapped, pieces, runs, block_bytes, num_blocks, usage }))
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

    fn share(&self) -> Option<Shared> {
        if self.storages.len() > MAX_SHARED_FILES {
            return None;
        }
        let files = self.storages.iter().map(|storage| for_reading(&storage.fd)).collect::<Result<_, _>>();
        let lens = self.storages.iter().map(|storage| storage.len() as u64).collect();
        let memory = SharedMemory {
            num_blocks: self.num_blocks,
            pieces: self.pieces.clone(),
            storages: SharedStorages::Files(lens),
        };
        Some(Shared { memory, files: files.ok()? })
    }

    fn open_peer(&self, shared: Shared) -> Result<PeerMemory, MemoryError> {
        Ok(PeerMemory(Peer::Files(PeerFiles::open(shared, self.block_bytes)?)))
    }

    fn copy(
        &self,
        block: u32,
        peer: &PeerMemory,
        from: u32,
        copied: &mut dyn FnMut(&[u8]),
    ) -> Result<(), MemoryError> {
        let index = self.check_block(block)?;
        let Peer::Files(peer) = &peer.0 else { return Err(MemoryError::NotShared) };
        let mut sources = peer.pieces(from)?;
        let copy = || {
            let mut source = (std::ptr::NonNull::dangling(), 0);
            for run in &self.runs {
                let start = run.offset + index * run.stride;
                let mut done = 0;
                while done < run.len {
                    if source.1 == 0 {
                        // Blocks are of one length on both sides, as was checked when the peer was opened.
                        let Some(next) = sources.next() else { return };
                        source = next;
                    }
                    let len = source.1.min(run.len - done).min(COPY);
                    let target = self.storages[run.storage].at(start + done).as_ptr();
                    // SAFETY: `len` bytes lie in the rest of a piece of the peer's block, which its mapping has, and in
                    // the rest of the run, which `bounds::check` found within the storage. No reference into the
                    // block exists in this process while `usage` gives it to us, and the peer's mapping is never
                    // written through. Should both be one file, both are plain bytes, and the result some of them.
                    unsafe {
                        std::ptr::copy_nonoverlapping(source.0.as_ptr().cast_const(), target, len);
                        copied(std::slice::from_raw_parts(target, len));
                        source = (source.0.add(len), source.1 - len);
                    }
                    done += len;
                }
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

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use baton_proto::connector::Piece;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::{dup, pread};

    use super::*;

    fn memfd(len: u64) -> OwnedFd {
        let fd = memfd_create("kv", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    fn layout(pieces: Vec<Piece>) -> Layout {
        Layout { pieces, ..Layout::default() }
    }

    /// Two storages: keys before values in the first, values interleaved with something else in the second.
    fn two_storages() -> (Arc<EngineMemory>, [OwnedFd; 2]) {
        let (a, b) = (memfd(96), memfd(64));
        let kept = [dup(&a).unwrap(), dup(&b).unwrap()];
        let pieces = vec![
            Piece { storage: 0, offset: 48, stride: 12, len: 12 },
            Piece { storage: 1, offset: 2, stride: 16, len: 3 },
            Piece { storage: 0, offset: 0, stride: 12, len: 12 },
        ];
        (EngineMemory::new(vec![(a, 96), (b, 64)], &layout(pieces), 4).unwrap(), kept)
    }

    fn bytes(memory: &Arc<EngineMemory>, block: u32) -> Vec<u8> {
        memory.clone().read(block, Arc::new(())).unwrap().concat()
    }

    #[test]
    fn a_block_is_its_pieces_in_order_and_in_the_files_where_the_layout_says() {
        let (memory, files) = two_storages();
        assert_eq!((memory.block_bytes(), memory.num_blocks()), (27, 4));
        let block: Vec<u8> = (1..=27).collect();
        memory.write(2, 0, &block).unwrap();
        assert_eq!(bytes(&memory, 2), block);
        let at = |file: usize, offset, len: usize| {
            let mut buffer = vec![0; len];
            assert_eq!(pread(&files[file], &mut buffer, offset).unwrap(), len);
            buffer
        };
        assert_eq!(at(0, 48 + 24, 12), block[..12]);
        assert_eq!(at(1, 2 + 32, 3), block[12..15]);
        assert_eq!(at(0, 24, 12), block[15..]);
        for other in [0, 1, 3] {
            assert_eq!(bytes(&memory, other), [0; 27]);
        }
    }

    #[test]
    fn accesses_outside_are_refused() {
        let (memory, _) = two_storages();
        assert!(matches!(memory.write(4, 0, b"x"), Err(MemoryError::Block { block: 4, num_blocks: 4 })));
        assert!(matches!(memory.clone().read(4, Arc::new(())), Err(MemoryError::Block { .. })));
        assert!(matches!(memory.write(0, 27, b"x"), Err(MemoryError::Range { offset: 27, len: 1, .. })));
        assert!(matches!(memory.write(0, usize::MAX, b"x"), Err(MemoryError::Range { .. })));
        memory.write(0, 27, b"").unwrap();
    }

    #[test]
    fn files_that_are_too_short_or_sent_twice_are_refused() {
        let one = || layout(vec![Piece { storage: 0, offset: 0, stride: 8, len: 8 }]);
        let short = EngineMemory::new(vec![(memfd(31), 32)], &one(), 4);
        assert!(matches!(short, Err(MemoryError::Map { index: 0, .. })), "{short:?}");
        let fd = memfd(64);
        let twice = vec![(dup(&fd).unwrap(), 64), (fd, 64)];
        assert!(matches!(EngineMemory::new(twice, &one(), 4), Err(MemoryError::SameFile(0, 1))));
        let outside = EngineMemory::new(vec![(memfd(64), 31)], &one(), 4);
        assert!(matches!(outside, Err(MemoryError::Layout(LayoutError::Bounds { len: 31, .. }))));
    }

    #[test]
    fn guard_and_memory_live_until_the_last_slice_is_gone() {
        let (memory, _) = two_storages();
        memory.write(1, 0, &[7; 27]).unwrap();
        let alive = Arc::downgrade(&memory);
        let guard: Guard = Arc::new(());
        let guard_alive = Arc::downgrade(&guard);
        let mut pieces = memory.read(1, guard).unwrap();
        let last = pieces.pop().unwrap().slice(3..5);
        drop(pieces);
        assert!(guard_alive.strong_count() > 0 && Weak::strong_count(&alive) > 0);
        assert_eq!(&last[..], [7, 7]);
        drop(last);
        assert_eq!((guard_alive.strong_count(), Weak::strong_count(&alive)), (0, 0));
    }

    #[test]
    fn a_block_is_not_written_while_any_part_of_it_is_read() {
        let (memory, _) = two_storages();
        let mut pieces = memory.clone().read(1, Arc::new(())).unwrap();
        let again = memory.clone().read(1, Arc::new(())).unwrap();
        while pieces.pop().is_some() {
            assert!(matches!(memory.write(1, 0, b"x"), Err(MemoryError::InUse(1))));
        }
        memory.write(2, 0, b"x").unwrap();
        drop(again);
        memory.write(1, 0, b"x").unwrap();
    }

    /// A memory of five blocks whose pieces of these lengths and gaps lie one after another, piece i in storage i % 2.
    fn memory_of(lens: &[(u32, u64)]) -> Arc<EngineMemory> {
        let mut end = [0u64; 2];
        let mut pieces = Vec::new();
        for (i, (len, gap)) in lens.iter().enumerate() {
            let storage = i % 2;
            let stride = u64::from(*len) + gap;
            pieces.push(Piece { storage: storage as u32, offset: end[storage], stride, len: *len });
            end[storage] += 5 * stride;
        }
        let storages = end.iter().take(lens.len().min(2)).map(|len| (memfd(*len), *len)).collect();
        EngineMemory::new(storages, &layout(pieces), 5).unwrap()
    }

    #[test]
    fn a_memory_is_given_away_to_be_read_only() {
        let (memory, _) = two_storages();
        let shared = memory.share().unwrap();
        assert_eq!(shared.memory.storages, SharedStorages::Files(vec![96, 64]));
        for file in &shared.files {
            assert_eq!(rustix::io::pwrite(file, b"x", 0), Err(rustix::io::Errno::BADF));
        }
        let stretched = Shared {
            memory: SharedMemory { storages: SharedStorages::Files(vec![96, 65]), ..shared.memory.clone() },
            files: memory.share().unwrap().files,
        };
        assert!(matches!(memory.open_peer(stretched), Err(MemoryError::Map { index: 1, .. })));
        let other = memory_of(&[(28, 0)]);
        assert!(matches!(other.open_peer(shared), Err(MemoryError::Layout(LayoutError::BlockBytes))));
        let mut gpu = memory.share().unwrap();
        gpu.memory.storages = SharedStorages::Gpu(Vec::new());
        assert!(matches!(memory.open_peer(gpu), Err(MemoryError::NotShared)));
    }

    #[test]
    fn copies_outside_and_of_blocks_in_use_are_refused() {
        let (memory, _) = two_storages();
        let peer = memory_of(&[(20, 3), (7, 0)]);
        let peer = memory.open_peer(peer.share().unwrap()).unwrap();
        let copy = |block, from| memory.copy(block, &peer, from, &mut |_| {});
        assert!(matches!(copy(4, 0), Err(MemoryError::Block { block: 4, num_blocks: 4 })));
        assert!(matches!(copy(0, 5), Err(MemoryError::Block { block: 5, num_blocks: 5 })));
        let reading = memory.clone().read(1, Arc::new(())).unwrap();
        assert!(matches!(copy(1, 0), Err(MemoryError::InUse(1))));
        drop(reading);
        copy(1, 0).unwrap();
    }

    proptest! {
        /// Whatever the pieces of the two, and shown as it lies behind the copy.
        #[test]
        fn a_copied_block_is_the_peers(
            ours in proptest::collection::vec((1u32..60_000, 0u64..4), 1..5),
            cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0u64..4), 0..4),
            seed in any::<u64>(),
        ) {
            let bytes: u32 = ours.iter().map(|(len, _)| len).sum();
            let mut ends: Vec<(u32, u64)> =
                cuts.iter().map(|(at, gap)| (at.index(bytes as usize) as u32, *gap)).collect();
            ends.push((bytes, 1));
            ends.sort_unstable();
            ends.dedup_by_key(|(end, _)| *end);
            let mut start = 0;
            let theirs: Vec<(u32, u64)> = ends
                .into_iter()
                .map(|(end, gap)| (end - std::mem::replace(&mut start, end), gap))
                .filter(|(len, _)| *len > 0)
                .collect();
            let (ours, theirs) = (memory_of(&ours), memory_of(&theirs));
            let mut state = seed;
            let content: Vec<u8> = (0..bytes).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            }).collect();
            theirs.write(3, 0, &content).unwrap();
            let peer = ours.open_peer(theirs.share().unwrap()).unwrap();
            let mut shown = Vec::new();
            ours.copy(2, &peer, 3, &mut |bytes| shown.extend_from_slice(bytes)).unwrap();
            prop_assert!(shown == content);
            prop_assert!(super::tests::bytes(&ours, 2) == content);
            for other in [0, 1, 3, 4] {
                prop_assert!(super::tests::bytes(&ours, other).iter().all(|byte| *byte == 0));
            }
        }

        /// Against a plain vector for each block.
        #[test]
        fn writes_land_where_a_plain_vector_would_have_them(
            lens in proptest::collection::vec((1u32..9, 0u64..4), 1..6),
            writes in proptest::collection::vec((0u32..5, 0usize..40, 0usize..40, any::<u8>()), 0..40),
        ) {
            let memory = memory_of(&lens);
            let mut model = vec![vec![0u8; memory.block_bytes()]; 5];
            for (block, offset, len, byte) in writes {
                let data = vec![byte; len];
                let fits = offset + len <= memory.block_bytes();
                prop_assert_eq!(memory.write(block, offset, &data).is_ok(), fits);
                if fits {
                    model[block as usize][offset..offset + len].fill(byte);
                }
            }
            for (block, expected) in model.iter().enumerate() {
                prop_assert_eq!(&bytes(&memory, block as u32), expected);
            }
        }
    }
}
