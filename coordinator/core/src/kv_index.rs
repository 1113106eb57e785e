//! Which engine holds which blocks, in which tier.
//!
//! The index is exact: it holds what the engines' events said, nothing guessed. Each engine's part stands under an
//! epoch; opening a newer epoch empties it, and whatever comes under an older one is refused.
//!
//! # Memory
//! One *membership* (an engine holds a block, in one or more tiers) costs about 80 bytes where the block has one owner,
//! about 10 more for each further owner of the same block. At [`KvIndex::new`]'s cap a store of a block that its engine does not
//! hold yet is dropped and counted: the index then knows less than the engines hold, and a request is computed where
//! it could have been a hit. Removals make room again.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use baton_proto::{BlockHash, Epoch};
use smallvec::SmallVec;

/// Number of buckets that blocks fall into, by the first byte of their hash.
pub const BUCKETS: usize = 256;

/// Short stand-in for an engine's name, given out by whoever keeps the fleet. A slot may be given to another
/// engine once [`KvIndex::forget`] was called for it.
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
    const ALL: u8 = 0b111;

    /// The set that these bits stand for; bits without a tier are dropped.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL)
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

    fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
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
}

/// Leading blocks of a prompt that an engine holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// In any tier.
    pub blocks: u32,
    /// In the GPU's cache.
    pub gpu_blocks: u32,
}

/// The overlaps of one prompt, in slot order, engines without any left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlaps(Vec<(Slot, Overlap)>);

impl Overlaps {
    /// What the engine holds.
    pub fn of(&self, slot: Slot) -> Overlap {
        match self.0.binary_search_by_key(&slot, |entry| entry.0) {
            Ok(at) => self.0[at].1,
            Err(_) => Overlap::default(),
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Slot, Overlap)> + '_ {
        self.0.iter().copied()
    }

    /// Takes over the overlaps of those slots that `keep` names.
    pub fn merge(&mut self, other: &Overlaps, keep: impl Fn(Slot) -> bool) {
        self.0.extend(other.iter().filter(|(slot, _)| keep(*slot)));
        self.0.sort_by_key(|entry| entry.0);
        self.0.dedup_by_key(|entry| entry.0);
    }
}

impl FromIterator<(Slot, Overlap)> for Overlaps {
    fn from_iter<T: IntoIterator<Item = (Slot, Overlap)>>(iter: T) -> Self {
        let mut overlaps = Self(iter.into_iter().collect());
        overlaps.0.sort_by_key(|entry| entry.0);
        overlaps
    }
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    slot: Slot,
    tiers: Tiers,
}

/// In slot order.
type Owners = SmallVec<[Owner; 2]>;

/// Block hashes are uniform already; the seed keeps a tenant from choosing prompts whose hashes collide in the
/// table.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

struct SeededHasher(u64);

impl BuildHasher for Seeded {
    type Hasher = SeededHasher;

    fn build_hasher(&self) -> SeededHasher {
        SeededHasher(self.0)
    }
}

impl Hasher for SeededHasher {
    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut value = [0; 8];
            value[..word.len()].copy_from_slice(word);
            let product = u128::from(self.0 ^ u64::from_le_bytes(value)) * 0x9e37_79b9_7f4a_7c15;
            self.0 = (product >> 64) as u64 ^ product as u64;
        }
    }

    fn write_usize(&mut self, _: usize) {
        // The length prefix of the byte array, the same for all hashes.
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type Bucket = HashMap<BlockHash, Owners, Seeded>;

#[derive(Clone, Copy, Debug, Default)]
struct Engine {
    epoch: Option<Epoch>,
    blocks: u64,
}

/// The index.
#[derive(Debug)]
pub struct KvIndex {
    buckets: Vec<Bucket>,
    engines: Vec<Engine>,
    memberships: u64,
    max_memberships: u64,
    dropped: u64,
}

impl KvIndex {
    /// An empty index that takes at most `max_memberships`. `seed` sets the layout of its tables and nothing
    /// else.
    pub fn new(max_memberships: u64, seed: u64) -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::with_hasher(Seeded(seed))).collect(),
            engines: Vec::new(),
            memberships: 0,
            max_memberships,
            dropped: 0,
        }
    }

    /// The bucket that a block falls into.
    pub fn bucket_of(hash: &BlockHash) -> u8 {
        hash.as_bytes()[0]
    }

    /// Puts the engine at an epoch. A change of epoch empties its part; the same epoch again keeps it.
    pub fn open(&mut self, slot: Slot, epoch: Epoch) {
        let at = slot.0 as usize;
        if self.engines.len() <= at {
            self.engines.resize_with(at + 1, Engine::default);
        }
        if self.engines[at].epoch != Some(epoch) {
            self.empty(slot);
            self.engines[at].epoch = Some(epoch);
        }
    }

    /// Empties the engine's part and closes its epoch.
    pub fn forget(&mut self, slot: Slot) {
        if (slot.0 as usize) < self.engines.len() {
            self.empty(slot);
            self.engines[slot.0 as usize].epoch = None;
        }
    }

    /// The engine holds these blocks in these tiers, besides those it holds them in already. Returns how many
    /// memberships were dropped at the cap.
    pub fn store(
        &mut self,
        slot: Slot,
        epoch: Epoch,
        tiers: impl Into<Tiers>,
        hashes: impl IntoIterator<Item = BlockHash>,
    ) -> Result<u64, IndexError> {
        self.check(slot, epoch)?;
        let tiers = tiers.into();
        let mut dropped = 0;
        for hash in hashes {
            let full = self.memberships >= self.max_memberships;
            let bucket = &mut self.buckets[usize::from(Self::bucket_of(&hash))];
            let owners = if full {
                match bucket.get_mut(&hash) {
                    Some(owners) => owners,
                    None => {
                        dropped += 1;
                        continue;
                    }
                }
            } else {
                bucket.entry(hash).or_default()
            };
            match owners.binary_search_by_key(&slot, |owner| owner.slot) {
                Ok(at) => owners[at].tiers.insert(tiers),
                Err(_) if full => dropped += 1,
                Err(at) => {
                    owners.insert(at, Owner { slot, tiers });
                    self.memberships += 1;
                    self.engines[slot.0 as usize].blocks += 1;
                }
            }
        }
        self.dropped += dropped;
        Ok(dropped)
    }

    /// The engine does not hold these blocks in these tiers any more.
    pub fn remove(
        &mut self,
        slot: Slot,
        epoch: Epoch,
        tiers: impl Into<Tiers>,
        hashes: impl IntoIterator<Item = BlockHash>,
    ) -> Result<(), IndexError> {
        self.check(slot, epoch)?;
        let tiers = tiers.into();
        for hash in hashes {
            let bucket = &mut self.buckets[usize::from(Self::bucket_of(&hash))];
            let Some(owners) = bucket.get_mut(&hash) else { continue };
            let Ok(at) = owners.binary_search_by_key(&slot, |owner| owner.slot) else { continue };
            owners[at].tiers.remove(tiers);
            if owners[at].tiers.is_empty() {
                owners.remove(at);
                self.memberships -= 1;
                self.engines[slot.0 as usize].blocks -= 1;
                if owners.is_empty() {
                    bucket.remove(&hash);
                }
            }
        }
        Ok(())
    }

    /// The engine holds nothing any more.
    pub fn clear(&mut self, slot: Slot, epoch: Epoch) -> Result<(), IndexError> {
        self.check(slot, epoch)?;
        self.empty(slot);
        Ok(())
    }

    /// How many leading blocks of the prompt each engine holds. `hashes` is the prompt's chain.
    pub fn overlap(&self, hashes: &[BlockHash]) -> Overlaps {
        struct Run {
            slot: Slot,
            gpu: bool,
            overlap: Overlap,
        }
        let mut running: SmallVec<[Run; 16]> = SmallVec::new();
        let mut ended = Vec::new();
        for (i, hash) in hashes.iter().enumerate() {
            let owners = match self.buckets[usize::from(Self::bucket_of(hash))].get(hash) {
                Some(owners) => owners.as_slice(),
                None => &[],
            };
            if i == 0 {
                let run = |owner: &Owner| Run { slot: owner.slot, gpu: true, overlap: Overlap::default() };
                running.extend(owners.iter().map(run));
            }
            let mut owners = owners.iter().peekable();
            running.retain(|run| {
                while owners.next_if(|owner| owner.slot < run.slot).is_some() {}
                let Some(owner) = owners.next_if(|owner| owner.slot == run.slot) else {
                    ended.push((run.slot, run.overlap));
                    return false;
                };
                run.overlap.blocks += 1;
                run.gpu &= owner.tiers.contains(Tier::Gpu);
                run.overlap.gpu_blocks += u32::from(run.gpu);
                true
            });
            if running.is_empty() {
                break;
            }
        }
        ended.extend(running.into_iter().map(|run| (run.slot, run.overlap)));
        ended.into_iter().collect()
    }

    /// Every membership of one bucket, in order of hash and slot: what a store of ownership writes.
    pub fn bucket(&self, bucket: u8) -> Vec<(BlockHash, Slot, Tiers)> {
        #[allow(clippy::disallowed_methods, reason = "sorted below")]
        let mut members: Vec<_> = self.buckets[usize::from(bucket)]
            .iter()
            .flat_map(|(hash, owners)| owners.iter().map(|owner| (*hash, owner.slot, owner.tiers)))
            .collect();
        members.sort_unstable();
        members
    }

    /// Blocks that the engine holds.
    pub fn blocks_of(&self, slot: Slot) -> u64 {
        self.engines.get(slot.0 as usize).map_or(0, |engine| engine.blocks)
    }

    /// Memberships over all engines.
    pub fn memberships(&self) -> u64 {
        self.memberships
    }

    /// Memberships that the cap kept out, ever.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn check(&self, slot: Slot, epoch: Epoch) -> Result<(), IndexError> {
        match self.engines.get(slot.0 as usize).and_then(|engine| engine.epoch) {
            None => Err(IndexError::Unopened(slot)),
            Some(open) if open != epoch => Err(IndexError::Stale { slot, given: epoch, open }),
            Some(_) => Ok(()),
        }
    }

    fn empty(&mut self, slot: Slot) {
        if self.engines[slot.0 as usize].blocks == 0 {
            return;
        }
        for bucket in &mut self.buckets {
            bucket.retain(|_, owners| {
                owners.retain(|owner| owner.slot != slot);
                !owners.is_empty()
            });
        }
        self.memberships -= self.engines[slot.0 as usize].blocks;
        self.engines[slot.0 as usize].blocks = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const E1: Epoch = Epoch(1);

    fn hash(n: u32) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_le_bytes());
        bytes[8..12].copy_from_slice(&n.to_le_bytes());
        BlockHash::from_bytes(bytes)
    }

    fn hashes(range: std::ops::Range<u32>) -> Vec<BlockHash> {
        range.map(hash).collect()
    }

    fn index(slots: u32) -> KvIndex {
        let mut index = KvIndex::new(1_000_000, 7);
        for slot in 0..slots {
            index.open(Slot(slot), E1);
        }
        index
    }

    #[test]
    fn overlap_counts_leading_blocks_only() {
        let mut index = index(3);
        index.store(Slot(0), E1, Tier::Gpu, hashes(0..8)).unwrap();
        index.store(Slot(1), E1, Tier::Gpu, hashes(0..24)).unwrap();
        index.remove(Slot(1), E1, Tier::Gpu, [hash(16)]).unwrap();
        index.store(Slot(2), E1, Tier::Gpu, hashes(1..24)).unwrap();
        let overlaps = index.overlap(&hashes(0..30));
        assert_eq!(overlaps.of(Slot(0)).blocks, 8);
        assert_eq!(overlaps.of(Slot(1)).blocks, 16);
        assert_eq!(overlaps.of(Slot(2)), Overlap::default());
    }

    #[test]
    fn tiers_are_told_apart_and_a_block_goes_with_its_last_tier() {
        let mut index = index(1);
        index.store(Slot(0), E1, Tier::Gpu, hashes(0..4)).unwrap();
        index.store(Slot(0), E1, Tier::Host, hashes(0..6)).unwrap();
        index.remove(Slot(0), E1, Tier::Gpu, [hash(2)]).unwrap();
        assert_eq!(index.overlap(&hashes(0..9)).of(Slot(0)), Overlap { blocks: 6, gpu_blocks: 2 });
        index.remove(Slot(0), E1, Tier::Host, [hash(2)]).unwrap();
        assert_eq!(index.overlap(&hashes(0..9)).of(Slot(0)), Overlap { blocks: 2, gpu_blocks: 2 });
        assert_eq!(index.blocks_of(Slot(0)), 5);
    }

    #[test]
    fn a_new_epoch_empties_and_an_old_one_is_refused() {
        let mut index = index(2);
        index.store(Slot(0), E1, Tier::Gpu, hashes(0..4)).unwrap();
        index.store(Slot(1), E1, Tier::Gpu, hashes(0..4)).unwrap();
        index.open(Slot(0), Epoch(2));
        assert_eq!(index.memberships(), 4);
        assert_eq!(index.overlap(&hashes(0..4)).of(Slot(0)), Overlap::default());
        assert_eq!(
            index.store(Slot(0), E1, Tier::Gpu, hashes(0..4)),
            Err(IndexError::Stale { slot: Slot(0), given: E1, open: Epoch(2) })
        );
        index.open(Slot(1), E1);
        assert_eq!(index.blocks_of(Slot(1)), 4, "the same epoch again keeps what is there");
        index.forget(Slot(1));
        assert_eq!(index.clear(Slot(1), E1), Err(IndexError::Unopened(Slot(1))));
        assert_eq!(index.memberships(), 0);
    }

    #[test]
    fn at_the_cap_new_memberships_are_dropped_and_known_blocks_still_change() {
        let mut index = KvIndex::new(4, 7);
        index.open(Slot(0), E1);
        assert_eq!(index.store(Slot(0), E1, Tier::Gpu, hashes(0..6)), Ok(2));
        assert_eq!((index.memberships(), index.dropped()), (4, 2));
        assert_eq!(index.store(Slot(0), E1, Tier::Host, hashes(0..4)), Ok(0));
        index.remove(Slot(0), E1, Tiers::from_bits(3), [hash(0)]).unwrap();
        assert_eq!(index.store(Slot(0), E1, Tier::Gpu, [hash(9)]), Ok(0));
    }

    #[test]
    fn a_bucket_lists_its_members_in_order() {
        let mut index = index(2);
        index.store(Slot(1), E1, Tier::Gpu, hashes(0..2000)).unwrap();
        index.store(Slot(0), E1, Tier::Disk, hashes(0..2000)).unwrap();
        let members: Vec<_> = (0..=255).flat_map(|bucket| index.bucket(bucket)).collect();
        assert_eq!(members.len(), 4000);
        assert!(members.is_sorted());
    }
}
