//! What the engine owns, in Baton's own block hashes.
//!
//! The engine names blocks by hashes of its own; here each is translated once, when it is stored, by hashing its
//! content. Knowledge errs on the side of too little: what cannot be translated with certainty is not
//! owned, and is counted by reason.
//!
//! # Cache groups
//! An engine with several cache groups ([`CacheGroup`]) says of each block in which group it came or went, and means the same
//! content by the same hash in all of them. A group that keeps only some of its blocks names those alone, beside the tokens
//! of all: they are known by the hash that another group gave them, at once or a moment later.
//!
//! # Several copies of one block
//! Requests with equal prompts leave an engine with several copies of a block, which come and go with events of their own. So
//! copies are counted, and the block is gone with the last one. An engine may also repeat what it has stored (some are
//! asked to, request by request), and a repeat looks like a copy. But there cannot be more copies than the engine has blocks: when
//! there are, it repeats itself. What was counted more than once is forgotten then, and from then on a block counts as
//! gone with the first `removed`, as it does where the engine's number of blocks is not known
//! ([`Ownership::set_capacity`]). Its translation is kept for a while: when the engine stores a block of full attention
//! *behind* it, the request that did so has the whole prefix, and what of it counts as gone is owned again.
//!
//! # Bounds
//! At most [`Ownership::MAX_BLOCKS`] engine hashes are known, those gone included: about 500 MiB. Where there is no
//! room, those gone first are forgotten first; where none is gone, stores are ignored and counted.

mod groups;
mod holdings;
mod translate;

use std::collections::{HashMap, VecDeque};

use baton_proto::block_hash::{BlockHash, BlockHasher};
use baton_proto::control::v1::Tier;
use indexmap::IndexMap;
use smallvec::SmallVec;

pub use self::groups::{Attention, CacheGroup};
use self::groups::{Found, Groups};
use self::holdings::Holdings;
use self::translate::{extra_keys, part_keys, tier};
use crate::engine::event::{EngineHash, KvEvent, Removed, Stored};

/// A block, and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its hash.
    pub hash: BlockHash,
    /// The block before it; `None` at the start of a prompt, and in groups whose blocks are larger than the engine's.
    pub parent: Option<BlockHash>,
}

/// Where the engine keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which of [`Ownership::groups`]; 0 where there are none.
    pub group: u8,
    /// In which tier.
    pub tier: Tier,
}

impl Place {
    /// On the GPU, in the only group.
    pub const GPU: Self = Self { group: 0, tier: Tier::Gpu };
}

/// A change to what the engine owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The engine owns a block in a place where it did not before.
    Stored(Block, Place),
    /// It does not any more.
    Removed(BlockHash, Place),
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
    /// Belongs to layers whose hits cannot be counted, or to a group that is not known.
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
    /// Whether [`Ownership::groups`] is another now. Who was told of the groups must be told anew, and of all that is
    /// owned.
    pub regrouped: bool,
}

/// A block under one of the engine's hashes.
struct Known {
    block: BlockHash,
    parent: Option<EngineHash>,
    /// Copies; in other tiers than the GPU's one at most. Nothing where the block is gone.
    copies: Holdings,
    /// Whether any of them was counted on top of another.
    repeated: bool,
    /// Whether a block was stored behind it.
    followed: bool,
}

/// A block that is owned.
#[derive(Default)]
struct Owned {
    parent: Option<BlockHash>,
    /// Under how many of the engine's hashes.
    hashes: Holdings,
}

/// Translates an engine's events.
pub struct Ownership {
    hasher: BlockHasher,
    block_size: u32,
    max_blocks: usize,
    groups: Groups,
    /// As they were described last.
    described: Vec<CacheGroup>,
    known: HashMap<EngineHash, Known>,
    /// Hashes of blocks that went, oldest first. Some may have come back.
    gone: VecDeque<EngineHash>,
    /// By hash, about in the order in which they came, so that blocks of one prompt stand together.
    owned: IndexMap<BlockHash, Owned>,
    /// Blocks that a group stored before any told their content, by engine hash.
    untold: IndexMap<EngineHash, SmallVec<[Place; 2]>>,
    /// Blocks of the engine's GPU cache, where copies are counted.
    capacity: Option<u64>,
    /// Copies on the GPU, over all blocks and groups.
    copies: u64,
}

impl Ownership {
    /// Cap on the engine hashes known.
    pub const MAX_BLOCKS: usize = 2 << 20;
    /// Cap on blocks whose content was not told yet; the oldest of more are forgotten.
    const MAX_UNTOLD: usize = 4096;

    /// For an engine that serves `model` with blocks of `block_size` tokens.
    pub fn new(model: &str, block_size: u32) -> Self {
        Self {
            hasher: BlockHasher::new(model),
            block_size,
            max_blocks: Self::MAX_BLOCKS,
            groups: Groups::default(),
            described: Vec::new(),
            known: HashMap::new(),
            gone: VecDeque::new(),
            owned: IndexMap::new(),
            untold: IndexMap::new(),
            capacity: None,
            copies: 0,
        }
    }

    /// The engine's GPU cache has so many blocks, over all groups: copies of blocks are counted from now on. To be called
    /// before the first event.
    pub fn set_capacity(&mut self, blocks: u64) {
        if self.known.is_empty() {
            self.capacity = Some(blocks);
        }
    }

    /// The engine's cache groups, as far as they have shown; none where it has one only, of full attention.
    pub fn groups(&self) -> &[CacheGroup] {
        &self.described
    }

    /// Blocks owned, each counted once whatever its places.
    pub fn len(&self) -> usize {
        self.owned.len()
    }

    /// Whether nothing is owned.
    pub fn is_empty(&self) -> bool {
        self.owned.is_empty()
    }

    /// All that is owned, blocks of one prompt mostly one behind the other.
    pub fn iter(&self) -> impl Iterator<Item = (Block, Place)> + '_ {
        self.owned.iter().flat_map(move |(hash, owned)| {
            owned.hashes.places().map(move |place| {
                let chained = self.groups.stride(place.group, self.block_size) == 1;
                (Block { hash: *hash, parent: owned.parent.filter(|_| chained) }, place)
            })
        })
    }

    /// Applies one event.
    pub fn apply(&mut self, event: &KvEvent, applied: &mut Applied) {
        match event {
            KvEvent::Stored(stored) => {
                if let Err(reason) = self.stored(stored, applied) {
                    applied.ignored.push(reason);
                }
            }
            KvEvent::Removed(removed) => self.removed(removed, applied),
            KvEvent::Cleared => self.clear(applied),
            KvEvent::Unknown => applied.ignored.push(Ignored::UnknownEvent),
        }
    }

    /// The engine owns nothing.
    pub fn clear(&mut self, applied: &mut Applied) {
        self.known.clear();
        self.gone.clear();
        self.owned.clear();
        self.untold.clear();
        self.copies = 0;
        applied.changes.push(Change::Cleared);
    }

    /// Nothing is known of the engine any more, its groups included.
    pub fn forget(&mut self, applied: &mut Applied) {
        self.clear(applied);
        self.groups = Groups::default();
        self.describe(applied);
    }

    fn describe(&mut self, applied: &mut Applied) {
        let described = self.groups.describe(self.block_size);
        if self.described != described {
            self.described = described;
            applied.regrouped = true;
        }
    }

    fn stored(&mut self, stored: &Stored, applied: &mut Applied) -> Result<(), Ignored> {
        let place = self.place(stored, applied)?;
        let blocks = stored.token_ids.chunks_exact(stored.block_size as usize);
        if stored.hashes.len() < blocks.len() {
            stored.hashes.iter().for_each(|hash| self.take_untold(*hash, place, applied));
            return Ok(());
        }
        let mut parent = match stored.parent {
            None => None,
            Some(hash) => {
                let known = self.known.get(&hash).ok_or(Ignored::UnknownParent)?;
                Some((hash, known.block))
            }
        };
        let stride = stored.block_size / self.block_size;
        let chained = stride == 1;
        if let (Some((hash, _)), Tier::Gpu) = (parent, place.tier)
            && chained
            && self.groups.is_full(place.group)
        {
            self.restore_prefix(hash, place, applied);
        }
        for (i, (hash, tokens)) in stored.hashes.iter().zip(blocks).enumerate() {
            let values = stored.extra_keys.as_ref().and_then(|keys| keys[i].as_deref()).unwrap_or_default();
            let first = parent.is_none();
            let keys = extra_keys(values, stored.lora_name.as_deref(), first).ok_or(Ignored::Unreadable)?;
            let before = parent.map(|(_, block)| block);
            let block = if chained {
                self.hasher.block(before, tokens, keys)
            } else {
                let mut parts = tokens.chunks_exact(self.block_size as usize).zip(0..);
                let last = parts.try_fold(before, |before, (tokens, part)| {
                    Some(Some(self.hasher.block(before, tokens, part_keys(&keys, part)?)))
                });
                // Where its parts cannot be told, another group may have.
                let told = || self.known.get(hash).map(|known| known.block);
                last.flatten().or_else(told).ok_or(Ignored::Unreadable)?
            };
            let block = Block { hash: block, parent: before.filter(|_| chained) };
            let behind = parent.map(|(hash, _)| hash).filter(|_| chained);
            if !self.add(*hash, block, behind, place, applied) {
                return Err(Ignored::Full);
            }
            parent = Some((*hash, block.hash));
        }
        Ok(())
    }

    /// Where a store belongs, if it can be read.
    fn place(&mut self, stored: &Stored, applied: &mut Applied) -> Result<Place, Ignored> {
        let tier = tier(stored.medium.as_deref(), stored.locality.as_deref()).ok_or(Ignored::OtherTier)?;
        if stored.block_size < self.block_size {
            return Err(Ignored::PartialBlock);
        }
        let n = stored.hashes.len();
        let tokens = stored.token_ids.len();
        let size = stored.block_size as usize;
        let keyed = stored.extra_keys.as_ref().is_none_or(|keys| keys.len() == n);
        // A LoRA adapter without a name cannot be told from another engine's.
        let nameless_lora = stored.lora_id.is_some() && stored.lora_name.is_none();
        if !tokens.is_multiple_of(size) || n > tokens / size || !keyed || nameless_lora {
            return Err(Ignored::Unreadable);
        }
        let group = match self.groups.of_stored(stored, self.block_size, tier == Tier::Gpu)? {
            Found::Known(group) => group,
            Found::New(group) => {
                self.describe(applied);
                group
            }
            Found::Changed(group) => {
                self.clear(applied);
                self.describe(applied);
                group
            }
        };
        Ok(Place { group, tier })
    }

    /// A block of full attention is stored behind this one on the GPU: all before it is there.
    ///
    /// The whole prefix is looked at only where the block is gone or was followed before, so once for each use of a
    /// cached prefix and not for each block that a long answer adds.
    fn restore_prefix(&mut self, last: EngineHash, place: Place, applied: &mut Applied) {
        let Some(known) = self.known.get_mut(&last) else { return };
        let look = known.followed || known.copies.of(place) == 0;
        known.followed = true;
        let mut at = look.then_some(last);
        let mut back = Vec::new();
        // An engine that gives one hash to two contents could make a prefix without a beginning.
        for _ in 0..self.known.len() {
            let Some(known) = at.and_then(|hash| self.known.get_mut(&hash)) else { break };
            at = known.parent;
            if known.copies.of(place) == 0 {
                known.copies.set(place, 1);
                self.copies += 1;
                let hash = known.block;
                let parent = at.and_then(|parent| self.known.get(&parent)).map(|parent| parent.block);
                back.push(Block { hash, parent });
            }
        }
        for block in back.into_iter().rev() {
            self.count(block, place, applied);
        }
        self.check_capacity(applied);
    }

    /// A block came whose content this event does not tell.
    fn take_untold(&mut self, hash: EngineHash, place: Place, applied: &mut Applied) {
        if self.known.contains_key(&hash) {
            return self.take(hash, None, place, applied);
        }
        self.untold.entry(hash).or_default().push(place);
        if self.untold.len() > Self::MAX_UNTOLD {
            self.untold.shift_remove_index(0);
            applied.ignored.push(Ignored::Unreadable);
        }
    }

    /// Whether there was room.
    fn add(
        &mut self,
        hash: EngineHash,
        block: Block,
        parent: Option<EngineHash>,
        place: Place,
        applied: &mut Applied,
    ) -> bool {
        if let Some(known) = self.known.get_mut(&hash) {
            if known.block == block.hash {
                known.parent = known.parent.or(parent);
                self.take(hash, block.parent, place, applied);
                return true;
            }
            // The same hash for other content: only an engine that restarted unnoticed does that.
            self.drop_hash(hash, applied);
        } else if !self.make_room() {
            return false;
        }
        let known = Known {
            block: block.hash,
            parent,
            copies: Holdings::default(),
            repeated: false,
            followed: false,
        };
        self.known.insert(hash, known);
        self.take(hash, block.parent, place, applied);
        for place in self.untold.swap_remove(&hash).unwrap_or_default() {
            self.take(hash, block.parent, place, applied);
        }
        true
    }

    /// One more copy of a known block.
    fn take(&mut self, hash: EngineHash, parent: Option<BlockHash>, place: Place, applied: &mut Applied) {
        let Some(known) = self.known.get_mut(&hash) else { return };
        let on_gpu = place.tier == Tier::Gpu;
        let before = known.copies.of(place);
        if before > 0 && !(on_gpu && self.capacity.is_some()) {
            return;
        }
        known.copies.set(place, before.saturating_add(1));
        known.repeated |= before > 0;
        self.copies += u64::from(on_gpu && before < u16::MAX);
        let hash = known.block;
        if before == 0 {
            let chained = self.groups.stride(place.group, self.block_size) == 1;
            let parent = parent.or_else(|| self.owned.get(&hash)?.parent).filter(|_| chained);
            self.count(Block { hash, parent }, place, applied);
        }
        self.check_capacity(applied);
    }

    /// Ends the counting of copies where there are more than there can be.
    fn check_capacity(&mut self, applied: &mut Applied) {
        if self.capacity.is_none_or(|blocks| self.copies <= blocks) {
            return;
        }
        tracing::info!(
            copies = self.copies,
            "the engine repeats what it has stored: copies of blocks are not counted"
        );
        self.capacity = None;
        let repeated = self.known.iter().filter(|(_, known)| known.repeated).map(|(hash, _)| *hash);
        let mut repeated: Vec<EngineHash> = repeated.collect();
        repeated.sort_unstable();
        for hash in repeated {
            let Some(known) = self.known.get_mut(&hash) else { continue };
            known.repeated = false;
            let block = known.block;
            for place in known.copies.on_gpu() {
                known.copies.set(place, 0);
                applied.changes.extend(uncount(&mut self.owned, block, place));
            }
            if known.copies.is_empty() {
                self.gone.push_back(hash);
            }
        }
        self.copies = self.known.values().map(|known| known.copies.on_gpu().len() as u64).sum();
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
        if self.known.get(&oldest).is_some_and(|known| known.copies.is_empty()) {
            self.known.remove(&oldest);
        }
        true
    }

    /// A block is owned under one more engine hash.
    fn count(&mut self, block: Block, place: Place, applied: &mut Applied) {
        let owned = self.owned.entry(block.hash).or_default();
        owned.parent = block.parent.or(owned.parent);
        let hashes = owned.hashes.of(place);
        owned.hashes.set(place, hashes.saturating_add(1));
        if hashes == 0 {
            applied.changes.push(Change::Stored(block, place));
        }
    }

    /// Nothing is owned under this hash any more.
    fn drop_hash(&mut self, hash: EngineHash, applied: &mut Applied) {
        let Some(known) = self.known.remove(&hash) else { return };
        for place in known.copies.places() {
            if place.tier == Tier::Gpu {
                self.copies -= u64::from(known.copies.of(place));
            }
            applied.changes.extend(uncount(&mut self.owned, known.block, place));
        }
    }

    /// A copy went.
    fn remove(&mut self, hash: EngineHash, place: Place, applied: &mut Applied) {
        let Some(known) = self.known.get_mut(&hash) else {
            if let Some(places) = self.untold.get_mut(&hash)
                && let Some(at) = places.iter().position(|untold| *untold == place)
            {
                places.swap_remove(at);
            }
            return;
        };
        let copies = known.copies.of(place);
        if copies == 0 {
            return;
        }
        known.copies.set(place, copies - 1);
        self.copies -= u64::from(place.tier == Tier::Gpu);
        let block = known.block;
        if known.copies.is_empty() {
            known.repeated = false;
            self.gone.push_back(hash);
            if self.gone.len() > self.max_blocks {
                self.forget_oldest();
            }
        }
        if copies == 1 {
            applied.changes.extend(uncount(&mut self.owned, block, place));
        }
    }

    fn removed(&mut self, removed: &Removed, applied: &mut Applied) {
        let Some(tier) = tier(removed.medium.as_deref(), removed.locality.as_deref()) else {
            return applied.ignored.push(Ignored::OtherTier);
        };
        let mut groups = self.groups.of_removed(removed.group_idx).peekable();
        if groups.peek().is_none() && !self.known.is_empty() {
            // The groups of a hybrid model share hashes: what another group drops is still here.
            applied.ignored.push(Ignored::OtherGroup);
        }
        for group in groups {
            for hash in &removed.hashes {
                self.remove(*hash, Place { group, tier }, applied);
            }
        }
    }
}

/// A block is owned under one engine hash less.
fn uncount(owned: &mut IndexMap<BlockHash, Owned>, block: BlockHash, place: Place) -> Option<Change> {
    let entry = owned.get_mut(&block)?;
    let left = entry.hashes.of(place).saturating_sub(1);
    entry.hashes.set(place, left);
    if entry.hashes.is_empty() {
        owned.swap_remove(&block);
    }
    (left == 0).then_some(Change::Removed(block, place))
}

#[cfg(test)]
mod tests;
