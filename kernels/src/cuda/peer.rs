//! KV memory of another engine on this host, on this GPU or one that it reaches.

use std::sync::Arc;

use baton_proto::connector::{Layout, Piece};
use baton_proto::wire::{SharedAllocation, SharedMemory, SharedStorages};

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::launch::Paged;
use crate::LayoutError;
use crate::memory::MemoryError;
use crate::peer::Shared;
use crate::plan::Plan;

/// Allocations of another engine, as the GPU addresses them that copies from them. Those of another GPU are read over
/// NVLink or PCIe, where the two can; where they cannot, opening fails.
pub(crate) struct PeerGpu {
    paged: Paged,
}

impl PeerGpu {
    /// Opens them, and checks the layout against them and against blocks of `block_bytes` bytes.
    pub(super) fn open(
        device: &Arc<Device>,
        shared: Shared,
        block_bytes: usize,
    ) -> Result<Arc<Self>, MemoryError> {
        let SharedMemory { num_blocks, pieces, storages } = shared.memory;
        let SharedStorages::Gpu(allocations) = storages else { return Err(MemoryError::NotShared) };
        let lens: Vec<u64> = allocations.iter().map(|allocation| allocation.len).collect();
        let plan = Plan::of_layout(&Layout { pieces, ..Layout::default() }, &lens, num_blocks)?;
        if plan.block_bytes() != block_bytes {
            return Err(LayoutError::BlockBytes.into());
        }
        let import = |allocation: &SharedAllocation| {
            let handle = allocation.handle.as_slice().try_into().map_err(|_| MemoryError::NotShared)?;
            let len = usize::try_from(allocation.len).unwrap_or(usize::MAX);
            Ok::<_, MemoryError>(DeviceBuffer::import(device, &handle, len)?)
        };
        let storages = allocations.iter().map(import).collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(Self { paged: Paged::new(plan, storages)? }))
    }

    pub(super) fn paged(&self) -> &Paged {
        &self.paged
    }
}

/// What another process needs to open these.
pub(super) fn share(paged: &Paged) -> Option<Shared> {
    let pieces: Vec<Piece> = paged.plan().pieces()?;
    let allocation = |storage: &DeviceBuffer| {
        let handle = storage.handle().ok()?.to_vec();
        Some(SharedAllocation { handle, len: storage.len() as u64 })
    };
    let allocations = paged.storages().iter().map(allocation).collect::<Option<Vec<_>>>()?;
    let memory = SharedMemory {
        num_blocks: paged.plan().num_blocks(),
        pieces,
        storages: SharedStorages::Gpu(allocations),
    };
    Some(Shared { memory, files: Vec::new() })
}
