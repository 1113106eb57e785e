//! What the kernels do, on the CPU: the definition that the device is tested against, and what runs where there is
//! none. All panic where a slice is shorter than the plan says.

pub mod fp8;
pub mod xxh3;

use crate::plan::Plan;

/// Copies blocks from the storages to `staging`, block `i` of `blocks` to `i × stride` bytes.
pub fn gather(plan: &Plan, storages: &[&[u8]], blocks: &[u32], staging: &mut [u8], stride: usize) {
    for (i, block) in blocks.iter().enumerate() {
        for span in plan.spans() {
            let mut to = i * stride + span.start as usize;
            for from in span.rows(*block) {
                let row = span.row as usize;
                staging[to..to + row].copy_from_slice(&storages[span.storage][from as usize..][..row]);
                to += row;
            }
        }
    }
}

/// The reverse of [`gather`]. Bytes that the plan does not name stay.
pub fn scatter(plan: &Plan, storages: &mut [&mut [u8]], blocks: &[u32], staging: &[u8], stride: usize) {
    for (i, block) in blocks.iter().enumerate() {
        for span in plan.spans() {
            let mut from = i * stride + span.start as usize;
            for to in span.rows(*block) {
                let row = span.row as usize;
                storages[span.storage][to as usize..][..row].copy_from_slice(&staging[from..from + row]);
                from += row;
            }
        }
    }
}
