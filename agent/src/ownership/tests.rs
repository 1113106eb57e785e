use std::collections::{BTreeMap, BTreeSet};

use baton_proto::ContentKeys;
use baton_proto::block_hash::MultimodalItem;
use proptest::prelude::*;

use super::*;

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

/// `n` blocks under hashes `from..`, with tokens that follow from the hashes.
/// What is said when the blocks of a prompt's beginning come.
fn all_stored(prompt: &[BlockHash]) -> Vec<Change> {
    let block = |i: usize| Block { hash: prompt[i], parent: i.checked_sub(1).map(|before| prompt[before]) };
    (0..prompt.len()).map(|i| Change::Stored(block(i), Tier::Gpu)).collect()
}

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
        (Stored { spec_kind: Some("mamba".into()), ..base() }, Ignored::OtherGroup),
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

#[test]
fn only_the_first_full_attention_group_counts() {
    let mut ownership = ownership();
    let in_group = |group, kind: &str| {
        KvEvent::Stored(Stored { group_idx: Some(group), spec_kind: Some(kind.into()), ..stored(None, 0, 1) })
    };
    assert_eq!(apply(&mut ownership, in_group(0, "sliding_window")).ignored, [Ignored::OtherGroup]);
    assert_eq!(apply(&mut ownership, in_group(1, "full_attention")).changes.len(), 1);
    assert_eq!(apply(&mut ownership, in_group(2, "full_attention")).ignored, [Ignored::OtherGroup]);
    let other = Removed { group_idx: Some(0), ..removed(0, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Removed(other)).ignored, [Ignored::OtherGroup]);
    assert_eq!(ownership.len(), 1);
    let own = Removed { group_idx: Some(1), ..removed(0, 1) };
    assert_eq!(apply(&mut ownership, KvEvent::Removed(own)).changes.len(), 1);
    assert!(ownership.is_empty());
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
    assert_eq!(applied.changes, [Change::Removed(old, Tier::Gpu), all_stored(&[new])[0]]);
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
    Some(["GPU", "CPU", "STORAGE"][slot(tier)].into())
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
                    Change::Stored(block, tier) => prop_assert!(told.insert((block.hash, tier as i32))),
                    Change::Removed(block, tier) => prop_assert!(told.remove(&(block, tier as i32))),
                    Change::Cleared => told.clear(),
                }
            }
            prop_assert_eq!(&told, &model.owned());
            let snapshot: BTreeSet<_> = ownership.iter().map(|(block, tier)| (block.hash, tier as i32)).collect();
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
