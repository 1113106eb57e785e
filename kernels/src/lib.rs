//! Reading and writing the KV blocks in an engine's memory. The only crate of Baton with unsafe code.
//!
//! [`BlockMemory`] is what the transfer needs of a memory. [`EngineMemory`] is the one for engines whose KV lies in
//! host memory that they share by file descriptor: its bytes are read and written where they lie. [`cuda::CudaMemory`] is
//! the one for KV on an NVIDIA GPU, with pinned host buffers between.
//!
//! [`Sliced`] and [`Filling`] are between a memory and the wire where blocks do not travel as they lie: heads in the common
//! order, as they are stored or packed to fp8.
//!
//! What the kernels in `*.cu` do is defined by [`reference`], and tested on both.

mod bounds;
pub mod cuda;
mod heads;
mod memory;
mod peer;
mod plan;
pub mod reference;
mod reslice;
mod storage;
mod usage;

use std::any::Any;
use std::sync::Arc;

use bytes::Bytes;

pub use bounds::{LayoutError, MAX_PIECES};
pub use heads::{CacheShape, Halves, Order, Share, Uneven, shares, shares_of};
pub use memory::{EngineMemory, MemoryError};
pub use peer::{MAX_SHARED_FILES, PeerMemory, Shared};
pub use plan::Plan;
pub use reslice::{BlockLayout, Filling, HeadMap, HeadsError, MAX_ROWS, Slice, Sliced, Unpackable};

/// Something that lives as long as bytes read from a memory do: its drop tells that no copy is in flight.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// KV blocks of one worker.
///
/// A block's bytes are its pieces end to end, in the order of the layout: offsets within a block count along that
/// order, and so do checksums.
pub trait BlockMemory: Send + Sync + 'static {
    /// Bytes in each block.
    fn block_bytes(&self) -> usize;

    /// Blocks; ids run from 0 to one less.
    fn num_blocks(&self) -> u64;

    /// The bytes of a block, in order, without copying them where the memory allows. The memory and `guard` stay
    /// alive until the last of the `Bytes` and of their clones and slices is dropped.
    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError>;

    /// Begins to read a block; the guard is kept as by [`Self::read`].
    fn stage(self: Arc<Self>, block: u32, guard: Guard) -> Result<Staged, MemoryError> {
        self.read(block, guard).map(Staged::ready)
    }

    /// How many blocks are worth staging ahead of the one that is read; 0 where reading costs nothing.
    fn ahead(&self) -> usize {
        0
    }

    /// Writes `bytes` from `offset` within a block on. They may be on their way until [`Self::flush`].
    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError>;

    /// Begins to read all heads of a block packed to fp8, one after another, where the memory's device packs them; `None`
    /// where it does not, and what [`Self::read`] gives has to be packed. `map` says where the heads lie.
    fn stage_packed(
        self: Arc<Self>,
        block: u32,
        map: &Arc<HeadMap>,
        guard: Guard,
    ) -> Option<Result<Staged, MemoryError>> {
        let _ = (block, map, guard);
        None
    }

    /// Writes all heads of a block that come so, where the memory's device unpacks them, as by [`Self::write`]; `None`
    /// where it does not.
    fn write_packed(&self, block: u32, map: &Arc<HeadMap>, packed: &[u8]) -> Option<Result<(), MemoryError>> {
        let _ = (block, map, packed);
        None
    }

    /// Ends what was written to these blocks: when it returns, all of it is in place, but for blocks that were not
    /// written to their end, which hold anything; and nothing is written any more. An error means that some of the
    /// blocks do not hold what was written. Waits for copies of the device only, a millisecond or so.
    fn flush(&self, blocks: &[u32]) -> Result<(), MemoryError> {
        let _ = blocks;
        Ok(())
    }

    /// This memory as another process on the host may be given it, to read; `None` where it cannot be. The files are
    /// opened anew for each call.
    fn share(&self) -> Option<Shared> {
        None
    }

    /// Opens the memory of another engine on this host, to copy from it. It has to be of this one's kind, with blocks of
    /// as many bytes. Memory of a GPU takes some milliseconds: call it where blocking is fine.
    fn open_peer(&self, shared: Shared) -> Result<PeerMemory, MemoryError> {
        drop(shared);
        Err(MemoryError::NotShared)
    }

    /// Copies block `from` of a peer to `block`. Where the CPU does it, it is over when this returns, about 0.1 ms for each
    /// MiB, and `copied` was shown all of the block in order, as it lies here now. A GPU shows nothing, and the copy may be
    /// on its way until [`Self::flush`], and reads the peer's block until then.
    fn copy(
        &self,
        block: u32,
        peer: &PeerMemory,
        from: u32,
        copied: &mut dyn FnMut(&[u8]),
    ) -> Result<(), MemoryError> {
        let _ = (block, peer, from, copied);
        Err(MemoryError::NotShared)
    }

    /// The XXH3-64 of each of these blocks, where the memory can make them without bringing the bytes to the CPU;
    /// `None` where it cannot. May take a while.
    fn checksums(&self, blocks: &[u32]) -> Option<Result<Vec<u64>, MemoryError>> {
        let _ = blocks;
        None
    }
}

/// A block whose bytes are on their way from a memory. Its drop waits until they are no longer.
pub struct Staged(Stage);

enum Stage {
    Ready(Vec<Bytes>),
    Fetching(cuda::memory::Fetching),
}

impl Staged {
    /// Of bytes that are there.
    pub fn ready(bytes: Vec<Bytes>) -> Self {
        Self(Stage::Ready(bytes))
    }

    /// Waits for the bytes: a fraction of a millisecond where they were just asked for.
    pub fn take(self) -> Result<Vec<Bytes>, MemoryError> {
        match self.0 {
            Stage::Ready(bytes) => Ok(bytes),
            Stage::Fetching(fetching) => fetching.take().map(|bytes| vec![bytes]),
        }
    }
}
