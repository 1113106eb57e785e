//! What a lookup finds.

use super::hybrid::Piece;
use super::types::Slot;

/// Leading blocks of a prompt that an engine can reuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// In any tier.
    pub blocks: u32,
    /// In the GPU's cache.
    pub gpu_blocks: u32,
}

/// How far a lane's blocks reach without a gap, by what counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reach {
    pub(super) held: u32,
    pub(super) gpu: u32,
    pub(super) expected: u32,
}

/// What a lookup works with. All of it is empty or zero between lookups.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    /// By lane.
    pub(super) reach: Vec<Reach>,
    /// Lanes that hold or expect the first block.
    pub(super) touched: Vec<u16>,
    /// What lanes of engines with several groups hold.
    pub(super) pieces: Vec<Piece>,
    /// One group's blocks, as intervals.
    pub(super) intervals: Vec<(u32, u32)>,
}

/// The overlaps of one prompt, in slot order, engines without any left out. Made once and used for many lookups, it
/// allocates nothing after the first few.
#[derive(Clone, Debug, Default)]
pub struct Overlaps {
    pub(super) held: Vec<(Slot, Overlap)>,
    /// Where more is expected than held.
    pub(super) expected: Vec<(Slot, u32)>,
    pub(super) scratch: Scratch,
}

impl Overlaps {
    /// What the engine holds.
    pub fn of(&self, slot: Slot) -> Overlap {
        match self.held.binary_search_by_key(&slot, |entry| entry.0) {
            Ok(at) => self.held[at].1,
            Err(_) => Overlap::default(),
        }
    }

    /// Leading blocks that the engine holds in any tier or is expected to hold soon.
    pub fn expected(&self, slot: Slot) -> u32 {
        match self.expected.binary_search_by_key(&slot, |entry| entry.0) {
            Ok(at) => self.expected[at].1,
            Err(_) => self.of(slot).blocks,
        }
    }

    /// All that is held.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Slot, Overlap)> + '_ {
        self.held.iter().copied()
    }

    /// Every engine of which more is expected than it holds, with what is held or expected.
    pub fn iter_expected(&self) -> impl ExactSizeIterator<Item = (Slot, u32)> + '_ {
        self.expected.iter().copied()
    }

    /// Forgets what was found; keeps the memory.
    pub fn clear(&mut self) {
        self.held.clear();
        self.expected.clear();
    }

    /// Takes over the overlaps of those slots that `keep` names and that are not in it yet.
    pub fn merge(&mut self, other: &Overlaps, keep: impl Fn(Slot) -> bool) {
        self.held.extend(other.held.iter().filter(|(slot, _)| keep(*slot)));
        self.expected.extend(other.expected.iter().filter(|(slot, _)| keep(*slot)));
        self.order();
    }

    pub(super) fn order(&mut self) {
        if !self.held.is_sorted_by(|a, b| a.0 < b.0) {
            self.held.sort_by_key(|entry| entry.0);
            self.held.dedup_by_key(|entry| entry.0);
        }
        if !self.expected.is_sorted_by(|a, b| a.0 < b.0) {
            self.expected.sort_by_key(|entry| entry.0);
            self.expected.dedup_by_key(|entry| entry.0);
        }
    }
}

impl PartialEq for Overlaps {
    fn eq(&self, other: &Self) -> bool {
        self.held == other.held && self.expected == other.expected
    }
}

impl Eq for Overlaps {}

impl FromIterator<(Slot, Overlap)> for Overlaps {
    fn from_iter<T: IntoIterator<Item = (Slot, Overlap)>>(iter: T) -> Self {
        let mut overlaps = Self { held: iter.into_iter().collect(), ..Self::default() };
        overlaps.order();
        overlaps
    }
}
