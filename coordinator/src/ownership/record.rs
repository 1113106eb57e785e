//! What the store's keys and values look like.
//!
//! ```text
//! /baton/v1/engines/<engine id>              version u8 ‖ applied sequence u64 ‖ Register message
//! /baton/v1/blocks/<engine id>/<bucket hex>  version u8 ‖ epoch u64 ‖ (block hash 16 bytes ‖ place u8)*
//! ```
//!
//! Numbers are little-endian. A place is tiers in its low 3 bits, cache group in its high 5. A bucket of more than [`MAX_BLOCKS`] blocks is cut there, and then says epoch 0: whoever loads
//! it sees that it is not whole.

use baton_coordinator_core::kv_index::Tiers;
use baton_proto::control::v1;
use baton_proto::{BlockHash, EngineId, Epoch};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use super::kv::MAX_VALUE;

const VERSION: u8 = 1;
const ENTRY: usize = BlockHash::LEN + 1;
const HEAD: usize = 1 + 8;
/// Bits of a place that stand for tiers.
const TIER_BITS: u32 = 3;

/// Most blocks in the value of one bucket: with 256 buckets, an engine of some 15 million blocks.
pub(super) const MAX_BLOCKS: usize = (MAX_VALUE - HEAD) / ENTRY;

/// Prefix of all engines' keys.
pub(super) const ENGINES: &str = "/baton/v1/engines/";

/// Key of an engine's registration.
pub(super) fn engine_key(id: &EngineId) -> String {
    format!("{ENGINES}{id}")
}

/// Prefix of an engine's buckets.
pub(super) fn buckets_prefix(id: &EngineId) -> String {
    format!("/baton/v1/blocks/{id}/")
}

/// Key of one bucket.
pub(super) fn bucket_key(id: &EngineId, bucket: u8) -> String {
    format!("/baton/v1/blocks/{id}/{bucket:02x}")
}

/// Value of an engine's key.
pub(super) fn encode_engine(message: &v1::Register, applied_seq: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEAD + message.encoded_len());
    bytes.put_u8(VERSION);
    bytes.put_u64_le(applied_seq);
    bytes.put_slice(&message.encode_to_vec());
    bytes.freeze()
}

/// Reads an engine's value. `None` where it is of another version or torn.
pub(super) fn decode_engine(mut bytes: Bytes) -> Option<(v1::Register, u64)> {
    if bytes.len() < HEAD || bytes.get_u8() != VERSION {
        return None;
    }
    let applied_seq = bytes.get_u64_le();
    Some((v1::Register::decode(bytes).ok()?, applied_seq))
}

/// A block, the cache group that it is in, and where.
pub(super) type Stored = (BlockHash, u16, Tiers);

/// Value of a bucket. Groups are below [`MAX_GROUPS`](crate::registry::MAX_GROUPS).
pub(super) fn encode_bucket(epoch: Epoch, blocks: &[Stored]) -> Bytes {
    let whole = blocks.len() <= MAX_BLOCKS;
    let blocks = &blocks[..blocks.len().min(MAX_BLOCKS)];
    let mut bytes = BytesMut::with_capacity(HEAD + blocks.len() * ENTRY);
    bytes.put_u8(VERSION);
    bytes.put_u64_le(if whole { epoch.0 } else { 0 });
    for (hash, group, tiers) in blocks {
        bytes.put_slice(hash.as_bytes());
        bytes.put_u8((*group as u8) << TIER_BITS | tiers.bits());
    }
    bytes.freeze()
}

/// Reads a bucket's value. `None` where it is of another version or torn.
pub(super) fn decode_bucket(mut bytes: Bytes) -> Option<(Epoch, Vec<Stored>)> {
    if bytes.len() < HEAD || bytes.get_u8() != VERSION {
        return None;
    }
    let epoch = Epoch(bytes.get_u64_le());
    let (entries, rest) = bytes.as_chunks::<ENTRY>();
    let blocks = entries.iter().map(|entry| {
        let mut hash = [0; BlockHash::LEN];
        hash.copy_from_slice(&entry[..BlockHash::LEN]);
        let place = entry[BlockHash::LEN];
        (BlockHash::from_bytes(hash), u16::from(place >> TIER_BITS), Tiers::from_bits(place))
    });
    rest.is_empty().then(|| (epoch, blocks.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::testing::register;

    #[test]
    fn values_survive_and_torn_ones_are_refused() {
        let value = encode_engine(&register("e0", 7), 42);
        assert_eq!(decode_engine(value.clone()), Some((register("e0", 7), 42)));
        assert_eq!(decode_engine(value.slice(..5)), None);
        let blocks: Vec<_> = (0..32u8)
            .map(|i| (BlockHash::from_bytes([i; 16]), u16::from(i), Tiers::from_bits(i % 7 + 1)))
            .collect();
        let value = encode_bucket(Epoch(7), &blocks);
        assert_eq!(decode_bucket(value.clone()), Some((Epoch(7), blocks)));
        assert_eq!(decode_bucket(value.slice(..value.len() - 1)), None);
    }

    #[test]
    fn a_bucket_that_does_not_fit_is_cut_and_says_so() {
        let blocks = vec![(BlockHash::from_bytes([1; 16]), 0, Tiers::from_bits(1)); MAX_BLOCKS + 1];
        let value = encode_bucket(Epoch(7), &blocks);
        assert!(value.len() <= MAX_VALUE);
        assert_eq!(decode_bucket(value).unwrap().0, Epoch(0));
    }
}
