//! Which earlier request a prompt has its beginning from.
//!
//! A prompt is known by the hashes of a few of its blocks, at fixed depths that grow by a quarter each: since hashes are chained, two
//! prompts with the same hash at a depth are the same up to there. So a prefix is found too short by at most a fifth.

use std::collections::HashMap;

use baton_proto::BlockHash;

/// The first depth, tokens.
const FIRST: f64 = 64.0;
/// From one depth to the next.
const GROWTH: f64 = 1.25;

/// The last request with each beginning.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefixes {
    last: HashMap<BlockHash, u64>,
}

/// Depths in blocks, below `blocks`.
fn depths(blocks: usize, block_size: u32) -> impl DoubleEndedIterator<Item = usize> + Clone {
    let depth = move |at: i32| (FIRST * GROWTH.powi(at) / f64::from(block_size)).ceil() as usize;
    let end = (0..).find(|at| depth(*at) > blocks).unwrap_or(0);
    (0..end).map(depth)
}

impl Prefixes {
    /// The last request that began as these hashes, and how many blocks long.
    pub(super) fn find(&self, hashes: &[BlockHash], block_size: u32) -> Option<(u64, usize)> {
        let mut depths = depths(hashes.len(), block_size).rev();
        depths.find_map(|depth| Some((*self.last.get(&hashes[depth - 1])?, depth)))
    }

    /// A request came. Its checkpoints go to `kept`, to be given to [`Prefixes::forget`].
    pub(super) fn insert(&mut self, number: u64, hashes: &[BlockHash], block_size: u32) -> Vec<BlockHash> {
        let kept: Vec<BlockHash> = depths(hashes.len(), block_size).map(|depth| hashes[depth - 1]).collect();
        for hash in &kept {
            self.last.insert(*hash, number);
        }
        kept
    }

    /// A request is out of the window.
    pub(super) fn forget(&mut self, number: u64, kept: &[BlockHash]) {
        for hash in kept {
            if self.last.get(hash) == Some(&number) {
                self.last.remove(hash);
            }
        }
    }
}
