//! Paged KV with a prefix cache, as vLLM keeps it.
//!
//! A block is used by sequences (references) or free. A free block may still hold what it was computed for: it is a hit until the
//! block is taken for something else. Free blocks are taken in the order in which they became free; a sequence gives its
//! blocks back from the last to the first, so of one prompt the leaves go before the root. Two sequences that compute the same block
//! at the same time hold it twice, as in vLLM.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::events::{KvEvents, Tier};

/// Ids are hashes already.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Block {
    /// What it holds; 0 for nothing that can be found.
    id: u64,
    references: u32,
    /// Neighbours in the queue of free blocks.
    before: u32,
    after: u32,
    /// Another block that holds the same.
    twin: u32,
}

/// The blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    /// The last one is no block: the queue of free blocks begins behind it and ends before it.
    blocks: Vec<Block>,
    cached: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    free: u32,
    events: Option<KvEvents>,
}

impl BlockPool {
    /// So many empty blocks. `events`: whether changes are kept for [`BlockPool::take_events`].
    pub fn new(blocks: u32, events: bool) -> Self {
        let count = blocks;
        let linked = |at: u32| Block {
            id: 0,
            references: 0,
            before: if at == 0 { count } else { at - 1 },
            after: if at == count { 0 } else { at + 1 },
            twin: NONE,
        };
        Self {
            blocks: (0..=count).map(linked).collect(),
            cached: HashMap::default(),
            free: count,
            events: events.then(KvEvents::default),
        }
    }

    /// All blocks.
    pub fn len(&self) -> u32 {
        self.blocks.len() as u32 - 1
    }

    /// Whether it has no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Blocks that nobody uses, cached or not.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Leading blocks of a prompt that are cached.
    pub fn hits(&self, ids: &[u64]) -> usize {
        ids.iter().take_while(|id| self.cached.contains_key(id)).count()
    }

    /// Of these, which are all cached, the blocks that nobody uses: taking them makes so many fewer free.
    pub fn free_among(&self, ids: &[u64]) -> u32 {
        ids.iter().filter(|id| self.blocks[self.cached[id] as usize].references == 0).count() as u32
    }

    /// Uses cached blocks.
    ///
    /// # Panics
    /// Where one of them is not cached.
    pub fn share(&mut self, ids: &[u64], into: &mut Vec<u32>) {
        for id in ids {
            let at = self.cached[id];
            if self.blocks[at as usize].references == 0 {
                self.unlink(at);
            }
            self.blocks[at as usize].references += 1;
            into.push(at);
        }
    }

    /// Takes so many free blocks, those that became free first, and forgets what they held. Takes none where there
    /// are not enough.
    #[must_use]
    pub fn allocate(&mut self, count: u32, into: &mut Vec<u32>) -> bool {
        if count > self.free {
            return false;
        }
        for _ in 0..count {
            let at = self.blocks[self.len() as usize].after;
            self.unlink(at);
            self.forget(at);
            self.blocks[at as usize].references = 1;
            into.push(at);
        }
        true
    }

    /// The block holds this now, and can be found.
    pub fn publish(&mut self, block: u32, parent: Option<u64>, id: u64) {
        debug_assert!(self.blocks[block as usize].id == 0 && id != 0);
        self.blocks[block as usize].id = id;
        match self.cached.get(&id) {
            // The first of the twins is found, also after others came.
            Some(first) => {
                let first = *first as usize;
                self.blocks[block as usize].twin = self.blocks[first].twin;
                self.blocks[first].twin = block;
            }
            None => {
                self.cached.insert(id, block);
                if let Some(events) = &mut self.events {
                    events.stored(Tier::Gpu, parent, id);
                }
            }
        }
    }

    /// A sequence gives back its blocks, which stand in its order.
    pub fn release(&mut self, blocks: &[u32]) {
        for at in blocks.iter().rev() {
            let block = &mut self.blocks[*at as usize];
            block.references -= 1;
            if block.references == 0 {
                let (last, end) = (self.blocks[self.len() as usize].before, self.len());
                self.blocks[*at as usize].before = last;
                self.blocks[*at as usize].after = end;
                self.blocks[last as usize].after = *at;
                self.blocks[end as usize].before = *at;
                self.free += 1;
            }
        }
    }

    /// What changed since the last call.
    pub fn take_events(&mut self) -> Option<KvEvents> {
        self.events.as_mut().filter(|events| !events.is_empty()).map(std::mem::take)
    }

    fn unlink(&mut self, at: u32) {
        let Block { before, after, .. } = self.blocks[at as usize];
        self.blocks[before as usize].after = after;
        self.blocks[after as usize].before = before;
        self.free -= 1;
    }

    /// The block holds nothing any more.
    fn forget(&mut self, at: u32) {
        let id = std::mem::take(&mut self.blocks[at as usize].id);
        if id == 0 {
            return;
        }
        let twin = std::mem::replace(&mut self.blocks[at as usize].twin, NONE);
        let first = self.cached[&id];
        if first != at {
            let mut before = first;
            while self.blocks[before as usize].twin != at {
                before = self.blocks[before as usize].twin;
            }
            self.blocks[before as usize].twin = twin;
        } else if twin != NONE {
            self.cached.insert(id, twin);
        } else {
            self.cached.remove(&id);
            if let Some(events) = &mut self.events {
                events.removed(Tier::Gpu, id);
            }
        }
    }
}
