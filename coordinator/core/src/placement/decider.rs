//! One decision after another, in memory that is used again.

use super::search::{self, Ended, Lazy};
use super::{Aim, MAX_LOOKS, MAX_PAIRS, Modes, PULL_SOURCES, Policy, Request, View};
use crate::cost::{DecodeSums, Fetch, Key, Moving, Plan, PrefillSums, Priced, Pricing, Sender};
use crate::fleet::{Fleet, Role};
use crate::load::Loads;

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// The policy that chose.
    pub policy: &'static str,
    /// The plan, and its cost.
    pub chosen: Priced,
    /// Whether no plan of the kind that the policy aims at was possible.
    pub fell_back: bool,
    /// Whether a prefill on the chosen engine meets no other one, as far as is known: its time then says how fast the
    /// engine is.
    pub alone: bool,
    /// Whether the search among pairs ended at [`MAX_PAIRS`] or [`MAX_LOOKS`]: another one may be better.
    pub cut: bool,
    /// Plans that were priced.
    pub priced: u32,
}

impl Decision {
    /// The plan that was taken.
    pub fn plan(&self) -> Plan {
        self.chosen.plan
    }

    /// Whether it is predicted to meet both SLOs, where they are set.
    pub fn meets_slo(&self) -> bool {
        self.chosen.late_seconds == 0.0
    }
}

/// The parts of all plans that an engine is in: one cache line.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
pub(super) struct Costs {
    pub(super) prefill: PrefillSums,
    pub(super) decode: DecodeSums,
}

/// What a decision works with, and its explanation reads.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Places of engines that can take any part in the request, in order.
    pub(super) able: Vec<u32>,
    /// Those that may serve all of it.
    pub(super) whole: Vec<u32>,
    /// Whether these do so only where no pair can in time.
    pub(super) last_resort: bool,
    /// By place.
    pub(super) costs: Vec<Costs>,
}

/// Decides. Allocates nothing once it has seen a fleet and a prompt of the largest size; use one for each thread.
#[derive(Debug, Default)]
pub struct Decider {
    pub(super) loads: Loads,
    /// Leading blocks of the prompt, by place.
    pub(super) held: Vec<u32>,
    /// The most prompt tokens that an engine holds which may take part.
    longest_hit: u64,
    /// How long answers of the model are.
    answer_tokens: f64,
    pub(super) scratch: Scratch,
    firsts: Lazy,
    seconds: Lazy,
    /// Of a handoff to each engine, by place.
    moving: Vec<Moving>,
    sources: Vec<u32>,
}

/// A sum of costs is better than another one only where it is below it by more than rounding: without this, engines that are all
/// alike would have every pair of them priced.
const BELOW: f64 = 1.0 - 1e-12;

/// The best plan so far.
#[derive(Clone, Copy, Debug)]
struct Best {
    key: Key,
    plan: Plan,
}

impl Decider {
    /// A decider that has not allocated anything yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads the engines' loads and decides. `None` where no engine can serve the request;
    /// [`super::skipped`] says why each was left out.
    pub fn decide(&mut self, policy: &dyn Policy, fleet: &Fleet, request: &Request<'_>) -> Option<Decision> {
        self.loads.read(fleet.loads());
        self.decide_as_seen(policy, fleet, request)
    }

    /// Decides with these loads, which must have an entry for each engine of the fleet; engines beyond them count as idle.
    pub fn decide_with(
        &mut self,
        policy: &dyn Policy,
        fleet: &Fleet,
        loads: &Loads,
        request: &Request<'_>,
    ) -> Option<Decision> {
        self.loads.copy_from(loads);
        self.loads.engines.resize(fleet.engines().len(), Default::default());
        self.decide_as_seen(policy, fleet, request)
    }

    pub(super) fn sources(&self) -> &[u32] {
        &self.sources
    }

    /// The loads that the last decision saw.
    pub fn loads(&self) -> &Loads {
        &self.loads
    }

    pub(super) fn pricing<'a>(&'a self, fleet: &'a Fleet, request: &Request<'_>) -> Pricing<'a> {
        let output = (self.answer_tokens, request.max_tokens);
        let mut pricing =
            Pricing::new(fleet, &self.loads, &self.held, request.prompt_tokens, output, request.slo);
        pricing.longest_hit = self.longest_hit;
        pricing
    }

    fn decide_as_seen(
        &mut self,
        policy: &dyn Policy,
        fleet: &Fleet,
        request: &Request<'_>,
    ) -> Option<Decision> {
        self.loads.sum_by_host(fleet);
        self.sources.clear();
        self.held.clear();
        self.held.resize(fleet.engines().len(), 0);
        for (slot, overlap) in request.overlaps.iter() {
            if let Some(at) = fleet.place_of(slot) {
                self.held[at as usize] = overlap.blocks;
            }
        }
        // What a request before it computes is there when this one's turn comes.
        for (slot, blocks) in request.overlaps.iter_expected() {
            if let Some(at) = fleet.place_of(slot) {
                self.held[at as usize] = self.held[at as usize].max(blocks);
            }
        }
        // Apart while the pricing borrows the rest of `self`.
        let mut scratch = std::mem::take(&mut self.scratch);
        let found = filter(fleet, &self.loads, request, &mut scratch);
        // All that are able serve one model.
        self.answer_tokens = scratch.able.first().map_or(0.0, |at| fleet.hot()[*at as usize].answer_tokens);
        let decision = found.then(|| {
            let pricing = self.pricing(fleet, request);
            let hits = scratch.able.iter().filter(|at| self.held[**at as usize] > 0);
            self.longest_hit = hits.map(|at| pricing.hit_tokens(*at)).max().unwrap_or(0);
            let pricing = self.pricing(fleet, request);
            scratch.costs.resize(fleet.engines().len(), Costs::default());
            for at in &scratch.able {
                scratch.costs[*at as usize] =
                    Costs { prefill: pricing.prefill(*at).sums, decode: pricing.decode(*at).sums };
            }
            let view = View { request, pricing: &pricing, scratch: &scratch };
            let aim = policy.aim(&view);
            let best_whole = view.best();
            self.choose(policy, fleet, request, &scratch, aim, best_whole)
        });
        self.scratch = scratch;
        decision
    }

    fn choose(
        &mut self,
        policy: &dyn Policy,
        fleet: &Fleet,
        request: &Request<'_>,
        scratch: &Scratch,
        aim: Aim,
        (whole_key, whole): (Key, u32),
    ) -> Decision {
        let mut search = Search {
            fleet,
            scratch,
            request,
            best: None,
            budget: MAX_PAIRS,
            looks: MAX_LOOKS,
            priced: scratch.whole.len() as u32,
            cut: false,
        };
        let mut fell_back = false;
        let engine = match aim {
            Aim::Engine(engine) => Some(engine),
            Aim::Best(modes) => {
                if modes.whole && !scratch.last_resort {
                    search.best =
                        Some(Best { key: whole_key, plan: self.pricing(fleet, request).whole_plan(whole) });
                }
                self.search(&mut search, modes);
                // Better an engine that does more than its part than an answer that comes late.
                let late = |best: Best| request.slo.ttft_seconds.is_some_and(|slo| best.key.ttft > slo);
                if modes.whole && scratch.last_resort && search.best.is_some_and(late) {
                    search.take(whole_key, self.pricing(fleet, request).whole_plan(whole));
                }
                fell_back = search.best.is_none();
                fell_back.then_some(whole)
            }
        };
        let pricing = self.pricing(fleet, request);
        let plan = match (engine, search.best) {
            (None, Some(best)) => best.plan,
            (engine, _) => pricing.whole_plan(engine.unwrap_or(whole)),
        };
        let at = plan.prefill();
        let alone =
            self.loads.engines[at as usize].prefills == 0 && fleet.hot()[at as usize].foreign_waiting == 0;
        Decision {
            policy: policy.name(),
            chosen: pricing.price(plan),
            fell_back,
            alone,
            cut: search.cut,
            priced: search.priced,
        }
    }

    fn search(&mut self, search: &mut Search<'_>, modes: Modes) {
        if search.request.prompt_tokens == 0 {
            return;
        }
        if search.request.splittable.is_err() {
            return;
        }
        if modes.pulls && !search.scratch.last_resort {
            self.pulls(search);
        }
        if modes.pairs {
            for layout in search.fleet.exchanges() {
                self.pairs(search, *layout);
            }
        }
    }

    /// Plans that fetch a prefix first.
    fn pulls(&mut self, search: &mut Search<'_>) {
        let (fleet, hot) = (search.fleet, search.fleet.hot());
        let able = |at: &u32| {
            let hot = &hot[*at as usize];
            hot.can_pull_cached && hot.exchange.is_some()
        };
        self.sources.clear();
        let holders = search.scratch.able.iter().copied();
        self.sources.extend(holders.filter(|at| self.held[*at as usize] > 0 && able(at)));
        let held = &self.held;
        let loads = &self.loads;
        let order = |at: &u32| {
            (std::cmp::Reverse(held[*at as usize]), loads.engines[*at as usize].sending_bytes, *at)
        };
        if self.sources.len() > PULL_SOURCES {
            self.sources.select_nth_unstable_by_key(PULL_SOURCES, order);
            self.sources.truncate(PULL_SOURCES);
        }
        self.sources.sort_unstable_by_key(order);
        let pricing = self.pricing(fleet, search.request);
        let hold = |i| self.sources.get(i).map_or(Fetch::default(), |source| pricing.hold(*source));
        let holds: [Fetch; PULL_SOURCES] = std::array::from_fn(hold);
        for engine in search.scratch.whole.iter().copied().filter(able) {
            let costs = &search.scratch.costs[engine as usize];
            for (source, hold) in self.sources.iter().copied().zip(&holds) {
                let no_better = |best: Option<Best>, prefill_seconds: f64| {
                    best.is_some_and(|best| prefill_seconds + costs.decode.seconds >= best.key.seconds)
                };
                // Were there nothing left to move and to compute.
                let begins = pricing.queue(engine).max(hold.queue + hold.hold);
                let apart =
                    source == engine || hot[source as usize].exchange != hot[engine as usize].exchange;
                if apart || no_better(search.best, begins) {
                    continue;
                }
                let Some((cached, bytes)) = pricing.pulled(source, engine) else { continue };
                // Were there nothing left to move.
                let moved = pricing.prefill_behind(engine, cached, hold).sums;
                if no_better(search.best, moved.seconds) {
                    continue;
                }
                let fetch = Fetch { way: pricing.transfer(source, engine, bytes), ..*hold };
                let prefill = pricing.prefill_behind(engine, cached, &fetch).sums;
                let key = pricing.whole_key(&prefill, &costs.decode);
                search.take(key, Plan::Pull { source, engine });
            }
        }
    }

    /// Plans on two engines of one layout.
    fn pairs(&mut self, search: &mut Search<'_>, layout: u32) {
        let fleet = search.fleet;
        let hot = fleet.hot();
        let (mut firsts, mut seconds) = (std::mem::take(&mut self.firsts), std::mem::take(&mut self.seconds));
        let mut moving = std::mem::take(&mut self.moving);
        firsts.clear(fleet.engines().len());
        seconds.clear(fleet.engines().len());
        moving.resize(fleet.engines().len(), Moving::default());
        let pricing = self.pricing(fleet, search.request);
        let costs = &search.scratch.costs;
        let most_early = match fleet.chunk_tokens() {
            Some(_) => {
                search.scratch.able.iter().map(|at| costs[*at as usize].prefill.early).fold(0.0, f64::max)
            }
            None => 0.0,
        };
        for at in search.scratch.able.iter().copied() {
            let engine = &hot[at as usize];
            if engine.exchange != Some(layout) {
                continue;
            }
            let Costs { prefill, decode } = &costs[at as usize];
            if engine.role.prefills() {
                firsts.push(prefill.seconds, at);
            }
            if engine.role.decodes() {
                moving[at as usize] = pricing.moving(at, most_early);
                let risk = pricing.promised * decode.handoff_itl_risk;
                seconds.push(decode.handoff_seconds + moving[at as usize].least + risk, at);
            }
        }
        // What the sum of two costs has to be below, given the best plan so far.
        let limit = |best: &Option<Best>| best.map_or(f64::INFINITY, |best| BELOW * best.key.seconds);
        let (first, second, below) = (firsts.least(), seconds.least(), limit(&search.best));
        firsts.keep_below(below - second);
        seconds.keep_below(below - first);
        let mut looks = search.looks;
        let mut sender = (u32::MAX, Sender::default());
        let ended = search::pairs(&mut firsts, &mut seconds, &mut looks, below, |sum, from, to| {
            let below = limit(&search.best);
            if from == to {
                return Some(below);
            }
            let (prefill, decode) = (&costs[from as usize].prefill, &costs[to as usize].decode);
            // What the first one's end of the link adds, before the link itself is looked up.
            if sender.0 != from {
                sender = (from, pricing.sender(from, prefill.early));
            }
            let moving = &moving[to as usize];
            let least = moving.least;
            let moves = sender.1.at_least(moving, hot[to as usize].host).max(least);
            // Of the risk the sum has the ITL's part only.
            let risk = pricing.own_risk(prefill.own + moves + decode.handoff_own, decode.handoff_itl_risk)
                - pricing.promised * decode.handoff_itl_risk;
            if sum + (moves - least) + risk >= below {
                return Some(below);
            }
            search.budget = search.budget.checked_sub(1)?;
            let key = pricing.pair_key(prefill, decode, pricing.handoff(from, to, prefill));
            search.take(key, Plan::Disaggregated { prefill: from, decode: to });
            Some(limit(&search.best))
        });
        search.looks = looks;
        search.cut |= ended == Ended::Cut;
        (self.firsts, self.seconds, self.moving) = (firsts, seconds, moving);
    }
}

/// A search for the best plan.
struct Search<'a> {
    fleet: &'a Fleet,
    scratch: &'a Scratch,
    request: &'a Request<'a>,
    best: Option<Best>,
    /// Pairs that may still be priced.
    budget: usize,
    /// Pairs that may still be looked at.
    looks: usize,
    priced: u32,
    cut: bool,
}

impl Search<'_> {
    /// Takes a plan if it is better than what there is.
    fn take(&mut self, key: Key, plan: Plan) {
        self.priced += 1;
        if self.best.is_none_or(|best| key.order(&best.key).is_lt()) {
            self.best = Some(Best { key, plan });
        }
    }
}

/// Fills in who can take part. Returns whether anyone can.
fn filter(fleet: &Fleet, loads: &Loads, request: &Request<'_>, scratch: &mut Scratch) -> bool {
    let hot = fleet.hot();
    scratch.able.clear();
    scratch.whole.clear();
    let serving = fleet.serving(request.model).iter().copied();
    scratch.able.extend(serving.filter(|at| hot[*at as usize].healthy));
    for id in request.avoid {
        if let Some(at) = fleet.find(id) {
            scratch.able.retain(|other| *other != at);
        }
    }
    if request.most_in_flight.is_some() {
        let room = |at: &u32| {
            let foreign = hot[*at as usize].foreign_waiting + hot[*at as usize].foreign_running;
            !request.is_full(foreign, &loads.engines[*at as usize])
        };
        scratch.able.retain(room);
    }
    let both = |at: &u32| matches!(hot[*at as usize].role, Role::Both | Role::Decode);
    scratch.whole.extend(scratch.able.iter().copied().filter(both));
    scratch.last_resort = false;
    if scratch.whole.is_empty() {
        // Better an engine that does more than its part than a request that fails.
        let decodes = |at: &u32| hot[*at as usize].role.decodes();
        scratch.whole.extend(scratch.able.iter().copied().filter(decodes));
        scratch.last_resort = !scratch.whole.is_empty();
    }
    if scratch.whole.is_empty() {
        scratch.whole.extend_from_slice(&scratch.able);
    }
    !scratch.able.is_empty()
}

impl Pricing<'_> {
    /// The plan on one engine.
    pub(super) fn whole_plan(&self, engine: u32) -> Plan {
        match self.hot(engine).role == Role::Decode && self.usable_blocks(engine) > 0 {
            true => Plan::Append { engine },
            false => Plan::Colocated { engine },
        }
    }
}
