//! From a block that begins a chain, or comes behind a gap in one, to where it lies.
//!
//! Open addressing in many small parts, eight bytes an entry, eight entries a bucket, a bucket a cache line. An entry keeps 28 bits of
//! the mixed hash and the place; whether it is the block that is looked for is decided by the whole hash, which lies at the place. A
//! bucket is filled from its beginning; who finds his full goes to the next. At most five eighths of a part are full, so nearly every
//! search costs one cache miss.
//!
//! Most fleets have a few thousand chains. A table of their heads that lies on a few pages, with all that leads to a bucket in the nearest
//! caches, is what makes that miss a cheap one. So there are as many parts as the entries need (linear hashing): whenever they
//! have more than [`MEAN`] each, one of them is split in two, and merged again when they have less than half as many. So a change moves a
//! part or two at most, a few microseconds; now and then the list of parts too, a quarter of a byte for each entry.

use super::key::{CHAIN_BITS, Key, POS_BITS, Place, REST_BITS};

/// Entries of a bucket.
const BUCKET: usize = 8;

/// Entries of a part, in the mean, at most.
const MEAN: usize = if cfg!(test) { 16 } else { 128 };

/// Ranges of a part's sieve.
const SIEVE: usize = 4096;

/// A cache line.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Bucket([u64; BUCKET]);

impl Bucket {
    fn is_full(&self) -> bool {
        self.0[BUCKET - 1] != 0
    }

    /// The first free entry.
    fn free(&mut self) -> Option<&mut u64> {
        self.0.iter_mut().find(|entry| **entry == 0)
    }

    fn entries(&self) -> impl Iterator<Item = u64> {
        self.0.into_iter().take_while(|entry| *entry != 0)
    }

    /// Takes an entry out; the last one takes its place.
    fn take(&mut self, at: usize) {
        let last = self.0.iter().rposition(|entry| *entry != 0).unwrap_or(at);
        self.0.swap(at, last);
        self.0[last] = 0;
    }
}

/// Which of [`SIEVE`] equal ranges of the mixed hash have entries, or had some. Small enough to stay in the cache, so that what is no
/// head is told from what may be one at no cost.
#[derive(Clone, Debug)]
struct Sieve(Box<[u64; SIEVE / 64]>);

impl Default for Sieve {
    fn default() -> Self {
        Self(Box::new([0; SIEVE / 64]))
    }
}

impl Sieve {
    /// The range that holds a hash: which word, and which bit of it.
    #[inline]
    fn range(rest: u32) -> (usize, u64) {
        let range = rest >> (REST_BITS - SIEVE.ilog2());
        (range as usize / 64, 1 << (range % 64))
    }

    fn add(&mut self, rest: u32) {
        let (word, bit) = Self::range(rest);
        self.0[word] |= bit;
    }

    #[inline]
    fn may_have(&self, rest: u32) -> bool {
        let (word, bit) = Self::range(rest);
        self.0[word] & bit != 0
    }
}

#[derive(Clone, Debug, Default)]
struct Part {
    buckets: Box<[Bucket]>,
    sieve: Sieve,
    len: u32,
    /// Entries taken out since the sieve was made.
    gone: u32,
}

/// The table.
#[derive(Debug)]
pub(super) struct Heads {
    parts: Vec<Part>,
    /// The low bits of a hash that part numbers take.
    mask: u32,
    len: usize,
}

fn entry(rest: u32, place: Place) -> u64 {
    u64::from(rest) << (CHAIN_BITS + POS_BITS) | u64::from(place.chain) << POS_BITS | u64::from(place.pos)
}

fn rest_of(entry: u64) -> u32 {
    (entry >> (CHAIN_BITS + POS_BITS)) as u32
}

fn place_of(entry: u64) -> Place {
    Place {
        chain: (entry >> POS_BITS) as u32 & ((1 << CHAIN_BITS) - 1),
        pos: entry as u32 & ((1 << POS_BITS) - 1),
    }
}

impl Part {
    #[inline]
    fn home(&self, rest: u32) -> usize {
        ((u64::from(rest) * self.buckets.len() as u64) >> REST_BITS) as usize
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    /// The steps from one bucket forward to another.
    fn steps(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.buckets.len() - from }
    }

    fn put(&mut self, entry: u64) {
        let mut at = self.home(rest_of(entry));
        loop {
            if let Some(free) = self.buckets[at].free() {
                *free = entry;
                return;
            }
            at = self.after(at);
        }
    }

    fn resize(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![Bucket::default(); buckets].into_boxed_slice());
        old.iter().flat_map(Bucket::entries).for_each(|entry| self.put(entry));
    }

    fn insert(&mut self, entry: u64) {
        let buckets = self.buckets.len();
        if (self.len as usize + 1) * 8 > buckets * BUCKET * 5 {
            self.resize(buckets + buckets / 2 + 1);
        }
        self.put(entry);
        self.len += 1;
        self.sieve.add(rest_of(entry));
    }

    fn delete(&mut self, mut at: usize, mut slot: usize) {
        loop {
            let was_full = self.buckets[at].is_full();
            self.buckets[at].take(slot);
            let Some((bucket, entry)) = was_full.then(|| self.passed(at)).flatten() else { break };
            self.buckets[at].0[BUCKET - 1] = self.buckets[bucket].0[entry];
            (at, slot) = (bucket, entry);
        }
        self.len -= 1;
        let buckets = self.buckets.len();
        if buckets > 8 && (self.len as usize) * 5 < buckets * BUCKET {
            self.resize(buckets / 2);
        }
        self.gone += 1;
        if self.gone * 4 > self.len {
            self.gone = 0;
            self.sieve.0.fill(0);
            self.buckets.iter().flat_map(Bucket::entries).for_each(|entry| self.sieve.add(rest_of(entry)));
        }
    }

    /// An entry that lies behind a bucket because that was full.
    fn passed(&self, bucket: usize) -> Option<(usize, usize)> {
        let mut at = bucket;
        loop {
            at = self.after(at);
            let entries = self.buckets[at].0.iter().take_while(|entry| **entry != 0);
            let passed = |entry: &u64| self.steps(self.home(rest_of(*entry)), at) >= self.steps(bucket, at);
            if let Some(slot) = entries.copied().position(|entry| passed(&entry)) {
                return Some((at, slot));
            }
            if !self.buckets[at].is_full() {
                return None;
            }
        }
    }

    /// Where the entry lies.
    #[inline]
    fn position(&self, entry: u64) -> Option<(usize, usize)> {
        if self.len == 0 {
            return None;
        }
        let mut at = self.home(rest_of(entry));
        loop {
            for (slot, found) in self.buckets[at].0.iter().enumerate() {
                if *found == entry {
                    return Some((at, slot));
                }
                if *found == 0 {
                    return None;
                }
            }
            at = self.after(at);
        }
    }
}

impl Heads {
    pub(super) fn new() -> Self {
        Self { parts: vec![Part::default()], mask: 0, len: 0 }
    }

    /// The part for a hash: its low bits, without the highest of them where there is no such part yet.
    #[inline]
    fn part_of(&self, rest: u32) -> usize {
        let part = (rest & self.mask) as usize;
        if part < self.parts.len() { part } else { part & self.mask as usize >> 1 }
    }

    /// Begins the cache miss of a search for the key.
    pub(super) fn touch(&self, key: Key) {
        let part = &self.parts[self.part_of(key.rest)];
        std::hint::black_box(part.buckets.get(part.home(key.rest)).map_or(0, |bucket| bucket.0[0]));
    }

    /// Whether the key may be here.
    #[inline]
    pub(super) fn may_have(&self, key: Key) -> bool {
        self.parts[self.part_of(key.rest)].sieve.may_have(key.rest)
    }

    /// The place of the key for which `is` says yes.
    #[inline]
    pub(super) fn find(&self, key: Key, mut is: impl FnMut(Place) -> bool) -> Option<Place> {
        let part = &self.parts[self.part_of(key.rest)];
        if part.len == 0 {
            return None;
        }
        let mut at = part.home(key.rest);
        loop {
            for entry in part.buckets[at].0 {
                if entry == 0 {
                    return None;
                }
                if rest_of(entry) == key.rest && is(place_of(entry)) {
                    return Some(place_of(entry));
                }
            }
            at = part.after(at);
        }
    }

    /// Puts in a key that is not there.
    pub(super) fn insert(&mut self, key: Key, place: Place) {
        if self.len == self.parts.len() * MEAN {
            self.split();
        }
        let part = self.part_of(key.rest);
        self.parts[part].insert(entry(key.rest, place));
        self.len += 1;
    }

    /// Takes out what lies at the place.
    pub(super) fn remove(&mut self, key: Key, place: Place) {
        let part = self.part_of(key.rest);
        let part = &mut self.parts[part];
        if let Some((at, slot)) = part.position(entry(key.rest, place)) {
            part.delete(at, slot);
            self.len -= 1;
            if self.len * 2 < (self.parts.len() - 1) * MEAN {
                self.merge();
            }
        }
    }

    /// The block moved.
    pub(super) fn moved(&mut self, key: Key, from: Place, to: Place) {
        let part = self.part_of(key.rest);
        let part = &mut self.parts[part];
        if let Some((at, slot)) = part.position(entry(key.rest, from)) {
            part.buckets[at].0[slot] = entry(key.rest, to);
        }
    }

    /// Adds a part, and moves to it what belongs there.
    fn split(&mut self) {
        let new = self.parts.len();
        self.mask |= new as u32;
        let halved = new & self.mask as usize >> 1;
        let mut half = Part::default();
        half.resize(self.parts[halved].buckets.len() / 2 + 1);
        let old = std::mem::replace(&mut self.parts[halved], half.clone());
        self.parts.push(half);
        self.put_all(&old);
    }

    /// Takes the last part away, of which there is another.
    fn merge(&mut self) {
        let Some(last) = self.parts.pop() else { return };
        self.put_all(&last);
        if self.parts.len() <= (self.mask as usize >> 1) + 1 {
            self.mask >>= 1;
        }
    }

    fn put_all(&mut self, from: &Part) {
        for entry in from.buckets.iter().flat_map(Bucket::entries) {
            let part = self.part_of(rest_of(entry));
            self.parts[part].insert(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Few distinct values of the kept bits, so that entries crowd and wrap around.
    fn key(n: u8) -> Key {
        Key { part: 3, rest: (u32::from(n % 16) << (REST_BITS - 4)) | u32::from(n / 16 * 3) }
    }

    fn place(n: u8, turn: u32) -> Place {
        Place { chain: u32::from(n) + 1, pos: turn % 4096 }
    }

    proptest! {
        #[test]
        fn the_table_equals_a_map(operations in prop::collection::vec((0..3u8, any::<u8>()), 1..600)) {
            let mut table = Heads::new();
            let mut map = BTreeMap::new();
            for (turn, (kind, n)) in operations.into_iter().enumerate() {
                let new = place(n, turn as u32);
                match (kind, map.get(&n).copied()) {
                    (0, None) => { table.insert(key(n), new); map.insert(n, new); }
                    (1, Some(old)) => { table.remove(key(n), old); map.remove(&n); }
                    (_, Some(old)) => { table.moved(key(n), old, new); map.insert(n, new); }
                    (_, None) => { table.remove(key(n), new); }
                }
                for n in 0..=255u8 {
                    let found = table.find(key(n), |place| place.chain == u32::from(n) + 1);
                    prop_assert_eq!(found, map.get(&n).copied());
                    prop_assert!(found.is_none() || table.may_have(key(n)));
                }
                if map.is_empty() {
                    prop_assert!(table.parts.len() == 1 && table.parts[0].sieve.0.iter().all(|word| *word == 0));
                }
            }
        }
    }
}
