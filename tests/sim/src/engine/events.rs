//! What a cache of blocks says of itself.

/// Where an engine keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// In the GPU's cache.
    Gpu,
    /// In the host's memory.
    Host,
}

/// What happened to a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// They are held now. Each follows the one before it, and the first one follows `parent`.
    Stored {
        /// Where.
        tier: Tier,
        /// The block before the first; `None` for a prompt's first block.
        parent: Option<u64>,
    },
    /// They are not held there any more.
    Removed {
        /// Where.
        tier: Tier,
    },
}

/// Changes in their order, runs of blocks together. A block that a cache holds twice is stored once, and removed with the
/// last of them. What happens in one tier stands in its order; tiers know nothing of each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvEvents {
    ids: Vec<u64>,
    runs: Vec<(Change, u32)>,
}

impl KvEvents {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The changes.
    pub fn iter(&self) -> impl Iterator<Item = (Change, &[u64])> {
        let mut start = 0;
        self.runs.iter().map(move |(change, end)| {
            let ids = &self.ids[start..*end as usize];
            start = *end as usize;
            (*change, ids)
        })
    }

    pub(super) fn stored(&mut self, tier: Tier, parent: Option<u64>, id: u64) {
        let stored = Change::Stored { tier, parent };
        let goes_on = matches!(self.runs.last(), Some((Change::Stored { tier: last, .. }, _)) if *last == tier)
            && self.ids.last() == parent.as_ref();
        if goes_on {
            self.extend(id);
        } else {
            self.begin(stored, id);
        }
    }

    pub(super) fn removed(&mut self, tier: Tier, id: u64) {
        match self.runs.last() {
            Some((last, _)) if *last == (Change::Removed { tier }) => self.extend(id),
            _ => self.begin(Change::Removed { tier }, id),
        }
    }

    /// What another cache of the engine says, behind what this one does.
    pub(super) fn append(&mut self, other: &Self) {
        let before = self.ids.len() as u32;
        self.ids.extend_from_slice(&other.ids);
        self.runs.extend(other.runs.iter().map(|(change, end)| (*change, before + end)));
    }

    fn extend(&mut self, id: u64) {
        self.ids.push(id);
        if let Some((_, end)) = self.runs.last_mut() {
            *end += 1;
        }
    }

    fn begin(&mut self, change: Change, id: u64) {
        self.ids.push(id);
        self.runs.push((change, self.ids.len() as u32));
    }
}
