//! Streams with staging on the GPU, between paged memory and pinned buffers.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, CudaStream, result, sys};

use super::buffer::DeviceBuffer;
use super::device::{Device, DeviceError, Named};
use super::launch::Paged;
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
        lane.begun(enqueued, event, buffer)
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
        lane.begun(enqueued, event, buffer)
    }

    /// Waits for all that is enqueued.
    pub(super) fn drain(&self) -> Result<(), DeviceError> {
        self.lanes.iter().try_for_each(|lane| lane.stream.synchronize().named("cuStreamSynchronize"))
    }
}

impl Lane {
    fn begun(
        &self,
        enqueued: Result<(), DeviceError>,
        event: CudaEvent,
        buffer: PinnedBuffer,
    ) -> Result<UnderWay, DeviceError> {
        let begun = enqueued.and_then(|()| event.record(&self.stream).named("cuEventRecord"));
        match begun {
            Ok(()) => Ok(UnderWay { event, buffer: Some(buffer) }),
            Err(error) => {
                // A part may be enqueued: the buffer goes back behind it.
                let _ = self.stream.synchronize();
                Err(error)
            }
        }
    }
}

/// A thread that waits for it sleeps.
fn new_event(device: &Device) -> Result<CudaEvent, DeviceError> {
    let flags = sys::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC;
    device.context.new_event(Some(flags)).named("cuEventCreate")
}

/// A copy that may not be over, with the pinned buffer that it reads or writes. Its drop waits.
pub(super) struct UnderWay {
    event: CudaEvent,
    /// Absent once it was taken out.
    buffer: Option<PinnedBuffer>,
}

impl UnderWay {
    /// Whether the copy is over.
    pub(super) fn is_over(&self) -> Result<bool, DeviceError> {
        self.event.context().bind_to_thread().named("cuCtxSetCurrent")?;
        self.event.try_is_complete().named("cuEventQuery")
    }

    /// Waits for the copy, and gives the buffer.
    pub(super) fn wait(mut self) -> Result<PinnedBuffer, DeviceError> {
        self.event.synchronize().named("cuEventSynchronize")?;
        self.buffer.take().ok_or_else(|| DeviceError::Shape("waited for twice".into()))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if self.buffer.is_some() {
            // An error means that the context is broken: nothing runs in it any more.
            let _ = self.event.synchronize();
        }
    }
}
