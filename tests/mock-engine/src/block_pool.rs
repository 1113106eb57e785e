//! The pool of KV blocks: reference counts, prefix cache and eviction order, as in vLLM.
//!
//! Free blocks form one queue; its front is reused first. A block that is freed with a hash goes to the back, so that the cache
//! is evicted least recently used first; a request frees its blocks from the tail, so that leaves go before
//! what they hang from. A block freed without a hash goes to the front. Block 0 is never handed out.
//!
//! The pool does not merge equal blocks: when two requests compute the same prefix at the same time, both blocks are cached
//! under one hash, and each has its own stored and removed event.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::events::{BlockStored, KvEvent};
use crate::hashing::EngineHash;

/// Index of a block in the pool.
pub type BlockId = u32;

/// No block: the end of the free queue.
const NIL: BlockId = BlockId::MAX;

#[derive(Clone, Debug)]
struct Block {
    references: u32,
    hash: Option<EngineHash>,
    previous: BlockId,
    next: BlockId,
}

/// Blocks cached under one hash, in order of insertion; hardly ever more than one.
#[derive(Clone, Debug)]
enum Cached {
    One(BlockId),
    Many(Vec<BlockId>),
}

/// Hash keys are hashes already.
#[derive(Clone, Copy, Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 ^= u64::from_le_bytes(word);
        }
    }

    fn write_u128(&mut self, value: u128) {
        self.0 = (value >> 64) as u64;
    }
}

/// Not enough free blocks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{wanted} blocks wanted, {free} are free")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub wanted: usize,
    /// Blocks that are free.
    pub free: usize,
}

/// All blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    cached: HashMap<EngineHash, Cached, BuildHasherDefault<Identity>>,
    head: BlockId,
    tail: BlockId,
    free: usize,
    events: Option<Vec<KvEvent>>,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, block 0 included. With `events`, changes of the cache are recorded.
    pub fn new(num_blocks: u32, events: bool) -> Self {
        assert!(num_blocks >= 2, "a pool needs a block besides block 0");
        let block = Block { references: 0, hash: None, previous: NIL, next: NIL };
        let mut pool = Self {
            blocks: vec![block; num_blocks as usize],
            cached: HashMap::default(),
            head: NIL,
            tail: NIL,
            free: 0,
            events: events.then(Vec::new),
        };
        pool.blocks[0].references = 1;
        for id in 1..num_blocks {
            pool.push_back(id);
        }
        pool
    }

    /// Blocks that can be handed out; cached ones that nobody references are among them.
    pub fn num_free(&self) -> usize {
        self.free
    }

    /// Blocks in the pool without block 0.
    pub fn capacity(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Share of the blocks that are referenced, from 0 to 1.
    pub fn usage(&self) -> f64 {
        1.0 - self.free as f64 / self.capacity() as f64
    }

    /// A block cached under this hash: the first one, where there are several.
    pub fn lookup(&self, hash: EngineHash) -> Option<BlockId> {
        match self.cached.get(&hash)? {
            Cached::One(id) => Some(*id),
            Cached::Many(ids) => ids.first().copied(),
        }
    }

    /// Whether nobody references this block, so that touching it takes it out of the free ones.
    pub fn is_free(&self, id: BlockId) -> bool {
        self.block(id).references == 0
    }

    /// References a cached block once more.
    pub fn touch(&mut self, id: BlockId) {
        if self.block(id).references == 0 {
            self.unlink(id);
        }
        self.block_mut(id).references += 1;
    }

    /// Hands out `count` blocks with one reference each, evicting what was cached in them.
    pub fn allocate(&mut self, count: usize, into: &mut Vec<BlockId>) -> Result<(), OutOfBlocks> {
        if count > self.free {
            return Err(OutOfBlocks { wanted: count, free: self.free });
        }
        for _ in 0..count {
            let id = self.head;
            self.unlink(id);
            self.evict(id);
            self.block_mut(id).references = 1;
            into.push(id);
        }
        Ok(())
    }

    /// Gives back one reference of each block; those given first are reused first.
    pub fn free(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        let mut front = Vec::new();
        for id in blocks {
            let block = self.block_mut(id);
            block.references = block.references.checked_sub(1).expect("only a referenced block can be freed");
            if block.references == 0 {
                if block.hash.is_some() {
                    self.push_back(id);
                } else {
                    front.push(id);
                }
            }
        }
        for id in front.into_iter().rev() {
            self.push_front(id);
        }
    }

    /// Caches full blocks, each under its hash, and records that; `stored` makes the event from their external hashes.
    pub fn cache(&mut self, blocks: &[(BlockId, EngineHash)], stored: impl FnOnce(Vec<u64>) -> BlockStored) {
        for &(id, hash) in blocks {
            let block = self.block_mut(id);
            assert!(block.references > 0, "only a referenced block can be cached");
            assert!(block.hash.is_none(), "a block is cached once");
            block.hash = Some(hash);
            self.cached
                .entry(hash)
                .and_modify(|cached| match cached {
                    Cached::One(first) => *cached = Cached::Many(vec![*first, id]),
                    Cached::Many(ids) => ids.push(id),
                })
                .or_insert(Cached::One(id));
        }
        if let Some(events) = &mut self.events {
            events.push(KvEvent::Stored(stored(blocks.iter().map(|(_, hash)| hash.external()).collect())));
        }
    }

    /// Forgets all that is cached. Refused, with `false`, while a block is referenced.
    pub fn reset(&mut self) -> bool {
        if self.free != self.capacity() {
            return false;
        }
        self.cached.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.record(KvEvent::Cleared);
        true
    }

    /// What happened to the cache since the last call, in order.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Every block with its hash, for checks: what the events so far must add up to.
    pub fn cached_blocks(&self) -> impl Iterator<Item = (BlockId, EngineHash)> + '_ {
        (0..).zip(&self.blocks).filter_map(|(id, block)| Some((id, block.hash?)))
    }

    /// The free queue from its front, for checks.
    pub fn free_queue(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(Some(self.head).filter(|id| *id != NIL), |id| {
            Some(self.block(*id).next).filter(|id| *id != NIL)
        })
    }

    /// References of a block, for checks.
    pub fn references(&self, id: BlockId) -> u32 {
        self.block(id).references
    }

    fn evict(&mut self, id: BlockId) {
        let Some(hash) = self.block_mut(id).hash.take() else { return };
        match self.cached.get_mut(&hash).expect("a hashed block is cached") {
            Cached::One(_) => {
                self.cached.remove(&hash);
            }
            Cached::Many(ids) => {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.cached.remove(&hash);
                }
            }
        }
        self.record(KvEvent::Removed { block_hash: hash.external() });
    }

    fn record(&mut self, event: KvEvent) {
        if let Some(events) = &mut self.events {
            events.push(event);
        }
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id as usize]
    }

    fn push_back(&mut self, id: BlockId) {
        let tail = self.tail;
        let block = self.block_mut(id);
        (block.previous, block.next) = (tail, NIL);
        match tail {
            NIL => self.head = id,
            tail => self.block_mut(tail).next = id,
        }
        self.tail = id;
        self.free += 1;
    }

    fn push_front(&mut self, id: BlockId) {
        let head = self.head;
        let block = self.block_mut(id);
        (block.previous, block.next) = (NIL, head);
        match head {
            NIL => self.tail = id,
            head => self.block_mut(head).previous = id,
        }
        self.head = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { previous, next, .. } = *self.block(id);
        match previous {
            NIL => self.head = next,
            previous => self.block_mut(previous).next = next,
        }
        match next {
            NIL => self.tail = previous,
            next => self.block_mut(next).previous = previous,
        }
        self.free -= 1;
    }
}
