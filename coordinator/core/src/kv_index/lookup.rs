//! How many leading blocks of a prompt each engine can reuse.
//!
//! A prompt's hashes are matched against whole chains. Since a block's hash covers everything before it, one equal hash
//! vouches for all blocks between the place where the prompt entered the chain and there, so a chain costs a few comparisons
//! however long it is. Who holds what is then read off the chain's spans: a cache goes on only where one of its spans
//! begins exactly where it stood, so the first hole ends it.

use baton_proto::BlockHash;

use super::chain::{Chain, HELD, Span};
use super::hybrid::{ANY, ANY_TIER, GPU_ONLY, Piece};
use super::lanes::NOBODY;
use super::overlaps::{Overlaps, Reach};
use super::state::Data;
use super::types::{Tier, Tiers};

/// Blocks that are compared one after another.
const NEAR: usize = 32;
/// Blocks that are compared in a round, where more are left.
const FAN: usize = 16;

impl Data {
    /// Looks a prompt up.
    pub(super) fn overlaps(&self, hashes: &[BlockHash], found: &mut Overlaps) {
        found.clear();
        self.walk(hashes, found);
        if !found.scratch.pieces.is_empty() {
            let mut pieces = std::mem::take(&mut found.scratch.pieces);
            pieces.sort_unstable_by_key(|piece| (piece.lane, piece.first));
            for engine in &self.lanes.grouped {
                let mut overlap = |counts| {
                    let intervals = &mut found.scratch.intervals;
                    engine.groups.overlap(&engine.lanes, hashes.len() as u32, &pieces, counts, intervals)
                };
                let (either, held, gpu) = (overlap(ANY), overlap(ANY_TIER), overlap(GPU_ONLY));
                let either = either.max(held);
                if either > 0 {
                    found.push(Reach { slot: engine.slot, held, gpu, either });
                }
            }
            found.scratch.pieces = pieces;
        } else if self.lanes.in_slot_order {
            return;
        }
        found.order();
    }

    fn walk(&self, hashes: &[BlockHash], found: &mut Overlaps) {
        let grouped = !self.lanes.grouped.is_empty();
        let ends_at_a_gap = self.lanes.grouped.iter().all(|engine| engine.groups.ends_at_a_gap());
        let mut at = 0;
        while at < hashes.len() {
            let place = match at {
                0 => self.places.find(&hashes[at], &self.chains),
                // All before it is looked up: if it were inside a chain, it would have been found with the block before it.
                _ => self.places.head(&hashes[at], &self.chains),
            };
            let Some(place) = place else {
                if ends_at_a_gap {
                    return;
                }
                at += 1;
                continue;
            };
            let chain = &self.chains[place.chain];
            // If the prompt goes on behind the chain, that is looked for next: begin with its cache miss.
            if let Some(next) = hashes.get(at + chain.hashes.len() - place.pos as usize) {
                self.places.expect_head(next);
            }
            let mut blocks = common(&chain.hashes[place.pos as usize..], &hashes[at..]) as u32;
            if chain.dead > 0 {
                // A dead block may live elsewhere by now.
                blocks = chain.covered_from(place.pos, place.pos + blocks) - place.pos;
            }
            let more = self.gather(chain, place.pos, at as u32, blocks, found);
            if grouped {
                self.pieces(chain, place.pos, at as u32, blocks, &mut found.scratch.pieces);
            }
            if !more && !grouped {
                return;
            }
            at += blocks as usize;
        }
    }

    /// Adds what is held of `blocks` blocks of a chain from `pos` on, which are the prompt's from `at` on. Returns
    /// whether any lane goes on at their end.
    fn gather(&self, chain: &Chain, pos: u32, at: u32, blocks: u32, found: &mut Overlaps) -> bool {
        let mut more = false;
        if at == 0 {
            let (inside, through) = self.enter(chain, pos, blocks, found);
            if !inside {
                return through;
            }
            more = through;
        }
        // Both are in order of lane.
        let (reaches, lanes) = found.so_far();
        let mut passed = 0;
        for span in &chain.spans {
            let first = u32::from(span.first).max(pos);
            let end = (u32::from(span.last) + 1).min(pos + blocks);
            if first >= end {
                continue;
            }
            let (first, end) = (first - pos + at, end - pos + at);
            passed += ahead(&lanes[passed..], span.lane);
            let Some(reach) = reaches.get_mut(passed) else { break };
            if lanes[passed] != span.lane || reach.either != first {
                continue;
            }
            reach.either = end;
            if span.tiers & HELD != 0 && reach.held == first {
                reach.held = end;
            }
            if Tiers::from_bits(span.tiers).contains(Tier::Gpu) && reach.gpu == first {
                reach.gpu = end;
            }
            more |= end == at + blocks;
        }
        more
    }

    /// Enters the lanes that hold or expect the block at `pos`, the prompt's first, as far as their span over it reaches into `blocks`
    /// blocks. Returns whether any span begins behind it, and whether any lane reaches the end.
    ///
    /// The longest part of most lookups: a function of its own with two small loops, so that each has the registers to itself.
    #[inline(never)]
    fn enter(&self, chain: &Chain, pos: u32, blocks: u32, found: &mut Overlaps) -> (bool, bool) {
        let end = pos + blocks;
        let (reaches, lanes) = found.room(chain.spans.len());
        let mut holes = false;
        for ((span, reach), lane) in chain.spans.iter().zip(&mut *reaches).zip(lanes) {
            *lane = span.lane;
            reach.slot = self.lanes.slot(span.lane);
            holes |= reach.slot == NOBODY;
        }
        let (mut inside, mut through) = (false, false);
        // Where many share a beginning, most hold the same stretch of it.
        let (mut like, mut shared) = (Default::default(), Reach::NONE);
        for (span, reach) in chain.spans.iter().zip(reaches) {
            if span.stretch() != like {
                like = span.stretch();
                let begins_inside;
                (shared, begins_inside) = entered(span, pos, end);
                inside |= begins_inside;
                through |= shared.either == blocks;
                holes |= shared.either == 0;
            }
            *reach = Reach { slot: reach.slot, ..shared };
        }
        if holes {
            found.retain(|reach| reach.slot != NOBODY && reach.either > 0);
        }
        (inside, through)
    }

    /// Notes the stretches of lanes that are one of several of their engine's.
    fn pieces(&self, chain: &Chain, pos: u32, at: u32, blocks: u32, pieces: &mut Vec<Piece>) {
        for span in chain.spans.iter().filter(|span| self.lanes.get(span.lane).grouped) {
            let first = u32::from(span.first).max(pos);
            let end = (u32::from(span.last) + 1).min(pos + blocks);
            if first < end {
                let (first, end) = (first - pos + at, end - pos + at);
                pieces.push(Piece { lane: span.lane, first, end, tiers: span.tiers });
            }
        }
    }
}

/// How far a span lets a prompt reach that enters its chain at `pos` and leaves it at `end`, and whether it begins in between. Apart
/// from the loop over all spans, which seldom needs it.
#[inline(never)]
fn entered(span: &Span, pos: u32, end: u32) -> (Reach, bool) {
    let (first, after) = (u32::from(span.first), u32::from(span.last) + 1);
    let either = if first <= pos { after.min(end).saturating_sub(pos) } else { 0 };
    let held = if span.tiers & HELD != 0 { either } else { 0 };
    let gpu = if Tiers::from_bits(span.tiers).contains(Tier::Gpu) { either } else { 0 };
    (Reach { held, gpu, either, ..Reach::NONE }, pos < first && first < end)
}

/// How many of the lanes, which ascend, come before this one.
fn ahead(lanes: &[u16], lane: u16) -> usize {
    let Some(first) = lanes.first() else { return 0 };
    // As many as their numbers are apart at most; just as many where none between them is missing.
    let most = usize::from(lane.saturating_sub(*first)).min(lanes.len());
    match lanes.get(most) == Some(&lane) {
        true => most,
        false => lanes[..most].partition_point(|other| *other < lane),
    }
}

/// How many leading hashes are equal; at least the first is. If two are equal, so are all before them.
fn common(chain: &[BlockHash], prompt: &[BlockHash]) -> usize {
    let equal = |end: usize| chain[end - 1] == prompt[end - 1];
    let mut to = chain.len().min(prompt.len());
    let mut from = 1;
    // Most prompts part early, or go through to the end.
    if to > NEAR && !equal(NEAR) {
        to = NEAR;
    } else if equal(to) {
        return to;
    }
    // What is compared in one round does not depend on each other, so its cache misses overlap; halving's would follow one another.
    while to - from > NEAR {
        let step = (to - from).div_ceil(FAN);
        from = (from + step..to).step_by(step).take_while(|end| equal(*end)).last().unwrap_or(from);
        to = to.min(from + step);
    }
    let rest = chain[from..to].iter().zip(&prompt[from..to]);
    from + rest.take_while(|(a, b)| a == b).count()
}
