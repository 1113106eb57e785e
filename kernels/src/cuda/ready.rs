//! The engine's word that what it computed is in its KV memory.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::buffer::IpcHandle;
use super::device::{Device, DeviceError, Named};

/// An event of the engine's process, which it records behind each forward pass. Work that is held back by it begins
/// when the pass recorded last is over.
pub struct ReadyEvent {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: an event of the driver may be used from any thread.
unsafe impl Send for ReadyEvent {}
// SAFETY: as above; the driver's calls on an event are atomic.
unsafe impl Sync for ReadyEvent {}

impl ReadyEvent {
    /// Opens an event that another process shares.
    pub fn import(device: &Arc<Device>, handle: &IpcHandle) -> Result<Self, DeviceError> {
        device.bind()?;
        let handle = sys::CUipcEventHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
        let mut event = std::ptr::null_mut();
        // SAFETY: the handle is plain bytes, which the driver checks; `event` is where it puts the result.
        unsafe { sys::cuIpcOpenEventHandle(&mut event, handle) }.result().named("cuIpcOpenEventHandle")?;
        Ok(Self { device: device.clone(), event })
    }

    /// Makes what is enqueued from now on wait for it.
    pub(super) fn hold_back(&self, stream: &CudaStream) -> Result<(), DeviceError> {
        self.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are live, the event until the drop below.
        unsafe { result::stream::wait_event(stream.cu_stream(), self.event, flags) }
            .named("cuStreamWaitEvent")
    }
}

impl Drop for ReadyEvent {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened in `import`, and not used any more. The driver keeps what is enqueued on it.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
