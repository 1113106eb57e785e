//! Texts that begin alike are tokenised, and their blocks hashed, once.
//!
//! A text is cut into stretches: each ends at the first safe cut (see [`super::words`]) that is [`FIRST`] bytes, further in
//! the text [`LATER`] bytes, or more behind its start. Where a stretch ends depends on nothing but the text up to
//! there, so texts with a common beginning share all stretches that lie within it. At a safe cut the ids of the whole
//! are the ids of the parts, one after the other; so a stretch's ids are remembered, with the stretch before it, and a
//! text that begins with known stretches is tokenised from there on only. The hashes of the blocks that end in a stretch are remembered with it.
//! Where texts part within a stretch, what they share of it is cut into finer stretches, and what they share of the last of these into finer ones
//! still ([`LEVELS`]): so all but some tens of bytes of what texts share is known.
//! A tokenizer without safe cuts has no such cache.
//!
//! # What one client may do to another
//! A stretch is found by a keyed 64-bit hash that chains over the stretches before it, and then taken only if its text and
//! the stretch before it are the very same: a collision costs a hit, never another text's ids. The first stretch hangs on a
//! root that is named by all that the blocks' hashes depend on besides the tokens. So texts under different cache
//! salts or adapters share nothing, not even the time that a hit saves.
//!
//! # Memory
//! A stretch is remembered when it comes for the second time, so text that is never repeated stays out. What is remembered for one
//! model takes at most [`CAPACITY`] bytes: it is kept in two generations; what is asked for moves to the young
//! one, and when that holds half of the bytes the old one is dropped and the young one becomes old.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};

use baton_proto::block_hash::BlockHasher;
use baton_proto::{BlockHash, ContentKeys};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::words::safe_cut;

/// Most bytes that the stretches of one model take: text, ids, hashes, and what surrounds them.
const CAPACITY: usize = 128 << 20;
/// Least bytes of a stretch at the start of a text.
const FIRST: usize = 512;
/// From here on stretches are longer.
const FIRST_UNTIL: usize = 4 << 10;
/// Least bytes of a further stretch.
const LATER: usize = 1 << 10;
/// Stretches are so many times as long as those of the next level.
const FINER: usize = 4;
/// Lengths of stretches.
const LEVELS: usize = 3;
/// A cut that is not found within so many times a stretch's least bytes is not looked for: the text is not made of words.
const SEARCH: usize = 2;
/// Stretches that came once are remembered by their hash; so many of them.
const ONCE: usize = 1 << 17;
/// Kinds of blocks (namespace and size) whose hashes are remembered with a stretch; those of any further one are
/// computed each time.
const KINDS: usize = 2;
/// What a stretch takes besides its text, ids and hashes: its own fields, its allocations, and a place in a table.
const OVERHEAD: usize = 256;

/// A part of a text between two safe cuts, and what comes before it.
#[derive(Debug)]
pub(super) struct Stretch {
    serial: u64,
    /// The serial of the stretch before it; of a first one, 0.
    before: u64,
    /// What the text hangs on; of a first one only.
    root: Option<Root>,
    text: Box<str>,
    ids: Box<[u32]>,
    kinds: [OnceLock<Hashed>; KINDS],
}

/// Hashes of the blocks that end in a stretch.
#[derive(Debug)]
struct Hashed {
    namespace: Box<str>,
    block_size: u32,
    hashes: Box<[BlockHash]>,
}

impl Hashed {
    fn is(&self, namespace: &str, block_size: u32) -> bool {
        self.block_size == block_size && *self.namespace == *namespace
    }
}

impl Stretch {
    fn bytes(&self) -> usize {
        // Hashes are counted before they are there, for blocks of 16 tokens.
        self.text.len() + self.ids.len() * (size_of::<u32>() + KINDS) + OVERHEAD
    }

    fn hashed(&self, namespace: &str, block_size: u32) -> Option<&[BlockHash]> {
        let kind = self.kinds.iter().filter_map(OnceLock::get).find(|kind| kind.is(namespace, block_size))?;
        Some(&kind.hashes)
    }

    fn remember(&self, namespace: &str, block_size: u32, hashes: &[BlockHash]) {
        // Smaller blocks would take more than what was counted.
        if block_size >= 16 {
            let kind = || Hashed { namespace: namespace.into(), block_size, hashes: hashes.into() };
            if let Some(free) = self.kinds.iter().find(|kind| kind.get().is_none()) {
                let _ = free.set(kind());
            }
        }
    }
}

/// What the blocks of a text depend on besides its own tokens: 128 bits, so nobody finds two with the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Root {
    keys: BlockHash,
    /// Whether the tokenizer's own tokens are put around the text.
    special: bool,
}

impl Root {
    fn new(keys: &ContentKeys, special: bool) -> Self {
        let keys = BlockHasher::new("content keys").block(None, &[], keys.of_block(0, 1));
        Self { keys, special }
    }
}

/// What a text's beginning is known to be.
#[derive(Debug)]
pub(super) struct Known {
    root: Root,
    stretches: Vec<Arc<Stretch>>,
    /// Bytes of text that they cover.
    pub(super) bytes: usize,
    /// How far those of each level go, and of those before it: how many they are, and where the last one ends.
    ends: [(usize, At); LEVELS],
}

/// A place between two stretches.
#[derive(Clone, Copy, Debug)]
struct At {
    byte: usize,
    /// Of the stretches before it, chained.
    hash: u64,
    /// The level of the stretch that comes next.
    level: usize,
}

impl At {
    /// The stretch that begins here: its text, and the place behind it.
    fn next<'t>(&self, text: &'t str) -> Option<(&'t str, At)> {
        let end = end_of_stretch(text, self.byte, self.level)?;
        let part = &text[self.byte..end];
        let hash = xxh3_64_with_seed(part.as_bytes(), self.hash);
        Some((part, At { byte: end, hash, level: self.level }))
    }

    /// Notes that so many stretches end here.
    fn note(&self, count: usize, ends: &mut [(usize, At); LEVELS]) {
        for (level, end) in ends.iter_mut().enumerate().skip(self.level) {
            *end = (count, At { level, ..*self });
        }
    }
}

type Table = HashMap<u64, Arc<Stretch>, BuildHasherDefault<Hash>>;

/// The keys are hashes already.
#[derive(Default)]
struct Hash(u64);

impl Hasher for Hash {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Default)]
struct Generations {
    young: Table,
    old: Table,
    young_bytes: usize,
}

impl Generations {
    fn get(&self, key: u64) -> Option<(&Arc<Stretch>, bool)> {
        self.young.get(&key).map(|found| (found, true)).or_else(|| Some((self.old.get(&key)?, false)))
    }

    fn put(&mut self, key: u64, stretch: Arc<Stretch>, half: usize) {
        let bytes = stretch.bytes();
        if self.young_bytes + bytes > half {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        self.young_bytes += bytes;
        if let Some(replaced) = self.young.insert(key, stretch) {
            self.young_bytes -= replaced.bytes();
        }
    }
}

/// The stretches of one model.
pub(super) struct Prefixes {
    generations: RwLock<Generations>,
    once: Box<[AtomicU64]>,
    serials: AtomicU64,
    seed: u64,
    half: usize,
}

const POISON: &str = "no code that holds this lock panics";

impl Default for Prefixes {
    fn default() -> Self {
        Self::new(CAPACITY)
    }
}

impl Prefixes {
    fn new(capacity: usize) -> Self {
        Self {
            generations: RwLock::default(),
            once: (0..ONCE).map(|_| AtomicU64::new(0)).collect(),
            serials: AtomicU64::new(1),
            seed: rand::random(),
            half: capacity / 2,
        }
    }

    /// How much of the text is known.
    pub(super) fn find(&self, text: &str, keys: &ContentKeys, special: bool) -> Known {
        let root = Root::new(keys, special);
        let mut at = At { byte: 0, hash: self.first_hash(root), level: 0 };
        let mut stretches: Vec<Arc<Stretch>> = Vec::new();
        let mut ends = [(0, at); LEVELS];
        at.note(0, &mut ends);
        let mut old = Vec::new();
        {
            let generations = self.generations.read().expect(POISON);
            while at.level < LEVELS {
                let found = at.next(text).and_then(|(part, behind)| {
                    let (found, young) = generations.get(behind.hash)?;
                    let is_next = match stretches.last() {
                        Some(last) => found.before == last.serial,
                        None => found.root == Some(root),
                    };
                    (is_next && *found.text == *part).then_some((found, young, behind))
                });
                let Some((found, young, behind)) = found else {
                    at.level += 1;
                    continue;
                };
                if !young {
                    old.push((behind.hash, found.clone()));
                }
                stretches.push(found.clone());
                at = behind;
                at.note(stretches.len(), &mut ends);
            }
        }
        if !old.is_empty() {
            let mut generations = self.generations.write().expect(POISON);
            for (key, stretch) in old {
                if !generations.young.contains_key(&key) {
                    generations.put(key, stretch, self.half);
                }
            }
        }
        Known { root, stretches, bytes: at.byte, ends }
    }

    /// Tokenises what is not known, and remembers of it what came before in an earlier text.
    pub(super) fn complete<E>(
        &self,
        text: &str,
        mut known: Known,
        encode: impl Fn(&str) -> Result<Vec<u32>, E>,
    ) -> Result<Tokens, E> {
        let mut new = Vec::new();
        for level in 0..LEVELS {
            let (count, mut at) = known.ends[level];
            let again = self.again(text, at);
            if again.is_empty() {
                continue;
            }
            // Finer stretches that lie within these are not needed any more.
            known.stretches.truncate(count);
            for behind in again {
                let part = &text[at.byte..behind.byte];
                let stretch = Arc::new(self.stretch(&known, part, encode(part)?));
                new.push((behind.hash, stretch.clone()));
                known.stretches.push(stretch);
                at = behind;
            }
            at.note(known.stretches.len(), &mut known.ends);
            known.bytes = at.byte;
        }
        let rest = encode(&text[known.bytes..])?;
        if !new.is_empty() {
            let mut generations = self.generations.write().expect(POISON);
            for (key, stretch) in new {
                generations.put(key, stretch, self.half);
            }
        }
        let tokens = known.stretches.iter().map(|stretch| stretch.ids.len()).sum::<usize>() + rest.len();
        Ok(Tokens { before: Vec::new(), stretches: known.stretches, rest, count: tokens })
    }

    /// The places behind the stretches from here on that came before in an earlier text; from now on all of this level did.
    fn again(&self, text: &str, mut at: At) -> Vec<At> {
        // A stretch's hash chains over all before it: where one came before, they did, too, also where something else took their
        // slots since.
        let (mut places, mut again) = (Vec::new(), 0);
        // So many make a stretch of the level before.
        let most = if at.level == 0 { usize::MAX } else { FINER };
        while let Some((_, behind)) = at.next(text).filter(|_| places.len() < most) {
            let slot = &self.once[(behind.hash % ONCE as u64) as usize];
            places.push(behind);
            if slot.swap(behind.hash, Ordering::Relaxed) == behind.hash {
                again = places.len();
            }
            at = behind;
        }
        places.truncate(again);
        places
    }

    /// A stretch behind those that are known.
    fn stretch(&self, known: &Known, text: &str, ids: Vec<u32>) -> Stretch {
        let (before, root) = match known.stretches.last() {
            Some(last) => (last.serial, None),
            None => (0, Some(known.root)),
        };
        Stretch {
            serial: self.serials.fetch_add(1, Ordering::Relaxed),
            before,
            root,
            text: text.into(),
            ids: ids.into(),
            kinds: Default::default(),
        }
    }

    fn first_hash(&self, root: Root) -> u64 {
        xxh3_64_with_seed(root.keys.as_bytes(), self.seed ^ u64::from(root.special))
    }
}

/// Where the stretch of a level that begins at `start` ends; `None` where the text ends before, or has no cut.
fn end_of_stretch(text: &str, start: usize, level: usize) -> Option<usize> {
    let length = if start < FIRST_UNTIL { FIRST } else { LATER } / FINER.pow(level as u32);
    let (least, most) = (start + length, start + length * SEARCH);
    let bytes = text.as_bytes();
    let mut from = least;
    while let Some(found) = bytes.get(from..)?.iter().take(most - from).position(|byte| *byte == b' ') {
        let at = from + found;
        if safe_cut(text, at) {
            return Some(at);
        }
        from = at + 1;
        if from >= most {
            break;
        }
    }
    None
}

/// The token ids of a prompt, known stretches first.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// Ids that stand before the text.
    before: Vec<u32>,
    stretches: Vec<Arc<Stretch>>,
    rest: Vec<u32>,
    count: usize,
}

impl From<Vec<u32>> for Tokens {
    fn from(ids: Vec<u32>) -> Self {
        Self { count: ids.len(), rest: ids, ..Self::default() }
    }
}

impl Tokens {
    /// Puts ids around these; for ids straight from the cache, at most once.
    pub(super) fn surround(mut self, before: &[u32], after: &[u32]) -> Self {
        self.before = [before, &self.before].concat();
        self.rest.extend_from_slice(after);
        self.count += before.len() + after.len();
        self
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The ids.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.count);
        self.parts().for_each(|part| ids.extend_from_slice(part));
        ids
    }

    /// The hashes of all whole blocks, as [`BlockHasher::chain`] gives them. `keys` must be those under which the tokens were
    /// found.
    pub fn block_hashes(&self, namespace: &str, block_size: u32, keys: &ContentKeys) -> Vec<BlockHash> {
        let size = block_size as usize;
        let mut chain = Chain {
            hasher: BlockHasher::new(namespace),
            keys,
            size,
            hashes: Vec::with_capacity(self.count / size),
            open: Vec::new(),
        };
        chain.extend(&self.before);
        let mut seen = self.before.len();
        for (i, stretch) in self.stretches.iter().enumerate() {
            match stretch.hashed(namespace, block_size) {
                Some(hashes) => {
                    chain.hashes.extend_from_slice(hashes);
                    // What follows the last whole block is read when it is needed.
                    chain.open.clear();
                }
                None => {
                    self.reopen(&mut chain, seen, i);
                    let done = chain.hashes.len();
                    chain.extend(&stretch.ids);
                    stretch.remember(namespace, block_size, &chain.hashes[done..]);
                }
            }
            seen += stretch.ids.len();
        }
        self.reopen(&mut chain, seen, self.stretches.len());
        chain.extend(&self.rest);
        chain.hashes
    }

    /// Gives the chain the ids of the block that is open behind `seen` tokens, the first `stretches` stretches included.
    fn reopen(&self, chain: &mut Chain<'_>, seen: usize, stretches: usize) {
        let mut missing = seen % chain.size;
        if chain.open.len() == missing {
            return;
        }
        chain.open.clear();
        let mut parts = Vec::new();
        let known = self.stretches[..stretches].iter().rev().map(|stretch| &*stretch.ids);
        for ids in known.chain([self.before.as_slice()]) {
            let part = &ids[ids.len().saturating_sub(missing)..];
            missing -= part.len();
            parts.push(part);
            if missing == 0 {
                break;
            }
        }
        parts.iter().rev().for_each(|part| chain.open.extend_from_slice(part));
    }

    fn parts(&self) -> impl Iterator<Item = &[u32]> {
        let known = self.stretches.iter().map(|stretch| &*stretch.ids);
        [self.before.as_slice()].into_iter().chain(known).chain([self.rest.as_slice()])
    }
}

/// A chain of block hashes that grows by tokens.
struct Chain<'a> {
    hasher: BlockHasher,
    keys: &'a ContentKeys,
    size: usize,
    hashes: Vec<BlockHash>,
    /// Ids of the block that is not whole yet.
    open: Vec<u32>,
}

impl Chain<'_> {
    fn extend(&mut self, mut ids: &[u32]) {
        if !self.open.is_empty() {
            let some = ids.len().min(self.size - self.open.len());
            self.open.extend_from_slice(&ids[..some]);
            ids = &ids[some..];
            if self.open.len() < self.size {
                return;
            }
            let block = std::mem::take(&mut self.open);
            self.push(&block);
        }
        let blocks = ids.chunks_exact(self.size);
        self.open.extend_from_slice(blocks.remainder());
        blocks.for_each(|block| self.push(block));
    }

    fn push(&mut self, block: &[u32]) {
        let start = self.hashes.len() * self.size;
        let extra = self.keys.of_block(start, start + self.size);
        let hash = self.hasher.block(self.hashes.last().copied(), block, extra);
        self.hashes.push(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, tokenizers, whole};
    use super::*;
    use proptest::prelude::*;
    use tokenizers::Tokenizer;

    fn salted(salt: &str) -> ContentKeys {
        ContentKeys { salt: Some(salt.to_owned()), ..ContentKeys::default() }
    }

    fn tokens(prefixes: &Prefixes, tokenizer: &Tokenizer, text: &str, keys: &ContentKeys) -> Tokens {
        let known = prefixes.find(text, keys, false);
        prefixes.complete(text, known, |part| Ok::<_, ()>(whole(tokenizer, part))).unwrap()
    }

    /// How many bytes of the text are known.
    fn known(prefixes: &Prefixes, text: &str, keys: &ContentKeys) -> usize {
        prefixes.find(text, keys, false).bytes
    }

    /// Ordinary words, and bits that are not.
    fn long() -> impl Strategy<Value = String> {
        let word = prop::sample::select(vec![" some", " words", " to", " cut", " between"]);
        let some = prop_oneof![4 => word.boxed(), 1 => bits().boxed()];
        prop::collection::vec(some, 0..900).prop_map(|bits| bits.concat())
    }

    /// Cuts a text at the character that begins at `at` or before.
    fn cut(text: &str, at: usize) -> &str {
        let at = (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        &text[..at]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn ids_and_hashes_are_those_of_the_whole_text(
            text in long(), other in long(), at in 0usize..5000, which in 0usize..6,
            before in prop::collection::vec(0u32..9, 0..20), salt in any::<bool>(),
        ) {
            let tokenizer = &tokenizers()[which];
            let prefixes = Prefixes::default();
            let keys = if salt { salted("s") } else { ContentKeys::default() };
            let partly = format!("{}{other}", cut(&text, at));
            for (when, text) in [
                ("cold", &text), ("again", &text), ("warm", &text),
                ("partly warm", &partly), ("partly again", &partly), ("partly known", &partly), ("still", &text),
            ] {
                let found = tokens(&prefixes, tokenizer, text, &keys).surround(&before, &[7]);
                let expected = [&before[..], &whole(tokenizer, text), &[7]].concat();
                prop_assert_eq!(&found.to_vec(), &expected, "{}", when);
                prop_assert_eq!(found.len(), expected.len());
                // Three kinds: one more than is remembered.
                for (namespace, size) in [("m", 16), ("m", 40), ("n", 3), ("m", 16)] {
                    let blocks = &expected[..expected.len() / size * size];
                    let hashes = BlockHasher::new(namespace).chain(blocks, size, &keys);
                    prop_assert_eq!(&found.block_hashes(namespace, size as u32, &keys), &hashes, "{}", when);
                }
            }
            // A stretch is known from the third time on, if there is one.
            if let Some(end) = end_of_stretch(&text, 0, 0) {
                prop_assert!(known(&prefixes, &text, &keys) >= end);
            }
        }
    }

    /// So many bytes of numbered words.
    fn numbered(from: usize, bytes: usize) -> String {
        let mut text = String::from("x");
        for n in from.. {
            if text.len() >= bytes {
                return text;
            }
            text.push_str(&format!(" w{n}"));
        }
        text
    }

    fn encode(text: &str) -> Result<Vec<u32>, ()> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn learn(prefixes: &Prefixes, text: &str, keys: &ContentKeys) -> Tokens {
        let twice = || prefixes.complete(text, prefixes.find(text, keys, false), encode).unwrap();
        twice();
        twice()
    }

    #[test]
    fn many_long_texts_are_known_after_they_came_twice() {
        // More stretches than slots have room for without collisions: some 15,000 of 65,536.
        let prefixes = Prefixes::default();
        let none = ContentKeys::default();
        let texts: Vec<String> = (0..64).map(|n| numbered(n * 1_000_000, 220_000)).collect();
        let encode = |part: &str| Ok::<_, ()>(vec![1; part.len() / 4]);
        for _ in 0..2 {
            for text in &texts {
                prefixes.complete(text, prefixes.find(text, &none, false), encode).unwrap();
            }
        }
        let known =
            texts.iter().filter(|text| text.len() - known(&prefixes, text, &none) < 10 * LATER).count();
        assert!(known >= 60, "{known}");
    }

    #[test]
    fn a_text_is_known_after_it_came_twice_and_what_it_shares_with_another_too() {
        let prefixes = Prefixes::default();
        let text = numbered(0, 20_000);
        let none = ContentKeys::default();
        assert_eq!(known(&prefixes, &text, &none), 0);
        let once = prefixes.complete(&text, prefixes.find(&text, &none, false), encode).unwrap();
        assert_eq!((known(&prefixes, &text, &none), once.len()), (0, text.len()));
        learn(&prefixes, &text, &none);
        assert!(text.len() - known(&prefixes, &text, &none) < LATER + 10);
        let fork = format!("{} and other words", cut(&text, 10_000));
        let shared = known(&prefixes, &fork, &none);
        assert!((10_000 - LATER - 10..10_000).contains(&shared), "{shared}");
        assert_eq!(known(&prefixes, &format!("y{text}"), &none), 0);
    }

    #[test]
    fn what_texts_share_is_known_nearly_to_its_end() {
        let prefixes = Prefixes::default();
        let none = ContentKeys::default();
        let unknown =
            |shared: &str| shared.len().saturating_sub(known(&prefixes, &format!("{shared} but"), &none));
        let send = |shared: &str, n: usize| {
            let text = format!("{shared} {}", numbered(n * 10_000, 300));
            let known = prefixes.find(&text, &none, false);
            assert_eq!(prefixes.complete(&text, known, encode).unwrap().to_vec(), encode(&text).unwrap());
        };
        for bytes in [300, 3_000, 10_000, 10_500, 30_000] {
            let shared = numbered(bytes, bytes);
            (1..=4).for_each(|n| send(&shared, n));
            assert!(unknown(&shared) < LATER / FINER.pow(2) + 10, "{bytes}: {}", unknown(&shared));
            // What follows is cut into long stretches again, from where the long ones ended.
            let longer = shared + &numbered(bytes + 50_000, 5_000)[1..];
            (1..=4).for_each(|n| send(&longer, n));
            assert!(unknown(&longer) < LATER / FINER.pow(2) + 10, "{bytes}: {}", unknown(&longer));
            let stretches = prefixes.find(&longer, &none, false).stretches.len();
            assert!(
                stretches <= longer.len() / LATER + FIRST_UNTIL / FIRST + 2 * FINER,
                "{bytes}: {stretches}"
            );
        }
    }

    #[test]
    fn salts_and_the_tokenizers_own_tokens_share_nothing() {
        let prefixes = Prefixes::default();
        let text = numbered(0, 5_000);
        learn(&prefixes, &text, &salted("a"));
        assert!(known(&prefixes, &text, &salted("a")) > 3_000);
        assert_eq!(known(&prefixes, &text, &salted("b")), 0);
        assert_eq!(known(&prefixes, &text, &ContentKeys::default()), 0);
        let lora = ContentKeys { lora: Some("a".into()), ..ContentKeys::default() };
        assert_eq!(known(&prefixes, &text, &lora), 0);
        assert_eq!(prefixes.find(&text, &salted("a"), true).bytes, 0);
    }

    #[test]
    fn a_collision_is_a_miss() {
        let prefixes = Prefixes::default();
        let none = ContentKeys::default();
        let (one, other) = (numbered(0, 2_000), numbered(5, 2_000));
        learn(&prefixes, &one, &none);
        // The first stretch of the other text, under the hash of the first one's.
        let keys = |text: &str| {
            let first = &text[..end_of_stretch(text, 0, 0).unwrap()];
            xxh3_64_with_seed(first.as_bytes(), prefixes.first_hash(Root::new(&none, false)))
        };
        {
            let mut generations = prefixes.generations.write().unwrap();
            let stretch = generations.young[&keys(&one)].clone();
            generations.young.insert(keys(&other), stretch);
        }
        assert_eq!(known(&prefixes, &other, &none), 0);
        // The right text behind another one is no hit either.
        let second = {
            let first = end_of_stretch(&one, 0, 0).unwrap();
            let end = end_of_stretch(&one, first, 0).unwrap();
            xxh3_64_with_seed(&one.as_bytes()[first..end], keys(&one))
        };
        {
            let mut generations = prefixes.generations.write().unwrap();
            let stretch = generations.young[&second].clone();
            generations.young.insert(keys(&one), stretch);
        }
        assert_eq!(known(&prefixes, &one, &none), 0);
    }

    #[test]
    fn memory_is_bounded_and_what_is_asked_for_stays() {
        let prefixes = Prefixes::new(1 << 20);
        let none = ContentKeys::default();
        let kept = numbered(0, 8_000);
        learn(&prefixes, &kept, &none).block_hashes("m", 16, &none);
        for n in 1..100 {
            learn(&prefixes, &numbered(n * 1_000_000, 20_000), &none);
            assert!(known(&prefixes, &kept, &none) > 6_000, "round {n}");
            let generations = prefixes.generations.read().unwrap();
            let bytes = |table: &Table| table.values().map(|stretch| stretch.bytes()).sum::<usize>();
            assert_eq!(bytes(&generations.young), generations.young_bytes);
            assert!(bytes(&generations.young) + bytes(&generations.old) <= 1 << 20);
        }
        assert_eq!(known(&prefixes, &numbered(1_000_000, 20_000), &none), 0, "the oldest went");
    }

    #[test]
    fn a_text_without_words_is_tokenised_whole() {
        let prefixes = Prefixes::default();
        let none = ContentKeys::default();
        for text in ["x".repeat(10_000), " ".repeat(10_000), "日本".repeat(3_000)] {
            assert_eq!(learn(&prefixes, &text, &none).to_vec(), encode(&text).unwrap());
            assert_eq!(known(&prefixes, &text, &none), 0);
        }
    }
}
