//! Which links are to be measured while nothing crosses them.
//!
//! Transfers measure the links that they cross. The others are probed: an agent pulls a mebibyte of zeros from another one. Once a second
//! each engine that neither sends nor receives is given at most one link to measure, the next in turn that was not measured for
//! [`FRESH`]. So probes take up at most a mebibyte a second of each engine's network card, in each direction, and the links
//! of a fleet of `n` engines are gone through in about `n` seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_coordinator_core::kv_index::Slot;
use tokio::time::Instant;

/// A link that was measured within so long is not probed.
pub(super) const FRESH: Duration = Duration::from_secs(30);
/// Links of one engine that are looked at in a round.
const TRIES: usize = 16;

/// An engine whose agent can be asked to measure, and be pulled from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    /// Its place in the index.
    pub(super) slot: Slot,
    /// Only engines of one layout exchange blocks.
    pub(super) layout: &'a str,
    /// Whether it neither sends nor receives blocks.
    pub(super) idle: bool,
}

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Probing {
    round: usize,
    /// When a link was last measured or probed, within [`FRESH`]: destination, source.
    measured: BTreeMap<(Slot, Slot), Instant>,
}

impl Probing {
    /// A transfer over the link was measured.
    pub(super) fn measured(&mut self, source: Slot, destination: Slot, now: Instant) {
        self.measured.insert((destination, source), now);
    }

    /// What was measured there holds no longer.
    pub(super) fn doubted(&mut self, source: Slot, destination: Slot) {
        self.measured.remove(&(destination, source));
    }

    /// The links to measure now, as places of destination and source among the candidates. An engine is at most once a
    /// destination and at most once a source.
    pub(super) fn due(&mut self, candidates: &[Candidate<'_>], now: Instant) -> Vec<(usize, usize)> {
        self.measured.retain(|_, at| now.saturating_duration_since(*at) < FRESH);
        let others = candidates.len().saturating_sub(1);
        let mut due = Vec::new();
        let mut sources = BTreeSet::new();
        for (to, destination) in candidates.iter().enumerate().filter(|(_, candidate)| candidate.idle) {
            let turns = (0..TRIES.min(others)).map(|turn| (self.round + turn) % others);
            let from = turns.map(|turn| (to + 1 + turn) % candidates.len()).find(|from| {
                let source = &candidates[*from];
                source.idle
                    && source.layout == destination.layout
                    && !self.measured.contains_key(&(destination.slot, source.slot))
                    && !sources.contains(from)
            });
            if let Some(from) = from {
                sources.insert(from);
                self.measured.insert((destination.slot, candidates[from].slot), now);
                due.push((to, from));
            }
        }
        self.round = (self.round + 1) % others.max(1);
        due
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUND: Duration = Duration::from_secs(1);

    fn idle(slot: u32, layout: &str) -> Candidate<'_> {
        Candidate { slot: Slot(slot), layout, idle: true }
    }

    #[test]
    fn two_engines_are_probed_both_ways_and_then_left_alone_for_a_while() {
        let (mut probing, start) = (Probing::default(), Instant::now());
        let fleet = [idle(3, "l"), idle(5, "l")];
        assert_eq!(probing.due(&fleet, start), [(0, 1), (1, 0)]);
        assert!(probing.due(&fleet, start + ROUND).is_empty());
        probing.measured(Slot(3), Slot(5), start + FRESH / 2);
        assert_eq!(probing.due(&fleet, start + FRESH), [(0, 1)]);
    }

    #[test]
    fn who_is_busy_or_of_another_layout_is_left_out() {
        let (mut probing, start) = (Probing::default(), Instant::now());
        let busy = Candidate { idle: false, ..idle(1, "l") };
        assert!(probing.due(&[idle(0, "l"), busy, idle(2, "other")], start).is_empty());
        assert!(probing.due(&[idle(0, "l")], start).is_empty());
        assert!(probing.due(&[], start).is_empty());
    }

    proptest! {
        #[test]
        fn every_link_has_its_turn_and_no_engine_two_at_once(engines in 2..80u32) {
            let (mut probing, mut now) = (Probing::default(), Instant::now());
            let fleet: Vec<Candidate<'_>> = (0..engines).map(|slot| idle(slot, "l")).collect();
            let mut seen = BTreeSet::new();
            for _ in 0..2 * engines {
                let due = probing.due(&fleet, now);
                let distinct = |side: fn(&(usize, usize)) -> usize| due.iter().map(side).collect::<BTreeSet<_>>().len();
                prop_assert_eq!((distinct(|link| link.0), distinct(|link| link.1)), (due.len(), due.len()));
                prop_assert!(due.iter().all(|(to, from)| to != from));
                seen.extend(due);
                now += ROUND;
            }
            prop_assert_eq!(seen.len(), (engines * (engines - 1)) as usize);
        }
    }
}
