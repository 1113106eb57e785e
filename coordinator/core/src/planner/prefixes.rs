//! Which earlier request a prompt has its beginning from.

use std::collections::HashMap;

use baton_proto::BlockHash;

/// The first depth, tokens.
const FIRST: f64 = 64.0;
/// From one depth to the next.
const GROWTH: f64 = 1.25;
/// Prompts are looked at no deeper than this, tokens.
const DEEPEST: f64 = 4e6;

/// A prompt as the hashes of some of its blocks, at depths that grow by a quarter each. Since hashes are chained, two prompts with the
/// same hash at a depth are the same up to there; so a common beginning is found too short by a fifth at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beginnings(Vec<(u64, BlockHash)>);

impl Beginnings {
    /// Of a prompt with these hashes, of blocks of so many tokens.
    pub fn of(hashes: &[BlockHash], block_size: u32) -> Self {
        let size = f64::from(block_size.max(1));
        let mut beginnings: Vec<(u64, BlockHash)> = Vec::new();
        let mut tokens = FIRST;
        while tokens <= DEEPEST {
            let blocks = (tokens / size).ceil() as usize;
            let Some(hash) = hashes.get(blocks - 1) else { break };
            let depth = blocks as u64 * u64::from(block_size.max(1));
            if beginnings.last().is_none_or(|last| last.0 < depth) {
                beginnings.push((depth, *hash));
            }
            tokens *= GROWTH;
        }
        Self(beginnings)
    }
}

/// The last request with each beginning.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefixes {
    last: HashMap<BlockHash, u64>,
}

impl Prefixes {
    /// The last request that began so, and for how many tokens.
    pub(super) fn find(&self, beginnings: &Beginnings) -> Option<(u64, u64)> {
        beginnings.0.iter().rev().find_map(|(depth, hash)| Some((*self.last.get(hash)?, *depth)))
    }

    /// A request came.
    pub(super) fn insert(&mut self, number: u64, beginnings: &Beginnings) {
        self.last.extend(beginnings.0.iter().map(|(_, hash)| (*hash, number)));
    }

    /// A request is out of the window.
    pub(super) fn forget(&mut self, number: u64, beginnings: &Beginnings) {
        for (_, hash) in &beginnings.0 {
            if self.last.get(hash) == Some(&number) {
                self.last.remove(hash);
            }
        }
    }
}
