//! What each directed link between two engines' agents was seen to carry.

use std::collections::BTreeMap;

use crate::ewma::Ewma;
use crate::kv_index::Slot;

/// Assumed of a link that was never measured: 8 Gbit/s, what a transport reaches on 10 Gbit/s Ethernet.
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

impl Link {
    /// Predicted seconds to pull this many bytes over it.
    pub fn seconds(&self, bytes: u64) -> f64 {
        ROUND_TRIPS * self.rtt_seconds + bytes as f64 / self.bytes_per_second
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    bytes_per_second: Ewma,
    rtt_seconds: Ewma,
}

/// All links. At most one entry for each ordered pair of engines that ever exchanged blocks.
#[derive(Clone, Debug, Default)]
pub struct Links {
    estimates: BTreeMap<(Slot, Slot), Estimate>,
}

impl Links {
    /// One transfer from `source` to `destination` took this long. Samples that are not positive are dropped.
    pub fn observe(&mut self, source: Slot, destination: Slot, bytes: u64, seconds: f64, rtt_seconds: f64) {
        let estimate = self.estimates.entry((source, destination)).or_default();
        estimate.rtt_seconds.observe(rtt_seconds);
        let rtt = estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS);
        if bytes >= SMALLEST_BANDWIDTH_SAMPLE {
            // Never charge more than half the time to round trips: the smoothed RTT may lag behind.
            let streaming = (seconds - ROUND_TRIPS * rtt).max(seconds / 2.0);
            estimate.bytes_per_second.observe(bytes as f64 / streaming);
        }
    }

    /// The link's estimates, or the stated prior.
    pub fn get(&self, source: Slot, destination: Slot) -> Link {
        let estimate = self.estimates.get(&(source, destination)).copied().unwrap_or_default();
        Link {
            bytes_per_second: estimate.bytes_per_second.mean().unwrap_or(PRIOR_BYTES_PER_SECOND),
            rtt_seconds: estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS),
            measured: estimate.bytes_per_second.mean().is_some(),
        }
    }

    /// Drops what is known of an engine's links: its slot may go to another one.
    pub fn forget(&mut self, slot: Slot) {
        self.estimates.retain(|(source, destination), _| *source != slot && *destination != slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmeasured_link_has_the_stated_prior() {
        let link = Links::default().get(Slot(0), Slot(1));
        assert!(!link.measured);
        assert_eq!(link.seconds(1_000_000_000), 1.0 + 2e-3);
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
    }
}
