//! Memory on a GPU.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Device, DeviceError, Named};
use super::pinned::PinnedBuffer;

/// Names memory of one process to others on the host, as the driver makes it.
pub type IpcHandle = [u8; 64];

/// Memory on a GPU, of this process or of another that shares it. Given back when dropped.
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: u64,
    len: usize,
    /// What it was opened by, where it is another process's.
    imported: Option<IpcHandle>,
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceBuffer")
            .field("len", &self.len)
            .field("imported", &self.imported.is_some())
            .finish()
    }
}

impl DeviceBuffer {
    /// `len` bytes of zeros.
    pub fn zeroed(device: &Arc<Device>, len: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        // SAFETY: the memory is ours until the drop below frees it.
        let address = unsafe { result::malloc_sync(len.max(1)) }.named("cuMemAlloc")?;
        let mut buffer = Self { device: device.clone(), address, len, imported: None };
        buffer.fill(0)?;
        Ok(buffer)
    }

    /// Opens memory that another process shares, and of which `len` bytes are used.
    pub fn import(device: &Arc<Device>, handle: &IpcHandle, len: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let reserved = handle.map(|byte| byte as std::ffi::c_char);
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the handle is plain bytes, which the driver checks; `address` is where it puts the result.
        let opened =
            unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, sys::CUipcMemHandle { reserved }, flags) };
        opened.result().named("cuIpcOpenMemHandle")?;
        let mut buffer = Self { device: device.clone(), address, len, imported: Some(*handle) };
        let (mut base, mut size) = (0, 0);
        // SAFETY: both are where the driver puts its results.
        let found = unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut size, address) };
        found.result().named("cuMemGetAddressRange")?;
        if base != address || size < len {
            buffer.len = 0;
            return Err(DeviceError::Shape(format!(
                "the memory shared has {size} bytes, fewer than the {len} announced"
            )));
        }
        Ok(buffer)
    }

    /// Shares it with other processes on the host. They have to be done with it before it is dropped.
    pub fn export(&self) -> Result<IpcHandle, DeviceError> {
        self.device.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the address is that of a live allocation; `handle` is where the driver puts the result.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) }.result().named("cuIpcGetMemHandle")?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Names it to other processes on the host: what [`Self::export`] makes, or what it was opened by, which any other
    /// process may open too.
    pub(super) fn handle(&self) -> Result<IpcHandle, DeviceError> {
        self.imported.map_or_else(|| self.export(), Ok)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes bytes from `offset` on, and waits for it.
    pub fn upload(&mut self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.check(offset, bytes.len())?;
        self.device.bind()?;
        // SAFETY: the range is within the buffer, as was checked, and the call returns when `bytes` were read.
        unsafe { result::memcpy_htod_sync(self.address + offset as u64, bytes) }.named("cuMemcpyHtoD")?;
        // That is before they are all where they belong, and other streams do not wait for it.
        self.device.context.synchronize().named("cuCtxSynchronize")
    }

    /// Reads bytes from `offset` on, and waits for it.
    pub fn download(&self, offset: usize, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.check(offset, bytes.len())?;
        self.device.bind()?;
        // SAFETY: the range is within the buffer, as was checked, and the call returns when `bytes` were written.
        unsafe { result::memcpy_dtoh_sync(bytes, self.address + offset as u64) }.named("cuMemcpyDtoH")
    }

    /// Reads its first bytes, as many as the pinned buffer has, and waits for it.
    pub fn download_pinned(&self, buffer: &mut PinnedBuffer) -> Result<(), DeviceError> {
        self.download(0, buffer.bytes_mut())
    }

    /// Writes its first bytes, as many as the pinned buffer has, and waits for it.
    pub fn upload_pinned(&mut self, buffer: &PinnedBuffer) -> Result<(), DeviceError> {
        self.upload(0, buffer.bytes())
    }

    /// Copies all of another buffer of the same length on the same GPU, and waits for it.
    pub fn copy_from(&mut self, other: &Self) -> Result<(), DeviceError> {
        if self.len != other.len || !Arc::ptr_eq(&self.device, &other.device) {
            return Err(DeviceError::Shape("buffers of different length or GPU".into()));
        }
        let stream = &self.device.stream;
        self.device.bind()?;
        // SAFETY: both buffers have this length, and both are borrowed until the copy is over.
        let copied =
            unsafe { result::memcpy_dtod_async(self.address, other.address, self.len, stream.cu_stream()) };
        let waited = stream.synchronize().named("cuStreamSynchronize");
        copied.named("cuMemcpyDtoDAsync")?;
        waited
    }

    /// Sets every byte, and waits for it.
    pub fn fill(&mut self, byte: u8) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: all of the buffer is ours to write.
        unsafe { result::memset_d8_sync(self.address, byte, self.len) }.named("cuMemsetD8")?;
        self.device.context.synchronize().named("cuCtxSynchronize")
    }

    /// Its first byte, as the GPU addresses it.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn check(&self, offset: usize, len: usize) -> Result<(), DeviceError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(DeviceError::Range { offset, len, buffer: self.len }),
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        // SAFETY: the address came from the matching call, and whoever enqueued work on the buffer has waited for it,
        // see the module `cuda`. An error means that the context is broken, and its memory gone.
        let _ = unsafe {
            if self.imported.is_some() {
                sys::cuIpcCloseMemHandle(self.address).result()
            } else {
                result::free_sync(self.address)
            }
        };
    }
}
