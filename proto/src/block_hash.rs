//! Baton's own block hash: what a block of KV was computed from.
//!
//! An engine's hashes are its own affair (older vLLM seeds them at random), so Baton names blocks itself. The
//! hash of a block covers its tokens, the hash of the block before it, and every other input that changes the
//! KV: the model, the LoRA adapter, the tenant's cache salt, multimodal items. Two equal hashes therefore
//! mean equal *prefixes*, and the hash of the last block of a run vouches for the whole run.
//!
//! ```text
//! key       = BLAKE3-derive-key("baton 2026-11 block hash v1", model)
//! hash(i)   = first 16 bytes of BLAKE3-keyed(key, hash(i-1) ‖ len(tokens) ‖ tokens ‖ extra keys)
//! hash(-1)  = 16 zero bytes
//! ```
//!
//! Tokens are 32-bit little-endian; each extra key is one tag byte, a 32-bit length and its bytes.
//!
//! # Why a tenant cannot make two contents collide
//! Two blocks with one hash would be taken for the same KV: the holder's check of a pull and the agent's translation of
//! store events compare hashes, and behind them stands no other comparison of content. So the hash must resist a tenant who
//! chooses prompts to collide on purpose, and not only chance.
//!
//! - *What is hashed is unambiguous.* The number of tokens stands before the tokens, each extra key has a tag and a length,
//!   the parent has a fixed length. Different inputs are different byte strings, so a collision of hashes is one of BLAKE3.
//!   (A parent of 16 zero bytes stands for "none"; a block whose hash is that value would be a preimage of it, 2^128 work.)
//! - *Chance.* Of `n` blocks some two collide with a probability of at most `n² / 2^129`: for 10 million blocks at once 2·10^-25,
//!   for 2^50 blocks over a fleet's life 2·10^-9.
//! - *Two contents of one's own* that collide cost about 2^64 evaluations (the birthday bound of 128 bits: BLAKE3 has no
//!   shortcut known), each over a block and its parent; the key is public, since every agent and coordinator computes the
//!   same hashes, so nothing hides the function. That is more work than the KV of any prompt is worth, and all it buys is this:
//!   both contents are the tenant's, so the tenant reads answers computed from the tenant's own other prompt.
//! - *Somebody else's content.* To be served another tenant's KV, or to plant KV that another tenant's prompt will find, a
//!   given hash must be met: a second preimage, 2^128 work, or 2^128 / n against any of n given blocks, still 2^104 for 10
//!   million. The birthday bound does not help against content that the attacker did not choose. An attacker who can make a
//!   victim send a prefix of the attacker's choice is back at 2^64 for that prefix, unless the next point holds.
//! - *Tenants with a cache salt are apart also then.* The salt is hashed into the first block and the chain carries it on:
//!   who does not know it cannot evaluate the function on the tenant's content at all, so cannot prepare a collision with it
//!   however much work is spent, nor learn by timing whether the tenant has sent a given prompt. A salt of 128 random bits
//!   suffices. Salts are part of the content and not of the key because vLLM makes them one, per request.
//! - *The key* sets models apart: a chain of one model's blocks is never another's, whatever the tokens.
//!
//! What hashes are *not* trusted for: bytes. A transfer carries a checksum of each block and checks it on arrival.
//!
//! The coordinator's index keeps all 128 bits of every block and compares them whole wherever a lookup enters a run of
//! blocks, so it adds nothing to the probabilities above. Inside its table an entry keeps 28 bits of the hash mixed with a
//! random secret of the process, to find the candidate quickly; a candidate counts only after the whole hash was compared. So the
//! secret protects speed (nobody can choose prompts that crowd one bucket) and nothing depends on it for being right. Between
//! the two ends of a run the index compares only some hashes: one equal hash vouches for all before it by the chain itself.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Hash of one block and of all that comes before it. 128 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; Self::LEN]);

impl BlockHash {
    /// Bytes in a hash.
    pub const LEN: usize = 16;

    /// The hash that consists of these bytes.
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

/// An input to a block's KV besides its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// Name of the LoRA adapter; in every block.
    Lora(&'a str),
    /// A multimodal item that the block holds a part of, and where the item starts, in tokens from the
    /// block's start (negative when it began in an earlier block).
    Multimodal {
        /// The engine's content hash of the item.
        identifier: &'a str,
        /// Tokens from the block's start to the item's.
        offset: i64,
    },
    /// The tenant's cache salt; in the first block, from where the chain carries it on.
    Salt(&'a str),
    /// An input Baton does not interpret, such as the digest of prompt embeddings.
    Opaque(&'a [u8]),
}

impl ExtraKey<'_> {
    fn feed(&self, hasher: &mut blake3::Hasher) {
        let mut tagged = |tag: u8, bytes: &[u8]| {
            hasher.update(&[tag]);
            hasher.update(&(bytes.len() as u32).to_le_bytes());
            hasher.update(bytes);
        };
        match self {
            ExtraKey::Lora(name) => tagged(1, name.as_bytes()),
            ExtraKey::Multimodal { identifier, offset } => {
                tagged(2, identifier.as_bytes());
                tagged(3, &offset.to_le_bytes());
            }
            ExtraKey::Salt(salt) => tagged(4, salt.as_bytes()),
            ExtraKey::Opaque(bytes) => tagged(5, bytes),
        }
    }
}

/// Where one multimodal item lies in a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MultimodalItem {
    /// The engine's content hash of the item.
    pub identifier: String,
    /// First placeholder token.
    pub offset: u32,
    /// Placeholder tokens.
    pub length: u32,
}

/// What a request's KV depends on besides its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentKeys {
    /// LoRA adapter, by name.
    #[serde(default)]
    pub lora: Option<String>,
    /// Tenant's cache salt.
    #[serde(default)]
    pub salt: Option<String>,
    /// Multimodal items, in order of offset.
    #[serde(default)]
    pub multimodal: Vec<MultimodalItem>,
}

impl ContentKeys {
    /// The extra keys of the block that holds tokens `start..end`, in the order in which vLLM lists them.
    pub fn of_block(&self, start: usize, end: usize) -> impl Iterator<Item = ExtraKey<'_>> {
        let lora = self.lora.as_deref().map(ExtraKey::Lora);
        let items = self
            .multimodal
            .iter()
            .filter(move |item| {
                (item.offset as usize) < end && start < item.offset as usize + item.length as usize
            })
            .map(move |item| ExtraKey::Multimodal {
                identifier: &item.identifier,
                offset: i64::from(item.offset) - start as i64,
            });
        let salt = self.salt.as_deref().filter(|_| start == 0).map(ExtraKey::Salt);
        lora.into_iter().chain(items).chain(salt)
    }
}

/// Hashes the blocks of one model.
#[derive(Clone)]
pub struct BlockHasher {
    keyed: blake3::Hasher,
}

impl fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockHasher")
    }
}

impl BlockHasher {
    /// A hasher for blocks of this model, named as its engines register it.
    pub fn new(model: &str) -> Self {
        let key = blake3::derive_key("baton 2026-11 block hash v1", model.as_bytes());
        Self { keyed: blake3::Hasher::new_keyed(&key) }
    }

    /// The hash of the block with these tokens after `parent` (`None`: the first block of a prompt).
    pub fn block<'a>(
        &self,
        parent: Option<BlockHash>,
        tokens: &[u32],
        extra: impl IntoIterator<Item = ExtraKey<'a>>,
    ) -> BlockHash {
        const BATCH: usize = 64;
        let mut hasher = self.keyed.clone();
        hasher.update(&parent.map_or([0; BlockHash::LEN], |hash| hash.0));
        hasher.update(&(tokens.len() as u32).to_le_bytes());
        let mut bytes = [0u8; BATCH * 4];
        for batch in tokens.chunks(BATCH) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(batch) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..batch.len() * 4]);
        }
        for key in extra {
            key.feed(&mut hasher);
        }
        let mut hash = [0; BlockHash::LEN];
        hash.copy_from_slice(&hasher.finalize().as_bytes()[..BlockHash::LEN]);
        BlockHash(hash)
    }

    /// The hashes of all blocks of a prompt, the last one shorter than `block_size` where the prompt ends
    /// within it. Cut `tokens` to whole blocks first where only those count.
    pub fn chain(&self, tokens: &[u32], block_size: usize, keys: &ContentKeys) -> Vec<BlockHash> {
        assert!(block_size > 0, "a block holds at least one token");
        let mut hashes: Vec<BlockHash> = Vec::with_capacity(tokens.len().div_ceil(block_size));
        for (i, block) in tokens.chunks(block_size).enumerate() {
            let start = i * block_size;
            let extra = keys.of_block(start, start + block.len());
            hashes.push(self.block(hashes.last().copied(), block, extra));
        }
        hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn salted(salt: &str) -> ContentKeys {
        ContentKeys { salt: Some(salt.to_owned()), ..ContentKeys::default() }
    }

    #[test]
    fn equal_prefixes_share_hashes_and_nothing_after_a_difference_does() {
        let hasher = BlockHasher::new("m");
        let a: Vec<u32> = (0..100).collect();
        let mut b = a.clone();
        b[40] = 7;
        let keys = ContentKeys::default();
        let (a, b) = (hasher.chain(&a, 16, &keys), hasher.chain(&b, 16, &keys));
        assert_eq!(a.len(), 7);
        assert_eq!(a[..2], b[..2]);
        assert!(a[2..].iter().zip(&b[2..]).all(|(x, y)| x != y));
    }

    #[test]
    fn model_lora_salt_and_images_set_blocks_apart() {
        let tokens: Vec<u32> = (0..32).collect();
        let lora = ContentKeys { lora: Some("x".into()), ..ContentKeys::default() };
        let item = |offset| MultimodalItem { identifier: "x".into(), offset, length: 4 };
        let image = |offset| ContentKeys { multimodal: vec![item(offset)], ..ContentKeys::default() };
        let mut last: Vec<BlockHash> =
            [ContentKeys::default(), lora, salted("x"), salted("y"), image(2), image(3)]
                .iter()
                .map(|keys| BlockHasher::new("m").chain(&tokens, 16, keys)[1])
                .collect();
        last.push(BlockHasher::new("n").chain(&tokens, 16, &ContentKeys::default())[1]);
        last.sort();
        last.dedup();
        assert_eq!(last.len(), 7);
    }

    #[test]
    fn a_short_block_differs_from_the_full_one_it_begins() {
        let hasher = BlockHasher::new("m");
        let tokens: Vec<u32> = (0..16).collect();
        assert_ne!(hasher.block(None, &tokens, []), hasher.block(None, &tokens[..15], []));
    }

    #[test]
    fn an_item_is_keyed_in_every_block_it_reaches_into() {
        let keys = ContentKeys {
            multimodal: vec![MultimodalItem { identifier: "i".into(), offset: 20, length: 20 }],
            ..ContentKeys::default()
        };
        let of = |start: usize| keys.of_block(start, start + 16).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(16), [ExtraKey::Multimodal { identifier: "i", offset: 4 }]);
        assert_eq!(of(32), [ExtraKey::Multimodal { identifier: "i", offset: -12 }]);
        assert_eq!(of(48), []);
    }
}
