//! The control plane's messages and service, generated from `proto/baton/control/v1/control.proto`, and the
//! conversions between its plain fields and Baton's types.

use bytes::{BufMut, Bytes, BytesMut};

use crate::block_hash::BlockHash;

/// Version 1 of the control plane.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("baton.control.v1");
}

/// A field of a control message that does not hold what it must.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FieldError {
    /// A run of hashes whose length is no multiple of 16.
    #[error("hashes: {0} bytes are no whole number of 16-byte block hashes")]
    Hashes(usize),
    /// A block's parent that is no single hash.
    #[error("parent: {0} bytes are no 16-byte block hash; leave it empty where there is none")]
    Parent(usize),
}

/// Lays block hashes end to end, as `BlocksStored` and `BlocksRemoved` carry them.
pub fn pack_hashes(hashes: &[BlockHash]) -> Bytes {
    let mut packed = BytesMut::with_capacity(hashes.len() * BlockHash::LEN);
    for hash in hashes {
        packed.put_slice(hash.as_bytes());
    }
    packed.freeze()
}

/// Reads what [`pack_hashes`] wrote.
pub fn unpack_hashes(packed: &[u8]) -> Result<impl ExactSizeIterator<Item = BlockHash> + '_, FieldError> {
    let (hashes, rest) = packed.as_chunks::<{ BlockHash::LEN }>();
    if !rest.is_empty() {
        return Err(FieldError::Hashes(packed.len()));
    }
    Ok(hashes.iter().map(|bytes| BlockHash::from_bytes(*bytes)))
}

/// Reads the parent of a `BlocksStored`.
pub fn unpack_parent(packed: &[u8]) -> Result<Option<BlockHash>, FieldError> {
    match packed.as_array::<{ BlockHash::LEN }>() {
        Some(bytes) => Ok(Some(BlockHash::from_bytes(*bytes))),
        None if packed.is_empty() => Ok(None),
        None => Err(FieldError::Parent(packed.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_survive_packing_and_a_torn_run_is_refused() {
        let hashes: Vec<_> = (0..5u8).map(|i| BlockHash::from_bytes([i; 16])).collect();
        let packed = pack_hashes(&hashes);
        assert_eq!(unpack_hashes(&packed).unwrap().collect::<Vec<_>>(), hashes);
        assert_eq!(unpack_hashes(&packed[..17]).err(), Some(FieldError::Hashes(17)));
        assert_eq!(unpack_parent(&packed[16..32]), Ok(Some(hashes[1])));
        assert_eq!(unpack_parent(&[]), Ok(None));
        assert_eq!(unpack_parent(&packed[..32]), Err(FieldError::Parent(32)));
    }
}
