//! The way of an event: the agent's decoding, ownership and outbox, the control plane's messages, the index.

use baton_agent::engine::event::{KvEvent, read_batch};
use baton_agent::ownership::{Applied, Attention, Ownership};
use baton_agent::session::outbox::Outbox;
use baton_coordinator_core::kv_index::{self, Group, Holder, KvIndex, Limits, Overlaps, Run, Slot, Tier};
use baton_proto::control::v1::{self, kv_event::Event};
use baton_proto::control::{unpack_hashes, unpack_parent};
use baton_proto::{BlockHash, ContentKeys, Epoch, block_hash::BlockHasher};

const SLOT: Slot = Slot(0);
const EPOCH: Epoch = Epoch(1);

/// One engine, its agent's bookkeeping, and an index.
pub(crate) struct Pipeline {
    hasher: BlockHasher,
    block_size: u32,
    ownership: Ownership,
    outbox: Outbox,
    index: KvIndex,
    found: Overlaps,
    /// Events that did not count.
    pub(crate) ignored: usize,
}

impl Pipeline {
    pub(crate) fn new(model: &str, block_size: u32, capacity: u64) -> Self {
        let mut outbox = Outbox::new(EPOCH);
        outbox.resume(0);
        let mut ownership = Ownership::new(model, block_size);
        ownership.set_capacity(capacity);
        let index = KvIndex::new(Limits::of(1 << 20), 7);
        index.open(SLOT, EPOCH).unwrap();
        Self {
            hasher: BlockHasher::new(model),
            block_size,
            ownership,
            outbox,
            index,
            found: Overlaps::default(),
            ignored: 0,
        }
    }

    /// Takes in a batch as the engine published it.
    pub(crate) fn batch(&mut self, payload: &[u8]) {
        self.events(&read_batch(payload).expect("a batch of the engine"));
    }

    /// Takes in a batch's events.
    pub(crate) fn events(&mut self, events: &[KvEvent]) {
        let mut applied = Applied::default();
        events.iter().for_each(|event| self.ownership.apply(event, &mut applied));
        self.ignored += applied.ignored.len();
        applied.changes.into_iter().for_each(|change| self.outbox.push(change));
        if applied.regrouped {
            self.regroup();
        }
        self.outbox.flush();
        while let Some(batch) = self.outbox.take(|| self.ownership.iter(), || ()) {
            apply(&self.index, batch);
        }
    }

    /// The agent registers anew, and the coordinator asks for all.
    fn regroup(&mut self) {
        let group = |group: &baton_agent::ownership::CacheGroup| Group {
            attention: match group.attention {
                Attention::Full => kv_index::Attention::Full,
                Attention::SlidingWindow(window) => kv_index::Attention::window(window, group.block_size),
                Attention::State => kv_index::Attention::State,
            },
            stride: group.block_size / self.block_size,
        };
        let groups: Vec<Group> = self.ownership.groups().iter().map(group).collect();
        let groups = if groups.is_empty() { vec![Group::new(kv_index::Attention::Full)] } else { groups };
        self.index.open_groups(SLOT, EPOCH, &groups).unwrap();
        self.index.clear(SLOT, EPOCH).unwrap();
        self.outbox.suspend();
        self.outbox.resume(0);
    }

    /// Tokens of the prompt that the index says the engine can reuse.
    pub(crate) fn hit(&mut self, tokens: &[u32], salt: Option<&str>) -> u64 {
        let keys = ContentKeys { salt: salt.map(str::to_owned), ..ContentKeys::default() };
        let size = self.block_size as usize;
        let usable = tokens.len().saturating_sub(1) / size * size;
        let hashes = self.hasher.chain(&tokens[..usable], size, &keys);
        self.index.overlaps(&hashes, &mut self.found);
        u64::from(self.found.of(SLOT).gpu_blocks) * u64::from(self.block_size)
    }

    /// Blocks that the index says the engine has, over its groups.
    pub(crate) fn blocks(&self) -> u64 {
        self.index.blocks_of(SLOT)
    }
}

/// What a coordinator does with a batch.
fn apply(index: &KvIndex, batch: v1::EventBatch) {
    let holder = |group: u32| Holder::new(SLOT, EPOCH).group(group as u16);
    for event in batch.events {
        match event.event.unwrap() {
            Event::Cleared(_) => index.clear(SLOT, EPOCH).unwrap(),
            Event::Stored(run) => {
                let hashes: Vec<BlockHash> = unpack_hashes(&run.hashes).unwrap().collect();
                let run_of = Run::chain(unpack_parent(&run.parent).unwrap(), &hashes);
                assert_eq!(index.store(holder(run.group), tier(run.tier()), run_of).unwrap(), 0);
            }
            Event::Removed(run) => {
                let hashes: Vec<BlockHash> = unpack_hashes(&run.hashes).unwrap().collect();
                index.remove(holder(run.group), tier(run.tier()), &hashes).unwrap();
            }
        }
    }
}

fn tier(tier: v1::Tier) -> Tier {
    match tier {
        v1::Tier::Unspecified | v1::Tier::Gpu => Tier::Gpu,
        v1::Tier::Host => Tier::Host,
        v1::Tier::Disk => Tier::Disk,
    }
}
