//! The engines as decisions see them.
//!
//! A [`Fleet`] is a snapshot that many decisions share: it is made anew when membership, health or an estimate changes, not
//! for each request. What changes with each request, the load, lies behind [`Engine::load`] and is read by the decision.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use baton_proto::{EngineId, Epoch};
use serde::{Deserialize, Serialize};

use crate::cost::EXPECTED_OUTPUT_TOKENS;
use crate::kv_index::Slot;
use crate::links::Links;
use crate::load::EngineLoad;
use crate::ring::Ring;
use crate::speed::Speed;

/// What an operator wants an engine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Both parts of a request, and either part of a handoff.
    Both,
    /// The first part of a handoff; whole requests only where no other engine is left.
    Prefill,
    /// The second part of a handoff, and whole requests where that is cheaper.
    Decode,
    /// The second part of a handoff; whole requests only where no handoff is possible, or none in time. No operator asks for this; a
    /// [`crate::planner`] does.
    DecodeOnly,
}

impl Role {
    /// Whether it takes the first part of a handoff.
    pub fn prefills(self) -> bool {
        matches!(self, Role::Both | Role::Prefill)
    }

    /// Whether it takes the second part of a handoff.
    pub fn decodes(self) -> bool {
        matches!(self, Role::Both | Role::Decode | Role::DecodeOnly)
    }
}

/// What is fixed while an engine's registration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Its stand-in in the index and the links.
    pub slot: Slot,
    /// Its name.
    pub id: EngineId,
    /// Its present life.
    pub epoch: Epoch,
    /// The host that it runs on, whose network card it shares with the other engines of the same name here; empty where not known.
    pub host: String,
    /// Names under which it serves its model; the first is the namespace of its block hashes.
    pub models: Vec<String>,
    /// What it is for.
    pub role: Role,
    /// Tokens in a block; at least 1.
    pub block_size: u32,
    /// Bytes of a block over all layers and ranks, those of heads that several ranks have as often; 0 where not known.
    pub block_bytes: u64,
    /// Bytes that a block takes on its way to this engine from another host, likewise: fewer where KV is packed for the wire.
    pub wire_block_bytes: u64,
    /// Blocks that its KV cache takes; 0 where not known.
    pub num_blocks: u64,
    /// Equal on engines that can use each other's blocks; empty where not known.
    pub layout: String,
    /// Most tokens of a prompt that a step of this engine computes and whose KV can leave while the rest is computed; 0 where KV leaves only when
    /// the whole prompt is computed.
    pub chunk_tokens: u32,
    /// Whether it can pull a prefix that another engine merely caches, and lets others pull so, where it can exchange blocks at all.
    pub can_pull_cached: bool,
}

impl EngineInfo {
    /// What its KV cache takes, in tokens, where it is known.
    pub fn kv_tokens(&self) -> Option<f64> {
        (self.num_blocks > 0).then(|| self.num_blocks as f64 * f64::from(self.block_size))
    }

    /// Tokens of KV in use beyond the context of sequences that were sent there, where the engine reports this share of its cache in use, 0 to 1. Answers that grow
    /// unseen and requests of others make it more than 0; beginnings that sequences share, and those that are not let in yet, less. What is not a
    /// share counts as 0.
    pub fn kv_beyond(&self, usage: f64, load: &EngineLoad) -> f64 {
        let share = if (0.0..=1.0).contains(&usage) { usage } else { 0.0 };
        self.kv_tokens().map_or(0.0, |tokens| share * tokens - load.sent_tokens() as f64)
    }
}

/// One engine.
#[derive(Clone, Debug)]
pub struct Engine {
    /// What is fixed.
    pub info: Arc<EngineInfo>,
    /// Whether its agent was heard from within the lease.
    pub healthy: bool,
    /// Whether it can hold and pull: its connector is attached and its agent's session is up.
    pub can_transfer: bool,
    /// How fast it is.
    pub speed: Speed,
    /// What was dispatched to it.
    pub load: Arc<EngineLoad>,
    /// Requests that wait on the engine and are not ours, by its own report.
    pub foreign_waiting: u32,
    /// Sequences that run on the engine and are not ours, by its own report.
    pub foreign_running: u32,
    /// The share of its time that it spends on prefills ([`crate::load::PrefillShare`]), 0 where not known.
    pub prefill_share: f64,
    /// What a planner gave it to do ([`crate::planner::Parts`]), if anything.
    pub part: Option<Role>,
    /// Tokens of KV in use there beyond the context of what was sent there, as of the last report ([`EngineInfo::kv_beyond`]).
    pub kv_beyond: f64,
    /// Tokens of the answers that it gave, on average; `None` where it gave none yet.
    pub answer_tokens: Option<f64>,
    /// The share of the tokens of its prompts that were cached, 0 to 1; `None` where it had none yet.
    pub reused: Option<f64>,
}

impl Engine {
    /// What it does: what a planner gave it, or else what its operator wants.
    pub fn role(&self) -> Role {
        self.part.unwrap_or(self.info.role)
    }

    /// Whether it serves a model under this name.
    pub fn serves(&self, model: &str) -> bool {
        self.info.models.iter().any(|name| name == model)
    }
}

/// What the pricing of every option reads of an engine, side by side in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hot {
    pub(crate) speed: Speed,
    pub(crate) block_bytes: u64,
    pub(crate) wire_block_bytes: u64,
    /// What its KV cache takes; infinite where it is not known.
    pub(crate) kv_tokens: f64,
    pub(crate) kv_beyond: f64,
    pub(crate) prefill_share: f64,
    /// Tokens of an answer, on average over the engines of its model.
    pub(crate) answer_tokens: f64,
    /// The share of prompts' tokens that are cached, likewise.
    pub(crate) reused: f64,
    pub(crate) slot: Slot,
    /// Equal on engines of one host; not known counts as a host of its own.
    pub(crate) host: u32,
    pub(crate) block_size: u32,
    pub(crate) foreign_waiting: u32,
    pub(crate) foreign_running: u32,
    /// Equal for equal layouts; `None` where it cannot exchange blocks now.
    pub(crate) exchange: Option<u32>,
    pub(crate) chunk_tokens: u32,
    pub(crate) role: Role,
    pub(crate) healthy: bool,
    pub(crate) can_pull_cached: bool,
}

/// No engine has this slot.
const NOBODY: u32 = u32::MAX;

/// All engines, in order of their names.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    engines: Vec<Engine>,
    hot: Vec<Hot>,
    /// In the same order, side by side.
    loads: Vec<(Slot, Arc<EngineLoad>)>,
    /// What [`Hot::exchange`] is on any engine, in order.
    exchanges: Vec<u32>,
    /// The least [`EngineInfo::chunk_tokens`] that is not 0, if any.
    chunk_tokens: Option<u32>,
    /// Engines by model name, in order of both.
    by_model: Vec<(String, Vec<u32>)>,
    /// Places of engines by slot.
    by_slot: Vec<u32>,
    links: Links,
    ring: Arc<OnceLock<Ring>>,
}

impl Fleet {
    /// A fleet of these engines. The links are told their hosts.
    pub fn new(mut engines: Vec<Engine>, mut links: Links) -> Self {
        for engine in &engines {
            links.place(engine.info.slot, &engine.info.host);
        }
        engines.sort_by(|a, b| a.info.id.cmp(&b.info.id));
        let mut layouts: Vec<&str> = engines.iter().map(|engine| engine.info.layout.as_str()).collect();
        layouts.sort_unstable();
        layouts.dedup();
        let answers = by_model(&engines, |engine| engine.answer_tokens.map(|tokens| tokens.max(1.0)));
        let reused = by_model(&engines, |engine| engine.reused.map(|share| share.clamp(0.0, 1.0)));
        let hosts = hosts(&engines);
        let habits = [&answers, &reused];
        let hot: Vec<Hot> =
            engines.iter().zip(hosts).map(|(engine, host)| hot(engine, host, &layouts, habits)).collect();
        let mut exchanges: Vec<u32> = hot.iter().filter_map(|hot| hot.exchange).collect();
        exchanges.sort_unstable();
        exchanges.dedup();
        let chunk_tokens = hot.iter().map(|hot| hot.chunk_tokens).filter(|tokens| *tokens > 0).min();
        let loads = engines.iter().map(|engine| (engine.info.slot, Arc::clone(&engine.load))).collect();

        let mut served: Vec<(&str, u32)> = Vec::new();
        let mut by_slot = Vec::new();
        for (at, engine) in engines.iter().enumerate() {
            served.extend(engine.info.models.iter().map(|name| (name.as_str(), at as u32)));
            let slot = engine.info.slot.0 as usize;
            if by_slot.len() <= slot {
                by_slot.resize(slot + 1, NOBODY);
            }
            by_slot[slot] = at as u32;
        }
        served.sort_unstable();
        served.dedup();
        let by_model = served
            .chunk_by(|a, b| a.0 == b.0)
            .map(|group| (group[0].0.to_owned(), group.iter().map(|entry| entry.1).collect()))
            .collect();
        Self { hot, loads, exchanges, chunk_tokens, by_model, by_slot, links, ring: Arc::default(), engines }
    }

    /// The same fleet at a later time. What depends on the engines' names alone is taken over where those are the
    /// same.
    pub fn renewed(&self, engines: Vec<Engine>, links: Links) -> Self {
        let mut fleet = Self::new(engines, links);
        let same = |(old, new): (&Engine, &Engine)| old.info.id == new.info.id;
        if self.engines.len() == fleet.engines.len() && self.engines.iter().zip(&fleet.engines).all(same) {
            fleet.ring = self.ring.clone();
        }
        fleet
    }

    /// The engines, in order of their names.
    pub fn engines(&self) -> &[Engine] {
        &self.engines
    }

    /// The links between them.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Where cold prefixes have their home. Built at its first use, in some ten milliseconds: call this once when
    /// engines came or left, off the way of requests.
    pub fn ring(&self) -> &Ring {
        self.ring.get_or_init(|| Ring::new(self.engines.iter().map(|engine| engine.info.id.as_str())))
    }

    /// The place of the engine that has a slot.
    #[inline]
    pub fn place_of(&self, slot: Slot) -> Option<u32> {
        self.by_slot.get(slot.0 as usize).copied().filter(|at| *at != NOBODY)
    }

    /// The place of the engine of this name.
    pub fn find(&self, id: &EngineId) -> Option<u32> {
        self.engines.binary_search_by(|engine| engine.info.id.cmp(id)).ok().map(|at| at as u32)
    }

    /// Places of the engines that serve a model under this name, in order.
    pub fn serving(&self, model: &str) -> &[u32] {
        match self.by_model.binary_search_by(|entry| entry.0.as_str().cmp(model)) {
            Ok(at) => &self.by_model[at].1,
            Err(_) => &[],
        }
    }

    pub(crate) fn hot(&self) -> &[Hot] {
        &self.hot
    }

    /// What is dispatched to each engine.
    pub(crate) fn loads(&self) -> impl ExactSizeIterator<Item = (Slot, &EngineLoad)> {
        self.loads.iter().map(|(slot, load)| (*slot, &**load))
    }

    /// Kinds of KV that any of the engines can exchange now.
    pub(crate) fn exchanges(&self) -> &[u32] {
        &self.exchanges
    }

    /// The least [`EngineInfo::chunk_tokens`] that is not 0, if any.
    pub(crate) fn chunk_tokens(&self) -> Option<u32> {
        self.chunk_tokens
    }
}

/// By model, in order: a figure.
type Figures<'a> = Vec<(&'a str, f64)>;

/// A figure of each model, on average over the engines of which it is known.
fn by_model(engines: &[Engine], of: impl Fn(&Engine) -> Option<f64>) -> Figures<'_> {
    let known = engines.iter().filter_map(|engine| {
        let figure = of(engine).filter(|figure| figure.is_finite())?;
        Some((engine.info.models.first()?.as_str(), figure))
    });
    let mut known: Figures<'_> = known.collect();
    // Engines are in order of their names, so sums are made in one order whatever theirs was.
    known.sort_by(|a, b| a.0.cmp(b.0));
    let mean = |of: &[(&str, f64)]| of.iter().map(|entry| entry.1).sum::<f64>() / of.len() as f64;
    known.chunk_by(|a, b| a.0 == b.0).map(|of| (of[0].0, mean(of))).collect()
}

/// A number for each engine's host, counted from 0 in order of the engines that come first on them.
fn hosts(engines: &[Engine]) -> Vec<u32> {
    let mut names: BTreeMap<&str, u32> = BTreeMap::new();
    let mut hosts = 0;
    let mut next = || {
        hosts += 1;
        hosts - 1
    };
    let mut numbers = Vec::with_capacity(engines.len());
    for engine in engines {
        numbers.push(match engine.info.host.as_str() {
            "" => next(),
            host => *names.entry(host).or_insert_with(&mut next),
        });
    }
    numbers
}

fn hot(engine: &Engine, host: u32, layouts: &[&str], [answers, reused]: [&Figures<'_>; 2]) -> Hot {
    let info = &engine.info;
    let model = info.models.first().map_or("", String::as_str);
    let of_model = |figures: &Figures<'_>| {
        figures.binary_search_by(|entry| entry.0.cmp(model)).map(|at| figures[at].1).ok()
    };
    let layout = layouts.binary_search(&info.layout.as_str()).ok().map(|at| at as u32);
    Hot {
        speed: engine.speed,
        block_bytes: info.block_bytes,
        wire_block_bytes: info.wire_block_bytes,
        kv_tokens: info.kv_tokens().unwrap_or(f64::INFINITY),
        kv_beyond: engine.kv_beyond,
        prefill_share: engine.prefill_share.clamp(0.0, crate::load::PrefillShare::MOST),
        answer_tokens: of_model(answers).unwrap_or(EXPECTED_OUTPUT_TOKENS),
        reused: of_model(reused).unwrap_or(0.0),
        slot: info.slot,
        host,
        block_size: info.block_size.max(1),
        foreign_waiting: engine.foreign_waiting,
        foreign_running: engine.foreign_running,
        exchange: layout.filter(|_| engine.can_transfer && !info.layout.is_empty()),
        chunk_tokens: info.chunk_tokens,
        role: engine.role(),
        healthy: engine.healthy,
        can_pull_cached: info.can_pull_cached,
    }
}
