//! Streams with staging on the GPU, between paged memory and pinned buffers or a peer's paged memory.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, CudaStream, result, sys};

use super::buffer::DeviceBuffer;
use super::device::{Device, DeviceError, Named};
use super::launch::Paged;
use super::peer::PeerGpu;
use super::pinned::PinnedBuffer;
use super::ready::ReadyEvent;

/// One stream and staging for one block. Work on it runs in order, so the staging is free again for the next block as
/// soon as that is enqueued; two lanes make the kernel of one block run beside the copy of another.
struct Lane<S> {
    stream: Arc<CudaStream>,
    staging: Mutex<S>,
}

/// Lanes of one direction, used in turn.
pub(super) struct Lanes<S = DeviceBuffer> {
    lanes: Vec<Lane<S>>,
    next: std::sync::atomic::AtomicUsize,
}

impl<S> Lanes<S> {
    /// Each with staging of its own.
    pub(super) fn with(
        device: &Arc<Device>,
        count: usize,
        staging: impl Fn() -> Result<S, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let lane = |_| Ok(Lane { stream: device.new_stream()?, staging: Mutex::new(staging()?) });
        Ok(Self {
            lanes: (0..count).map(lane).collect::<Result<_, DeviceError>>()?,
            next: Default::default(),
        })
    }

    fn next(&self) -> &Lane<S> {
        let turn = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        &self.lanes[turn % self.lanes.len()]
    }

    /// Enqueues work between staging and `buffer` on the next lane, behind `after`. The buffer is kept until that is over,
    /// also where not all of it could be enqueued.
    pub(super) fn begin(
        &self,
        device: &Arc<Device>,
        mut buffer: PinnedBuffer,
        after: Option<&ReadyEvent>,
        enqueue: impl FnOnce(&Arc<CudaStream>, &S, &mut PinnedBuffer) -> Result<(), DeviceError>,
    ) -> Result<UnderWay, DeviceError> {
        let lane = self.next();
        let event = new_event(device)?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        device.bind()?;
        if let Some(after) = after {
            after.hold_back(&lane.stream)?;
        }
        let enqueued = enqueue(&lane.stream, &staging, &mut buffer);
        begun(&lane.stream, enqueued, event, Used::Buffer(buffer))
    }

    /// Waits for all that is enqueued.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        self.lanes.iter().try_for_each(|lane| lane.stream.synchronize().named("cuStreamSynchronize"))
    }
}

impl Lanes {
    pub(super) fn new(device: &Arc<Device>, count: usize, block_bytes: usize) -> Result<Self, DeviceError> {
        Self::with(device, count, || DeviceBuffer::zeroed(device, block_bytes))
    }

    /// Begins to gather a block to `buffer`, behind `after`.
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
        let bytes = paged.plan().block_bytes();
        // SAFETY: staging belongs to the lane, whose stream runs in order; `begin` keeps the buffer; the rest is the caller's.
        self.begin(paged.device(), buffer, after, |stream, staging, buffer| unsafe {
            paged.enqueue_gather(stream, &[block], staging, 0, bytes)?;
            to_host(stream, staging, bytes, buffer)
        })
    }

    /// Begins to scatter a block from `buffer`.
    ///
    /// # Safety
    /// `paged` and `self` have to stay until the copy is over, and nobody may use the block meanwhile.
    pub(super) unsafe fn store(
        &self,
        paged: &Paged,
        block: u32,
        buffer: PinnedBuffer,
    ) -> Result<UnderWay, DeviceError> {
        let bytes = paged.plan().block_bytes();
        // SAFETY: as in `fetch`.
        self.begin(paged.device(), buffer, None, |stream, staging, buffer| unsafe {
            to_gpu(stream, buffer, bytes, staging)?;
            paged.enqueue_scatter(stream, &[block], staging, 0, bytes)
        })
    }

    /// Begins to copy a block of a peer: the gather reads the peer's memory, the scatter writes ours.
    ///
    /// # Safety
    /// `paged` and `self` have to stay until the copy is over; nobody may use our block meanwhile, or write the peer's.
    pub(super) unsafe fn copy(
        &self,
        peer: &Arc<PeerGpu>,
        from: u32,
        paged: &Paged,
        block: u32,
    ) -> Result<UnderWay, DeviceError> {
        let bytes = paged.plan().block_bytes();
        let lane = self.next();
        let event = new_event(paged.device())?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as in `fetch`; the peer's memory is kept as the pinned buffer is there.
        let enqueued = unsafe {
            peer.paged()
                .enqueue_gather(&lane.stream, &[from], &staging, 0, bytes)
                .and_then(|()| paged.enqueue_scatter(&lane.stream, &[block], &staging, 0, bytes))
        };
        begun(&lane.stream, enqueued, event, Used::Peer(peer.clone()))
    }
}

/// Enqueues a copy of the first `len` bytes of `from` to a buffer.
///
/// # Safety
/// Both have to stay until it is over, and nobody may use them but what the stream runs.
pub(super) unsafe fn to_host(
    stream: &CudaStream,
    from: &DeviceBuffer,
    len: usize,
    buffer: &mut PinnedBuffer,
) -> Result<(), DeviceError> {
    let target = &mut buffer.bytes_mut()[..len];
    // SAFETY: the caller's.
    unsafe { result::memcpy_dtoh_async(target, from.address(), stream.cu_stream()) }
        .named("cuMemcpyDtoHAsync")
}

/// Enqueues a copy of the first `len` bytes of a buffer to `to`.
///
/// # Safety
/// As for [`to_host`].
pub(super) unsafe fn to_gpu(
    stream: &CudaStream,
    buffer: &PinnedBuffer,
    len: usize,
    to: &DeviceBuffer,
) -> Result<(), DeviceError> {
    let source = &buffer.bytes()[..len];
    // SAFETY: the caller's.
    unsafe { result::memcpy_htod_async(to.address(), source, stream.cu_stream()) }.named("cuMemcpyHtoDAsync")
}

/// What was enqueued on a stream, or why not all of it was.
fn begun(
    stream: &CudaStream,
    enqueued: Result<(), DeviceError>,
    event: CudaEvent,
    used: Used,
) -> Result<UnderWay, DeviceError> {
    let begun = enqueued.and_then(|()| event.record(stream).named("cuEventRecord"));
    match begun {
        Ok(()) => Ok(UnderWay { event, used: Some(used) }),
        Err(error) => {
            // A part may be enqueued: what it uses goes behind it.
            let _ = stream.synchronize();
            Err(error)
        }
    }
}

/// A thread that waits for it sleeps.
fn new_event(device: &Device) -> Result<CudaEvent, DeviceError> {
    let flags = sys::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC;
    device.context.new_event(Some(flags)).named("cuEventCreate")
}

/// What a copy reads or writes besides the engine's own memory.
pub(super) enum Used {
    Buffer(PinnedBuffer),
    Peer(#[expect(dead_code, reason = "kept, never looked at")] Arc<PeerGpu>),
}

/// A copy that may not be over, with what it uses. Its drop waits.
pub(super) struct UnderWay {
    event: CudaEvent,
    /// Absent once it was taken out.
    used: Option<Used>,
}

impl UnderWay {
    /// Whether the copy is over.
    pub(super) fn is_over(&self) -> Result<bool, DeviceError> {
        self.event.context().bind_to_thread().named("cuCtxSetCurrent")?;
        self.event.try_is_complete().named("cuEventQuery")
    }

    /// Waits for the copy.
    pub(super) fn wait(self) -> Result<(), DeviceError> {
        self.event.synchronize().named("cuEventSynchronize")
    }

    /// Waits for the copy, and gives the buffer.
    pub(super) fn into_buffer(mut self) -> Result<PinnedBuffer, DeviceError> {
        self.event.synchronize().named("cuEventSynchronize")?;
        match self.used.take() {
            Some(Used::Buffer(buffer)) => Ok(buffer),
            _ => Err(DeviceError::Shape("a copy without a buffer".into())),
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if self.used.is_some() {
            // An error means that the context is broken: nothing runs in it any more.
            let _ = self.event.synchronize();
        }
    }
}
