//! Text to tokens and back, with a model's own `tokenizer.json`.

use std::path::{Path, PathBuf};

use tokenizers::DecoderWrapper;

use crate::fast_bpe::FastBpe;

/// The model's tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// It cannot be read.
    #[error("{}: {reason}; point --model at a folder with a Hugging Face tokenizer.json (make-model makes one)", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Its tokens are no bytes.
    #[error(
        "{}: its decoder is not ByteLevel, so its tokens cannot be turned into text one by one; use a byte-level BPE model",
        path.display()
    )]
    NotByteLevel {
        /// The file.
        path: PathBuf,
    },
    /// A text has no tokens.
    #[error("cannot tokenize: {0}")]
    Encode(String),
}

/// A byte-level tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// For each token id its bytes; empty where there is no such token.
    bytes: Vec<Box<[u8]>>,
    special: Vec<bool>,
    /// Where the tokenizer is of the kind that can be done faster.
    fast: Option<FastBpe>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a model's folder.
    pub fn load(model: &Path) -> Result<Self, TokenizerError> {
        let path = model.join("tokenizer.json");
        let failed = |reason: String| TokenizerError::Load { path: path.clone(), reason };
        let json = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let inner = tokenizers::Tokenizer::from_bytes(&json).map_err(|error| failed(error.to_string()))?;
        let json = serde_json::from_slice(&json).map_err(|error| failed(error.to_string()))?;
        let fast = FastBpe::new(&json, byte_of);
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TokenizerError::NotByteLevel { path });
        }
        let added = inner.get_added_tokens_decoder();
        let size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let mut bytes = vec![Box::default(); size];
        let mut special = vec![false; size];
        for (token, id) in inner.get_vocab(true) {
            bytes[id as usize] = match added.get(&id) {
                Some(token) => token.content.as_bytes().into(),
                None => token.chars().map(byte_of).collect::<Option<Box<[u8]>>>().unwrap_or_default(),
            };
        }
        for (id, token) in &added {
            special[*id as usize] = token.special;
        }
        Ok(Self { inner, bytes, special, fast })
    }

    /// The tokens of a text; with `add_special_tokens`, what the model puts around a prompt comes with them.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.fast {
            Some(fast) => fast.encode(text, |text, ids| {
                ids.extend(self.encode_slowly(text, false)?);
                Ok(())
            }),
            None => self.encode_slowly(text, add_special_tokens),
        }
    }

    /// As [`Self::encode`], always with the `tokenizers` crate.
    pub fn encode_slowly(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones included.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A token's bytes; none where there is no such token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// Whether a token is special, so that it is left out of an output's text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).is_some_and(|special| *special)
    }

    /// Whether there is such a token.
    pub fn contains(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some()
    }

    /// A token as the tokenizer writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the tokenizer writes it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One past the largest token id.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The tokens whose text is printable on its own.
    pub fn printable(&self) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let printable = |bytes: &[u8]| {
            std::str::from_utf8(bytes).is_ok_and(|text| {
                !text.is_empty() && text.chars().all(|c| !c.is_control() && c != '\u{fffd}')
            })
        };
        (0..self.bytes.len() as u32)
            .filter(|id| !added.contains_key(id) && printable(self.bytes(*id)))
            .collect()
    }
}

/// The byte that a character of a byte-level token stands for.
fn byte_of(c: char) -> Option<u8> {
    let direct = |c: u32| matches!(c, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        c if direct(c) => Some(c as u8),
        // The other 68 bytes, in order, are the characters from 256 on.
        c @ 256..=323 => (0..=255u8).filter(|byte| !direct(u32::from(*byte))).nth(c as usize - 256),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_and_bytes_are_one_to_one() {
        let mut bytes: Vec<u8> = (0..400).filter_map(|c| byte_of(char::from_u32(c)?)).collect();
        bytes.sort();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }
}
