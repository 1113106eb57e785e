//! From a block inside a chain to its chain.
//!
//! Every block that comes right behind a live one in its chain has an entry here, but few searches begin at such a block: at the
//! parent of what an engine stores, at the last of what it evicts. So an entry is made to be written fast, not read fast: five bytes,
//! twelve to a cache line, with 16 bits of the mixed hash and the chain's id. A search looks through the whole chain; entries with
//! equal bits in one chain are as good as each other.
//!
//! Hashes are random, so each change touches another cache line, and where the table is larger than the cache, another page. So
//! changes wait in a log of their part, and are made together when the log is full: a part and its log fit the nearest caches. A
//! search reads the log too. It need not heed what was taken out: the chain itself tells whether the block lives there.
//!
//! A bucket is filled from its beginning; what finds its bucket full goes to the next one. At most three quarters of a part are
//! full. A part grows by itself, and the logs are of different lengths, so that no change waits for more than some ten microseconds.

use super::key::{Key, PART_BITS, REST_BITS};

/// Bits of the mixed hash that an entry keeps.
const KEPT_BITS: u32 = 16;

/// Entries of a bucket.
const ROOM: usize = 12;

/// Changes that the shortest log holds; the longest holds nearly twice as many. The fewer, the more often a part is fetched; the
/// more, the longer a search reads.
const LOG: usize = 128;

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

/// A change that is not made yet: whether it puts the entry in or takes it out, and the entry.
#[derive(Clone, Copy, Debug)]
struct Change(u64);

impl Change {
    const OUT: u64 = 1 << 40;

    #[inline]
    fn new(entry: Entry, out: bool) -> Self {
        Self(u64::from(entry.high) << 32 | u64::from(entry.word) | if out { Self::OUT } else { 0 })
    }

    fn entry(self) -> Entry {
        Entry { word: self.0 as u32, high: (self.0 >> 32) as u8 }
    }

    fn is_out(self) -> bool {
        self.0 & Self::OUT != 0
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
    /// Entries in the buckets.
    len: u32,
    /// Changes to be made, in this order.
    log: Vec<Change>,
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

    /// Makes all changes.
    #[inline(never)]
    fn settle(&mut self, part: u32) {
        let log = std::mem::take(&mut self.log);
        // Reading all that will be changed has the cache misses overlap.
        let first = |change: &Change| self.buckets.get(self.home(change.entry().kept()));
        let read = log.iter().filter_map(first).map(|bucket| bucket.len);
        std::hint::black_box(read.fold(0, |read, len| read | len));
        for change in &log {
            if change.is_out() {
                self.take(change.entry());
            } else {
                self.reserve(part);
                self.put(change.entry());
                self.len += 1;
            }
        }
        self.log = log;
        self.log.clear();
        let buckets = self.buckets.len();
        if buckets > 4 && self.len as usize * 4 < buckets * ROOM {
            self.resize(buckets / 2);
        }
    }

    /// Makes room for one more. Parts differ in how they grow, so that they do not all grow at once.
    fn reserve(&mut self, part: u32) {
        let buckets = self.buckets.len();
        if (self.len as usize + 1) * 4 > buckets * ROOM * 3 {
            self.resize(buckets + buckets / 2 + 1 + part as usize % 2);
        }
    }

    fn put(&mut self, entry: Entry) {
        let mut at = self.home(entry.kept());
        while !self.buckets[at].push(entry) {
            self.buckets[at].passed = self.buckets[at].passed.saturating_add(1);
            at = self.after(at);
        }
    }

    fn take(&mut self, entry: Entry) {
        let Some((at, slot, steps)) = self.position(entry) else { return };
        self.buckets[at].take(slot);
        let mut passed = self.home(entry.kept());
        for _ in 0..steps {
            let bucket = &mut self.buckets[passed];
            // A counter that is at its end does not count any more: searches go on behind the bucket for nothing.
            bucket.passed -= u16::from(bucket.passed < u16::MAX);
            passed = self.after(passed);
        }
        self.len -= 1;
    }

    fn resize(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![Bucket::default(); buckets].into_boxed_slice());
        old.iter().flat_map(Bucket::entries).for_each(|entry| self.put(entry));
    }

    /// Where an entry lies, and how far from where it belongs.
    #[inline]
    fn position(&self, entry: Entry) -> Option<(usize, usize, usize)> {
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

    /// The first answer that `look` has for a chain that may hold the block.
    pub(super) fn find<T>(&self, key: Key, look: impl Fn(u32) -> Option<T>) -> Option<T> {
        let part = &self.parts[key.part as usize];
        let kept = Entry::new(key, 0).kept();
        let late = part.log.iter().filter(|change| !change.is_out()).map(|change| change.entry());
        if let Some(found) = late.filter(|entry| entry.kept() == kept).map(Entry::chain).find_map(&look) {
            return Some(found);
        }
        let mut at = part.home(kept);
        for _ in 0..part.buckets.len() {
            let bucket = &part.buckets[at];
            let equal = bucket.entries().filter(|entry| entry.kept() == kept);
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

    /// Puts a block in.
    #[inline]
    pub(super) fn insert(&mut self, key: Key, chain: u32) {
        self.change(key, chain, false);
    }

    /// Takes a block out.
    #[inline]
    pub(super) fn remove(&mut self, key: Key, chain: u32) {
        self.change(key, chain, true);
    }

    /// The block is in another chain now.
    pub(super) fn moved(&mut self, key: Key, from: u32, to: u32) {
        self.remove(key, from);
        self.insert(key, to);
    }

    #[inline]
    fn change(&mut self, key: Key, chain: u32, out: bool) {
        let part = &mut self.parts[key.part as usize];
        let full = LOG + key.part as usize % LOG;
        if part.log.capacity() == 0 {
            // All at once: what grows step by step leaves holes among the chains' hashes.
            part.log.reserve_exact(full);
        }
        part.log.push(Change::new(Entry::new(key, chain), out));
        if part.log.len() >= full {
            part.settle(key.part);
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
        fn the_table_equals_a_list(operations in prop::collection::vec((0..32u8, any::<u8>(), 1..6u32), 1..600)) {
            let mut table = Inner::new();
            let mut list: Vec<(u32, u32)> = Vec::new();
            for (kind, n, chain) in operations {
                let (key, other) = (key(n), chain % 5 + 1);
                let at = |list: &[(u32, u32)], chain| list.iter().position(|entry| *entry == (key.rest, chain));
                match kind {
                    0..16 => {
                        table.insert(key, chain);
                        list.push((key.rest, chain));
                    }
                    // Only what is there is taken out.
                    16..24 => if let Some(at) = at(&list, chain) {
                        table.remove(key, chain);
                        list.swap_remove(at);
                    },
                    24..31 => if let Some(at) = at(&list, chain) {
                        table.moved(key, chain, other);
                        list[at].1 = other;
                    },
                    _ => table.parts[3].settle(3),
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
                    let here = list.iter().filter(|entry| entry.0 == key.rest);
                    let mut expected: Vec<u32> = here.map(|entry| entry.1).collect();
                    found.sort_unstable();
                    expected.sort_unstable();
                    if table.parts[3].log.is_empty() {
                        prop_assert_eq!(&found, &expected);
                    }
                    for chain in expected {
                        prop_assert!(found.contains(&chain));
                    }
                }
            }
        }
    }
}
