//! Blocks between engines whose ranks or dimensions differ: the bytes of a block in the common order, and back.
//!
//! # The common order
//! The heads of a rank one after another; of each all layers, in each all tokens, of each K before V. So a rank's block is
//! the heads that other ranks have, put end to end, whatever the number of ranks on either side. A [`HeadMap`] knows
//! where the heads lie in a rank's block: token by token (NHD) or head by head (HND), K and V together or apart, or one
//! latent vector that every rank has.
//!
//! Bytes are rearranged by the CPU, on their way between a memory and the network. Blocks between ranks of equal layout
//! do not come here, but where they are packed: they travel as they lie.
//!
//! # Packed
//! Heads of bf16 may be packed to fp8 ([`crate::reference::fp8`]): the codes of a head's values in the common order, then a
//! scale for each of its layers. Packed heads are put end to end as others are.

use std::ops::Range;
use std::sync::Arc;

use baton_proto::connector::{HeadSpan, Layout};
use baton_proto::wire::{BlockForm, LayoutFingerprint, WireDtype};
use bytes::Bytes;

use crate::bounds::LayoutError;
use crate::heads::{Spread, Uneven};
use crate::plan::{Plan, Span};
use crate::reference::fp8;
use crate::{BlockMemory, Guard, MemoryError};

/// Most rows of all heads of a block: 128 tokens of 80 layers and 100 heads.
pub const MAX_ROWS: usize = 1 << 20;

/// Fact of a layout that names the type of its values.
const DTYPE: &str = "dtype";
/// What can be packed.
const BF16: &str = "bfloat16";

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

    /// Bytes of a block that travels as fp8, or why none does.
    pub fn packed_bytes(&self) -> Result<usize, Unpackable> {
        self.heads.as_ref().ok_or(Unpackable::Heads)?.block_bytes(WireDtype::Fp8)
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

/// KV that cannot travel as fp8.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unpackable {
    /// Nobody says where heads lie.
    #[error("its heads cannot be told apart")]
    Heads,
    /// Values of another type.
    #[error("its dtype is {0:?}, and {BF16:?} alone is packed")]
    Dtype(String),
    /// Layers that cannot have one length of what shares a scale.
    #[error(
        "a head has {0} bytes in one layer and {1} in another; to be packed they have to be equal, and even"
    )]
    Layers(u64, u64),
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
    /// Values that share a scale where heads are packed: those of one head in one layer.
    segment: Result<usize, Unpackable>,
    /// Of head 0, in the common order.
    rows: Vec<Row>,
    /// The same as the layout has them, for kernels.
    spans: Vec<HeadSpan>,
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
        let segment = segment_of(layout, &heads.spans);
        let (head_bytes, spans) = (head_bytes as usize, heads.spans.clone());
        Ok(Some(Self { content, total, count, head_bytes, segment, rows, spans }))
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

    /// Values that share a scale where heads are packed, or why they cannot be.
    pub(crate) fn segment(&self) -> Result<usize, Unpackable> {
        self.segment.clone()
    }

    /// Copies all heads in the common order from one storage, in which a block lies with its pieces end to end.
    pub(crate) fn plan(&self) -> Result<Plan, LayoutError> {
        let block_bytes = self.count as u64 * self.head_bytes as u64;
        let mut spans: Vec<Span> = Vec::new();
        for (head, of) in (0..self.count).flat_map(|head| self.spans.iter().map(move |of| (head, of))) {
            let first = u64::from(of.start) + u64::from(head) * u64::from(of.head_stride);
            // A span of a plan has two strides; there is one for each place along the others.
            let (others, last) = of.dims.split_at(of.dims.len().saturating_sub(2));
            let mut last = last.iter().rev().map(|(size, stride)| (*size, u64::from(*stride)));
            let inner = last.next().unwrap_or((1, 0));
            let outer = last.next().unwrap_or((1, 0));
            for offset in places(first, others) {
                let start = spans.last().map_or(0, |span| span.start + span.bytes());
                let row = of.len;
                spans.push(Span { storage: 0, offset, block_stride: block_bytes, outer, inner, row, start });
            }
        }
        Plan::new(spans, vec![block_bytes], 1)
    }

    /// Bytes of one head of a block as it travels.
    fn head_bytes(&self, dtype: WireDtype) -> Result<usize, Unpackable> {
        Ok(match dtype {
            WireDtype::AsStored => self.head_bytes,
            WireDtype::Fp8 => {
                let segment = self.segment.clone()?;
                fp8::packed_bytes(self.head_bytes / 2 / segment, segment)
            }
        })
    }

    /// Bytes of a block of this rank as it travels in the common order.
    pub fn block_bytes(&self, dtype: WireDtype) -> Result<usize, Unpackable> {
        Ok(self.count as usize * self.head_bytes(dtype)?)
    }

    /// Appends heads of a block, whose bytes are `block`'s end to end, in the common order. Panics where the block has
    /// another length, or these heads are not on this rank.
    fn gather(&self, block: &[Bytes], heads: Range<u32>, into: &mut Vec<u8>) {
        let mut pieces = Pieces::new(block);
        heads.for_each(|head| self.gather_head(&mut pieces, head, into));
    }

    fn gather_head(&self, pieces: &mut Pieces<'_>, head: u32, into: &mut Vec<u8>) {
        for row in &self.rows {
            pieces.copy(row.of(head), row.len as usize, into);
        }
    }

    /// As [`Self::gather`], of heads packed in segments.
    fn pack(&self, segment: usize, block: &[Bytes], heads: Range<u32>, into: &mut Vec<u8>) {
        let mut pieces = Pieces::new(block);
        let mut values = Vec::with_capacity(self.head_bytes);
        for head in heads {
            values.clear();
            self.gather_head(&mut pieces, head, &mut values);
            fp8::pack(&values, segment, into);
        }
    }

    /// The reverse of [`Self::gather`] for all heads of this rank. Panics where the lengths are not a block's.
    fn scatter(&self, common: &[u8], block: &mut [u8]) {
        for (head, bytes) in (0..self.count).zip(common.chunks_exact(self.head_bytes)) {
            self.scatter_head(head, bytes, block);
        }
    }

    fn scatter_head(&self, head: u32, mut common: &[u8], block: &mut [u8]) {
        for row in &self.rows {
            let (bytes, rest) = common.split_at(row.len as usize);
            block[row.of(head)..][..bytes.len()].copy_from_slice(bytes);
            common = rest;
        }
    }

    /// Finds what nobody can have packed so, in all heads of this rank. Panics where the length is not a block's.
    fn check(&self, segment: usize, packed: &[u8]) -> Result<(), fp8::BadScale> {
        self.packed_heads(segment, packed).try_for_each(|(_, packed)| fp8::check(packed, segment))
    }

    /// The reverse of [`Self::pack`] for all heads of this rank. Panics where the lengths are not a block's.
    fn unpack(&self, segment: usize, packed: &[u8], block: &mut [u8]) {
        let mut values = vec![0; self.head_bytes];
        for (head, packed) in self.packed_heads(segment, packed) {
            fp8::unpack(packed, segment, &mut values);
            self.scatter_head(head, &values, block);
        }
    }

    fn packed_heads<'a>(&self, segment: usize, packed: &'a [u8]) -> impl Iterator<Item = (u32, &'a [u8])> {
        let head_bytes = fp8::packed_bytes(self.head_bytes / 2 / segment, segment);
        (0..self.count).zip(packed.chunks_exact(head_bytes))
    }
}

/// Values of one head in one layer, where all layers have as many, of the one type that is packed.
fn segment_of(layout: &Layout, spans: &[HeadSpan]) -> Result<usize, Unpackable> {
    let dtype = layout.facts.get(DTYPE).map_or("", String::as_str);
    if dtype != BF16 {
        return Err(Unpackable::Dtype(dtype.to_owned()));
    }
    // The spans were looked at: their bytes are some of a block's.
    let bytes = |span: &HeadSpan| {
        span.dims.iter().fold(u64::from(span.len), |bytes, (size, _)| bytes * u64::from(*size))
    };
    let first = spans.first().map_or(0, bytes);
    match spans.iter().map(bytes).find(|other| *other != first || !other.is_multiple_of(2)) {
        Some(other) => Err(Unpackable::Layers(first, other)),
        None => Ok(first as usize / 2),
    }
}

/// Adds the rows of head 0 in one span.
fn add_rows(span: &HeadSpan, most: usize, block_bytes: u64, rows: &mut Vec<Row>) -> Result<(), HeadsError> {
    let count = span.dims.iter().try_fold(1usize, |count, (size, _)| count.checked_mul(*size as usize));
    if count.is_none_or(|count| count > most.saturating_sub(rows.len())) {
        return Err(HeadsError::Size);
    }
    let cover = HeadsError::Cover(block_bytes);
    if count == Some(0) {
        return Err(cover);
    }
    for place in places(u64::from(span.start), &span.dims) {
        let at = u32::try_from(place).map_err(|_| cover.clone())?;
        rows.push(Row { at, head_stride: span.head_stride, len: span.len });
    }
    Ok(())
}

/// Where steps along some dimensions lead, the last of them running fastest.
fn places(first: u64, dims: &[(u32, u32)]) -> Vec<u64> {
    let along = |places: Vec<u64>, (size, stride): &(u32, u32)| {
        let (size, stride) = (u64::from(*size), u64::from(*stride));
        places.into_iter().flat_map(|place| (0..size).map(move |i| place + i * stride)).collect()
    };
    dims.iter().fold(vec![first], along)
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

impl Slice {
    /// The heads of a block in the common order.
    fn read(&self, block: u32, dtype: WireDtype, guard: &Guard) -> Result<Vec<Bytes>, MemoryError> {
        let Self { memory, map, heads } = self;
        let head_bytes = map.head_bytes(dtype)?;
        if dtype == WireDtype::Fp8
            && let Some(staged) = memory.clone().stage_packed(block, map, guard.clone())
        {
            let wanted = heads.start as usize * head_bytes..heads.end as usize * head_bytes;
            return Ok(staged?.take()?.into_iter().map(|all| all.slice(wanted.clone())).collect());
        }
        let pieces = memory.clone().read(block, guard.clone())?;
        let mut common = Vec::with_capacity(heads.len() * head_bytes);
        match dtype {
            WireDtype::AsStored => map.gather(&pieces, heads.clone(), &mut common),
            WireDtype::Fp8 => map.pack(map.segment()?, &pieces, heads.clone(), &mut common),
        }
        Ok(vec![common.into()])
    }
}

/// Heads of several ranks, one after another, as blocks in the common order. To be read only; it is not shared, and
/// nothing is staged. A read takes the whole blocks of the ranks, and copies or packs what is wanted of them: a
/// millisecond or so for each MiB.
pub struct Sliced {
    slices: Vec<Slice>,
    dtype: WireDtype,
    block_bytes: usize,
}

impl Sliced {
    /// Of heads that are on their ranks.
    pub fn new(slices: Vec<Slice>, dtype: WireDtype) -> Result<Arc<Self>, Unpackable> {
        let bytes = |slice: &Slice| Ok(slice.heads.len() * slice.map.head_bytes(dtype)?);
        let block_bytes = slices.iter().map(bytes).sum::<Result<_, _>>()?;
        Ok(Arc::new(Self { slices, dtype, block_bytes }))
    }

    /// All heads of one rank.
    pub fn whole(
        memory: Arc<dyn BlockMemory>,
        map: Arc<HeadMap>,
        dtype: WireDtype,
    ) -> Result<Arc<Self>, Unpackable> {
        let heads = 0..map.count;
        Self::new(vec![Slice { memory, map, heads }], dtype)
    }

    /// A view of a rank's memory in which blocks have the form in which they came: of packed ones, the very bytes. `map` is
    /// the memory's, which has to be known where they did not come as they lie.
    pub fn as_it_came(
        memory: Arc<dyn BlockMemory>,
        map: Option<&Arc<HeadMap>>,
        form: BlockForm,
    ) -> Result<Arc<dyn BlockMemory>, Unpackable> {
        match form {
            BlockForm::AsItLies => Ok(memory),
            BlockForm::Common | BlockForm::Packed => {
                let map = map.ok_or(Unpackable::Heads)?;
                Ok(Self::whole(memory, map.clone(), form.dtype())?)
            }
        }
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
        let mut common = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            common.extend(slice.read(block, self.dtype, &guard)?);
        }
        Ok(common)
    }

    fn write(&self, _block: u32, _offset: usize, _bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }
}

/// Writes blocks that come in the common order to a rank's memory, block after block. Holds a block's bytes twice: as
/// they come, and as they lie.
pub struct Filling {
    memory: Arc<dyn BlockMemory>,
    map: Arc<HeadMap>,
    /// Of what comes.
    dtype: WireDtype,
    block_bytes: usize,
    /// The block that comes, and what came of it.
    block: u32,
    common: Vec<u8>,
    arranged: Vec<u8>,
}

impl Filling {
    /// All heads of a rank. `map` is that of the memory.
    pub fn new(
        memory: Arc<dyn BlockMemory>,
        map: Arc<HeadMap>,
        dtype: WireDtype,
    ) -> Result<Self, Unpackable> {
        let block_bytes = map.block_bytes(dtype)?;
        let (common, arranged) = (Vec::with_capacity(block_bytes), vec![0; memory.block_bytes()]);
        Ok(Self { memory, map, dtype, block_bytes, block: 0, common, arranged })
    }

    /// Takes bytes of a block, which come in order; one that begins anew is taken anew. With its last byte the block is
    /// written to the memory, as by [`BlockMemory::write`]; one that nobody can have packed so is not.
    pub fn write(&mut self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        if offset == 0 {
            self.block = block;
            self.common.clear();
        }
        let (filled, block_bytes) = (self.common.len(), self.block_bytes);
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
        match self.dtype {
            WireDtype::AsStored => self.map.scatter(&self.common, &mut self.arranged),
            WireDtype::Fp8 => {
                let segment = self.map.segment()?;
                let wrong = |error| MemoryError::Packed { block, error };
                self.map.check(segment, &self.common).map_err(wrong)?;
                if let Some(written) = self.memory.write_packed(block, &self.map, &self.common) {
                    return written;
                }
                self.map.unpack(segment, &self.common, &mut self.arranged);
            }
        }
        self.memory.write(block, 0, &self.arranged)
    }
}

#[cfg(test)]
mod tests;
