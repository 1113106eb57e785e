//! What goes into the index and comes out.

use baton_proto::{BlockHash, Epoch};

/// Short stand-in for an engine's name, given out by whoever keeps the fleet. A data-parallel rank with a cache of its
/// own has a slot of its own. A slot may be given to another engine once [`forget`](super::KvIndex::forget) was called
/// for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Where an engine keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// In the GPU's cache.
    Gpu,
    /// In the host's memory.
    Host,
    /// On disk.
    Disk,
}

/// A set of tiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tiers(u8);

impl Tiers {
    /// Every tier.
    pub const ALL: Self = Self(0b111);

    /// The set that these bits stand for; bits without a tier are dropped.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL.0)
    }

    /// The set as bits: 1 gpu, 2 host, 4 disk.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether no tier is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the tier is in it.
    pub fn contains(self, tier: Tier) -> bool {
        self.0 & Self::from(tier).0 != 0
    }
}

impl From<Tier> for Tiers {
    fn from(tier: Tier) -> Self {
        Self(match tier {
            Tier::Gpu => 1,
            Tier::Host => 2,
            Tier::Disk => 4,
        })
    }
}

/// What the index takes at most. Beyond it, what is new is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memberships: blocks that a cache holds, summed over all caches.
    pub memberships: u64,
    /// Blocks that are expected and not held, summed over all caches.
    pub expected: u64,
}

impl Limits {
    /// So many memberships, and an eighth of that expected.
    pub const fn of(memberships: u64) -> Self {
        Self { memberships, expected: memberships.div_ceil(8) }
    }
}

/// A change that the index does not take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IndexError {
    /// The slot has no open epoch.
    #[error("slot {} has no open epoch", .0.0)]
    Unopened(Slot),
    /// The change belongs to another life of the engine.
    #[error("change under epoch {given}, but slot {} is at epoch {open}", .slot.0)]
    Stale {
        /// Whose change it was.
        slot: Slot,
        /// The epoch it came under.
        given: Epoch,
        /// The epoch that is open.
        open: Epoch,
    },
    /// The engine has no such cache group.
    #[error("slot {} has no cache group {group}", .slot.0)]
    NoGroup {
        /// Whose change it was.
        slot: Slot,
        /// The group it named.
        group: u16,
    },
    /// More than 65,535 caches (an engine has one for each of its groups) are open.
    #[error("no room for another cache")]
    Caches,
}

/// Whose blocks a change is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The engine.
    pub slot: Slot,
    /// The life of the engine that the change belongs to.
    pub epoch: Epoch,
    /// Which of the engine's cache groups, in the order given to
    /// [`open_groups`](super::KvIndex::open_groups); 0 where there is only one.
    pub group: u16,
}

impl Holder {
    /// The engine's first group.
    pub const fn new(slot: Slot, epoch: Epoch) -> Self {
        Self { slot, epoch, group: 0 }
    }

    /// Another group of the same engine.
    pub const fn group(self, group: u16) -> Self {
        Self { group, ..self }
    }
}

/// Block hashes, and what is known of how they hang together. Knowing makes the index small and its lookups fast;
/// results are the same without.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The blocks.
    pub hashes: &'a [BlockHash],
    /// Whether each block follows the one before it.
    pub chained: bool,
    /// The block before the first, where the blocks are chained and it is known.
    pub parent: Option<BlockHash>,
}

impl<'a> Run<'a> {
    /// Blocks in any order.
    pub const fn loose(hashes: &'a [BlockHash]) -> Self {
        Self { hashes, chained: false, parent: None }
    }

    /// Blocks of one prompt of which each follows the one before it. `parent` is the block before the first; `None`
    /// where there is none or it is not known.
    pub const fn chain(parent: Option<BlockHash>, hashes: &'a [BlockHash]) -> Self {
        Self { hashes, chained: true, parent }
    }
}

/// How the layers of a cache group look at what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// At everything: a hit needs all blocks before its end.
    Full,
    /// At a window: a hit needs this many blocks of the group before its end, or all where there are fewer.
    SlidingWindow {
        /// Blocks of the group; 0 counts as 1.
        blocks: u32,
    },
    /// At a state that the last block carries (Mamba and other recurrent layers): a hit needs the block at its end.
    State,
}

impl Attention {
    /// A window of so many tokens, over blocks of so many tokens (at least 1): a token sees the `window - 1` tokens
    /// before it.
    pub const fn window(window: u32, block_size: u32) -> Self {
        Self::SlidingWindow { blocks: window.saturating_sub(1).div_ceil(block_size) }
    }

    /// Blocks of the group that a hit needs before its end; `None` for all.
    pub(super) fn needs(self) -> Option<u32> {
        match self {
            Self::Full => None,
            Self::SlidingWindow { blocks } => Some(blocks.max(1)),
            Self::State => Some(1),
        }
    }
}

/// One cache group of an engine: layers that share block tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// What its layers look at.
    pub attention: Attention,
    /// How many blocks of a prompt's chain make one block of the group, at least 1. A group's block goes by the hash of
    /// the last of them.
    pub stride: u32,
}

impl Group {
    /// A group whose blocks are the chain's.
    pub const fn new(attention: Attention) -> Self {
        Self { attention, stride: 1 }
    }
}
