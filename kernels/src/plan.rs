//! What is copied for a block, and from where: the input of gather and scatter, on either backend.

use baton_proto::connector::{Layout, Piece};

use crate::bounds::{self, LayoutError};

/// Rows of contiguous bytes at two nested strides: `outer × inner` rows of `row` bytes, of every block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index of the storage.
    pub(crate) storage: usize,
    /// Where block 0's first row begins in it.
    pub(crate) offset: u64,
    /// From one block's first row to the next one's, in bytes.
    pub(crate) block_stride: u64,
    /// How often, and at which stride in bytes.
    pub(crate) outer: (u32, u64),
    /// As above, within each of the outer.
    pub(crate) inner: (u32, u64),
    /// Bytes of a row.
    pub(crate) row: u32,
    /// Where the span begins within a gathered block.
    pub(crate) start: u64,
}

impl Span {
    /// Bytes of a block that this span has.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.outer.0) * u64::from(self.inner.0) * u64::from(self.row)
    }

    /// Where the rows of a block begin in the storage, in the order in which they are gathered.
    pub(crate) fn rows(&self, block: u32) -> impl Iterator<Item = u64> + use<> {
        let first = self.offset + u64::from(block) * self.block_stride;
        let (outer, inner) = (self.outer, self.inner);
        (0..u64::from(outer.0))
            .flat_map(move |o| (0..u64::from(inner.0)).map(move |i| first + o * outer.1 + i * inner.1))
    }

    /// Behind the last byte that it reaches in any of the blocks.
    fn end(&self, num_blocks: u64) -> Option<u64> {
        let last = |(count, stride): (u32, u64)| u64::from(count - 1).checked_mul(stride);
        let blocks = num_blocks.checked_sub(1)?.checked_mul(self.block_stride)?;
        let rows = last(self.outer)?.checked_add(last(self.inner)?)?;
        self.offset.checked_add(blocks)?.checked_add(rows)?.checked_add(u64::from(self.row))
    }
}

/// How the bytes of a block lie in an engine's storages, in the order in which they travel.
///
/// Every byte that a plan names lies in its storages, for each of its blocks, and none is named twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    spans: Vec<Span>,
    storages: Vec<u64>,
    num_blocks: u64,
    block_bytes: usize,
}

impl Plan {
    /// All of a block, in the order of the layout's pieces. `storages` are their lengths in bytes.
    pub fn of_layout(layout: &Layout, storages: &[u64], num_blocks: u64) -> Result<Self, LayoutError> {
        let (runs, _) = bounds::check(layout, storages, num_blocks)?;
        let spans = runs.iter().map(|run| {
            Ok(Span {
                storage: run.storage,
                offset: run.offset as u64,
                block_stride: run.stride as u64,
                outer: (1, 0),
                inner: (1, 0),
                row: u32::try_from(run.len).map_err(|_| LayoutError::BlockBytes)?,
                start: run.start as u64,
            })
        });
        Self::new(spans.collect::<Result<_, _>>()?, storages.to_vec(), num_blocks)
    }

    /// Of spans that share no byte, in order and without gaps in the gathered block.
    pub(crate) fn new(spans: Vec<Span>, storages: Vec<u64>, num_blocks: u64) -> Result<Self, LayoutError> {
        if spans.is_empty() || spans.len() > bounds::MAX_PIECES || !(1..=1 << 32).contains(&num_blocks) {
            return Err(LayoutError::Size { pieces: spans.len(), blocks: num_blocks });
        }
        let mut block_bytes = 0u64;
        for (piece, span) in spans.iter().enumerate() {
            let empty = span.bytes() == 0;
            if empty {
                return Err(LayoutError::Empty(piece));
            }
            let storage = span.storage as u32;
            let Some(&len) = storages.get(span.storage) else {
                return Err(LayoutError::Storage { piece, storage, storages: storages.len() });
            };
            if span.end(num_blocks).is_none_or(|end| end > len) {
                return Err(LayoutError::Bounds { piece, storage, len });
            }
            // A kernel counts a span's bytes in 32 bits.
            if span.start != block_bytes || u32::try_from(span.bytes()).is_err() {
                return Err(LayoutError::BlockBytes);
            }
            block_bytes += span.bytes();
        }
        let block_bytes = usize::try_from(block_bytes).map_err(|_| LayoutError::BlockBytes)?;
        Ok(Self { spans, storages, num_blocks, block_bytes })
    }

    /// Bytes of a gathered block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Blocks; ids run from 0 to one less.
    pub fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    /// The runs of a block as the pieces of a layout; `None` where rows lie apart within a span.
    pub(crate) fn pieces(&self) -> Option<Vec<Piece>> {
        let piece = |span: &Span| {
            let Span { storage, offset, block_stride, outer, inner, row, .. } = *span;
            let one = (outer.0, inner.0) == (1, 1);
            one.then_some(Piece { storage: storage as u32, offset, stride: block_stride, len: row })
        };
        self.spans.iter().map(piece).collect()
    }

    /// Length in bytes of each storage that it was made for.
    pub fn storages(&self) -> &[u64] {
        &self.storages
    }

    /// The widest access, in bytes, that all of it is aligned to: 16, 4 or 1, given storages that are.
    pub fn width(&self) -> u32 {
        let mut bits = 0;
        for span in &self.spans {
            bits |= span.offset | span.block_stride | u64::from(span.row) | span.start;
            for (count, stride) in [span.outer, span.inner] {
                if count > 1 {
                    bits |= stride;
                }
            }
        }
        match bits.trailing_zeros() {
            4.. => 16,
            2.. => 4,
            _ => 1,
        }
    }

    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span() -> Span {
        Span { storage: 0, offset: 32, block_stride: 256, outer: (2, 64), inner: (3, 16), row: 16, start: 0 }
    }

    #[test]
    fn spans_must_lie_in_their_storage_whatever_the_block() {
        // The last row of block 1 begins at 32 + 256 + 64 + 32 and has 16 bytes.
        assert!(Plan::new(vec![span()], vec![400], 2).is_ok());
        let bounds = LayoutError::Bounds { piece: 0, storage: 0, len: 399 };
        assert_eq!(Plan::new(vec![span()], vec![399], 2), Err(bounds));
        let far = Span { outer: (2, u64::MAX), ..span() };
        assert!(matches!(Plan::new(vec![far], vec![400], 2), Err(LayoutError::Bounds { .. })));
        let gap = Span { start: 16, ..span() };
        assert_eq!(Plan::new(vec![gap], vec![400], 2), Err(LayoutError::BlockBytes));
        let empty = Span { row: 0, ..span() };
        assert_eq!(Plan::new(vec![empty], vec![400], 2), Err(LayoutError::Empty(0)));
    }

    #[test]
    fn the_width_is_what_every_number_is_a_multiple_of() {
        let width = |span: Span| Plan::new(vec![span], vec![4096], 2).unwrap().width();
        assert_eq!(width(span()), 16);
        assert_eq!(width(Span { offset: 36, ..span() }), 4);
        assert_eq!(width(Span { inner: (3, 18), ..span() }), 1);
        assert_eq!(width(Span { inner: (1, 18), ..span() }), 16);
        assert_eq!(width(Span { row: 12, ..span() }), 4);
        assert_eq!(width(Span { block_stride: 255, ..span() }), 1);
    }
}
