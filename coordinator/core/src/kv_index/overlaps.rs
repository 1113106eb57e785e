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

/// One engine's reach into the prompt, in blocks without a gap from the first on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    pub(super) slot: Slot,
    /// In any tier.
    pub(super) held: u32,
    pub(super) gpu: u32,
    /// Held or expected.
    pub(super) either: u32,
}

impl Reach {
    /// Room for one.
    pub(super) const NONE: Self = Self { slot: Slot(0), held: 0, gpu: 0, either: 0 };

    fn overlap(&self) -> Overlap {
        Overlap { blocks: self.held, gpu_blocks: self.gpu }
    }
}

/// What a lookup works with.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    /// What lanes of engines with several groups hold.
    pub(super) pieces: Vec<Piece>,
    /// One group's blocks, as intervals.
    pub(super) intervals: Vec<(u32, u32)>,
}

/// The overlaps of one prompt, in slot order, engines without any left out. Made once and used for many lookups, it
/// allocates nothing after the first few.
#[derive(Clone, Debug, Default)]
pub struct Overlaps {
    /// The first [`Self::count`] count. The others are left from larger lookups: making room is the larger part of a small one.
    pub(super) reaches: Vec<Reach>,
    pub(super) count: usize,
    /// By reach, while chains are looked at: its lane.
    lanes: Vec<u16>,
    pub(super) scratch: Scratch,
}

impl Overlaps {
    pub(super) fn reaches(&self) -> &[Reach] {
        &self.reaches[..self.count]
    }

    fn reach(&self, slot: Slot) -> Option<&Reach> {
        let at = self.reaches().binary_search_by_key(&slot, |reach| reach.slot).ok()?;
        Some(&self.reaches[at])
    }

    /// What the engine holds.
    pub fn of(&self, slot: Slot) -> Overlap {
        self.reach(slot).map_or(Overlap::default(), Reach::overlap)
    }

    /// Leading blocks that the engine holds in any tier or is expected to hold soon.
    pub fn expected(&self, slot: Slot) -> u32 {
        self.reach(slot).map_or(0, |reach| reach.either)
    }

    /// All that is held.
    pub fn iter(&self) -> impl Iterator<Item = (Slot, Overlap)> + '_ {
        self.reaches().iter().filter(|reach| reach.held > 0).map(|reach| (reach.slot, reach.overlap()))
    }

    /// Every engine of which more is expected than it holds, with what is held or expected.
    pub fn iter_expected(&self) -> impl Iterator<Item = (Slot, u32)> + '_ {
        let more = self.reaches().iter().filter(|reach| reach.either > reach.held);
        more.map(|reach| (reach.slot, reach.either))
    }

    /// Forgets what was found; keeps the memory.
    pub fn clear(&mut self) {
        self.count = 0;
        self.scratch.pieces.clear();
    }

    /// Takes over the overlaps of those slots that `keep` names and that are not in it yet.
    pub fn merge(&mut self, other: &Overlaps, keep: impl Fn(Slot) -> bool) {
        other.reaches().iter().filter(|reach| keep(reach.slot)).for_each(|reach| self.push(*reach));
        self.order();
    }

    /// So many reaches, and their lanes, to be written.
    pub(super) fn room(&mut self, count: usize) -> (&mut [Reach], &mut [u16]) {
        self.count = count;
        if self.reaches.len() < count {
            self.reaches.resize(count, Reach::NONE);
        }
        if self.lanes.len() < count {
            self.lanes.resize(count, 0);
        }
        self.so_far()
    }

    /// Keeps those reaches only, and their lanes.
    pub(super) fn retain(&mut self, keep: impl Fn(&Reach) -> bool) {
        let mut kept = 0;
        for at in 0..self.count {
            if keep(&self.reaches[at]) {
                self.reaches[kept] = self.reaches[at];
                self.lanes[kept] = self.lanes[at];
                kept += 1;
            }
        }
        self.count = kept;
    }

    /// The reaches, and their lanes.
    pub(super) fn so_far(&mut self) -> (&mut [Reach], &mut [u16]) {
        (&mut self.reaches[..self.count], &mut self.lanes[..self.count])
    }

    pub(super) fn push(&mut self, reach: Reach) {
        self.reaches.truncate(self.count);
        self.reaches.push(reach);
        self.count += 1;
    }

    pub(super) fn order(&mut self) {
        if !self.reaches().is_sorted_by(|a, b| a.slot < b.slot) {
            self.reaches.truncate(self.count);
            self.reaches.sort_by_key(|reach| reach.slot);
            self.reaches.dedup_by_key(|reach| reach.slot);
            self.count = self.reaches.len();
        }
    }
}

impl PartialEq for Overlaps {
    fn eq(&self, other: &Self) -> bool {
        let key = |reach: &Reach| (reach.slot, reach.held, reach.gpu, reach.either);
        self.reaches().iter().map(key).eq(other.reaches().iter().map(key))
    }
}

impl Eq for Overlaps {}

impl FromIterator<(Slot, Overlap)> for Overlaps {
    fn from_iter<T: IntoIterator<Item = (Slot, Overlap)>>(iter: T) -> Self {
        let mut overlaps = Self::default();
        for (slot, Overlap { blocks, gpu_blocks }) in iter {
            overlaps.push(Reach { slot, held: blocks, gpu: gpu_blocks, either: blocks });
        }
        overlaps.order();
        overlaps
    }
}
