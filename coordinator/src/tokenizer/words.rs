//! Tokenising word by word, from a cache, with exactly the ids of the whole text.
//!
//! A text is cut before every space that stands alone between two visible characters. For the pre-tokenizers in
//! [`SAFE_PATTERNS`] such a place is always a token boundary, and nothing on one side of it shows on the other:
//!
//! - No alternative of these patterns matches a space behind a character that is no white space, so whatever
//!   matches before the cut ends at it, cut or not.
//! - Their only look-ahead, `\s+(?!\S)`, is taken behind white space, and no piece ends in white space unless the text does.
//! - `Digits` looks at one character, `ByteLevel` maps bytes, BPE merges within a pre-token, and NFC composes
//!   nothing with a space.
//! - Added tokens are found before all that; with one that holds white space or takes in the white space around it the cache is
//!   not used.
//!
//! So the ids of a text are those of its pieces, one after the other; a piece that was seen before costs one look-up.
//!
//! # Memory
//! A piece is kept when it comes for the second time, so what is never repeated (identifiers, say) stays out. At most [`CAPACITY`]
//! short pieces are kept, which take 5 MB for each model, and as many longer ones of at most [`LONGEST`] bytes: 28 MB at worst.
//! A full cache starts over empty.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value as Json;
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Most pieces that are kept, of either kind.
const CAPACITY: usize = 1 << 16;
/// Longest piece that is kept, in bytes.
const LONGEST: usize = 64;
/// Pieces that came once are remembered by their hash; so many of them.
const ONCE: usize = 1 << 15;

/// Patterns of `Split` pre-tokenizers for which the argument above was made: Llama 3's, Qwen's, and o200k's.
pub(super) const SAFE_PATTERNS: [&str; 4] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The cache of one tokenizer.
#[derive(Debug)]
pub(super) struct Words {
    known: RwLock<Known>,
    once: Box<[AtomicU64]>,
    seed: Seed,
}

/// Pieces and their ids.
#[derive(Debug)]
struct Known {
    /// Nearly all of them: without a pointer, so that a look-up costs one miss of the processor's cache and not three.
    short: HashMap<Short, [u32; Short::IDS], Seed>,
    long: HashMap<Box<str>, Box<[u32]>, Seed>,
}

/// A piece of a few bytes; the last byte is their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Short([u8; Self::BYTES + 1]);

impl Short {
    const BYTES: usize = 19;
    /// Most ids of a short piece.
    const IDS: usize = 3;
    /// Stands where there is no further id.
    const NO_ID: u32 = u32::MAX;

    fn new(piece: &str) -> Option<Self> {
        let mut bytes = [0; Self::BYTES + 1];
        bytes
            .get_mut(..piece.len())
            .filter(|_| piece.len() <= Self::BYTES)?
            .copy_from_slice(piece.as_bytes());
        bytes[Self::BYTES] = piece.len() as u8;
        Some(Self(bytes))
    }
}

impl Hash for Short {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

/// Keys the hashes, so that nobody can choose pieces that crowd one place of a table.
#[derive(Clone, Copy, Debug)]
struct Seed(u64);

impl BuildHasher for Seed {
    type Hasher = Keyed;

    fn build_hasher(&self) -> Keyed {
        Keyed(self.0)
    }
}

struct Keyed(u64);

impl Hasher for Keyed {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Known {
    fn new(seed: Seed) -> Self {
        Self { short: HashMap::with_hasher(seed), long: HashMap::with_hasher(seed) }
    }

    fn get(&self, piece: &str) -> Option<&[u32]> {
        if let Some(ids) = Short::new(piece).and_then(|short| self.short.get(&short)) {
            let count = ids.iter().position(|id| *id == Short::NO_ID).unwrap_or(Short::IDS);
            return Some(&ids[..count]);
        }
        if self.long.is_empty() {
            return None;
        }
        self.long.get(piece).map(|ids| &**ids)
    }

    fn put(&mut self, piece: &str, ids: &[u32]) {
        if self.short.len() >= CAPACITY || self.long.len() >= CAPACITY {
            self.short.clear();
            self.long.clear();
        }
        let short = Short::new(piece).filter(|_| ids.len() <= Short::IDS && !ids.contains(&Short::NO_ID));
        match short {
            Some(short) => {
                let mut kept = [Short::NO_ID; Short::IDS];
                kept[..ids.len()].copy_from_slice(ids);
                self.short.insert(short, kept);
            }
            None => {
                self.long.insert(piece.into(), ids.into());
            }
        }
    }
}

/// Makes ids of a text on its own, without those that a post-processor adds.
pub(super) trait Encoder<E> {
    /// The ids.
    fn ids(&self, text: &str) -> Result<Vec<u32>, E>;

    /// The same, each with the byte of the text that it begins at; takes longer.
    fn ids_and_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, E>;
}

impl Words {
    fn new() -> Self {
        let seed = Seed(rand::random());
        let once = (0..ONCE).map(|_| AtomicU64::new(0)).collect();
        Self { known: RwLock::new(Known::new(seed)), once, seed }
    }

    /// A cache for this tokenizer, if it cuts words as described.
    pub(super) fn for_tokenizer(tokenizer: &Tokenizer) -> Option<Self> {
        let json = |part: Option<Json>| part.unwrap_or(Json::Null);
        let normalizer = json(tokenizer.get_normalizer().and_then(|part| serde_json::to_value(part).ok()));
        let cutter = json(tokenizer.get_pre_tokenizer().and_then(|part| serde_json::to_value(part).ok()));
        let model = serde_json::to_value(tokenizer.get_model()).ok()?;
        let added = tokenizer.get_added_tokens_decoder();
        let plain = |token: &tokenizers::AddedToken| {
            !token.lstrip
                && !token.rstrip
                && !token.single_word
                && !token.content.is_empty()
                && !token.content.contains(char::is_whitespace)
        };
        let safe = (normalizer.is_null() || normalizer["type"] == "NFC")
            && cuts_words(&cutter)
            && model["type"] == "BPE"
            && model["dropout"].as_f64().unwrap_or(0.0) == 0.0
            && added.values().all(plain);
        safe.then(Self::new)
    }

    /// The ids of a text, without those that a post-processor adds. `encoder` is asked for what is not known.
    pub(super) fn encode<E>(&self, text: &str, encoder: &impl Encoder<E>) -> Result<Vec<u32>, E> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut learned = Vec::new();
        {
            let known = self.known.read().expect(POISON);
            // The stretch of unknown pieces so far, from and to, and the pieces' ends.
            let mut from = 0;
            let mut ends: Vec<usize> = Vec::new();
            let mut at = 0;
            for piece in Pieces(text) {
                let cached = known.get(piece);
                if let Some(cached) = cached {
                    self.fresh(text, from, &ends, encoder, &mut ids, &mut learned)?;
                    ends.clear();
                    ids.extend_from_slice(cached);
                }
                at += piece.len();
                match cached {
                    Some(_) => from = at,
                    None => ends.push(at),
                }
            }
            self.fresh(text, from, &ends, encoder, &mut ids, &mut learned)?;
        }
        if !learned.is_empty() {
            let mut known = self.known.write().expect(POISON);
            learned.into_iter().for_each(|(piece, ids)| known.put(piece, &ids));
        }
        Ok(ids)
    }

    /// Encodes a stretch of pieces at once, which costs far less than one by one, and tells the ids apart of those that came before.
    fn fresh<'t, E>(
        &self,
        text: &'t str,
        from: usize,
        ends: &[usize],
        encoder: &impl Encoder<E>,
        ids: &mut Vec<u32>,
        learned: &mut Vec<(&'t str, Vec<u32>)>,
    ) -> Result<(), E> {
        let Some(end) = ends.last() else { return Ok(()) };
        let stretch = &text[from..*end];
        let starts = [from].into_iter().chain(ends.iter().copied());
        let again: Vec<Range<usize>> = starts
            .zip(ends)
            .map(|(start, end)| start..*end)
            .filter(|piece| piece.len() <= LONGEST && self.came_before(&text[piece.clone()]))
            .collect();
        if again.is_empty() {
            ids.extend(encoder.ids(stretch)?);
            return Ok(());
        }
        let tokens = encoder.ids_and_starts(stretch)?;
        ids.extend(tokens.iter().map(|token| token.0));
        for piece in again {
            let [first, behind] =
                [piece.start, piece.end].map(|at| tokens.partition_point(|token| from + token.1 < at));
            let own = tokens[first..behind].iter().map(|token| token.0).collect();
            learned.push((&text[piece], own));
        }
        Ok(())
    }

    /// Whether a piece came before, as far as is remembered; from now on it did.
    fn came_before(&self, piece: &str) -> bool {
        let hash = xxh3_64_with_seed(piece.as_bytes(), self.seed.0);
        self.once[hash as usize % ONCE].swap(hash, Ordering::Relaxed) == hash
    }
}

const POISON: &str = "no code that holds this lock panics";

/// Whether a pre-tokenizer is one that the argument at the head of this file covers.
fn cuts_words(cutter: &Json) -> bool {
    let byte_level = |part: &Json, regex: bool| {
        part["type"] == "ByteLevel" && part["add_prefix_space"] == false && part["use_regex"] == regex
    };
    let split = |part: &Json| {
        let pattern = part["pattern"]["Regex"].as_str();
        part["type"] == "Split"
            && part["behavior"] == "Isolated"
            && part["invert"] == false
            && pattern.is_some_and(|pattern| SAFE_PATTERNS.contains(&pattern))
    };
    match cutter["type"].as_str() {
        Some("ByteLevel") => byte_level(cutter, true),
        Some("Sequence") => match cutter["pretokenizers"].as_array().map(Vec::as_slice) {
            Some([digits, bytes]) if digits["type"] == "Digits" => byte_level(bytes, true),
            Some([cut, bytes]) => split(cut) && byte_level(bytes, false),
            _ => false,
        },
        _ => false,
    }
}

/// A text in pieces, each up to the next place where it may be cut.
struct Pieces<'a>(&'a str);

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0;
        if text.is_empty() {
            return None;
        }
        let bytes = text.as_bytes();
        let mut from = 1;
        while let Some(found) = bytes.get(from..).and_then(|rest| rest.iter().position(|byte| *byte == b' '))
        {
            let at = from + found;
            if safe_cut(text, at) {
                let (piece, rest) = text.split_at(at);
                self.0 = rest;
                return Some(piece);
            }
            from = at + 1;
        }
        self.0 = "";
        Some(text)
    }
}

/// Whether a text may be cut before the space at `at`, a byte.
pub(super) fn safe_cut(text: &str, at: usize) -> bool {
    visible(text[..at].chars().next_back()) && visible(text[at + 1..].chars().next())
}

/// Surely no white space, for any engine of regular expressions, and nothing that combines.
fn visible(c: Option<char>) -> bool {
    c.is_some_and(|c| c.is_ascii_graphic() || (!c.is_ascii() && c.is_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;
    use tokenizers::PreTokenizerWrapper;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::super::testing::{bits, tokenizers, whole};
    use super::*;

    fn by_words(words: &Words, tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        words.encode(text, tokenizer).unwrap()
    }

    fn texts() -> impl Strategy<Value = String> {
        prop::collection::vec(bits(), 0..40).prop_map(|bits| bits.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn ids_are_those_of_the_whole_text(text in texts()) {
            for tokenizer in tokenizers() {
                let words = Words::for_tokenizer(tokenizer).expect("its cut is accepted");
                let expected = whole(tokenizer, &text);
                prop_assert_eq!(&by_words(&words, tokenizer, &text), &expected, "cold");
                prop_assert_eq!(&by_words(&words, tokenizer, &text), &expected, "seen once");
                prop_assert_eq!(&by_words(&words, tokenizer, &text), &expected, "warm");
                let more = format!("a {text} b {text} a x");
                prop_assert_eq!(&by_words(&words, tokenizer, &more), &whole(tokenizer, &more), "partly warm");
            }
        }
    }

    #[test]
    fn pieces_are_cut_before_lone_spaces_only() {
        let pieces = |text| Pieces(text).collect::<Vec<_>>();
        assert_eq!(pieces("a b  c \n d e "), ["a", " b  c \n d", " e "]);
        assert_eq!(pieces(" a"), [" a"]);
        assert_eq!(pieces("é \u{301}x é"), ["é \u{301}x", " é"]);
        assert_eq!(pieces(""), [""; 0]);
    }

    #[test]
    fn other_tokenizers_are_left_alone() {
        let mut tokenizer = tokenizers()[0].clone();
        tokenizer.add_tokens([tokenizers::AddedToken::from("two words", false)]).unwrap();
        assert!(Words::for_tokenizer(&tokenizer).is_none());
        let mut tokenizer = tokenizers()[0].clone();
        tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(true, true, true))));
        assert!(Words::for_tokenizer(&tokenizer).is_none());
        let mut tokenizer = tokenizers()[0].clone();
        tokenizer.with_pre_tokenizer(None::<PreTokenizerWrapper>);
        assert!(Words::for_tokenizer(&tokenizer).is_none());
    }

    /// An id for each piece, its length; counts what it is asked.
    #[derive(Default)]
    struct ByWord {
        asked: Cell<u32>,
        starts: Cell<u32>,
    }

    impl Encoder<()> for ByWord {
        fn ids(&self, text: &str) -> Result<Vec<u32>, ()> {
            self.asked.update(|asked| asked + 1);
            Ok(Pieces(text).map(|piece| piece.len() as u32).collect())
        }

        fn ids_and_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, ()> {
            self.starts.update(|starts| starts + 1);
            let start = |piece: &str| piece.as_ptr() as usize - text.as_ptr() as usize;
            Ok(Pieces(text).map(|piece| (piece.len() as u32, start(piece))).collect())
        }
    }

    fn kept(words: &Words) -> (usize, usize) {
        let known = words.known.read().unwrap();
        (known.short.len(), known.long.len())
    }

    #[test]
    fn what_comes_once_is_not_kept() {
        let (words, encoder) = (Words::new(), ByWord::default());
        let long = " anything-of-more-than-twenty-bytes";
        for (text, ids, asked, starts, known) in [
            ("one two", vec![3, 4], 1, 0, (0, 0)),
            ("one three", vec![3, 6], 1, 1, (1, 0)),
            ("one", vec![3], 1, 1, (1, 0)),
            (long, vec![35], 2, 1, (1, 0)),
            (long, vec![35], 2, 2, (1, 1)),
            ("x four three two y", vec![1, 5, 6, 4, 2], 2, 3, (3, 1)),
            ("x four three two y", vec![1, 5, 6, 4, 2], 2, 5, (6, 1)),
            (&format!("x four{long} y"), vec![1, 5, 35, 2], 2, 5, (6, 1)),
        ] {
            assert_eq!(words.encode(text, &encoder).unwrap(), ids, "{text}");
            assert_eq!((encoder.asked.get(), encoder.starts.get()), (asked, starts), "{text}");
            assert_eq!(kept(&words), known, "{text}");
        }
    }

    #[test]
    fn a_full_cache_starts_over() {
        let (words, encoder) = (Words::new(), ByWord::default());
        for n in 0..CAPACITY + 10 {
            for piece in [format!("w{n}"), format!("{n}-is-more-than-twenty-bytes")] {
                words.encode(&piece, &encoder).unwrap();
                words.encode(&piece, &encoder).unwrap();
            }
            let (short, long) = kept(&words);
            assert!(short <= CAPACITY && long <= CAPACITY);
        }
        assert!(kept(&words).0 < 100, "it started over");
    }
}
