//! Byte-level BPE without detours, for ASCII text.
//!
//! A mock under load would else spend most of its time in the tokenizer. This does what `tokenizers` does for a model with the
//! GPT-2 pattern and plain merges, for text that is ASCII; whatever else there is goes the usual way. The pattern:
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{PoisonError, RwLock};

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

/// Words whose tokens are remembered, at most.
const CACHED_WORDS: usize = 1 << 16;
/// Bytes of a word at most; merging takes the square of that.
const LONGEST_WORD: usize = 256;

/// Hashes words, and pairs of tokens.
#[derive(Clone, Copy, Debug, Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 ^= xxh3_64(bytes);
    }

    fn write_usize(&mut self, _: usize) {
        // The length of a slice, which its hash covers.
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;
/// Bytes of a word, and its tokens.
type Words = Map<Box<[u8]>, Box<[u32]>>;

/// The merges of a tokenizer.
#[derive(Debug)]
pub struct FastBpe {
    /// For two neighbouring tokens, when they are merged and what they become.
    merges: Map<u64, (u32, u32)>,
    /// The token of each byte.
    bytes: [u32; 256],
    /// Tokens that are cut out of the text before anything else.
    added: Vec<(String, u32)>,
    words: RwLock<Words>,
}

impl FastBpe {
    /// From a `tokenizer.json`; `None` where it does more than what is done here. `byte_of` tells the byte that a character of
    /// a token stands for.
    pub fn new(tokenizer: &Value, byte_of: impl Fn(char) -> Option<u8>) -> Option<Self> {
        let model = &tokenizer["model"];
        let pattern = &tokenizer["pre_tokenizer"];
        let post = &tokenizer["post_processor"];
        let empty = |value: &Value| matches!(value, Value::Null | Value::Bool(false)) || value == "";
        let plain = tokenizer["normalizer"].is_null()
            && pattern["type"] == "ByteLevel"
            && pattern["add_prefix_space"] == false
            && pattern["use_regex"] == true
            && (post.is_null() || post["type"] == "ByteLevel")
            && ["truncation", "padding"].iter().all(|name| tokenizer[*name].is_null())
            && model["type"] == "BPE"
            && [
                "dropout",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "byte_fallback",
                "ignore_merges",
            ]
            .iter()
            .all(|name| empty(&model[*name]));
        if !plain {
            return None;
        }
        let vocabulary = model["vocab"].as_object()?;
        let id = |token: &str| vocabulary.get(token)?.as_u64().and_then(|id| u32::try_from(id).ok());
        let mut bytes = [u32::MAX; 256];
        for token in vocabulary.keys() {
            let mut characters = token.chars();
            if let (Some(c), None) = (characters.next(), characters.next())
                && let Some(byte) = byte_of(c)
            {
                bytes[byte as usize] = id(token)?;
            }
        }
        let mut merges = Map::default();
        for (rank, merge) in model["merges"].as_array()?.iter().enumerate() {
            let (left, right) = match merge {
                Value::String(merge) => merge.split_once(' ')?,
                pair => (pair[0].as_str()?, pair[1].as_str()?),
            };
            let merged = id(&format!("{left}{right}"))?;
            merges.insert(pair(id(left)?, id(right)?), (rank as u32, merged));
        }
        let mut added = Vec::new();
        for token in tokenizer["added_tokens"].as_array()? {
            if !["lstrip", "rstrip", "single_word", "normalized"].iter().all(|name| empty(&token[*name])) {
                return None;
            }
            added.push((token["content"].as_str()?.to_owned(), token["id"].as_u64()?.try_into().ok()?));
        }
        // Where several begin at one place, the longest counts.
        added.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        (!bytes.contains(&u32::MAX)).then(|| Self { merges, bytes, added, words: RwLock::default() })
    }

    /// The tokens of a text; what is not ASCII between two added tokens, or has very long words, is left to `other`.
    pub fn encode<E>(
        &self,
        text: &str,
        mut other: impl FnMut(&str, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<Vec<u32>, E> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        loop {
            let (at, added) = self.next_added(rest);
            let segment = &rest[..at];
            if !(segment.is_ascii() && self.encode_ascii(segment.as_bytes(), &mut ids)) {
                other(segment, &mut ids)?;
            }
            let Some((token, id)) = added else { return Ok(ids) };
            ids.push(*id);
            rest = &rest[at + token.len()..];
        }
    }

    /// Where the next added token begins, and which; the end, where there is none.
    fn next_added<'a>(&'a self, text: &str) -> (usize, Option<&'a (String, u32)>) {
        let found = self.added.iter().filter_map(|added| Some((text.find(added.0.as_str())?, added)));
        // The longest come first, and of equals the first is kept.
        match found.min_by_key(|(at, _)| *at) {
            Some((at, added)) => (at, Some(added)),
            None => (text.len(), None),
        }
    }

    /// Appends the tokens of an ASCII text; nothing, and `false`, where a word is too long.
    fn encode_ascii(&self, text: &[u8], ids: &mut Vec<u32>) -> bool {
        let before = ids.len();
        let mut new_words = Words::default();
        {
            let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
            let mut rest = text;
            while !rest.is_empty() {
                let (word, behind) = rest.split_at(word_len(rest));
                rest = behind;
                if let Some(known) = words.get(word).or_else(|| new_words.get(word)) {
                    ids.extend_from_slice(known);
                    continue;
                }
                if word.len() > LONGEST_WORD {
                    ids.truncate(before);
                    return false;
                }
                let tokens = self.merge(word);
                ids.extend_from_slice(&tokens);
                new_words.insert(word.into(), tokens.into());
            }
        }
        if !new_words.is_empty() {
            let mut words = self.words.write().unwrap_or_else(PoisonError::into_inner);
            for (word, tokens) in new_words {
                if words.len() >= CACHED_WORDS {
                    words.clear();
                }
                words.insert(word, tokens);
            }
        }
        true
    }

    /// Merges the bytes of a word, the earliest learnt pair first, the leftmost of equal ones.
    fn merge(&self, word: &[u8]) -> Vec<u32> {
        let mut tokens: Vec<u32> = word.iter().map(|byte| self.bytes[*byte as usize]).collect();
        loop {
            let merges = tokens.windows(2).enumerate().filter_map(|(at, neighbours)| {
                let (rank, merged) = self.merges.get(&pair(neighbours[0], neighbours[1]))?;
                Some((*rank, at, *merged))
            });
            let Some((_, at, merged)) = merges.min() else { return tokens };
            tokens[at] = merged;
            tokens.remove(at + 1);
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Digit,
    Other,
}

fn class(byte: u8) -> Class {
    match byte {
        b'\t'..=b'\r' | b' ' => Class::Space,
        b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
        b'0'..=b'9' => Class::Digit,
        _ => Class::Other,
    }
}

/// Length of the pattern's match at the beginning of an ASCII text that is not empty.
fn word_len(text: &[u8]) -> usize {
    if text[0] == b'\'' {
        let contractions: [&[u8]; 7] = [b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"];
        if let Some(found) = contractions.iter().find(|contraction| text.starts_with(contraction)) {
            return found.len();
        }
    }
    let run =
        |from: usize, of: Class| from + text[from..].iter().take_while(|byte| class(**byte) == of).count();
    let begin = usize::from(text[0] == b' ');
    match text.get(begin).map(|byte| class(*byte)) {
        Some(of) if of != Class::Space => run(begin, of),
        // Only spaces from here on, or a run of them that leaves its last one to what comes behind it.
        _ => match run(0, Class::Space) {
            all if all == text.len() => all,
            run => (run - 1).max(1),
        },
    }
}
