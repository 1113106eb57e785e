//! Blocks between engines whose ranks or dimensions differ: the bytes of a block in the common order, and back.
//!
//! # The common order
//! The heads of a rank one after another; of each all layers, in each all tokens, of each K before V. So a rank's block is
//! the heads that other ranks have, put end to end, whatever the number of ranks on either side. A [`HeadMap`] knows
//! where the heads lie in a rank's block: token by token (NHD) or head by head (HND), K and V together or apart, or one
//! latent vector that every rank has.
//!
//! Bytes are rearranged by the CPU, on their way between a memory and the network. Blocks between ranks of equal layout
//! never come here: they travel as they lie.

use std::ops::Range;
use std::sync::Arc;

use baton_proto::connector::{HeadSpan, Layout};
use baton_proto::wire::LayoutFingerprint;
use bytes::Bytes;

use crate::heads::{Spread, Uneven};
use crate::{BlockMemory, Guard, MemoryError};

/// Most rows of all heads of a block: 128 tokens of 80 layers and 100 heads.
pub const MAX_ROWS: usize = 1 << 20;

/// How the blocks of a worker lie, as far as others have to know.
#[derive(Clone, Debug)]
pub struct BlockLayout {
    /// Equal on both sides where blocks travel as they lie.
    pub fingerprint: LayoutFingerprint,
    /// Where heads lie, where they can be told apart.
    pub heads: Option<Arc<HeadMap>>,
}

impl BlockLayout {
    /// Of one of `ranks` workers.
    pub fn of(layout: &Layout, ranks: u32) -> Result<Self, HeadsError> {
        let heads = HeadMap::of(layout, ranks)?.map(Arc::new);
        Ok(Self { fingerprint: LayoutFingerprint::of(layout), heads })
    }

    /// Names what the heads contain, where they can be told apart.
    pub fn content(&self) -> Option<LayoutFingerprint> {
        self.heads.as_ref().map(|heads| heads.content)
    }
}

impl From<LayoutFingerprint> for BlockLayout {
    /// Of blocks that travel as they lie, or not at all.
    fn from(fingerprint: LayoutFingerprint) -> Self {
        Self { fingerprint, heads: None }
    }
}

/// Heads that are not where a layout says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadsError {
    /// Too many rows.
    #[error("layout.heads: more than {MAX_ROWS} rows in a block")]
    Size,
    /// Bytes that belong to no head or to two, or lie behind the block.
    #[error("layout.heads: the rows of all heads have to make up the {0} bytes of a block, each byte once")]
    Cover(u64),
    /// Another number of heads than such a rank has.
    #[error("layout.heads: {count} heads of {total} on one of {ranks} ranks")]
    Count {
        /// Heads on the rank.
        count: u32,
        /// KV heads of the model.
        total: u32,
        /// Ranks.
        ranks: u32,
    },
    /// Heads that no engine spreads so.
    #[error("layout.heads: {0}")]
    Uneven(#[from] Uneven),
}

/// A run of bytes of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    /// Where head 0's begins in the block.
    at: u32,
    /// From one head to the next.
    head_stride: u32,
    /// Bytes.
    len: u32,
}

impl Row {
    /// Where a head's begins.
    fn of(self, head: u32) -> usize {
        self.at as usize + head as usize * self.head_stride as usize
    }
}

/// Where the heads of a rank lie in its blocks. Every byte of a block belongs to exactly one head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadMap {
    content: LayoutFingerprint,
    total: u32,
    count: u32,
    head_bytes: usize,
    /// Of head 0, in the common order.
    rows: Vec<Row>,
}

impl HeadMap {
    /// Of one of `ranks` workers; `None` where the layout does not tell heads apart. Takes up to a few 100 ms for the most
    /// rows, some milliseconds for what engines have.
    pub fn of(layout: &Layout, ranks: u32) -> Result<Option<Self>, HeadsError> {
        let Some(heads) = &layout.heads else { return Ok(None) };
        let (total, count) = (heads.total, heads.count);
        if total as usize > MAX_ROWS {
            return Err(HeadsError::Size);
        }
        if Spread::new(total, ranks)?.per_rank != count {
            return Err(HeadsError::Count { count, total, ranks });
        }
        let block_bytes: u64 = layout.pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let mut rows = Vec::new();
        for span in &heads.spans {
            add_rows(span, MAX_ROWS / count as usize, block_bytes, &mut rows)?;
        }
        cover(&rows, count, block_bytes)?;
        let rows = join(rows, count);
        let head_bytes = block_bytes / u64::from(count);
        let content = LayoutFingerprint::of_content(&layout.facts, total, head_bytes);
        Ok(Some(Self { content, total, count, head_bytes: head_bytes as usize, rows }))
    }

    /// Names what the heads contain: equal on both sides of any transfer.
    pub fn content(&self) -> LayoutFingerprint {
        self.content
    }

    /// KV heads of the model.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Heads on this rank.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Appends heads of a block, whose bytes are `block`'s end to end, in the common order. Panics where the block has
    /// another length, or these heads are not on this rank.
    fn gather(&self, block: &[Bytes], heads: Range<u32>, into: &mut Vec<u8>) {
        let mut pieces = Pieces::new(block);
        for head in heads {
            for row in &self.rows {
                pieces.copy(row.of(head), row.len as usize, into);
            }
        }
    }

    /// The reverse for all heads of this rank. Panics where the lengths are not a block's.
    fn scatter(&self, mut common: &[u8], block: &mut [u8]) {
        for head in 0..self.count {
            for row in &self.rows {
                let (bytes, rest) = common.split_at(row.len as usize);
                block[row.of(head)..][..bytes.len()].copy_from_slice(bytes);
                common = rest;
            }
        }
    }
}

/// Adds the rows of head 0 in one span.
fn add_rows(span: &HeadSpan, most: usize, block_bytes: u64, rows: &mut Vec<Row>) -> Result<(), HeadsError> {
    let count = span.dims.iter().try_fold(1usize, |count, (size, _)| count.checked_mul(*size as usize));
    if count.is_none_or(|count| count > most.saturating_sub(rows.len())) {
        return Err(HeadsError::Size);
    }
    let cover = HeadsError::Cover(block_bytes);
    let mut places = vec![u64::from(span.start)];
    for (size, stride) in &span.dims {
        let along = |place: u64| (0..u64::from(*size)).map(move |i| place + i * u64::from(*stride));
        places = places.into_iter().flat_map(along).collect();
    }
    for place in places {
        let at = u32::try_from(place).map_err(|_| cover.clone())?;
        rows.push(Row { at, head_stride: span.head_stride, len: span.len });
    }
    Ok(())
}

/// Whether the rows of all heads are the bytes of a block, each once.
fn cover(rows: &[Row], count: u32, block_bytes: u64) -> Result<(), HeadsError> {
    let mut runs: Vec<(usize, u32)> =
        rows.iter().flat_map(|row| (0..count).map(|head| (row.of(head), row.len))).collect();
    runs.sort_unstable();
    let mut end = 0;
    for (at, len) in runs {
        if at as u64 != end || len == 0 {
            return Err(HeadsError::Cover(block_bytes));
        }
        end += u64::from(len);
    }
    if end == 0 || end != block_bytes {
        return Err(HeadsError::Cover(block_bytes));
    }
    Ok(())
}

/// Joins rows that adjoin on every head.
fn join(rows: Vec<Row>, count: u32) -> Vec<Row> {
    let mut joined: Vec<Row> = Vec::new();
    for row in rows {
        match joined.last_mut() {
            Some(last)
                if last.at + last.len == row.at && (last.head_stride == row.head_stride || count == 1) =>
            {
                last.len += row.len;
            }
            _ => joined.push(row),
        }
    }
    joined
}

/// Bytes that lie in several pieces, end to end.
struct Pieces<'a> {
    pieces: &'a [Bytes],
    /// Where each ends.
    ends: Vec<usize>,
    /// The one that was read last.
    last: usize,
}

impl<'a> Pieces<'a> {
    fn new(pieces: &'a [Bytes]) -> Self {
        let end = |end: &mut usize, piece: &Bytes| {
            *end += piece.len();
            Some(*end)
        };
        Self { pieces, ends: pieces.iter().scan(0, end).collect(), last: 0 }
    }

    fn start(&self, piece: usize) -> usize {
        self.ends[piece] - self.pieces[piece].len()
    }

    fn copy(&mut self, mut at: usize, mut len: usize, into: &mut Vec<u8>) {
        while len > 0 {
            if at < self.start(self.last) || at >= self.ends[self.last] {
                self.last = self.ends.partition_point(|end| *end <= at);
            }
            let skip = at - self.start(self.last);
            let bytes = &self.pieces[self.last][skip..];
            let now = len.min(bytes.len());
            into.extend_from_slice(&bytes[..now]);
            (at, len) = (at + now, len - now);
        }
    }
}

/// Some heads of one rank.
pub struct Slice {
    /// The rank's memory.
    pub memory: Arc<dyn BlockMemory>,
    /// Where heads lie in it.
    pub map: Arc<HeadMap>,
    /// Which, by their numbers on the rank.
    pub heads: Range<u32>,
}

/// Heads of several ranks, one after another, as blocks in the common order. To be read only; it is not shared, and
/// nothing is staged. A read takes the whole blocks of the ranks, and copies what is wanted of them.
pub struct Sliced {
    slices: Vec<Slice>,
    block_bytes: usize,
}

impl Sliced {
    /// Of heads that are on their ranks.
    pub fn new(slices: Vec<Slice>) -> Arc<Self> {
        let bytes = |slice: &Slice| slice.heads.len() * slice.map.head_bytes;
        let block_bytes = slices.iter().map(bytes).sum();
        Arc::new(Self { slices, block_bytes })
    }

    /// All heads of one rank.
    pub fn whole(memory: Arc<dyn BlockMemory>, map: Arc<HeadMap>) -> Arc<Self> {
        let heads = 0..map.count;
        Self::new(vec![Slice { memory, map, heads }])
    }
}

impl BlockMemory for Sliced {
    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn num_blocks(&self) -> u64 {
        self.slices.iter().map(|slice| slice.memory.num_blocks()).min().unwrap_or(0)
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        let mut common = Vec::with_capacity(self.block_bytes);
        for Slice { memory, map, heads } in &self.slices {
            let pieces = memory.clone().read(block, guard.clone())?;
            map.gather(&pieces, heads.clone(), &mut common);
        }
        Ok(vec![common.into()])
    }

    fn write(&self, _block: u32, _offset: usize, _bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }
}

/// Writes blocks that come in the common order to a rank's memory, block after block. Holds two blocks' bytes.
pub struct Filling {
    memory: Arc<dyn BlockMemory>,
    map: Arc<HeadMap>,
    /// The block that comes, and what came of it.
    block: u32,
    common: Vec<u8>,
    arranged: Vec<u8>,
}

impl Filling {
    /// All heads of a rank. `map` is that of the memory.
    pub fn new(memory: Arc<dyn BlockMemory>, map: Arc<HeadMap>) -> Self {
        let block_bytes = memory.block_bytes();
        let (common, arranged) = (Vec::with_capacity(block_bytes), vec![0; block_bytes]);
        Self { memory, map, block: 0, common, arranged }
    }

    /// Takes bytes of a block, which come in order; one that begins anew is taken anew. With its last byte the block is
    /// written to the memory, as by [`BlockMemory::write`].
    pub fn write(&mut self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let block_bytes = self.arranged.len();
        if offset == 0 {
            self.block = block;
            self.common.clear();
        }
        let filled = self.common.len();
        if self.block != block || offset != filled {
            return Err(MemoryError::Order { block, offset, filled });
        }
        if bytes.len() > block_bytes - filled {
            return Err(MemoryError::Range { offset, len: bytes.len(), block_bytes });
        }
        self.common.extend_from_slice(bytes);
        if self.common.len() < block_bytes {
            return Ok(());
        }
        self.map.scatter(&self.common, &mut self.arranged);
        self.memory.write(block, 0, &self.arranged)
    }
}

#[cfg(test)]
mod tests;
