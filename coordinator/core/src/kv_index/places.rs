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

    /// Where a head lies.
    #[inline]
    pub(super) fn head(&self, hash: &BlockHash, chains: &Chains) -> Option<Place> {
        self.head_keyed(self.mixer.key(hash), hash, chains)
    }

    #[inline]
    fn head_keyed(&self, key: Key, hash: &BlockHash, chains: &Chains) -> Option<Place> {
        self.heads.find(key, |place| chains[place.chain].hashes[place.pos as usize] == *hash)
    }

    /// Where any block lies.
    pub(super) fn find(&self, hash: &BlockHash, chains: &Chains) -> Option<Place> {
        let key = self.mixer.key(hash);
        let inside = |chain| chains[chain].position(hash).map(|pos| Place { chain, pos });
        self.head_keyed(key, hash, chains).or_else(|| self.inner.find(key, inside))
    }

    /// Begins the cache miss of a search for a head.
    pub(super) fn expect_head(&self, hash: &BlockHash) {
        self.heads.touch(self.mixer.key(hash));
    }

    /// As [`Self::insert`] for an inner block, unless it lives already, as a head. Returns whether it did.
    #[inline]
    pub(super) fn insert_new(&mut self, hash: &BlockHash, chain: u32, chains: &Chains) -> bool {
        let key = self.mixer.key(hash);
        if self.heads.may_have(key) && self.head_keyed(key, hash, chains).is_some() {
            return false;
        }
        self.inner.insert(key, chain);
        true
    }

    /// A block that does not live yet lies there from now on.
    #[inline]
    pub(super) fn insert(&mut self, hash: &BlockHash, place: Place, head: bool) {
        let key = self.mixer.key(hash);
        if head { self.heads.insert(key, place) } else { self.inner.insert(key, place.chain) }
    }

    /// The block does not live any more.
    #[inline]
    pub(super) fn remove(&mut self, hash: &BlockHash, place: Place, head: bool) {
        let key = self.mixer.key(hash);
        if head { self.heads.remove(key, place) } else { self.inner.remove(key, place.chain) }
    }

    /// The block before this one died, or came to life.
    pub(super) fn turn(&mut self, hash: &BlockHash, place: Place, head: bool) {
        self.remove(hash, place, !head);
        self.insert(hash, place, head);
    }

    /// The block moved.
    pub(super) fn moved(
        &mut self,
        hash: &BlockHash,
        (from, was_head): (Place, bool),
        (to, head): (Place, bool),
    ) {
        let key = self.mixer.key(hash);
        match (was_head, head) {
            (true, true) => self.heads.moved(key, from, to),
            (false, false) => self.inner.moved(key, from.chain, to.chain),
            _ => {
                self.remove(hash, from, was_head);
                self.insert(hash, to, head);
            }
        }
    }
}
