//! The file that describes a fleet: engines, links, what the control plane takes.
//!
//! ```toml
//! name = "8B on H100, 8 engines"
//! model = "8B"                    # a model of the table of constants
//!
//! [[engines]]                     # one table for each kind of engine
//! gpu = "H100"                    # a GPU of the table, with the model; or `constants` below
//! count = 8
//! per_host = 4                    # engines that share a host's network card
//! role = "both"                   # both, prefill or decode
//! kv_tokens = 400_000             # tokens of KV that the engine has room for
//! max_num_seqs = 256              # as vLLM's options of these names
//! max_num_batched_tokens = 8192
//! chunked_prefill = true
//! host_kv_tokens = 0              # tokens of KV that the host's memory keeps for it besides; 0: none
//! host_gbit = 252                 # what a copy from there reaches, for all GPUs of the engine together
//! # constants = { a = 3.26, b = 0.01899, c = 8.17e-7, d = 6.42, e = 0.0103, f = 4.19e-5, kv_kib = 128 }   # ms, KiB a token
//!
//! [links]
//! gbit = 100                      # a host's card
//! choices = [10, 25, 100, 400]    # widths that a sweep goes through
//! efficiency = 0.85               # the share that the transport turns into payload
//! transfer_gbit = 25              # most that one transfer reaches; optional
//! spine_gbit = 400                # all traffic between hosts; optional
//! local_gbit = 200                # between engines of one host
//! rtt_us = 100
//!
//! [[background]]                  # traffic of others, between hosts by number; optional
//! from = 0
//! to = 1
//! gbit = 5
//!
//! [[outages]]                     # an engine that dies, and comes back with an empty cache; optional
//! engine = 3                      # by number, from 0 in the order above
//! from_seconds = 60
//! until_seconds = 90              # left out: it does not come back
//!
//! [[cards]]                       # a host's card that has another width for a time; optional
//! host = 1
//! from_seconds = 120
//! until_seconds = 150             # left out: to the end
//! gbit = 1                        # 0: no block goes through it; requests take another network
//!
//! [control]                       # optional, and so is each field
//! dispatch_us = 500               # from a request's arrival to its engine, and from an engine's failure to whoever waits for it
//! event_delay_ms = 20             # from a block's change to the index
//! load_interval_ms = 1000         # between two load reports of an engine
//! hold_seconds = 60               # blocks that nobody fetches are freed
//! pull_deadline_ms = 10000        # an engine that fetches blocks for so long computes what has not come
//! max_requests = 4096             # these four as in the coordinator's limits: requests that wait or are under way,
//! max_engine_requests = 512       # those on one engine,
//! max_waiting = 1024              # those that wait for room at an engine,
//! longest_wait_ms = 30000         # and for how long
//!
//! [slo]                           # optional: both, for goodput
//! ttft_ms = 2000
//! tpot_ms = 50
//! ```
//!
//! Whatever a file leaves out and must not is said with the field's name, as is what no field knows.

mod check;
mod split;

use serde::{Deserialize, Serialize};

pub use self::check::FleetError;
pub use self::split::{Split, SplitError};
use crate::engine::speed::Speed;
use crate::link;

/// What an engine is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Whole requests, and either part of one.
    #[default]
    Both,
    /// The first part of a handoff.
    Prefill,
    /// The second part of a handoff.
    Decode,
}

/// A fleet, as its file says. [`Fleet::parse`] makes one that is consistent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Its name in reports.
    pub name: String,
    /// Which model its engines serve.
    pub model: String,
    /// Kinds of engines.
    pub engines: Vec<Kind>,
    /// What connects them.
    pub links: Links,
    /// Traffic of others.
    #[serde(default)]
    pub background: Vec<Background>,
    /// Engines that die.
    #[serde(default)]
    pub outages: Vec<Outage>,
    /// Cards that have another width for a time.
    #[serde(default)]
    pub cards: Vec<Card>,
    /// What the control plane takes.
    #[serde(default)]
    pub control: Control,
    /// What is promised to requests.
    #[serde(default)]
    pub slo: Option<Slo>,
}

/// Engines that are alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// A GPU of the table of constants, where `constants` does not say more.
    pub gpu: String,
    /// How many engines, 1 to 1,000.
    pub count: u32,
    /// How many of them share a host.
    #[serde(default = "one")]
    pub per_host: u32,
    /// What they are for.
    #[serde(default)]
    pub role: Role,
    /// Tokens of KV that fit.
    pub kv_tokens: u64,
    /// Most sequences that run at once.
    #[serde(default = "max_num_seqs")]
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    #[serde(default = "max_num_batched_tokens")]
    pub max_num_batched_tokens: u32,
    /// Whether prompts are computed in chunks.
    #[serde(default = "yes")]
    pub chunked_prefill: bool,
    /// Tokens of KV that each has in its host's memory besides; 0 for no such tier.
    #[serde(default)]
    pub host_kv_tokens: u64,
    /// What copies from there to the engine's GPUs reach, Gbit/s. Where nothing is said, as much as 16 lanes of PCI Express 4.0 carry (16 GT/s each, of
    /// which 128 bits in 130 are data): a bound for one GPU on that bus, and half of one on PCI Express 5.0. Whoever has measured it writes that.
    #[serde(default = "host_gbit")]
    pub host_gbit: f64,
    /// How fast they are, where they are not in the table, or were calibrated.
    #[serde(default)]
    pub constants: Option<Speed>,
}

/// What connects the engines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// A host's card, Gbit/s each direction.
    pub gbit: f64,
    /// Widths that a sweep goes through.
    #[serde(default)]
    pub choices: Vec<f64>,
    /// Payload as a share of the width.
    #[serde(default = "efficiency")]
    pub efficiency: f64,
    /// Most that one transfer reaches, Gbit/s of payload.
    #[serde(default)]
    pub transfer_gbit: Option<f64>,
    /// Width of the spine.
    #[serde(default)]
    pub spine_gbit: Option<f64>,
    /// Between engines of one host, Gbit/s of payload.
    #[serde(default = "local_gbit")]
    pub local_gbit: f64,
    /// Round trip, microseconds.
    #[serde(default = "rtt_us")]
    pub rtt_us: f64,
}

/// Traffic of others between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Background {
    /// From this host, by number.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// Its rate where nothing holds it up.
    pub gbit: f64,
}

/// An engine that dies, and may come back: another life, with nothing cached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// Which, by number in the fleet's order.
    pub engine: u32,
    /// When it dies.
    pub from_seconds: f64,
    /// When it is back; never where there is none.
    #[serde(default)]
    pub until_seconds: Option<f64>,
}

/// A host's card that has another width for a time. Only blocks cross it: requests, events and load reports take another network.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Which host's, by number.
    pub host: u32,
    /// From when on.
    pub from_seconds: f64,
    /// When it has its own width again; never where there is none.
    #[serde(default)]
    pub until_seconds: Option<f64>,
    /// Its width meanwhile, each direction; 0 where nothing goes through.
    pub gbit: f64,
}

impl Card {
    /// Whether it has that width at a time, seconds.
    pub fn is_at(&self, seconds: f64) -> bool {
        self.from_seconds <= seconds && self.until_seconds.is_none_or(|until| seconds < until)
    }
}

/// What the control plane takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// From a request's arrival to its engine, again between the parts of a handoff, and from an engine's failure to whoever waits for
    /// it, microseconds.
    pub dispatch_us: f64,
    /// From a block's change to the index, milliseconds.
    pub event_delay_ms: f64,
    /// Between two load reports of an engine, milliseconds.
    pub load_interval_ms: f64,
    /// Held blocks that nobody began to fetch are freed after this.
    pub hold_seconds: f64,
    /// An engine that fetches blocks for so long computes what has not come; longer by what the prompt may take where it begins before that is computed.
    pub pull_deadline_ms: f64,
    /// Most requests that wait or are under way; further ones are turned away.
    pub max_requests: u64,
    /// Most requests on an engine; further ones wait.
    pub max_engine_requests: u32,
    /// Most requests that wait for room at an engine; past it the last in order are turned away.
    pub max_waiting: u64,
    /// Longest that one waits before it is turned away.
    pub longest_wait_ms: u32,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            dispatch_us: 500.0,
            event_delay_ms: 20.0,
            load_interval_ms: 1000.0,
            hold_seconds: 60.0,
            pull_deadline_ms: 10_000.0,
            max_requests: 4_096,
            max_engine_requests: 512,
            max_waiting: 1_024,
            longest_wait_ms: 30_000,
        }
    }
}

/// What is promised to a request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// From its arrival to its first token, milliseconds.
    pub ttft_ms: f64,
    /// Between two tokens, mean over the output, milliseconds.
    pub tpot_ms: f64,
}

/// One engine of a fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member<'a> {
    /// What it has in common with others.
    pub kind: &'a Kind,
    /// What it is for.
    pub role: Role,
    /// The host that it stands on.
    pub host: u32,
    /// How fast it is.
    pub speed: Speed,
}

impl Member<'_> {
    /// How long the KV of so many tokens takes from the host's memory to the GPU.
    pub fn host_seconds(&self, tokens: u64) -> f64 {
        self.speed.kv_bytes(tokens) / bytes_per_second(self.kind.host_gbit)
    }
}

const fn one() -> u32 {
    1
}

const fn yes() -> bool {
    true
}

const fn max_num_seqs() -> u32 {
    256
}

const fn max_num_batched_tokens() -> u32 {
    8192
}

/// 16 lanes of PCI Express 4.0.
const fn host_gbit() -> f64 {
    252.0
}

const fn efficiency() -> f64 {
    0.85
}

const fn local_gbit() -> f64 {
    200.0
}

const fn rtt_us() -> f64 {
    100.0
}

/// Bytes per second of a width.
fn bytes_per_second(gbit: f64) -> f64 {
    gbit * 1e9 / 8.0
}

impl Fleet {
    /// The engines, in order. Kinds stand on hosts of their own.
    pub fn members(&self) -> Vec<Member<'_>> {
        let mut members = Vec::new();
        let mut first_host = 0;
        for kind in &self.engines {
            let speed = self.speed(kind).expect("checked");
            let member =
                |at: u32| Member { kind, role: kind.role, host: first_host + at / kind.per_host, speed };
            members.extend((0..kind.count).map(member));
            first_host += kind.count.div_ceil(kind.per_host);
        }
        members
    }

    /// Engines in all.
    pub fn len(&self) -> usize {
        self.engines.iter().map(|kind| kind.count as usize).sum()
    }

    /// Whether it has no engines.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hosts in all.
    pub fn hosts(&self) -> u32 {
        self.engines.iter().map(|kind| kind.count.div_ceil(kind.per_host)).sum()
    }

    /// The same fleet with cards of another width, Gbit/s.
    pub fn with_gbit(&self, gbit: f64) -> Self {
        Self { links: Links { gbit, ..self.links.clone() }, ..self.clone() }
    }

    /// Widths for the links' model.
    pub fn widths(&self) -> link::Widths {
        let links = &self.links;
        link::Widths {
            host: bytes_per_second(links.gbit) * links.efficiency,
            local: bytes_per_second(links.local_gbit),
            spine: links.spine_gbit.map(|gbit| bytes_per_second(gbit) * links.efficiency),
            transfer: links.transfer_gbit.map(bytes_per_second),
        }
    }

    /// The width of a host's card at a time, in seconds: Gbit/s each direction.
    pub fn card_gbit(&self, host: u32, seconds: f64) -> f64 {
        let of = |card: &&Card| card.host == host && card.is_at(seconds);
        self.cards.iter().find(of).map_or(self.links.gbit, |card| card.gbit)
    }

    /// What it carries then, for the links' model: bytes per second of payload.
    pub fn card_width(&self, host: u32, seconds: f64) -> f64 {
        bytes_per_second(self.card_gbit(host, seconds)) * self.links.efficiency
    }

    /// Traffic of others, for the links' model.
    pub fn background_traffic(&self) -> Vec<link::Background> {
        let rate = |of: &Background| bytes_per_second(of.gbit);
        self.background
            .iter()
            .map(|of| link::Background { from: of.from, to: of.to, rate: rate(of) })
            .collect()
    }

    fn speed(&self, kind: &Kind) -> Option<Speed> {
        kind.constants.or_else(|| crate::engine::speed::known(&self.model, &kind.gpu))
    }
}
