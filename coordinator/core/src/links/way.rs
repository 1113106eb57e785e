//! What a way carries that many transfers share: a host's network card, out or in, or what lies between engines of one host.
//!
//! A transfer that shares the way with others is slower than the way is, so its own speed says little. What all that were under way
//! during its time moved together says it, as long as one of them wanted more than it got. Some want less, being held up elsewhere, and when
//! others ended is known but roughly; so the width is taken from the upper part of what the last transfers saw: a way that has become slower is
//! believed to be once most of those were made anew, or are old.

use std::collections::VecDeque;

/// Transfers that are remembered.
const REMEMBERED: usize = 32;
/// One of so many is taken for a wrong one that says too much.
const ONE_WRONG_OF: usize = 8;
/// Those that ended so long before the last one are forgotten as long as [`ONE_WRONG_OF`] stay: a way may have become slower since.
const OLD_SECONDS: f64 = 30.0;
/// Reports of transfers are late by different times: those that met for less than this, in seconds, may not have met.
const UNSURE_SECONDS: f64 = 5e-3;

#[derive(Clone, Copy, Debug)]
struct Crossing {
    ended: f64,
    seconds: f64,
    bytes: f64,
    /// By all, while it was under way.
    moved: f64,
}

impl Crossing {
    fn began(&self) -> f64 {
        self.ended - self.seconds
    }

    /// How many of its bytes went while another one was under way.
    fn beside(&self, other: &Crossing) -> f64 {
        let met = self.ended.min(other.ended) - self.began().max(other.began());
        self.bytes * ((met - UNSURE_SECONDS).max(0.0) / self.seconds)
    }
}

/// The last transfers over a way, and how wide they say it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Way {
    crossings: VecDeque<Crossing>,
    bytes_per_second: Option<f64>,
}

impl Way {
    /// A way of this width.
    pub(super) fn of(bytes_per_second: Option<f64>) -> Self {
        Self { crossings: VecDeque::new(), bytes_per_second }
    }

    /// Bytes per second; `None` where nothing has crossed it.
    pub(super) fn bytes_per_second(&self) -> Option<f64> {
        self.bytes_per_second
    }

    /// A transfer ended at a time on any clock, in seconds, and took so many, which are more than none and few enough that its speed
    /// is finite.
    pub(super) fn observe(&mut self, ended: f64, seconds: f64, bytes: u64) {
        let bytes = bytes as f64;
        let mut new = Crossing { ended, seconds, bytes, moved: bytes };
        let old = self.crossings.partition_point(|old| old.ended < ended - OLD_SECONDS);
        let gone = old.min((self.crossings.len() + 1).saturating_sub(ONE_WRONG_OF));
        self.crossings.drain(..gone.max((self.crossings.len() + 1).saturating_sub(REMEMBERED)));
        // They lie in the order in which they ended; the first ones did so before this one began.
        let met = self.crossings.partition_point(|old| old.ended <= new.began() + UNSURE_SECONDS);
        for old in self.crossings.range_mut(met..) {
            old.moved += new.beside(old);
            new.moved += old.beside(&new);
        }
        self.crossings.push_back(new);
        let mut widths = [0.0; REMEMBERED];
        let count = self.crossings.len();
        for (width, crossing) in widths.iter_mut().zip(&self.crossings) {
            *width = crossing.moved / crossing.seconds;
        }
        let of = &mut widths[..count];
        let (_, width, _) = of.select_nth_unstable_by(count / ONE_WRONG_OF, |a, b| b.total_cmp(a));
        self.bytes_per_second = Some(*width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGABYTE: u64 = 1_000_000_000;

    fn width(way: &Way) -> f64 {
        way.bytes_per_second().unwrap()
    }

    #[test]
    fn transfers_that_share_a_way_say_together_what_it_carries() {
        let mut way = Way::default();
        assert_eq!(way.bytes_per_second(), None);
        // Four at a time, one behind the other in beginning and end: each has a quarter of 4 GB/s.
        for n in 0..100 {
            way.observe(100.0 + f64::from(n) * 0.25, 1.0, GIGABYTE);
        }
        assert!((width(&way) / 4e9 - 1.0).abs() < 0.03, "{way:?}");
        // Then one at a time: each has all of it.
        for n in 0..100 {
            way.observe(200.0 + f64::from(n) * 0.5, 0.25, GIGABYTE);
        }
        assert!((width(&way) / 4e9 - 1.0).abs() < 1e-9, "{way:?}");
    }

    #[test]
    fn reports_of_short_transfers_that_come_together_are_not_added_up() {
        let mut way = Way::default();
        for n in 0..100 {
            way.observe(100.0 + f64::from(n / 4), 4e-3, 4_000_000);
        }
        assert!((width(&way) / 1e9 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_way_that_has_become_slower_is_found_out_and_one_wild_report_is_not_believed_for_long() {
        let mut way = Way::default();
        let mut now = 0.0;
        let mut cross = |way: &mut Way, bytes_per_second: f64| {
            let seconds = GIGABYTE as f64 / bytes_per_second;
            now += 2.0 * seconds;
            way.observe(now, seconds, GIGABYTE);
        };
        (0..REMEMBERED).for_each(|_| cross(&mut way, 4e9));
        cross(&mut way, 4e12);
        assert!((width(&way) / 4e9 - 1.0).abs() < 1e-9);
        (0..REMEMBERED).for_each(|_| cross(&mut way, 1e9));
        assert!((width(&way) / 1e9 - 1.0).abs() < 1e-9);
    }
}
