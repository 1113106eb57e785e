//! Heads of blocks, packed to fp8 on the GPU and back: half the bytes between it and the host.
//!
//! A block is gathered from its pieces, its heads are gathered from there in the common order, and packed; or the reverse.
//! Each step has staging of its own on the GPU, which is taken once, with the first block.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_proto::wire::WireDtype;
use cudarc::driver::{CudaStream, result};

use super::buffer::DeviceBuffer;
use super::device::{DeviceError, Named};
use super::lane::{UnderWay, Used, begun, new_event};
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
    lanes: Vec<Lane>,
    next: AtomicUsize,
}

/// One stream with staging for one block. Work on it runs in order, so the staging is free again for the next block as soon
/// as that is enqueued.
struct Lane {
    stream: Arc<CudaStream>,
    staging: Mutex<Staging>,
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
        let lane = |_| {
            let staging = Staging {
                heads: Paged::new(plan.clone(), vec![DeviceBuffer::zeroed(device, block_bytes)?])?,
                common: DeviceBuffer::zeroed(device, block_bytes)?,
                packed: DeviceBuffer::zeroed(device, packed_bytes)?,
            };
            Ok(Lane { stream: device.new_stream()?, staging: Mutex::new(staging) })
        };
        Ok(Self {
            packer: Packer::new(device, block_bytes / 2 / map.count() as usize, segment)?,
            map: map.clone(),
            packed_bytes,
            lanes: (0..LANES).map(lane).collect::<Result<_, DeviceError>>()?,
            next: AtomicUsize::new(0),
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

    fn next(&self) -> &Lane {
        &self.lanes[self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len()]
    }

    /// Begins to pack a block to `buffer`, behind `after`.
    ///
    /// # Safety
    /// `paged` and `self` have to stay until the copy is over, and the block may not be written meanwhile.
    pub(super) unsafe fn fetch(
        &self,
        paged: &Paged,
        block: u32,
        mut buffer: PinnedBuffer,
        after: Option<&ReadyEvent>,
    ) -> Result<UnderWay, DeviceError> {
        let lane = self.next();
        let event = new_event(paged.device())?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let Staging { heads, common, packed } = &*staging;
        let (block_bytes, count) = (common.len(), self.map.count() as usize);
        if let Some(after) = after {
            after.hold_back(&lane.stream)?;
        }
        // SAFETY: the staging belongs to the lane, whose stream runs in order; the rest is the caller's. The buffer is kept
        // in `UnderWay`, or below, until the copy is over.
        let enqueued = unsafe {
            paged
                .enqueue_gather(&lane.stream, &[block], &heads.storages()[0], 0, block_bytes)
                .and_then(|()| heads.enqueue_gather(&lane.stream, &[0], common, 0, block_bytes))
                .and_then(|()| self.packer.enqueue_pack(&lane.stream, common, count, packed))
                .and_then(|()| {
                    let target = &mut buffer.bytes_mut()[..self.packed_bytes];
                    result::memcpy_dtoh_async(target, packed.address(), lane.stream.cu_stream())
                        .named("cuMemcpyDtoHAsync")
                })
        };
        begun(&lane.stream, enqueued, event, Used::Buffer(buffer))
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
        let lane = self.next();
        let event = new_event(paged.device())?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let Staging { heads, common, packed } = &*staging;
        let (block_bytes, count) = (common.len(), self.map.count() as usize);
        paged.device().bind()?;
        // SAFETY: as in `fetch`.
        let enqueued = unsafe {
            let source = &buffer.bytes()[..self.packed_bytes];
            result::memcpy_htod_async(packed.address(), source, lane.stream.cu_stream())
                .named("cuMemcpyHtoDAsync")
                .and_then(|()| self.packer.enqueue_unpack(&lane.stream, packed, count, common))
                .and_then(|()| heads.enqueue_scatter(&lane.stream, &[0], common, 0, block_bytes))
                .and_then(|()| {
                    paged.enqueue_scatter(&lane.stream, &[block], &heads.storages()[0], 0, block_bytes)
                })
        };
        begun(&lane.stream, enqueued, event, Used::Buffer(buffer))
    }

    /// Waits for all that is enqueued.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        self.lanes.iter().try_for_each(|lane| lane.stream.synchronize().named("cuStreamSynchronize"))
    }
}
