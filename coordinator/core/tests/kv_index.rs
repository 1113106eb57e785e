//! The index against a naive model, under random operations.

use std::collections::{BTreeMap, BTreeSet};

use baton_coordinator_core::kv_index::{
    Attention, Group, Holder, KvIndex, Limits, MAX_TICKS, Overlap, Overlaps, Run, Slot, Tier, Tiers,
};
use baton_proto::{BlockHash, Epoch};
use proptest::prelude::*;

const SLOTS: u32 = 4;

/// Prompts' blocks: a forest, in which block `i` follows `parents[i]`.
#[derive(Clone, Debug)]
struct Forest {
    parents: Vec<Option<usize>>,
}

impl Forest {
    /// `choices` holds a number for each block: most blocks follow the one before.
    fn new(choices: &[u32]) -> Self {
        let parent = |(i, choice): (usize, &u32)| match (i, choice % 16) {
            (0, _) | (_, 15) => None,
            (_, 13 | 14) => Some(*choice as usize / 16 % i),
            _ => Some(i - 1),
        };
        Self { parents: choices.iter().enumerate().map(parent).collect() }
    }

    /// All blocks up to this one, from the first.
    fn path(&self, end: usize) -> Vec<usize> {
        let mut path: Vec<usize> = std::iter::successors(Some(end), |block| self.parents[*block]).collect();
        path.reverse();
        path
    }
}

fn hash(block: usize) -> BlockHash {
    let mix = |n: u64| (n ^ (n >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    let (a, b) = (mix(block as u64 + 1), mix(mix(block as u64 + 77)));
    BlockHash::from_bytes((u128::from(a) << 64 | u128::from(b)).to_le_bytes())
}

fn hashes(blocks: &[usize]) -> Vec<BlockHash> {
    blocks.iter().map(|block| hash(*block)).collect()
}

#[derive(Clone, Debug)]
enum Operation {
    Open(u32, u64, usize),
    Forget(u32),
    Clear(u32, u64),
    /// The last blocks of a path; whether their parent is said.
    StoreChain(u32, u64, u16, u8, usize, usize, bool),
    StoreLoose(u32, u64, u16, u8, Vec<usize>),
    /// The last blocks of a path, from its end.
    RemoveTail(u32, u64, u16, u8, usize, usize),
    RemoveSome(u32, u64, u16, u8, Vec<usize>),
    Expect(u32, u64, usize, u64),
    Expire(u64),
}

/// What engines may be opened with.
fn groups(kind: usize) -> Vec<Group> {
    let full = Group::new(Attention::Full);
    let window = |blocks| Group::new(Attention::SlidingWindow { blocks });
    let state = Group::new(Attention::State);
    match kind {
        0..=3 => vec![full],
        4 => vec![full, window(2)],
        5 => vec![full, state],
        6 => vec![window(3)],
        7 => vec![full, window(2), window(4), state],
        8 => vec![full, Group { stride: 2, ..window(1) }],
        _ => vec![Group { stride: 2, ..full }, Group { stride: 3, ..state }],
    }
}
const KINDS: usize = 10;

fn operation(blocks: usize) -> impl Strategy<Value = Operation> {
    let at = || {
        (0..SLOTS, prop::sample::select(vec![1, 1, 1, 2u64]), prop::sample::select(vec![0, 0, 0, 1, 2u16]))
    };
    let tiers = || prop::sample::select(vec![1, 1, 1, 2, 4, 3, 7, 0u8]);
    let some = || prop::collection::vec(0..blocks, 0..12);
    let len = || prop_oneof![1..4usize, 1..blocks];
    prop_oneof![
        2 => (0..SLOTS, 1..3u64, 0..KINDS).prop_map(|(s, e, k)| Operation::Open(s, e, k)),
        1 => (0..SLOTS).prop_map(Operation::Forget),
        1 => (0..SLOTS, 1..3u64).prop_map(|(s, e)| Operation::Clear(s, e)),
        14 => (at(), tiers(), 0..blocks, len(), any::<bool>())
            .prop_map(|((s, e, g), t, b, n, p)| Operation::StoreChain(s, e, g, t, b, n, p)),
        4 => (at(), tiers(), some()).prop_map(|((s, e, g), t, b)| Operation::StoreLoose(s, e, g, t, b)),
        8 => (at(), tiers(), 0..blocks, len())
            .prop_map(|((s, e, g), t, b, n)| Operation::RemoveTail(s, e, g, t, b, n)),
        6 => (at(), tiers(), some()).prop_map(|((s, e, g), t, b)| Operation::RemoveSome(s, e, g, t, b)),
        6 => (at(), 0..blocks, prop_oneof![1..6u64, 1..300u64])
            .prop_map(|((s, e, _), b, t)| Operation::Expect(s, e, b, t)),
        4 => prop_oneof![0..4u64, 0..400u64].prop_map(Operation::Expire),
    ]
}

/// One engine.
#[derive(Clone, Debug)]
struct Engine {
    epoch: u64,
    groups: Vec<Group>,
    /// By group and block: tiers, never none.
    held: BTreeMap<(u16, usize), u8>,
    /// By group and block: until when.
    expected: BTreeMap<(u16, usize), u64>,
}

/// What the index should hold.
struct Model {
    limits: Limits,
    engines: BTreeMap<u32, Engine>,
    dropped: u64,
    dropped_expected: u64,
    now: u64,
}

impl Model {
    fn memberships(&self) -> u64 {
        self.engines.values().map(|engine| engine.held.len() as u64).sum()
    }

    fn expected(&self) -> u64 {
        self.engines.values().map(|engine| engine.expected.len() as u64).sum()
    }

    fn engine(&mut self, slot: u32, epoch: u64, group: u16) -> Option<&mut Engine> {
        let engine = self.engines.get_mut(&slot)?;
        (engine.epoch == epoch && usize::from(group) < engine.groups.len()).then_some(engine)
    }

    fn store(&mut self, slot: u32, epoch: u64, group: u16, tiers: u8, blocks: &[usize]) -> Option<u64> {
        self.engine(slot, epoch, group)?;
        let mut dropped = 0;
        for block in blocks.iter().filter(|_| tiers != 0) {
            let room = self.memberships() < self.limits.memberships;
            let engine = self.engine(slot, epoch, group).unwrap();
            if !room && !engine.held.contains_key(&(group, *block)) {
                dropped += 1;
                continue;
            }
            *engine.held.entry((group, *block)).or_default() |= tiers;
            engine.expected.remove(&(group, *block));
        }
        self.dropped += dropped;
        Some(dropped)
    }

    fn remove(&mut self, slot: u32, epoch: u64, group: u16, tiers: u8, blocks: &[usize]) -> Option<()> {
        let engine = self.engine(slot, epoch, group)?;
        for block in blocks {
            if let Some(held) = engine.held.get_mut(&(group, *block)) {
                *held &= !tiers;
                if *held == 0 {
                    engine.held.remove(&(group, *block));
                }
            }
        }
        Some(())
    }

    fn expect(&mut self, slot: u32, epoch: u64, path: &[usize], until: u64) -> Option<u64> {
        let until = until.min(self.now + MAX_TICKS);
        let (groups, now) = (self.engine(slot, epoch, 0)?.groups.clone(), self.now);
        let mut dropped = 0;
        for (at, group) in groups.iter().enumerate() {
            let blocks: Vec<usize> =
                path.chunks_exact(group.stride as usize).map(|chunk| *chunk.last().unwrap()).collect();
            let needs = match group.attention {
                Attention::Full => blocks.len(),
                Attention::SlidingWindow { blocks } => blocks as usize,
                Attention::State => 1,
            };
            for block in &blocks[blocks.len().saturating_sub(needs)..] {
                let room = self.expected() < self.limits.expected;
                let engine = self.engine(slot, epoch, 0).unwrap();
                let key = (at as u16, *block);
                if engine.held.contains_key(&key) || until <= now {
                    continue;
                }
                match engine.expected.get_mut(&key) {
                    Some(before) => *before = until.max(*before),
                    None if room => drop(engine.expected.insert(key, until)),
                    None => dropped += 1,
                }
            }
        }
        self.dropped_expected += dropped;
        Some(dropped)
    }

    /// Applies an operation to both. They must agree on whether it is taken, and on what is dropped.
    fn apply(&mut self, index: &KvIndex, forest: &Forest, operation: &Operation) {
        let tail = |end: usize, len: usize| {
            let path = forest.path(end);
            let first = path.len().saturating_sub(len);
            (first.checked_sub(1).map(|before| path[before]), path[first..].to_vec())
        };
        let holder = |slot, epoch, group| Holder::new(Slot(slot), Epoch(epoch)).group(group);
        match operation.clone() {
            Operation::Open(slot, epoch, kind) => {
                let groups = groups(kind);
                let same = |engine: &Engine| engine.epoch == epoch && engine.groups == groups;
                if !self.engines.get(&slot).is_some_and(same) {
                    let engine = Engine {
                        epoch,
                        groups: groups.clone(),
                        held: BTreeMap::new(),
                        expected: BTreeMap::new(),
                    };
                    self.engines.insert(slot, engine);
                }
                index.open_groups(Slot(slot), Epoch(epoch), &groups).unwrap();
            }
            Operation::Forget(slot) => {
                self.engines.remove(&slot);
                index.forget(Slot(slot));
            }
            Operation::Clear(slot, epoch) => {
                let taken = self.engine(slot, epoch, 0).map(|engine| {
                    engine.held.clear();
                    engine.expected.clear();
                });
                assert_eq!(index.clear(Slot(slot), Epoch(epoch)).ok(), taken);
            }
            Operation::StoreChain(slot, epoch, group, tiers, end, len, said) => {
                let (parent, blocks) = tail(end, len);
                let hashes = hashes(&blocks);
                let run = Run::chain(parent.filter(|_| said).map(hash), &hashes);
                let dropped = index.store(holder(slot, epoch, group), Tiers::from_bits(tiers), run);
                assert_eq!(dropped.ok(), self.store(slot, epoch, group, tiers, &blocks));
            }
            Operation::StoreLoose(slot, epoch, group, tiers, blocks) => {
                let hashes = hashes(&blocks);
                let run = Run::loose(&hashes);
                let dropped = index.store(holder(slot, epoch, group), Tiers::from_bits(tiers), run);
                assert_eq!(dropped.ok(), self.store(slot, epoch, group, tiers, &blocks));
            }
            Operation::RemoveTail(slot, epoch, group, tiers, end, len) => {
                let (_, mut blocks) = tail(end, len);
                blocks.reverse();
                self.remove_both(index, holder(slot, epoch, group), tiers, &blocks);
            }
            Operation::RemoveSome(slot, epoch, group, tiers, blocks) => {
                self.remove_both(index, holder(slot, epoch, group), tiers, &blocks);
            }
            Operation::Expect(slot, epoch, end, ticks) => {
                let path = forest.path(end);
                let until = self.now + ticks;
                let dropped = index.expect(Slot(slot), Epoch(epoch), &hashes(&path), until);
                assert_eq!(dropped.ok(), self.expect(slot, epoch, &path, until));
            }
            Operation::Expire(ticks) => {
                self.now += ticks;
                index.expire(self.now);
                for engine in self.engines.values_mut() {
                    engine.expected.retain(|_, until| *until > self.now);
                }
            }
        }
    }

    fn remove_both(&mut self, index: &KvIndex, holder: Holder, tiers: u8, blocks: &[usize]) {
        let taken = index.remove(holder, Tiers::from_bits(tiers), &hashes(blocks));
        let Holder { slot, epoch, group } = holder;
        assert_eq!(taken.ok(), self.remove(slot.0, epoch.0, group, tiers, blocks));
    }

    /// The longest prefix that all groups accept, found by trying each.
    fn overlap(&self, slot: u32, path: &[usize], has: impl Fn(&Engine, u16, usize) -> bool) -> u32 {
        let Some(engine) = self.engines.get(&slot) else { return 0 };
        let accepts = |(at, group): (usize, &Group), length: usize| {
            let stride = group.stride as usize;
            if !length.is_multiple_of(stride) {
                return false;
            }
            let needs = match group.attention {
                Attention::Full => length / stride,
                Attention::SlidingWindow { blocks } => blocks as usize,
                Attention::State => 1,
            };
            let blocks = path[..length].chunks_exact(stride).map(|chunk| *chunk.last().unwrap());
            blocks.rev().take(needs).all(|block| has(engine, at as u16, block))
        };
        let accepted = |length: &usize| engine.groups.iter().enumerate().all(|group| accepts(group, *length));
        (0..=path.len()).rev().find(accepted).unwrap_or(0) as u32
    }

    fn check(&self, index: &KvIndex, path: &[usize], found: &mut Overlaps) {
        index.overlaps(&hashes(path), found);
        let mut slots = 0;
        for slot in 0..SLOTS {
            let held = |tiers: u8| {
                move |engine: &Engine, group: u16, block: usize| {
                    engine.held.get(&(group, block)).is_some_and(|held| held & tiers != 0)
                }
            };
            let any = |engine: &Engine, group: u16, block: usize| {
                engine.held.contains_key(&(group, block)) || engine.expected.contains_key(&(group, block))
            };
            let expected = Overlap {
                blocks: self.overlap(slot, path, held(7)),
                gpu_blocks: self.overlap(slot, path, held(1)),
            };
            assert_eq!(found.of(Slot(slot)), expected, "slot {slot}, path {path:?}");
            assert_eq!(
                found.expected(Slot(slot)),
                self.overlap(slot, path, any),
                "slot {slot}, path {path:?}"
            );
            slots += usize::from(expected.blocks > 0);
            let blocks = self.engines.get(&slot).map_or(0, |engine| engine.held.len() as u64);
            assert_eq!(index.blocks_of(Slot(slot)), blocks);
        }
        assert_eq!(found.iter().count(), slots);
        assert!(found.iter().is_sorted_by_key(|(slot, _)| slot));
    }

    fn check_all(&self, index: &KvIndex) {
        assert_eq!(index.memberships(), self.memberships());
        assert_eq!(index.expected(), self.expected());
        assert_eq!(index.dropped(), self.dropped);
        assert_eq!(index.dropped_expected(), self.dropped_expected);
        let odd = |slot: &u32| slot % 2 == 1;
        let members: Vec<_> = index
            .export(|slot| odd(&slot.0))
            .into_iter()
            .map(|(holder, hash, tiers)| (holder.slot.0, holder.epoch.0, holder.group, hash, tiers.bits()))
            .collect();
        let set: BTreeSet<_> = members.iter().copied().collect();
        assert_eq!(set.len(), members.len(), "each once");
        let expected: BTreeSet<_> = self
            .engines
            .iter()
            .filter(|(slot, _)| odd(slot))
            .flat_map(|(slot, engine)| {
                let member = |((group, block), tiers): (&(u16, usize), &u8)| {
                    (*slot, engine.epoch, *group, hash(*block), *tiers)
                };
                engine.held.iter().map(member)
            })
            .collect();
        assert_eq!(set, expected);
    }
}

fn run(choices: &[u32], operations: &[Operation], limits: Limits, seed: u64, prompts: &[usize]) {
    let forest = Forest::new(choices);
    let index = KvIndex::new(limits, seed);
    let mut model = Model { limits, engines: BTreeMap::new(), dropped: 0, dropped_expected: 0, now: 0 };
    let mut found = Overlaps::default();
    for slot in 0..SLOTS - 1 {
        model.apply(&index, &forest, &Operation::Open(slot, 1, 0));
    }
    for (i, operation) in operations.iter().enumerate() {
        model.apply(&index, &forest, operation);
        let prompt = prompts[i % prompts.len()];
        model.check(&index, &forest.path(prompt % choices.len()), &mut found);
    }
    model.check_all(&index);
    // Paths of which the last part is nobody's, and those that begin in the middle.
    for prompt in prompts {
        let mut path = forest.path(prompt % choices.len());
        path.push(choices.len() + 5);
        model.check(&index, &path, &mut found);
        model.check(&index, &path[path.len() / 2..], &mut found);
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    prop_oneof![
        2 => Just(Limits { memberships: 1 << 20, expected: 1 << 20 }),
        1 => (1..80u64, 1..30u64).prop_map(|(memberships, expected)| Limits { memberships, expected }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn the_index_equals_a_naive_model(
        choices in prop::collection::vec(any::<u32>(), 24..48),
        operations in prop::collection::vec(operation(24), 1..80),
        limits in limits(),
        seed: u64,
        prompts in prop::collection::vec(0..1000usize, 1..12),
    ) {
        run(&choices, &operations, limits, seed, &prompts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Chains longer than a step, cut up and put together.
    #[test]
    fn the_index_equals_a_naive_model_on_long_prompts(
        choices in prop::collection::vec(any::<u32>(), 300..400),
        operations in prop::collection::vec(operation(300), 1..60),
        limits in prop_oneof![
            2 => Just(Limits { memberships: 1 << 20, expected: 1 << 20 }),
            1 => (50..900u64, 20..400u64).prop_map(|(memberships, expected)| Limits { memberships, expected }),
        ],
        straight in 0..4u32,
        seed: u64,
        prompts in prop::collection::vec(0..1000usize, 1..12),
    ) {
        // Most forests are mostly one long prompt.
        let choices: Vec<u32> = choices.iter().map(|n| if n % 64 > straight { 0 } else { *n }).collect();
        run(&choices, &operations, limits, seed, &prompts);
    }
}

/// Engines that hash the same content differently still hold the same blocks, since blocks go by Baton's own hash of
/// their content: the agent translates as the store events come (`agent/src/ownership.rs`), which is done here in two
/// lines.
#[test]
fn engines_with_different_hash_seeds_score_what_they_hold() {
    use baton_proto::ContentKeys;
    use baton_proto::block_hash::BlockHasher;

    let tokens: Vec<u32> = (0..32 * 16).map(|n| n * 7 % 1000).collect();
    let hasher = BlockHasher::new("m");
    let prompt = hasher.chain(&tokens, 16, &ContentKeys::default());
    let index = KvIndex::new(Limits::of(1000), 1);
    for (slot, blocks) in [(0, 8), (1, 16), (2, 24)] {
        index.open(Slot(slot), Epoch(1)).unwrap();
        // The engine's own hash of a block depends on its seed; the tokens in its events do not.
        let engine_hash = |block: usize| (u64::from(slot) + 1).wrapping_mul(0x9e37_79b9) ^ block as u64;
        let mut translated = BTreeMap::new();
        for (block, tokens) in tokens.chunks(16).take(blocks).enumerate() {
            let parent = block.checked_sub(1).map(|before| translated[&engine_hash(before)]);
            translated.insert(engine_hash(block), hasher.block(parent, tokens, []));
        }
        let stored: Vec<BlockHash> = (0..blocks).map(|block| translated[&engine_hash(block)]).collect();
        index.store(Holder::new(Slot(slot), Epoch(1)), Tier::Gpu, Run::chain(None, &stored)).unwrap();
    }
    let mut found = Overlaps::default();
    index.overlaps(&prompt, &mut found);
    let scores: Vec<u32> = found.iter().map(|(_, overlap)| overlap.blocks).collect();
    assert_eq!(scores, [8, 16, 24]);
}

/// What one engine holds is found whole while others' blocks come and go beside it, also where they share chains.
#[test]
fn lookups_beside_writes_see_what_does_not_change() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let index = KvIndex::new(Limits::of(1 << 20), 5);
    let blocks: Vec<BlockHash> = (0..600).map(hash).collect();
    let other: Vec<BlockHash> = (1000..1600).map(hash).collect();
    for slot in 0..4 {
        index.open(Slot(slot), Epoch(1)).unwrap();
    }
    let holder = |slot| Holder::new(Slot(slot), Epoch(1));
    index.store(holder(0), Tier::Gpu, Run::chain(None, &blocks[..400])).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..300u64 {
                let slot = 1 + (round % 3) as u32;
                index.store(holder(slot), Tier::Gpu, Run::chain(None, &blocks)).unwrap();
                index.store(holder(slot), Tier::Host, Run::loose(&other)).unwrap();
                index.expect(Slot(slot), Epoch(1), &other, round + 3).unwrap();
                let evicted: Vec<BlockHash> = blocks[100..].iter().rev().copied().collect();
                index.remove(holder(slot), Tiers::ALL, &evicted).unwrap();
                index.expire(round);
                if round % 7 == 0 {
                    index.clear(Slot(slot), Epoch(1)).unwrap();
                }
            }
            done.store(true, Ordering::Release);
        });
        for _ in 0..2 {
            scope.spawn(|| {
                let mut found = Overlaps::default();
                while !done.load(Ordering::Acquire) {
                    index.overlaps(&blocks, &mut found);
                    assert_eq!(found.of(Slot(0)), Overlap { blocks: 400, gpu_blocks: 400 });
                    assert!(found.iter().all(|(_, overlap)| overlap.blocks <= 600));
                    let exported = index.export(|slot| slot == Slot(0));
                    assert_eq!(exported.len(), 400);
                }
            });
        }
    });
    assert_eq!(index.blocks_of(Slot(0)), 400);
}
