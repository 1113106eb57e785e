//! Who uses which block in this process, so that no block is written while it is read.

use std::sync::atomic::{AtomicU32, Ordering};

/// A block that a writer has.
const WRITER: u32 = u32::MAX;

/// Per block, how many readers it has, or [`WRITER`].
pub(crate) struct Usage(Box<[AtomicU32]>);

impl Usage {
    pub(crate) fn new(blocks: usize) -> Self {
        Self((0..blocks).map(|_| AtomicU32::new(0)).collect())
    }

    /// Adds `readers` to a block, unless it is being written. Each has to be taken back by [`Self::end_read`].
    pub(crate) fn begin_read(&self, block: usize, readers: u32) -> bool {
        let add =
            |now: u32| if now == WRITER { None } else { now.checked_add(readers).filter(|n| *n < WRITER) };
        self.0[block].fetch_update(Ordering::Acquire, Ordering::Relaxed, add).is_ok()
    }

    /// Takes back one reader.
    pub(crate) fn end_read(&self, block: usize) {
        self.0[block].fetch_sub(1, Ordering::Release);
    }

    /// Takes a block that nobody uses to write to it; `false` where somebody does. Has to be given back by
    /// [`Self::end_write`].
    pub(crate) fn begin_write(&self, block: usize) -> bool {
        self.0[block].compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Gives back a block that was written.
    pub(crate) fn end_write(&self, block: usize) {
        self.0[block].store(0, Ordering::Release);
    }

    /// Runs `write` on a block that nobody uses meanwhile; `false` where somebody does.
    pub(crate) fn write(&self, block: usize, write: impl FnOnce()) -> bool {
        if !self.begin_write(block) {
            return false;
        }
        write();
        self.end_write(block);
        true
    }
}
