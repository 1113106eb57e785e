//! A request inside the scheduler.

use baton_proto::plan::{Action, Held, TransferPlan};

use crate::block_pool::BlockId;
use crate::hashing::{CacheKeys, EngineHash, EngineHasher};
use crate::model::Chain;

/// A request as it enters the engine.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique among the engine's requests; outputs name it.
    pub key: u64,
    /// The engine's request id, by which its connector knows it. Unique as well.
    pub id: String,
    /// The prompt; at least one token, and fewer than the model's context holds.
    pub prompt: Vec<u32>,
    /// What sets its blocks apart.
    pub keys: CacheKeys,
    /// When it ends.
    pub stops: Stops,
    /// Its part in a handoff.
    pub plan: Option<TransferPlan>,
}

/// When a request ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stops {
    /// Output tokens at most; at least 1.
    pub max_tokens: usize,
    /// Output tokens before which neither the end-of-sequence token nor a stop token comes.
    pub min_tokens: usize,
    /// The end-of-sequence token, unless it is to be ignored.
    pub eos: Option<u32>,
    /// Tokens that end the output.
    pub stop_token_ids: Vec<u32>,
}

/// Where the KV of a prompt came from, when the request was first admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillStats {
    /// Tokens in the prompt.
    pub prompt: usize,
    /// Those found in the engine's own cache.
    pub local: usize,
    /// Those to be pulled.
    pub external: usize,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The end-of-sequence token or a stop token came.
    Stop,
    /// The output or the context is full.
    Length,
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop token, where one was asked for and came.
    pub stop_token: Option<u32>,
    /// The connector's answer to a hold.
    pub held: Option<Held>,
}

/// What a step produced for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The request.
    pub key: u64,
    /// Its next token.
    pub token: u32,
    /// With the first token: where the prompt's KV came from.
    pub prefill: Option<PrefillStats>,
    /// Set with the last token.
    pub finish: Option<Finish>,
}

/// How far a request's prompt is held while it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holding {
    /// The agent was told nothing.
    No,
    /// The agent knows of so many blocks.
    Blocks(usize),
    /// The hold ended before the prompt was computed.
    Over,
}

/// A request that has not ended.
#[derive(Debug)]
pub struct Request {
    /// Where its prompt is held as it is computed.
    pub(crate) holding: Holding,
    pub(crate) key: u64,
    pub(crate) id: String,
    /// Prompt and output.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) keys: CacheKeys,
    pub(crate) stops: Stops,
    pub(crate) plan: Option<TransferPlan>,
    /// Hashes of the full blocks of `tokens`.
    pub(crate) hashes: Vec<EngineHash>,
    /// Leading tokens whose KV is in `blocks`, or will be after the scheduled step or pull.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<BlockId>,
    /// Leading blocks that are in the prefix cache.
    pub(crate) cached: usize,
    pub(crate) preemptions: u32,
    /// Whether its pull was tried; it is tried once.
    pub(crate) pulled: bool,
    /// First block of the pull that is under way.
    pub(crate) pull_first: usize,
    pub(crate) prefill: Option<PrefillStats>,
    /// The model's chain behind so many tokens.
    pub(crate) chain: (usize, Chain),
    pub(crate) finished: bool,
}

impl Request {
    pub(crate) fn new(new: NewRequest, block_size: usize, hasher: &mut EngineHasher) -> Self {
        let prompt_len = new.prompt.len();
        let mut request = Self {
            holding: Holding::No,
            key: new.key,
            id: new.id,
            tokens: new.prompt,
            prompt_len,
            keys: new.keys,
            stops: new.stops,
            plan: new.plan,
            hashes: Vec::with_capacity(prompt_len / block_size),
            computed: 0,
            blocks: Vec::new(),
            cached: 0,
            preemptions: 0,
            pulled: false,
            pull_first: 0,
            prefill: None,
            chain: (0, Chain::START),
            finished: false,
        };
        request.hash_full_blocks(block_size, hasher);
        request
    }

    pub(crate) fn hash_full_blocks(&mut self, block_size: usize, hasher: &mut EngineHasher) {
        for index in self.hashes.len()..self.tokens.len() / block_size {
            let tokens = &self.tokens[index * block_size..(index + 1) * block_size];
            let hash = hasher.block(self.hashes.last().copied(), index, tokens, &self.keys);
            self.hashes.push(hash);
        }
    }

    /// Output tokens so far.
    pub fn outputs(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Its blocks, in order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Its prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// When it ends.
    pub fn stops(&self) -> &Stops {
        &self.stops
    }

    /// The model's chain behind the first `len` tokens.
    pub fn chain_at(&self, len: usize) -> Chain {
        let (known, chain) = self.chain;
        match known <= len {
            true => chain.then_all(&self.tokens[known..len]),
            false => Chain::START.then_all(&self.tokens[..len]),
        }
    }

    /// Remembers the chain behind the first `len` tokens.
    pub fn set_chain(&mut self, len: usize, chain: Chain) {
        self.chain = (len, chain);
    }

    /// Tokens to pull behind `local` ones that the engine has, of all of the prompt or of whole blocks of it. Up to a block
    /// of them is sooner computed, with the last token, than pulled.
    pub(crate) fn pullable(&self, local: usize, block_size: usize) -> usize {
        let Some(Action::Pull { num_tokens, .. }) = self.plan.as_ref().map(|plan| &plan.action) else {
            return 0;
        };
        let wanted = *num_tokens as usize;
        let fits =
            wanted == self.prompt_len || (wanted < self.prompt_len && wanted.is_multiple_of(block_size));
        let missing = wanted.saturating_sub(local);
        match fits && !self.pulled && self.outputs() == 0 && missing > block_size {
            true => missing,
            false => 0,
        }
    }

    /// Appends a token and says whether and why the request ends with it.
    pub(crate) fn append(&mut self, token: u32, max_model_len: usize) -> Option<(FinishReason, Option<u32>)> {
        self.tokens.push(token);
        if self.stops.eos == Some(token) {
            Some((FinishReason::Stop, None))
        } else if self.stops.stop_token_ids.contains(&token) {
            Some((FinishReason::Stop, Some(token)))
        } else if self.outputs() >= self.stops.max_tokens || self.tokens.len() >= max_model_len {
            Some((FinishReason::Length, None))
        } else {
            None
        }
    }
}
