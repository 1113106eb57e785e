//! The decision: which plans are possible, what each costs, and which one is taken.
//!
//! [`Decider::decide`] filters engines, prices the parts of all plans, asks the policy what it aims at, and takes the best plan of
//! that kind: the one with the fewest added fleet seconds ([`crate::cost`]), what the SLOs are at risk of among them.
//!
//! # Ties
//! Of plans that cost the same: one engine before a pull before a handoff. Among single engines, the one that comes first as a
//! home of the prompt's first unknown block ([`Request::fresh_key`]), so that prompts that begin alike and go on differently spread
//! over equal engines, and then the first by name. Among handoffs the one whose prefill part is cheapest, then by name. So
//! the same inputs always give the same decision.
//!
//! # Bounds
//! Pairs are priced as long as a lower bound says that they can be better: the choice is that of pricing all of them, up to the
//! rounding of sums. At most [`MAX_PAIRS`] are priced, and [`MAX_LOOKS`] looked at; where that ends the search, the decision says so
//! ([`Decision::cut`]). A
//! prefix is pulled from one of the [`PULL_SOURCES`] engines that hold the most of it.

mod adaptive;
mod colocated;
mod consistent_hash;
mod decider;
mod disaggregated;
mod explain;
mod least_loaded;
mod longest_prefix;
mod power_of_two;
mod random;
mod round_robin;
mod search;
mod session_sticky;
mod threshold;
mod view;

use baton_proto::{BlockHash, EngineId};
use serde::Serialize;

pub use self::adaptive::Adaptive;
pub use self::colocated::Colocated;
pub use self::consistent_hash::ConsistentHash;
pub use self::decider::{Decider, Decision};
pub use self::disaggregated::Disaggregated;
pub use self::explain::{Explanation, OptionExplanation, Passed};
pub use self::least_loaded::LeastLoaded;
pub use self::longest_prefix::LongestPrefix;
pub use self::power_of_two::PowerOfTwo;
pub use self::random::Random;
pub use self::round_robin::RoundRobin;
pub use self::session_sticky::SessionSticky;
pub use self::threshold::Threshold;
pub use self::view::View;
use crate::cost::Slo;
use crate::fleet::Fleet;
use crate::kv_index::{Overlaps, Slot};
use crate::load::Reserved;

/// Most pairs of engines that are priced for a decision.
pub const MAX_PAIRS: usize = 1024;
/// Most pairs of engines that are looked at for a decision: most of them cannot be better than the best one priced, by what
/// their ends of the link carry.
pub const MAX_LOOKS: usize = 16 * MAX_PAIRS;
/// Engines that a prefix may be pulled from: those that hold the most of it.
pub const PULL_SOURCES: usize = 4;
/// Tokens whose block names a prefix for [`Request::prefix_key`].
pub const PREFIX_TOKENS: u64 = 1024;

/// A request, as the decision sees it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The model it names.
    pub model: &'a str,
    /// Prompt tokens; an estimate where the prompt was not tokenised.
    pub prompt_tokens: u64,
    /// Most tokens that it may generate, where it says so.
    pub max_tokens: Option<u64>,
    /// What each engine holds of it.
    pub overlaps: &'a Overlaps,
    /// Whether it can be handed off or pull a prefix at all; else why not.
    pub splittable: Result<(), &'a str>,
    /// Engines that failed it already.
    pub avoid: &'a [EngineId],
    /// What is promised to it.
    pub slo: Slo,
    /// Engines with as many requests in flight are left out.
    pub most_in_flight: Option<u32>,
    /// A number of its own, from a counter: [`RoundRobin`] counts with it, [`Random`] and [`PowerOfTwo`] draw from it.
    pub seed: u64,
    /// The engine that its session is pinned to ([`crate::sessions::Sessions`]).
    pub pinned: Option<Slot>,
    /// Names its first [`PREFIX_TOKENS`] tokens ([`prefix_key`]).
    pub prefix_key: Option<u64>,
    /// Names its prefix up to the first block that nobody holds ([`fresh_key`]).
    pub fresh_key: Option<u64>,
}

impl<'a> Request<'a> {
    /// A request of which only this is known.
    pub fn new(model: &'a str, prompt_tokens: u64, overlaps: &'a Overlaps) -> Self {
        Self {
            model,
            prompt_tokens,
            max_tokens: None,
            overlaps,
            splittable: Ok(()),
            avoid: &[],
            slo: Slo::default(),
            most_in_flight: None,
            seed: 0,
            pinned: None,
            prefix_key: None,
            fresh_key: None,
        }
    }
}

impl Request<'_> {
    /// Whether an engine with so much to do is left out.
    pub(crate) fn is_full(&self, foreign: u32, reserved: &Reserved) -> bool {
        self.most_in_flight.is_some_and(|most| reserved.in_flight() + u64::from(foreign) >= u64::from(most))
    }
}

/// A key for the first [`PREFIX_TOKENS`] tokens of a prompt with this chain of hashes; of a shorter prompt, for all
/// its blocks. `None` without a whole block.
pub fn prefix_key(hashes: &[BlockHash], block_size: u32) -> Option<u64> {
    let blocks = PREFIX_TOKENS.div_ceil(u64::from(block_size.max(1))) as usize;
    key(hashes.get(hashes.len().min(blocks).checked_sub(1)?)?)
}

/// A key for a prompt's first block that nobody holds or is expected to hold. `None` where all are held.
pub fn fresh_key(hashes: &[BlockHash], overlaps: &Overlaps) -> Option<u64> {
    let held = overlaps.iter().map(|(_, overlap)| overlap.blocks);
    let held = held.chain(overlaps.iter_expected().map(|(_, blocks)| blocks)).max().unwrap_or(0);
    key(hashes.get(held as usize)?)
}

fn key(hash: &BlockHash) -> Option<u64> {
    hash.as_bytes()[..8].try_into().ok().map(u64::from_le_bytes)
}

/// Kinds of plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes {
    /// All on one engine.
    pub whole: bool,
    /// A pull, then all on one engine.
    pub pulls: bool,
    /// Prefill on one engine, decode on another.
    pub pairs: bool,
}

impl Modes {
    /// Every kind.
    pub const ALL: Modes = Modes { whole: true, pulls: true, pairs: true };
    /// One engine, with what it holds.
    pub const WHOLE: Modes = Modes { whole: true, pulls: false, pairs: false };
    /// Two engines.
    pub const PAIRS: Modes = Modes { whole: false, pulls: false, pairs: true };
}

/// What a policy wants for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// The best plan of these kinds; the best single engine where there is none.
    Best(Modes),
    /// All on this engine, one of [`View::candidates`].
    Engine(u32),
}

/// A way of choosing. One file each.
pub trait Policy: Send + Sync {
    /// Its name in configuration and explanations.
    fn name(&self) -> &'static str;

    /// What it wants for the request. Must not depend on anything but the view, which has at least one candidate.
    fn aim(&self, view: &View<'_>) -> Aim;

    /// Whether a [`crate::planner`] may give engines parts for it.
    fn gives_parts(&self) -> bool {
        false
    }

    /// Why a plan that it does not aim at was passed over.
    fn reason(&self) -> &'static str;
}

/// All policies.
pub const POLICIES: [&dyn Policy; 11] = [
    &Adaptive,
    &Colocated,
    &Disaggregated,
    &Threshold,
    &RoundRobin,
    &Random,
    &PowerOfTwo,
    &LeastLoaded,
    &LongestPrefix,
    &ConsistentHash,
    &SessionSticky,
];

/// The policy of this name.
pub fn policy(name: &str) -> Option<&'static dyn Policy> {
    POLICIES.into_iter().find(|policy| policy.name() == name)
}

/// Why an engine was not considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Skipped {
    /// It serves other models.
    OtherModel,
    /// Its agent's lease ran out.
    Unhealthy,
    /// It failed this request already.
    Failed,
    /// It has as many requests as it may.
    Full,
}

/// Why each engine that cannot serve the request was left out, in order of their names.
pub fn skipped(fleet: &Fleet, request: &Request<'_>) -> Vec<(EngineId, Skipped)> {
    let reason = |engine: &crate::fleet::Engine| {
        let why = if !engine.serves(request.model) {
            Skipped::OtherModel
        } else if !engine.healthy {
            Skipped::Unhealthy
        } else if request.avoid.contains(&engine.info.id) {
            Skipped::Failed
        } else if request.is_full(engine.foreign_waiting + engine.foreign_running, &engine.load.reserved()) {
            Skipped::Full
        } else {
            return None;
        };
        Some((engine.info.id.clone(), why))
    };
    fleet.engines().iter().filter_map(reason).collect()
}

#[cfg(test)]
pub(crate) mod random_fleet;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
