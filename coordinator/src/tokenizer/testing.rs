//! What the tests of both caches need: tokenizers, and texts that are hard to cut.

use std::path::Path;
use std::sync::OnceLock;

use proptest::prelude::*;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::words::SAFE_PATTERNS;

/// The corpus's tokenizer, and the same with every other cut that is accepted.
pub(super) fn tokenizers() -> &'static [Tokenizer] {
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    ALL.get_or_init(load)
}

fn load() -> Vec<Tokenizer> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/models/chatml/tokenizer.json");
    let digits = Tokenizer::from_file(file).unwrap();
    let mut all = vec![digits.clone()];
    let mut gpt2 = digits.clone();
    gpt2.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true))));
    all.push(gpt2);
    for pattern in SAFE_PATTERNS {
        let split =
            Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false).unwrap();
        let parts = vec![
            PreTokenizerWrapper::Split(split),
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
        ];
        let mut tokenizer = digits.clone();
        tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(parts))));
        tokenizer
            .with_normalizer(Some(NormalizerWrapper::NFC(tokenizers::normalizers::unicode::NFC)))
            .unwrap();
        all.push(tokenizer);
    }
    all
}

/// The ids of the whole text.
pub(super) fn whole(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
}

/// Bits of text that meet at cuts: letters, marks, digits, quotes, all kinds of white space, added tokens.
pub(super) fn bits() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        " ", " ", " ", " ", "  ", "\n", "\r\n", "\t", "\u{a0}", "\u{2028}", "\u{200b}", "\u{3000}",
        "\u{feff}", "\u{1c}", "a", "the", "Quick", "it's", "'s", "'LL", "x1", "12345", "7", ".", ",", "!?",
        "—", "/", "日本", "e\u{301}", "\u{301}", "é", "ß", "नि", "🙂", "<|end|>", "<s>", "<think>", "<|en",
        "_", "٣", "½", "\u{1f}", "\0",
    ])
}
