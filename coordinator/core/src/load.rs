//! Work that was dispatched and is not finished: right between two heartbeats, and released on every way out.
//!
//! [`EngineLoad`] holds the counters of one engine; guards change them. A decision reads all of them once, into
//! [`Loads`], and works on that copy: what it saw can be recorded and replayed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::fleet::Fleet;
use crate::kv_index::Slot;
use crate::links::HostQueue;

/// Longest prefill that is reserved, so that sums stay far from overflow: about a day.
const LONGEST_SECONDS: f64 = 1e5;
const NANOS: f64 = 1e9;
const POISON: &str = "no code that holds this lock panics";

/// The counters of one engine. Guards change them; reading them is free of locks but where it receives blocks.
#[derive(Debug, Default)]
pub struct EngineLoad {
    counters: Counters,
    /// Of the context that is reserved, what the engine does not know of yet. No decision reads it.
    coming_tokens: AtomicU64,
    /// What comes from whom; at most one entry for each transfer in flight.
    receiving_from: Mutex<Vec<(Slot, u64)>>,
}

/// One cache line, so that a decision, which reads those of every engine, waits for one for each.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counters {
    prefill_tokens: AtomicU64,
    prefill_nanos: AtomicU64,
    prefills: AtomicU64,
    sequences: AtomicU64,
    context_tokens: AtomicU64,
    prefilled_nanos: AtomicU64,
    sending_bytes: AtomicU64,
    receiving_bytes: AtomicU64,
}

impl EngineLoad {
    /// Reserves the prefill of this many uncached tokens, which is predicted to take so many seconds. At the first
    /// token call [`PrefillReservation::computed`]; dropping the guard releases it where there is none.
    pub fn reserve_prefill(self: &Arc<Self>, uncached_tokens: u64, seconds: f64) -> PrefillReservation {
        // The cast turns what is not a number into 0.
        let nanos = (seconds.clamp(0.0, LONGEST_SECONDS) * NANOS) as u64;
        self.counters.prefill_tokens.fetch_add(uncached_tokens, Ordering::Relaxed);
        self.counters.prefill_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.counters.prefills.fetch_add(1, Ordering::Relaxed);
        PrefillReservation { load: Arc::clone(self), tokens: uncached_tokens, nanos }
    }

    /// Reserves a place among the decoding sequences for one of so many tokens. Call [`DecodeReservation::sent`] when the engine is asked for the answer, and drop the guard at the last
    /// token.
    pub fn reserve_decode(self: &Arc<Self>, context_tokens: u64) -> DecodeReservation {
        self.counters.sequences.fetch_add(1, Ordering::Relaxed);
        self.counters.context_tokens.fetch_add(context_tokens, Ordering::Relaxed);
        self.coming_tokens.fetch_add(context_tokens, Ordering::Relaxed);
        DecodeReservation { load: Arc::clone(self), tokens: context_tokens, coming: context_tokens }
    }

    /// Reserves bytes on the way from one engine to another. Drop the guard when they are there, or will not come.
    pub fn reserve_transfer(
        source: (Slot, &Arc<EngineLoad>),
        destination: &Arc<EngineLoad>,
        bytes: u64,
    ) -> TransferReservation {
        source.1.counters.sending_bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut from = destination.receiving_from.lock().expect(POISON);
        destination.counters.receiving_bytes.fetch_add(bytes, Ordering::Relaxed);
        match from.iter_mut().find(|entry| entry.0 == source.0) {
            Some(entry) => entry.1 += bytes,
            None => from.push((source.0, bytes)),
        }
        drop(from);
        TransferReservation {
            slot: source.0,
            source: Arc::clone(source.1),
            destination: Arc::clone(destination),
            bytes,
        }
    }

    /// What is reserved now.
    #[inline]
    pub fn reserved(&self) -> Reserved {
        Reserved {
            prefill_tokens: self.counters.prefill_tokens.load(Ordering::Relaxed),
            prefill_seconds: self.counters.prefill_nanos.load(Ordering::Relaxed) as f64 / NANOS,
            prefills: self.counters.prefills.load(Ordering::Relaxed),
            sequences: self.counters.sequences.load(Ordering::Relaxed),
            context_tokens: self.counters.context_tokens.load(Ordering::Relaxed),
            sending_bytes: self.counters.sending_bytes.load(Ordering::Relaxed),
            receiving_bytes: self.counters.receiving_bytes.load(Ordering::Relaxed),
        }
    }

    /// Tokens of context that are reserved for sequences of which the engine knows: what it reports in use has them in it, once they are let in.
    pub fn sent_tokens(&self) -> u64 {
        let context = self.counters.context_tokens.load(Ordering::Relaxed);
        context.saturating_sub(self.coming_tokens.load(Ordering::Relaxed))
    }

    /// Predicted seconds of all prefills that ever came to their first token. The difference over a while is what
    /// sequences that decoded meanwhile were stalled by.
    pub fn prefilled_seconds(&self) -> f64 {
        self.counters.prefilled_nanos.load(Ordering::Relaxed) as f64 / NANOS
    }
}

/// Reserved work of one engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserved {
    /// Uncached tokens of prompts whose first token is still to come.
    pub prefill_tokens: u64,
    /// What computing them was predicted to take.
    pub prefill_seconds: f64,
    /// Those prompts.
    pub prefills: u64,
    /// Sequences that decode, or will after their prefill.
    pub sequences: u64,
    /// Their tokens of context, summed.
    pub context_tokens: u64,
    /// Bytes that it is to send to others.
    pub sending_bytes: u64,
    /// Bytes that it is to receive.
    pub receiving_bytes: u64,
}

impl Reserved {
    /// Requests that were dispatched to the engine, for one leg or all, and are not finished.
    pub fn in_flight(&self) -> u64 {
        // A request that is answered here has a place among both until its first token.
        self.sequences.max(self.prefills)
    }
}

/// Bytes on the way from one engine to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkLoad {
    /// Who receives, by slot.
    pub destination: u32,
    /// Who sends, by slot.
    pub source: u32,
    /// How many.
    pub bytes: u64,
}

/// What all engines of a fleet had reserved at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loads {
    pub(crate) engines: Vec<Reserved>,
    /// In order of destination and source.
    pub(crate) links: Vec<LinkLoad>,
    /// The same by the engines' hosts, by their numbers in the fleet; empty where nothing is on the way.
    hosts: Vec<HostQueue>,
}

impl Loads {
    /// Loads as given: one entry for each engine, in the fleet's order.
    pub fn new(engines: Vec<Reserved>, mut links: Vec<LinkLoad>) -> Self {
        links.sort_unstable();
        Self { engines, links, hosts: Vec::new() }
    }

    /// Reads the counters of these engines. Allocates only where it never held so many before.
    pub fn read<'a>(&mut self, engines: impl Iterator<Item = (Slot, &'a EngineLoad)>) {
        self.engines.clear();
        self.links.clear();
        for (slot, load) in engines {
            let reserved = load.reserved();
            self.engines.push(reserved);
            if reserved.receiving_bytes > 0 {
                let from = load.receiving_from.lock().expect(POISON);
                self.links.extend(from.iter().map(|(source, bytes)| LinkLoad {
                    destination: slot.0,
                    source: source.0,
                    bytes: *bytes,
                }));
            }
        }
        self.links.sort_unstable();
    }

    /// What each engine has reserved, in the fleet's order.
    pub fn engines(&self) -> &[Reserved] {
        &self.engines
    }

    /// What is on the way.
    pub fn links(&self) -> &[LinkLoad] {
        &self.links
    }

    /// Sums up what is on the way by the hosts of a fleet. Allocates only where it never saw so many before.
    pub(crate) fn sum_by_host(&mut self, fleet: &Fleet) {
        self.hosts.clear();
        let hot = fleet.hot();
        for link in &self.links {
            let host = |slot| fleet.place_of(Slot(slot)).map(|at| hot[at as usize].host as usize);
            let (source, destination) = (host(link.source), host(link.destination));
            // There are no more hosts than engines.
            self.hosts.resize(hot.len(), HostQueue::default());
            if let Some(host) = source {
                let queue = &mut self.hosts[host];
                let bytes = if source == destination { &mut queue.within } else { &mut queue.out };
                *bytes = bytes.saturating_add(link.bytes);
            }
            if let Some(host) = destination.filter(|_| source != destination) {
                let into = &mut self.hosts[host].into;
                *into = into.saturating_add(link.bytes);
            }
        }
    }

    /// What is on the way at a host, as last summed up.
    #[inline]
    pub(crate) fn at_host(&self, host: u32) -> HostQueue {
        self.hosts.get(host as usize).copied().unwrap_or_default()
    }

    /// Bytes on the way from one engine to another.
    #[inline]
    pub(crate) fn on_link(&self, source: Slot, destination: Slot) -> u64 {
        if self.links.is_empty() {
            return 0;
        }
        let key = (destination.0, source.0);
        match self.links.binary_search_by_key(&key, |link| (link.destination, link.source)) {
            Ok(at) => self.links[at].bytes,
            Err(_) => 0,
        }
    }

    /// Becomes a copy of another without giving up what it allocated.
    pub(crate) fn copy_from(&mut self, other: &Loads) {
        self.engines.clear();
        self.engines.extend_from_slice(&other.engines);
        self.links.clear();
        self.links.extend_from_slice(&other.links);
    }
}

/// A prompt that waits for its first token.
#[derive(Debug)]
#[must_use = "the reservation ends when this is dropped"]
pub struct PrefillReservation {
    load: Arc<EngineLoad>,
    tokens: u64,
    nanos: u64,
}

impl PrefillReservation {
    /// Its first token is there: releases it, and counts it as computed.
    pub fn computed(self) {
        self.load.counters.prefilled_nanos.fetch_add(self.nanos, Ordering::Relaxed);
    }
}

impl Drop for PrefillReservation {
    fn drop(&mut self) {
        self.load.counters.prefill_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.counters.prefill_nanos.fetch_sub(self.nanos, Ordering::Relaxed);
        self.load.counters.prefills.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A sequence that decodes.
#[derive(Debug)]
#[must_use = "the reservation ends when this is dropped"]
pub struct DecodeReservation {
    load: Arc<EngineLoad>,
    tokens: u64,
    coming: u64,
}

impl DecodeReservation {
    /// The engine was asked for the answer; to say so again changes nothing.
    pub fn sent(&mut self) {
        self.load.coming_tokens.fetch_sub(std::mem::take(&mut self.coming), Ordering::Relaxed);
    }

    /// It generated this many more tokens.
    pub fn grew(&mut self, tokens: u64) {
        self.tokens += tokens;
        self.load.counters.context_tokens.fetch_add(tokens, Ordering::Relaxed);
    }
}

impl Drop for DecodeReservation {
    fn drop(&mut self) {
        self.sent();
        self.load.counters.sequences.fetch_sub(1, Ordering::Relaxed);
        self.load.counters.context_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// Bytes on the way.
#[derive(Debug)]
#[must_use = "the reservation ends when this is dropped"]
pub struct TransferReservation {
    slot: Slot,
    source: Arc<EngineLoad>,
    destination: Arc<EngineLoad>,
    bytes: u64,
}

impl Drop for TransferReservation {
    fn drop(&mut self) {
        self.source.counters.sending_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        let mut from = self.destination.receiving_from.lock().expect(POISON);
        self.destination.counters.receiving_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(at) = from.iter().position(|entry| entry.0 == self.slot) {
            from[at].1 -= self.bytes;
            if from[at].1 == 0 {
                from.swap_remove(at);
            }
        }
    }
}

/// The share of its time that an engine spends on prefills, from [`EngineLoad::prefilled_seconds`] as read now
/// and then: sequences that decode there wait for so much of their time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrefillShare {
    last: Option<(u64, f64)>,
    share: f64,
}

impl PrefillShare {
    /// Milliseconds after which what was seen weighs a third.
    const MEMORY_MS: f64 = 10_000.0;
    /// The share is never taken for more: an engine that decodes at all gives its sequences some time.
    pub const MOST: f64 = 0.9;

    /// At this time, in milliseconds on any clock that does not run backwards, the engine had prefilled for so
    /// many seconds in all. Returns the share, 0 to [`PrefillShare::MOST`].
    pub fn observe(&mut self, now_ms: u64, prefilled_seconds: f64) -> f64 {
        if let Some((then_ms, before)) = self.last {
            let passed_ms = now_ms.saturating_sub(then_ms) as f64;
            if passed_ms <= 0.0 {
                return self.share;
            }
            let share = ((prefilled_seconds - before) * 1e3 / passed_ms).clamp(0.0, Self::MOST);
            let kept = (-passed_ms / Self::MEMORY_MS).exp();
            self.share = kept * self.share + (1.0 - kept) * share;
        }
        self.last = Some((now_ms, prefilled_seconds));
        self.share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::Links;
    use crate::placement::testing::{engine, with};

    #[test]
    fn reservations_end_on_every_way_out() {
        let (load, other) = (Arc::new(EngineLoad::default()), Arc::new(EngineLoad::default()));
        let prefill = load.reserve_prefill(100, 0.5);
        let mut decode = load.reserve_decode(1000);
        decode.grew(24);
        assert_eq!(load.sent_tokens(), 24);
        decode.sent();
        decode.sent();
        assert_eq!(load.sent_tokens(), 1024);
        let coming = load.reserve_decode(7);
        assert_eq!(load.sent_tokens(), 1024);
        drop(coming);
        let transfer = EngineLoad::reserve_transfer((Slot(3), &other), &load, 4096);
        let expected = Reserved {
            prefill_tokens: 100,
            prefill_seconds: 0.5,
            prefills: 1,
            sequences: 1,
            context_tokens: 1024,
            sending_bytes: 0,
            receiving_bytes: 4096,
        };
        assert_eq!(load.reserved(), expected);
        let mut loads = Loads::default();
        loads.read([(Slot(3), &*other), (Slot(5), &*load)].into_iter());
        assert_eq!(loads.engines()[0].sending_bytes, 4096);
        assert_eq!(loads.on_link(Slot(3), Slot(5)), 4096);
        assert_eq!(loads.on_link(Slot(5), Slot(3)), 0);
        let panicked = std::thread::spawn(move || {
            let _guards = (prefill, decode, transfer);
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!((load.reserved(), other.reserved()), (Reserved::default(), Reserved::default()));
        loads.read([(Slot(3), &*other), (Slot(5), &*load)].into_iter());
        assert_eq!(loads.links(), []);
    }

    #[test]
    fn what_is_on_the_way_is_summed_up_by_hosts() {
        let on = |n, host: &str| with(engine(n), |info| info.host = host.to_owned());
        let fleet =
            Fleet::new(vec![on(0, "a"), on(1, "b"), on(2, "a"), on(3, ""), on(4, "")], Links::default());
        let link = |source, destination, bytes| LinkLoad { destination, source, bytes };
        // Nobody has slot 9 any more.
        let links =
            vec![link(0, 1, 1), link(2, 1, 2), link(0, 2, 4), link(3, 4, 8), link(1, 0, 16), link(9, 0, 32)];
        let mut loads = Loads::new(vec![Reserved::default(); 5], links);
        loads.sum_by_host(&fleet);
        let of = |at: usize| loads.at_host(fleet.hot()[at].host);
        assert_eq!(of(0), HostQueue { out: 3, into: 48, within: 4 });
        assert_eq!(of(2), of(0));
        assert_eq!(of(1), HostQueue { out: 16, into: 3, within: 0 });
        assert_eq!(of(3), HostQueue { out: 8, into: 0, within: 0 });
        assert_eq!(of(4), HostQueue { out: 0, into: 8, within: 0 });
        loads.links.clear();
        loads.sum_by_host(&fleet);
        assert_eq!(loads.at_host(0), HostQueue::default());
    }

    #[test]
    fn only_computed_prefills_count_and_nonsense_reserves_nothing() {
        let load = Arc::new(EngineLoad::default());
        drop(load.reserve_prefill(1, 2.0));
        assert_eq!(load.prefilled_seconds(), 0.0);
        load.reserve_prefill(1, 2.0).computed();
        assert_eq!(load.prefilled_seconds(), 2.0);
        let guards = [f64::NAN, -1.0].map(|seconds| load.reserve_prefill(1, seconds));
        assert_eq!(load.reserved().prefill_seconds, 0.0);
        drop(guards);
    }

    #[test]
    fn the_share_follows_what_was_prefilled() {
        let mut share = PrefillShare::default();
        assert_eq!(share.observe(0, 5.0), 0.0);
        let mut last = 0.0;
        for second in 1..60 {
            last = share.observe(second * 1000, 5.0 + second as f64 * 0.4);
        }
        assert!((last - 0.4).abs() < 0.01, "{last}");
        assert!(share.observe(61_000, 1e9) <= PrefillShare::MOST);
    }
}
