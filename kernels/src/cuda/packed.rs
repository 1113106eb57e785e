//! Heads of blocks, packed to fp8 on the GPU and back: half the bytes between it and the host.
//!
//! A block is gathered from its pieces, its heads are gathered from there in the common order, and packed; or the reverse.
//! Each step has staging of its own on the GPU, which is taken once, with the first block.

use std::sync::Arc;

use baton_proto::wire::WireDtype;

use super::buffer::DeviceBuffer;
use super::device::DeviceError;
use super::lane::{Lanes, UnderWay, to_gpu, to_host};
use super::launch::{Packer, Paged};
use super::pinned::PinnedBuffer;
use super::ready::ReadyEvent;
use crate::HeadMap;

/// Blocks that are packed or unpacked at once.
const LANES: usize = 2;

/// Packs blocks of one memory, whose heads lie in one way.
pub(super) struct Packing {
    map: Arc<HeadMap>,
    packer: Packer,
    packed_bytes: usize,
    lanes: Lanes<Staging>,
}

/// A block on its way: as its pieces lie end to end, in the common order, and packed.
struct Staging {
    /// Heads of what it has as its only storage.
    heads: Paged,
    common: DeviceBuffer,
    packed: DeviceBuffer,
}

impl Packing {
    /// For blocks of `paged`, with heads where `map` says. Takes staging for six blocks or so on the GPU.
    pub(super) fn new(paged: &Paged, map: &Arc<HeadMap>) -> Result<Self, DeviceError> {
        let shape = |error: &dyn std::fmt::Display| DeviceError::Shape(error.to_string());
        let segment = map.segment().map_err(|error| shape(&error))?;
        let packed_bytes = map.block_bytes(WireDtype::Fp8).map_err(|error| shape(&error))?;
        let plan = map.plan().map_err(|error| shape(&error))?;
        let (device, block_bytes) = (paged.device(), paged.plan().block_bytes());
        if plan.block_bytes() != block_bytes || packed_bytes > block_bytes {
            return Err(DeviceError::Shape(format!("{packed_bytes} bytes for blocks of {block_bytes}")));
        }
        let staging = || {
            Ok(Staging {
                heads: Paged::new(plan.clone(), vec![DeviceBuffer::zeroed(device, block_bytes)?])?,
                common: DeviceBuffer::zeroed(device, block_bytes)?,
                packed: DeviceBuffer::zeroed(device, packed_bytes)?,
            })
        };
        Ok(Self {
            packer: Packer::new(device, block_bytes / 2 / map.count() as usize, segment)?,
            map: map.clone(),
            packed_bytes,
            lanes: Lanes::with(device, LANES, staging)?,
        })
    }

    /// Whether it packs heads that lie so.
    pub(super) fn is_of(&self, map: &Arc<HeadMap>) -> bool {
        Arc::ptr_eq(&self.map, map) || self.map == *map
    }

    /// Bytes of a packed block.
    pub(super) fn packed_bytes(&self) -> usize {
        self.packed_bytes
    }

    /// Begins to pack a block to `buffer`, behind `after`.
    ///
    /// # Safety
    /// `paged` and `self` have to stay until the copy is over, and the block may not be written meanwhile.
    pub(super) unsafe fn fetch(
        &self,
        paged: &Paged,
        block: u32,
        buffer: PinnedBuffer,
        after: Option<&ReadyEvent>,
    ) -> Result<UnderWay, DeviceError> {
        // SAFETY: staging belongs to the lane, whose stream runs in order; `begin` keeps the buffer; the rest is the caller's.
        self.lanes.begin(paged.device(), buffer, after, |stream, staging, buffer| unsafe {
            let Staging { heads, common, packed } = staging;
            paged.enqueue_gather(stream, &[block], &heads.storages()[0], 0, common.len())?;
            heads.enqueue_gather(stream, &[0], common, 0, common.len())?;
            self.packer.enqueue_pack(stream, common, self.map.count() as usize, packed)?;
            to_host(stream, packed, self.packed_bytes, buffer)
        })
    }

    /// Begins to unpack a block from `buffer`.
    ///
    /// # Safety
    /// `paged` and `self` have to stay until the copy is over, and nobody may use the block meanwhile.
    pub(super) unsafe fn store(
        &self,
        paged: &Paged,
        block: u32,
        buffer: PinnedBuffer,
    ) -> Result<UnderWay, DeviceError> {
        // SAFETY: as in `fetch`.
        self.lanes.begin(paged.device(), buffer, None, |stream, staging, buffer| unsafe {
            let Staging { heads, common, packed } = staging;
            to_gpu(stream, buffer, self.packed_bytes, packed)?;
            self.packer.enqueue_unpack(stream, packed, self.map.count() as usize, common)?;
            heads.enqueue_scatter(stream, &[0], common, 0, common.len())?;
            paged.enqueue_scatter(stream, &[block], &heads.storages()[0], 0, common.len())
        })
    }

    /// Waits for all that is enqueued.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        self.lanes.drain()
    }
}
