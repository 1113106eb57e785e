//! Small counts by place. Most blocks are in one place.

use baton_proto::control::v1::Tier;
use smallvec::SmallVec;

use super::Place;

const TIERS: [Tier; 3] = [Tier::Gpu, Tier::Host, Tier::Disk];

fn slot(tier: Tier) -> usize {
    match tier {
        Tier::Unspecified | Tier::Gpu => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
    }
}

/// The counts of one group; not all of them zero.
#[derive(Clone, Copy, Debug)]
struct InGroup {
    group: u8,
    /// In the order of [`TIERS`].
    counts: [u16; 3],
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Holdings(SmallVec<[InGroup; 1]>);

impl Holdings {
    /// The count of a place.
    pub(super) fn of(&self, place: Place) -> u16 {
        let group = self.0.iter().find(|held| held.group == place.group);
        group.map_or(0, |held| held.counts[slot(place.tier)])
    }

    /// Sets the count of a place.
    pub(super) fn set(&mut self, place: Place, count: u16) {
        let at = match self.0.iter().position(|held| held.group == place.group) {
            Some(at) => at,
            None => {
                self.0.push(InGroup { group: place.group, counts: [0; 3] });
                self.0.len() - 1
            }
        };
        self.0[at].counts[slot(place.tier)] = count;
        if self.0[at].counts == [0; 3] {
            self.0.remove(at);
        }
    }

    /// Whether all counts are zero.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The places whose count is not zero.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.0.iter().flat_map(|held| {
            let tiers = TIERS.into_iter().filter(move |tier| held.counts[slot(*tier)] > 0);
            tiers.map(move |tier| Place { group: held.group, tier })
        })
    }

    /// Those of them on the GPU.
    pub(super) fn on_gpu(&self) -> SmallVec<[Place; 2]> {
        self.places().filter(|place| place.tier == Tier::Gpu).collect()
    }
}
