//! Blocks in the host's memory, as vLLM's offloading connector keeps them (0.32, policy *lru*).
//!
//! Whole blocks of a request are offered as soon as they are computed, those of its prompt that the GPU had cached among them; what is not there is stored. So the host mostly has what the GPU has, and keeps it
//! when the GPU takes its block for something else. Where there is no room, the blocks go that were used the longest ago, but none of those that are offered; where that
//! is not enough, nothing of the offer is stored. A block counts as used when it is stored, when its copy back begins, and when a request that had it ends, then from the
//! last block to the first: of one prompt the leaves go before the root.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasherDefault;

use super::events::{KvEvents, Tier};
use super::pool::Identity;

#[derive(Clone, Copy, Debug)]
struct Place {
    id: u64,
    /// Neighbours in the order of use.
    before: u32,
    after: u32,
}

/// The blocks of one engine.
#[derive(Debug)]
pub struct HostTier {
    most: u32,
    /// The first is no block: behind it comes what was used the longest ago, and before it what was used last.
    places: Vec<Place>,
    vacant: Vec<u32>,
    held: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    events: Option<KvEvents>,
}

impl HostTier {
    /// Room for so many blocks. `events`: whether changes are kept for [`HostTier::take_events`].
    pub fn new(blocks: u32, events: bool) -> Self {
        Self {
            most: blocks,
            places: vec![Place { id: 0, before: 0, after: 0 }],
            vacant: Vec::new(),
            held: HashMap::default(),
            events: events.then(KvEvents::default),
        }
    }

    /// Blocks that are there.
    pub fn len(&self) -> u32 {
        self.held.len() as u32
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How many of these are there, up to the first that is not.
    pub fn hits(&self, ids: &[u64]) -> usize {
        ids.iter().take_while(|id| self.held.contains_key(id)).count()
    }

    /// Blocks that follow each other, the first one `parent`, are in the GPU's cache now: those that are not here are stored.
    pub fn offer(&mut self, parent: Option<u64>, ids: &[u64]) {
        let missing = ids.iter().filter(|id| !self.held.contains_key(id)).count();
        if missing == 0 {
            return;
        }
        let free = self.most.saturating_sub(self.len()) as usize;
        if missing > free && !self.make_room(missing - free, ids) {
            return;
        }
        let mut parent = parent;
        for id in ids {
            if !self.held.contains_key(id) {
                self.store(*id);
                if let Some(events) = &mut self.events {
                    events.stored(Tier::Host, parent, *id);
                }
            }
            parent = Some(*id);
        }
    }

    /// A request had these blocks, in its order.
    pub fn used(&mut self, ids: &[u64]) {
        for id in ids.iter().rev() {
            if let Some(at) = self.held.get(id).copied() {
                self.unlink(at);
                self.link_last(at);
            }
        }
    }

    /// What changed since the last call.
    pub fn take_events(&mut self) -> Option<KvEvents> {
        self.events.as_mut().filter(|events| !events.is_empty()).map(std::mem::take)
    }

    /// Takes out so many blocks other than these, or none where there are not so many.
    fn make_room(&mut self, count: usize, keep: &[u64]) -> bool {
        let keep: BTreeSet<u64> = keep.iter().copied().filter(|id| self.held.contains_key(id)).collect();
        if self.held.len() - keep.len() < count {
            return false;
        }
        let mut at = self.places[0].after;
        for _ in 0..count {
            while keep.contains(&self.places[at as usize].id) {
                at = self.places[at as usize].after;
            }
            let Place { id, after, .. } = self.places[at as usize];
            self.unlink(at);
            self.held.remove(&id);
            self.vacant.push(at);
            if let Some(events) = &mut self.events {
                events.removed(Tier::Host, id);
            }
            at = after;
        }
        true
    }

    fn store(&mut self, id: u64) {
        let place = Place { id, before: 0, after: 0 };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.places[at as usize] = place;
                at
            }
            None => {
                self.places.push(place);
                self.places.len() as u32 - 1
            }
        };
        self.held.insert(id, at);
        self.link_last(at);
    }

    fn unlink(&mut self, at: u32) {
        let Place { before, after, .. } = self.places[at as usize];
        self.places[before as usize].after = after;
        self.places[after as usize].before = before;
    }

    fn link_last(&mut self, at: u32) {
        let last = self.places[0].before;
        self.places[at as usize].before = last;
        self.places[at as usize].after = 0;
        self.places[last as usize].after = at;
        self.places[0].before = at;
    }
}
