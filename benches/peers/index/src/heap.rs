//! Bytes on the heap, counted alike for everyone.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// The system's allocator, counting.
pub type Counting = &'static StatsAlloc<System>;

/// The one for the whole program.
pub const COUNTING: Counting = &INSTRUMENTED_SYSTEM;

/// Bytes in use.
pub fn bytes() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// Allocations so far, those that grow one included.
pub fn calls() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.allocations + stats.reallocations
}
