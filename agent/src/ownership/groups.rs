//! An engine's cache groups: which there are, learnt from what it stores.
//!
//! Engines of models whose layers do not all look at everything before them keep a cache for each kind of layer, in *groups*.
//! Each group stores and drops blocks on its own, and what such an engine can reuse depends on all of them. Groups go by a number
//! of the engine's own; here by their place in the order in which they appeared.

use crate::engine::event::Stored;

use super::Ignored;

/// What the layers of a group look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Everything before.
    Full,
    /// A window of so many tokens, the token itself included.
    SlidingWindow(u32),
    /// A state that a block's last token leaves behind (Mamba and other recurrent layers).
    State,
}

impl Attention {
    /// As an engine names it. `None` for kinds whose hits cannot be counted from blocks alone.
    fn of(stored: &Stored) -> Option<Self> {
        match (stored.spec_kind.as_deref(), stored.sliding_window) {
            // Older versions do not name it, and have no groups.
            (None | Some("full_attention" | "mla_attention" | "sink_full_attention"), _) => Some(Self::Full),
            (Some("sliding_window" | "sliding_window_mla"), Some(window)) if window > 0 => {
                Some(Self::SlidingWindow(window))
            }
            (Some("mamba"), _) => Some(Self::State),
            _ => None,
        }
    }
}

/// A cache group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// What its layers look at.
    pub attention: Attention,
    /// Tokens in one of its blocks: a multiple of the engine's block size.
    pub block_size: u32,
}

/// The groups of one engine.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// With the engine's number, where it gives one.
    known: Vec<(Option<i64>, CacheGroup)>,
}

/// The group that a store belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It was known.
    Known(u8),
    /// It was not.
    New(u8),
    /// It is not what it was thought to be.
    Changed(u8),
}

impl Groups {
    /// Most groups of an engine; blocks of more are ignored.
    pub(super) const MAX: usize = 32;

    /// The groups, in order; none where there is only one, of full attention and with the engine's own block size.
    pub(super) fn describe(&self, block_size: u32) -> Vec<CacheGroup> {
        let plain = CacheGroup { attention: Attention::Full, block_size };
        match &self.known[..] {
            [] => Vec::new(),
            [(_, only)] if *only == plain => Vec::new(),
            groups => groups.iter().map(|(_, group)| *group).collect(),
        }
    }

    /// How many of the engine's blocks make one of the group's.
    pub(super) fn stride(&self, group: u8, block_size: u32) -> u32 {
        self.known[usize::from(group)].1.block_size / block_size
    }

    /// Whether the group's layers look at everything before them.
    pub(super) fn is_full(&self, group: u8) -> bool {
        self.known[usize::from(group)].1.attention == Attention::Full
    }

    /// The group of a store by an engine with this block size. Only what is stored on the GPU teaches of
    /// several groups: other tiers may have blocks of other sizes.
    pub(super) fn of_stored(
        &mut self,
        stored: &Stored,
        block_size: u32,
        on_gpu: bool,
    ) -> Result<Found, Ignored> {
        let attention = Attention::of(stored).ok_or(Ignored::OtherGroup)?;
        // Blocks larger than the engine's own exist beside others, and then say whose they are.
        let named = stored.group_idx.is_some() && stored.spec_kind.is_some();
        let larger = stored.block_size > block_size && stored.block_size.is_multiple_of(block_size);
        if stored.block_size != block_size && !(named && larger) {
            return Err(Ignored::PartialBlock);
        }
        let group = CacheGroup { attention, block_size: stored.block_size };
        let Some(at) = self.position(stored.group_idx, attention) else {
            let plain = attention == Attention::Full && stored.block_size == block_size;
            let teaches = on_gpu || plain && self.known.is_empty();
            if !teaches || self.known.len() == Self::MAX {
                return Err(Ignored::OtherGroup);
            }
            self.known.push((stored.group_idx, group));
            return Ok(Found::New((self.known.len() - 1) as u8));
        };
        let (number, known) = &mut self.known[at];
        *number = number.or(stored.group_idx);
        if *known == group {
            return Ok(Found::Known(at as u8));
        }
        // Within a group, what is smaller than its blocks is a part of one.
        if !on_gpu || known.attention == attention && stored.block_size < known.block_size {
            return Err(Ignored::PartialBlock);
        }
        *known = group;
        Ok(Found::Changed(at as u8))
    }

    fn position(&self, number: Option<i64>, attention: Attention) -> Option<usize> {
        let is = |(known, group): &(Option<i64>, CacheGroup)| match (known, number) {
            (Some(known), Some(number)) => *known == number,
            // Not all that an engine says of its cache names the group.
            _ => group.attention == attention,
        };
        self.known.iter().position(is)
    }

    /// The groups that a removal under this number is about: all where it names none.
    pub(super) fn of_removed(&self, number: Option<i64>) -> impl Iterator<Item = u8> + use<> {
        let groups: Vec<u8> = (0..self.known.len() as u8)
            .filter(|at| {
                let known = self.known[usize::from(*at)].0;
                number.zip(known).is_none_or(|(number, known)| number == known)
            })
            .collect();
        groups.into_iter()
    }
}
