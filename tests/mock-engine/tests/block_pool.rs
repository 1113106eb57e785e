//! The block pool against a naive model of it, and its events against its cache.

use std::collections::VecDeque;

use baton_mock_engine::block_pool::{BlockId, BlockPool};
use baton_mock_engine::events::{BlockStored, KvEvent};
use baton_mock_engine::hashing::EngineHash;
use proptest::prelude::*;

const BLOCKS: u32 = 12;

/// Queues and lists, searched from end to end.
#[derive(Default)]
struct Naive {
    free: VecDeque<BlockId>,
    references: Vec<u32>,
    /// In order of insertion.
    cached: Vec<(EngineHash, BlockId)>,
}

impl Naive {
    fn new() -> Self {
        Self { free: (1..BLOCKS).collect(), references: vec![0; BLOCKS as usize], cached: Vec::new() }
    }

    fn lookup(&self, hash: EngineHash) -> Option<BlockId> {
        self.cached.iter().find(|(other, _)| *other == hash).map(|(_, id)| *id)
    }

    fn hash_of(&self, id: BlockId) -> Option<EngineHash> {
        self.cached.iter().find(|(_, other)| *other == id).map(|(hash, _)| *hash)
    }

    fn allocate(&mut self, count: usize) -> Vec<BlockId> {
        let ids: Vec<_> = self.free.drain(..count).collect();
        for id in &ids {
            self.cached.retain(|(_, other)| other != id);
            self.references[*id as usize] = 1;
        }
        ids
    }

    fn touch(&mut self, id: BlockId) {
        self.free.retain(|other| *other != id);
        self.references[id as usize] += 1;
    }

    fn free(&mut self, ids: &[BlockId]) {
        let mut front = Vec::new();
        for id in ids {
            self.references[*id as usize] -= 1;
            if self.references[*id as usize] == 0 {
                match self.hash_of(*id) {
                    Some(_) => self.free.push_back(*id),
                    None => front.push(*id),
                }
            }
        }
        front.into_iter().rev().for_each(|id| self.free.push_front(id));
    }
}

/// What the events so far add up to: how often each hash was stored and not removed.
#[derive(Default)]
struct Follower(Vec<u64>);

impl Follower {
    fn take(&mut self, events: Vec<KvEvent>) {
        for event in events {
            match event {
                KvEvent::Stored(stored) => self.0.extend(stored.block_hashes),
                KvEvent::Removed { block_hash } => {
                    let at = self.0.iter().position(|hash| *hash == block_hash);
                    self.0.swap_remove(at.expect("only what was stored is removed"));
                }
                KvEvent::Cleared => self.0.clear(),
            }
        }
        self.0.sort();
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A user takes so many new blocks.
    Allocate(usize),
    /// A user takes the block with this hash, if it is cached.
    Hit(u8),
    /// A user's block number so-and-so is cached under this hash, if it is not cached.
    Cache(usize, usize, u8),
    /// A user gives everything back, from its tail.
    Free(usize),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1usize..5).prop_map(Step::Allocate),
        4 => (0u8..10).prop_map(Step::Hit),
        6 => (any::<usize>(), any::<usize>(), 0u8..10).prop_map(|(user, at, hash)| Step::Cache(user, at, hash)),
        4 => any::<usize>().prop_map(Step::Free),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..80)
}

fn stored(block_hashes: Vec<u64>) -> BlockStored {
    BlockStored {
        block_hashes,
        parent_block_hash: None,
        token_ids: vec![],
        block_size: 1,
        lora: None,
        extra_keys: vec![],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_pool_does_what_the_naive_one_does(steps in steps()) {
        let mut pool = BlockPool::new(BLOCKS, true);
        let mut naive = Naive::new();
        let mut follower = Follower::default();
        let mut users: Vec<Vec<BlockId>> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate(count) => {
                    let mut ids = Vec::new();
                    let allocated = pool.allocate(count, &mut ids);
                    prop_assert_eq!(allocated.is_ok(), count <= naive.free.len());
                    if allocated.is_ok() {
                        prop_assert_eq!(&ids, &naive.allocate(count));
                        users.push(ids);
                    } else {
                        prop_assert!(ids.is_empty());
                    }
                }
                Step::Hit(hash) => {
                    let hash = EngineHash(hash.into());
                    prop_assert_eq!(pool.lookup(hash), naive.lookup(hash));
                    if let Some(id) = pool.lookup(hash) {
                        pool.touch(id);
                        naive.touch(id);
                        users.push(vec![id]);
                    }
                }
                Step::Cache(user, at, hash) if !users.is_empty() => {
                    let blocks = &users[user % users.len()];
                    let (id, hash) = (blocks[at % blocks.len()], EngineHash(hash.into()));
                    if naive.hash_of(id).is_none() {
                        pool.cache(&[(id, hash)], stored);
                        naive.cached.push((hash, id));
                    }
                }
                Step::Free(user) if !users.is_empty() => {
                    let at = user % users.len();
                    let mut blocks = users.swap_remove(at);
                    blocks.reverse();
                    pool.free(blocks.iter().copied());
                    naive.free(&blocks);
                }
                Step::Reset => {
                    prop_assert_eq!(pool.reset(), users.is_empty());
                    if users.is_empty() {
                        naive.cached.clear();
                    }
                }
                Step::Cache(..) | Step::Free(_) => {}
            }
            prop_assert_eq!(pool.num_free(), naive.free.len());
            prop_assert_eq!(pool.free_queue().collect::<VecDeque<_>>(), naive.free.clone());
            for id in 1..BLOCKS {
                prop_assert_eq!(pool.references(id), naive.references[id as usize]);
            }
            follower.take(pool.take_events());
            let mut cached: Vec<u64> = pool.cached_blocks().map(|(_, hash)| hash.external()).collect();
            cached.sort();
            prop_assert_eq!(&follower.0, &cached);
        }
    }
}

#[test]
fn what_hangs_off_a_prefix_is_evicted_before_it() {
    let mut pool = BlockPool::new(9, true);
    let mut conversation = Vec::new();
    pool.allocate(4, &mut conversation).unwrap();
    let cached: Vec<_> = conversation.iter().map(|id| (*id, EngineHash(100 + u128::from(*id)))).collect();
    pool.cache(&cached, stored);
    pool.free(conversation.iter().rev().copied());
    pool.take_events();
    // Four blocks never held anything; the fifth comes from the conversation's end.
    let mut others = Vec::new();
    pool.allocate(6, &mut others).unwrap();
    let evicted: Vec<u64> = pool
        .take_events()
        .into_iter()
        .map(|event| match event {
            KvEvent::Removed { block_hash } => block_hash,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(evicted, [104, 103]);
    assert!(pool.lookup(EngineHash(101)).is_some());
}
