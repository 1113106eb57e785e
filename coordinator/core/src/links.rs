//! What each directed link between two engines' agents was seen to carry.
//!
//! # Formula
//! Bytes that are queued before a transfer go first. On link `s → d` with `Q` bytes queued on the link, `Qs` on the
//! source's NIC in all and `Qd` on the destination's, `x` bytes take
//! `2·RTT + max((Q + x) / W, (Qs + x) / Ws, (Qd + x) / Wd)` seconds: store and forward through the slowest of the link and its two
//! ends. `W` is the link's bandwidth as measured; an end is as fast as the fastest link that was measured at it.
//! Two round trips are a pull's request and its confirmation. A link that was never measured is taken for the slower of its
//! two ends, or for the stated prior where nothing is known of them.

use std::sync::Arc;

use crate::ewma::Ewma;
use crate::kv_index::Slot;

/// Assumed of a link of whose ends nothing is known: 8 Gbit/s, what a transport reaches on 10 Gbit/s Ethernet.
pub const PRIOR_BYTES_PER_SECOND: f64 = 1e9;
/// Assumed of a link that was never measured.
pub const PRIOR_RTT_SECONDS: f64 = 1e-3;
/// A transfer smaller than this says little about bandwidth: round trips dominate it.
pub const SMALLEST_BANDWIDTH_SAMPLE: u64 = 256 * 1024;
/// Round trips that a pull spends besides its bytes: its request, and the confirmation.
const ROUND_TRIPS: f64 = 2.0;

/// A link's estimates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Payload bytes per second.
    pub bytes_per_second: f64,
    /// Round trip, seconds.
    pub rtt_seconds: f64,
    /// Whether any transfer was measured on it.
    pub measured: bool,
}

/// Bytes that were queued before a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Queued {
    /// On the link.
    pub(crate) link: u64,
    /// At the source, to anywhere.
    pub(crate) source: u64,
    /// At the destination, from anywhere.
    pub(crate) destination: u64,
}

/// What a transfer takes, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct TransferSeconds {
    /// For what was queued before it.
    pub(crate) wait: f64,
    /// For itself.
    pub(crate) transfer: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    bytes_per_second: Ewma,
    rtt_seconds: Ewma,
}

/// What is known of one engine's links.
#[derive(Clone, Debug, Default)]
struct Row {
    /// The links into it, in order of source.
    from: Vec<(Slot, Estimate)>,
    /// Of these.
    shortest_rtt: Option<f64>,
}

/// The fastest link into an engine and out of it, bytes per second.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    into: Option<f64>,
    out: Option<f64>,
}

/// All links. At most one entry for each ordered pair of engines that ever exchanged blocks. A clone shares what
/// does not change afterwards.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// By slot.
    rows: Vec<Arc<Row>>,
    /// By slot, as many: side by side, since decisions read those of every engine.
    ends: Vec<Ends>,
    /// The fastest of all, and the shortest round trip.
    fastest: Option<f64>,
    shortest_rtt: Option<f64>,
}

impl Links {
    /// One transfer from `source` to `destination` took this long. Samples that are not positive are dropped.
    pub fn observe(&mut self, source: Slot, destination: Slot, bytes: u64, seconds: f64, rtt_seconds: f64) {
        let row = self.row(destination);
        let at = match row.from.binary_search_by_key(&source, |entry| entry.0) {
            Ok(at) => at,
            Err(at) => {
                row.from.insert(at, (source, Estimate::default()));
                at
            }
        };
        let estimate = &mut row.from[at].1;
        let before = estimate.bytes_per_second.mean();
        estimate.rtt_seconds.observe(rtt_seconds);
        let rtt = estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS);
        if bytes >= SMALLEST_BANDWIDTH_SAMPLE {
            // Never charge more than half the time to round trips: the smoothed RTT may lag behind.
            let streaming = (seconds - ROUND_TRIPS * rtt).max(seconds / 2.0);
            estimate.bytes_per_second.observe(bytes as f64 / streaming);
        }
        let after = estimate.bytes_per_second.mean();
        self.summarise_in(destination);
        self.grow(source);
        let fastest = self.fastest_out(source);
        if before == fastest {
            self.summarise_out(source);
        } else if after > fastest {
            self.ends[source.0 as usize].out = after;
        }
        self.summarise();
    }

    /// The link's estimates, or the stated prior.
    #[inline]
    pub fn get(&self, source: Slot, destination: Slot) -> Link {
        let row = self.rows.get(destination.0 as usize);
        let estimate = row.and_then(|row| {
            let at = row.from.binary_search_by_key(&source, |entry| entry.0).ok()?;
            Some(row.from[at].1)
        });
        let estimate = estimate.unwrap_or_default();
        let measured = estimate.bytes_per_second.mean();
        let ends = || match (self.fastest_out(source), self.fastest_in(destination)) {
            (Some(out), Some(into)) => out.min(into),
            (Some(end), None) | (None, Some(end)) => end,
            (None, None) => PRIOR_BYTES_PER_SECOND,
        };
        Link {
            bytes_per_second: measured.unwrap_or_else(ends),
            rtt_seconds: estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS),
            measured: measured.is_some(),
        }
    }

    /// Predicted seconds to pull this many bytes where nothing else is on the way.
    pub fn alone(&self, source: Slot, destination: Slot, bytes: u64) -> f64 {
        self.transfer(source, destination, bytes, Queued::default()).transfer
    }

    /// Predicted seconds to pull this many bytes behind what is queued; see the module's formula.
    #[inline]
    pub(crate) fn transfer(
        &self,
        source: Slot,
        destination: Slot,
        bytes: u64,
        queued: Queued,
    ) -> TransferSeconds {
        let link = self.get(source, destination);
        let width = link.bytes_per_second;
        let out = self.fastest_out(source).map_or(width, |end| end.max(width));
        let into = self.fastest_in(destination).map_or(width, |end| end.max(width));
        let alone = bytes as f64 / width;
        let behind = ((queued.link + bytes) as f64 / width)
            .max((queued.source + bytes) as f64 / out)
            .max((queued.destination + bytes) as f64 / into);
        TransferSeconds { wait: (behind - alone).max(0.0), transfer: ROUND_TRIPS * link.rtt_seconds + alone }
    }

    /// No transfer to this engine with which so many bytes are on the way to it is predicted to take less, waiting
    /// included.
    #[inline]
    pub(crate) fn at_least_into(&self, destination: Slot, bytes: u64) -> f64 {
        let (fixed, width) = self.at_best(self.fastest_in(destination));
        fixed + bytes as f64 / width
    }

    /// No transfer from this engine is predicted to take less than the first number of seconds, and the second one for
    /// each byte that is on the way from it by then, waiting included.
    #[inline]
    pub(crate) fn at_least_out_of(&self, source: Slot) -> (f64, f64) {
        let (fixed, width) = self.at_best(self.fastest_out(source));
        (fixed, 1.0 / width)
    }

    /// Round trips, and the bandwidth of an end.
    #[inline]
    fn at_best(&self, end: Option<f64>) -> (f64, f64) {
        let rtt = self.shortest_rtt.map_or(PRIOR_RTT_SECONDS, |rtt| rtt.min(PRIOR_RTT_SECONDS));
        let fastest = || self.fastest.map_or(PRIOR_BYTES_PER_SECOND, |f| f.max(PRIOR_BYTES_PER_SECOND));
        (ROUND_TRIPS * rtt, end.unwrap_or_else(fastest))
    }

    /// Drops what is known of an engine's links: its slot may go to another one.
    pub fn forget(&mut self, slot: Slot) {
        if let Some(row) = self.rows.get_mut(slot.0 as usize) {
            *row = Arc::default();
            self.ends[slot.0 as usize] = Ends::default();
        }
        for at in 0..self.rows.len() {
            if self.rows[at].from.binary_search_by_key(&slot, |entry| entry.0).is_ok() {
                Arc::make_mut(&mut self.rows[at]).from.retain(|entry| entry.0 != slot);
            }
        }
        self.summarise_all();
    }

    /// Every link that was measured: source, destination, its estimates as seconds per byte would be recorded.
    pub(crate) fn known(&self) -> impl Iterator<Item = (Slot, Slot, Option<f64>, Option<f64>)> + '_ {
        self.rows.iter().enumerate().flat_map(|(destination, row)| {
            row.from.iter().map(move |(source, estimate)| {
                let means = (estimate.bytes_per_second.mean(), estimate.rtt_seconds.mean());
                (*source, Slot(destination as u32), means.0, means.1)
            })
        })
    }

    /// Links with these estimates, as [`Links::known`] gives them.
    pub(crate) fn restore(known: impl Iterator<Item = (Slot, Slot, Option<f64>, Option<f64>)>) -> Self {
        let mut links = Links::default();
        for (source, destination, bytes_per_second, rtt_seconds) in known {
            links.grow(source);
            let row = links.row(destination);
            let mut estimate = Estimate::default();
            // The first sample is the mean, to the bit.
            estimate.bytes_per_second.observe(bytes_per_second.unwrap_or(0.0));
            estimate.rtt_seconds.observe(rtt_seconds.unwrap_or(0.0));
            match row.from.binary_search_by_key(&source, |entry| entry.0) {
                Ok(at) => row.from[at].1 = estimate,
                Err(at) => row.from.insert(at, (source, estimate)),
            }
        }
        links.summarise_all();
        links
    }

    fn grow(&mut self, slot: Slot) {
        let entries = slot.0 as usize + 1;
        if self.rows.len() < entries {
            self.rows.resize_with(entries, Arc::default);
            self.ends.resize(entries, Ends::default());
        }
    }

    fn row(&mut self, slot: Slot) -> &mut Row {
        self.grow(slot);
        Arc::make_mut(&mut self.rows[slot.0 as usize])
    }

    #[inline]
    fn fastest_out(&self, slot: Slot) -> Option<f64> {
        self.ends.get(slot.0 as usize)?.out
    }

    #[inline]
    fn fastest_in(&self, slot: Slot) -> Option<f64> {
        self.ends.get(slot.0 as usize)?.into
    }

    fn summarise_in(&mut self, slot: Slot) {
        let row = self.row(slot);
        let estimates = || row.from.iter().map(|(_, estimate)| estimate);
        let fastest = estimates().filter_map(|e| e.bytes_per_second.mean()).reduce(f64::max);
        let shortest = estimates().filter_map(|e| e.rtt_seconds.mean()).reduce(f64::min);
        row.shortest_rtt = shortest;
        self.ends[slot.0 as usize].into = fastest;
    }

    fn summarise_out(&mut self, slot: Slot) {
        let mean = |row: &Arc<Row>| {
            let at = row.from.binary_search_by_key(&slot, |entry| entry.0).ok()?;
            row.from[at].1.bytes_per_second.mean()
        };
        let fastest = self.rows.iter().filter_map(mean).reduce(f64::max);
        self.ends[slot.0 as usize].out = fastest;
    }

    fn summarise(&mut self) {
        self.fastest = self.ends.iter().filter_map(|ends| ends.into).reduce(f64::max);
        self.shortest_rtt = self.rows.iter().filter_map(|row| row.shortest_rtt).reduce(f64::min);
    }

    fn summarise_all(&mut self) {
        for slot in (0..self.rows.len() as u32).map(Slot) {
            self.summarise_in(slot);
            self.summarise_out(slot);
        }
        self.summarise();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(links: &Links, bytes: u64, queued: Queued) -> f64 {
        let TransferSeconds { wait, transfer } = links.transfer(Slot(0), Slot(1), bytes, queued);
        wait + transfer
    }

    #[test]
    fn an_unmeasured_link_has_the_stated_prior() {
        let links = Links::default();
        assert!(!links.get(Slot(0), Slot(1)).measured);
        assert_eq!(seconds(&links, 1_000_000_000, Queued::default()), 1.0 + 2e-3);
    }

    #[test]
    fn bandwidth_is_learned_per_direction_and_from_large_transfers_only() {
        let mut links = Links::default();
        links.observe(Slot(0), Slot(1), 1024, 1.0, 1e-4);
        assert!(!links.get(Slot(0), Slot(1)).measured);
        assert_eq!(links.get(Slot(0), Slot(1)).rtt_seconds, 1e-4);
        links.observe(Slot(0), Slot(1), 100_000_000, 0.1 + 2e-4, 1e-4);
        let link = links.get(Slot(0), Slot(1));
        assert!((link.bytes_per_second - 1e9).abs() < 1e3, "{link:?}");
        assert!(!links.get(Slot(1), Slot(0)).measured);
        links.forget(Slot(1));
        assert!(!links.get(Slot(0), Slot(1)).measured);
        assert_eq!(links.fastest_out(Slot(0)), None);
    }

    #[test]
    fn an_unmeasured_link_is_as_fast_as_its_slower_end() {
        let mut links = Links::default();
        links.observe(Slot(0), Slot(2), 1 << 30, (1u64 << 30) as f64 / 4e9 + 2e-4, 1e-4);
        links.observe(Slot(3), Slot(1), 1 << 30, (1u64 << 30) as f64 / 2e9 + 2e-4, 1e-4);
        let link = links.get(Slot(0), Slot(1));
        assert!(!link.measured && (link.bytes_per_second - 2e9).abs() < 1e3, "{link:?}");
    }

    #[test]
    fn what_is_queued_on_the_link_or_at_an_end_goes_first() {
        let mut links = Links::default();
        let gigabyte = 1_000_000_000;
        for (source, width) in [(0, 1e9), (2, 4e9)] {
            links.observe(Slot(source), Slot(1), gigabyte, 1e9 / width + 2e-4, 1e-4);
        }
        let with = |link, source, destination| {
            let TransferSeconds { wait, transfer } =
                links.transfer(Slot(0), Slot(1), gigabyte, Queued { link, source, destination });
            assert!((transfer - 1.0 - 2e-4).abs() < 1e-6);
            wait
        };
        assert_eq!(with(0, 0, 0), 0.0);
        assert!((with(gigabyte, gigabyte, gigabyte) - 1.0).abs() < 1e-6);
        assert!((with(0, gigabyte, 0) - 1.0).abs() < 1e-6, "no faster link out of the source is known");
        assert_eq!(with(0, 0, gigabyte), 0.0, "the destination takes four times what the link carries");
        assert!((with(0, 0, 7 * gigabyte) - 1.0).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn the_bound_is_one_and_a_restored_copy_is_equal_to_the_bit(
            samples in prop::collection::vec(
                (0u32..6, 0u32..6, 1u64..1 << 32, 1e-5f64..10.0, 1e-6f64..1e-2), 0..40),
            bytes in 0u64..1 << 34,
            queued in (0u64..1 << 34, 0u64..1 << 34, 0u64..1 << 34),
        ) {
            let mut links = Links::default();
            for (source, destination, bytes, seconds, rtt) in samples {
                links.observe(Slot(source), Slot(destination), bytes, seconds, rtt);
            }
            let copy = Links::restore(links.known());
            let queued = Queued { link: queued.0, source: queued.0 + queued.1, destination: queued.0 + queued.2 };
            for source in (0..7).map(Slot) {
                for destination in (0..7).map(Slot) {
                    let TransferSeconds { wait, transfer } =
                        links.transfer(source, destination, bytes, queued);
                    prop_assert!(wait >= 0.0 && transfer.is_finite());
                    let all = (wait + transfer) * (1.0 + 1e-12);
                    prop_assert!(links.at_least_into(destination, bytes) <= transfer * (1.0 + 1e-12));
                    prop_assert!(links.at_least_into(destination, bytes + queued.destination) <= all);
                    let (fixed, byte) = links.at_least_out_of(source);
                    prop_assert!(fixed + byte * (bytes + queued.source) as f64 <= all);
                    prop_assert_eq!(
                        copy.transfer(source, destination, bytes, queued), TransferSeconds { wait, transfer });
                    prop_assert_eq!(
                        copy.at_least_into(destination, bytes).to_bits(),
                        links.at_least_into(destination, bytes).to_bits());
                }
            }
        }
    }
}
