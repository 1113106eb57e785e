//! How many engines only decode.
//!
//! A decision looks at one request. That a fleet would do better with some engines for prompts and the others for answers is not seen from
//! one: as long as every engine does both, each request adds least where it is served whole, or nearly so, and all are held up by the prompts of
//! others. So from time to time the [`Planner`] takes the last requests of a model and rehearses (`rehearsal`) what would have become of them for each number of
//! engines that only decode. Where that keeps the SLOs of clearly more of them, engines get [`Parts`] for the decisions to come, until all doing both is clearly better again.
//! A request whose first token would come late by such a split is served whole by an engine that only decodes, where that is in time; rehearsals do not know that.
//!
//! Only engines whose role is [`Role::Both`] are given parts: where an operator gave an engine of a model another one, the split is theirs. Without SLOs nothing is planned: then every second
//! counts the same, and decisions see those.
//!
//! | file | concept |
//! |---|---|
//! | `pool.rs` | the engines and the last requests of one model, and which split is taken |
//! | `prefixes.rs` | which earlier request a prompt has its beginning from |
//! | `rehearsal.rs` | what would have become of the last requests |

mod pool;
mod prefixes;
mod rehearsal;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use self::prefixes::Beginnings;

use self::pool::Pool;
use crate::cost::Slo;
use crate::fleet::{Engine, Fleet, Role};
use crate::kv_index::Slot;

/// Requests in flight that are remembered; the oldest are forgotten, since some never end.
const MOST_OPEN: usize = 100_000;

/// A request that was placed.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Milliseconds on a clock that does not go back.
    pub now_ms: u64,
    /// The first name under which its engine serves.
    pub model: String,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// What tells it from prompts that begin otherwise.
    pub beginnings: Beginnings,
    /// Tokens of the prompt that the engine which computes it holds, and that engine.
    pub cached: (Slot, u64),
    /// What it is to keep.
    pub slo: Slo,
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finished {
    /// Tokens of its answer.
    pub tokens: u64,
    /// From its placement to the first of them.
    pub ttft_seconds: f64,
    /// Between two of them, on average; 0 where there was one.
    pub itl_seconds: f64,
}

/// What engines were given to do, by slot. All others do what their role says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts(BTreeMap<Slot, Role>);

impl Parts {
    /// What an engine was given.
    pub fn of(&self, slot: Slot) -> Option<Role> {
        self.0.get(&slot).copied()
    }

    /// Gives them to engines.
    pub fn give(&self, engines: &mut [Engine]) {
        if !self.0.is_empty() {
            engines.iter_mut().for_each(|engine| engine.part = self.of(engine.info.slot));
        }
    }

    /// Engines that only decode.
    pub fn decoding(&self) -> usize {
        self.0.values().filter(|role| **role == Role::DecodeOnly).count()
    }
}

/// Plans for all models.
#[derive(Debug, Default)]
pub struct Planner {
    pools: BTreeMap<String, Pool>,
    /// Requests that are not over: the model, and the number in its pool.
    open: BTreeMap<u64, (String, u64)>,
}

impl Planner {
    /// A planner that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A request was placed. Later ones have greater keys.
    pub fn placed(&mut self, key: u64, placed: Placed) {
        while self.open.len() >= MOST_OPEN {
            self.open.pop_first();
        }
        let model = placed.model.clone();
        let number = self.pools.entry(placed.model.clone()).or_default().placed(placed);
        self.open.insert(key, (model, number));
    }

    /// A request was answered whole. One that was not says nothing.
    pub fn finished(&mut self, key: u64, finished: &Finished) {
        let Some((model, number)) = self.open.remove(&key) else { return };
        if let Some(pool) = self.pools.get_mut(&model) {
            pool.finished(number, finished);
        }
    }

    /// What engines are to do from now on. Takes some tens of milliseconds for a model of which many requests came since the last time, so
    /// call it off the way of requests, about once a second. What is known of models that no engine serves any more is dropped.
    pub fn plan(&mut self, now_ms: u64, fleet: &Fleet) -> Parts {
        let mut by_model: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (at, engine) in fleet.engines().iter().enumerate() {
            let model = engine.info.models.first().map_or("", String::as_str);
            by_model.entry(model).or_default().push(at as u32);
        }
        self.pools.retain(|model, _| by_model.contains_key(model.as_str()));
        let mut parts = Parts::default();
        for (model, pool) in &mut self.pools {
            pool.plan(now_ms, fleet, &by_model[model.as_str()], &mut parts.0);
        }
        parts
    }
}
