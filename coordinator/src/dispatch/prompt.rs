//! What is known of a request's prompt.

use baton_coordinator_core::fleet::{EngineInfo, Fleet};
use baton_coordinator_core::kv_index::{KvIndex, Overlaps};
use baton_coordinator_core::placement::{fresh_key, prefix_key};
use baton_proto::{BlockHash, ContentKeys};

use crate::tokenizer::Tokens;

/// What the index knows of a prompt.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// What each engine holds of it.
    pub overlaps: Overlaps,
    /// Names its first tokens.
    pub prefix_key: Option<u64>,
    /// Names its first block that nobody holds.
    pub fresh_key: Option<u64>,
    /// Its blocks, for each namespace and block size.
    hashes: Vec<(String, u32, Vec<BlockHash>)>,
}

impl Found {
    /// The prompt's blocks as an engine hashes them.
    pub fn hashes_of(&self, engine: &EngineInfo) -> Option<&[BlockHash]> {
        let namespace = engine.models.first()?;
        let alike = |kind: &&(String, u32, _)| (&kind.0, kind.1) == (namespace, engine.block_size);
        self.hashes.iter().find(alike).map(|kind| kind.2.as_slice())
    }
}

/// A prompt: its tokens, or what is assumed without them.
#[derive(Clone, Debug)]
pub struct Prompt {
    known: Option<Tokens>,
    estimate: u64,
    keys: ContentKeys,
    splittable: Result<(), &'static str>,
}

impl Prompt {
    /// A prompt of these tokens, made under these keys.
    pub fn of_tokens(tokens: impl Into<Tokens>, keys: ContentKeys) -> Self {
        Self { known: Some(tokens.into()), estimate: 0, keys, splittable: Ok(()) }
    }

    /// A prompt whose tokens are not known: it is placed by load, and not split.
    pub fn unknown(estimated_tokens: u64, why: &'static str) -> Self {
        Self { known: None, estimate: estimated_tokens, keys: ContentKeys::default(), splittable: Err(why) }
    }

    /// The prompt, not to be split.
    pub fn whole(mut self, why: &'static str) -> Self {
        self.splittable = Err(why);
        self
    }

    /// How many tokens it has, or is assumed to have.
    pub fn tokens(&self) -> u64 {
        self.known.as_ref().map_or(self.estimate, |tokens| tokens.len() as u64)
    }

    /// Whether its tokens are known.
    pub fn is_known(&self) -> bool {
        self.known.is_some()
    }

    /// Its first tokens; `None` where they are not known, or so many are not there.
    pub fn first_tokens(&self, count: usize) -> Option<Vec<u32>> {
        let tokens = self.known.as_ref().filter(|tokens| tokens.len() >= count)?;
        let mut first = tokens.to_vec();
        first.truncate(count);
        Some(first)
    }

    /// Whether it can be handed off, or pull a prefix; else why not.
    pub fn splittable(&self) -> Result<(), &'static str> {
        self.splittable
    }

    /// What each engine that serves the model holds of it. Engines whose blocks are hashed alike (the same
    /// namespace and block size) share one lookup.
    pub fn find(&self, fleet: &Fleet, model: &str, index: &KvIndex) -> Found {
        let mut found = Found::default();
        let Some(tokens) = &self.known else { return found };
        let mut held = Overlaps::default();
        for engine in fleet.engines() {
            let (Some(namespace), block_size) = (engine.info.models.first(), engine.info.block_size) else {
                continue;
            };
            if !engine.serves(model) || found.hashes_of(&engine.info).is_some() {
                continue;
            }
            let hashes = tokens.block_hashes(namespace, block_size, &self.keys);
            // An engine never reuses a prompt's last token. With several cache groups it may reuse a shorter prefix, and not a
            // longer one cut short, so the index is asked for what can be used.
            let usable = tokens.len().saturating_sub(1) / block_size as usize;
            let usable = &hashes[..usable.min(hashes.len())];
            index.overlaps(usable, &mut held);
            if found.hashes.is_empty() {
                found.prefix_key = prefix_key(usable, block_size);
                found.fresh_key = fresh_key(usable, &held);
            }
            let alike: Vec<_> = fleet
                .engines()
                .iter()
                .filter(|other| {
                    other.info.block_size == block_size && other.info.models.first() == Some(namespace)
                })
                .map(|other| other.info.slot)
                .collect();
            found.overlaps.merge(&held, |slot| alike.contains(&slot));
            found.hashes.push((namespace.clone(), block_size, hashes));
        }
        found
    }
}
