//! The index's data and every change to it, one small step at a time: who calls holds the lock for one step.

use baton_proto::BlockHash;

use super::chain::{Chains, Delta, EXPECTED, HELD, State};
use super::key::{MAX_CHAIN, Place};
use super::lanes::Lanes;
use super::places::Places;

use super::types::{Holder, Limits, Slot, Tiers};

/// Blocks that one step stores, removes or lets go of at most.
pub(super) const STEP: usize = 64;

/// Chains up to this length are taken into the one they continue.
const ABSORB: u32 = 16;

/// Chains shorter than this keep their dead blocks.
const MIN_SPLIT: u32 = 64;

/// A block becomes this to a cache.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    /// Held in these tiers too.
    Held(u8),
    /// Expected until the tick whose low byte this is, unless it is held.
    Expected(u8),
}

/// What blocks to be marked stand behind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behind<'a> {
    /// Each of them follows the one before it.
    pub(super) chained: bool,
    /// The block before the first, where they are chained and it is known.
    pub(super) parent: Option<&'a BlockHash>,
    /// Where that lay a moment ago.
    pub(super) likely: Option<Place>,
    /// Whether it came to life a moment ago: what comes behind it will do so too.
    pub(super) new: bool,
}

/// The data.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) places: Places,
    pub(super) chains: Chains,
    pub(super) lanes: Lanes,
    pub(super) limits: Limits,
    /// Over live lanes.
    pub(super) memberships: u64,
    /// Blocks expected and not held, over live lanes.
    pub(super) expected: u64,
    /// Memberships that the cap kept out, ever.
    pub(super) dropped: u64,
    /// Expectations that the cap kept out, ever.
    pub(super) dropped_expected: u64,
    /// Chains that may have expectations.
    pub(super) expecting: Vec<u32>,
    /// The last tick that expired.
    pub(super) now: u64,
}

impl Data {
    pub(super) fn new(limits: Limits, seed: u64) -> Self {
        Self {
            places: Places::new(seed),
            chains: Chains::default(),
            lanes: Lanes::default(),
            limits,
            memberships: 0,
            expected: 0,
            dropped: 0,
            dropped_expected: 0,
            expecting: Vec::new(),
            now: 0,
        }
    }

    /// Where the block lies, whose predecessor is at `before`: right behind it, or at the head of a chain, or nowhere.
    #[inline]
    fn next(&self, before: Option<Place>, hash: &BlockHash) -> Option<Place> {
        if let Some(Place { chain: id, pos }) = before {
            let chain = &self.chains[id];
            if chain.hashes.get(pos as usize + 1) == Some(hash) && chain.is_live(pos + 1) {
                return Some(Place { chain: id, pos: pos + 1 });
            }
        }
        self.places.head(hash, &self.chains)
    }

    /// Where the block lies; a guess costs less than a search.
    fn find(&self, likely: Option<Place>, hash: &BlockHash) -> Option<Place> {
        let lies = |place: &Place| {
            let chain = &self.chains[place.chain];
            chain.hashes.get(place.pos as usize) == Some(hash) && chain.is_live(place.pos)
        };
        likely.filter(lies).or_else(|| self.places.find(hash, &self.chains))
    }

    /// Marks up to [`STEP`] blocks for a lane; `coming` says how many more follow. Returns how many a cap kept out. `behind` tells
    /// of the last block then, but for its hash.
    pub(super) fn mark(
        &mut self,
        lane: u16,
        mark: Mark,
        behind: &mut Behind<'_>,
        hashes: &[BlockHash],
        coming: usize,
    ) -> u64 {
        let Behind { chained, parent, likely, mut new } = *behind;
        let mut before = parent.and_then(|parent| self.find(likely, parent));
        // A block of which the one before is not known may be anywhere.
        let mut anywhere = parent.is_none();
        let mut dropped = 0;
        let mut i = 0;
        while i < hashes.len() {
            let mut blocks = 1;
            if let Some(place) = before.filter(|_| new) {
                let appended = self.append(place, mark, &hashes[i..]);
                if appended > 0 {
                    self.edit(lane, Place { pos: place.pos + 1, ..place }, appended, mark);
                    before = Some(Place { pos: place.pos + appended, ..place });
                    i += appended as usize;
                    continue;
                }
            }
            let known = match anywhere {
                true => self.places.find(&hashes[i], &self.chains),
                false => self.next(before, &hashes[i]),
            };
            new = known.is_none();
            let place = if let Some(place) = known {
                let place = before.and_then(|before| self.absorb(before, place)).unwrap_or(place);
                if chained {
                    blocks = self.common(place, &hashes[i..]);
                }
                dropped += self.cover(lane, place, blocks, mark);
                Some(place)
            } else {
                let ahead = if chained { hashes.len() - i + coming } else { 1 };
                let place = if self.room(mark) > 0 { self.put(before, &hashes[i], ahead) } else { None };
                match place {
                    Some(place) => self.edit(lane, place, 1, mark),
                    None => dropped += 1,
                }
                place
            };
            before = place.filter(|_| chained).map(|place| Place { pos: place.pos + blocks - 1, ..place });
            anywhere = !chained;
            i += blocks as usize;
        }
        match mark {
            Mark::Held(_) => self.dropped += dropped,
            Mark::Expected(_) => self.dropped_expected += dropped,
        }
        (behind.likely, behind.new) = (before, new);
        dropped
    }

    /// The lane does not hold these blocks, up to [`STEP`], in these tiers any more. `likely` is where the first one may lie. Returns
    /// where the next one may.
    pub(super) fn unmark(
        &mut self,
        lane: u16,
        tiers: u8,
        hashes: &[BlockHash],
        mut likely: Option<Place>,
    ) -> Option<Place> {
        let mut i = 0;
        while i < hashes.len() {
            let Some(place) = self.find(likely, &hashes[i]) else {
                i += 1;
                continue;
            };
            // An engine evicts the end of a run first, so blocks come from the last to the first, or as they were stored.
            let chain = &mut self.chains[place.chain];
            let back = chain.common_back(place.pos, &hashes[i..]);
            let (first, blocks) = match back {
                1 => (place.pos, self.common(place, &hashes[i..])),
                _ => (place.pos + 1 - back, back),
            };
            let last = first + blocks - 1;
            let delta = self.chains[place.chain].edit(lane, first, last, |before| {
                let left = before.tiers & !tiers;
                if left == 0 { State::NONE } else { State { tiers: left, ..before } }
            });
            if delta.held != 0 {
                self.count(lane, delta);
                self.bury(place.chain, first, last);
            }
            let next = if back > 1 { first.checked_sub(1) } else { Some(last + 1) };
            likely = next.map(|pos| Place { pos, ..place });
            i += blocks as usize;
        }
        likely
    }

    /// Those of the blocks `first..=last`, up to [`STEP`], that nobody holds or expects any more are dead. They were live before.
    fn bury(&mut self, id: u32, first: u32, last: u32) {
        let chain = &mut self.chains[id];
        let hashes = &chain.hashes[first as usize..=last as usize];
        let any_left = chain.any_covered(first, last);
        let was_head = chain.is_head(first);
        let (mut dead, mut gap) = (0, false);
        for (pos, hash) in (first..).zip(hashes) {
            let place = Place { chain: id, pos };
            let live = any_left && chain.covered(pos);
            if !live {
                self.places.remove(hash, place, was_head && pos == first);
                dead += 1;
            } else if gap {
                self.places.turn(hash, place, true);
            }
            gap = !live;
        }
        if let Some(hash) = chain.hashes.get(last as usize + 1)
            && gap
            && chain.is_live(last + 1)
        {
            self.places.turn(hash, Place { chain: id, pos: last + 1 }, true);
        }
        chain.dead += dead;
        self.tidy(id);
    }

    /// Takes a piece of the chain, up to [`STEP`] blocks, from draining lanes. False where they have none of it.
    pub(super) fn drain(&mut self, lanes: &[u16], chain: u32) -> bool {
        let last = |lane: &u16| {
            let spans = &self.chains[chain].spans;
            spans[self.chains[chain].lane(*lane)].last().map(|span| (span.lane, span.first, span.last))
        };
        let Some((lane, first, last)) = lanes.iter().find_map(last) else { return false };
        self.let_go(lane, chain, first.into(), last.into());
        true
    }

    /// Ends due expectations in a piece of the chain, up to [`STEP`] blocks. False where none is due.
    pub(super) fn expire(&mut self, chain: u32) -> bool {
        let due = |until: u8| {
            let left = until.wrapping_sub(self.now as u8);
            left == 0 || u64::from(left) > super::MAX_TICKS
        };
        let spans = &self.chains[chain].spans;
        let Some(span) = spans.iter().find(|span| span.tiers == EXPECTED && due(span.until)) else {
            return false;
        };
        let (lane, first, last) = (span.lane, span.first, span.last);
        self.let_go(lane, chain, first.into(), last.into());
        true
    }

    /// Lanes that were just retired do not count any more.
    pub(super) fn uncount(&mut self, lanes: &[u16]) {
        for lane in lanes {
            let lane = self.lanes.get(*lane);
            self.memberships -= lane.held;
            self.expected -= lane.expected;
        }
    }

    /// Whether any of the lanes has anything in the chain.
    pub(super) fn has_any(&self, lanes: &[u16], chain: u32) -> bool {
        lanes.iter().any(|lane| !self.chains[chain].lane(*lane).is_empty())
    }

    /// Adds the chain's memberships of wanted engines.
    pub(super) fn members(
        &self,
        chain: u32,
        wanted: impl Fn(Slot) -> bool,
        members: &mut Vec<(Holder, BlockHash, Tiers)>,
    ) {
        let chain = &self.chains[chain];
        for span in &chain.spans {
            let lane = self.lanes.get(span.lane);
            if span.tiers & HELD == 0 || !lane.live || !wanted(lane.slot) {
                continue;
            }
            let Some(epoch) = self.lanes.epoch(lane.slot) else { continue };
            let holder = Holder { slot: lane.slot, epoch, group: lane.group };
            let hashes = &chain.hashes[span.first.into()..=span.last.into()];
            members.extend(hashes.iter().map(|hash| (holder, *hash, Tiers::from_bits(span.tiers))));
        }
    }

    /// Whether anything in the chain is expected.
    pub(super) fn expects(&self, chain: u32) -> bool {
        self.chains[chain].spans.iter().any(|span| span.tiers == EXPECTED)
    }

    /// How many more a cap leaves room for.
    fn room(&self, mark: Mark) -> u64 {
        match mark {
            Mark::Held(_) => self.limits.memberships.saturating_sub(self.memberships),
            Mark::Expected(_) => self.limits.expected.saturating_sub(self.expected),
        }
    }

    /// How many of the hashes follow each other in the chain from the place on, all live. The first is at the place.
    fn common(&self, place: Place, hashes: &[BlockHash]) -> u32 {
        let chain = &self.chains[place.chain];
        let there = chain.hashes[place.pos as usize..].iter().zip(hashes);
        let mut blocks = there.take_while(|(a, b)| a == b).count() as u32;
        // A dead block lies nowhere, or elsewhere by now.
        if chain.dead > 0 {
            blocks = chain.covered_from(place.pos, place.pos + blocks) - place.pos;
        }
        blocks
    }

    /// Marks live blocks, as far as the cap allows. Returns how many it kept out.
    fn cover(&mut self, lane: u16, place: Place, blocks: u32, mark: Mark) -> u64 {
        if self.room(mark) >= blocks.into() {
            self.edit(lane, place, blocks, mark);
            return 0;
        }
        let mut dropped = 0;
        for pos in place.pos..place.pos + blocks {
            let state = self.chains[place.chain].state(lane, pos);
            let counts = match mark {
                Mark::Held(_) => !state.is_held(),
                Mark::Expected(_) => state == State::NONE,
            };
            if counts && self.room(mark) == 0 {
                dropped += 1;
            } else {
                self.edit(lane, Place { pos, ..place }, 1, mark);
            }
        }
        dropped
    }

    /// Marks blocks.
    fn edit(&mut self, lane: u16, place: Place, blocks: u32, mark: Mark) {
        let now = self.now as u8;
        let chain = &mut self.chains[place.chain];
        let delta = chain.edit(lane, place.pos, place.pos + blocks - 1, |before| match mark {
            Mark::Held(tiers) => State { tiers: before.tiers & HELD | tiers, until: 0 },
            Mark::Expected(_) if before.is_held() => before,
            Mark::Expected(until) => {
                let later = before.is_expected() && before.until.wrapping_sub(now) > until.wrapping_sub(now);
                State { tiers: EXPECTED, until: if later { before.until } else { until } }
            }
        });
        if matches!(mark, Mark::Expected(_)) && !chain.listed {
            chain.listed = true;
            self.expecting.push(place.chain);
        }
        self.count(lane, delta);
    }

    fn count(&mut self, lane: u16, delta: Delta) {
        let lane = self.lanes.get_mut(lane);
        lane.held = lane.held.wrapping_add_signed(delta.held);
        lane.expected = lane.expected.wrapping_add_signed(delta.expected);
        if lane.live {
            self.memberships = self.memberships.wrapping_add_signed(delta.held);
            self.expected = self.expected.wrapping_add_signed(delta.expected);
        }
    }

    /// A place for a block that does not live: behind `before` where the chain ends there, or where the block lay
    /// before it died, else in a chain of its own. `ahead` is how many blocks the chain will likely take.
    fn put(&mut self, before: Option<Place>, hash: &BlockHash, ahead: usize) -> Option<Place> {
        if let Some(before) = before {
            let place = Place { pos: before.pos + 1, ..before };
            let pos = place.pos as usize;
            let chain = &mut self.chains[before.chain];
            if chain.hashes.get(pos) == Some(hash) {
                chain.dead -= 1;
                self.places.insert(hash, place, false);
                if let Some(next) = chain.hashes.get(pos + 1)
                    && chain.covered(place.pos + 1)
                {
                    self.places.turn(next, Place { pos: place.pos + 1, ..place }, false);
                }
                return Some(place);
            }
            if pos == chain.hashes.len() && pos < MAX_CHAIN && chain.goes_on() {
                chain.push(*hash, ahead.min(MAX_CHAIN - pos));
                self.places.insert(hash, place, false);
                return Some(place);
            }
        }
        let place = Place { chain: self.chains.create()?, pos: 0 };
        self.chains[place.chain].push(*hash, ahead.min(MAX_CHAIN));
        self.places.insert(hash, place, true);
        Some(place)
    }

    /// Appends blocks behind one that came to life just now, where its chain ends there, up to the first that lives already. Returns
    /// how many.
    fn append(&mut self, before: Place, mark: Mark, hashes: &[BlockHash]) -> u32 {
        let chain = &self.chains[before.chain];
        if before.pos + 1 != chain.len() || !chain.goes_on() {
            return 0;
        }
        // What comes behind a block that did not live can live as a head only.
        let room = usize::try_from(self.room(mark)).unwrap_or(usize::MAX);
        let fits = hashes.len().min(MAX_CHAIN - chain.hashes.len()).min(room);
        let new = |hash: &&BlockHash| self.places.insert_new(hash, before.chain, &self.chains);
        let blocks = hashes[..fits].iter().take_while(new).count();
        self.chains[before.chain].hashes.extend_from_slice(&hashes[..blocks]);
        blocks as u32
    }

    /// Where `place` begins a short chain and `before`, the block before it, ends another: makes them one. Returns where
    /// the block is now.
    fn absorb(&mut self, before: Place, place: Place) -> Option<Place> {
        if place.pos != 0 || before.chain == place.chain {
            return None;
        }
        let (into, from) = (&self.chains[before.chain], &self.chains[place.chain]);
        let fits = from.len() <= ABSORB && (into.len() + from.len()) as usize <= MAX_CHAIN;
        if before.pos + 1 != into.len() || !fits || from.dead > 0 || !into.goes_on() {
            return None;
        }
        self.carry(place.chain, 0, from.len() - 1, before.chain);
        self.chains.release(place.chain);
        Some(Place { chain: before.chain, pos: before.pos + 1 })
    }

    /// Appends live blocks of one chain, of which the first is a head, to another. The old chain is left as it was: the caller releases it.
    fn carry(&mut self, from: u32, first: u32, last: u32, to: u32) {
        self.chains.moves += 1;
        let base = self.chains[to].len();
        for pos in first..=last {
            let hash = self.chains[from].hashes[pos as usize];
            let new = Place { chain: to, pos: base + pos - first };
            self.places.moved(&hash, (Place { chain: from, pos }, pos == first), (new, new.pos == 0));
            self.chains[to].push(hash, (last - pos) as usize + 1);
        }
        let spans = self.chains[from].spans.clone();
        for span in &spans {
            let (start, end) = (first.max(span.first.into()), last.min(span.last.into()));
            if start <= end {
                let state = State { tiers: span.tiers, until: span.until };
                // Nothing is counted: the blocks only move.
                let _ = self.chains[to].edit(span.lane, base + start - first, base + end - first, |_| state);
            }
        }
        if !self.chains[to].listed && self.expects(to) {
            self.chains[to].listed = true;
            self.expecting.push(to);
        }
    }

    /// Takes the last blocks of a span, up to [`STEP`], from its lane.
    fn let_go(&mut self, lane: u16, chain: u32, first: u32, last: u32) {
        let first = first.max((last + 1).saturating_sub(STEP as u32));
        let delta = self.chains[chain].edit(lane, first, last, |_| State::NONE);
        self.count(lane, delta);
        self.bury(chain, first, last);
    }

    /// Trims a chain of which blocks died, releases it if none is left, and cuts it up if more than three quarters are
    /// dead.
    fn tidy(&mut self, id: u32) {
        self.chains[id].trim();
        let chain = &self.chains[id];
        let len = chain.len();
        if len == 0 {
            self.chains.release(id);
            return;
        }
        if len < MIN_SPLIT || chain.dead * 4 <= len * 3 {
            return;
        }
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for pos in (0..len).filter(|pos| chain.covered(*pos)) {
            match runs.last_mut() {
                Some(run) if run.1 + 1 == pos => run.1 = pos,
                _ => runs.push((pos, pos)),
            }
        }
        if self.chains.room() < runs.len() {
            return;
        }
        for (first, last) in runs {
            if let Some(new) = self.chains.create() {
                self.carry(id, first, last, new);
            }
        }
        self.chains.release(id);
    }
}
