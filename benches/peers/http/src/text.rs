//! Texts in ordinary words, the same on every run.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use tokenizers::Tokenizer;

/// A small generator of numbers (SplitMix64).
pub struct Numbers(u64);

impl Numbers {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The tokenizer's own words, the frequent ones first.
pub struct Words(Vec<String>);

impl Words {
    /// Lower-case words of 2 to 12 letters in the vocabulary; a lower id was merged earlier, so it is more frequent.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let mut words: Vec<(u32, String)> = tokenizer
            .get_vocab(false)
            .into_iter()
            .filter_map(|(token, id)| {
                let word = token.strip_prefix('Ġ')?;
                let plain =
                    (2..=12).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase());
                plain.then(|| (id, word.to_owned()))
            })
            .collect();
        words.sort();
        ensure!(words.len() > 100, "the tokenizer has too few whole words");
        Ok(Self(words.into_iter().map(|word| word.1).collect()))
    }

    /// A word, by Zipf's law.
    fn word(&self, numbers: &mut Numbers) -> &str {
        let at = (self.0.len() as f64).powf(numbers.unit()) as usize - 1;
        &self.0[at.min(self.0.len() - 1)]
    }

    /// A text of `bytes` bytes when written as JSON: sentences, paragraphs, some numbers and quotes.
    pub fn text(&self, numbers: &mut Numbers, bytes: usize) -> String {
        let mut text = String::new();
        let mut escaped = 0;
        while escaped < bytes {
            let start = text.len();
            let mut word = self.word(numbers).to_owned();
            match numbers.below(200) {
                0..20 => {
                    word[..1].make_ascii_uppercase();
                    text.push_str(if start == 0 { "" } else { ". " });
                }
                20..32 => text.push_str(", "),
                32..34 => text.push_str("\n\n"),
                34..36 => {
                    let _ = write!(text, " {} ", numbers.below(3000));
                }
                36..38 => text.push_str(" \""),
                38..40 => text.push_str("\" "),
                _ => text.push(' '),
            }
            text.push_str(&word);
            escaped +=
                text[start..].len() + text[start..].bytes().filter(|byte| b"\n\"".contains(byte)).count();
        }
        while escaped > bytes {
            let last = text.pop().expect("it is longer than 0");
            escaped -= if last == '\n' || last == '"' { 2 } else { 1 };
        }
        // An escape may have been cut in two.
        text.extend(std::iter::repeat_n('x', bytes - escaped));
        text
    }

    /// Words that begin with a space and are `bytes` bytes long together.
    pub fn phrase(&self, numbers: &mut Numbers, bytes: usize) -> String {
        let mut phrase = String::new();
        while phrase.len() < bytes {
            phrase.push(' ');
            phrase.push_str(self.word(numbers));
        }
        phrase.truncate(bytes);
        if phrase.ends_with(' ') {
            phrase.pop();
            phrase.push('s');
        }
        phrase
    }
}
