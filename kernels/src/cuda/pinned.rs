//! Host buffers that a GPU copies from and to: one piece of memory, pinned once, cut into equal buffers.

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::device::{Device, DeviceError, Named};

/// Alignment and unit of buffers, in bytes.
const PAGE: usize = 4096;

/// Buffers of one size, as many as the cap allows and never more. They return when dropped.
pub struct PinnedPool {
    slab: Slab,
    buffer_bytes: usize,
    total: usize,
    free: Mutex<Vec<usize>>,
}

impl std::fmt::Debug for PinnedPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinnedPool")
            .field("buffer_bytes", &self.buffer_bytes)
            .field("total", &self.total)
            .finish()
    }
}

impl PinnedPool {
    /// Buffers of at least `buffer_bytes`, of `cap_bytes` at most in all, on the GPU's NUMA node. All of the memory is
    /// taken and pinned here: about 0.3 s for each GiB; call it where blocking is fine. Without a device the memory is
    /// plain.
    pub fn new(
        device: Option<&Arc<Device>>,
        buffer_bytes: usize,
        cap_bytes: usize,
    ) -> Result<Arc<Self>, DeviceError> {
        let buffer_bytes = buffer_bytes.max(1).next_multiple_of(PAGE);
        let total = cap_bytes / buffer_bytes;
        if total == 0 {
            return Err(DeviceError::Shape(format!(
                "a buffer takes {buffer_bytes} bytes, and the cap on pinned memory is {cap_bytes}: raise it"
            )));
        }
        let cpus = device.map(|device| device.near_cpus()).unwrap_or_default();
        let mut slab = Slab::map(total * buffer_bytes, &cpus).map_err(|error| DeviceError::Driver {
            call: "memory for pinned buffers",
            error: error.to_string(),
        })?;
        if let Some(device) = device {
            slab.pin(device)?;
        }
        // The first ones are taken first, and again and again: they stay in the caches.
        let free = Mutex::new((0..total).rev().collect());
        Ok(Arc::new(Self { slab, buffer_bytes, total, free }))
    }

    /// A buffer, where one is free.
    pub fn take(self: &Arc<Self>) -> Option<PinnedBuffer> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(PinnedBuffer { pool: self.clone(), index })
    }

    /// Bytes of a buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Buffers, free and taken.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Buffers that are free now.
    pub fn free(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// A buffer of a pool, its holder's alone. What it holds at first is whatever its last holder left.
pub struct PinnedBuffer {
    pool: Arc<PinnedPool>,
    index: usize,
}

impl PinnedBuffer {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the slab, which the pool keeps; it is written only through `&mut self`, and by
        // copies of the GPU whose owners do not give the buffer out before they are over.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.pool.buffer_bytes) }
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has this buffer.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.pool.buffer_bytes) }
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        // SAFETY: indices are below the number of buffers that the slab has room for.
        unsafe { self.pool.slab.start.add(self.index * self.pool.buffer_bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
    }
}

/// The memory of a pool.
struct Slab {
    start: NonNull<u8>,
    len: usize,
    pinned_for: Option<Arc<Device>>,
}

// SAFETY: a mapping is not bound to a thread; `Slab` gives out nothing but an address, and who reads or writes through
// it sees to data races.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Maps memory whose pages lie near the given CPUs. A page lies where the thread runs that touches it first, so a
    /// thread on those CPUs touches all. Where that cannot be had, it lies anywhere.
    fn map(len: usize, cpus: &[usize]) -> io::Result<Self> {
        std::thread::scope(|scope| {
            let near = scope.spawn(|| {
                let mut set = CpuSet::new();
                cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
                if set.count() > 0 {
                    let _ = sched_setaffinity(None, &set);
                }
                Self::map_here(len)
            });
            near.join().unwrap_or_else(|_| Err(io::Error::other("the thread that maps it panicked")))
        })
    }

    fn map_here(len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let slab = Self { start, len, pinned_for: None };
        let address = start.as_ptr().cast();
        // SAFETY: the range is our own mapping, and neither call changes its bytes. Both only save time.
        unsafe {
            let _ = madvise(address, len, Advice::LinuxHugepage);
            let _ = madvise(address, len, Advice::LinuxPopulateWrite);
        }
        Ok(slab)
    }

    /// Locks the pages and makes them known to the GPU.
    fn pin(&mut self, device: &Arc<Device>) -> Result<(), DeviceError> {
        device.bind()?;
        // SAFETY: the range is our own mapping, and stays until the drop below has unregistered it.
        let pinned = unsafe {
            sys::cuMemHostRegister_v2(self.start.as_ptr().cast(), self.len, sys::CU_MEMHOSTREGISTER_PORTABLE)
        };
        pinned.result().named("cuMemHostRegister")?;
        self.pinned_for = Some(device.clone());
        Ok(())
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Some(device) = &self.pinned_for
            && device.bind().is_ok()
        {
            // SAFETY: registered in `pin`. All buffers are back, as each keeps the pool, so no copy is under way.
            let _ = unsafe { sys::cuMemHostUnregister(self.start.as_ptr().cast()) };
        }
        // SAFETY: the mapping is ours, made in `map_here` with this length, and nobody has an address in it any more.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cap_below_one_buffer_is_refused() {
        let error = PinnedPool::new(None, 10_000, 12_287).unwrap_err();
        assert!(error.to_string().contains("12288"), "{error}");
        assert_eq!(PinnedPool::new(None, 10_000, 12_288).unwrap().total(), 1);
    }

    proptest! {
        /// Against a plain list of what each taken buffer holds.
        #[test]
        fn buffers_are_apart_return_on_drop_and_stay_below_the_cap(
            cap in 1usize..6,
            steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..40),
        ) {
            let pool = PinnedPool::new(None, 5000, cap * 8192).unwrap();
            let mut taken: Vec<(PinnedBuffer, u8)> = Vec::new();
            for (number, (take, which)) in steps.into_iter().enumerate() {
                if take {
                    match pool.take() {
                        Some(mut buffer) => {
                            buffer.bytes_mut().fill(number as u8);
                            taken.push((buffer, number as u8));
                        }
                        None => prop_assert_eq!(taken.len(), cap),
                    }
                } else if !taken.is_empty() {
                    taken.swap_remove(which.index(taken.len()));
                }
                prop_assert_eq!(pool.free() + taken.len(), cap);
                for (buffer, byte) in &taken {
                    prop_assert!(buffer.bytes().iter().all(|is| is == byte));
                }
            }
        }
    }

    #[test]
    fn threads_share_a_pool() {
        let pool = PinnedPool::new(None, PAGE, 3 * PAGE).unwrap();
        let taken = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for byte in 0..4u8 {
                let (pool, taken) = (&pool, &taken);
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let Some(mut buffer) = pool.take() else { continue };
                        assert!(taken.fetch_add(1, Ordering::SeqCst) < 3);
                        buffer.bytes_mut().fill(byte);
                        assert!(buffer.bytes().iter().all(|is| *is == byte));
                        taken.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(pool.free(), 3);
    }
}
