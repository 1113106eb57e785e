//! Content as chained block ids.

use crate::mix;

/// A chain of block ids: each stands for a block and all blocks before it. Ids are 64-bit hashes, so a run of 2³² distinct
/// blocks meets one collision; a simulation has thousands of times fewer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    last: u64,
}

impl Chain {
    /// Appends a block of this content and returns its id, which is never 0.
    pub fn push(&mut self, content: u64) -> u64 {
        self.last = mix(self.last.rotate_left(29) ^ mix(content.wrapping_add(0x9e37_79b9_7f4a_7c15))).max(1);
        self.last
    }
}

/// A growing text of which only lengths and identities are known, cut into blocks. Texts that grew by the same pieces have
/// the same ids as far as they are equal.
#[derive(Clone, Debug)]
pub struct Context {
    block_tokens: u32,
    chain: Chain,
    tokens: u64,
    /// Tokens in the block that is not whole, and what they are.
    filled: u32,
    content: u64,
    ids: Vec<u64>,
}

impl Context {
    /// An empty text in blocks of so many tokens; 0 counts as 1.
    pub fn new(block_tokens: u32) -> Self {
        let block_tokens = block_tokens.max(1);
        Self { block_tokens, chain: Chain::default(), tokens: 0, filled: 0, content: 0, ids: Vec::new() }
    }

    /// Appends a piece of so many tokens. The name says what they are: the same name and length is the same text.
    pub fn append(&mut self, name: u64, tokens: u32) {
        let mut done = 0;
        while done < tokens {
            let part = (self.block_tokens - self.filled).min(tokens - done);
            self.take(mix(name ^ mix(u64::from(done) + 1)) ^ u64::from(part), part);
            done += part;
        }
    }

    /// Appends tokens.
    pub fn append_tokens(&mut self, tokens: &[u32]) {
        for token in tokens {
            self.take(u64::from(*token), 1);
        }
    }

    fn take(&mut self, content: u64, tokens: u32) {
        self.content = mix(self.content.rotate_left(17) ^ content.wrapping_add(0x2545_f491_4f6c_dd1d));
        self.filled += tokens;
        self.tokens += u64::from(tokens);
        if self.filled == self.block_tokens {
            self.ids.push(self.chain.push(self.content));
            (self.filled, self.content) = (0, 0);
        }
    }

    /// Its length.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Ids of its whole blocks.
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(pieces: &[(u64, u32)]) -> Context {
        let mut context = Context::new(16);
        pieces.iter().for_each(|(name, tokens)| context.append(*name, *tokens));
        context
    }

    #[test]
    fn equal_prefixes_have_equal_ids_and_others_do_not() {
        let a = context(&[(1, 40), (2, 100)]);
        let b = context(&[(1, 40), (3, 100)]);
        assert_eq!((a.tokens(), a.ids().len()), (140, 8));
        assert_eq!(a.ids()[..2], b.ids()[..2]);
        // The third block holds tokens of the first piece and of the second, and all ids after it are chained to it.
        assert!(a.ids()[2..].iter().zip(&b.ids()[2..]).all(|(a, b)| a != b));
        assert_eq!(context(&[(1, 40), (2, 60)]).ids()[..6], a.ids()[..6]);
    }

    #[test]
    fn tokens_name_blocks_by_content_and_prefix() {
        let mut a = Context::new(2);
        a.append_tokens(&[1, 2, 1, 2, 3]);
        assert_eq!(a.ids().len(), 2);
        assert_ne!(a.ids()[0], a.ids()[1]);
        let mut b = Context::new(2);
        b.append_tokens(&[1, 2]);
        b.append_tokens(&[1, 2]);
        assert_eq!(a.ids(), b.ids());
    }
}
