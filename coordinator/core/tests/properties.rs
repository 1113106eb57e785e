//! The index against a naive model.

use std::collections::{BTreeMap, BTreeSet};

use baton_coordinator_core::kv_index::{KvIndex, Overlap, Slot, Tier};
use baton_proto::{BlockHash, Epoch};
use proptest::prelude::*;

const SLOTS: u32 = 4;
const BLOCKS: u8 = 24;

#[derive(Clone, Debug)]
enum Operation {
    Open(u32, u64),
    Forget(u32),
    Store(u32, u64, Tier, Vec<u8>),
    Remove(u32, u64, Tier, Vec<u8>),
    Clear(u32, u64),
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![Just(Tier::Gpu), Just(Tier::Host), Just(Tier::Disk)]
}

fn operation() -> impl Strategy<Value = Operation> {
    let slot = 0..SLOTS;
    let epoch = 1..3u64;
    let blocks = prop::collection::vec(0..BLOCKS, 0..12);
    prop_oneof![
        1 => (slot.clone(), epoch.clone()).prop_map(|(s, e)| Operation::Open(s, e)),
        1 => slot.clone().prop_map(Operation::Forget),
        12 => (slot.clone(), epoch.clone(), tier(), blocks.clone())
            .prop_map(|(s, e, t, b)| Operation::Store(s, e, t, b)),
        8 => (slot.clone(), epoch.clone(), tier(), blocks).prop_map(|(s, e, t, b)| Operation::Remove(s, e, t, b)),
        1 => (slot, epoch).prop_map(|(s, e)| Operation::Clear(s, e)),
    ]
}

fn hash(block: u8) -> BlockHash {
    BlockHash::from_bytes([block.wrapping_mul(37); 16])
}

/// What the index should hold: by slot, its epoch and every (block, tier).
#[derive(Default)]
struct Model(BTreeMap<u32, (u64, BTreeSet<(u8, u8)>)>);

impl Model {
    fn apply(&mut self, operation: &Operation) -> bool {
        let at =
            |model: &Self, slot: &u32, epoch: &u64| model.0.get(slot).is_some_and(|part| part.0 == *epoch);
        match operation {
            Operation::Open(slot, epoch) if !at(self, slot, epoch) => {
                self.0.insert(*slot, (*epoch, BTreeSet::new()));
            }
            Operation::Open(..) => {}
            Operation::Forget(slot) => {
                self.0.remove(slot);
            }
            Operation::Store(slot, epoch, ..)
            | Operation::Remove(slot, epoch, ..)
            | Operation::Clear(slot, epoch)
                if !at(self, slot, epoch) =>
            {
                return false;
            }
            Operation::Store(slot, _, tier, blocks) => {
                let part = &mut self.0.get_mut(slot).unwrap().1;
                part.extend(blocks.iter().map(|block| (*block, *tier as u8)));
            }
            Operation::Remove(slot, _, tier, blocks) => {
                let part = &mut self.0.get_mut(slot).unwrap().1;
                part.retain(|(block, of)| !(blocks.contains(block) && *of == *tier as u8));
            }
            Operation::Clear(slot, _) => self.0.get_mut(slot).unwrap().1.clear(),
        }
        true
    }

    fn holds(&self, slot: u32, block: u8, tier: Option<u8>) -> bool {
        let Some((_, part)) = self.0.get(&slot) else { return false };
        (0..3).any(|of| tier.is_none_or(|tier| tier == of) && part.contains(&(block, of)))
    }

    fn blocks(&self, slot: u32) -> u64 {
        (0..BLOCKS).filter(|block| self.holds(slot, *block, None)).count() as u64
    }
}

proptest! {
    #[test]
    fn the_index_equals_a_naive_model(
        operations in prop::collection::vec(operation(), 1..80),
        prompt in prop::collection::vec(0..BLOCKS, 0..10),
        seed: u64,
    ) {
        let mut index = KvIndex::new(1 << 20, seed);
        let mut model = Model::default();
        for operation in &operations {
            let hashes = |blocks: &[u8]| blocks.iter().map(|block| hash(*block)).collect::<Vec<_>>();
            let taken = match operation {
                Operation::Open(slot, epoch) => { index.open(Slot(*slot), Epoch(*epoch)); true }
                Operation::Forget(slot) => { index.forget(Slot(*slot)); true }
                Operation::Store(slot, epoch, tier, blocks) =>
                    index.store(Slot(*slot), Epoch(*epoch), *tier, hashes(blocks)).is_ok(),
                Operation::Remove(slot, epoch, tier, blocks) =>
                    index.remove(Slot(*slot), Epoch(*epoch), *tier, hashes(blocks)).is_ok(),
                Operation::Clear(slot, epoch) => index.clear(Slot(*slot), Epoch(*epoch)).is_ok(),
            };
            prop_assert_eq!(taken, model.apply(operation), "{:?}", operation);
        }
        let chain: Vec<_> = prompt.iter().map(|block| hash(*block)).collect();
        let overlaps = index.overlap(&chain);
        for slot in 0..SLOTS {
            let leading = |tier| prompt.iter().take_while(|block| model.holds(slot, **block, tier)).count() as u32;
            let expected = Overlap { blocks: leading(None), gpu_blocks: leading(Some(0)) };
            prop_assert_eq!(overlaps.of(Slot(slot)), expected);
            prop_assert_eq!(index.blocks_of(Slot(slot)), model.blocks(slot));
        }
        let listed: u64 = (0..=255u8).map(|bucket| index.bucket(bucket).len() as u64).sum();
        prop_assert_eq!(listed, index.memberships());
        prop_assert_eq!(listed, (0..SLOTS).map(|slot| model.blocks(slot)).sum::<u64>());
    }
}
