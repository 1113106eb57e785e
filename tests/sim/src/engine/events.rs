//! What a cache of blocks says of itself.

/// What happened to a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// They are held now. Each follows the one before it, and the first one follows `parent`.
    Stored {
        /// The block before the first; `None` for a prompt's first block.
        parent: Option<u64>,
    },
    /// They are not held any more.
    Removed,
}

/// Changes in their order, runs of blocks together. A block that the cache holds twice is stored once, and removed with the
/// last of them.
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

    pub(super) fn stored(&mut self, parent: Option<u64>, id: u64) {
        let goes_on = |runs: &[(Change, u32)], last: Option<&u64>| {
            matches!(runs.last(), Some((Change::Stored { .. }, _))) && last == parent.as_ref()
        };
        if goes_on(&self.runs, self.ids.last()) {
            self.extend(id);
        } else {
            self.begin(Change::Stored { parent }, id);
        }
    }

    pub(super) fn removed(&mut self, id: u64) {
        match self.runs.last() {
            Some((Change::Removed, _)) => self.extend(id),
            _ => self.begin(Change::Removed, id),
        }
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
