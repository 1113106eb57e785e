//! KV blocks on a GPU, through pinned host buffers.
//!
//! # Reading
//! A block is gathered from its pieces to staging on the GPU by one kernel, and copied to a pinned buffer at once. The
//! buffer is what [`BlockMemory::read`] hands out; it returns to its pool when the last of the bytes is dropped.
//! [`BlockMemory::stage`] begins that without waiting, so that copies run ahead of the network.
//!
//! # Writing
//! Bytes collect in a pinned buffer until their block is whole; then it is copied to the GPU and scattered, beside the
//! next one's arrival. [`BlockMemory::flush`] waits for it. A buffer that is not whole at that time is dropped.
//!
//! # Packing
//! Where a block is to travel as fp8, its heads are put in the common order and packed on the GPU before it is copied to the
//! pinned buffer, and the reverse ([`BlockMemory::stage_packed`], [`BlockMemory::write_packed`]).
//!
//! # Copying
//! A block of another engine on the host is gathered from that engine's memory to staging and scattered from there,
//! on this GPU alone: no pinned buffer, and no host memory.
//!
//! # Memory
//! Half of the pinned bytes are for reading and half for writing, so that an engine that sends and receives cannot
//! block itself. Reading without a free buffer is refused ([`MemoryError::NoBuffer`]), since they come back as fast as
//! the network takes them; writing waits, since they come back as fast as the GPU takes them. On the GPU: staging for
//! four blocks and those of a batch of checksums; for six more from the first packed block on.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_proto::connector::Layout;
use bytes::Bytes;

use super::buffer::{DeviceBuffer, IpcHandle};
use super::device::{Device, DeviceError};
use super::lane::{Lanes, UnderWay};
use super::launch::{BLOCKS, Checksummer, Paged};
use super::packed::Packing;
use super::peer::{self, PeerGpu};
use super::pinned::{PinnedBuffer, PinnedPool};
use super::ready::ReadyEvent;
use crate::memory::MemoryError;
use crate::peer::{Peer, PeerMemory, Shared};
use crate::plan::Plan;
use crate::reference::xxh3;
use crate::usage::Usage;
use crate::{BlockMemory, Guard, HeadMap, LayoutError, Stage, Staged};

/// Pinned bytes of one worker's memory, unless told otherwise.
pub const DEFAULT_PINNED_BYTES: usize = 512 << 20;

/// Lanes of each direction.
const LANES: usize = 2;
/// Blocks staged ahead of the one that is sent.
const AHEAD: usize = 4;
/// Staging for checksums, in bytes; one block where that is more.
const CHECKSUM_BYTES: usize = 64 << 20;
/// Longest wait for a buffer that the GPU reads. It reads one in a millisecond.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks for one.
const WRITE_POLL: Duration = Duration::from_micros(50);

/// Memory on the GPU that an engine shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaStorage {
    /// Names the allocation.
    pub handle: IpcHandle,
    /// Bytes of it that are used.
    pub len: u64,
}

/// KV memory on a GPU. See the module.
pub struct CudaMemory {
    paged: Paged,
    ready: Option<ReadyEvent>,
    usage: Usage,
    fetches: Lanes,
    stores: Lanes,
    read_buffers: Arc<PinnedPool>,
    write_buffers: Arc<PinnedPool>,
    /// Blocks that are being written; each is taken in `usage`.
    writing: Mutex<BTreeMap<u32, Writing>>,
    checks: Option<Mutex<Checks>>,
    /// From the first packed block on; `None` where the GPU cannot.
    packing: OnceLock<Option<Packing>>,
}

/// What is needed to make checksums on the GPU.
struct Checks {
    checksummer: Checksummer,
    staging: DeviceBuffer,
    stride: usize,
    batch: usize,
    stream: Arc<cudarc::driver::CudaStream>,
}

#[derive(Default)]
struct Writing {
    partial: Option<Partial>,
    under_way: Vec<UnderWay>,
    failed: Option<DeviceError>,
}

struct Partial {
    buffer: PinnedBuffer,
    filled: usize,
}

impl std::fmt::Debug for CudaMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaMemory").field("paged", &self.paged).finish_non_exhaustive()
    }
}

impl CudaMemory {
    /// Opens the storages that an engine shares, on the GPU of this UUID, and checks the layout against them. `ready` is
    /// the event that the engine records behind its forward passes. Takes a second or so, and pins `pinned_bytes` of
    /// host memory at once: call it where blocking is fine.
    pub fn open(
        gpu: [u8; 16],
        storages: &[CudaStorage],
        ready: Option<&IpcHandle>,
        layout: &Layout,
        num_blocks: u64,
        pinned_bytes: usize,
    ) -> Result<Arc<Self>, MemoryError> {
        for (i, storage) in storages.iter().enumerate() {
            if let Some(other) = storages[..i].iter().position(|other| other.handle == storage.handle) {
                return Err(MemoryError::SameFile(other, i));
            }
        }
        let lens: Vec<u64> = storages.iter().map(|storage| storage.len).collect();
        let plan = Plan::of_layout(layout, &lens, num_blocks)?;
        let device = Device::by_uuid(gpu)?;
        let import = |storage: &CudaStorage| {
            DeviceBuffer::import(&device, &storage.handle, usize::try_from(storage.len).unwrap_or(usize::MAX))
        };
        let storages = storages.iter().map(import).collect::<Result<Vec<_>, _>>()?;
        let ready = ready.map(|handle| ReadyEvent::import(&device, handle)).transpose()?;
        Self::over(Paged::new(plan, storages)?, ready, pinned_bytes)
    }

    /// Over memory that is open.
    pub fn over(
        paged: Paged,
        ready: Option<ReadyEvent>,
        pinned_bytes: usize,
    ) -> Result<Arc<Self>, MemoryError> {
        let device = paged.device().clone();
        let (bytes, num_blocks) = (paged.plan().block_bytes(), paged.plan().num_blocks());
        let usage = Usage::new(usize::try_from(num_blocks).map_err(|_| LayoutError::BlockBytes)?);
        let pool = || PinnedPool::new(Some(&device), bytes, pinned_bytes / 2);
        let checks = match device.fallback() {
            None if bytes >= xxh3::SHORTEST => Some(Mutex::new(Checks::new(&device, bytes)?)),
            _ => None,
        };
        Ok(Arc::new(Self {
            ready,
            usage,
            fetches: Lanes::new(&device, LANES, bytes)?,
            stores: Lanes::new(&device, LANES, bytes)?,
            read_buffers: pool()?,
            write_buffers: pool()?,
            writing: Mutex::default(),
            checks,
            packing: OnceLock::new(),
            paged,
        }))
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        self.paged.device()
    }

    /// What packs heads that lie so; `None` where the GPU does not: without kernels, or without memory for the staging.
    fn packing(&self, map: &Arc<HeadMap>) -> Option<&Packing> {
        let packing = self.packing.get_or_init(|| Packing::new(&self.paged, map).ok());
        packing.as_ref().filter(|packing| packing.is_of(map))
    }

    /// Takes a block for reading, and begins to fetch `len` bytes of it to a buffer. What `begin` begins may use the memory
    /// and the block until it is over.
    fn begin_fetch(
        self: Arc<Self>,
        block: u32,
        guard: Guard,
        len: usize,
        begin: impl FnOnce(&Self, PinnedBuffer) -> Result<UnderWay, DeviceError>,
    ) -> Result<Staged, MemoryError> {
        let index = self.check_block(block)?;
        if !self.usage.begin_read(index, 1) {
            return Err(MemoryError::InUse(block));
        }
        // From here on its drop takes the reader back.
        let mut fetching = Fetching { under_way: None, index, len, guard, memory: self };
        let memory = &fetching.memory;
        let buffer = memory.read_buffers.take().ok_or(MemoryError::NoBuffer)?;
        fetching.under_way = Some(begin(memory, buffer)?);
        Ok(Staged(Stage::Fetching(fetching)))
    }

    fn check_block(&self, block: u32) -> Result<usize, MemoryError> {
        if u64::from(block) < self.num_blocks() {
            Ok(block as usize)
        } else {
            Err(MemoryError::Block { block, num_blocks: self.num_blocks() })
        }
    }

    fn writing(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Writing>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer to write to, once one is free.
    fn write_buffer(&self) -> Result<PinnedBuffer, MemoryError> {
        let started = Instant::now();
        loop {
            if let Some(buffer) = self.write_buffers.take() {
                return Ok(buffer);
            }
            self.writing().values_mut().for_each(Writing::reap);
            if let Some(buffer) = self.write_buffers.take() {
                return Ok(buffer);
            }
            if started.elapsed() > WRITE_PATIENCE {
                return Err(MemoryError::NoBuffer);
            }
            std::thread::sleep(WRITE_POLL);
        }
    }

    /// Takes what came before of a block that is written from `offset` on; `None` where it begins anew.
    fn resume(&self, block: u32, index: usize, offset: usize) -> Result<Option<Partial>, MemoryError> {
        let mut writing = self.writing();
        let entry = match writing.entry(block) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                if !self.usage.begin_write(index) {
                    return Err(MemoryError::InUse(block));
                }
                entry.insert(Writing::default())
            }
        };
        match &mut entry.partial {
            // A block that is sent again begins anew.
            Some(partial) if offset == 0 => partial.filled = 0,
            Some(partial) if partial.filled == offset => {}
            None if offset == 0 => {}
            other => {
                let filled = other.as_ref().map_or(0, |partial| partial.filled);
                return Err(MemoryError::Order { block, offset, filled });
            }
        }
        Ok(entry.partial.take())
    }
}

impl Checks {
    fn new(device: &Arc<Device>, block_bytes: usize) -> Result<Self, DeviceError> {
        let stride = block_bytes.next_multiple_of(16);
        let batch = (CHECKSUM_BYTES / stride).clamp(1, BLOCKS);
        Ok(Self {
            checksummer: Checksummer::new(device, block_bytes, batch)?,
            staging: DeviceBuffer::zeroed(device, batch * stride)?,
            stride,
            batch,
            stream: device.new_stream()?,
        })
    }

    fn make(
        &mut self,
        paged: &Paged,
        ready: Option<&ReadyEvent>,
        blocks: &[u32],
    ) -> Result<Vec<u64>, DeviceError> {
        if let Some(ready) = ready {
            ready.hold_back(&self.stream)?;
        }
        // SAFETY: the stream is waited for below, with all that it uses borrowed; the blocks are taken for reading.
        let enqueued = unsafe { paged.enqueue_gather(&self.stream, blocks, &self.staging, 0, self.stride) };
        let made = enqueued
            .and_then(|()| self.checksummer.make_on(&self.stream, &self.staging, blocks.len(), self.stride));
        if made.is_err() {
            let _ = self.stream.synchronize();
        }
        made
    }
}

impl Writing {
    /// Gives back the buffers of copies that are over.
    fn reap(&mut self) {
        let mut failed = None;
        self.under_way.retain(|copy| match copy.is_over() {
            Ok(over) => !over,
            Err(error) => {
                failed = Some(error);
                false
            }
        });
        self.failed = self.failed.take().or(failed);
    }

    /// Waits for its copies.
    fn end(self) -> Result<(), DeviceError> {
        let mut result = self.failed.map_or(Ok(()), Err);
        for copy in self.under_way {
            result = result.and(copy.wait());
        }
        result
    }
}

impl BlockMemory for CudaMemory {
    fn block_bytes(&self) -> usize {
        self.paged.plan().block_bytes()
    }

    fn num_blocks(&self) -> u64 {
        self.paged.plan().num_blocks()
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        self.stage(block, guard)?.take()
    }

    fn stage(self: Arc<Self>, block: u32, guard: Guard) -> Result<Staged, MemoryError> {
        let len = self.block_bytes();
        // SAFETY: what is begun here is kept with the memory, and the block taken for reading, until the copy is over.
        self.begin_fetch(block, guard, len, |memory, buffer| unsafe {
            memory.fetches.fetch(&memory.paged, block, buffer, memory.ready.as_ref())
        })
    }

    fn stage_packed(
        self: Arc<Self>,
        block: u32,
        map: &Arc<HeadMap>,
        guard: Guard,
    ) -> Option<Result<Staged, MemoryError>> {
        let len = self.packing(map)?.packed_bytes();
        Some(self.begin_fetch(block, guard, len, |memory, buffer| {
            let packing =
                memory.packing(map).ok_or_else(|| DeviceError::Shape("nothing to pack with".into()))?;
            // SAFETY: as above.
            unsafe { packing.fetch(&memory.paged, block, buffer, memory.ready.as_ref()) }
        }))
    }

    fn ahead(&self) -> usize {
        AHEAD
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let index = self.check_block(block)?;
        let block_bytes = self.block_bytes();
        if offset.checked_add(bytes.len()).is_none_or(|end| end > block_bytes) {
            return Err(MemoryError::Range { offset, len: bytes.len(), block_bytes });
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let mut partial = match self.resume(block, index, offset)? {
            Some(partial) => partial,
            None => Partial { buffer: self.write_buffer()?, filled: 0 },
        };
        partial.buffer.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        partial.filled += bytes.len();
        if partial.filled < block_bytes {
            self.writing().entry(block).or_default().partial = Some(partial);
            return Ok(());
        }
        // SAFETY: `self` owns lanes and memory, and waits for the lanes before it goes; the block is taken for writing
        // until `flush` has waited for the copy.
        let under_way = unsafe { self.stores.store(&self.paged, block, partial.buffer)? };
        self.writing().entry(block).or_default().under_way.push(under_way);
        Ok(())
    }

    fn write_packed(&self, block: u32, map: &Arc<HeadMap>, packed: &[u8]) -> Option<Result<(), MemoryError>> {
        let packing = self.packing(map)?;
        let write = || {
            let index = self.check_block(block)?;
            let (len, block_bytes) = (packed.len(), packing.packed_bytes());
            if len != block_bytes {
                return Err(MemoryError::Range { offset: 0, len, block_bytes });
            }
            let mut buffer = match self.resume(block, index, 0)? {
                Some(partial) => partial.buffer,
                None => self.write_buffer()?,
            };
            buffer.bytes_mut()[..len].copy_from_slice(packed);
            // SAFETY: as in `write`.
            let under_way = unsafe { packing.store(&self.paged, block, buffer)? };
            self.writing().entry(block).or_default().under_way.push(under_way);
            Ok(())
        };
        Some(write())
    }

    fn flush(&self, blocks: &[u32]) -> Result<(), MemoryError> {
        let mut result = Ok(());
        for block in blocks {
            let Some(writing) = self.writing().remove(block) else { continue };
            result = result.and(writing.end());
            self.usage.end_write(*block as usize);
        }
        Ok(result?)
    }

    fn share(&self) -> Option<Shared> {
        peer::share(&self.paged)
    }

    fn open_peer(&self, shared: Shared) -> Result<PeerMemory, MemoryError> {
        Ok(PeerMemory(Peer::Gpu(PeerGpu::open(self.device(), shared, self.block_bytes())?)))
    }

    fn copy(
        &self,
        block: u32,
        peer: &PeerMemory,
        from: u32,
        _copied: &mut dyn FnMut(&[u8]),
    ) -> Result<(), MemoryError> {
        let index = self.check_block(block)?;
        let Peer::Gpu(peer) = &peer.0 else { return Err(MemoryError::NotShared) };
        let mut writing = self.writing();
        let Entry::Vacant(entry) = writing.entry(block) else { return Err(MemoryError::InUse(block)) };
        if !self.usage.begin_write(index) {
            return Err(MemoryError::InUse(block));
        }
        // SAFETY: as in `write`; the holder does not write to a held block.
        match unsafe { self.stores.copy(peer, from, &self.paged, block) } {
            Ok(under_way) => {
                entry.insert(Writing { under_way: vec![under_way], ..Writing::default() });
                Ok(())
            }
            Err(error) => {
                self.usage.end_write(index);
                Err(error.into())
            }
        }
    }

    fn checksums(&self, blocks: &[u32]) -> Option<Result<Vec<u64>, MemoryError>> {
        let mut checks = self.checks.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let mut made = Vec::with_capacity(blocks.len());
        for some in blocks.chunks(checks.batch) {
            let checksums = self
                .taken_for_reading(some)
                .and_then(|_taken| Ok(checks.make(&self.paged, self.ready.as_ref(), some)?));
            match checksums {
                Ok(checksums) => made.extend(checksums),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(made))
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // Reads keep the memory, so none is under way. Errors mean that the context is broken: nothing runs in it.
        let _ = self.fetches.drain();
        let _ = self.stores.drain();
        if let Some(Some(packing)) = self.packing.get() {
            let _ = packing.drain();
        }
    }
}

/// Blocks taken for reading, until dropped.
struct Taken<'a> {
    usage: &'a Usage,
    blocks: Vec<usize>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.blocks.iter().for_each(|block| self.usage.end_read(*block));
    }
}

impl CudaMemory {
    fn taken_for_reading(&self, blocks: &[u32]) -> Result<Taken<'_>, MemoryError> {
        let mut taken = Taken { usage: &self.usage, blocks: Vec::with_capacity(blocks.len()) };
        for block in blocks {
            let index = self.check_block(*block)?;
            if !self.usage.begin_read(index, 1) {
                return Err(MemoryError::InUse(*block));
            }
            taken.blocks.push(index);
        }
        Ok(taken)
    }
}

/// A block on its way to a pinned buffer, taken for reading.
pub(crate) struct Fetching {
    under_way: Option<UnderWay>,
    index: usize,
    /// Bytes of it.
    len: usize,
    guard: Guard,
    memory: Arc<CudaMemory>,
}

impl Fetching {
    /// Waits for it.
    pub(crate) fn take(mut self) -> Result<Bytes, MemoryError> {
        let under_way = self.under_way.take().ok_or(MemoryError::NoBuffer)?;
        let buffer = under_way.into_buffer()?;
        Ok(Bytes::from_owner(Fetched { buffer, len: self.len, _guard: self.guard.clone() }))
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        // The copy is over before the block is free to write.
        self.under_way = None;
        self.memory.usage.end_read(self.index);
    }
}

/// A block in a pinned buffer.
struct Fetched {
    buffer: PinnedBuffer,
    len: usize,
    _guard: Guard,
}

impl AsRef<[u8]> for Fetched {
    fn as_ref(&self) -> &[u8] {
        &self.buffer.bytes()[..self.len]
    }
}
