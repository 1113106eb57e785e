//! Engines of different tensor parallelism or order of dimensions: which heads come from which rank, and kernels' plans
//! that gather and scatter some heads of a cache.
//!
//! The transfer rearranges heads on the CPU (`reslice`), from memory of any kind; those that it packs on a GPU, there, by plans
//! of its own. The plans made here are for kernels that some heads are enough for: in theirs the order is layer, K before V,
//! head, token, and the values of one head last.

use std::ops::Range;

use crate::bounds::LayoutError;
use crate::plan::{Plan, Span};

/// How the two halves K and V lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// All blocks of K, then all blocks of V: vLLM's `(2, blocks, …)`.
    Apart,
    /// K and V of a block one after the other: vLLM's `(blocks, 2, …)`.
    Together,
    /// One latent vector for each token instead (MLA). It has one head, which every rank has.
    Latent,
}

/// The order of dimensions within a block's K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Token, head, values.
    Nhd,
    /// Head, token, values.
    Hnd,
}

/// The KV cache of one rank: a storage for each layer, as vLLM allocates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub layers: u32,
    /// Tokens in a block.
    pub tokens: u32,
    /// KV heads on this rank; 1 for a latent cache.
    pub heads: u32,
    /// Bytes of one head's values for one token: 256 for 128 values of bf16, 128 for fp8.
    pub head_bytes: u32,
    /// K and V.
    pub halves: Halves,
    /// The rest.
    pub order: Order,
    /// Blocks.
    pub num_blocks: u32,
}

impl CacheShape {
    /// Bytes of a block in one layer's K or V.
    fn half_bytes(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.heads) * u64::from(self.head_bytes)
    }

    fn halves_count(&self) -> u64 {
        if self.halves == Halves::Latent { 1 } else { 2 }
    }

    /// Length of each layer's storage in bytes.
    pub fn storage_bytes(&self) -> u64 {
        self.halves_count() * u64::from(self.num_blocks) * self.half_bytes()
    }

    /// Copies the given heads of this rank, in the plans' order. Both sides of a transfer use it, each with its own
    /// shape and its own numbers of the same heads.
    pub fn plan(&self, heads: Range<u32>) -> Result<Plan, LayoutError> {
        let layers = self.layers as usize;
        if heads.is_empty() || heads.end > self.heads || self.tokens == 0 || layers == 0 {
            return Err(LayoutError::Size { pieces: 0, blocks: u64::from(self.num_blocks) });
        }
        let half = self.half_bytes();
        let (block_stride, half_stride) = match self.halves {
            Halves::Together => (2 * half, half),
            Halves::Apart => (half, half * u64::from(self.num_blocks)),
            Halves::Latent => (half, 0),
        };
        let head_bytes = u64::from(self.head_bytes);
        let (token_stride, head_stride) = match self.order {
            Order::Nhd => (u64::from(self.heads) * head_bytes, head_bytes),
            Order::Hnd => (head_bytes, u64::from(self.tokens) * head_bytes),
        };
        let count = heads.end - heads.start;
        let bytes = u64::from(count) * u64::from(self.tokens) * head_bytes;
        // Where tokens of a head, and then heads, adjoin, a few long rows do instead of many short ones.
        let contiguous = token_stride == head_bytes;
        let row = if contiguous { bytes } else { head_bytes };
        let row = u32::try_from(row).map_err(|_| LayoutError::BlockBytes)?;
        let (outer, inner) = match contiguous {
            true => ((1, 0), (1, 0)),
            false => ((count, head_stride), (self.tokens, token_stride)),
        };
        let mut spans = Vec::with_capacity(layers * 2);
        for storage in 0..layers {
            for half in 0..self.halves_count() {
                let offset = half * half_stride + u64::from(heads.start) * head_stride;
                let start = spans.len() as u64 * bytes;
                spans.push(Span { storage, offset, block_stride, outer, inner, row, start });
            }
        }
        Plan::new(spans, vec![self.storage_bytes(); layers], u64::from(self.num_blocks))
    }
}

/// Heads that one rank gets from one other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Rank of the engine that holds them.
    pub from_rank: u32,
    /// Their numbers on that rank.
    pub from_heads: Range<u32>,
    /// Rank of the engine that pulls them.
    pub to_rank: u32,
    /// Their numbers on that rank.
    pub to_heads: Range<u32>,
}

/// Heads that cannot be spread over the ranks evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{heads} KV heads over {ranks} ranks: one has to be a multiple of the other")]
pub struct Uneven {
    /// KV heads of the model.
    pub heads: u32,
    /// Ranks.
    pub ranks: u32,
}

/// Which ranks of the holder each rank of the puller gets its heads from, in order of the puller's ranks and heads.
/// `heads` are the model's KV heads, 1 for a latent cache. Where ranks outnumber heads, several have the same head
/// (vLLM replicates it), and pullers spread over them.
pub fn shares(heads: u32, from_ranks: u32, to_ranks: u32) -> Result<Vec<Share>, Uneven> {
    let mut all = Vec::new();
    for to_rank in 0..to_ranks.max(1) {
        all.append(&mut shares_of(heads, from_ranks, to_rank, to_ranks)?);
    }
    Ok(all)
}

/// The same for one rank of the puller.
pub fn shares_of(heads: u32, from_ranks: u32, to_rank: u32, to_ranks: u32) -> Result<Vec<Share>, Uneven> {
    let from = Spread::new(heads, from_ranks)?;
    let to = Spread::new(heads, to_ranks)?;
    let mut shares: Vec<Share> = Vec::new();
    for to_head in 0..to.per_rank {
        let head = to_rank / to.replicas * to.per_rank + to_head;
        let from_rank = head / from.per_rank * from.replicas + to_rank % from.replicas;
        let from_head = head % from.per_rank;
        match shares.last_mut() {
            Some(last) if last.from_rank == from_rank && last.from_heads.end == from_head => {
                last.from_heads.end += 1;
                last.to_heads.end += 1;
            }
            _ => shares.push(Share {
                from_rank,
                from_heads: from_head..from_head + 1,
                to_rank,
                to_heads: to_head..to_head + 1,
            }),
        }
    }
    Ok(shares)
}

/// How heads are spread over ranks.
pub(crate) struct Spread {
    /// Heads on each rank.
    pub(crate) per_rank: u32,
    /// Ranks that have the same heads.
    replicas: u32,
}

impl Spread {
    pub(crate) fn new(heads: u32, ranks: u32) -> Result<Self, Uneven> {
        if heads == 0 || ranks == 0 || (!heads.is_multiple_of(ranks) && !ranks.is_multiple_of(heads)) {
            return Err(Uneven { heads, ranks });
        }
        Ok(Self { per_rank: (heads / ranks).max(1), replicas: (ranks / heads).max(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(from_rank: u32, from_heads: Range<u32>, to_rank: u32, to_heads: Range<u32>) -> Share {
        Share { from_rank, from_heads, to_rank, to_heads }
    }

    #[test]
    fn two_ranks_to_four_and_back() {
        let split = [
            share(0, 0..2, 0, 0..2),
            share(0, 2..4, 1, 0..2),
            share(1, 0..2, 2, 0..2),
            share(1, 2..4, 3, 0..2),
        ];
        assert_eq!(shares(8, 2, 4).unwrap(), split);
        let joined = [
            share(0, 0..2, 0, 0..2),
            share(1, 0..2, 0, 2..4),
            share(2, 0..2, 1, 0..2),
            share(3, 0..2, 1, 2..4),
        ];
        assert_eq!(shares(8, 4, 2).unwrap(), joined);
    }

    #[test]
    fn replicated_heads_come_from_any_rank_that_has_them() {
        // Two heads on four ranks: ranks 0 and 1 have head 0.
        let from: Vec<_> = shares(2, 4, 2).unwrap().iter().map(|share| share.from_rank).collect();
        assert_eq!(from, [0, 3]);
        // A latent cache: every rank has all of it.
        let from: Vec<_> = shares(1, 4, 4).unwrap().iter().map(|share| share.from_rank).collect();
        assert_eq!(from, [0, 1, 2, 3]);
        assert_eq!(shares(6, 4, 2), Err(Uneven { heads: 6, ranks: 4 }));
        assert_eq!(shares(8, 0, 2), Err(Uneven { heads: 8, ranks: 0 }));
    }

    #[test]
    fn heads_that_are_not_there_make_no_plan() {
        let shape = CacheShape {
            layers: 1,
            tokens: 16,
            heads: 4,
            head_bytes: 256,
            halves: Halves::Apart,
            order: Order::Nhd,
            num_blocks: 3,
        };
        assert!(shape.plan(0..4).is_ok());
        assert!(shape.plan(3..5).is_err());
        assert!(shape.plan(2..2).is_err());
        assert!(CacheShape { tokens: 0, ..shape }.plan(0..4).is_err());
        assert!(CacheShape { num_blocks: 0, ..shape }.plan(0..4).is_err());
    }
}
