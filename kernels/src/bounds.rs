//! Checks of a layout against the storages it describes, before anything is mapped.

use baton_proto::connector::{Layout, Piece};

/// Most pieces that a layout may have.
pub const MAX_PIECES: usize = 4096;

/// A layout that does not fit its storages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No block, no piece, or too many of either.
    #[error("layout: {pieces} pieces of {blocks} blocks; use 1 to {MAX_PIECES} pieces and 1 to 2^32 blocks")]
    Size {
        /// Pieces in the layout.
        pieces: usize,
        /// Blocks in the cache.
        blocks: u64,
    },
    /// A piece without bytes.
    #[error("pieces[{0}].len is 0: leave the piece out")]
    Empty(usize),
    /// A piece of a storage that was not sent.
    #[error("pieces[{piece}].storage is {storage}, and {storages} storages were sent")]
    Storage {
        /// Index of the piece.
        piece: usize,
        /// The storage it names.
        storage: u32,
        /// Storages there are.
        storages: usize,
    },
    /// A piece whose last block ends behind its storage.
    #[error(
        "pieces[{piece}] reaches behind the {len} bytes of storage {storage}: check offset, stride and num_blocks"
    )]
    Bounds {
        /// Index of the piece.
        piece: usize,
        /// The storage it lies in.
        storage: u32,
        /// The storage's length in bytes.
        len: u64,
    },
    /// Two blocks, or two pieces of one, that share bytes.
    #[error("pieces[{0}] and pieces[{1}] share bytes: check offset, stride and len")]
    Overlap(usize, usize),
    /// Blocks too large to address.
    #[error("the pieces of a block add up to more bytes than can be addressed")]
    BlockBytes,
}

/// A run of bytes of every block, after adjoining pieces were joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Index of the storage.
    pub(crate) storage: usize,
    /// Where block 0's run begins in it.
    pub(crate) offset: usize,
    /// From one block's run to the next one's.
    pub(crate) stride: usize,
    /// Bytes.
    pub(crate) len: usize,
    /// Where the run begins within the block.
    pub(crate) start: usize,
}

/// The runs of a block and its length in bytes. Every run of every block lies inside its storage, and no byte
/// belongs to two of them.
pub(crate) fn check(
    layout: &Layout,
    storages: &[u64],
    num_blocks: u64,
) -> Result<(Vec<Run>, usize), LayoutError> {
    let pieces = &layout.pieces;
    if pieces.is_empty() || pieces.len() > MAX_PIECES || !(1..=1 << 32).contains(&num_blocks) {
        return Err(LayoutError::Size { pieces: pieces.len(), blocks: num_blocks });
    }
    for (i, piece) in pieces.iter().enumerate() {
        if piece.len == 0 {
            return Err(LayoutError::Empty(i));
        }
        let storage = piece.storage;
        let Some(&len) = storages.get(storage as usize) else {
            return Err(LayoutError::Storage { piece: i, storage, storages: storages.len() });
        };
        if end(piece, num_blocks).is_none_or(|end| end > len) {
            return Err(LayoutError::Bounds { piece: i, storage, len });
        }
    }
    for (i, a) in pieces.iter().enumerate() {
        if num_blocks > 1 && a.stride < u64::from(a.len) {
            return Err(LayoutError::Overlap(i, i));
        }
        for (j, b) in pieces.iter().enumerate().take(i) {
            if a.storage == b.storage && share_bytes(a, b, num_blocks) {
                return Err(LayoutError::Overlap(j, i));
            }
        }
    }
    join(pieces)
}

/// Where the last block's run ends.
fn end(piece: &Piece, num_blocks: u64) -> Option<u64> {
    (num_blocks - 1).checked_mul(piece.stride)?.checked_add(piece.offset)?.checked_add(u64::from(piece.len))
}

/// Whether any block's run of `a` shares bytes with any block's of `b`, in one storage. Runs of different strides
/// that interleave count as sharing: no engine lays out its cache so.
fn share_bytes(a: &Piece, b: &Piece, num_blocks: u64) -> bool {
    let ends = |piece| i128::from(end(piece, num_blocks).expect("checked before"));
    let (a_start, b_start) = (i128::from(a.offset), i128::from(b.offset));
    if ends(a) <= b_start || ends(b) <= a_start {
        return false;
    }
    if num_blocks > 1 && a.stride != b.stride {
        return true;
    }
    // Runs of equal stride share bytes when, for some difference k of block numbers, the run of `b` begins less
    // than its own length before, or less than `a`'s length behind, the run of `a`. The k nearest to that are tried.
    let stride = i128::from(a.stride);
    let farthest = i128::from(num_blocks - 1);
    let nearest = if stride == 0 { 0 } else { (a_start - b_start).div_euclid(stride) };
    let nearest = nearest.clamp(-farthest, farthest);
    (nearest - 1..=nearest + 1).filter(|k| k.abs() <= farthest).any(|k| {
        let distance = b_start + k * stride - a_start;
        -i128::from(b.len) < distance && distance < i128::from(a.len)
    })
}

fn join(pieces: &[Piece]) -> Result<(Vec<Run>, usize), LayoutError> {
    let address = |value: u64| usize::try_from(value).map_err(|_| LayoutError::BlockBytes);
    let mut runs: Vec<Run> = Vec::with_capacity(pieces.len());
    let mut block_bytes = 0usize;
    for piece in pieces {
        let (storage, offset) = (piece.storage as usize, address(piece.offset)?);
        let (stride, len) = (address(piece.stride)?, address(u64::from(piece.len))?);
        match runs.last_mut() {
            Some(last)
                if (last.storage, last.stride) == (storage, stride) && last.offset + last.len == offset =>
            {
                last.len += len;
            }
            _ => runs.push(Run { storage, offset, stride, len, start: block_bytes }),
        }
        block_bytes = block_bytes.checked_add(len).ok_or(LayoutError::BlockBytes)?;
    }
    if isize::try_from(block_bytes).is_err() {
        return Err(LayoutError::BlockBytes);
    }
    Ok((runs, block_bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(pieces: &[(u32, u64, u64, u32)]) -> Layout {
        let pieces = pieces
            .iter()
            .map(|&(storage, offset, stride, len)| Piece { storage, offset, stride, len })
            .collect();
        Layout { pieces, ..Layout::default() }
    }

    #[test]
    fn adjoining_pieces_become_one_run() {
        let (runs, bytes) =
            check(&layout(&[(0, 0, 64, 16), (0, 16, 64, 16), (0, 40, 64, 8)]), &[256], 4).unwrap();
        let run = |offset, len, start| Run { storage: 0, offset, stride: 64, len, start };
        assert_eq!((runs, bytes), (vec![run(0, 32, 0), run(40, 8, 32)], 40));
    }

    #[test]
    fn each_fault_is_named() {
        let fault = |pieces: &[_], blocks| check(&layout(pieces), &[256, 256], blocks).unwrap_err();
        assert_eq!(fault(&[], 4), LayoutError::Size { pieces: 0, blocks: 4 });
        assert_eq!(fault(&[(0, 0, 64, 8)], 0), LayoutError::Size { pieces: 1, blocks: 0 });
        assert_eq!(fault(&[(0, 0, 64, 0)], 4), LayoutError::Empty(0));
        assert_eq!(fault(&[(2, 0, 64, 8)], 4), LayoutError::Storage { piece: 0, storage: 2, storages: 2 });
        let bounds = LayoutError::Bounds { piece: 0, storage: 1, len: 256 };
        assert_eq!(fault(&[(1, 0, 64, 65)], 4), bounds);
        assert_eq!(fault(&[(1, 1, 64, 64)], 4), bounds);
        assert_eq!(fault(&[(1, u64::MAX, 64, 8)], 4), bounds);
        assert_eq!(fault(&[(1, 8, u64::MAX, 8)], 4), bounds);
        assert_eq!(fault(&[(0, 0, 8, 9)], 4), LayoutError::Overlap(0, 0));
        assert_eq!(fault(&[(0, 0, 64, 8), (0, 7, 64, 8)], 4), LayoutError::Overlap(0, 1));
        assert_eq!(fault(&[(0, 0, 64, 8), (0, 64, 64, 8)], 3), LayoutError::Overlap(0, 1));
        assert!(check(&layout(&[(0, 0, 64, 8), (1, 0, 64, 8)]), &[256, 256], 4).is_ok());
    }

    proptest! {
        /// Against marking every byte of every run.
        #[test]
        fn layouts_pass_exactly_when_no_byte_is_used_twice(
            stride in 0u64..24,
            pieces in proptest::collection::vec((0u64..48, 1u32..12), 1..5),
            blocks in 1u64..6,
        ) {
            let pieces: Vec<_> = pieces.into_iter().map(|(offset, len)| (0, offset, stride, len)).collect();
            let mut used = vec![0u8; 4096];
            for (_, offset, stride, len) in &pieces {
                for block in 0..blocks {
                    let start = (offset + block * stride) as usize;
                    used[start..start + *len as usize].iter_mut().for_each(|byte| *byte += 1);
                }
            }
            let result = check(&layout(&pieces), &[4096], blocks);
            prop_assert_eq!(result.is_ok(), used.iter().all(|byte| *byte <= 1), "{:?}", result);
        }
    }
}
