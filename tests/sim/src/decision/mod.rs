//! The coordinator's own decision as a [`Placer`]: the same index, cost model and policies, fed with what a coordinator sees.
//!
//! All engines serve one model, everything that runs on them came through here, and no token of an answer is seen between the first and the last.
//! Of engines that die [`health`] tells, and of requests that wait for room [`room`].
//! Engine `i` of the fleet has slot `i` and a name whose order is that of the numbers, so its place in the coordinator's fleet is `i` too.

mod health;
mod room;

use std::sync::Arc;

use baton_coordinator_core::admission;
use baton_coordinator_core::cost::{Plan as CorePlan, Slo};
use baton_coordinator_core::fleet as core;
use baton_coordinator_core::kv_index::{Holder, KvIndex, Limits, Overlaps, Run, Slot, Tier};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::load::{
    DecodeReservation, EngineLoad, PrefillReservation, PrefillShare, TransferReservation,
};
use baton_coordinator_core::placement::{self, Decider, POLICIES, Policy};
use baton_coordinator_core::planner::{Finished, Parts, Planner};
use baton_coordinator_core::sessions::Sessions;
use baton_coordinator_core::speed::{DecodeSample, PrefillSample, Speed, SpeedEstimate};
use baton_proto::{BlockHash, EngineId};

use self::health::Life;
use self::room::Room;
use crate::engine::events::{self, Change, KvEvents};
use crate::fleet::{Fleet, Role};
use crate::sim::{Answer, Health, LoadReport, Overlap, Placer, Plan, Progress, Request, Turn};
use crate::{MILLISECOND, Nanos, mix, nanos, seconds};

/// Memberships that the index takes; more than any fleet of [`Fleet::check`]'s bounds needs in blocks of 16 tokens.
const MEMBERSHIPS: u64 = 1 << 26;
/// Sessions that are remembered, and for how long after their last request.
const SESSIONS: usize = 1 << 20;
const SESSION_IDLE_MS: u64 = 3_600_000;

/// How the decision knows how fast engines are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speeds {
    /// It learns it from what it sees, as a coordinator does.
    Learned,
    /// It knows the fleet's constants from the start.
    Known,
}

/// No policy has this name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("no policy is called `{name}`; there are {}", POLICIES.map(|policy| policy.name()).join(", "))]
pub struct UnknownPolicy {
    /// What was asked for.
    pub name: String,
}

#[derive(Debug)]
struct Member {
    info: Arc<core::EngineInfo>,
    life: Life,
    load: Arc<EngineLoad>,
    known: Speed,
    estimate: SpeedEstimate,
    share: PrefillShare,
    prefill_share: f64,
    foreign_waiting: u32,
    foreign_running: u32,
    kv_beyond: f64,
}

/// A request that was placed.
#[derive(Debug)]
struct Live {
    plan: Plan,
    number: u64,
    prompt_tokens: u64,
    arrived: Nanos,
    placed: Nanos,
    /// Whether the first part failed.
    fell_back: bool,
    alone: bool,
    uncached_tokens: u64,
    hit_tokens: u64,
    /// Sequences that decoded on the prefill engine when it was placed, and their tokens of context.
    beside: (u64, u64),
    prefill: Option<PrefillReservation>,
    /// At the source of a pull, until the blocks are there.
    hold: Option<PrefillReservation>,
    /// Ends with the request.
    decode: DecodeReservation,
    transfer: Option<TransferReservation>,
    first_token: Option<FirstToken>,
}

/// The answering engine when the first token came.
#[derive(Clone, Copy, Debug)]
struct FirstToken {
    at: Nanos,
    prefilled_seconds: f64,
    sequences: u64,
    context_tokens: u64,
}

/// The decision.
pub struct Production {
    policy: &'static dyn Policy,
    decider: Decider,
    index: KvIndex,
    members: Vec<Member>,
    fleet: core::Fleet,
    links: Links,
    sessions: Sessions,
    speeds: Speeds,
    model: String,
    slo: Slo,
    max_tokens: Option<u64>,
    block_tokens: u32,
    overlaps: Overlaps,
    hashes: Vec<BlockHash>,
    live: Vec<Option<Live>>,
    /// How many of them there are.
    flying: u64,
    room: Room,
    /// Where the policy leaves it to one.
    planner: Option<Planner>,
    parts: Parts,
    /// Of each engine.
    hosts: Vec<u32>,
    described: Fleet,
    probes: usize,
    decisions: u64,
    /// When an engine's health changes by the passing of time alone.
    health_changes: Nanos,
}

/// The index's hash of a block. Its second half is made of the first, so distinct ids have distinct hashes.
fn hash(id: u64) -> BlockHash {
    let mut bytes = [0; BlockHash::LEN];
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..].copy_from_slice(&mix(id).to_le_bytes());
    BlockHash::from_bytes(bytes)
}

/// As the coordinator calls it.
fn index_tier(tier: events::Tier) -> Tier {
    match tier {
        events::Tier::Gpu => Tier::Gpu,
        events::Tier::Host => Tier::Host,
    }
}

impl Production {
    /// A coordinator of this fleet that has seen nothing yet. `block_tokens` is the engines' block size.
    ///
    /// # Errors
    /// There is no such policy.
    pub fn new(
        fleet: &Fleet,
        block_tokens: u32,
        policy: &str,
        speeds: Speeds,
    ) -> Result<Self, UnknownPolicy> {
        let policy = placement::policy(policy).ok_or_else(|| UnknownPolicy { name: policy.to_owned() })?;
        let index = KvIndex::new(Limits::of(MEMBERSHIPS), 1);
        let member = |(at, member): (usize, &crate::fleet::Member<'_>)| {
            let slot = Slot(at as u32);
            let life = Life::default();
            index.open(slot, life.epoch).expect("a fleet has fewer engines than the index takes");
            let constants = &member.speed;
            let block_bytes = constants.kv_bytes(u64::from(block_tokens)).round() as u64;
            let info = core::EngineInfo {
                slot,
                id: format!("e{at:04}").parse().expect("a DNS label"),
                epoch: life.epoch,
                host: format!("h{}", member.host),
                models: vec![fleet.model.clone()],
                role: match member.role {
                    Role::Both => core::Role::Both,
                    Role::Prefill => core::Role::Prefill,
                    Role::Decode => core::Role::Decode,
                },
                block_size: block_tokens,
                block_bytes,
                wire_block_bytes: block_bytes,
                num_blocks: member.kind.kv_tokens / u64::from(block_tokens),
                layout: "simulated".to_owned(),
                chunk_tokens: match member.kind.chunked_prefill {
                    true => member.kind.max_num_batched_tokens,
                    false => 0,
                },
                can_pull_cached: true,
            };
            Member {
                info: Arc::new(info),
                life,
                load: Arc::default(),
                known: Speed {
                    request_seconds: constants.a / 1e3,
                    token_seconds: constants.b / 1e3,
                    attention_seconds: constants.c / 1e3,
                    step_seconds: constants.d / 1e3,
                    sequence_seconds: constants.e / 1e3,
                    context_seconds: constants.f / 1e3,
                },
                estimate: SpeedEstimate::default(),
                share: PrefillShare::default(),
                prefill_share: 0.0,
                foreign_waiting: 0,
                foreign_running: 0,
                kv_beyond: 0.0,
            }
        };
        let members: Vec<Member> = fleet.members().iter().enumerate().map(member).collect();
        let slo = fleet.slo.map_or_else(Slo::default, |slo| Slo {
            ttft_seconds: Some(slo.ttft_ms / 1e3),
            itl_seconds: Some(slo.tpot_ms / 1e3),
        });
        let mut production = Self {
            policy,
            decider: Decider::new(),
            index,
            members,
            fleet: core::Fleet::default(),
            links: Links::default(),
            sessions: Sessions::new(SESSIONS, SESSION_IDLE_MS),
            speeds,
            model: fleet.model.clone(),
            slo,
            max_tokens: None,
            block_tokens,
            overlaps: Overlaps::default(),
            hashes: Vec::new(),
            live: Vec::new(),
            flying: 0,
            room: Room::new(&fleet.control),
            planner: policy.gives_parts().then(Planner::new),
            parts: Parts::default(),
            described: fleet.clone(),
            probes: 0,
            decisions: 0,
            health_changes: Nanos::MAX,
            hosts: fleet.members().iter().map(|member| member.host).collect(),
        };
        for member in &production.members {
            production.links.place(member.info.slot, &member.info.host);
        }
        production.probe(0);
        production.renew(0);
        Ok(production)
    }

    /// Every request says that it may generate so many tokens, as a live one may in its body. Without this none says anything.
    pub fn with_max_tokens(self, max_tokens: u64) -> Self {
        Self { max_tokens: Some(max_tokens), ..self }
    }

    /// Measures links of idle engines, one of each engine's in turn, as a coordinator has agents do every second.
    fn probe(&mut self, now: Nanos) {
        const BYTES: u64 = 1 << 20;
        const PATIENCE_SECONDS: f64 = 3.0;
        let engines = self.members.len();
        let idle = |at: usize| {
            let reserved = self.members[at].load.reserved();
            self.members[at].life.is_there() && reserved.sending_bytes == 0 && reserved.receiving_bytes == 0
        };
        let net = &self.described.links;
        let card = |at: usize| self.described.card_gbit(self.hosts[at], crate::seconds(now));
        let rtt = net.rtt_us / 1e6;
        for to in (0..engines).filter(|to| idle(*to)) {
            let from = (to + 1 + self.probes % (engines - 1).max(1)) % engines;
            if from != to && idle(from) {
                let gbit = match self.hosts[from] == self.hosts[to] {
                    true => net.local_gbit,
                    false => card(from).min(card(to)) * net.efficiency,
                };
                let link = (Slot(from as u32), Slot(to as u32));
                if gbit == 0.0 {
                    self.links.observe_given_up(crate::seconds(now), link, 0, PATIENCE_SECONDS);
                    continue;
                }
                let seconds = 2.0 * rtt + BYTES as f64 / (gbit * 1e9 / 8.0);
                self.links.observe(crate::seconds(now), link, BYTES, seconds, rtt);
            }
        }
        self.probes += 1;
    }

    /// The prompt of a request was computed.
    fn prefilled(&mut self, now: Nanos, key: u32, by: &Progress) {
        let Some(live) = self.live.get_mut(key as usize).and_then(Option::as_mut) else { return };
        let Some(reservation) = live.prefill.take() else { return };
        reservation.computed();
        live.decode.sent();
        // What was gone at the source was not pulled.
        live.hold = None;
        // A time with a transfer in it says little about the engine, and the first token of a handoff's decode engine nothing.
        let says = match live.plan {
            Plan::Colocated { .. } => true,
            Plan::Pull { .. } => false,
            Plan::Disaggregated { .. } => *by == Progress::Prefilled,
        };
        if live.alone && !live.fell_back && says {
            self.members[live.plan.prefill() as usize].estimate.observe_prefill(&PrefillSample {
                new: live.uncached_tokens,
                cached: live.hit_tokens,
                seconds: seconds(now - live.placed),
                sequences: live.beside.0 as f64,
                context_tokens: live.beside.1 as f64,
            });
        }
    }

    fn first_token(&mut self, now: Nanos, key: u32) {
        let Some(live) = self.live.get_mut(key as usize).and_then(Option::as_mut) else { return };
        // Also where it failed, or there was nothing to move.
        live.transfer = None;
        let load = &self.members[live.plan.decode() as usize].load;
        let reserved = load.reserved();
        live.first_token = Some(FirstToken {
            at: now,
            prefilled_seconds: load.prefilled_seconds(),
            sequences: reserved.sequences,
            context_tokens: reserved.context_tokens,
        });
    }

    /// A request, or an attempt of it, is over: what it had reserved is free when what is returned is dropped.
    fn over(&mut self, now: Nanos, key: u32) -> Option<Live> {
        let live = self.live.get_mut(key as usize).and_then(Option::take)?;
        self.flying -= 1;
        self.room.departed(now / MILLISECOND);
        Some(live)
    }

    fn finished(&mut self, now: Nanos, key: u32, tokens: u32) {
        let Some(live) = self.over(now, key) else { return };
        let Some(first) = live.first_token else { return };
        if let Some(planner) = &mut self.planner {
            let finished = Finished {
                tokens: u64::from(tokens),
                ttft_seconds: seconds(first.at - live.arrived),
                itl_seconds: seconds(now - first.at) / f64::from(tokens.saturating_sub(1)).max(1.0),
            };
            planner.finished(live.number, &finished);
        }
        let member = &mut self.members[live.plan.decode() as usize];
        let reserved = member.load.reserved();
        let mean = |then: u64, now: u64| (then + now) as f64 / 2.0;
        member.estimate.observe_decode(&DecodeSample {
            tokens: u64::from(tokens.saturating_sub(1)),
            seconds: seconds(now - first.at),
            stalled_seconds: member.load.prefilled_seconds() - first.prefilled_seconds,
            sequences: mean(first.sequences, reserved.sequences),
            context_tokens: mean(first.context_tokens, reserved.context_tokens),
        });
    }
}

impl Placer for Production {
    fn place(&mut self, now: Nanos, request: &Request<'_>) -> Answer {
        let control = &self.described.control;
        let (waits, again) = (self.room.has(request.key), !request.avoid.is_empty());
        if !waits && !again && self.flying + self.room.len() >= control.max_requests {
            return Answer::Refused;
        }
        // vLLM never reuses a prompt whole.
        let findable = ((request.prompt_tokens - 1) / self.block_tokens) as usize;
        self.hashes.clear();
        self.hashes.extend(request.blocks.iter().take(findable).map(|id| hash(*id)));
        self.index.overlaps(&self.hashes, &mut self.overlaps);
        if now >= self.health_changes {
            self.renew(now);
        }
        let now_ms = now / MILLISECOND;
        let avoid: Vec<EngineId> =
            request.avoid.iter().map(|at| self.members[*at as usize].info.id.clone()).collect();
        let waited = seconds(now - request.arrived);
        let slo_left = |slo: f64| (slo - waited).max(0.0);
        let slo = Slo { ttft_seconds: self.slo.ttft_seconds.map(slo_left), ..self.slo };
        let pinned = request.session.and_then(|session| self.sessions.get(now_ms, session));
        let asked = placement::Request {
            slo,
            max_tokens: self.max_tokens,
            splittable: if avoid.is_empty() { Ok(()) } else { Err("another engine failed") },
            avoid: &avoid,
            most_in_flight: Some(self.described.control.max_engine_requests),
            seed: self.decisions,
            pinned,
            prefix_key: placement::prefix_key(&self.hashes, self.block_tokens),
            fresh_key: placement::fresh_key(&self.hashes, &self.overlaps),
            ..placement::Request::new(&self.model, u64::from(request.prompt_tokens), &self.overlaps)
        };
        self.decisions += 1;
        let decision = self.decider.decide(self.policy, &self.fleet, &asked);
        let is_ready = match &decision {
            Some(decision) => {
                let plan = decision.plan();
                let holder = plan.transfer().map_or(plan.prefill(), |of| of.0);
                let in_flight = |at: u32| self.decider.loads().engines()[at as usize].in_flight();
                let beside = [holder, plan.prefill(), plan.decode()].map(in_flight).into_iter().max();
                !admission::had_better_wait(&self.slo, waited, &decision.chosen, beside.unwrap_or(0))
            }
            None => !room::is_full(&self.fleet, &asked),
        };
        let noted = match &decision {
            Some(decision) if !again && !self.room.is_noted(request.key) => {
                self.note(now_ms, request, decision, slo)
            }
            _ => None,
        };
        if !again && !(is_ready && (waits || self.room.is_empty())) {
            let priced = decision.as_ref().map(|decision| &decision.chosen);
            return self.wait(now, request, priced, noted);
        }
        if waits {
            self.room.admitted(now_ms, request.key);
        }
        let Some(decision) = decision else { return Answer::Refused };
        let plan = match decision.plan() {
            CorePlan::Colocated { engine } | CorePlan::Append { engine } => Plan::Colocated { engine },
            CorePlan::Pull { source, engine } => Plan::Pull { source, engine },
            CorePlan::Disaggregated { prefill, decode } => Plan::Disaggregated { prefill, decode },
        };
        let answers = Slot(plan.decode());
        if let Some(session) = request.session.filter(|_| pinned != Some(answers)) {
            self.sessions.pin(now_ms, session, answers);
        }
        let chosen = &decision.chosen;
        let overlap = chosen
            .answer_after_seconds()
            .filter(|_| self.members[plan.prefill() as usize].estimate.knows_prefill())
            .map(|after| Overlap { after: nanos(after), more_time: nanos(chosen.longer_pull_seconds()) });
        let prefill = &mut self.members[plan.prefill() as usize];
        prefill.estimate.observe_prompt(u64::from(request.prompt_tokens), chosen.hit_tokens);
        let load = |engine: u32| &self.members[engine as usize].load;
        let before = load(plan.prefill()).reserved();
        let transfer = plan.transfer().map(|(source, destination)| {
            EngineLoad::reserve_transfer(
                (Slot(source), load(source)),
                load(destination),
                chosen.transfer_bytes,
            )
        });
        let hold = match plan {
            Plan::Pull { source, .. } => {
                let speed = &self.fleet.engines()[source as usize].speed;
                Some(load(source).reserve_prefill(1, speed.prefill_seconds(1, chosen.hit_tokens)))
            }
            _ => None,
        };
        let mut decode = load(plan.decode()).reserve_decode(u64::from(request.prompt_tokens));
        if !matches!(plan, Plan::Disaggregated { .. }) {
            decode.sent();
        }
        let live = Live {
            plan,
            number: request.number,
            prompt_tokens: u64::from(request.prompt_tokens),
            arrived: request.arrived,
            placed: now,
            fell_back: false,
            alone: decision.alone,
            uncached_tokens: chosen.uncached_tokens,
            hit_tokens: chosen.hit_tokens,
            beside: (before.sequences, before.context_tokens),
            prefill: Some(
                load(plan.prefill()).reserve_prefill(chosen.uncached_tokens, chosen.prefill_seconds),
            ),
            hold,
            decode,
            transfer,
            first_token: None,
        };
        let key = request.key as usize;
        if self.live.len() <= key {
            self.live.resize_with(key + 1, || None);
        }
        self.live[key] = Some(live);
        self.flying += 1;
        overlap.map_or(Answer::Goes(plan), |overlap| Answer::Overlaps(plan, overlap))
    }

    fn turn(&mut self, now: Nanos) -> Option<Turn> {
        let turn = self.room.turn(now);
        if let Some((Turn::Refused(_), Some(noted))) = &turn {
            self.turned_away(*noted);
        }
        turn.map(|(turn, _)| turn)
    }

    fn next_turn(&self) -> Option<Nanos> {
        self.room.next_turn()
    }

    fn wants_kv_events(&self) -> bool {
        true
    }

    fn kv_events(&mut self, _now: Nanos, engine: u32, events: &KvEvents) {
        let holder = Holder::new(Slot(engine), self.members[engine as usize].life.epoch);
        for (change, ids) in events.iter() {
            self.hashes.clear();
            self.hashes.extend(ids.iter().map(|id| hash(*id)));
            let changed = match change {
                Change::Stored { tier, parent } => {
                    let run = Run::chain(parent.map(hash), &self.hashes);
                    self.index.store(holder, index_tier(tier), run).map(drop)
                }
                Change::Removed { tier } => self.index.remove(holder, index_tier(tier), &self.hashes),
            };
            changed.expect("the engine's epoch is open");
        }
    }

    fn load(&mut self, now: Nanos, engine: u32, report: &LoadReport) {
        let member = &mut self.members[engine as usize];
        let reserved = member.load.reserved();
        member.prefill_share = member.share.observe(now / MILLISECOND, member.load.prefilled_seconds());
        member.kv_beyond = member.info.kv_beyond(report.kv_usage, &member.load);
        // What the engine has beyond what came through here; as of the report's time both are the same.
        member.foreign_waiting = report.waiting.saturating_sub(reserved.prefills as u32);
        member.foreign_running =
            report.running.saturating_sub((reserved.sequences + reserved.prefills) as u32);
    }

    fn loads_reported(&mut self, now: Nanos) {
        self.probe(now);
        if let Some(planner) = &mut self.planner {
            self.parts = planner.plan(now / MILLISECOND, &self.fleet);
        }
        self.renew(now);
    }

    fn health(&mut self, now: Nanos, engine: u32, health: Health) {
        self.heard(now, engine, health);
    }

    fn progress(&mut self, now: Nanos, key: u32, progress: &Progress) {
        match *progress {
            Progress::Sent => {
                if let Some(live) = self.live.get_mut(key as usize).and_then(Option::as_mut) {
                    live.decode.sent();
                }
            }
            Progress::Prefilled => self.prefilled(now, key, progress),
            Progress::Transferred { source, destination, bytes, seconds, rtt_seconds } => {
                let link = (Slot(source), Slot(destination));
                self.links.observe(crate::seconds(now), link, bytes, seconds, rtt_seconds);
                if let Some(live) = self.live.get_mut(key as usize).and_then(Option::as_mut) {
                    (live.transfer, live.hold) = (None, None);
                }
            }
            Progress::GivenUp { source, destination, bytes, seconds } => {
                let link = (Slot(source), Slot(destination));
                self.links.observe_given_up(crate::seconds(now), link, bytes, seconds);
            }
            Progress::FirstToken => {
                self.prefilled(now, key, progress);
                self.first_token(now, key);
            }
            Progress::Finished { tokens, .. } => self.finished(now, key, tokens),
            Progress::FellBack => self.fell_back(key),
            // What was reserved for it ends.
            Progress::Failed => drop(self.over(now, key)),
        }
    }
}
