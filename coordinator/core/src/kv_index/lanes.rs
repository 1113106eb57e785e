//! Engines, their epochs, and the caches that they have.

use baton_proto::Epoch;
use smallvec::SmallVec;

use super::hybrid::Groups;
use super::types::{Holder, IndexError, Slot};

/// One cache of one engine: all of it, or one of its groups. A cleared cache goes on under a new lane, so that clearing
/// takes effect at once; the old lane drains.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub(super) slot: Slot,
    pub(super) group: u16,
    /// Blocks held.
    pub(super) held: u64,
    /// Blocks expected and not held.
    pub(super) expected: u64,
    /// Whether it counts: not while it drains, and not while its id is free.
    pub(super) live: bool,
    /// Whether its engine has several groups, or one without full attention.
    pub(super) grouped: bool,
}

/// No engine has this slot: they are counted from 0.
pub(super) const NOBODY: Slot = Slot(u32::MAX);

/// One slot.
#[derive(Clone, Debug, Default)]
struct Engine {
    epoch: Option<Epoch>,
    /// One for each group.
    lanes: SmallVec<[u16; 2]>,
    groups: Option<Box<Groups>>,
}

/// An engine with several groups, or one without full attention.
#[derive(Clone, Debug)]
pub(super) struct Grouped {
    pub(super) slot: Slot,
    pub(super) lanes: SmallVec<[u16; 2]>,
    pub(super) groups: Groups,
}

/// All engines.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    engines: Vec<Engine>,
    lanes: Vec<Lane>,
    /// By lane: its slot, where it is live and not [`Lane::grouped`], else [`NOBODY`]. Lookups read this and nothing else of most lanes.
    alone: Vec<Slot>,
    free: Vec<u16>,
    /// Whether [`Self::alone`]'s slots ascend: what a lookup finds lane by lane is in slot order then.
    pub(super) in_slot_order: bool,
    /// In slot order.
    pub(super) grouped: Vec<Grouped>,
}

impl Lanes {
    /// The slot of a lane that is live and its engine's only one; else [`NOBODY`].
    #[inline]
    pub(super) fn slot(&self, lane: u16) -> Slot {
        self.alone[usize::from(lane)]
    }

    pub(super) fn get(&self, lane: u16) -> &Lane {
        &self.lanes[usize::from(lane)]
    }

    pub(super) fn get_mut(&mut self, lane: u16) -> &mut Lane {
        &mut self.lanes[usize::from(lane)]
    }

    /// The slot's lanes, in order of group.
    pub(super) fn of(&self, slot: Slot) -> &[u16] {
        self.engines.get(slot.0 as usize).map_or(&[], |engine| &engine.lanes)
    }

    /// The slot's groups, where it has more than one or one without full attention.
    pub(super) fn groups(&self, slot: Slot) -> Option<&Groups> {
        self.engines.get(slot.0 as usize)?.groups.as_deref()
    }

    pub(super) fn epoch(&self, slot: Slot) -> Option<Epoch> {
        self.engines.get(slot.0 as usize)?.epoch
    }

    pub(super) fn check(&self, slot: Slot, epoch: Epoch) -> Result<(), IndexError> {
        match self.engines.get(slot.0 as usize).and_then(|engine| engine.epoch) {
            None => Err(IndexError::Unopened(slot)),
            Some(open) if open != epoch => Err(IndexError::Stale { slot, given: epoch, open }),
            Some(_) => Ok(()),
        }
    }

    pub(super) fn lane(&self, holder: Holder) -> Result<u16, IndexError> {
        self.check(holder.slot, holder.epoch)?;
        let lanes = &self.engines[holder.slot.0 as usize].lanes;
        match lanes.get(usize::from(holder.group)) {
            Some(lane) => Ok(*lane),
            None => Err(IndexError::NoGroup { slot: holder.slot, group: holder.group }),
        }
    }

    /// Whether the slot is open like this already.
    pub(super) fn is_open(&self, slot: Slot, epoch: Epoch, groups: Option<&Groups>) -> bool {
        self.check(slot, epoch).is_ok() && self.groups(slot) == groups
    }

    /// Opens the slot with fresh lanes. Returns those it had.
    pub(super) fn open(
        &mut self,
        slot: Slot,
        epoch: Epoch,
        groups: Option<Groups>,
    ) -> Result<SmallVec<[u16; 2]>, IndexError> {
        let count = groups.as_ref().map_or(1, |groups| groups.groups.len());
        let fresh = self.take(slot, count, groups.is_some())?;
        let at = slot.0 as usize;
        if self.engines.len() <= at {
            self.engines.resize_with(at + 1, Engine::default);
        }
        let engine = &mut self.engines[at];
        engine.epoch = Some(epoch);
        engine.groups = groups.map(Box::new);
        let old = std::mem::replace(&mut engine.lanes, fresh);
        self.retire(slot, &old);
        Ok(old)
    }

    /// Gives an open slot fresh lanes. Returns those it had: none where they were empty, and kept.
    pub(super) fn renew(&mut self, slot: Slot) -> Result<SmallVec<[u16; 2]>, IndexError> {
        let old = &self.engines[slot.0 as usize].lanes;
        let empty = |lane: &u16| self.get(*lane).held + self.get(*lane).expected == 0;
        if old.iter().all(empty) {
            return Ok(SmallVec::new());
        }
        let (count, grouped) = (old.len(), self.groups(slot).is_some());
        let fresh = self.take(slot, count, grouped)?;
        let old = std::mem::replace(&mut self.engines[slot.0 as usize].lanes, fresh);
        self.retire(slot, &old);
        Ok(old)
    }

    /// Closes the slot. Returns the lanes it had.
    pub(super) fn close(&mut self, slot: Slot) -> SmallVec<[u16; 2]> {
        let Some(engine) = self.engines.get_mut(slot.0 as usize) else { return SmallVec::new() };
        let old = std::mem::take(engine).lanes;
        self.retire(slot, &old);
        old
    }

    /// A drained lane's id can be used again.
    pub(super) fn release(&mut self, lane: u16) {
        self.free.push(lane);
    }

    fn take(&mut self, slot: Slot, count: usize, grouped: bool) -> Result<SmallVec<[u16; 2]>, IndexError> {
        if self.free.len() + (usize::from(u16::MAX) - self.lanes.len()) < count {
            return Err(IndexError::Caches);
        }
        let lanes = (0..count).map(|group| {
            let lane = Lane { slot, group: group as u16, held: 0, expected: 0, live: true, grouped };
            if let Some(id) = self.free.pop() {
                self.lanes[usize::from(id)] = lane;
                self.alone[usize::from(id)] = if grouped { NOBODY } else { slot };
                id
            } else {
                self.lanes.push(lane);
                self.alone.push(if grouped { NOBODY } else { slot });
                (self.lanes.len() - 1) as u16
            }
        });
        Ok(lanes.collect())
    }

    fn retire(&mut self, slot: Slot, old: &[u16]) {
        for lane in old {
            self.get_mut(*lane).live = false;
            self.alone[usize::from(*lane)] = NOBODY;
        }
        let at = self.grouped.partition_point(|engine| engine.slot < slot);
        if self.grouped.get(at).is_some_and(|engine| engine.slot == slot) {
            self.grouped.remove(at);
        }
        let engine = &self.engines[slot.0 as usize];
        if let Some(groups) = &engine.groups {
            let grouped = Grouped { slot, lanes: engine.lanes.clone(), groups: (**groups).clone() };
            self.grouped.insert(at, grouped);
        }
        self.in_slot_order = self.alone.iter().filter(|slot| **slot != NOBODY).is_sorted();
    }
}
