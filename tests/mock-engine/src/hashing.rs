//! The engine's own block hashes.
//!
//! They chain over token ids, LoRA adapter and cache salt, and are seeded at random in every process, as vLLM's are with
//! a hash function that does not resist collisions. No two engines agree on them, so whoever follows several
//! engines must hash the content again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Names a full block and all that comes before it, within this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub u128);

impl EngineHash {
    /// The 64 bits that KV events carry.
    pub fn external(self) -> u64 {
        self.0 as u64
    }
}

/// What sets a request's blocks apart from those of other requests with the same tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheKeys {
    /// LoRA adapter: its number (from 1) and its name.
    pub lora: Option<(u32, String)>,
    /// Cache salt; it enters the first block's hash and from there all others.
    pub salt: Option<String>,
}

impl CacheKeys {
    /// The extra keys of block `index` as KV events list them, `None` where there are none.
    pub fn of_block(&self, index: usize) -> Option<Vec<String>> {
        let lora = self.lora.as_ref().map(|(_, name)| name.clone());
        let salt = self.salt.clone().filter(|_| index == 0);
        let keys: Vec<String> = lora.into_iter().chain(salt).collect();
        (!keys.is_empty()).then_some(keys)
    }
}

/// Hashes blocks with this process's seed.
#[derive(Clone, Debug)]
pub struct EngineHasher {
    seed: u64,
    scratch: Vec<u8>,
}

impl EngineHasher {
    /// A hasher with a random seed.
    pub fn random() -> Self {
        Self::with_seed(RandomState::new().build_hasher().finish())
    }

    /// A hasher with this seed.
    pub fn with_seed(seed: u64) -> Self {
        Self { seed, scratch: Vec::new() }
    }

    /// The hash of block `index`, which holds `tokens` and follows `parent`.
    pub fn block(
        &mut self,
        parent: Option<EngineHash>,
        index: usize,
        tokens: &[u32],
        keys: &CacheKeys,
    ) -> EngineHash {
        self.scratch.clear();
        self.scratch.extend_from_slice(&parent.map_or(0, |hash| hash.0).to_le_bytes());
        for token in tokens {
            self.scratch.extend_from_slice(&token.to_le_bytes());
        }
        let lora = keys.lora.as_ref().map(|(_, name)| (1u8, name));
        let salt = keys.salt.as_ref().filter(|_| index == 0).map(|salt| (2u8, salt));
        for (tag, key) in lora.into_iter().chain(salt) {
            self.scratch.push(tag);
            self.scratch.extend_from_slice(&(key.len() as u32).to_le_bytes());
            self.scratch.extend_from_slice(key.as_bytes());
        }
        EngineHash(xxh3_128_with_seed(&self.scratch, self.seed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_sets_hashes_apart_and_so_does_the_process() {
        let mut hasher = EngineHasher::with_seed(1);
        let plain = CacheKeys::default();
        let salted = CacheKeys { salt: Some("s".into()), ..CacheKeys::default() };
        let lora = CacheKeys { lora: Some((1, "s".into())), ..CacheKeys::default() };
        let first = hasher.block(None, 0, &[1, 2], &plain);
        let mut all = vec![
            first,
            hasher.block(None, 0, &[2, 1], &plain),
            hasher.block(None, 0, &[1, 2], &salted),
            hasher.block(None, 0, &[1, 2], &lora),
            hasher.block(Some(first), 1, &[1, 2], &plain),
            EngineHasher::with_seed(2).block(None, 0, &[1, 2], &plain),
        ];
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 6);
        assert_eq!(hasher.block(Some(first), 1, &[1, 2], &salted), all_again(&mut hasher, first));
    }

    fn all_again(hasher: &mut EngineHasher, parent: EngineHash) -> EngineHash {
        hasher.block(Some(parent), 1, &[1, 2], &CacheKeys::default())
    }
}
