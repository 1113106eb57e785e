//! Prompts for engines out of block ids: token ids that are equal exactly as far as the blocks are.

use std::sync::Arc;

use super::Arrival;
use crate::mix;

/// Distinct token ids that a vocabulary must have: with fewer, different blocks would begin alike too often.
pub const LEAST_ALPHABET: usize = 64;

/// Makes prompts. A block's tokens are a function of its id, of the seed and of nothing else, so two prompts have the same tokens as far as their
/// block ids are equal; behind that, each token is equal by chance only, one time in as many as the alphabet has. Tokens behind the last whole
/// block, which has no id, are the request's own.
#[derive(Clone, Debug)]
pub struct Prompts {
    alphabet: Arc<[u32]>,
    block_tokens: usize,
    seed: u64,
}

/// What a session has sent and was answered so far.
#[derive(Clone, Debug, Default)]
pub struct Said {
    tokens: Vec<u32>,
    blocks: Arc<[u64]>,
    /// Leading blocks that its last prompt filled.
    whole: usize,
}

impl Prompts {
    /// Prompts of these token ids, for traces in blocks of so many tokens; 0 counts as 1. Another seed gives other prompts, so that an engine
    /// that has seen those of one seed has none of another's cached. `None` where the alphabet has fewer than [`LEAST_ALPHABET`] distinct ids.
    pub fn new(mut alphabet: Vec<u32>, block_tokens: u32, seed: u64) -> Option<Self> {
        alphabet.sort_unstable();
        alphabet.dedup();
        let enough = alphabet.len() >= LEAST_ALPHABET;
        enough.then(|| Self { alphabet: alphabet.into(), block_tokens: block_tokens.max(1) as usize, seed })
    }

    /// The prompt of a session's next request, [`Arrival::prompt_tokens`] long. It begins with what was said, as far as the trace's prompt goes on
    /// from the one before: the answer that the engine gave stands where the trace has another one. `own` names the request: what has no
    /// block id is made of it.
    pub fn next<'a>(&self, said: &'a mut Said, arrival: &Arrival, own: u64) -> &'a [u32] {
        let length = arrival.prompt_tokens as usize;
        let goes_on = arrival.blocks.get(..said.whole) == said.blocks.get(..said.whole);
        if !goes_on || said.tokens.len() > length {
            said.tokens.clear();
        }
        for at in said.tokens.len()..length {
            let (block, within) = (at / self.block_tokens, at % self.block_tokens);
            let name = match arrival.blocks.get(block) {
                Some(id) => mix(self.seed ^ id.rotate_left(23)),
                None => mix(!self.seed ^ mix(own.wrapping_add(1))),
            };
            let number = mix(name ^ mix(within as u64 + 1));
            let choice = (u128::from(number) * self.alphabet.len() as u128) >> 64;
            said.tokens.push(self.alphabet[choice as usize]);
        }
        said.blocks = Arc::clone(&arrival.blocks);
        said.whole = (length / self.block_tokens).min(arrival.blocks.len());
        &said.tokens
    }
}

impl Said {
    /// The engine answered with these tokens.
    pub fn answered(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }
}
