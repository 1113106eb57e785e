//! The index against a naive model, and the decision under random fleets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use baton_coordinator_core::cost::Plan;
use baton_coordinator_core::fleet::{Engine, EngineInfo, Fleet, Role};
use baton_coordinator_core::kv_index::{KvIndex, Overlap, Overlaps, Slot, Tier};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::load::Reserved;
use baton_coordinator_core::placement::{Request, decide, policy};
use baton_coordinator_core::speed::Speed;
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

    #[test]
    fn a_decision_does_not_depend_on_the_order_of_its_inputs(
        fleet in prop::collection::vec(engine(), 1..8),
        tokens in 0..20_000u64,
        blocks in prop::collection::vec(0..1200u32, 8),
        name in prop_oneof![Just("adaptive"), Just("colocated"), Just("disaggregated")],
        rotation in 0..8usize,
    ) {
        let mut engines = fleet;
        for (i, engine) in engines.iter_mut().enumerate() {
            let info = Arc::make_mut(&mut engine.info);
            info.slot = Slot(i as u32);
            info.id = format!("e{i}").parse().unwrap();
        }
        let overlaps: Overlaps = blocks.iter().enumerate()
            .map(|(slot, n)| (Slot(slot as u32), Overlap { blocks: *n, gpu_blocks: *n }))
            .collect();
        let request = Request {
            model: "m", prompt_tokens: tokens, max_tokens: None, overlaps: &overlaps, splittable: Ok(()), avoid: &[],
        };
        let policy = policy(name).unwrap();
        let ordered = Fleet::new(engines.clone(), Links::default());
        let middle = rotation % engines.len();
        engines.rotate_left(middle);
        let rotated = Fleet::new(engines, Links::default());
        let decision = decide(policy, &ordered, &request);
        prop_assert_eq!(&decision, &decide(policy, &rotated, &request));

        let healthy = ordered.engines().iter().any(|engine| engine.healthy);
        prop_assert_eq!(decision.is_some(), healthy);
        let Some(decision) = decision else { return Ok(()) };
        for option in decision.options() {
            let (prefill, decode) = (option.plan.prefill() as usize, option.plan.decode() as usize);
            let (prefill, decode) = (&ordered.engines()[prefill], &ordered.engines()[decode]);
            prop_assert!(prefill.healthy && decode.healthy);
            prop_assert!(option.terms.total().is_finite());
            prop_assert!(option.hit_tokens <= tokens.saturating_sub(1));
            if let Plan::Disaggregated { .. } = option.plan {
                prop_assert!(prefill.info.id != decode.info.id && prefill.info.layout == decode.info.layout);
                prop_assert!(prefill.can_transfer && decode.can_transfer);
                prop_assert!(prefill.info.role != Role::Decode && decode.info.role != Role::Prefill);
            }
        }
        if name == "adaptive" {
            let least = decision.options().map(|option| option.terms.total()).fold(f64::INFINITY, f64::min);
            prop_assert_eq!(decision.chosen().terms.total(), least);
        }
    }
}

fn engine() -> impl Strategy<Value = Engine> {
    (
        prop_oneof![Just(Role::Both), Just(Role::Prefill), Just(Role::Decode)],
        prop_oneof![Just("a"), Just("b"), Just("")],
        any::<bool>(),
        prop::bool::weighted(0.8),
        0..50_000u64,
        0..64u64,
        1.0..100_000.0f64,
    )
        .prop_map(|(role, layout, can_transfer, healthy, queued, sequences, speed)| Engine {
            info: Arc::new(EngineInfo {
                slot: Slot(0),
                id: "x".parse().unwrap(),
                epoch: Epoch(1),
                models: vec!["m".into()],
                role,
                block_size: 16,
                block_bytes: 1 << 20,
                layout: layout.into(),
            }),
            healthy,
            can_transfer,
            speed: Speed { prefill_tokens_per_second: speed, ..Speed::default() },
            reserved: Reserved { prefill_tokens: queued, prefills: u64::from(queued > 0), sequences },
            foreign_waiting: 0,
            foreign_running: 0,
        })
}
