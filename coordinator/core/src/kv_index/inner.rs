//! From a block inside a chain to its chain.
//!
//! Every block that comes right behind a live one in its chain has an entry here, but few searches begin at such a block: at the
//! parent of what an engine stores, at the last of what it evicts. So an entry is made to be written fast, not read fast: five bytes, twelve to a
//! cache line, with 16 bits of the mixed hash and the chain's id. A search looks through the whole chain; an insertion and a removal
//! cost one cache miss each, which waits for no other. Entries with equal bits in one chain are as good as each other. Heads have
//! entries without a chain, so that an insertion tells what is none for certain with the same cache miss.
//!
//! A bucket is filled from its beginning; what finds its bucket full goes to the next one. At most three quarters of a part are
//! full. A part grows by itself, so that no insertion waits for more than some ten microseconds.

use super::key::{Key, MAX_CHAINS, PART_BITS, REST_BITS};

/// Bits of the mixed hash that an entry keeps.
const KEPT_BITS: u32 = 16;

/// Stands for the chain of a head: who looks for it asks the table of heads.
const HEAD: u32 = MAX_CHAINS as u32 + 1;

/// Entries of a bucket.
const ROOM: usize = 12;

/// What is kept of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The chain, and below it the low byte of the kept bits. Never 0.
    word: u32,
    /// The high byte of the kept bits.
    high: u8,
}

impl Entry {
    #[inline]
    fn new(key: Key, chain: u32) -> Self {
        let kept = key.rest >> (REST_BITS - KEPT_BITS);
        Self { word: chain << 8 | kept & 0xff, high: (kept >> 8) as u8 }
    }

    fn chain(self) -> u32 {
        self.word >> 8
    }

    fn kept(self) -> u32 {
        u32::from(self.high) << 8 | self.word & 0xff
    }
}

/// A cache line.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// By entry: [`Entry::word`]. Those behind the last are 0.
    words: [u32; ROOM],
    /// By entry: [`Entry::high`].
    highs: [u8; ROOM],
    len: u8,
    /// How many of its entries are of heads.
    heads: u8,
    /// How many entries lie further on because this bucket was full.
    passed: u16,
}

impl Bucket {
    #[inline]
    fn push(&mut self, entry: Entry) -> bool {
        let at = usize::from(self.len);
        if at >= ROOM {
            return false;
        }
        self.words[at] = entry.word;
        self.highs[at] = entry.high;
        self.heads += u8::from(entry.chain() == HEAD);
        self.len += 1;
        true
    }

    /// Where the entry lies. Without a branch for each of the others: none of them could be foretold, and each wrong guess would
    /// have the next cache miss wait for this one.
    #[inline]
    fn position(&self, entry: Entry) -> Option<usize> {
        let mut found = 0u32;
        for (at, word) in self.words.iter().enumerate() {
            found |= if *word == entry.word { 1 << at } else { 0 };
        }
        while found != 0 {
            let at = found.trailing_zeros() as usize;
            if self.highs[at] == entry.high {
                return Some(at);
            }
            found &= found - 1;
        }
        None
    }

    /// Takes an entry out; the last one takes its place.
    #[inline]
    fn take(&mut self, at: usize) {
        let last = usize::from(self.len) - 1;
        self.heads -= u8::from(self.words[at] >> 8 == HEAD);
        self.words[at] = self.words[last];
        self.highs[at] = self.highs[last];
        self.words[last] = 0;
        self.len -= 1;
    }

    fn entries(&self) -> impl Iterator<Item = Entry> {
        let entries = self.words.iter().zip(&self.highs).take(usize::from(self.len));
        entries.map(|(word, high)| Entry { word: *word, high: *high })
    }
}

#[derive(Clone, Debug, Default)]
struct Part {
    buckets: Box<[Bucket]>,
    len: u32,
}

impl Part {
    #[inline]
    fn home(&self, kept: u32) -> usize {
        (kept as usize * self.buckets.len()) >> KEPT_BITS
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    #[inline]
    fn put(&mut self, entry: Entry) {
        let mut at = self.home(entry.kept());
        while !self.buckets[at].push(entry) {
            self.buckets[at].passed = self.buckets[at].passed.saturating_add(1);
            at = self.after(at);
        }
    }

    #[inline]
    fn may_be_head(&self, key: Key) -> bool {
        let entry = Entry::new(key, HEAD);
        let home = self.buckets.get(self.home(entry.kept()));
        home.is_some_and(|home| home.heads > 0 || home.passed > 0) && self.position(entry).is_some()
    }

    #[inline]
    fn add(&mut self, key: Key, chain: u32) {
        let buckets = self.buckets.len();
        if (self.len as usize + 1) * 4 > buckets * ROOM * 3 {
            // Parts differ in how they grow, so that they do not all grow at once.
            self.resize(buckets + buckets / 2 + 1 + key.part as usize % 2);
        }
        self.put(Entry::new(key, chain));
        self.len += 1;
    }

    fn resize(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![Bucket::default(); buckets].into_boxed_slice());
        old.iter().flat_map(Bucket::entries).for_each(|entry| self.put(entry));
    }

    /// Where an entry lies, and how far from where it belongs.
    #[inline]
    fn position(&self, entry: Entry) -> Option<(usize, usize, usize)> {
        if self.len == 0 {
            return None;
        }
        let mut at = self.home(entry.kept());
        for steps in 0..self.buckets.len() {
            let bucket = &self.buckets[at];
            if let Some(slot) = bucket.position(entry) {
                return Some((at, slot, steps));
            }
            if bucket.passed == 0 {
                break;
            }
            at = self.after(at);
        }
        None
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Inner {
    parts: Vec<Part>,
}

impl Inner {
    pub(super) fn new() -> Self {
        Self { parts: vec![Part::default(); 1 << PART_BITS] }
    }

    /// Reads the bucket where the search for the key starts. The caller adds up what many of these return, so that their
    /// cache misses overlap.
    #[inline]
    pub(super) fn touch(&self, key: Key) -> u8 {
        let part = &self.parts[key.part as usize];
        part.buckets.get(part.home(Entry::new(key, 0).kept())).map_or(0, |bucket| bucket.len)
    }

    /// The first answer that `look` has for a chain that may hold the block.
    pub(super) fn find<T>(&self, key: Key, look: impl Fn(u32) -> Option<T>) -> Option<T> {
        let part = &self.parts[key.part as usize];
        if part.len == 0 {
            return None;
        }
        let kept = Entry::new(key, 0).kept();
        let mut at = part.home(kept);
        for _ in 0..part.buckets.len() {
            let bucket = &part.buckets[at];
            let equal = bucket.entries().filter(|entry| entry.kept() == kept && entry.chain() != HEAD);
            if let Some(found) = equal.map(Entry::chain).find_map(&look) {
                return Some(found);
            }
            if bucket.passed == 0 {
                break;
            }
            at = part.after(at);
        }
        None
    }

    /// Puts a block in, unless it may be a head. Returns whether it did.
    #[inline]
    pub(super) fn insert_unless_head(&mut self, key: Key, chain: u32) -> bool {
        let part = &mut self.parts[key.part as usize];
        if part.may_be_head(key) {
            return false;
        }
        part.add(key, chain);
        true
    }

    /// Puts a block in.
    #[inline]
    pub(super) fn insert(&mut self, key: Key, chain: u32) {
        self.parts[key.part as usize].add(key, chain);
    }

    /// A block is a head.
    pub(super) fn insert_head(&mut self, key: Key) {
        self.insert(key, HEAD);
    }

    /// A block is not a head any more.
    pub(super) fn remove_head(&mut self, key: Key) {
        self.remove(key, HEAD);
    }

    /// Takes a block out.
    #[inline]
    pub(super) fn remove(&mut self, key: Key, chain: u32) {
        let part = &mut self.parts[key.part as usize];
        let entry = Entry::new(key, chain);
        let Some((at, slot, steps)) = part.position(entry) else { return };
        part.buckets[at].take(slot);
        let mut passed = part.home(entry.kept());
        for _ in 0..steps {
            let bucket = &mut part.buckets[passed];
            // A counter that is at its end does not count any more: searches go on behind the bucket for nothing.
            bucket.passed -= u16::from(bucket.passed < u16::MAX);
            passed = part.after(passed);
        }
        part.len -= 1;
        let buckets = part.buckets.len();
        if buckets > 4 && part.len as usize * 4 < buckets * ROOM {
            part.resize(buckets / 2);
        }
    }

    /// The block is in another chain now.
    pub(super) fn moved(&mut self, key: Key, from: u32, to: u32) {
        let part = &mut self.parts[key.part as usize];
        if let Some((at, slot, _)) = part.position(Entry::new(key, from)) {
            part.buckets[at].words[slot] = Entry::new(key, to).word;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few distinct values of the kept bits, so that entries crowd and wrap around.
    fn key(n: u8) -> Key {
        let kept = u32::from(n % 8) << (KEPT_BITS - 3) | u32::from(n % 3);
        Key { part: 3, rest: kept << (REST_BITS - KEPT_BITS) }
    }

    proptest! {
        #[test]
        fn the_table_equals_a_list(operations in prop::collection::vec((0..7u8, any::<u8>(), 1..6u32), 1..400)) {
            let mut table = Inner::new();
            let mut list: Vec<(u32, u32)> = Vec::new();
            for (kind, n, chain) in operations {
                let (key, other) = (key(n), chain % 5 + 1);
                let at = |list: &[(u32, u32)], chain| list.iter().position(|entry| *entry == (key.rest, chain));
                match kind {
                    0 | 1 => {
                        table.insert(key, chain);
                        list.push((key.rest, chain));
                    }
                    2 => {
                        table.remove(key, chain);
                        at(&list, chain).map(|at| list.swap_remove(at));
                    }
                    3 => {
                        table.moved(key, chain, other);
                        if let Some(at) = at(&list, chain) {
                            list[at].1 = other;
                        }
                    }
                    4 => {
                        table.insert_head(key);
                        list.push((key.rest, HEAD));
                    }
                    5 => {
                        table.remove_head(key);
                        at(&list, HEAD).map(|at| list.swap_remove(at));
                    }
                    _ => {
                        let new = at(&list, HEAD).is_none();
                        prop_assert_eq!(table.insert_unless_head(key, chain), new);
                        if new {
                            list.push((key.rest, chain));
                        }
                    }
                }
                for n in 0..24u8 {
                    let key = self::key(n);
                    let found = std::cell::RefCell::new(Vec::new());
                    let none: Option<()> = table.find(key, |chain| {
                        found.borrow_mut().push(chain);
                        None
                    });
                    prop_assert_eq!(none, None);
                    let mut found = found.into_inner();
                    let here = list.iter().filter(|entry| entry.0 == key.rest && entry.1 != HEAD);
                    let mut expected: Vec<u32> = here.map(|entry| entry.1).collect();
                    found.sort_unstable();
                    expected.sort_unstable();
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}
