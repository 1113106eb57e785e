//! A GPU, opened.

use std::fs;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::launch::Kernels;

/// A GPU that cannot be used, or something it could not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver's library is not there.
    #[error("no CUDA driver: libcuda is not installed")]
    NoDriver,
    /// The driver finds no such GPU.
    #[error("no GPU {0} on this host: check that the agent may see the GPU that its engine uses")]
    NoDevice(String),
    /// A call of the driver failed.
    #[error("{call}: {error}")]
    Driver {
        /// What was tried.
        call: &'static str,
        /// What the driver said.
        error: String,
    },
    /// Bytes behind the end of a buffer.
    #[error("{len} bytes at {offset} of a buffer of {buffer}")]
    Range {
        /// Where.
        offset: usize,
        /// How many.
        len: usize,
        /// Bytes in the buffer.
        buffer: usize,
    },
    /// Buffers that do not fit what is asked of them.
    #[error("{0}")]
    Shape(String),
}

/// Names the call that failed.
pub(super) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, DeviceError>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn named(self, call: &'static str) -> Result<T, DeviceError> {
        self.map_err(|error| DeviceError::Driver { call, error: format!("{:?}", error.0) })
    }
}

/// A GPU.
pub struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) kernels: Result<Kernels, DeviceError>,
    /// For what is waited for at once.
    pub(super) stream: Arc<CudaStream>,
    priority: i32,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

impl Device {
    /// Opens the GPU with this number, as the driver counts. Takes a second or so for the first time in a process.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(DeviceError::NoDevice(format!("{ordinal} (there are {count})")));
        }
        let context = CudaContext::new(ordinal).named("opening the GPU")?;
        // The greatest number is the least priority: the engine's kernels go first.
        let (least, _) = result::stream::get_priority_range().named("cuCtxGetStreamPriorityRange")?;
        let stream = context.new_stream_with_priority(least).named("cuStreamCreateWithPriority")?;
        let kernels = Kernels::load(&context);
        Ok(Arc::new(Self { context, kernels, stream, priority: least }))
    }

    /// Opens the GPU with this UUID, whatever its number in this process.
    pub fn by_uuid(uuid: [u8; 16]) -> Result<Arc<Self>, DeviceError> {
        for ordinal in 0..Self::count()? {
            let device = result::device::get(ordinal as i32).named("cuDeviceGet")?;
            if uuid_of(device)? == uuid {
                return Self::open(ordinal);
            }
        }
        let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        Err(DeviceError::NoDevice(format!("with UUID {hex}")))
    }

    /// GPUs that this process may use.
    pub fn count() -> Result<usize, DeviceError> {
        // SAFETY: it loads the driver's library by name, which every program that uses CUDA does.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        result::init().named("cuInit")?;
        let count = result::device::get_count().named("cuDeviceGetCount")?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Its UUID.
    pub fn uuid(&self) -> Result<[u8; 16], DeviceError> {
        uuid_of(self.context.cu_device())
    }

    /// What it is called.
    pub fn name(&self) -> Result<String, DeviceError> {
        self.context.name().named("cuDeviceGetName")
    }

    /// Why the kernels cannot run, where they cannot.
    pub fn fallback(&self) -> Option<&DeviceError> {
        self.kernels.as_ref().err()
    }

    /// CPUs of the NUMA node that the GPU is attached to; none where the system does not tell.
    pub fn near_cpus(&self) -> Vec<usize> {
        let Ok(address) = self.pci_address() else { return Vec::new() };
        let list = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/local_cpulist"));
        parse_cpu_list(&list.unwrap_or_default())
    }

    fn pci_address(&self) -> Result<String, DeviceError> {
        let mut text = [0 as std::ffi::c_char; 32];
        // SAFETY: the driver writes at most as many bytes as it is told there are, with a zero at the end.
        let got = unsafe {
            sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, self.context.cu_device())
        };
        got.result().named("cuDeviceGetPCIBusId")?;
        let bytes: Vec<u8> = text.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
        Ok(String::from_utf8_lossy(&bytes).to_lowercase())
    }

    /// A stream of the least priority.
    pub(super) fn new_stream(&self) -> Result<Arc<CudaStream>, DeviceError> {
        self.context.new_stream_with_priority(self.priority).named("cuStreamCreateWithPriority")
    }

    /// Makes this GPU the calling thread's.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().named("cuCtxSetCurrent")
    }
}

/// The UUID of a GPU, or of the part of one that a process was given.
fn uuid_of(device: sys::CUdevice) -> Result<[u8; 16], DeviceError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` is where the driver puts the result.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.result().named("cuDeviceGetUuid")?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

/// `0-3,8` is 0, 1, 2, 3 and 8. What is no such list is empty.
fn parse_cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    let ranges: Option<Vec<_>> = text.trim().split(',').map(range).collect();
    ranges.unwrap_or_default().into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_those_of_the_kernel() {
        assert_eq!(parse_cpu_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_cpu_list("7"), [7]);
        assert_eq!(parse_cpu_list(""), [0usize; 0]);
        assert_eq!(parse_cpu_list("0-x"), [0usize; 0]);
    }

    #[test]
    fn a_host_without_a_gpu_says_so() {
        match Device::open(1 << 20) {
            Err(DeviceError::NoDriver | DeviceError::NoDevice(_) | DeviceError::Driver { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
