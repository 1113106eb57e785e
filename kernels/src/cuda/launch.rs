//! The kernels, and what they are called with.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::buffer::DeviceBuffer;
use super::device::{Device, DeviceError, Named};
use crate::plan::{Plan, Span};
use crate::reference::{fp8, xxh3};

const PAGED: &str = include_str!("../../ptx/paged.ptx");
const CHECKSUM: &str = include_str!("../../ptx/checksum.ptx");
const FP8: &str = include_str!("../../ptx/fp8.ptx");

/// Blocks of one launch: `Blocks` in paged.cu.
pub(super) const BLOCKS: usize = 64;
/// Elements that a thread moves: `IN_FLIGHT` in paged.cu.
const IN_FLIGHT: u32 = 4;

/// `Span` in paged.cu.
#[repr(C)]
struct DeviceSpan {
    base: u64,
    block_stride: u64,
    outer_stride: u64,
    inner_stride: u64,
    start: u64,
    outer: u32,
    inner: u32,
    row: u32,
    reserved: u32,
}

const SPAN_BYTES: usize = size_of::<DeviceSpan>();

impl DeviceSpan {
    fn bytes(&self) -> [u8; SPAN_BYTES] {
        let mut bytes = [0; SPAN_BYTES];
        let longs = [self.base, self.block_stride, self.outer_stride, self.inner_stride, self.start];
        let words = [self.outer, self.inner, self.row, self.reserved];
        let all = longs.iter().flat_map(|long| long.to_ne_bytes());
        let all = all.chain(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.iter_mut().zip(all).for_each(|(byte, value)| *byte = value);
        bytes
    }
}

/// `Blocks` in paged.cu.
#[repr(C)]
struct Blocks([u32; BLOCKS]);

// SAFETY: the kernel's parameter has the same type: 64 32-bit numbers.
unsafe impl DeviceRepr for Blocks {}

/// All kernels of one GPU.
pub(super) struct Kernels {
    /// By width of an access: 16, 4, 1.
    gather: [CudaFunction; 3],
    scatter: [CudaFunction; 3],
    sums: CudaFunction,
    fold: CudaFunction,
    pack: CudaFunction,
    unpack: CudaFunction,
}

impl Kernels {
    /// Has the driver compile them.
    pub(super) fn load(context: &Arc<CudaContext>) -> Result<Self, DeviceError> {
        let load = |ptx: &str| context.load_module(Ptx::from_src(ptx)).named("cuModuleLoadData");
        let (paged, checksum, fp8) = (load(PAGED)?, load(CHECKSUM)?, load(FP8)?);
        let of_paged = |name: &str| paged.load_function(name).named("cuModuleGetFunction");
        let of_checksum = |name: &str| checksum.load_function(name).named("cuModuleGetFunction");
        let of_fp8 = |name: &str| fp8.load_function(name).named("cuModuleGetFunction");
        Ok(Self {
            gather: [of_paged("gather_16")?, of_paged("gather_4")?, of_paged("gather_1")?],
            scatter: [of_paged("scatter_16")?, of_paged("scatter_4")?, of_paged("scatter_1")?],
            sums: of_checksum("xxh3_sums")?,
            fold: of_checksum("xxh3_fold")?,
            pack: of_fp8("fp8_pack")?,
            unpack: of_fp8("fp8_unpack")?,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Gather,
    Scatter,
}

/// A plan over storages on a GPU.
pub struct Paged {
    plan: Plan,
    storages: Vec<DeviceBuffer>,
    table: DeviceBuffer,
    width: u32,
    /// Threads of a launch's blocks, and how many of those for the largest span.
    threads: u32,
    parts: u32,
}

impl std::fmt::Debug for Paged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged").field("plan", &self.plan).field("width", &self.width).finish_non_exhaustive()
    }
}

impl Paged {
    /// Of the storages that the plan was made for, all on one GPU.
    pub fn new(plan: Plan, storages: Vec<DeviceBuffer>) -> Result<Self, DeviceError> {
        let lens = storages.iter().map(|storage| storage.len() as u64);
        if !lens.eq(plan.storages().iter().copied()) {
            return Err(DeviceError::Shape("the plan is for other storages".into()));
        }
        let device = storages[0].device().clone();
        if storages.iter().any(|storage| !Arc::ptr_eq(storage.device(), &device)) {
            return Err(DeviceError::Shape("the storages lie on several GPUs".into()));
        }
        let addresses = storages.iter().fold(0, |bits, storage| bits | storage.address());
        let width = match addresses.trailing_zeros() {
            4.. => plan.width(),
            2.. => plan.width().min(4),
            _ => 1,
        };
        let entry = |span: &Span| {
            DeviceSpan {
                base: storages[span.storage].address() + span.offset,
                block_stride: span.block_stride,
                outer_stride: span.outer.1,
                inner_stride: span.inner.1,
                start: span.start,
                outer: span.outer.0,
                inner: span.inner.0,
                row: span.row,
                reserved: 0,
            }
            .bytes()
        };
        let entries: Vec<u8> = plan.spans().iter().flat_map(entry).collect();
        let mut table = DeviceBuffer::zeroed(&device, entries.len())?;
        table.upload(0, &entries)?;
        let largest = plan.spans().iter().map(Span::bytes).max().unwrap_or(0);
        let elements = u32::try_from(largest).unwrap_or(u32::MAX).div_ceil(width);
        let threads = elements.div_ceil(IN_FLIGHT).next_power_of_two().clamp(32, 256);
        let parts = elements.div_ceil(threads * IN_FLIGHT);
        Ok(Self { plan, storages, table, width, threads, parts })
    }

    /// What it was made of.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn storages(&self) -> &[DeviceBuffer] {
        &self.storages
    }

    /// The storages, to be looked at or changed while nothing runs.
    pub fn storages_mut(&mut self) -> &mut [DeviceBuffer] {
        &mut self.storages
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        self.table.device()
    }

    /// Copies blocks to `staging`, block `i` of `blocks` to `i × stride` bytes, and waits for it.
    pub fn gather(
        &self,
        blocks: &[u32],
        staging: &mut DeviceBuffer,
        stride: usize,
    ) -> Result<(), DeviceError> {
        self.now(Direction::Gather, blocks, staging, stride)
    }

    /// The reverse of [`Self::gather`].
    pub fn scatter(
        &mut self,
        blocks: &[u32],
        staging: &DeviceBuffer,
        stride: usize,
    ) -> Result<(), DeviceError> {
        self.now(Direction::Scatter, blocks, staging, stride)
    }

    fn now(
        &self,
        direction: Direction,
        blocks: &[u32],
        staging: &DeviceBuffer,
        stride: usize,
    ) -> Result<(), DeviceError> {
        let stream = &self.device().stream;
        // SAFETY: waited for below, while all of the buffers are borrowed.
        let enqueued = unsafe { self.enqueue(direction, stream, blocks, staging, 0, stride) };
        let waited = stream.synchronize().named("cuStreamSynchronize");
        enqueued.and(waited)
    }

    /// Enqueues a gather to `staging` from `offset` on.
    ///
    /// # Safety
    /// The buffer, and the storages in `self`, have to stay until the stream is past it; nobody else may write to what
    /// it reads or use what it writes meanwhile.
    pub(super) unsafe fn enqueue_gather(
        &self,
        stream: &CudaStream,
        blocks: &[u32],
        staging: &DeviceBuffer,
        offset: usize,
        stride: usize,
    ) -> Result<(), DeviceError> {
        // SAFETY: as the caller's.
        unsafe { self.enqueue(Direction::Gather, stream, blocks, staging, offset, stride) }
    }

    /// Enqueues a scatter from `staging`, from `offset` on.
    ///
    /// # Safety
    /// As [`Self::enqueue_gather`].
    pub(super) unsafe fn enqueue_scatter(
        &self,
        stream: &CudaStream,
        blocks: &[u32],
        staging: &DeviceBuffer,
        offset: usize,
        stride: usize,
    ) -> Result<(), DeviceError> {
        // SAFETY: as the caller's.
        unsafe { self.enqueue(Direction::Scatter, stream, blocks, staging, offset, stride) }
    }

    unsafe fn enqueue(
        &self,
        direction: Direction,
        stream: &CudaStream,
        blocks: &[u32],
        staging: &DeviceBuffer,
        offset: usize,
        stride: usize,
    ) -> Result<(), DeviceError> {
        let needed = blocks.len().checked_mul(stride).ok_or_else(|| DeviceError::Shape("stride".into()))?;
        staging.check(offset, needed)?;
        if stride < self.plan.block_bytes() {
            let bytes = self.plan.block_bytes();
            return Err(DeviceError::Shape(format!("blocks of {bytes} bytes at a stride of {stride}")));
        }
        if let Some(block) = blocks.iter().find(|block| u64::from(**block) >= self.plan.num_blocks()) {
            return Err(DeviceError::Shape(format!("block {block}: there are {}", self.plan.num_blocks())));
        }
        let staged = staging.address() + offset as u64;
        let width = match (staged | stride as u64).trailing_zeros() {
            4.. => self.width,
            2.. => self.width.min(4),
            _ => 1,
        };
        self.device().bind()?;
        for (i, some) in blocks.chunks(BLOCKS).enumerate() {
            let staged = staged + (i * BLOCKS * stride) as u64;
            match &self.device().kernels {
                // SAFETY: blocks, buffers and alignment were checked above, and the plan when it was made: every byte
                // that the kernel reads or writes lies in a storage or in `staging`. The rest is the caller's.
                Ok(kernels) => unsafe {
                    self.launch(kernels, direction, stream, some, staged, stride, width)?
                },
                // SAFETY: as above.
                Err(_) => unsafe { self.copy(direction, stream, some, staged, stride)? },
            }
        }
        Ok(())
    }

    /// # Safety
    /// Blocks, staging and width have to be checked; see [`Self::enqueue`].
    #[expect(clippy::too_many_arguments, reason = "one kernel's parameters")]
    unsafe fn launch(
        &self,
        kernels: &Kernels,
        direction: Direction,
        stream: &CudaStream,
        blocks: &[u32],
        staged: u64,
        stride: usize,
        width: u32,
    ) -> Result<(), DeviceError> {
        let of_width = match width {
            16 => 0,
            4 => 1,
            _ => 2,
        };
        let function = match direction {
            Direction::Gather => &kernels.gather[of_width],
            Direction::Scatter => &kernels.scatter[of_width],
        };
        let mut ids = Blocks([0; BLOCKS]);
        ids.0[..blocks.len()].copy_from_slice(blocks);
        let (table, stride) = (self.table.address(), stride as u64);
        // A narrower access than the plan's has more elements.
        let parts = self.parts * (self.width / width);
        let config = LaunchConfig {
            grid_dim: (parts, self.plan.spans().len() as u32, blocks.len() as u32),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = stream.launch_builder(function);
        launch.arg(&table).arg(&ids).arg(&staged).arg(&stride);
        // SAFETY: the parameters are those of the kernel, in its order; what it touches is the caller's affair.
        unsafe { launch.launch(config) }.named("cuLaunchKernel").map(|_| ())
    }

    /// Without kernels: a copy for each run of rows.
    ///
    /// # Safety
    /// As [`Self::launch`].
    unsafe fn copy(
        &self,
        direction: Direction,
        stream: &CudaStream,
        blocks: &[u32],
        staged: u64,
        stride: usize,
    ) -> Result<(), DeviceError> {
        for (i, block) in blocks.iter().enumerate() {
            for span in self.plan.spans() {
                let base = self.storages[span.storage].address();
                let (count, pitch) = (span.inner.0 as usize, span.inner.1 as usize);
                let row = span.row as usize;
                let mut dense = staged + (i * stride) as u64 + span.start;
                for paged in span.rows(*block).step_by(count).map(|at| base + at) {
                    let (source, target) = match direction {
                        Direction::Gather => ((paged, pitch), (dense, row)),
                        Direction::Scatter => ((dense, row), (paged, pitch)),
                    };
                    // SAFETY: all rows lie in a storage and in the staging buffer, as was checked.
                    unsafe { copy_rows(stream, source, target, row, count)? };
                    dense += (row * count) as u64;
                }
            }
        }
        Ok(())
    }
}

/// Copies `count` rows of `row` bytes on the GPU; source and target are an address and the distance of rows.
///
/// # Safety
/// All of the rows have to be memory of the GPU, and stay until the stream is past them.
unsafe fn copy_rows(
    stream: &CudaStream,
    source: (u64, usize),
    target: (u64, usize),
    row: usize,
    count: usize,
) -> Result<(), DeviceError> {
    if count == 1 {
        // SAFETY: as the caller's.
        return unsafe { result::memcpy_dtod_async(target.0, source.0, row, stream.cu_stream()) }
            .named("cuMemcpyDtoDAsync");
    }
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: source.0,
        srcArray: std::ptr::null_mut(),
        srcPitch: source.1,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: target.0,
        dstArray: std::ptr::null_mut(),
        dstPitch: target.1,
        WidthInBytes: row,
        Height: count,
    };
    // SAFETY: `copy` describes memory that the caller vouches for, and is read before the call returns.
    unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.cu_stream()) }.result().named("cuMemcpy2DAsync")
}

/// Makes checksums of contiguous blocks on the GPU.
#[derive(Debug)]
pub struct Checksummer {
    device: Arc<Device>,
    sums: DeviceBuffer,
    checksums: DeviceBuffer,
    len: usize,
    most: usize,
}

impl Checksummer {
    /// For at most `most` blocks of `len` bytes at a time. Takes 64 bytes on the GPU for each KiB of them. Blocks of
    /// fewer than [`xxh3::SHORTEST`] bytes, or a GPU without kernels, are refused.
    pub fn new(device: &Arc<Device>, len: usize, most: usize) -> Result<Self, DeviceError> {
        if let Some(why) = device.fallback() {
            return Err(why.clone());
        }
        // A launch counts stretches in 32 bits, and has at most 65,535 blocks.
        if len < xxh3::SHORTEST || u32::try_from(xxh3::stretches(len)).is_err() || most > 65_535 {
            return Err(DeviceError::Shape(format!("{most} checksums of {len} bytes")));
        }
        let sums = DeviceBuffer::zeroed(device, most * xxh3::stretches(len) * 64)?;
        let checksums = DeviceBuffer::zeroed(device, most * 8)?;
        Ok(Self { device: device.clone(), sums, checksums, len, most })
    }

    /// The checksums of the first `blocks` blocks in a buffer, `stride` bytes apart (a multiple of 16); waits for them.
    pub fn make(
        &mut self,
        data: &DeviceBuffer,
        blocks: usize,
        stride: usize,
    ) -> Result<Vec<u64>, DeviceError> {
        let stream = self.device.stream.clone();
        self.make_on(&stream, data, blocks, stride)
    }

    /// As [`Self::make`], behind what is on the stream.
    pub(super) fn make_on(
        &mut self,
        stream: &CudaStream,
        data: &DeviceBuffer,
        blocks: usize,
        stride: usize,
    ) -> Result<Vec<u64>, DeviceError> {
        if blocks == 0 {
            return Ok(Vec::new());
        }
        data.check(0, (blocks - 1).saturating_mul(stride).saturating_add(self.len))?;
        if blocks > self.most
            || !stride.is_multiple_of(16)
            || !data.address().is_multiple_of(16)
            || stride < self.len
        {
            return Err(DeviceError::Shape(format!("checksums of {blocks} blocks at a stride of {stride}")));
        }
        let kernels = self.device.kernels.as_ref().map_err(Clone::clone)?;
        let (address, stride, len) = (data.address(), stride as u64, self.len as u64);
        let (stretches, count) = (xxh3::stretches(self.len) as u32, blocks as u32);
        let (sums, checksums) = (self.sums.address(), self.checksums.address());
        self.device.bind()?;
        if stretches > 0 {
            let config = LaunchConfig {
                // Eight warps each, with four stretches or so for a warp.
                grid_dim: (stretches.div_ceil(32), count, 1),
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            };
            let mut launch = stream.launch_builder(&kernels.sums);
            launch.arg(&address).arg(&stride).arg(&stretches).arg(&sums);
            // SAFETY: the parameters are the kernel's; it reads blocks within `data`, which was checked, and writes 64
            // bytes for each stretch of each of at most `most` blocks, as many as `sums` has.
            unsafe { launch.launch(config) }.named("cuLaunchKernel")?;
        }
        let config =
            LaunchConfig { grid_dim: (count.div_ceil(4), 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
        let mut launch = stream.launch_builder(&kernels.fold);
        launch.arg(&address).arg(&stride).arg(&len).arg(&stretches).arg(&sums).arg(&count).arg(&checksums);
        // SAFETY: as above; it writes eight bytes for each block, as many as `checksums` has.
        let launched = unsafe { launch.launch(config) }.named("cuLaunchKernel").map(|_| ());
        let waited = stream.synchronize().named("cuStreamSynchronize");
        launched.and(waited)?;
        let mut bytes = vec![0; blocks * 8];
        self.checksums.download(0, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }
}

/// Packs blocks of bf16 values to fp8 and back on the GPU; see [`crate::reference::fp8`].
#[derive(Debug)]
pub struct Packer {
    device: Arc<Device>,
    /// Values of a block, and of a segment of it.
    len: usize,
    segment: usize,
}

impl Packer {
    /// For blocks of `len` values, `segment` of them to a scale. A GPU without kernels is refused.
    pub fn new(device: &Arc<Device>, len: usize, segment: usize) -> Result<Self, DeviceError> {
        if let Some(why) = device.fallback() {
            return Err(why.clone());
        }
        if segment == 0 || len == 0 || !len.is_multiple_of(segment) || u32::try_from(len).is_err() {
            return Err(DeviceError::Shape(format!("blocks of {len} values in segments of {segment}")));
        }
        Ok(Self { device: device.clone(), len, segment })
    }

    /// Bytes of a packed block.
    pub fn packed_bytes(&self) -> usize {
        fp8::packed_bytes(self.len / self.segment, self.segment)
    }

    /// Packs the first `count` blocks of `values`, and waits for it. Blocks are contiguous on both sides.
    pub fn pack(
        &self,
        values: &DeviceBuffer,
        count: usize,
        packed: &mut DeviceBuffer,
    ) -> Result<(), DeviceError> {
        // SAFETY: waited for below, while both buffers are borrowed.
        let enqueued = unsafe { self.enqueue_pack(&self.device.stream, values, count, packed) };
        self.wait(enqueued)
    }

    /// The reverse of [`Self::pack`].
    pub fn unpack(
        &self,
        packed: &DeviceBuffer,
        count: usize,
        values: &mut DeviceBuffer,
    ) -> Result<(), DeviceError> {
        // SAFETY: as above.
        let enqueued = unsafe { self.enqueue_unpack(&self.device.stream, packed, count, values) };
        self.wait(enqueued)
    }

    fn wait(&self, enqueued: Result<(), DeviceError>) -> Result<(), DeviceError> {
        let waited = self.device.stream.synchronize().named("cuStreamSynchronize");
        enqueued.and(waited)
    }

    /// Enqueues a [`Self::pack`].
    ///
    /// # Safety
    /// Both buffers have to stay until the stream is past it; nobody else may write to the one or use the other meanwhile.
    pub(super) unsafe fn enqueue_pack(
        &self,
        stream: &CudaStream,
        values: &DeviceBuffer,
        count: usize,
        packed: &DeviceBuffer,
    ) -> Result<(), DeviceError> {
        let Some(config) = self.config(values, count, packed)? else { return Ok(()) };
        let kernels = self.device.kernels.as_ref().map_err(Clone::clone)?;
        let (from, from_stride) = (values.address(), (self.len * 2) as u64);
        let (to, to_stride) = (packed.address(), self.packed_bytes() as u64);
        let segment = self.segment as u32;
        let mut launch = stream.launch_builder(&kernels.pack);
        launch.arg(&from).arg(&from_stride).arg(&segment).arg(&to).arg(&to_stride);
        // SAFETY: the parameters are the kernel's, and both buffers have the bytes that `count` blocks take.
        unsafe { launch.launch(config) }.named("cuLaunchKernel").map(|_| ())
    }

    /// Enqueues an [`Self::unpack`].
    ///
    /// # Safety
    /// As [`Self::enqueue_pack`].
    pub(super) unsafe fn enqueue_unpack(
        &self,
        stream: &CudaStream,
        packed: &DeviceBuffer,
        count: usize,
        values: &DeviceBuffer,
    ) -> Result<(), DeviceError> {
        let Some(config) = self.config(values, count, packed)? else { return Ok(()) };
        let kernels = self.device.kernels.as_ref().map_err(Clone::clone)?;
        let (from, from_stride) = (packed.address(), self.packed_bytes() as u64);
        let (to, to_stride) = (values.address(), (self.len * 2) as u64);
        let segment = self.segment as u32;
        let mut launch = stream.launch_builder(&kernels.unpack);
        launch.arg(&from).arg(&from_stride).arg(&segment).arg(&to).arg(&to_stride);
        // SAFETY: as above.
        unsafe { launch.launch(config) }.named("cuLaunchKernel").map(|_| ())
    }

    /// How a kernel is launched for so many blocks, which both buffers have room for; `None` where there are none.
    fn config(
        &self,
        values: &DeviceBuffer,
        count: usize,
        packed: &DeviceBuffer,
    ) -> Result<Option<LaunchConfig>, DeviceError> {
        values.check(0, count.saturating_mul(self.len * 2))?;
        packed.check(0, count.saturating_mul(self.packed_bytes()))?;
        if count > 65_535 {
            return Err(DeviceError::Shape(format!("{count} blocks to pack at once")));
        }
        self.device.bind()?;
        let config = LaunchConfig {
            grid_dim: ((self.len / self.segment) as u32, count as u32, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        Ok((count > 0).then_some(config))
    }
}
