//! How many leading blocks of a prompt each engine can reuse.
//!
//! A prompt's hashes are matched against whole chains. Since a block's hash covers everything before it, one equal hash
//! vouches for all blocks between the place where the prompt entered the chain and there, so a chain costs a few comparisons
//! however long it is. Who holds what is then read off the chain's spans: a cache goes on only where one of its spans
//! begins exactly where it stood, so the first hole ends it.

use baton_proto::BlockHash;

use super::chain::{Chain, HELD};
use super::hybrid::{ANY, ANY_TIER, GPU_ONLY, Piece};
use super::overlaps::{Overlap, Overlaps, Reach, Scratch};
use super::state::Data;
use super::types::{Slot, Tier, Tiers};

impl Data {
    /// Looks a prompt up.
    pub(super) fn overlaps(&self, hashes: &[BlockHash], found: &mut Overlaps) {
        found.clear();
        let Overlaps { held, expected, scratch } = found;
        if scratch.reach.len() < self.lanes.len() {
            scratch.reach.resize(self.lanes.len(), Reach::default());
        }
        self.walk(hashes, scratch);
        for lane in scratch.touched.drain(..) {
            let reach = std::mem::take(&mut scratch.reach[usize::from(lane)]);
            let lane = self.lanes.get(lane);
            if lane.live {
                report(held, expected, lane.slot, reach);
            }
        }
        if !scratch.pieces.is_empty() {
            scratch.pieces.sort_unstable_by_key(|piece| (piece.lane, piece.first));
            for engine in &self.lanes.grouped {
                let Scratch { pieces, intervals, .. } = scratch;
                let mut overlap = |counts| {
                    engine.groups.overlap(&engine.lanes, hashes.len() as u32, pieces, counts, intervals)
                };
                let reach = Reach { expected: overlap(ANY), held: overlap(ANY_TIER), gpu: overlap(GPU_ONLY) };
                report(held, expected, engine.slot, reach);
            }
            scratch.pieces.clear();
        }
        found.order();
    }

    fn walk(&self, hashes: &[BlockHash], scratch: &mut Scratch) {
        let grouped = !self.lanes.grouped.is_empty();
        let ends_at_a_gap = self.lanes.grouped.iter().all(|engine| engine.groups.ends_at_a_gap());
        let mut at = 0;
        while at < hashes.len() {
            let Some(place) = self.find(&hashes[at]) else {
                if ends_at_a_gap {
                    return;
                }
                at += 1;
                continue;
            };
            let chain = &self.chains[place.chain];
            let mut blocks = common(&chain.hashes[place.pos as usize..], &hashes[at..]) as u32;
            if chain.dead > 0 {
                // A dead block may live elsewhere by now.
                blocks = chain.covered_from(place.pos, place.pos + blocks) - place.pos;
            }
            let more = self.gather(chain, place.pos, at as u32, blocks, grouped, scratch);
            if !more && !grouped {
                return;
            }
            at += blocks as usize;
        }
    }

    /// Adds what is held of `blocks` blocks of a chain from `pos` on, which are the prompt's from `at` on. Returns
    /// whether any lane goes on at their end.
    fn gather(
        &self,
        chain: &Chain,
        pos: u32,
        at: u32,
        blocks: u32,
        grouped: bool,
        scratch: &mut Scratch,
    ) -> bool {
        let mut more = false;
        for span in &chain.spans {
            let first = u32::from(span.first).max(pos);
            let end = (u32::from(span.last) + 1).min(pos + blocks);
            if first >= end {
                continue;
            }
            let (first, end) = (first - pos + at, end - pos + at);
            if grouped && self.lanes.get(span.lane).grouped {
                scratch.pieces.push(Piece { lane: span.lane, first, end, tiers: span.tiers });
                continue;
            }
            let reach = &mut scratch.reach[usize::from(span.lane)];
            if reach.expected != first {
                continue;
            }
            if first == 0 {
                scratch.touched.push(span.lane);
            }
            reach.expected = end;
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
}

/// How many leading hashes are equal; at least the first is. If two are equal, so are all before them.
fn common(chain: &[BlockHash], prompt: &[BlockHash]) -> usize {
    let both = chain.len().min(prompt.len());
    if chain[both - 1] == prompt[both - 1] {
        return both;
    }
    // Prompts that share a beginning usually part early: double the step first, then halve it.
    let (mut equal, mut step) = (1, 1);
    while equal + step < both && chain[equal + step - 1] == prompt[equal + step - 1] {
        equal += step;
        step *= 2;
    }
    let mut differs = (equal + step).min(both);
    while differs - equal > 1 {
        let middle = (equal + differs) / 2;
        if chain[middle - 1] == prompt[middle - 1] {
            equal = middle;
        } else {
            differs = middle;
        }
    }
    equal
}

fn report(held: &mut Vec<(Slot, Overlap)>, expected: &mut Vec<(Slot, u32)>, slot: Slot, reach: Reach) {
    if reach.held > 0 {
        held.push((slot, Overlap { blocks: reach.held, gpu_blocks: reach.gpu }));
    }
    if reach.expected > reach.held {
        expected.push((slot, reach.expected));
    }
}
