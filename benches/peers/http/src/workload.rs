//! Requests of one size: shared prefixes, each followed by a tail that is used once.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use tokenizers::Tokenizer;

use crate::text::{Numbers, Words};

/// Shared prefixes of each size.
pub const PREFIXES: usize = 64;
/// Different phrases that tails are made of.
const PHRASES: usize = 4096;
/// A tail begins with a space and the request's number in nine digits.
const NUMBER_BYTES: usize = 10;

/// Requests of one size.
pub struct Workload {
    /// Bytes of a request's body.
    pub bytes: usize,
    /// The shared texts.
    pub prefixes: Vec<String>,
    model: String,
    phrases: Vec<String>,
    per_tail: usize,
}

impl Workload {
    /// Bodies of `bytes` bytes.
    pub fn new(words: &Words, model: &str, bytes: usize) -> Self {
        let mut numbers = Numbers::new(bytes as u64);
        let (per_tail, phrase_bytes) = if bytes < 1000 { (1, 40) } else { (4, 48) };
        let around = head(model, "").len() + FOOT.len() + NUMBER_BYTES + per_tail * phrase_bytes;
        Self {
            bytes,
            prefixes: (0..PREFIXES).map(|_| words.text(&mut numbers, bytes - around)).collect(),
            model: model.to_owned(),
            phrases: (0..PHRASES).map(|_| words.phrase(&mut numbers, phrase_bytes)).collect(),
            per_tail,
        }
    }

    /// A tail that load never sends: it has `number` and a letter.
    pub fn tail(&self, number: usize) -> String {
        let phrase = |at: usize| self.phrases[(number * 7 + at) % PHRASES].as_str();
        let phrases: String = (0..self.per_tail).map(phrase).collect();
        format!(" {:08}x{phrases}", number % 100_000_000)
    }

    /// A request's body.
    pub fn body(&self, prefix: usize, tail: &str) -> String {
        format!("{}{tail}{FOOT}", head(&self.model, &self.prefixes[prefix]))
    }

    /// How many leading tokens of the prefix all its requests share, in whole blocks: by the tokenizer's own account of
    /// whole texts.
    pub fn shared_tokens(&self, tokenizer: &Tokenizer, prefix: usize, block: usize) -> Result<Vec<u32>> {
        let of = |number| encode(tokenizer, &format!("{}{}", self.prefixes[prefix], self.tail(number)));
        let (one, other) = (of(0)?, of(12_345_678)?);
        let shared = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
        Ok(one[..shared / block * block].to_vec())
    }

    /// Writes what `load.lua` reads.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let folder = folder.join(self.bytes.to_string());
        std::fs::create_dir_all(&folder)?;
        let heads: Vec<String> = self.prefixes.iter().map(|prefix| head(&self.model, prefix)).collect();
        std::fs::write(folder.join("heads"), heads.join("\n"))?;
        std::fs::write(folder.join("phrases"), self.phrases.join("\n"))?;
        std::fs::write(folder.join("foot"), FOOT)?;
        std::fs::write(folder.join("count"), self.per_tail.to_string())?;
        Ok(folder)
    }
}

const FOOT: &str = "\"}";

fn head(model: &str, prefix: &str) -> String {
    let quoted = serde_json::Value::from(prefix).to_string();
    format!(r#"{{"model":"{model}","max_tokens":1,"prompt":{}"#, &quoted[..quoted.len() - 1])
}

/// A whole text's tokens, as vLLM's completions take them.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, true).map_err(|error| anyhow!("{error}"))?;
    Ok(encoding.get_ids().to_vec())
}
