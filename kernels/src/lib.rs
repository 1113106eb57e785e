//! Reading and writing the KV blocks in an engine's memory. The only crate of Baton with unsafe code.
//!
//! [`BlockMemory`] is what the transfer needs of a memory; [`EngineMemory`] is the one for engines whose KV lies in
//! host memory that they share by file descriptor. A memory on a GPU would be another implementation, with pinned
//! host buffers between: `read` then hands out the buffers, and gives them back when the last `Bytes` is dropped.

mod bounds;
mod memory;
mod storage;
mod usage;

use std::any::Any;
use std::sync::Arc;

use bytes::Bytes;

pub use bounds::{LayoutError, MAX_PIECES};
pub use memory::{EngineMemory, MemoryError};

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

    /// Writes `bytes` from `offset` within a block on.
    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError>;
}
