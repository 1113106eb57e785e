//! From a live block's hash to where it lies.
//!
//! A *head* is a live block that is its chain's first or comes behind a dead one; all others are *inner*. What comes next in a prompt
//! whose last block is known is either right behind that block or a head, since a block follows one other block only. So
//! lookups and stores ask the small table of heads for each chain that they come to, and the large table of inner blocks is only
//! written, but for the few searches that begin in the middle of a chain. Each live block is in one of the two.

use baton_proto::BlockHash;

use super::chain::Chains;
use super::heads::Heads;
use super::inner::Inner;
use super::key::{Key, Mixer, Place};

/// The tables.
#[derive(Debug)]
pub(super) struct Places {
    mixer: Mixer,
    heads: Heads,
    inner: Inner,
}

impl Places {
    pub(super) fn new(seed: u64) -> Self {
        Self { mixer: Mixer::new(seed), heads: Heads::new(), inner: Inner::new() }
    }

    pub(super) fn key(&self, hash: &BlockHash) -> Key {
        self.mixer.key(hash)
    }

    /// Where a head lies.
    #[inline]
    pub(super) fn head(&self, key: Key, hash: &BlockHash, chains: &Chains) -> Option<Place> {
        self.heads.find(key, |place| chains[place.chain].hashes[place.pos as usize] == *hash)
    }

    /// Where any block lies.
    pub(super) fn find(&self, hash: &BlockHash, chains: &Chains) -> Option<Place> {
        let key = self.key(hash);
        let inside = |chain| chains[chain].position(hash).map(|pos| Place { chain, pos });
        self.head(key, hash, chains).or_else(|| self.inner.find(key, inside))
    }

    /// Reads where the search for a head starts, so that its cache miss is under way.
    pub(super) fn expect_head(&self, hash: &BlockHash) {
        std::hint::black_box(self.heads.touch(self.key(hash)));
    }

    /// Mixes the hashes, and reads where their entries are or would be, all at once.
    pub(super) fn touch(&self, hashes: &[BlockHash], keys: &mut [Key]) {
        for (key, hash) in keys.iter_mut().zip(hashes) {
            *key = self.key(hash);
        }
        // The less is done for each, the more cache misses are under way at once.
        let read = keys[..hashes.len()].iter().fold(0, |read, key| read | self.inner.touch(*key));
        std::hint::black_box(read);
    }

    /// A block that is in neither table lies there.
    #[inline]
    pub(super) fn insert(&mut self, key: Key, place: Place, head: bool) {
        if head {
            self.heads.insert(key, place);
        } else {
            self.inner.insert(key, place.chain);
        }
    }

    /// The block does not live any more.
    #[inline]
    pub(super) fn remove(&mut self, key: Key, place: Place, head: bool) {
        if head {
            self.heads.remove(key, place);
        } else {
            self.inner.remove(key, place.chain);
        }
    }

    /// The block before this one died, or came to life.
    pub(super) fn turn(&mut self, hash: &BlockHash, place: Place, head: bool) {
        let key = self.key(hash);
        self.remove(key, place, !head);
        self.insert(key, place, head);
    }

    /// The block moved.
    pub(super) fn moved(&mut self, hash: &BlockHash, (from, was_head): (Place, bool), (to, head): (Place, bool)) {
        let key = self.key(hash);
        match (was_head, head) {
            (true, true) => self.heads.moved(key, from, to),
            (false, false) => self.inner.moved(key, from.chain, to.chain),
            _ => {
                self.remove(key, from, was_head);
                self.insert(key, to, head);
            }
        }
    }
}
