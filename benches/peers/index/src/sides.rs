//! The index of each side behind one trait: events are made in the side's own form before any clock runs.

use baton_coordinator_core::kv_index::{Holder, KvIndex, Limits, Overlaps, Run, Slot, Tier};
use baton_proto::{BlockHash, Epoch};
use dynamo_kv_router::indexer::ThreadPoolIndexer;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, RadixTree, SyncIndexer};
use kv_index::{ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock};

use crate::workload::{Block, Event, Workload};

/// One side of the comparison.
pub trait Side: Sized {
    /// Its name in the table.
    const NAME: &str;
    /// An event in its form.
    type Event: Clone;
    /// A prompt in its form.
    type Prompt: Clone;

    fn event(workload: &Workload, event: &Event) -> Self::Event;
    fn prompt(workload: &Workload, prompt: &[Block]) -> Self::Prompt;
    fn new(workload: &Workload) -> Self;
    /// Takes an event; returns whether it was refused.
    fn apply(&mut self, event: Self::Event) -> bool;
    /// Returns once everything taken is visible.
    fn settle(&mut self) {}
    /// The sum of all engines' overlaps.
    fn lookup(&mut self, prompt: Self::Prompt) -> u64;
}

/// Ours.
pub struct Baton {
    pub index: KvIndex,
    found: Overlaps,
}

/// An event in Baton's form.
#[derive(Clone)]
pub enum BatonEvent {
    Stored(Holder, Option<BlockHash>, Vec<BlockHash>),
    Removed(Holder, Vec<BlockHash>),
}

impl Baton {
    /// As [`Side::apply`], beside lookups.
    pub fn apply_shared(index: &KvIndex, event: &BatonEvent) -> bool {
        match event {
            BatonEvent::Stored(holder, parent, hashes) => {
                index.store(*holder, Tier::Gpu, Run::chain(*parent, hashes)) != Ok(0)
            }
            BatonEvent::Removed(holder, hashes) => index.remove(*holder, Tier::Gpu, hashes).is_err(),
        }
    }
}

impl Side for Baton {
    const NAME: &str = "baton";
    type Event = BatonEvent;
    type Prompt = Vec<BlockHash>;

    fn event(workload: &Workload, event: &Event) -> BatonEvent {
        let hash = |block: &Block| workload.hashes[*block as usize];
        let holder = |engine: &u32| Holder::new(Slot(*engine), Epoch(1));
        match event {
            Event::Stored { engine, parent, blocks } => BatonEvent::Stored(
                holder(engine),
                parent.as_ref().map(hash),
                blocks.iter().map(hash).collect(),
            ),
            Event::Removed { engine, blocks } => {
                BatonEvent::Removed(holder(engine), blocks.iter().map(hash).collect())
            }
        }
    }

    fn prompt(workload: &Workload, prompt: &[Block]) -> Vec<BlockHash> {
        prompt.iter().map(|block| workload.hashes[*block as usize]).collect()
    }

    fn new(workload: &Workload) -> Self {
        let index = KvIndex::new(Limits::of(1 << 24), 0x5eed);
        for slot in 0..workload.engines {
            index.open(Slot(slot), Epoch(1)).expect("few enough engines");
        }
        Self { index, found: Overlaps::default() }
    }

    fn apply(&mut self, event: BatonEvent) -> bool {
        Self::apply_shared(&self.index, &event)
    }

    fn lookup(&mut self, prompt: Vec<BlockHash>) -> u64 {
        self.index.overlaps(&prompt, &mut self.found);
        self.found.iter().map(|(_, overlap)| u64::from(overlap.blocks)).sum()
    }
}

/// kv-index's `ChainIndex`, one thread.
pub struct Chain {
    index: ChainIndex,
    workers: Vec<u32>,
    maps: Vec<ChainBlockMap>,
    found: Vec<(u32, u32)>,
}

/// An event in its form.
#[derive(Clone)]
pub enum ChainEvent {
    Stored(u32, Option<SequenceHash>, Vec<StoredBlock>),
    Removed(u32, Vec<SequenceHash>),
}

impl Side for Chain {
    const NAME: &str = "kv-index ChainIndex, 1 thread";
    type Event = ChainEvent;
    type Prompt = Vec<ContentHash>;

    fn event(workload: &Workload, event: &Event) -> ChainEvent {
        let sequence = |block: &Block| SequenceHash(workload.sequence(*block));
        match event {
            Event::Stored { engine, parent, blocks } => {
                let stored = |block: &Block| StoredBlock {
                    seq_hash: sequence(block),
                    content_hash: ContentHash(workload.content(*block)),
                };
                ChainEvent::Stored(
                    *engine,
                    parent.as_ref().map(sequence),
                    blocks.iter().map(stored).collect(),
                )
            }
            Event::Removed { engine, blocks } => {
                ChainEvent::Removed(*engine, blocks.iter().map(sequence).collect())
            }
        }
    }

    fn prompt(workload: &Workload, prompt: &[Block]) -> Vec<ContentHash> {
        prompt.iter().map(|block| ContentHash(workload.content(*block))).collect()
    }

    fn new(workload: &Workload) -> Self {
        let index = ChainIndex::with_max_workers(workload.engines as usize);
        let workers = (0..workload.engines)
            .map(|engine| index.intern_worker(&format!("e{engine}")).expect("few enough workers"))
            .collect();
        let maps = (0..workload.engines).map(|_| ChainBlockMap::new()).collect();
        Self { index, workers, maps, found: Vec::new() }
    }

    fn apply(&mut self, event: ChainEvent) -> bool {
        match event {
            ChainEvent::Stored(engine, parent, blocks) => {
                let map = &mut self.maps[engine as usize];
                self.index.apply_stored(self.workers[engine as usize], &blocks, parent, map).is_err()
            }
            ChainEvent::Removed(engine, hashes) => {
                let map = &mut self.maps[engine as usize];
                self.index.apply_removed(self.workers[engine as usize], &hashes, map);
                false
            }
        }
    }

    fn lookup(&mut self, prompt: Vec<ContentHash>) -> u64 {
        // The form of its lookup that allocates nothing.
        self.found.clear();
        let found = &mut self.found;
        self.index.score_into(
            &prompt,
            |content| content.0,
            false,
            |worker, score| found.push((worker, score)),
        );
        self.found.iter().map(|(_, score)| u64::from(*score)).sum()
    }
}

fn dynamo_event(workload: &Workload, event: &Event) -> RouterEvent {
    let sequence = |block: &Block| ExternalSequenceBlockHash(workload.sequence(*block));
    let (engine, data) = match event {
        Event::Stored { engine, parent, blocks } => {
            let stored = |block: &Block| KvCacheStoredBlockData {
                block_hash: sequence(block),
                tokens_hash: LocalBlockHash(workload.content(*block)),
                mm_extra_info: None,
            };
            let data = KvCacheStoreData {
                parent_hash: parent.as_ref().map(sequence),
                start_position: None,
                blocks: blocks.iter().map(stored).collect(),
            };
            (engine, KvCacheEventData::Stored(data))
        }
        Event::Removed { engine, blocks } => {
            let data = KvCacheRemoveData { block_hashes: blocks.iter().map(sequence).collect() };
            (engine, KvCacheEventData::Removed(data))
        }
    };
    RouterEvent::new(u64::from(*engine), KvCacheEvent { event_id: 0, data, dp_rank: 0 })
}

fn dynamo_prompt(workload: &Workload, prompt: &[Block]) -> Vec<LocalBlockHash> {
    prompt.iter().map(|block| LocalBlockHash(workload.content(*block))).collect()
}

/// Dynamo's `RadixTree`, one thread.
pub struct Radix(RadixTree);

impl Side for Radix {
    const NAME: &str = "Dynamo RadixTree, 1 thread";
    type Event = RouterEvent;
    type Prompt = Vec<LocalBlockHash>;

    fn event(workload: &Workload, event: &Event) -> RouterEvent {
        dynamo_event(workload, event)
    }

    fn prompt(workload: &Workload, prompt: &[Block]) -> Vec<LocalBlockHash> {
        dynamo_prompt(workload, prompt)
    }

    fn new(_: &Workload) -> Self {
        Self(RadixTree::new())
    }

    fn apply(&mut self, event: RouterEvent) -> bool {
        self.0.apply_event(event).is_err()
    }

    fn lookup(&mut self, prompt: Vec<LocalBlockHash>) -> u64 {
        self.0.find_matches(prompt, false).scores.values().map(|score| u64::from(*score)).sum()
    }
}

/// Dynamo's concurrent tree behind its pool of two threads.
pub struct Pool {
    pool: ThreadPoolIndexer<ConcurrentRadixTreeCompressed>,
    runtime: tokio::runtime::Runtime,
}

impl Side for Pool {
    const NAME: &str = "Dynamo concurrent tree, pool of 2";
    type Event = RouterEvent;
    type Prompt = Vec<LocalBlockHash>;

    fn event(workload: &Workload, event: &Event) -> RouterEvent {
        dynamo_event(workload, event)
    }

    fn prompt(workload: &Workload, prompt: &[Block]) -> Vec<LocalBlockHash> {
        dynamo_prompt(workload, prompt)
    }

    fn new(workload: &Workload) -> Self {
        let tree = ConcurrentRadixTreeCompressed::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        Self { pool: ThreadPoolIndexer::new(tree, 2, workload.block_size as u32), runtime }
    }

    fn apply(&mut self, event: RouterEvent) -> bool {
        self.pool.enqueue_event(event).is_err()
    }

    fn settle(&mut self) {
        self.runtime.block_on(self.pool.flush_and_wait()).expect("the pool runs");
    }

    fn lookup(&mut self, prompt: Vec<LocalBlockHash>) -> u64 {
        let scores = self.pool.backend().find_matches(&prompt, false).scores;
        scores.values().map(|score| u64::from(*score)).sum()
    }
}
