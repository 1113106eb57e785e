use std::collections::{BTreeMap, BTreeSet};

use baton_proto::ContentKeys;
use baton_proto::block_hash::MultimodalItem;
use proptest::prelude::*;

use super::*;
use crate::engine::event::ExtraValue;

const BLOCK: u32 = 4;

fn ownership() -> Ownership {
    Ownership::new("m", BLOCK)
}

fn apply(ownership: &mut Ownership, event: KvEvent) -> Applied {
    let mut applied = Applied::default();
    ownership.apply(&event, &mut applied);
    applied
}

fn hashes(from: u128, n: u128) -> Vec<EngineHash> {
    (from..from + n).map(EngineHash).collect()
}

/// What is said when the blocks of a prompt's beginning come.
fn all_stored(prompt: &[BlockHash]) -> Vec<Change> {
    let block = |i: usize| Block { hash: prompt[i], parent: i.checked_sub(1).map(|before| prompt[before]) };
    (0..prompt.len()).map(|i| Change::Stored(block(i), Place::GPU)).collect()
}

/// `n` blocks under hashes `from..`, with tokens that follow from the hashes.
fn stored(parent: Option<u128>, from: u128, n: u128) -> Stored {
    Stored {
        hashes: hashes(from, n),
        parent: parent.map(EngineHash),
        token_ids: (from as u32 * BLOCK..(from + n) as u32 * BLOCK).collect(),
        block_size: BLOCK,
        ..Stored::default()
    }
}

fn removed(from: u128, n: u128) -> Removed {
    Removed { hashes: hashes(from, n), ..Removed::default() }
}

fn chain(tokens: &[u32], keys: &ContentKeys) -> Vec<BlockHash> {
    BlockHasher::new("m").chain(tokens, BLOCK as usize, keys)
}

#[test]
fn blocks_get_the_hash_of_their_whole_prefix() {
    let mut ownership = ownership();
    let first = apply(&mut ownership, KvEvent::Stored(stored(None, 0, 2)));
    let then = apply(&mut ownership, KvEvent::Stored(stored(Some(1), 2, 1)));
    let expected = chain(&(0..12).collect::<Vec<_>>(), &ContentKeys::default());
    let changes: Vec<_> = first.changes.into_iter().chain(then.changes).collect();
    assert_eq!(changes, all_stored(&expected));
}

#[test]
fn extra_keys_mean_what_the_coordinator_hashes() {
    let lora = ContentKeys { lora: Some("a".into()), ..ContentKeys::default() };
    let salt = ContentKeys { salt: Some("s".into()), ..ContentKeys::default() };
    let image = MultimodalItem { identifier: "img".into(), offset: 2, length: 4 };
    let all = ContentKeys { multimodal: vec![image], lora: lora.lora.clone(), salt: salt.salt.clone() };
    let text = |text: &str| ExtraValue::Text(text.into());
    let item = |offset| ExtraValue::Item("img".into(), offset);
    for (keys, lora_name, extra_keys) in [
        (&lora, Some("a"), Some(vec![Some(vec![text("a")]), Some(vec![text("a")])])),
        (&lora, Some("a"), None),
        (&salt, None, Some(vec![Some(vec![text("s")]), None])),
        (
            &all,
            Some("a"),
            Some(vec![Some(vec![text("a"), item(2), text("s")]), Some(vec![text("a"), item(-2)])]),
        ),
    ] {
        let event = Stored {
            lora_name: lora_name.map(Into::into),
            extra_keys: extra_keys.clone(),
            ..stored(None, 0, 2)
        };
        let applied = apply(&mut ownership(), KvEvent::Stored(event));
        let expected = chain(&(0..8).collect::<Vec<_>>(), keys);
        assert_eq!(applied.changes, all_stored(&expected), "{extra_keys:?}");
    }
}

#[test]
fn what_is_uncertain_is_ignored_and_named() {
    let text = |text: &str| Some(vec![ExtraValue::Text(text.into())]);
    let base = || stored(None, 0, 2);
    for (event, reason) in [
        (stored(Some(7), 0, 1), Ignored::UnknownParent),
        (Stored { block_size: 2, ..base() }, Ignored::PartialBlock),
        (Stored { spec_kind: Some("chunked_local_attention".into()), ..base() }, Ignored::OtherGroup),
        (Stored { block_size: 8, hashes: hashes(0, 1), ..base() }, Ignored::PartialBlock),
        (Stored { hashes: hashes(0, 3), ..base() }, Ignored::Unreadable),
        (Stored { spec_kind: Some("sliding_window".into()), ..base() }, Ignored::OtherGroup),
        (Stored { token_ids: vec![1; 7], ..base() }, Ignored::Unreadable),
        (Stored { extra_keys: Some(vec![None]), ..base() }, Ignored::Unreadable),
        (Stored { lora_id: Some(1), ..base() }, Ignored::Unreadable),
        (
            Stored { lora_name: Some("a".into()), extra_keys: Some(vec![text("b"), None]), ..base() },
            Ignored::Unreadable,
        ),
        (Stored { medium: Some("TAPE".into()), ..base() }, Ignored::OtherTier),
        (Stored { locality: Some("REMOTE".into()), ..base() }, Ignored::OtherTier),
    ] {
        let mut ownership = ownership();
        let applied = apply(&mut ownership, KvEvent::Stored(event.clone()));
        assert_eq!((applied.ignored, applied.changes), (vec![reason], vec![]), "{event:?}");
        assert!(ownership.is_empty());
    }
    // Text behind the first block is no salt: the first block counts, the second does not.
    let event = Stored { extra_keys: Some(vec![None, text("x")]), ..base() };
    let applied = apply(&mut ownership(), KvEvent::Stored(event));
    assert_eq!((applied.changes.len(), applied.ignored), (1, vec![Ignored::Unreadable]));
    assert_eq!(apply(&mut ownership(), KvEvent::Unknown).ignored, [Ignored::UnknownEvent]);
}

/// In a cache group, as an engine with several names it.
fn in_group(group: i64, kind: &str, stored: Stored) -> Stored {
    let sliding_window = (kind == "sliding_window").then_some(9);
    Stored { group_idx: Some(group), spec_kind: Some(kind.into()), sliding_window, ..stored }
}

#[test]
fn groups_are_learnt_and_own_blocks_apart() {
    let mut ownership = ownership();
    let place = |group| Place { group, tier: Tier::Gpu };
    let blocks = chain(&(0..8).collect::<Vec<_>>(), &ContentKeys::default());
    let first = apply(&mut ownership, KvEvent::Stored(in_group(3, "full_attention", stored(None, 0, 2))));
    assert_eq!((first.changes, first.regrouped), (all_stored(&blocks), false), "one group is no groups");
    let window = apply(&mut ownership, KvEvent::Stored(in_group(0, "sliding_window", stored(Some(0), 1, 1))));
    assert!(window.regrouped);
    let block = Block { hash: blocks[1], parent: Some(blocks[0]) };
    assert_eq!(window.changes, [Change::Stored(block, place(1))]);
    let group = |attention| CacheGroup { attention, block_size: BLOCK };
    let groups = [group(Attention::Full), group(Attention::SlidingWindow(9))];
    assert_eq!(ownership.groups(), groups);
    assert_eq!((ownership.len(), ownership.iter().count()), (2, 3));

    let other = Removed { group_idx: Some(7), ..removed(1, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Removed(other)).ignored, [Ignored::OtherGroup]);
    let own = Removed { group_idx: Some(3), ..removed(1, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Removed(own)).changes, [Change::Removed(blocks[1], place(0))]);
    assert_eq!(ownership.len(), 2);
    // Who names no group may mean any.
    let any = Removed { group_idx: None, ..removed(0, 2) };
    assert_eq!(apply(&mut ownership, KvEvent::Removed(any)).changes.len(), 2);
    assert!(ownership.is_empty());
    // A reset leaves the groups; a loss may be another life of the engine.
    assert!(!apply(&mut ownership, KvEvent::Cleared).regrouped);
    assert_eq!(ownership.groups(), groups);
    let mut applied = Applied::default();
    ownership.forget(&mut applied);
    assert!(applied.regrouped && ownership.groups().is_empty());
}

#[test]
fn larger_blocks_go_by_the_hash_of_their_last_part() {
    let mut ownership = ownership();
    let salt = ContentKeys { salt: Some("s".into()), ..ContentKeys::default() };
    let blocks = chain(&(0..16).collect::<Vec<_>>(), &salt);
    let large = |parent, hash: u128, tokens: std::ops::Range<u32>, salt: Option<&str>| Stored {
        hashes: vec![EngineHash(hash)],
        token_ids: tokens.collect(),
        block_size: 2 * BLOCK,
        extra_keys: Some(vec![salt.map(|salt| vec![ExtraValue::Text(salt.into())])]),
        ..in_group(1, "mamba", stored(parent, 0, 0))
    };
    let first = apply(&mut ownership, KvEvent::Stored(large(None, 1, 0..8, Some("s"))));
    let second = apply(&mut ownership, KvEvent::Stored(large(Some(1), 3, 8..16, None)));
    let at = |hash| Change::Stored(Block { hash, parent: None }, Place::GPU);
    assert_eq!([first.changes, second.changes], [[at(blocks[1])], [at(blocks[3])]]);
    assert_eq!(ownership.groups(), [CacheGroup { attention: Attention::State, block_size: 2 * BLOCK }]);
    // A part of a block of that group counts as none.
    let part = in_group(1, "mamba", stored(Some(3), 4, 1));
    assert_eq!(apply(&mut ownership, KvEvent::Stored(part)).ignored, [Ignored::PartialBlock]);
    // Where the whole turns out to be larger than thought, all is learnt anew.
    let larger =
        Stored { token_ids: (0..16).collect(), block_size: 4 * BLOCK, ..large(None, 3, 0..8, Some("s")) };
    let applied = apply(&mut ownership, KvEvent::Stored(larger));
    assert!(applied.regrouped);
    assert_eq!(applied.changes, [Change::Cleared, at(blocks[3])]);
}

#[test]
fn blocks_whose_content_is_not_told_are_known_by_another_group() {
    let mut ownership = ownership();
    let blocks = chain(&(0..12).collect::<Vec<_>>(), &ContentKeys::default());
    // Of three blocks the group keeps the last.
    let sparse = |group| Stored { hashes: hashes(2, 1), ..in_group(group, "mamba", stored(None, 0, 3)) };
    let before = apply(&mut ownership, KvEvent::Stored(sparse(0)));
    assert_eq!((before.changes, before.ignored), (vec![], vec![]));
    let told = apply(&mut ownership, KvEvent::Stored(in_group(1, "full_attention", stored(None, 0, 3))));
    let place = |group| Place { group, tier: Tier::Gpu };
    let last = Block { hash: blocks[2], parent: Some(blocks[1]) };
    assert_eq!(told.changes.len(), 4);
    assert_eq!(told.changes[2..], [Change::Stored(last, place(1)), Change::Stored(last, place(0))]);
    let after = apply(&mut ownership, KvEvent::Stored(sparse(2)));
    assert_eq!(after.changes, [Change::Stored(last, place(2))]);
    // What went before it was told does not come.
    let (early, late) = (Stored { hashes: hashes(9, 1), ..sparse(0) }, stored(None, 9, 1));
    apply(&mut ownership, KvEvent::Stored(early));
    apply(&mut ownership, KvEvent::Removed(Removed { group_idx: Some(0), ..removed(9, 1) }));
    assert_eq!(apply(&mut ownership, KvEvent::Stored(in_group(1, "full_attention", late))).changes.len(), 1);
}

#[test]
fn stores_beyond_the_cap_are_ignored() {
    let mut ownership = ownership();
    ownership.max_blocks = 2;
    let applied = apply(&mut ownership, KvEvent::Stored(stored(None, 0, 3)));
    assert_eq!((applied.changes.len(), applied.ignored), (2, vec![Ignored::Full]));
    apply(&mut ownership, KvEvent::Removed(removed(1, 1)));
    assert_eq!(apply(&mut ownership, KvEvent::Stored(stored(Some(0), 5, 1))).changes.len(), 1);
    // However often blocks come and go, the translations of those gone take no more room than there is.
    for i in 10..30 {
        apply(&mut ownership, KvEvent::Removed(removed(if i == 10 { 5 } else { i - 1 }, 1)));
        assert_eq!(apply(&mut ownership, KvEvent::Stored(stored(Some(0), i, 1))).changes.len(), 1);
        assert!(ownership.known.len() <= 2 && ownership.gone.len() <= 2);
    }
}

#[test]
fn a_block_is_owned_as_long_as_one_of_the_engines_hashes_for_it_is() {
    let mut ownership = ownership();
    let alias = |hash| Stored { hashes: vec![EngineHash(hash)], ..stored(None, 0, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Stored(alias(0))).changes.len(), 1);
    assert_eq!(apply(&mut ownership, KvEvent::Stored(alias(7))).changes, []);
    assert_eq!(apply(&mut ownership, KvEvent::Removed(removed(0, 1))).changes, []);
    assert_eq!(apply(&mut ownership, KvEvent::Removed(removed(7, 1))).changes.len(), 1);
}

#[test]
fn a_prefix_whose_copies_went_is_owned_again_when_it_is_used() {
    let mut ownership = ownership();
    let prefix = chain(&(0..12).collect::<Vec<_>>(), &ContentKeys::default());
    for _ in 0..2 {
        apply(&mut ownership, KvEvent::Stored(stored(None, 0, 3)));
    }
    apply(&mut ownership, KvEvent::Stored(stored(Some(2), 3, 1)));
    // The copies that nobody uses go, the last one first.
    apply(&mut ownership, KvEvent::Removed(removed(2, 1)));
    apply(&mut ownership, KvEvent::Removed(removed(1, 1)));
    assert_eq!(ownership.len(), 2);
    // A store in another tier says nothing of the GPU.
    let on_host = Stored { medium: Some("CPU".into()), ..stored(Some(2), 8, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Stored(on_host)).changes.len(), 1);
    let applied = apply(&mut ownership, KvEvent::Stored(stored(Some(2), 9, 1)));
    assert_eq!(applied.changes[..2], all_stored(&prefix)[1..3]);
    assert_eq!(applied.changes.len(), 3);
    // Also where its last block has stayed.
    apply(&mut ownership, KvEvent::Removed(removed(1, 1)));
    let applied = apply(&mut ownership, KvEvent::Stored(stored(Some(2), 10, 1)));
    assert_eq!((applied.changes.len(), applied.changes[0]), (2, all_stored(&prefix)[1]));
}

#[test]
fn a_prefix_without_a_beginning_ends() {
    let mut ownership = ownership();
    apply(&mut ownership, KvEvent::Stored(stored(None, 0, 1)));
    apply(&mut ownership, KvEvent::Stored(stored(Some(0), 1, 1)));
    apply(&mut ownership, KvEvent::Stored(stored(Some(1), 0, 1)));
    assert_eq!(apply(&mut ownership, KvEvent::Stored(stored(Some(1), 2, 1))).changes.len(), 1);
}

#[test]
fn a_reused_engine_hash_moves_to_its_new_content() {
    let mut ownership = ownership();
    apply(&mut ownership, KvEvent::Stored(stored(None, 0, 1)));
    let other = Stored { token_ids: vec![9; 4], ..stored(None, 0, 1) };
    let applied = apply(&mut ownership, KvEvent::Stored(other));
    let (old, new) =
        (chain(&[0, 1, 2, 3], &ContentKeys::default())[0], chain(&[9; 4], &ContentKeys::default())[0]);
    assert_eq!(applied.changes, [Change::Removed(old, Place::GPU), all_stored(&[new])[0]]);
}

/// A block of the model engine: which block it follows and its single distinguishing token, under one of two
/// hashes for the same content.
#[derive(Clone, Debug)]
enum Op {
    Store { parent: Option<usize>, tokens: Vec<u32>, alias: u8, tier: Tier },
    Remove { blocks: Vec<usize>, tier: Tier },
    Clear,
}

fn any_tier() -> impl Strategy<Value = Tier> {
    prop_oneof![4 => Just(Tier::Gpu), 1 => Just(Tier::Host), 1 => Just(Tier::Disk)]
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => (proptest::option::of(0..30usize), prop::collection::vec(0..3u32, 1..4), 0..2u8, any_tier())
            .prop_map(|(parent, tokens, alias, tier)| Op::Store { parent, tokens, alias, tier }),
        12 => (prop::collection::vec(0..30usize, 1..4), any_tier())
            .prop_map(|(blocks, tier)| Op::Remove { blocks, tier }),
        1 => Just(Op::Clear),
    ]
}

/// An engine that remembers, for each hash, the whole prefix behind it.
#[derive(Default)]
struct Model {
    /// Every hash ever made: its whole prefix, one token for each block, and the alias.
    made: Vec<(Vec<u32>, u8)>,
    /// Tiers of each hash since the last clear; none where it is gone.
    held: BTreeMap<usize, BTreeSet<i32>>,
    parents: BTreeMap<usize, Option<usize>>,
    followed: BTreeSet<usize>,
}

impl Model {
    fn hash(&mut self, prefix: Vec<u32>, alias: u8) -> usize {
        let key = (prefix, alias);
        self.made.iter().position(|made| *made == key).unwrap_or_else(|| {
            self.made.push(key);
            self.made.len() - 1
        })
    }

    fn restore_prefix(&mut self, last: usize) {
        let gpu = Tier::Gpu as i32;
        let gone = !self.held[&last].contains(&gpu);
        if self.followed.insert(last) && !gone {
            return;
        }
        let mut at = Some(last);
        while let Some(hash) = at {
            self.held.get_mut(&hash).unwrap().insert(gpu);
            at = self.parents[&hash];
        }
    }

    fn owned(&self) -> BTreeSet<(BlockHash, i32)> {
        let mut owned = BTreeSet::new();
        for (hash, tiers) in &self.held {
            let prefix: Vec<u32> =
                self.made[*hash].0.iter().flat_map(|token| [*token; BLOCK as usize]).collect();
            let block = *chain(&prefix, &ContentKeys::default()).last().unwrap();
            owned.extend(tiers.iter().map(|tier| (block, *tier)));
        }
        owned
    }
}

fn medium(tier: Tier) -> Option<String> {
    Some(["GPU", "CPU", "STORAGE"][tier as usize - 1].into())
}

proptest! {
    #[test]
    fn agrees_with_a_model_that_remembers_everything(ops in prop::collection::vec(any_op(), 1..80)) {
        let mut ownership = ownership();
        let mut model = Model::default();
        let mut told: BTreeSet<(BlockHash, i32)> = BTreeSet::new();
        for op in ops {
            let applied = match op {
                Op::Store { parent, tokens, alias, tier } => {
                    let parent = parent.filter(|_| !model.made.is_empty()).map(|i| i % model.made.len());
                    let mut prefix = parent.map(|hash| model.made[hash].0.clone()).unwrap_or_default();
                    let known = parent.is_none_or(|hash| model.held.contains_key(&hash));
                    if let (Some(hash), true, Tier::Gpu) = (parent, known, tier) {
                        model.restore_prefix(hash);
                    }
                    let mut hashes = Vec::new();
                    let mut last = parent;
                    for token in &tokens {
                        prefix.push(*token);
                        let hash = model.hash(prefix.clone(), alias);
                        hashes.push(EngineHash(hash as u128));
                        if known {
                            model.held.entry(hash).or_default().insert(tier as i32);
                            model.parents.entry(hash).or_insert(last);
                        }
                        last = Some(hash);
                    }
                    let applied = apply(&mut ownership, KvEvent::Stored(Stored {
                        hashes,
                        parent: parent.map(|hash| EngineHash(hash as u128)),
                        token_ids: tokens.iter().flat_map(|token| [*token; BLOCK as usize]).collect(),
                        block_size: BLOCK,
                        medium: medium(tier),
                        ..Stored::default()
                    }));
                    prop_assert_eq!(applied.ignored.is_empty(), known);
                    applied
                }
                Op::Remove { blocks, tier } => {
                    for hash in &blocks {
                        if let Some(tiers) = model.held.get_mut(hash) {
                            tiers.remove(&(tier as i32));
                        }
                    }
                    let hashes = blocks.iter().map(|hash| EngineHash(*hash as u128)).collect();
                    apply(&mut ownership, KvEvent::Removed(Removed {
                        hashes,
                        medium: medium(tier),
                        ..Removed::default()
                    }))
                }
                Op::Clear => {
                    model.held.clear();
                    model.parents.clear();
                    model.followed.clear();
                    apply(&mut ownership, KvEvent::Cleared)
                }
            };
            for change in applied.changes {
                match change {
                    Change::Stored(block, place) => {
                        prop_assert!(told.insert((block.hash, place.tier as i32)));
                    }
                    Change::Removed(block, place) => {
                        prop_assert!(told.remove(&(block, place.tier as i32)));
                    }
                    Change::Cleared => told.clear(),
                }
            }
            prop_assert_eq!(&told, &model.owned());
            let snapshot: BTreeSet<_> =
                ownership.iter().map(|(block, place)| (block.hash, place.tier as i32)).collect();
            prop_assert_eq!(&told, &snapshot);
            prop_assert_eq!(ownership.known.len(), model.held.len());
        }
    }
}

/// What happens in an engine with a cache of its own.
#[derive(Clone, Debug)]
enum Work {
    /// So many requests with one prompt, at once; one token stands for a block.
    Requests {
        prompt: Vec<u32>,
        at_once: usize,
    },
    /// It says again what of a prompt is cached.
    Report(Vec<u32>),
    /// A copy of a block goes.
    Evict(usize),
    Reset,
}

fn any_work() -> impl Strategy<Value = Work> {
    let prompt = || prop::collection::vec(0..2u32, 1..6);
    prop_oneof![
        10 => (prompt(), 1..3usize).prop_map(|(prompt, at_once)| Work::Requests { prompt, at_once }),
        2 => prompt().prop_map(Work::Report),
        12 => (0..64usize).prop_map(Work::Evict),
        1 => Just(Work::Reset),
    ]
}

/// An engine's cache, with all its copies.
#[derive(Default)]
struct Cache {
    names: Vec<Vec<u32>>,
    copies: Vec<u128>,
    followed: BTreeSet<u128>,
}

impl Cache {
    fn name(&mut self, prefix: &[u32]) -> u128 {
        let at = self.names.iter().position(|name| name == prefix).unwrap_or_else(|| {
            self.names.push(prefix.to_vec());
            self.names.len() - 1
        });
        at as u128
    }

    /// Leading blocks of a prompt that are cached.
    fn hit(&mut self, prompt: &[u32]) -> usize {
        (0..prompt.len())
            .take_while(|i| {
                let name = self.name(&prompt[..=*i]);
                self.copies.contains(&name)
            })
            .count()
    }

    fn event(&mut self, prompt: &[u32], from: usize, to: usize) -> KvEvent {
        let parent = (from > 0).then(|| EngineHash(self.name(&prompt[..from])));
        KvEvent::Stored(Stored {
            hashes: (from..to).map(|i| EngineHash(self.name(&prompt[..=i]))).collect(),
            parent,
            token_ids: prompt[from..to].iter().flat_map(|token| [*token; BLOCK as usize]).collect(),
            block_size: BLOCK,
            ..Stored::default()
        })
    }

    fn block(prefix: &[u32]) -> BlockHash {
        let tokens: Vec<u32> = prefix.iter().flat_map(|token| [*token; BLOCK as usize]).collect();
        *chain(&tokens, &ContentKeys::default()).last().unwrap()
    }
}

proptest! {
    /// Whatever an engine with several copies of blocks does, nothing is believed to be there that is not; and a prefix
    /// that is used again and extended is known as a whole.
    #[test]
    fn never_more_than_the_engine_has(works in prop::collection::vec(any_work(), 1..80)) {
        let mut ownership = ownership();
        let mut cache = Cache::default();
        for work in works {
            let mut used = None;
            match work {
                Work::Requests { prompt, at_once } => {
                    let hit = cache.hit(&prompt);
                    if hit < prompt.len() {
                        let event = cache.event(&prompt, hit, prompt.len());
                        for _ in 0..at_once {
                            apply(&mut ownership, event.clone());
                            for i in hit..prompt.len() {
                                let name = cache.name(&prompt[..=i]);
                                cache.copies.push(name);
                            }
                        }
                        let last = cache.name(&prompt[..hit]);
                        let seen = !cache.followed.insert(last);
                        used = (hit == 0 || seen || at_once > 1).then_some(prompt);
                    }
                }
                Work::Report(prompt) => {
                    let hit = cache.hit(&prompt);
                    if hit > 0 {
                        let event = cache.event(&prompt, 0, hit);
                        apply(&mut ownership, event);
                    }
                }
                Work::Evict(i) if i < cache.copies.len() => {
                    let name = cache.copies.remove(i);
                    apply(&mut ownership, KvEvent::Removed(removed(name, 1)));
                }
                Work::Evict(_) => {}
                Work::Reset => {
                    cache.copies.clear();
                    cache.followed.clear();
                    apply(&mut ownership, KvEvent::Cleared);
                }
            }
            let claimed: BTreeSet<_> = ownership.iter().map(|(block, _)| block.hash).collect();
            let there: BTreeSet<_> =
                cache.copies.iter().map(|name| Cache::block(&cache.names[*name as usize])).collect();
            prop_assert!(claimed.is_subset(&there));
            if let Some(prompt) = used {
                for i in 0..prompt.len() {
                    prop_assert!(claimed.contains(&Cache::block(&prompt[..=i])), "block {i} of {prompt:?}");
                }
            }
        }
    }
}

proptest! {
    /// Copies are counted where the engine's number of blocks is known, so a block is gone when it is, and not before. An engine
    /// that repeats what it stored is found out when there are more copies than it has blocks; from then on nothing is
    /// believed to be there that is not.
    #[test]
    fn copies_are_counted(
        works in prop::collection::vec(any_work(), 1..120),
        capacity in 6..24usize,
        repeats: bool,
    ) {
        let mut ownership = ownership();
        ownership.set_capacity(capacity as u64);
        let mut cache = Cache::default();
        for work in works {
            match work {
                Work::Requests { prompt, at_once } => {
                    let hit = cache.hit(&prompt);
                    let names: Vec<u128> = (hit..prompt.len()).map(|i| cache.name(&prompt[..=i])).collect();
                    for _ in 0..at_once {
                        // Room comes first, and what the request itself uses stays.
                        let used: Vec<u128> = (0..hit).map(|i| cache.name(&prompt[..=i])).collect();
                        while cache.copies.len() + names.len() > capacity {
                            let Some(at) = cache.copies.iter().position(|name| !used.contains(name)) else {
                                break;
                            };
                            let name = cache.copies.remove(at);
                            apply(&mut ownership, KvEvent::Removed(removed(name, 1)));
                        }
                        if cache.copies.len() + names.len() <= capacity && !names.is_empty() {
                            let event = cache.event(&prompt, hit, prompt.len());
                            apply(&mut ownership, event);
                            cache.copies.extend(&names);
                        }
                    }
                }
                Work::Report(prompt) if repeats => {
                    let hit = cache.hit(&prompt);
                    if hit > 0 {
                        let event = cache.event(&prompt, 0, hit);
                        apply(&mut ownership, event);
                    }
                }
                Work::Evict(i) if i < cache.copies.len() => {
                    let name = cache.copies.remove(i);
                    apply(&mut ownership, KvEvent::Removed(removed(name, 1)));
                }
                Work::Report(_) | Work::Evict(_) => {}
                Work::Reset => {
                    cache.copies.clear();
                    apply(&mut ownership, KvEvent::Cleared);
                }
            }
            let claimed: BTreeSet<_> = ownership.iter().map(|(block, _)| block.hash).collect();
            let there: BTreeSet<_> =
                cache.copies.iter().map(|name| Cache::block(&cache.names[*name as usize])).collect();
            if !repeats {
                prop_assert_eq!(&claimed, &there);
                prop_assert_eq!(ownership.copies, cache.copies.len() as u64);
            }
            if ownership.capacity.is_none() {
                prop_assert!(claimed.is_subset(&there));
            }
            prop_assert!(ownership.copies <= capacity as u64 || ownership.capacity.is_none());
        }
    }
}
