//! Runs of blocks that follow each other, and who holds which stretch of them.

use baton_proto::BlockHash;
use smallvec::SmallVec;

/// Bits of [`Span::tiers`] that stand for tiers.
pub(super) const HELD: u8 = 0b0111;
/// The bit that stands for a block which is expected and held in no tier.
pub(super) const EXPECTED: u8 = 0b1000;

/// A chain with more stretches than this is one that many share.
const FEW: usize = 8;

/// One cache of one engine holds this stretch of a chain, everywhere in the same tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Which cache.
    pub(super) lane: u16,
    /// First position.
    pub(super) first: u16,
    /// Last position, itself included.
    pub(super) last: u16,
    /// [`HELD`] bits, or [`EXPECTED`] alone; never empty.
    pub(super) tiers: u8,
    /// Low byte of the tick at which an expectation ends; 0 without one.
    pub(super) until: u8,
}

impl Span {
    /// All but the lane, for comparisons. Tiers are never empty.
    #[inline]
    pub(super) fn stretch(&self) -> (u32, u16) {
        let state = u16::from_le_bytes([self.tiers, self.until]);
        (u32::from(self.first) | u32::from(self.last) << 16, state)
    }

    fn state(&self) -> State {
        State { tiers: self.tiers, until: self.until }
    }
}

/// What one cache has of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) tiers: u8,
    pub(super) until: u8,
}

impl State {
    pub(super) const NONE: Self = Self { tiers: 0, until: 0 };

    pub(super) fn is_held(self) -> bool {
        self.tiers & HELD != 0
    }

    pub(super) fn is_expected(self) -> bool {
        self.tiers & EXPECTED != 0
    }
}

/// By how much an edit changed the number of blocks held and expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Delta {
    pub(super) held: i64,
    pub(super) expected: i64,
}

impl Delta {
    fn add(&mut self, blocks: u32, before: State, after: State) {
        let blocks = i64::from(blocks);
        self.held += blocks * (i64::from(after.is_held()) - i64::from(before.is_held()));
        self.expected += blocks * (i64::from(after.is_expected()) - i64::from(before.is_expected()));
    }
}

/// Blocks of which each follows the one before it. A block that nobody holds or expects any more is *dead*: its hash
/// stays where live blocks come behind it, its entry in a table does not. The last block is never dead.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Chain {
    pub(super) hashes: Vec<BlockHash>,
    /// In order of lane and position; neighbours differ.
    pub(super) spans: SmallVec<[Span; 2]>,
    /// Dead blocks.
    pub(super) dead: u32,
    /// Whether the chain stands in the list of those with expectations. Belongs to the id, not to its present use.
    pub(super) listed: bool,
}

impl Chain {
    pub(super) fn len(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Appends a block. Room grows by an eighth: chains that grow block by block waste little.
    pub(super) fn push(&mut self, hash: BlockHash, expected_more: usize) {
        if self.hashes.len() == self.hashes.capacity() {
            let len = self.hashes.len();
            self.hashes.reserve_exact(expected_more.max(len / 8).max(1));
        }
        self.hashes.push(hash);
    }

    /// Whether blocks that come behind its last one become part of it. What many share is kept apart from how each of them goes
    /// on: lookups of all of them pass it, and then all of it.
    pub(super) fn goes_on(&self) -> bool {
        self.spans.len() <= FEW
    }

    /// Drops the dead blocks at the end.
    pub(super) fn trim(&mut self) {
        if self.dead == 0 {
            return;
        }
        let end = self.spans.iter().map(|span| u32::from(span.last) + 1).max().unwrap_or(0);
        self.dead -= self.len() - end;
        self.hashes.truncate(end as usize);
        let capacity = self.hashes.capacity();
        if self.hashes.len() < capacity - capacity / 4 {
            self.hashes.shrink_to_fit();
        }
    }

    /// Whether the block, which is in the chain, is not dead.
    pub(super) fn is_live(&self, pos: u32) -> bool {
        self.dead == 0 || self.covered(pos)
    }

    /// Whether the block, which is live, is the chain's first or comes behind a dead one.
    pub(super) fn is_head(&self, pos: u32) -> bool {
        pos == 0 || !self.is_live(pos - 1)
    }

    /// Where a live block lies.
    pub(super) fn position(&self, hash: &BlockHash) -> Option<u32> {
        let pos = self.hashes.iter().rposition(|other| other == hash)? as u32;
        self.is_live(pos).then_some(pos)
    }

    /// Whether anybody holds or expects the block.
    pub(super) fn covered(&self, pos: u32) -> bool {
        self.any_covered(pos, pos)
    }

    /// Whether anybody holds or expects any of the blocks `first..=last`.
    pub(super) fn any_covered(&self, first: u32, last: u32) -> bool {
        self.spans.iter().any(|span| u32::from(span.first) <= last && first <= u32::from(span.last))
    }

    /// How many of the hashes, which go on from the block at `pos` backwards, are those of live blocks. The first is at
    /// `pos`, and live.
    pub(super) fn common_back(&self, pos: u32, hashes: &[BlockHash]) -> u32 {
        let there = self.hashes[..=pos as usize].iter().rev().zip(hashes);
        let blocks = there.take_while(|(a, b)| a == b).count() as u32;
        match self.dead {
            0 => blocks,
            // A dead block is not in the table, or lives elsewhere by now.
            _ => (0..blocks).find(|back| !self.covered(pos - back)).unwrap_or(blocks),
        }
    }

    /// The first dead block from `pos` on, which is not dead itself; `end` where there is none before it.
    pub(super) fn covered_from(&self, pos: u32, end: u32) -> u32 {
        let mut at = pos;
        while at < end {
            let spans = self.spans.iter();
            let over = spans.filter(|span| u32::from(span.first) <= at && at <= u32::from(span.last));
            match over.map(|span| u32::from(span.last) + 1).max() {
                Some(next) => at = next,
                None => break,
            }
        }
        at.min(end)
    }

    /// The lane's spans: where they begin and end.
    pub(super) fn lane(&self, lane: u16) -> std::ops::Range<usize> {
        let start = self.spans.partition_point(|span| span.lane < lane);
        let len = self.spans[start..].iter().take_while(|span| span.lane == lane).count();
        start..start + len
    }

    /// What the lane has of the block.
    pub(super) fn state(&self, lane: u16, pos: u32) -> State {
        self.spans[self.lane(lane)]
            .iter()
            .find(|span| u32::from(span.first) <= pos && pos <= u32::from(span.last))
            .map_or(State::NONE, Span::state)
    }

    /// Changes what the lane has of the blocks `first..=last`.
    pub(super) fn edit(
        &mut self,
        lane: u16,
        first: u32,
        last: u32,
        change: impl Fn(State) -> State,
    ) -> Delta {
        let (first, last) = (first as u16, last as u16);
        let mut delta = Delta::default();
        let start = self.spans.partition_point(|span| span.lane < lane);
        let others = self.spans.get(start).is_none_or(|span| span.lane != lane);
        if others {
            // Nothing yet: the common store.
            let after = change(State::NONE);
            if after.tiers != 0 {
                delta.add(u32::from(last - first) + 1, State::NONE, after);
                self.spans.insert(start, Span { lane, first, last, tiers: after.tiers, until: after.until });
            }
            return delta;
        }
        let alone = self.spans.get(start + 1).is_none_or(|span| span.lane != lane);
        if alone {
            // One span that grows or shrinks at its end: the common store behind, and the common eviction.
            let span = &mut self.spans[start];
            if span.last.checked_add(1) == Some(first) && change(State::NONE) == span.state() {
                delta.add(u32::from(last - first) + 1, State::NONE, span.state());
                span.last = last;
                return delta;
            }
            if span.first < first && span.last == last && change(span.state()).tiers == 0 {
                delta.add(u32::from(last - first) + 1, span.state(), State::NONE);
                span.last = first - 1;
                return delta;
            }
            if span.first <= first && last <= span.last && change(span.state()) == span.state() {
                return delta;
            }
        }
        self.rewrite(lane, first, last, change)
    }

    /// The general case of [`Self::edit`].
    fn rewrite(&mut self, lane: u16, first: u16, last: u16, change: impl Fn(State) -> State) -> Delta {
        fn push(pieces: &mut SmallVec<[Span; 8]>, piece: Span) {
            if piece.tiers == 0 {
                return;
            }
            match pieces.last_mut() {
                Some(before) if before.last + 1 == piece.first && before.state() == piece.state() => {
                    before.last = piece.last;
                }
                _ => pieces.push(piece),
            }
        }

        let mut delta = Delta::default();
        let range = self.lane(lane);
        // What does not touch the edited stretch stays as it is.
        let old = &self.spans[range.clone()];
        let from = range.start + old.partition_point(|span| u32::from(span.last) + 1 < u32::from(first));
        let to = range.start + old.partition_point(|span| u32::from(span.first) <= u32::from(last) + 1);
        let mut pieces: SmallVec<[Span; 8]> = SmallVec::new();
        let mut next = u32::from(first);
        let mut changed = |pieces: &mut SmallVec<[Span; 8]>, from: u32, to: u32, before: State| {
            let after = change(before);
            delta.add(to - from + 1, before, after);
            let (first, last) = (from as u16, to as u16);
            push(pieces, Span { lane, first, last, tiers: after.tiers, until: after.until });
        };
        for span in &self.spans[from..to] {
            if span.first < first {
                push(&mut pieces, Span { last: span.last.min(first - 1), ..*span });
            }
            let (inner_first, inner_last) = (span.first.max(first), span.last.min(last));
            if inner_first <= inner_last {
                if next < u32::from(inner_first) {
                    changed(&mut pieces, next, u32::from(inner_first) - 1, State::NONE);
                }
                changed(&mut pieces, inner_first.into(), inner_last.into(), span.state());
                next = u32::from(inner_last) + 1;
            }
            if span.last > last {
                if next <= u32::from(last) {
                    changed(&mut pieces, next, last.into(), State::NONE);
                    next = u32::from(last) + 1;
                }
                push(&mut pieces, Span { first: span.first.max(last + 1), ..*span });
            }
        }
        if next <= u32::from(last) {
            changed(&mut pieces, next, last.into(), State::NONE);
        }
        let common = pieces.len().min(to - from);
        self.spans[from..from + common].copy_from_slice(&pieces[..common]);
        if pieces.len() > common {
            self.spans.insert_many(from + common, pieces[common..].iter().copied());
        } else {
            self.spans.drain(from + common..to);
        }
        if self.spans.spilled() && self.spans.len() * 4 < self.spans.capacity() {
            self.spans.shrink_to_fit();
        }
        delta
    }
}

/// All chains, by id. Ids start at 1. Chunks never move, so growing costs no copy.
#[derive(Debug, Default)]
pub(super) struct Chains {
    chunks: Vec<Vec<Chain>>,
    free: Vec<u32>,
    /// How often blocks moved from one chain to another.
    pub(super) moves: u64,
}

const CHUNK: usize = 1024;

impl Chains {
    /// One more than the largest id in use.
    pub(super) fn end(&self) -> u32 {
        match self.chunks.last() {
            Some(last) => ((self.chunks.len() - 1) * CHUNK + last.len()) as u32 + 1,
            None => 1,
        }
    }

    /// An id for a new, empty chain.
    pub(super) fn create(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        let id = self.end();
        if id as usize > super::key::MAX_CHAINS {
            return None;
        }
        match self.chunks.last_mut() {
            Some(last) if last.len() < CHUNK => last.push(Chain::default()),
            _ => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(Chain::default());
                self.chunks.push(chunk);
            }
        }
        Some(id)
    }

    /// How many ids [`Self::create`] can give.
    pub(super) fn room(&self) -> usize {
        self.free.len() + super::key::MAX_CHAINS + 1 - self.end() as usize
    }

    /// Gives an id back.
    pub(super) fn release(&mut self, id: u32) {
        let chain = &mut self[id];
        *chain = Chain { listed: chain.listed, ..Chain::default() };
        self.free.push(id);
    }
}

impl std::ops::Index<u32> for Chains {
    type Output = Chain;

    fn index(&self, id: u32) -> &Chain {
        let at = id as usize - 1;
        &self.chunks[at / CHUNK][at % CHUNK]
    }
}

impl std::ops::IndexMut<u32> for Chains {
    fn index_mut(&mut self, id: u32) -> &mut Chain {
        let at = id as usize - 1;
        &mut self.chunks[at / CHUNK][at % CHUNK]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn spans_equal_an_array_of_states(
            edits in prop::collection::vec((0..3u16, 0..24u32, 0..8u32, 0..8u8, any::<bool>()), 1..60),
        ) {
            let mut chain = Chain::default();
            let mut model = [[State::NONE; 40]; 3];
            for (lane, first, more, bits, add) in edits {
                let change = |before: State| {
                    let tiers = if add { before.tiers | bits } else { before.tiers & !bits };
                    State { tiers, until: 0 }
                };
                let mut expected = Delta::default();
                for state in &mut model[usize::from(lane)][first as usize..=(first + more) as usize] {
                    expected.add(1, *state, change(*state));
                    *state = change(*state);
                }
                prop_assert_eq!(chain.edit(lane, first, first + more, change), expected);
                for (lane, states) in model.iter().enumerate() {
                    for (pos, state) in states.iter().enumerate() {
                        prop_assert_eq!(chain.state(lane as u16, pos as u32), *state);
                    }
                }
                for pair in chain.spans.windows(2) {
                    prop_assert!(pair[0].lane < pair[1].lane || pair[0].last < pair[1].first);
                    prop_assert!(
                        pair[0].lane != pair[1].lane
                            || pair[0].last + 1 < pair[1].first
                            || pair[0].state() != pair[1].state()
                    );
                }
            }
        }
    }
}
