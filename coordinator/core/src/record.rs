//! Decisions kept, written down and replayed.
//!
//! [`Recent`] keeps the last decisions with all that they depended on: a shared pointer to the fleet, and copies of the loads and overlaps
//! in memory that is used again. Nothing is formatted until somebody asks. A [`Record`] is the same as one value, a line of JSON; [`replay`] decides
//! once more and compares to the bit.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_proto::{EngineId, Epoch};
use serde::{Deserialize, Serialize};

use crate::cost::{Plan, Slo, Term, Terms};
use crate::fleet::{Engine, EngineInfo, Fleet, Role};
use crate::kv_index::{Overlap, Overlaps, Slot};
use crate::links::{Links, Widths};
use crate::load::{LinkLoad, Loads, Reserved};
use crate::placement::{self, Decider, Decision, Policy, Request};
use crate::speed::Speed;

/// The form of records.
pub const VERSION: u32 = 8;
/// Slots of recorded engines are below this, so that a broken record does not make a huge table.
const MOST_SLOTS: u32 = 1 << 20;

/// A decision and all that it depended on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// What went in.
    pub inputs: Inputs,
    /// What came out; absent where no engine could serve the request.
    pub outcome: Option<Outcome>,
}

/// What a decision depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// The policy's name.
    pub policy: String,
    /// The request.
    pub request: RecordedRequest,
    /// The engines, in order of their names.
    pub engines: Vec<RecordedEngine>,
    /// Links that were measured.
    pub links: Vec<RecordedLink>,
    /// Hosts of engines, as the links know them.
    pub hosts: Vec<RecordedHost>,
    /// Bytes on the way.
    pub transfers: Vec<LinkLoad>,
}

/// As [`Request`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are those of Request")]
pub struct RecordedRequest {
    pub model: String,
    pub prompt_tokens: u64,
    pub max_tokens: Option<u64>,
    pub overlaps: Vec<RecordedOverlap>,
    pub not_splittable: Option<String>,
    pub avoid: Vec<EngineId>,
    pub slo: Slo,
    pub most_in_flight: Option<u32>,
    pub seed: u64,
    pub pinned: Option<u32>,
    pub prefix_key: Option<u64>,
    pub fresh_key: Option<u64>,
}

/// As [`Overlap`], with what is expected counted as held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are those of Overlap")]
pub struct RecordedOverlap {
    pub slot: u32,
    pub blocks: u32,
    pub gpu_blocks: u32,
}

/// As [`Engine`] and [`EngineInfo`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are those of Engine and EngineInfo")]
pub struct RecordedEngine {
    pub id: EngineId,
    pub slot: u32,
    pub epoch: Epoch,
    pub host: String,
    pub models: Vec<String>,
    pub role: Role,
    pub block_size: u32,
    pub block_bytes: u64,
    pub wire_block_bytes: u64,
    pub num_blocks: u64,
    pub layout: String,
    pub chunk_tokens: u32,
    pub can_pull_cached: bool,
    pub healthy: bool,
    pub can_transfer: bool,
    pub speed: Speed,
    pub foreign_waiting: u32,
    pub foreign_running: u32,
    pub kv_beyond: f64,
    pub prefill_share: f64,
    pub answer_tokens: Option<f64>,
    pub reused: Option<f64>,
    pub reserved: Reserved,
}

/// An engine's host as the links know it, and what transfers share there, bytes per second, as far as it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedHost {
    /// The engine's.
    pub slot: u32,
    /// Empty where not known.
    pub name: String,
    /// Out of its card.
    pub out: Option<f64>,
    /// Into its card.
    pub into: Option<f64>,
    /// Between its engines.
    pub within: Option<f64>,
}

/// A link's estimates, as far as it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "slots, and the fields of Link")]
pub struct RecordedLink {
    pub source: u32,
    pub destination: u32,
    pub bytes_per_second: Option<f64>,
    pub rtt_seconds: Option<f64>,
}

/// As [`Decision`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are those of Decision and Priced")]
pub struct Outcome {
    pub plan: Plan,
    /// Seconds in order of [`Term::ALL`].
    pub terms: Terms,
    pub seconds: f64,
    pub ttft_seconds: f64,
    pub itl_seconds: f64,
    pub late_seconds: f64,
    pub prefill_seconds: f64,
    pub hit_tokens: u64,
    pub uncached_tokens: u64,
    pub transfer_bytes: u64,
    pub transfer_seconds: f64,
    pub early_seconds: Option<f64>,
    pub fell_back: bool,
    pub alone: bool,
    pub cut: bool,
    pub priced: u32,
}

impl From<&Decision> for Outcome {
    fn from(decision: &Decision) -> Self {
        let chosen = &decision.chosen;
        Self {
            plan: chosen.plan,
            terms: chosen.terms,
            seconds: chosen.seconds,
            ttft_seconds: chosen.ttft_seconds,
            itl_seconds: chosen.itl_seconds,
            late_seconds: chosen.late_seconds,
            prefill_seconds: chosen.prefill_seconds,
            hit_tokens: chosen.hit_tokens,
            uncached_tokens: chosen.uncached_tokens,
            transfer_bytes: chosen.transfer_bytes,
            transfer_seconds: chosen.transfer_seconds,
            early_seconds: chosen.early_seconds,
            fell_back: decision.fell_back,
            alone: decision.alone,
            cut: decision.cut,
            priced: decision.priced,
        }
    }
}

/// A record that cannot be decided on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct RecordError {
    /// Its path in the record.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Where a replay came out differently.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: recorded {recorded}, replayed {replayed}")]
pub struct Difference {
    /// Its path in the outcome.
    pub field: String,
    /// As recorded; numbers with all their digits.
    pub recorded: String,
    /// As it came out now.
    pub replayed: String,
}

/// Why a replay failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReplayError {
    /// The record is broken.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It came out differently.
    #[error(transparent)]
    Difference(#[from] Difference),
}

impl Record {
    /// Reads a record from JSON. The error names the field.
    pub fn parse(text: &str) -> Result<Self, RecordError> {
        let deserializer = &mut serde_json::Deserializer::from_str(text);
        let record: Self = serde_path_to_error::deserialize(&mut *deserializer).map_err(|error| {
            RecordError { field: error.path().to_string(), problem: error.inner().to_string() }
        })?;
        deserializer.end().map_err(|error| RecordError { field: ".".into(), problem: error.to_string() })?;
        record.check()?;
        Ok(record)
    }

    /// The record as one line of JSON, without its end.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a record has string keys and finite numbers only")
    }

    fn check(&self) -> Result<(), RecordError> {
        let wrong = |field: String, problem: &str| Err(RecordError { field, problem: problem.to_owned() });
        if self.version != VERSION {
            return wrong("version".into(), &format!("{}: only {VERSION} is known", self.version));
        }
        if placement::policy(&self.inputs.policy).is_none() {
            return wrong("inputs.policy".into(), &format!("{:?} is no policy", self.inputs.policy));
        }
        for (at, engine) in self.inputs.engines.iter().enumerate() {
            let field = |name: &str| format!("inputs.engines[{at}].{name}");
            if engine.slot >= MOST_SLOTS {
                return wrong(field("slot"), "too large");
            }
            if engine.block_size == 0 {
                return wrong(field("block_size"), "must be at least 1");
            }
            let speed = &engine.speed;
            let coefficients = [
                ("request_seconds", speed.request_seconds),
                ("token_seconds", speed.token_seconds),
                ("attention_seconds", speed.attention_seconds),
                ("step_seconds", speed.step_seconds),
                ("sequence_seconds", speed.sequence_seconds),
                ("context_seconds", speed.context_seconds),
            ];
            if let Some((name, _)) = coefficients.iter().find(|(_, value)| !(0.0..1e9).contains(value)) {
                return wrong(field(&format!("speed.{name}")), "must be 0 or more, and below 1e9");
            }
            if !(0.0..1e12).contains(&engine.reserved.prefill_seconds) {
                return wrong(field("reserved.prefill_seconds"), "must be 0 or more, and below 1e12");
            }
            if at > 0 && self.inputs.engines[at - 1].id >= engine.id {
                return wrong(field("id"), "engines stand in order of their names, each once");
            }
        }
        for (at, link) in self.inputs.links.iter().enumerate() {
            if link.source.max(link.destination) >= MOST_SLOTS {
                return wrong(format!("inputs.links[{at}]"), "slot too large");
            }
        }
        if let Some(at) = self.inputs.hosts.iter().position(|host| host.slot >= MOST_SLOTS) {
            return wrong(format!("inputs.hosts[{at}].slot"), "too large");
        }
        Ok(())
    }
}

/// Decides on a record's inputs once more. An error tells what is broken, or the first field of the outcome that is
/// different in any bit.
pub fn replay(record: &Record) -> Result<(), ReplayError> {
    record.check()?;
    let inputs = &record.inputs;
    let policy = placement::policy(&inputs.policy)
        .ok_or_else(|| RecordError { field: "inputs.policy".into(), problem: "no such policy".into() })?;
    let (fleet, loads) = inputs.fleet();
    let of = &inputs.request;
    let overlaps: Overlaps = of
        .overlaps
        .iter()
        .map(|o| (Slot(o.slot), Overlap { blocks: o.blocks, gpu_blocks: o.gpu_blocks }))
        .collect();
    let request = Request {
        model: &of.model,
        prompt_tokens: of.prompt_tokens,
        max_tokens: of.max_tokens,
        overlaps: &overlaps,
        splittable: of.not_splittable.as_deref().map_or(Ok(()), Err),
        avoid: &of.avoid,
        slo: of.slo,
        most_in_flight: of.most_in_flight,
        seed: of.seed,
        pinned: of.pinned.map(Slot),
        prefix_key: of.prefix_key,
        fresh_key: of.fresh_key,
    };
    let decision = Decider::new().decide_with(policy, &fleet, &loads, &request);
    compare(record.outcome.as_ref(), decision.as_ref().map(Outcome::from).as_ref())?;
    Ok(())
}

impl Inputs {
    fn fleet(&self) -> (Fleet, Loads) {
        let engine = |of: &RecordedEngine| Engine {
            info: Arc::new(EngineInfo {
                slot: Slot(of.slot),
                id: of.id.clone(),
                epoch: of.epoch,
                host: of.host.clone(),
                models: of.models.clone(),
                role: of.role,
                block_size: of.block_size,
                block_bytes: of.block_bytes,
                wire_block_bytes: of.wire_block_bytes,
                num_blocks: of.num_blocks,
                layout: of.layout.clone(),
                chunk_tokens: of.chunk_tokens,
                can_pull_cached: of.can_pull_cached,
            }),
            healthy: of.healthy,
            can_transfer: of.can_transfer,
            speed: of.speed,
            load: Arc::default(),
            foreign_waiting: of.foreign_waiting,
            foreign_running: of.foreign_running,
            kv_beyond: of.kv_beyond,
            prefill_share: of.prefill_share,
            part: None,
            answer_tokens: of.answer_tokens,
            reused: of.reused,
        };
        let known = self
            .links
            .iter()
            .map(|link| (Slot(link.source), Slot(link.destination), link.bytes_per_second, link.rtt_seconds));
        let hosts = self.hosts.iter().map(|of| {
            (Slot(of.slot), of.name.as_str(), Widths { out: of.out, into: of.into, within: of.within })
        });
        let fleet = Fleet::new(self.engines.iter().map(engine).collect(), Links::restore(known, hosts));
        let reserved = self.engines.iter().map(|of| of.reserved).collect();
        (fleet, Loads::new(reserved, self.transfers.clone()))
    }
}

fn compare(recorded: Option<&Outcome>, replayed: Option<&Outcome>) -> Result<(), Difference> {
    let difference = |field: &str, recorded: String, replayed: String| {
        Err(Difference { field: format!("outcome{field}"), recorded, replayed })
    };
    let (a, b) = match (recorded, replayed) {
        (Some(a), Some(b)) => (a, b),
        (None, None) => return Ok(()),
        (a, b) => {
            let told = |outcome: Option<&Outcome>| outcome.map_or("none".into(), |o| format!("{:?}", o.plan));
            return difference("", told(a), told(b));
        }
    };
    if a.plan != b.plan {
        return difference(".plan", format!("{:?}", a.plan), format!("{:?}", b.plan));
    }
    let terms = Term::ALL.map(|term| (term.name(), a.terms.get(term), b.terms.get(term)));
    let sums = [
        ("seconds", a.seconds, b.seconds),
        ("ttft_seconds", a.ttft_seconds, b.ttft_seconds),
        ("itl_seconds", a.itl_seconds, b.itl_seconds),
        ("late_seconds", a.late_seconds, b.late_seconds),
        ("prefill_seconds", a.prefill_seconds, b.prefill_seconds),
        ("transfer_seconds", a.transfer_seconds, b.transfer_seconds),
    ];
    for (name, a, b) in terms.into_iter().chain(sums) {
        if a.to_bits() != b.to_bits() {
            return difference(&format!(".{name}"), format!("{a:e}"), format!("{b:e}"));
        }
    }
    if a.early_seconds.map(f64::to_bits) != b.early_seconds.map(f64::to_bits) {
        return difference(
            ".early_seconds",
            format!("{:?}", a.early_seconds),
            format!("{:?}", b.early_seconds),
        );
    }
    let counts = [
        ("hit_tokens", a.hit_tokens, b.hit_tokens),
        ("uncached_tokens", a.uncached_tokens, b.uncached_tokens),
        ("transfer_bytes", a.transfer_bytes, b.transfer_bytes),
        ("fell_back", a.fell_back.into(), b.fell_back.into()),
        ("alone", a.alone.into(), b.alone.into()),
        ("cut", a.cut.into(), b.cut.into()),
        ("priced", a.priced.into(), b.priced.into()),
    ];
    for (name, a, b) in counts {
        if a != b {
            return difference(&format!(".{name}"), a.to_string(), b.to_string());
        }
    }
    Ok(())
}

/// One kept decision.
#[derive(Debug, Default)]
struct Kept {
    policy: &'static str,
    fleet: Arc<Fleet>,
    loads: Loads,
    request: RecordedRequest,
    decision: Option<Decision>,
}

/// The last decisions.
///
/// # Memory
/// For each decision 56 bytes for each engine and 12 for each engine that held a part of the prompt: 70 KB at 1,024 engines. What it
/// points to besides is the fleet as it was, shared by all decisions on it: up to 0.5 MB at 1,024 engines plus 64 bytes for each link that changed.
/// At the cap the oldest decision's memory takes the new one, so nothing is allocated then.
#[derive(Debug)]
pub struct Recent {
    most: usize,
    kept: VecDeque<Kept>,
}

impl Recent {
    /// Keeps at most `most`; 0 keeps none.
    pub fn new(most: usize) -> Self {
        Self { most, kept: VecDeque::with_capacity(most) }
    }

    /// Keeps a decision: this decider's last, for this fleet and request.
    pub fn keep(
        &mut self,
        policy: &dyn Policy,
        fleet: &Arc<Fleet>,
        request: &Request<'_>,
        decider: &Decider,
        decision: Option<&Decision>,
    ) {
        if self.most == 0 {
            return;
        }
        let mut kept = match self.kept.len() >= self.most {
            true => self.kept.pop_front().unwrap_or_default(),
            false => Kept::default(),
        };
        kept.policy = policy.name();
        kept.fleet = Arc::clone(fleet);
        kept.loads.copy_from(decider.loads());
        // Room for what later requests may need, so that nothing grows then.
        kept.request.overlaps.clear();
        kept.request.overlaps.reserve(fleet.engines().len());
        kept.request.take(request);
        kept.decision = decision.copied();
        self.kept.push_back(kept);
    }

    /// The decisions, oldest first.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record> + '_ {
        self.kept.iter().map(Kept::record)
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

impl RecordedRequest {
    /// Becomes a copy of a request without giving up what it allocated.
    fn take(&mut self, of: &Request<'_>) {
        fn text(to: &mut Option<String>, from: Option<&str>) {
            match (to.as_mut(), from) {
                (Some(to), Some(from)) => {
                    to.clear();
                    to.push_str(from);
                }
                _ => *to = from.map(str::to_owned),
            }
        }
        self.model.clear();
        self.model.push_str(of.model);
        self.prompt_tokens = of.prompt_tokens;
        self.max_tokens = of.max_tokens;
        self.overlaps.clear();
        let expected = of.overlaps.iter_expected().next().is_some();
        self.overlaps.extend(of.overlaps.iter().map(|(slot, overlap)| RecordedOverlap {
            slot: slot.0,
            blocks: match expected {
                true => overlap.blocks.max(of.overlaps.expected(slot)),
                false => overlap.blocks,
            },
            gpu_blocks: overlap.gpu_blocks,
        }));
        let only_expected = of.overlaps.iter_expected().filter(|(slot, _)| of.overlaps.of(*slot).blocks == 0);
        self.overlaps.extend(only_expected.map(|(slot, blocks)| RecordedOverlap {
            slot: slot.0,
            blocks,
            gpu_blocks: 0,
        }));
        text(&mut self.not_splittable, of.splittable.err());
        self.avoid.clear();
        self.avoid.extend_from_slice(of.avoid);
        self.slo = of.slo;
        self.most_in_flight = of.most_in_flight;
        self.seed = of.seed;
        self.pinned = of.pinned.map(|slot| slot.0);
        self.prefix_key = of.prefix_key;
        self.fresh_key = of.fresh_key;
    }
}

impl Kept {
    fn record(&self) -> Record {
        let reserved = self.loads.engines().iter().copied().chain(std::iter::repeat(Reserved::default()));
        let engine = |(engine, reserved): (&Engine, Reserved)| {
            let info = &engine.info;
            RecordedEngine {
                id: info.id.clone(),
                slot: info.slot.0,
                epoch: info.epoch,
                host: info.host.clone(),
                models: info.models.clone(),
                role: engine.role(),
                block_size: info.block_size,
                block_bytes: info.block_bytes,
                wire_block_bytes: info.wire_block_bytes,
                num_blocks: info.num_blocks,
                layout: info.layout.clone(),
                chunk_tokens: info.chunk_tokens,
                can_pull_cached: info.can_pull_cached,
                healthy: engine.healthy,
                can_transfer: engine.can_transfer,
                speed: engine.speed,
                foreign_waiting: engine.foreign_waiting,
                foreign_running: engine.foreign_running,
                kv_beyond: engine.kv_beyond,
                prefill_share: engine.prefill_share,
                answer_tokens: engine.answer_tokens,
                reused: engine.reused,
                reserved,
            }
        };
        let link = |(source, destination, bytes_per_second, rtt_seconds): (Slot, Slot, _, _)| RecordedLink {
            source: source.0,
            destination: destination.0,
            bytes_per_second,
            rtt_seconds,
        };
        let host = |(slot, name, Widths { out, into, within }): (Slot, &str, Widths)| RecordedHost {
            slot: slot.0,
            name: name.to_owned(),
            out,
            into,
            within,
        };
        Record {
            version: VERSION,
            inputs: Inputs {
                policy: self.policy.to_owned(),
                request: self.request.clone(),
                engines: self.fleet.engines().iter().zip(reserved).map(engine).collect(),
                links: self.fleet.links().known().map(link).collect(),
                hosts: self.fleet.links().hosts().map(host).collect(),
                transfers: self.loads.links().to_vec(),
            },
            outcome: self.decision.as_ref().map(Outcome::from),
        }
    }
}

#[cfg(test)]
mod tests;
