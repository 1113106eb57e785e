//! KV memory on an NVIDIA GPU, through the driver's own library, loaded at run time: one program runs with and
//! without a GPU.
//!
//! The kernels are embedded as PTX for sm_80, which the driver compiles for the GPU it finds. Where it cannot (a driver
//! older than the PTX), gather and scatter are batches of asynchronous copies, and checksums are made on the CPU:
//! slower, and the same bytes. [`Device::fallback`] says why.
//!
//! # Lifetimes
//! What a copy or kernel under way reads and writes is owned by a value that waits for it when dropped, so no buffer
//! goes back to a pool, and no storage is unmapped, below a copy. [`Device`] is shared by all of them and goes last.

mod buffer;
mod device;
mod lane;
mod launch;
pub(crate) mod memory;
mod packed;
pub(crate) mod peer;
mod pinned;
mod ready;

pub use buffer::{DeviceBuffer, IpcHandle};
pub use device::{Device, DeviceError};
pub use launch::{Checksummer, Packer, Paged};
pub use memory::{CudaMemory, CudaStorage, DEFAULT_PINNED_BYTES};
pub use pinned::{PinnedBuffer, PinnedPool};
pub use ready::ReadyEvent;
