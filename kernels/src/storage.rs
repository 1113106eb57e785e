//! A shared memory file, mapped.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::fstat;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Of this agent's own engine: to be read and written, at once.
    ReadWrite,
    /// Of another's: to be read, here and there.
    Read,
}

/// A mapping, shared with other processes. Unmapped on drop.
pub(crate) struct Storage {
    start: NonNull<u8>,
    len: usize,
    /// Device and inode: two descriptors of one file are one memory.
    pub(crate) file: (u64, u64),
    pub(crate) fd: OwnedFd,
}

// SAFETY: a mapping is not bound to the thread that made it, and `Storage` gives out nothing but an address; who
// reads or writes through it has to see to data races, see `memory`.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Storage {
    /// Maps the first `len` bytes of a file. Its size is checked, so that access does not raise SIGBUS unless the
    /// owner truncates the file later.
    pub(crate) fn map(fd: OwnedFd, len: u64, access: Access) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size < len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the file has {size} bytes, fewer than the {len} announced"),
            ));
        }
        let len = usize::try_from(len).ok().filter(|len| *len > 0 && isize::try_from(*len).is_ok());
        let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a length to map"))?;
        let protection = match access {
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Access::Read => ProtFlags::READ,
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &fd, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let storage = Self { start, len, file: (stat.st_dev, stat.st_ino), fd };
        if access == Access::ReadWrite {
            storage.populate();
        }
        Ok(storage)
    }

    /// Fills the page tables, so that the first transfer does not take a fault per page. The engine touched its
    /// cache when it made it: there is no memory to save here.
    fn populate(&self) {
        let start = self.start.as_ptr().cast();
        // SAFETY: the range is our own mapping; populating it changes none of its bytes. A kernel before 5.14
        // refuses, and pages then come one by one.
        let _ = unsafe { madvise(start, self.len, Advice::LinuxPopulateWrite) };
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Address of the byte at `offset`, which has to be within the mapping.
    pub(crate) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len, "offset {offset} in a storage of {} bytes", self.len);
        // SAFETY: the offset is within the mapping, hence within one allocated object, and `len` fits an isize.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made in `map` with this length, and all who use its addresses own the
        // memory that owns this storage. An error can only mean a wrong address.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}
