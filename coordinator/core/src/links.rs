//! What each directed link between two engines' agents was seen to carry, and what the hosts' network cards carry.
//!
//! # Formula
//! Bytes that are queued before a transfer go first. On link `s → d` with `Q` bytes queued on the link, `Qs` on the way to other hosts
//! from all engines of the source's host and `Qd` from other hosts to all of the destination's, `x` bytes take
//! `2·RTT + max((Q + x) / W, (Qs + x) / Ws, (Qd + x) / Wd)` seconds: store and forward through the slowest of the link and the two
//! cards. Between engines of one host no card is crossed: `Qs` and `Qd` are what is on the way between any of them, and `Ws` and `Wd`
//! what was carried there.
//!
//! `W` is what transfers over the link reached where little else was on the way: what they reach beside others is less, and is
//! what the cards are counted for. A transfer that was given up outweighs all before it: what had come of it in its time is what the link carries, until
//! another one comes to its end. Of a card `way` tells how its width is learnt. Two round trips are a pull's request and its confirmation.
//! A link that was never measured is taken for the narrower of its two cards, or for the stated prior where nothing is known of
//! them; a card that was never measured, for as wide as the link.

mod way;

use std::sync::Arc;

use self::way::Way;
use crate::ewma::Ewma;
use crate::kv_index::Slot;

/// Assumed of a link of whose ends nothing is known: 8 Gbit/s, what a transport reaches on 10 Gbit/s Ethernet.
pub const PRIOR_BYTES_PER_SECOND: f64 = 1e9;
/// Assumed of a link that was never measured.
pub const PRIOR_RTT_SECONDS: f64 = 1e-3;
/// A transfer smaller than this says little about bandwidth: round trips dominate it.
pub const SMALLEST_BANDWIDTH_SAMPLE: u64 = 256 * 1024;
/// One that was given up says something of a link however little had come, if it had so long.
const LONG_SECONDS: f64 = 1.0;
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

/// Bytes on the way over what transfers share at a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostQueue {
    /// Out of its card.
    pub(crate) out: u64,
    /// Into its card.
    pub(crate) into: u64,
    /// Between its engines.
    pub(crate) within: u64,
}

/// Bytes that were queued before a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Queued {
    /// On the link.
    pub(crate) link: u64,
    /// At the source's host.
    pub(crate) source: HostQueue,
    /// At the destination's.
    pub(crate) destination: HostQueue,
}

/// How wide the ways are that transfers of a host share, in bytes per second, as far as they were measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Widths {
    /// Out of its card.
    pub(crate) out: Option<f64>,
    /// Into its card.
    pub(crate) into: Option<f64>,
    /// Between its engines.
    pub(crate) within: Option<f64>,
}

/// What a transfer takes, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct TransferSeconds {
    /// For what was queued before it.
    pub(crate) wait: f64,
    /// For itself.
    pub(crate) transfer: f64,
    /// Of that, what it takes however little moves.
    pub(crate) round_trips: f64,
}

/// What a transfer takes at least, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct AtLeast {
    /// However little moves.
    pub(crate) round_trips: f64,
    /// For the bytes alone.
    pub(crate) bytes: f64,
    /// In all, behind what is queued.
    pub(crate) behind: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    bytes_per_second: Ewma,
    rtt_seconds: Ewma,
    /// What came of the last transfer, in bytes per second, where that was given up.
    given_up: Option<f64>,
}

impl Estimate {
    /// Bytes per second.
    fn width(&self) -> Option<f64> {
        self.given_up.or(self.bytes_per_second.mean())
    }
}

/// What is known of one engine's links.
#[derive(Clone, Debug, Default)]
struct Row {
    /// The links into it, in order of source.
    from: Vec<(Slot, Estimate)>,
    /// Of these.
    fastest: Option<f64>,
    shortest_rtt: Option<f64>,
}

/// A host that has engines.
#[derive(Clone, Debug, Default)]
struct Host {
    /// Empty where not known; it has one engine then.
    name: String,
    engines: u32,
    out: Way,
    into: Way,
    within: Way,
}

impl Host {
    fn widths(&self) -> Widths {
        Widths {
            out: self.out.bytes_per_second(),
            into: self.into.bytes_per_second(),
            within: self.within.bytes_per_second(),
        }
    }
}

/// What decisions read of an engine's host.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    /// `None` where nobody told yet.
    host: Option<u32>,
    /// Whether it has other engines.
    shared: bool,
    widths: Widths,
}

/// All links. At most one entry for each ordered pair of engines that ever exchanged blocks. A clone shares what
/// does not change afterwards.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// By slot.
    rows: Vec<Arc<Row>>,
    /// By slot, as many: side by side, since decisions read those of every engine.
    ends: Vec<End>,
    /// Those without engines are used again.
    hosts: Vec<Arc<Host>>,
    /// The fastest link or way of all, and the shortest round trip.
    fastest: Option<f64>,
    shortest_rtt: Option<f64>,
}

impl Links {
    /// The engine of this slot runs on a host of this name, whose card it shares with the others there; a host of its own where
    /// the name is empty, and where nobody tells.
    pub fn place(&mut self, slot: Slot, host: &str) {
        self.grow(slot);
        if let Some(at) = self.ends[slot.0 as usize].host {
            if self.hosts[at as usize].name == host {
                return;
            }
            self.leave(slot);
            self.summarise();
        }
        let there = |entry: &Arc<Host>| entry.engines > 0 && !host.is_empty() && entry.name == host;
        let at = self.hosts.iter().position(there).or_else(|| self.hosts.iter().position(|h| h.engines == 0));
        let at = at.unwrap_or_else(|| {
            self.hosts.push(Arc::default());
            self.hosts.len() - 1
        });
        let entry = Arc::make_mut(&mut self.hosts[at]);
        entry.engines += 1;
        if entry.engines == 1 {
            host.clone_into(&mut entry.name);
        }
        self.ends[slot.0 as usize].host = Some(at as u32);
        self.summarise_host(at as u32);
    }

    fn leave(&mut self, slot: Slot) {
        let Some(end) = self.ends.get_mut(slot.0 as usize) else { return };
        let Some(at) = std::mem::take(end).host else { return };
        let host = Arc::make_mut(&mut self.hosts[at as usize]);
        host.engines -= 1;
        if host.engines == 0 {
            *host = Host::default();
        }
        self.summarise_host(at);
    }

    /// One transfer from `source` to `destination` took this long. It ended now, in seconds on any clock that does not run backwards.
    /// Samples that are not positive are dropped.
    pub fn observe(
        &mut self,
        now: f64,
        (source, destination): (Slot, Slot),
        bytes: u64,
        seconds: f64,
        rtt_seconds: f64,
    ) {
        let estimate = self.estimate(source, destination);
        estimate.rtt_seconds.observe(rtt_seconds);
        let rtt = estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS);
        // Never charge more than half the time to round trips: the smoothed RTT may lag behind.
        let streaming = (seconds - ROUND_TRIPS * rtt).max(seconds / 2.0);
        let speed = bytes as f64 / streaming;
        let says_bandwidth = bytes >= SMALLEST_BANDWIDTH_SAMPLE && speed.is_finite() && speed > 0.0;
        if says_bandwidth {
            if estimate.given_up.take().is_some() {
                // The link is not what it was.
                estimate.bytes_per_second = Ewma::default();
            }
            estimate.bytes_per_second.observe_upper(speed);
        }
        self.summarise_row(destination);
        if says_bandwidth {
            self.crossed(now, (source, destination), streaming, bytes);
        }
        self.summarise();
    }

    /// A transfer from `source` to `destination` was given up now, when so many bytes had come in so many seconds. Nothing is taken from one that had neither
    /// much time nor much that came.
    pub fn observe_given_up(
        &mut self,
        now: f64,
        (source, destination): (Slot, Slot),
        bytes: u64,
        seconds: f64,
    ) {
        let says_bandwidth = bytes >= SMALLEST_BANDWIDTH_SAMPLE || seconds >= LONG_SECONDS;
        if !(says_bandwidth && seconds.is_finite() && seconds > 0.0) {
            return;
        }
        // Of a link that is not there a transfer takes very long, but not for ever.
        self.estimate(source, destination).given_up = Some(bytes.max(1) as f64 / seconds);
        self.summarise_row(destination);
        // Where next to nothing came, the one at the other end may be gone: that is not the cards' fault.
        if bytes >= SMALLEST_BANDWIDTH_SAMPLE {
            self.crossed(now, (source, destination), seconds, bytes);
        }
        self.summarise();
    }

    /// Bytes went over the ways of a link.
    fn crossed(&mut self, now: f64, (source, destination): (Slot, Slot), seconds: f64, bytes: u64) {
        let (from, to) = (self.host(source), self.host(destination));
        if from == to {
            self.host_mut(from).within.observe(now, seconds, bytes);
        } else {
            self.host_mut(from).out.observe(now, seconds, bytes);
            self.host_mut(to).into.observe(now, seconds, bytes);
            self.summarise_host(to);
        }
        self.summarise_host(from);
    }

    fn estimate(&mut self, source: Slot, destination: Slot) -> &mut Estimate {
        let row = self.row(destination);
        let at = match row.from.binary_search_by_key(&source, |entry| entry.0) {
            Ok(at) => at,
            Err(at) => {
                row.from.insert(at, (source, Estimate::default()));
                at
            }
        };
        &mut row.from[at].1
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
        let measured = estimate.width();
        let prior = || match self.ways(source, destination, Queued::default()).map(|(_, width)| width) {
            [Some(a), Some(b)] => a.min(b),
            [Some(way), None] | [None, Some(way)] => way,
            [None, None] => PRIOR_BYTES_PER_SECOND,
        };
        Link {
            bytes_per_second: measured.unwrap_or_else(prior),
            rtt_seconds: estimate.rtt_seconds.mean().unwrap_or(PRIOR_RTT_SECONDS),
            measured: measured.is_some(),
        }
    }

    /// Bytes per second between two engines where nothing else is on the way: through the narrowest of the link and the two cards.
    pub(crate) fn width(&self, source: Slot, destination: Slot) -> f64 {
        let link = self.get(source, destination).bytes_per_second;
        let ways = self.ways(source, destination, Queued::default());
        ways.into_iter().filter_map(|(_, width)| width).fold(link, f64::min)
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
        let mut narrowest = link.bytes_per_second;
        let mut behind = (queued.link + bytes) as f64 / narrowest;
        for (before, width) in self.ways(source, destination, queued) {
            let width = width.unwrap_or(link.bytes_per_second);
            narrowest = narrowest.min(width);
            behind = behind.max((before + bytes) as f64 / width);
        }
        let alone = bytes as f64 / narrowest;
        let round_trips = ROUND_TRIPS * link.rtt_seconds;
        TransferSeconds { wait: (behind - alone).max(0.0), transfer: round_trips + alone, round_trips }
    }

    /// What a transfer shares with others of its hosts: what is queued there, and how wide it is.
    #[inline]
    fn ways(&self, source: Slot, destination: Slot, queued: Queued) -> [(u64, Option<f64>); 2] {
        let (from, to) = (self.end(source), self.end(destination));
        match from.host.is_some() && from.host == to.host {
            true => [(queued.source.within, from.widths.within); 2],
            false => [(queued.source.out, from.widths.out), (queued.destination.into, to.widths.into)],
        }
    }

    /// No transfer to this engine with which so many bytes are on the way, behind those queued at its host, is predicted to take less.
    #[inline]
    pub(crate) fn at_least_into(&self, destination: Slot, bytes: u64, queued: HostQueue) -> AtLeast {
        let end = self.end(destination);
        let over = |before: u64, width| {
            let (round_trips, width) = self.at_best(width);
            let (byte, bytes) = (1.0 / width, bytes as f64);
            AtLeast { round_trips, bytes: bytes * byte, behind: round_trips + (before as f64 + bytes) * byte }
        };
        let across = over(queued.into, end.widths.into);
        if !end.shared {
            return across;
        }
        let within = over(queued.within, end.widths.within);
        let (bytes, behind) = (across.bytes.min(within.bytes), across.behind.min(within.behind));
        AtLeast { bytes, behind, ..across }
    }

    /// No transfer from this engine to another host is predicted to take less than [`AtLeast::behind`], and [`AtLeast::bytes`] for each byte, waiting behind what
    /// is queued at its host included; and the same within its host.
    #[inline]
    pub(crate) fn at_least_out_of(&self, source: Slot, queued: HostQueue) -> [AtLeast; 2] {
        let end = self.end(source);
        [(queued.out, end.widths.out), (queued.within, end.widths.within)].map(|(before, width)| {
            let (round_trips, width) = self.at_best(width);
            let byte = 1.0 / width;
            AtLeast { round_trips, bytes: byte, behind: round_trips + before as f64 * byte }
        })
    }

    /// Round trips, and the bandwidth of a way.
    #[inline]
    fn at_best(&self, width: Option<f64>) -> (f64, f64) {
        let rtt = self.shortest_rtt.map_or(PRIOR_RTT_SECONDS, |rtt| rtt.min(PRIOR_RTT_SECONDS));
        let fastest = || self.fastest.map_or(PRIOR_BYTES_PER_SECOND, |f| f.max(PRIOR_BYTES_PER_SECOND));
        (ROUND_TRIPS * rtt, width.unwrap_or_else(fastest))
    }

    /// Drops what is known of an engine's links, and of its host's card where it was the last one there: its slot may go to another one.
    pub fn forget(&mut self, slot: Slot) {
        if let Some(row) = self.rows.get_mut(slot.0 as usize) {
            *row = Arc::default();
        }
        for at in 0..self.rows.len() {
            if self.rows[at].from.binary_search_by_key(&slot, |entry| entry.0).is_ok() {
                Arc::make_mut(&mut self.rows[at]).from.retain(|entry| entry.0 != slot);
                self.summarise_row(Slot(at as u32));
            }
        }
        self.leave(slot);
        self.summarise();
    }

    /// Every link that was measured: source, destination, its estimates as seconds per byte would be recorded.
    pub(crate) fn known(&self) -> impl Iterator<Item = (Slot, Slot, Option<f64>, Option<f64>)> + '_ {
        self.rows.iter().enumerate().flat_map(|(destination, row)| {
            row.from.iter().map(move |(source, estimate)| {
                let means = (estimate.width(), estimate.rtt_seconds.mean());
                (*source, Slot(destination as u32), means.0, means.1)
            })
        })
    }

    /// Every engine that has a host: its slot, the host's name, and what is known of the ways there.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = (Slot, &str, Widths)> {
        self.ends.iter().enumerate().filter_map(|(slot, end)| {
            let host = &self.hosts[end.host? as usize];
            Some((Slot(slot as u32), host.name.as_str(), end.widths))
        })
    }

    /// Links with these estimates, as [`Links::known`] gives them, on these hosts, as [`Links::hosts`] gives them.
    pub(crate) fn restore<'a>(
        known: impl Iterator<Item = (Slot, Slot, Option<f64>, Option<f64>)>,
        hosts: impl Iterator<Item = (Slot, &'a str, Widths)>,
    ) -> Self {
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
            links.summarise_row(destination);
        }
        for (slot, name, widths) in hosts {
            links.place(slot, name);
            let at = links.host(slot);
            let host = links.host_mut(at);
            host.out = Way::of(widths.out);
            host.into = Way::of(widths.into);
            host.within = Way::of(widths.within);
            links.summarise_host(at);
        }
        links.summarise();
        links
    }

    fn grow(&mut self, slot: Slot) {
        let entries = slot.0 as usize + 1;
        if self.rows.len() < entries {
            self.rows.resize_with(entries, Arc::default);
            self.ends.resize(entries, End::default());
        }
    }

    fn row(&mut self, slot: Slot) -> &mut Row {
        self.grow(slot);
        Arc::make_mut(&mut self.rows[slot.0 as usize])
    }

    #[inline]
    fn end(&self, slot: Slot) -> End {
        self.ends.get(slot.0 as usize).copied().unwrap_or_default()
    }

    /// The place of an engine's host.
    fn host(&mut self, slot: Slot) -> u32 {
        if self.end(slot).host.is_none() {
            self.place(slot, "");
        }
        self.end(slot).host.expect("it was placed")
    }

    fn host_mut(&mut self, at: u32) -> &mut Host {
        Arc::make_mut(&mut self.hosts[at as usize])
    }

    fn summarise_row(&mut self, slot: Slot) {
        let row = self.row(slot);
        let estimates = || row.from.iter().map(|(_, estimate)| estimate);
        row.fastest = estimates().filter_map(Estimate::width).reduce(f64::max);
        row.shortest_rtt = estimates().filter_map(|e| e.rtt_seconds.mean()).reduce(f64::min);
    }

    fn summarise_host(&mut self, at: u32) {
        let host = &self.hosts[at as usize];
        let (widths, shared) = (host.widths(), host.engines > 1);
        for end in self.ends.iter_mut().filter(|end| end.host == Some(at)) {
            (end.widths, end.shared) = (widths, shared);
        }
    }

    fn summarise(&mut self) {
        let of_links = self.rows.iter().filter_map(|row| row.fastest);
        let widths = self.ends.iter().map(|end| end.widths);
        let of_ways = widths.flat_map(|widths| [widths.out, widths.into, widths.within]).flatten();
        self.fastest = of_links.chain(of_ways).reduce(f64::max);
        self.shortest_rtt = self.rows.iter().filter_map(|row| row.shortest_rtt).reduce(f64::min);
    }
}

#[cfg(test)]
mod tests;
