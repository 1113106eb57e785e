//! How many leading blocks of a prompt each engine can reuse.
//!
//! A prompt's hashes are matched against whole chains. Since a block's hash covers everything before it, one equal hash
//! vouches for all blocks between the place where the prompt entered the chain and there, so a chain costs a few comparisons
//! however long it is. Who holds what is then read off the chain's spans: a cache goes on only where one of its spans
//! begins exactly where it stood, so the first hole ends it.

use baton_proto::BlockHash;

use super::chain::{Chain, HELD};
use super::hybrid::{ANY, ANY_TIER, GPU_ONLY, Piece};
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
                    found.push(Reach { slot: engine.slot, held, gpu, either, lane: engine.lanes[0] });
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
        let reaches = &mut found.reaches[..found.count];
        let mut passed = 0;
        for span in &chain.spans {
            let first = u32::from(span.first).max(pos);
            let end = (u32::from(span.last) + 1).min(pos + blocks);
            if first >= end {
                continue;
            }
            let (first, end) = (first - pos + at, end - pos + at);
            passed += ahead(&reaches[passed..], span.lane);
            let Some(reach) = reaches.get_mut(passed) else { break };
            if reach.lane != span.lane || reach.either != first {
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
    /// The longest loop of most lookups: a function of its own, so that it has the registers to itself.
    #[inline(never)]
    fn enter(&self, chain: &Chain, pos: u32, blocks: u32, found: &mut Overlaps) -> (bool, bool) {
        let end = pos + blocks;
        let (mut inside, mut through) = (false, false);
        let reaches = found.room(chain.spans.len());
        let room = reaches.len();
        let mut free = reaches.iter_mut();
        for span in &chain.spans {
            let (first, after) = (u32::from(span.first), u32::from(span.last) + 1);
            if first > pos || after <= pos {
                inside |= first > pos && first < end;
                continue;
            }
            let Some(slot) = self.lanes.alone(span.lane) else { continue };
            let Some(reach) = free.next() else { break };
            // Where many share a beginning, most hold all of it.
            let either = if after >= end { blocks } else { after - pos };
            through |= after >= end;
            *reach = Reach { slot, held: either, gpu: either, either, lane: span.lane };
            if !Tiers::from_bits(span.tiers).contains(Tier::Gpu) {
                reach.gpu = 0;
                reach.held = if span.tiers & HELD != 0 { either } else { 0 };
            }
        }
        found.count = room - free.len();
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

/// How many of the reaches are of lanes before this one.
fn ahead(reaches: &[Reach], lane: u16) -> usize {
    let mut bound = 1;
    while reaches.get(bound - 1).is_some_and(|reach| reach.lane < lane) {
        bound *= 2;
    }
    let half = bound / 2;
    half + reaches[half..reaches.len().min(bound)].partition_point(|reach| reach.lane < lane)
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
