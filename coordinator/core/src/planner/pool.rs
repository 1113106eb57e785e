//! The engines and the last requests of one model, and which split is taken.

use std::collections::{BTreeMap, VecDeque};

use super::prefixes::{Beginnings, Prefixes};
use super::rehearsal::{Member, Play, Rehearsal, Roads};
use super::{Finished, Placed};
use crate::cost::Slo;
use crate::fleet::{Engine, Fleet, Role};
use crate::kv_index::Slot;
use crate::links::PRIOR_BYTES_PER_SECOND;

/// Requests that are rehearsed. More than come in a burst: what a burst leaves behind is rehearsed with it only.
const WINDOW: usize = 1600;
/// New ones between two plans.
const FRESH: usize = 100;
/// Requests that must have ended since the last change before the next one.
const JUDGED: usize = 40;
/// Where engines do both and more than this share is within the SLOs, of those that are over and in a rehearsal, nothing is looked for.
const ENOUGH: f64 = 0.95;
/// What is rehearsed besides the requests as they came: so many times as fast. It tells splits apart that all keep the SLOs.
const FASTER: f64 = 1.5;
/// Weight of a new rehearsal in what is remembered of a split's.
const NEW: f64 = 0.25;
/// A split is left for another one only if that keeps the SLOs of so many more.
const MARGIN: f64 = 0.02;
/// All doing both is left for a split, and that for all doing both, only if no more than this part of the SLOs that are missed would be, and [`LEAST`] less.
const CLEARLY: f64 = 0.5;
/// See [`CLEARLY`].
const LEAST: f64 = 0.01;
/// What a rehearsal was off by is forgotten over so long while things are otherwise.
const FORGET_SECONDS: f64 = 60.0;
/// Engines that a rehearsal takes at most; of more, the hosts are taken in turn, and time goes by the slower.
const MOST_MEMBERS: usize = 64;
/// Splits that are rehearsed at most.
const MOST_SPLITS: usize = 16;

/// A request of the window.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Seconds.
    pub(super) at: f64,
    pub(super) prompt_tokens: u64,
    /// The last request that began like it, and how many tokens long.
    pub(super) parent: Option<(u64, u64)>,
    /// Where its beginning was cached if that was longer ago, and how much of it.
    pub(super) elsewhere: Option<(Slot, u64)>,
    /// Of its answer, if that is over.
    pub(super) tokens: Option<u64>,
    /// Whether it was within its SLOs, if it is over.
    kept: Option<bool>,
    pub(super) slo: Slo,
    beginnings: Beginnings,
}

impl Seen {
    #[cfg(test)]
    pub(super) fn new(at: f64, prompt_tokens: u64, tokens: u64, slo: Slo) -> Self {
        let beginnings = Beginnings::default();
        Self {
            at,
            prompt_tokens,
            parent: None,
            elsewhere: None,
            tokens: Some(tokens),
            kept: None,
            slo,
            beginnings,
        }
    }

    fn within(&self, finished: &Finished) -> bool {
        let within = |seconds: f64, slo: Option<f64>| slo.is_none_or(|slo| seconds <= slo);
        within(finished.ttft_seconds, self.slo.ttft_seconds)
            && within(finished.itl_seconds, self.slo.itl_seconds)
    }
}

/// One model's.
#[derive(Debug, Default)]
pub(super) struct Pool {
    window: VecDeque<Seen>,
    /// The number of the window's first request.
    first: u64,
    prefixes: Prefixes,
    /// Requests since the last rehearsals.
    fresh: usize,
    /// How many engines only decode.
    decoding: usize,
    /// The first request since that changed.
    since: u64,
    rehearsal: Rehearsal,
    /// By how much rehearsals underestimated what was attained of the requests that are over: where all do both, and where engines are split.
    off: [f64; 2],
    planned_at: f64,
    /// What rehearsals said of splits, averaged; for as many engines as there were then.
    remembered: (usize, Vec<f64>),
}

impl Pool {
    pub(super) fn placed(&mut self, placed: Placed) -> u64 {
        while self.window.len() >= WINDOW
            && let Some(gone) = self.window.pop_front()
        {
            self.prefixes.forget(self.first, &gone.beginnings);
            self.first += 1;
        }
        let number = self.first + self.window.len() as u64;
        let (holder, held) = placed.cached;
        let found = self.prefixes.find(&placed.beginnings);
        self.prefixes.insert(number, &placed.beginnings);
        self.window.push_back(Seen {
            at: placed.now_ms as f64 / 1e3,
            prompt_tokens: placed.prompt_tokens,
            // Between two depths it is as long as what was cached says.
            parent: found.map(|(parent, tokens)| (parent, tokens.max(held))),
            elsewhere: (found.is_none() && held > 0).then_some((holder, held)),
            tokens: None,
            kept: None,
            slo: placed.slo,
            beginnings: placed.beginnings,
        });
        self.fresh += 1;
        number
    }

    pub(super) fn finished(&mut self, number: u64, finished: &Finished) {
        let Some(at) = number.checked_sub(self.first) else { return };
        let Some(seen) = self.window.get_mut(at as usize) else { return };
        seen.tokens = Some(finished.tokens);
        seen.kept = Some(seen.within(finished));
    }

    /// Adds what the engines at these places are to do.
    pub(super) fn plan(
        &mut self,
        now_ms: u64,
        fleet: &Fleet,
        places: &[u32],
        parts: &mut BTreeMap<Slot, Role>,
    ) {
        let engine = |at: &u32| &fleet.engines()[*at as usize];
        let able: Vec<u32> = places
            .iter()
            .copied()
            .filter(|at| engine(at).healthy && fleet.hot()[*at as usize].exchange.is_some())
            .collect();
        let ours = places.iter().all(|at| engine(at).info.role == Role::Both)
            && able.windows(2).all(|two| engine(&two[0]).info.layout == engine(&two[1]).info.layout);
        if !ours || able.len() < 2 {
            self.decoding = 0;
            return;
        }
        let order = order(fleet, &able);
        if self.fresh >= FRESH {
            self.fresh = 0;
            self.choose(now_ms as f64 / 1e3, fleet, &order);
        }
        self.decoding = self.decoding.min(order.len() - 1);
        if self.decoding > 0 {
            for (at, place) in order.iter().enumerate() {
                let role = if at < self.decoding { Role::DecodeOnly } else { Role::Prefill };
                parts.insert(engine(place).info.slot, role);
            }
        }
    }

    /// Rehearses, and takes the best split. `order` is that in which engines come to decode.
    fn choose(&mut self, now: f64, fleet: &Fleet, order: &[u32]) {
        let is_split = self.decoding > 0;
        let since = self.since.saturating_sub(self.first) as usize;
        let over: Vec<bool> = self.window.iter().skip(since).filter_map(|seen| seen.kept).collect();
        if over.len() < JUDGED {
            return;
        }
        let engines = order.len();
        let splits: Vec<usize> = match engines <= MOST_SPLITS {
            true => (0..engines).collect(),
            false => (0..MOST_SPLITS).map(|at| at * engines / MOST_SPLITS).collect(),
        };
        let current = splits.iter().rposition(|split| *split <= self.decoding).unwrap_or(0);
        let (members, slots) = members(fleet, order);
        let play = Play {
            members: &members,
            slots: &slots,
            roads: roads(fleet, order),
            window: &self.window,
            first: self.first,
            answer_tokens: fleet.hot()[order[0] as usize].answer_tokens,
        };
        let slower = members.len() as f64 / engines as f64;
        let rehearse = |rehearsal: &mut Rehearsal, split: usize, faster: f64| {
            // The first members are those that come to decode first.
            let decoding = (split as f64 * slower).round() as usize;
            rehearsal.run(&play, decoding, faster * slower)
        };
        let (mut attained, mut faster) = (vec![0.0; splits.len()], vec![0.0; splits.len()]);
        attained[current] = rehearse(&mut self.rehearsal, splits[current], 1.0);
        // Of the same requests, as far as they are over.
        let both = self.window.iter().zip(self.rehearsal.verdicts()).skip(since);
        let compared = both.filter_map(|(seen, rehearsed)| Some((seen.kept?, rehearsed?)));
        let (seen, rehearsed): (Vec<bool>, Vec<bool>) = compared.unzip();
        let forgotten = (-(now - self.planned_at) / FORGET_SECONDS).exp();
        self.planned_at = now;
        self.off[usize::from(!is_split)] *= forgotten;
        if seen.len() >= JUDGED {
            self.off[usize::from(is_split)] = share(seen.into_iter()) - share(rehearsed.into_iter());
        }
        let mut off = self.off;
        if !is_split {
            // What makes requests miss and is not rehearsed will do so on a split too.
            off[1] = off[1].min(off[0]).min(0.0);
        }
        // Those that are not over may tell that all is not as well any more.
        if !is_split && attained[current].min(share(over.into_iter())) >= ENOUGH {
            return;
        }
        for at in 0..splits.len() {
            faster[at] = rehearse(&mut self.rehearsal, splits[at], FASTER);
            if at != current {
                attained[at] = rehearse(&mut self.rehearsal, splits[at], 1.0);
            }
        }
        let (known, remembered) = &mut self.remembered;
        let new = (*known != engines).then(|| *known = engines).is_some();
        remembered.resize(splits.len(), 0.0);
        for (remembered, (attained, faster)) in remembered.iter_mut().zip(attained.iter().zip(&faster)) {
            let both = (attained + faster) / 2.0;
            *remembered += (both - *remembered) * if new { 1.0 } else { NEW };
        }

        let mut best = current.max(1);
        for at in 1..splits.len() {
            let margin = if best == current { MARGIN } else { 0.0 };
            if remembered[at] > remembered[best] + margin {
                best = at;
            }
        }
        let missed = [1.0 - attained[0] - off[0], 1.0 - attained[best] - off[1]];
        let clearly = |new: f64, old: f64| new < CLEARLY * old - LEAST;
        let taken = match is_split {
            true if clearly(missed[0], missed[1]) => 0,
            false if !clearly(missed[1], missed[0]) => 0,
            _ if best == current => self.decoding,
            _ => splits[best],
        };
        if taken != self.decoding {
            self.decoding = taken;
            self.since = self.first + self.window.len() as u64;
        }
    }
}

/// The share of those that are true.
pub(super) fn share(of: impl Iterator<Item = bool>) -> f64 {
    let (kept, all) = of.fold((0, 0), |(kept, all), one| (kept + u32::from(one), all + 1));
    f64::from(kept) / f64::from(all.max(1))
}

/// Places in the order in which they come to decode: first those that are slow with prompts for how fast they decode; engines
/// of one host after one another, so that handoffs can stay within hosts.
fn order(fleet: &Fleet, able: &[u32]) -> Vec<u32> {
    // As far as it is known: engines that differ by less than half are alike.
    let slowness = |engine: &Engine| {
        let speed = &engine.speed;
        (2.0 * (speed.prefill_seconds(2048, 0) / speed.decode_step_seconds(32.0, 65536.0)).log2()).round()
    };
    let mut on_host: BTreeMap<u32, u32> = BTreeMap::new();
    let mut order: Vec<(f64, u32, u32)> = Vec::with_capacity(able.len());
    for at in able {
        let before = on_host.entry(fleet.hot()[*at as usize].host).or_default();
        order.push((-slowness(&fleet.engines()[*at as usize]), *before, *at));
        *before += 1;
    }
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    order.into_iter().map(|entry| entry.2).collect()
}

/// Who takes part in rehearsals, in order, and their slots with the number of each, in order of slots.
fn members(fleet: &Fleet, order: &[u32]) -> (Vec<Member>, Vec<(Slot, u32)>) {
    let mut hosts: Vec<u32> = order.iter().map(|at| fleet.hot()[*at as usize].host).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let every = order.len().div_ceil(MOST_MEMBERS);
    let (mut members, mut slots) = (Vec::new(), Vec::new());
    for at in order {
        let hot = &fleet.hot()[*at as usize];
        let host = hosts.binary_search(&hot.host).unwrap_or(0);
        if !host.is_multiple_of(every) {
            continue;
        }
        let size = f64::from(hot.block_size);
        slots.push((hot.slot, members.len() as u32));
        members.push(Member {
            speed: hot.speed,
            host: (host / every) as u32,
            kv_tokens: hot.kv_tokens,
            token_bytes: hot.block_bytes as f64 / size,
            wire_token_bytes: hot.wire_block_bytes as f64 / size,
            chunk_tokens: hot.chunk_tokens,
        });
    }
    slots.sort_unstable();
    (members, slots)
}

/// As fast as the fastest links between these engines were seen to be.
fn roads(fleet: &Fleet, order: &[u32]) -> Roads {
    let mut hosts = vec![None; fleet.engines().len()];
    order.iter().for_each(|at| hosts[*at as usize] = Some(fleet.hot()[*at as usize].host));
    let host = |slot: Slot| hosts[fleet.place_of(slot)? as usize];
    let links = fleet.links();
    let (mut between, mut within, mut round_trips) = (None, None, 0.0f64);
    for (source, destination, measured, rtt) in links.known() {
        if let (Some(from), Some(to), Some(_)) = (host(source), host(destination), measured) {
            let width = links.width(source, destination);
            let road: &mut Option<f64> = if from == to { &mut within } else { &mut between };
            *road = Some(road.map_or(width, |known| known.max(width)));
            round_trips = round_trips.max(2.0 * rtt.unwrap_or(0.0));
        }
    }
    let between = between.unwrap_or(PRIOR_BYTES_PER_SECOND);
    Roads { between, within: within.unwrap_or(between.max(PRIOR_BYTES_PER_SECOND)), round_trips }
}
