//! From a block's hash to where the block lies.
//!
//! Open addressing in many small parts, eight bytes an entry. An entry keeps 28 bits of the mixed hash and the place;
//! whether it is the block that is looked for is decided by the whole hash, which lies at the place. A part grows by
//! itself, so that no insertion waits for more than a few microseconds.
//!
//! Hashes are mixed with a secret seed: a tenant who can compute block hashes offline still cannot choose prompts that
//! crowd one part. Only speed depends on that, never a result.

use baton_proto::BlockHash;

/// Bits of the mixed hash that choose the part.
const PART_BITS: u32 = 14;
/// Bits of the mixed hash that an entry keeps.
const REST_BITS: u32 = 28;
const CHAIN_BITS: u32 = 24;
const POS_BITS: u32 = 12;

/// Most chains there can be: ids start at 1, so that no entry is zero.
pub(super) const MAX_CHAINS: usize = (1 << CHAIN_BITS) - 1;
/// Most blocks in one chain.
pub(super) const MAX_CHAIN: usize = 1 << POS_BITS;

/// Where a block lies: in which chain, and how far from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) chain: u32,
    pub(super) pos: u32,
}

/// A mixed hash, cut up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Key {
    part: u32,
    rest: u32,
}

#[derive(Clone, Debug, Default)]
struct Part {
    entries: Box<[u64]>,
    len: u32,
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    parts: Vec<Part>,
    seed: [u64; 2],
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
    fn home(&self, rest: u32) -> usize {
        ((u64::from(rest) * self.entries.len() as u64) >> REST_BITS) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    /// The steps from one entry forward to another.
    fn steps(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.entries.len() - from }
    }

    fn put(&mut self, entry: u64) {
        let mut at = self.home(rest_of(entry));
        while self.entries[at] != 0 {
            at = self.after(at);
        }
        self.entries[at] = entry;
    }

    fn resize(&mut self, capacity: usize) {
        let old = std::mem::replace(&mut self.entries, vec![0; capacity].into_boxed_slice());
        for entry in old {
            if entry != 0 {
                self.put(entry);
            }
        }
    }

    /// Makes room for one more. At most 13/16 are full; parts differ in where they start, so that they do not all
    /// grow at once.
    fn reserve(&mut self, part: u32) {
        let capacity = self.entries.len();
        if (self.len as usize + 1) * 16 > capacity * 13 {
            let grown = if capacity == 0 { 4 + part as usize % 4 } else { capacity + capacity / 2 };
            self.resize(grown);
        }
    }

    fn delete(&mut self, at: usize) {
        let (mut hole, mut next) = (at, self.after(at));
        loop {
            let entry = self.entries[next];
            if entry == 0 {
                break;
            }
            if self.steps(self.home(rest_of(entry)), next) >= self.steps(hole, next) {
                self.entries[hole] = entry;
                hole = next;
            }
            next = self.after(next);
        }
        self.entries[hole] = 0;
        self.len -= 1;
        let capacity = self.entries.len();
        if capacity > 64 && (self.len as usize) < capacity / 4 {
            self.resize(capacity / 2);
        }
    }

    fn position(&self, entry: u64) -> Option<usize> {
        let mut at = self.home(rest_of(entry));
        while self.entries[at] != 0 {
            if self.entries[at] == entry {
                return Some(at);
            }
            at = self.after(at);
        }
        None
    }
}

impl Table {
    pub(super) fn new(seed: u64) -> Self {
        // Any two odd-looking words do: the seed itself is the secret.
        let mix = |n: u64| (seed ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ seed;
        Self { parts: vec![Part::default(); 1 << PART_BITS], seed: [mix(1), mix(2)] }
    }

    /// Mixes a hash.
    pub(super) fn key(&self, hash: &BlockHash) -> Key {
        let (words, _) = hash.as_bytes().as_chunks::<8>();
        let (a, b) = (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]));
        let product = u128::from(a ^ self.seed[0]) * u128::from(b ^ self.seed[1]);
        let mixed = (product >> 64) as u64 ^ product as u64;
        Key {
            part: (mixed >> (64 - PART_BITS)) as u32,
            rest: (mixed >> (64 - PART_BITS - REST_BITS)) as u32 & ((1 << REST_BITS) - 1),
        }
    }

    /// Reads the entry where the search for the key starts. The caller adds up what many of these return, so that their
    /// cache misses overlap.
    pub(super) fn touch(&self, key: Key) -> u64 {
        let part = &self.parts[key.part as usize];
        part.entries.get(part.home(key.rest)).copied().unwrap_or(0)
    }

    /// The place of the key for which `is` says yes.
    #[inline]
    pub(super) fn find(&self, key: Key, mut is: impl FnMut(Place) -> bool) -> Option<Place> {
        let part = &self.parts[key.part as usize];
        if part.len == 0 {
            return None;
        }
        let mut at = part.home(key.rest);
        loop {
            let entry = part.entries[at];
            if entry == 0 {
                return None;
            }
            if rest_of(entry) == key.rest && is(place_of(entry)) {
                return Some(place_of(entry));
            }
            at = part.after(at);
        }
    }

    /// Puts in a key that is not there.
    pub(super) fn insert(&mut self, key: Key, place: Place) {
        let part = &mut self.parts[key.part as usize];
        part.reserve(key.part);
        part.put(entry(key.rest, place));
        part.len += 1;
    }

    /// Takes out what lies at the place.
    pub(super) fn remove(&mut self, key: Key, place: Place) {
        let part = &mut self.parts[key.part as usize];
        if part.len == 0 {
            return;
        }
        if let Some(at) = part.position(entry(key.rest, place)) {
            part.delete(at);
        }
    }

    /// The block moved.
    pub(super) fn moved(&mut self, key: Key, from: Place, to: Place) {
        let part = &mut self.parts[key.part as usize];
        if part.len == 0 {
            return;
        }
        if let Some(at) = part.position(entry(key.rest, from)) {
            part.entries[at] = entry(key.rest, to);
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
        Key { part: 3, rest: (u32::from(n % 16) << (REST_BITS - 4)) | u32::from(n) << 2 }
    }

    fn place(n: u8, turn: u32) -> Place {
        Place { chain: u32::from(n) + 1, pos: turn % 4096 }
    }

    proptest! {
        #[test]
        fn the_table_equals_a_map(operations in prop::collection::vec((0..3u8, any::<u8>()), 1..600)) {
            let mut table = Table::new(1);
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
                }
            }
        }
    }
}
