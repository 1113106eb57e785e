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
//! At most [`CAPACITY`] pieces of at most [`LONGEST`] bytes: 7 MB for each model with ordinary text, 30 MB at
//! worst. A full cache starts over empty.

use std::collections::HashMap;
use std::sync::RwLock;

use serde_json::Value as Json;
use tokenizers::Tokenizer;

/// Most pieces that are kept.
const CAPACITY: usize = 1 << 16;
/// Longest piece that is kept, in bytes.
const LONGEST: usize = 64;

/// Patterns of `Split` pre-tokenizers for which the argument above was made: Llama 3's, Qwen's, and o200k's.
pub(super) const SAFE_PATTERNS: [&str; 4] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The cache of one tokenizer.
#[derive(Debug, Default)]
pub(super) struct Words {
    known: RwLock<HashMap<Box<str>, Box<[u32]>>>,
}

impl Words {
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
        safe.then(Self::default)
    }

    /// The ids of a text, without those that a post-processor adds. `encode` is asked for stretches that are not
    /// known: it gives their ids, each with the byte of the stretch that it begins at.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        encode: impl Fn(&str) -> Result<Vec<(u32, usize)>, E>,
    ) -> Result<Vec<u32>, E> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut learned: Vec<(&str, Box<[u32]>)> = Vec::new();
        {
            let known = self.known.read().expect(POISON);
            // The stretch of unknown pieces so far, from and to, and the pieces' ends.
            let mut from = 0;
            let mut ends: Vec<usize> = Vec::new();
            let mut at = 0;
            for piece in Pieces(text) {
                let cached = known.get(piece);
                if let Some(cached) = cached {
                    fresh(text, from, &ends, &encode, &mut ids, &mut learned)?;
                    ends.clear();
                    ids.extend_from_slice(cached);
                }
                at += piece.len();
                match cached {
                    Some(_) => from = at,
                    None => ends.push(at),
                }
            }
            fresh(text, from, &ends, &encode, &mut ids, &mut learned)?;
        }
        if !learned.is_empty() {
            let mut known = self.known.write().expect(POISON);
            if known.len() + learned.len() > CAPACITY {
                known.clear();
            }
            known.extend(learned.into_iter().take(CAPACITY).map(|(piece, ids)| (piece.into(), ids)));
        }
        Ok(ids)
    }
}

/// Encodes a stretch of pieces at once, which costs far less than one by one, and tells their ids apart.
fn fresh<'t, E>(
    text: &'t str,
    from: usize,
    ends: &[usize],
    encode: impl Fn(&str) -> Result<Vec<(u32, usize)>, E>,
    ids: &mut Vec<u32>,
    learned: &mut Vec<(&'t str, Box<[u32]>)>,
) -> Result<(), E> {
    let Some(end) = ends.last() else { return Ok(()) };
    let tokens = encode(&text[from..*end])?;
    ids.extend(tokens.iter().map(|token| token.0));
    let mut tokens = tokens.into_iter().peekable();
    let mut start = from;
    for end in ends {
        let own: Box<[u32]> = std::iter::from_fn(|| tokens.next_if(|token| from + token.1 < *end))
            .map(|token| token.0)
            .collect();
        if end - start <= LONGEST {
            learned.push((&text[start..*end], own));
        }
        start = *end;
    }
    Ok(())
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
    use super::super::testing::{bits, tokenizers, whole};
    use super::*;
    use proptest::prelude::*;
    use tokenizers::PreTokenizerWrapper;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    fn by_words(words: &Words, tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        words.encode(text, |stretch| super::super::model::ids_and_starts(tokenizer, stretch)).unwrap()
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

    #[test]
    fn a_full_cache_starts_over() {
        let words = Words::default();
        let text: String = (0..CAPACITY + 10).map(|n| format!(" w{n}")).collect();
        words.encode(&text[1..], |_| Ok::<_, ()>(vec![(1, 0)])).unwrap();
        assert!(words.known.read().unwrap().len() <= CAPACITY);
        words.encode("x y", |_| Ok::<_, ()>(vec![(1, 0)])).unwrap();
        assert!(words.known.read().unwrap().len() <= CAPACITY);
    }
}
