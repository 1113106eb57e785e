//! What the engine owns, in Baton's own block hashes.
//!
//! The engine names blocks by hashes of its own; here each is translated once, when it is stored, by hashing its
//! content. Knowledge errs on the side of too little: what cannot be translated with certainty is not
//! owned, and is counted by reason.
//!
//! # Several copies of one block
//! Requests with equal prompts that run at once leave an engine with several copies of a block. It says `stored` for
//! each, as it also may for a block that is merely used again, and `removed` when any copy goes. So a block counts as gone
//! with the first `removed`, and its translation is kept for a while: when the engine stores a block *behind* it,
//! the request that did so has the whole prefix, and what of it counts as gone is owned again.
//!
//! # Bounds
//! At most [`Ownership::MAX_BLOCKS`] engine hashes are known, those gone included: about 350 MiB. Where there is no
//! room, those gone first are forgotten first; where none is gone, stores are ignored and counted.

use std::collections::{HashMap, VecDeque};

use baton_proto::block_hash::{BlockHash, BlockHasher, ExtraKey};
use baton_proto::control::v1::Tier;
use indexmap::IndexMap;

use crate::engine::event::{EngineHash, ExtraValue, KvEvent, Removed, Stored};

/// A block, and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its hash.
    pub hash: BlockHash,
    /// The block before it; `None` at the start of a prompt.
    pub parent: Option<BlockHash>,
}

/// A change to what the engine owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The engine owns a block in a tier where it did not before.
    Stored(Block, Tier),
    /// It does not any more.
    Removed(BlockHash, Tier),
    /// It owns nothing.
    Cleared,
}

/// Why an event, or a part of it, did not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ignored {
    /// The block before it is not known.
    UnknownParent,
    /// Shorter than a block of the engine: a partial block.
    PartialBlock,
    /// Belongs to layers without full attention, or to a second group of layers.
    OtherGroup,
    /// Hashes, tokens and extra keys do not go together, or a key is of no known kind.
    Unreadable,
    /// In a tier of no known name, or in another engine's cache.
    OtherTier,
    /// Beyond [`Ownership::MAX_BLOCKS`].
    Full,
    /// A kind of event that is not known.
    UnknownEvent,
}

impl Ignored {
    /// The reason as a metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownParent => "unknown_parent",
            Self::PartialBlock => "partial_block",
            Self::OtherGroup => "other_group",
            Self::Unreadable => "unreadable",
            Self::OtherTier => "other_tier",
            Self::Full => "full",
            Self::UnknownEvent => "unknown_event",
        }
    }
}

/// What applying an event came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// What did not count.
    pub ignored: Vec<Ignored>,
}

const TIERS: [Tier; 3] = [Tier::Gpu, Tier::Host, Tier::Disk];

fn slot(tier: Tier) -> usize {
    match tier {
        Tier::Unspecified | Tier::Gpu => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
    }
}

/// A block under one of the engine's hashes.
struct Known {
    block: BlockHash,
    parent: Option<EngineHash>,
    /// One bit for each of [`TIERS`]; none where the block is gone.
    tiers: u8,
    /// Whether a block was stored behind it.
    followed: bool,
}

/// A block that is owned.
#[derive(Default)]
struct Owned {
    parent: Option<BlockHash>,
    /// Under how many of the engine's hashes, for each of [`TIERS`].
    counts: [u32; 3],
}

/// The bit of the GPU's tier.
const ON_GPU: u8 = 1;

/// Translates an engine's events.
pub struct Ownership {
    hasher: BlockHasher,
    block_size: u32,
    max_blocks: usize,
    known: HashMap<EngineHash, Known>,
    /// Hashes of blocks that went, oldest first. Some may have come back.
    gone: VecDeque<EngineHash>,
    /// By hash, about in the order in which they came, so that blocks of one prompt stand together.
    owned: IndexMap<BlockHash, Owned>,
    /// The group of layers that counts: that of the first store with full attention.
    group: Option<i64>,
}

impl Ownership {
    /// Cap on the engine hashes known.
    pub const MAX_BLOCKS: usize = 2 << 20;

    /// For an engine that serves `model` with blocks of `block_size` tokens.
    pub fn new(model: &str, block_size: u32) -> Self {
        Self {
            hasher: BlockHasher::new(model),
            block_size,
            max_blocks: Self::MAX_BLOCKS,
            known: HashMap::new(),
            gone: VecDeque::new(),
            owned: IndexMap::new(),
            group: None,
        }
    }

    /// Blocks owned, each counted once whatever its tiers.
    pub fn len(&self) -> usize {
        self.owned.len()
    }

    /// Whether nothing is owned.
    pub fn is_empty(&self) -> bool {
        self.owned.is_empty()
    }

    /// All that is owned, blocks of one prompt mostly one behind the other.
    pub fn iter(&self) -> impl Iterator<Item = (Block, Tier)> + '_ {
        self.owned.iter().flat_map(|(hash, owned)| {
            let block = Block { hash: *hash, parent: owned.parent };
            TIERS.into_iter().filter(|tier| owned.counts[slot(*tier)] > 0).map(move |tier| (block, tier))
        })
    }

    /// Applies one event.
    pub fn apply(&mut self, event: &KvEvent, applied: &mut Applied) {
        match event {
            KvEvent::Stored(stored) => self.stored(stored, applied),
            KvEvent::Removed(removed) => self.removed(removed, applied),
            KvEvent::Cleared => self.clear(applied),
            KvEvent::Unknown => applied.ignored.push(Ignored::UnknownEvent),
        }
    }

    /// Forgets all.
    pub fn clear(&mut self, applied: &mut Applied) {
        self.known.clear();
        self.gone.clear();
        self.owned.clear();
        self.group = None;
        applied.changes.push(Change::Cleared);
    }

    fn stored(&mut self, stored: &Stored, applied: &mut Applied) {
        let tier = match self.checked_tier(stored) {
            Ok(tier) => tier,
            Err(reason) => return applied.ignored.push(reason),
        };
        let mut parent = match stored.parent {
            None => None,
            Some(hash) => match self.known.get(&hash) {
                Some(known) => Some((hash, known.block)),
                None => return applied.ignored.push(Ignored::UnknownParent),
            },
        };
        if let (Some((hash, _)), Tier::Gpu) = (parent, tier) {
            self.restore_prefix(hash, applied);
        }
        let blocks = stored.token_ids.chunks_exact(self.block_size as usize);
        for (i, (hash, tokens)) in stored.hashes.iter().zip(blocks).enumerate() {
            let values = stored.extra_keys.as_ref().and_then(|keys| keys[i].as_deref()).unwrap_or_default();
            let first = parent.is_none();
            let Some(keys) = extra_keys(values, stored.lora_name.as_deref(), first) else {
                return applied.ignored.push(Ignored::Unreadable);
            };
            let block = self.hasher.block(parent.map(|(_, block)| block), tokens, keys);
            if !self.add(*hash, block, parent, tier, applied) {
                return applied.ignored.push(Ignored::Full);
            }
            parent = Some((*hash, block));
        }
    }

    /// A block is stored behind this one on the GPU: all before it is there.
    ///
    /// The whole prefix is looked at only where the block is gone or was followed before, so once for each use of a
    /// cached prefix and not for each block that a long answer adds.
    fn restore_prefix(&mut self, last: EngineHash, applied: &mut Applied) {
        let Some(known) = self.known.get_mut(&last) else { return };
        let look = known.followed || known.tiers & ON_GPU == 0;
        known.followed = true;
        let mut at = look.then_some(last);
        let mut back = Vec::new();
        // An engine that gives one hash to two contents could make a prefix without a beginning.
        for _ in 0..self.known.len() {
            let Some(known) = at.and_then(|hash| self.known.get_mut(&hash)) else { break };
            at = known.parent;
            if known.tiers & ON_GPU == 0 {
                known.tiers |= ON_GPU;
                let hash = known.block;
                let parent = at.and_then(|parent| self.known.get(&parent)).map(|parent| parent.block);
                back.push(Block { hash, parent });
            }
        }
        for block in back.into_iter().rev() {
            self.count(block, Tier::Gpu, applied);
        }
    }

    fn checked_tier(&mut self, stored: &Stored) -> Result<Tier, Ignored> {
        let tier = tier(stored.medium.as_deref(), stored.locality.as_deref()).ok_or(Ignored::OtherTier)?;
        if stored.block_size != self.block_size {
            return Err(Ignored::PartialBlock);
        }
        let full_attention = stored
            .spec_kind
            .as_deref()
            .is_none_or(|kind| matches!(kind, "full_attention" | "mla_attention" | "sink_full_attention"));
        if !full_attention {
            return Err(Ignored::OtherGroup);
        }
        let n = stored.hashes.len();
        let keyed = stored.extra_keys.as_ref().is_none_or(|keys| keys.len() == n);
        // A LoRA adapter without a name cannot be told from another engine's.
        let nameless_lora = stored.lora_id.is_some() && stored.lora_name.is_none();
        if stored.token_ids.len() != n * self.block_size as usize || !keyed || nameless_lora {
            return Err(Ignored::Unreadable);
        }
        match (self.group, stored.group_idx) {
            (None, group) => self.group = group,
            (Some(known), Some(group)) if known != group => return Err(Ignored::OtherGroup),
            _ => {}
        }
        Ok(tier)
    }

    /// Whether there was room.
    fn add(
        &mut self,
        hash: EngineHash,
        block: BlockHash,
        before: Option<(EngineHash, BlockHash)>,
        tier: Tier,
        applied: &mut Applied,
    ) -> bool {
        let bit = 1 << slot(tier);
        let parent = before.map(|(hash, _)| hash);
        match self.known.get_mut(&hash) {
            Some(known) if known.block == block => {
                if known.tiers & bit != 0 {
                    return true;
                }
                known.tiers |= bit;
            }
            Some(_) => {
                // The same hash for other content: only an engine that restarted unnoticed does that.
                for tier in TIERS {
                    self.remove(hash, tier, applied);
                }
                self.known.insert(hash, Known { block, parent, tiers: bit, followed: false });
            }
            None => {
                if !self.make_room() {
                    return false;
                }
                self.known.insert(hash, Known { block, parent, tiers: bit, followed: false });
            }
        }
        self.count(Block { hash: block, parent: before.map(|(_, block)| block) }, tier, applied);
        true
    }

    fn make_room(&mut self) -> bool {
        while self.known.len() >= self.max_blocks {
            if !self.forget_oldest() {
                return false;
            }
        }
        true
    }

    /// Forgets the translation of the block that went first. False where none is gone.
    fn forget_oldest(&mut self) -> bool {
        let Some(oldest) = self.gone.pop_front() else { return false };
        if self.known.get(&oldest).is_some_and(|known| known.tiers == 0) {
            self.known.remove(&oldest);
        }
        true
    }

    /// A block is owned under one more engine hash.
    fn count(&mut self, block: Block, tier: Tier, applied: &mut Applied) {
        let owned = self.owned.entry(block.hash).or_default();
        owned.parent = block.parent;
        let count = &mut owned.counts[slot(tier)];
        *count += 1;
        if *count == 1 {
            applied.changes.push(Change::Stored(block, tier));
        }
    }

    fn remove(&mut self, hash: EngineHash, tier: Tier, applied: &mut Applied) {
        let bit = 1 << slot(tier);
        let Some(known) = self.known.get_mut(&hash).filter(|known| known.tiers & bit != 0) else { return };
        known.tiers &= !bit;
        let block = known.block;
        if known.tiers == 0 {
            self.gone.push_back(hash);
            if self.gone.len() > self.max_blocks {
                self.forget_oldest();
            }
        }
        let Some(Owned { counts, .. }) = self.owned.get_mut(&block) else { return };
        counts[slot(tier)] -= 1;
        if counts[slot(tier)] == 0 {
            applied.changes.push(Change::Removed(block, tier));
        }
        if *counts == [0; 3] {
            self.owned.swap_remove(&block);
        }
    }

    fn removed(&mut self, removed: &Removed, applied: &mut Applied) {
        let Some(tier) = tier(removed.medium.as_deref(), removed.locality.as_deref()) else {
            return applied.ignored.push(Ignored::OtherTier);
        };
        // The groups of a hybrid model share hashes: what another group drops is still here.
        if self.group.zip(removed.group_idx).is_some_and(|(known, group)| known != group) {
            return applied.ignored.push(Ignored::OtherGroup);
        }
        for hash in &removed.hashes {
            self.remove(*hash, tier, applied);
        }
    }
}

fn tier(medium: Option<&str>, locality: Option<&str>) -> Option<Tier> {
    if locality == Some("REMOTE") {
        return None;
    }
    match medium {
        None | Some("GPU") => Some(Tier::Gpu),
        Some("CPU") => Some(Tier::Host),
        Some("STORAGE") => Some(Tier::Disk),
        Some(_) => None,
    }
}

/// Gives an engine's untagged keys their meaning: the LoRA name comes first where there is one, pairs are
/// multimodal items, the text of a prompt's first block is its cache salt, bytes are opaque.
fn extra_keys<'a>(values: &'a [ExtraValue], lora: Option<&'a str>, first: bool) -> Option<Vec<ExtraKey<'a>>> {
    let mut keys = Vec::with_capacity(values.len() + 1);
    let mut rest = values;
    if let Some(name) = lora {
        keys.push(ExtraKey::Lora(name));
        match rest.split_first() {
            Some((ExtraValue::Text(text), others)) if text == name => rest = others,
            // Versions that list no extra keys still name the adapter.
            None => {}
            Some(_) => return None,
        }
    }
    for value in rest {
        keys.push(match value {
            ExtraValue::Item(identifier, offset) => ExtraKey::Multimodal { identifier, offset: *offset },
            ExtraValue::Text(salt) if first => ExtraKey::Salt(salt),
            ExtraValue::Bytes(digest) => ExtraKey::Opaque(digest),
            // Text behind the first block is the multimodal key of a version that lists no offsets.
            ExtraValue::Text(_) | ExtraValue::Unknown => return None,
        });
    }
    Some(keys)
}

#[cfg(test)]
mod tests;
