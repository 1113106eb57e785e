//! Decisions on a busy fleet.
//!
//! The fleet: half of the engines for both parts, a quarter each for prefill and for decode; all links between an engine and
//! 32 others measured; on each a queue of prompts or none, and up to 64 sequences. The prompts: 64 conversations that share their first
//! 2,048 tokens, which a quarter of the engines hold; a few engines hold more of each. Between two decisions one request is
//! dispatched and one ends.
//!
//! The 99th percentile of some microseconds also holds whatever else the machine does: an interrupt, a neighbour's turn on the
//! core. So the decisions are made in [`ROUNDS`] rounds, and the figures are those of the round with the least 99th percentile; those
//! of all rounds stand beside it. Code that is slow is slow in every round.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use baton_coordinator_core::cost::Slo;
use baton_coordinator_core::fleet::{Engine, EngineInfo, Fleet, Role};
use baton_coordinator_core::kv_index::{Holder, KvIndex, Limits, Overlaps, Run, Slot, Tier};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::load::{DecodeReservation, PrefillReservation};
use baton_coordinator_core::placement::{Adaptive, Decider, Disaggregated, Policy, Request, fresh_key};
use baton_coordinator_core::record::Recent;
use baton_coordinator_core::speed::Speed;
use baton_proto::{BlockHash, Epoch};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use stats_alloc::Region;

const BLOCK_SIZE: u32 = 16;
const SHARED_TOKENS: u32 = 2048;
const PROMPTS: usize = 64;
const PEERS: u32 = 32;
const WARM_UP: u32 = 2_000;
const ROUNDS: usize = 5;
const IN_FLIGHT: usize = 4_096;
const RECENT: usize = 64;
/// One engine of 8B parameters on an H100, modelled: see the core's `speed` for the formulas.
pub(crate) const SPEED: Speed = Speed {
    request_seconds: 3.26e-3,
    token_seconds: 1.899e-5,
    attention_seconds: 8.17e-10,
    step_seconds: 6.42e-3,
    sequence_seconds: 1.03e-5,
    context_seconds: 4.19e-8,
};

/// A fleet and a prompt, and what a decision may take.
pub(crate) struct Size {
    pub(crate) engines: u32,
    pub(crate) prompt_tokens: u64,
    pub(crate) p99_micros: f64,
}

/// What was measured for one size.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    engines: u32,
    prompt_tokens: u64,
    /// Lookup, decision and record, in the quietest round.
    whole_micros: Percentiles,
    /// The 99th percentile of these in every round.
    whole_p99_micros_of_rounds: Vec<f64>,
    lookup_micros: Percentiles,
    decide_micros: Percentiles,
    /// Of decisions only: always a handoff; both SLOs set.
    disaggregated_micros: Percentiles,
    with_slos_micros: Percentiles,
    /// After warm-up, for all decisions together.
    allocations_of_lookups: usize,
    allocations_of_decisions: usize,
    /// Of a thousand decisions: those that took two engines, and those whose search was cut.
    handoffs_permille: u32,
    cut_permille: u32,
    p99_bound_micros: f64,
    pub(crate) kept: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    max: f64,
}

fn percentiles(nanos: &Histogram<u64>) -> Percentiles {
    let micros = |nanos: u64| nanos as f64 / 1e3;
    Percentiles {
        p50: micros(nanos.value_at_quantile(0.5)),
        p99: micros(nanos.value_at_quantile(0.99)),
        max: micros(nanos.max()),
    }
}

pub(crate) fn engine(n: u32, role: Role, block_size: u32, speed: Speed) -> Engine {
    Engine {
        info: Arc::new(EngineInfo {
            slot: Slot(n),
            id: format!("engine-{n:04}").parse().expect("a DNS label"),
            epoch: Epoch(1),
            host: String::new(),
            models: vec!["model".into()],
            role,
            block_size,
            block_bytes: u64::from(block_size) * (128 << 10),
            wire_block_bytes: u64::from(block_size) * (128 << 10),
            num_blocks: 0,
            layout: "layout".into(),
            chunk_tokens: 8192,
            can_pull_cached: false,
        }),
        healthy: true,
        can_transfer: true,
        speed,
        load: Arc::default(),
        foreign_waiting: 0,
        foreign_running: 0,
        kv_beyond: 0.0,
        prefill_share: 0.0,
        part: None,
        answer_tokens: None,
        reused: Some(0.5),
    }
}

fn fleet(size: &Size, random: &mut SmallRng) -> Fleet {
    let roles = [Role::Both, Role::Prefill, Role::Both, Role::Decode];
    let engines = (0..size.engines)
        .map(|n| {
            let mut speed = SPEED;
            speed.token_seconds *= random.random_range(0.95..1.05);
            speed.step_seconds *= random.random_range(0.95..1.05);
            engine(n, roles[n as usize % 4], BLOCK_SIZE, speed)
        })
        .collect();
    let mut links = Links::default();
    for n in 0..size.engines {
        for hop in 1..=PEERS {
            let bytes = 1u64 << 30;
            let seconds = bytes as f64 / random.random_range(2e9..3e9);
            let link = (Slot(n), Slot((n + hop) % size.engines));
            links.observe(f64::from(n * PEERS + hop), link, bytes, seconds, 1e-4);
        }
    }
    Fleet::new(engines, links)
}

fn prompts(size: &Size, random: &mut SmallRng) -> Vec<Vec<BlockHash>> {
    let blocks = (size.prompt_tokens / u64::from(BLOCK_SIZE)) as usize;
    let shared: Vec<BlockHash> =
        (0..SHARED_TOKENS / BLOCK_SIZE).map(|_| BlockHash::from_bytes(random.random())).collect();
    (0..PROMPTS)
        .map(|_| {
            let rest = (shared.len()..blocks).map(|_| BlockHash::from_bytes(random.random()));
            shared.iter().copied().chain(rest).collect()
        })
        .collect()
}

fn index(size: &Size, prompts: &[Vec<BlockHash>], random: &mut SmallRng) -> anyhow::Result<KvIndex> {
    let index = KvIndex::new(Limits::of(1 << 30), 7);
    for slot in (0..size.engines).map(Slot) {
        index.open(slot, Epoch(1))?;
        if slot.0 % 4 == 0 {
            let shared = (SHARED_TOKENS / BLOCK_SIZE) as usize;
            index.store(Holder::new(slot, Epoch(1)), Tier::Gpu, Run::chain(None, &prompts[0][..shared]))?;
        }
    }
    for prompt in prompts {
        for _ in 0..4 {
            let slot = Slot(random.random_range(0..size.engines));
            let held = random.random_range(1..prompt.len());
            index.store(Holder::new(slot, Epoch(1)), Tier::Gpu, Run::chain(None, &prompt[..held]))?;
        }
    }
    Ok(index)
}

/// Requests in flight; the oldest ends when one comes.
struct InFlight(VecDeque<(PrefillReservation, DecodeReservation)>);

impl InFlight {
    fn dispatch(&mut self, fleet: &Fleet, prefill: u32, decode: u32, seconds: f64) {
        if self.0.len() >= IN_FLIGHT.min(fleet.engines().len() * 8) {
            self.0.pop_front();
        }
        let (from, to) = (&fleet.engines()[prefill as usize].load, &fleet.engines()[decode as usize].load);
        let reserved = (from.reserve_prefill((seconds * 1e4) as u64, seconds), to.reserve_decode(4000));
        self.0.push_back(reserved);
    }
}

/// Times of many decisions.
struct Timed {
    whole: Histogram<u64>,
    lookup: Histogram<u64>,
    decide: Histogram<u64>,
    allocations: [usize; 2],
    handoffs: u32,
    cut: u32,
}

pub(crate) fn measure(size: &Size, decisions: u32) -> anyhow::Result<Measured> {
    let random = &mut SmallRng::seed_from_u64(17);
    let fleet = Arc::new(fleet(size, random));
    let prompts = prompts(size, random);
    let index = index(size, &prompts, random)?;
    fleet.ring();
    let time = |policy: &dyn Policy, slo: Slo, random: &mut SmallRng| {
        time(size, &fleet, &prompts, &index, policy, slo, decisions, random)
    };
    let rounds = (0..ROUNDS)
        .map(|_| time(&Adaptive, Slo::default(), random))
        .collect::<anyhow::Result<Vec<Timed>>>()?;
    let p99 = |timed: &Timed| timed.whole.value_at_quantile(0.99);
    let main = rounds.iter().min_by_key(|timed| p99(timed)).context("no round")?;
    let pairs = time(&Disaggregated, Slo::default(), random)?;
    let slo = Slo { ttft_seconds: Some(1.0), itl_seconds: Some(0.02) };
    let with_slos = time(&Adaptive, slo, random)?;
    let whole = percentiles(&main.whole);
    let all = || rounds.iter().chain([&pairs, &with_slos]);
    let allocations_of_lookups = all().map(|timed| timed.allocations[0]).sum();
    let allocations_of_decisions = all().map(|timed| timed.allocations[1]).sum();
    let measured = Measured {
        engines: size.engines,
        prompt_tokens: size.prompt_tokens,
        whole_micros: whole,
        whole_p99_micros_of_rounds: rounds.iter().map(|timed| percentiles(&timed.whole).p99).collect(),
        lookup_micros: percentiles(&main.lookup),
        decide_micros: percentiles(&main.decide),
        disaggregated_micros: percentiles(&pairs.decide),
        with_slos_micros: percentiles(&with_slos.decide),
        allocations_of_lookups,
        allocations_of_decisions,
        handoffs_permille: main.handoffs * 1000 / decisions,
        cut_permille: all().map(|timed| timed.cut).max().unwrap_or(0) * 1000 / decisions,
        p99_bound_micros: size.p99_micros,
        kept: whole.p99 < size.p99_micros && allocations_of_lookups == 0 && allocations_of_decisions == 0,
    };
    eprintln!("{measured:?}");
    Ok(measured)
}

#[allow(clippy::too_many_arguments, reason = "what a run is made of")]
fn time(
    size: &Size,
    fleet: &Arc<Fleet>,
    prompts: &[Vec<BlockHash>],
    index: &KvIndex,
    policy: &dyn Policy,
    slo: Slo,
    decisions: u32,
    random: &mut SmallRng,
) -> anyhow::Result<Timed> {
    let mut overlaps = Overlaps::default();
    let mut decider = Decider::new();
    let mut recent = Recent::new(RECENT);
    let mut in_flight = InFlight(VecDeque::with_capacity(IN_FLIGHT + 1));
    for _ in 0..fleet.engines().len() * 4 {
        let (from, to) = (random.random_range(0..size.engines), random.random_range(0..size.engines));
        in_flight.dispatch(fleet, from, to, random.random_range(0.0..0.5));
    }
    let histogram = || Histogram::<u64>::new_with_max(60_000_000_000, 3);
    let mut timed = Timed {
        whole: histogram()?,
        lookup: histogram()?,
        decide: histogram()?,
        allocations: [0; 2],
        handoffs: 0,
        cut: 0,
    };
    for round in 0..WARM_UP + decisions {
        let hashes = &prompts[random.random_range(0..prompts.len())];
        let before = Region::new(crate::ALLOCATOR);
        let began = Instant::now();
        index.overlaps(black_box(hashes), &mut overlaps);
        let looked_up = Instant::now();
        let of_lookup = before.change();
        let before = Region::new(crate::ALLOCATOR);
        let request = Request {
            slo,
            seed: u64::from(round),
            fresh_key: fresh_key(hashes, &overlaps),
            ..Request::new("model", size.prompt_tokens, &overlaps)
        };
        let decision = decider.decide(policy, fleet, &request);
        let decided = Instant::now();
        recent.keep(policy, fleet, &request, &decider, decision.as_ref());
        let ended = Instant::now();
        let of_decision = before.change();
        let Some(decision) = black_box(decision) else { anyhow::bail!("no engine for a request") };
        if round >= WARM_UP {
            timed.whole.record((ended - began).as_nanos() as u64)?;
            timed.lookup.record((looked_up - began).as_nanos() as u64)?;
            timed.decide.record((decided - looked_up).as_nanos() as u64)?;
            timed.allocations[0] += of_lookup.allocations + of_lookup.reallocations;
            timed.allocations[1] += of_decision.allocations + of_decision.reallocations;
            timed.handoffs += u32::from(decision.plan().transfer().is_some());
            timed.cut += u32::from(decision.cut);
        }
        let plan = decision.plan();
        in_flight.dispatch(fleet, plan.prefill(), plan.decode(), random.random_range(0.0..0.5));
    }
    Ok(timed)
}
