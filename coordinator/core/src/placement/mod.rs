//! The decision: which plans are possible, what each costs, and which one the policy takes.
//!
//! [`decide`] filters engines, lists plans, prices each, and puts them in the policy's order. Equal costs are settled by mode
//! (co-located first) and then by the engines' names, so the same inputs always give the same decision.

mod adaptive;
mod colocated;
mod decision;
mod disaggregated;

use std::cmp::Ordering;

use baton_proto::EngineId;

pub use self::adaptive::Adaptive;
pub use self::colocated::Colocated;
pub use self::decision::{Decision, Explanation, OptionExplanation, Passed, Skipped};
pub use self::disaggregated::Disaggregated;
use crate::cost::{Plan, Priced, Workload, price};
use crate::fleet::{Engine, Fleet};
use crate::kv_index::Overlaps;

/// Most engines that are considered for each part of a handoff: those that are cheapest for that part alone. With
/// more engines than this, pairs that only a very fast link would favour are not priced.
pub const PAIR_CANDIDATES: usize = 32;

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
    /// Whether it can be handed off at all; else why not.
    pub splittable: Result<(), &'static str>,
    /// Engines that failed it already.
    pub avoid: &'a [EngineId],
}

/// Where an option stands in a policy's order: the smaller class first, then the fewer seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rank {
    /// 0 for what the policy asks for; more for what it takes only where nothing better is possible.
    pub class: u8,
    /// Predicted seconds that it ranks by.
    pub seconds: f64,
}

/// A way of choosing among priced options.
pub trait Policy: Send + Sync {
    /// Its name in configuration and explanations.
    fn name(&self) -> &'static str;

    /// Where the option stands. Must not depend on anything but its arguments.
    fn rank(&self, request: &Request<'_>, option: &Priced) -> Rank;

    /// Why an option of a class above 0 was passed over.
    fn reason(&self, class: u8) -> &'static str;
}

/// The policy of this name: `adaptive`, `colocated` or `disaggregated`.
pub fn policy(name: &str) -> Option<&'static dyn Policy> {
    let policies: [&'static dyn Policy; 3] = [&Adaptive, &Colocated, &Disaggregated];
    policies.into_iter().find(|policy| policy.name() == name)
}

/// Chooses. `None` where no engine can serve the request; [`skipped`] says why each was left out.
pub fn decide(policy: &dyn Policy, fleet: &Fleet, request: &Request<'_>) -> Option<Decision> {
    let work = Workload {
        prompt_tokens: request.prompt_tokens,
        max_tokens: request.max_tokens,
        overlaps: request.overlaps,
    };
    let mut ranked: Vec<(Rank, Priced)> = plans(fleet, request, &work)
        .into_iter()
        .map(|plan| {
            let priced = price(fleet, &work, plan);
            (policy.rank(request, &priced), priced)
        })
        .collect();
    ranked.sort_by(order);
    Decision::new(policy, request, ranked)
}

/// Why each engine that cannot serve the request was left out, in order of their names.
pub fn skipped(fleet: &Fleet, request: &Request<'_>) -> Vec<(EngineId, Skipped)> {
    let reason = |engine: &Engine| Some((engine.info.id.clone(), eligible(engine, request).err()?));
    fleet.engines().iter().filter_map(reason).collect()
}

fn order(a: &(Rank, Priced), b: &(Rank, Priced)) -> Ordering {
    a.0.class
        .cmp(&b.0.class)
        .then(a.0.seconds.total_cmp(&b.0.seconds))
        // Co-located comes first in `Plan`'s own order, and engines stand in order of their names.
        .then(a.1.plan.cmp(&b.1.plan))
}

fn eligible(engine: &Engine, request: &Request<'_>) -> Result<(), Skipped> {
    if !engine.serves(request.model) {
        return Err(Skipped::OtherModel);
    }
    if !engine.healthy {
        return Err(Skipped::Unhealthy);
    }
    if request.avoid.contains(&engine.info.id) {
        return Err(Skipped::Failed);
    }
    Ok(())
}

fn plans(fleet: &Fleet, request: &Request<'_>, work: &Workload<'_>) -> Vec<Plan> {
    let engines = fleet.engines();
    let able: Vec<u32> =
        (0..engines.len() as u32).filter(|i| eligible(&engines[*i as usize], request).is_ok()).collect();
    let role = |i: &u32| engines[*i as usize].info.role;

    let mut whole: Vec<u32> = able.iter().copied().filter(|i| role(i).decodes()).collect();
    if whole.is_empty() {
        // Better a prefill engine that decodes than a request that fails.
        whole = able.clone();
    }
    let mut plans: Vec<Plan> = whole.into_iter().map(|engine| Plan::Colocated { engine }).collect();

    if request.splittable.is_ok() && request.prompt_tokens > 0 {
        let ready = |i: &u32| {
            let engine = &engines[*i as usize];
            engine.can_transfer && !engine.info.layout.is_empty()
        };
        let first = cheapest(
            &able,
            |i| ready(i) && role(i).prefills(),
            |engine| price(fleet, work, Plan::Colocated { engine }).terms.total(),
        );
        let second = cheapest(
            &able,
            |i| ready(i) && role(i).decodes(),
            |engine| {
                let priced = price(fleet, work, Plan::Disaggregated { prefill: engine, decode: engine });
                priced.terms.total() - price(fleet, work, Plan::Colocated { engine }).terms.total()
            },
        );
        for prefill in first {
            for &decode in second.iter().filter(|decode| **decode != prefill) {
                if engines[prefill as usize].info.layout == engines[decode as usize].info.layout {
                    plans.push(Plan::Disaggregated { prefill, decode });
                }
            }
        }
    }
    plans
}

/// The engines that fit, the cheapest [`PAIR_CANDIDATES`] where there are more.
fn cheapest(able: &[u32], fits: impl Fn(&u32) -> bool, seconds: impl Fn(u32) -> f64) -> Vec<u32> {
    let mut fitting: Vec<u32> = able.iter().copied().filter(|i| fits(i)).collect();
    if fitting.len() > PAIR_CANDIDATES {
        let mut by_cost: Vec<(f64, u32)> = fitting.iter().map(|i| (seconds(*i), *i)).collect();
        by_cost.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        fitting = by_cost[..PAIR_CANDIDATES].iter().map(|entry| entry.1).collect();
    }
    fitting
}

#[cfg(test)]
pub(crate) mod testing {
    //! Engines for tests.
    use super::*;
    use std::sync::Arc;

    use crate::fleet::{EngineInfo, Role};
    use crate::kv_index::Slot;
    use crate::load::Reserved;
    use crate::speed::Speed;
    use baton_proto::Epoch;

    pub(crate) fn engine(n: u32) -> Engine {
        Engine {
            info: Arc::new(EngineInfo {
                slot: Slot(n),
                id: format!("e{n:04}").parse().unwrap(),
                epoch: Epoch(1),
                models: vec!["m".into()],
                role: Role::Both,
                block_size: 16,
                block_bytes: 100_000,
                layout: "l".into(),
            }),
            healthy: true,
            can_transfer: true,
            speed: Speed::default(),
            reserved: Reserved::default(),
            foreign_waiting: 0,
            foreign_running: 0,
        }
    }

    /// The engine with its fixed part changed.
    pub(crate) fn with(mut engine: Engine, change: impl FnOnce(&mut EngineInfo)) -> Engine {
        change(Arc::make_mut(&mut engine.info));
        engine
    }

    pub(crate) fn fleet(n: u32) -> Fleet {
        Fleet::new((0..n).map(engine).collect(), Default::default())
    }

    pub(crate) fn request(overlaps: &Overlaps) -> Request<'_> {
        Request {
            model: "m",
            prompt_tokens: 3000,
            max_tokens: None,
            overlaps,
            splittable: Ok(()),
            avoid: &[],
        }
    }
}

#[cfg(test)]
mod tests;
