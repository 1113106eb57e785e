//! How much an engine with several cache groups can reuse.
//!
//! vLLM looks for the longest prefix that every group accepts: full attention needs all blocks of it, a sliding window
//! those that the window reaches back to from its end (or all, where it is shorter than that), a recurrent state the
//! last one. It must be a multiple of every group's block size. Each group lowers a common candidate to the longest
//! length that it accepts; since no accepted length is ever skipped, the fixed point is the longest that all accept.

use super::chain::HELD;
use super::types::Group;

/// A lane holds or expects the prompt's blocks `first..end`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) lane: u16,
    pub(super) first: u32,
    pub(super) end: u32,
    pub(super) tiers: u8,
}

/// What counts: blocks in the GPU's cache, in any tier, or also those expected.
pub(super) const GPU_ONLY: u8 = 1;
pub(super) const ANY_TIER: u8 = HELD;
pub(super) const ANY: u8 = u8::MAX;

/// An engine's groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Groups {
    pub(super) groups: Vec<Group>,
    /// Least common multiple of the strides.
    align: u32,
}

impl Groups {
    pub(super) fn new(groups: &[Group]) -> Self {
        fn gcd(a: u64, b: u64) -> u64 {
            if b == 0 { a } else { gcd(b, a % b) }
        }
        let groups: Vec<Group> =
            groups.iter().map(|group| Group { stride: group.stride.max(1), ..*group }).collect();
        let align = groups.iter().fold(1, |align: u64, group| {
            let stride = u64::from(group.stride);
            (align / gcd(align, stride)).saturating_mul(stride).min(u64::from(u32::MAX))
        });
        Self { groups, align: align as u32 }
    }

    /// Whether a lookup may stop at the first block that nobody has.
    pub(super) fn ends_at_a_gap(&self) -> bool {
        self.groups.iter().any(|group| group.attention.needs().is_none() && group.stride == 1)
    }

    /// The longest reusable prefix, in blocks of the chain, of a prompt of `blocks`. `lanes` are the groups' lanes,
    /// `pieces` is in order of lane and position.
    pub(super) fn overlap(
        &self,
        lanes: &[u16],
        blocks: u32,
        pieces: &[Piece],
        counts: u8,
        intervals: &mut Vec<(u32, u32)>,
    ) -> u32 {
        let mut length = blocks - blocks % self.align;
        loop {
            let before = length;
            for (group, lane) in self.groups.iter().zip(lanes) {
                let start = pieces.partition_point(|piece| piece.lane < *lane);
                let own = pieces[start..].iter().take_while(|piece| piece.lane == *lane);
                intervals.clear();
                for piece in own.filter(|piece| piece.tiers & counts != 0) {
                    // A block of the group counts where the last of its blocks lies in the piece.
                    let (first, end) = (piece.first / group.stride, piece.end / group.stride);
                    match intervals.last_mut() {
                        Some(last) if last.1 == first => last.1 = end,
                        _ if first < end => intervals.push((first, end)),
                        _ => {}
                    }
                }
                length = self.accepted(*group, length, intervals);
                if length == 0 {
                    return 0;
                }
            }
            if length == before {
                return length;
            }
        }
    }

    /// The longest length up to `length` that the group accepts.
    fn accepted(&self, group: Group, length: u32, intervals: &[(u32, u32)]) -> u32 {
        let align = |blocks: u32| blocks - blocks % self.align;
        for (first, end) in intervals.iter().rev() {
            let length = align(end.saturating_mul(group.stride).min(length));
            let until = length / group.stride;
            let accepted = match group.attention.needs() {
                _ if *first == 0 => true,
                None => false,
                Some(needs) => until > *first && until - first >= needs,
            };
            if accepted {
                return length;
            }
        }
        0
    }
}
