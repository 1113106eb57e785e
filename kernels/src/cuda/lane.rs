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
struct Lane {
    stream: Arc<CudaStream>,
    staging: Mutex<DeviceBuffer>,
}

/// Lanes of one direction, used in turn.
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    next: std::sync::atomic::AtomicUsize,
}

impl Lanes {
    pub(super) fn new(device: &Arc<Device>, count: usize, block_bytes: usize) -> Result<Self, DeviceError> {
        let lane = |_| {
            let staging = Mutex::new(DeviceBuffer::zeroed(device, block_bytes)?);
            Ok(Lane { stream: device.new_stream()?, staging })
        };
        Ok(Self { lanes: (0..count).map(lane).collect::<Result<_, _>>()?, next: Default::default() })
    }

    fn next(&self) -> &Lane {
        let turn = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        &self.lanes[turn % self.lanes.len()]
    }

    /// Begins to gather a block to `buffer`, behind `after`.
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
        let bytes = paged.plan().block_bytes();
        let lane = self.next();
        let event = new_event(paged.device())?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(after) = after {
            after.hold_back(&lane.stream)?;
        }
        // SAFETY: staging belongs to the lane, whose stream runs in order; the rest is the caller's. The buffer is kept
        // in `UnderWay`, or below, until the copy is over.
        let enqueued = unsafe {
            paged.enqueue_gather(&lane.stream, &[block], &staging, 0, bytes).and_then(|()| {
                let target = &mut buffer.bytes_mut()[..bytes];
                result::memcpy_dtoh_async(target, staging.address(), lane.stream.cu_stream())
                    .named("cuMemcpyDtoHAsync")
            })
        };
        begun(&lane.stream, enqueued, event, Used::Buffer(buffer))
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
        let lane = self.next();
        let event = new_event(paged.device())?;
        let staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        paged.device().bind()?;
        // SAFETY: as in `fetch`.
        let enqueued = unsafe {
            let source = &buffer.bytes()[..bytes];
            result::memcpy_htod_async(staging.address(), source, lane.stream.cu_stream())
                .named("cuMemcpyHtoDAsync")
                .and_then(|()| paged.enqueue_scatter(&lane.stream, &[block], &staging, 0, bytes))
        };
        begun(&lane.stream, enqueued, event, Used::Buffer(buffer))
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

    /// Waits for all that is enqueued.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        self.lanes.iter().try_for_each(|lane| lane.stream.synchronize().named("cuStreamSynchronize"))
    }
}

/// What was enqueued on a stream, or why not all of it was.
pub(super) fn begun(
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
pub(super) fn new_event(device: &Device) -> Result<CudaEvent, DeviceError> {
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
