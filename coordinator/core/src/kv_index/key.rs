//! Hashes mixed with a secret, and where blocks lie.
//!
//! A tenant who can compute block hashes offline still cannot choose prompts that crowd one part of a table. Only speed
//! depends on that, never a result.

use baton_proto::BlockHash;

/// Bits of the mixed hash that choose a part of the table of inner blocks.
pub(super) const PART_BITS: u32 = 11;
/// Bits of the mixed hash below those.
pub(super) const REST_BITS: u32 = 28;
pub(super) const CHAIN_BITS: u32 = 24;
pub(super) const POS_BITS: u32 = 12;

/// Most chains there can be: ids start at 1, so that no entry of a table is zero, and the last one is no chain's.
pub(super) const MAX_CHAINS: usize = (1 << CHAIN_BITS) - 2;
/// Most blocks in one chain.
pub(super) const MAX_CHAIN: usize = 1 << POS_BITS;

/// Where a block lies: in which chain, and how far from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) chain: u32,
    pub(super) pos: u32,
}

/// A mixed hash, cut up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Key {
    pub(super) part: u32,
    pub(super) rest: u32,
}

/// The secret.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixer([u64; 2]);

impl Mixer {
    pub(super) fn new(seed: u64) -> Self {
        // Any two odd-looking words do: the seed itself is the secret.
        let mix = |n: u64| (seed ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ seed;
        Self([mix(1), mix(2)])
    }

    /// Mixes a hash.
    #[inline]
    pub(super) fn key(&self, hash: &BlockHash) -> Key {
        let (words, _) = hash.as_bytes().as_chunks::<8>();
        let (a, b) = (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]));
        let product = u128::from(a ^ self.0[0]) * u128::from(b ^ self.0[1]);
        let mixed = (product >> 64) as u64 ^ product as u64;
        Key {
            part: (mixed >> (64 - PART_BITS)) as u32,
            rest: (mixed >> (64 - PART_BITS - REST_BITS)) as u32 & ((1 << REST_BITS) - 1),
        }
    }
}
