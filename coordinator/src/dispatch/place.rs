//! Deciding where a request goes, with all that the coordinator knows of it.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator_core::admission;
use baton_coordinator_core::cost::{Priced, Slo};
use baton_coordinator_core::fleet::Fleet;
use baton_coordinator_core::load::Reserved;
use baton_coordinator_core::placement::{self, Decider, Decision, Explanation, Policy, Skipped};
use baton_proto::{BlockHash, EngineId};
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::flow::Endpoint;
use super::prompt::{Found, Prompt};
use crate::http::{ApiError, RequestBody};
use crate::state::Coordinator;

/// A request that is ready to be placed.
pub struct Wanted {
    /// Where it came in.
    pub endpoint: Endpoint,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The client's body.
    pub body: RequestBody,
    /// The model it names.
    pub model: String,
    /// What is known of its prompt.
    pub prompt: Prompt,
    /// Whether the answer is a stream of events.
    pub stream: bool,
    /// Most tokens it may generate, where it says so.
    pub max_tokens: Option<u64>,
    /// How to place it.
    pub policy: &'static dyn Policy,
    /// What is promised to it, from its arrival on.
    pub slo: Slo,
    /// The conversation that it belongs to, where it says so.
    pub session: Option<u64>,
    /// Where requests wait, the smaller goes first.
    pub priority: u8,
    /// Whether the answer is to carry the explanation.
    pub explain: bool,
    /// When it had wholly come in.
    pub arrived: Instant,
}

thread_local! {
    /// What decisions work with, used again by the next one on the thread.
    static DECIDER: RefCell<Decider> = RefCell::default();
}

/// A decision, and what it was made on.
pub struct Placement {
    /// The engines.
    pub fleet: Arc<Fleet>,
    /// The decision.
    pub decision: Decision,
    /// What the prefill engine had reserved before.
    pub reserved: Reserved,
    /// The prompt's blocks as the prefill engine hashes them.
    pub hashes: Vec<BlockHash>,
    /// What was left of the SLOs.
    pub slo: Slo,
    /// Whether it had better wait; see [`admission::had_better_wait`].
    pub had_better_wait: bool,
    /// The decision in words, where they were asked for.
    pub explanation: Option<Explanation>,
}

/// Why a request cannot be placed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// No engine can serve it, for these reasons.
    NoEngine(String),
    /// All engines that could have as many requests as they may.
    Full,
}

impl Unplaced {
    /// What the client is answered.
    pub fn refusal(&self, model: &str) -> ApiError {
        match self {
            Unplaced::NoEngine(why) => {
                let message = format!("No engine can serve {model}: {why}");
                ApiError::of(StatusCode::SERVICE_UNAVAILABLE, message)
            }
            Unplaced::Full => {
                let message = format!("Every engine of {model} has as many requests as it may.");
                ApiError::of(StatusCode::TOO_MANY_REQUESTS, message)
            }
        }
    }
}

impl Wanted {
    /// Decides; with `explained`, also puts so many options in words. A decision that is `meant`, and not just asked for, is kept.
    pub fn place(
        &self,
        coordinator: &Coordinator,
        avoid: &[EngineId],
        explained: Option<usize>,
        meant: bool,
    ) -> Result<Placement, Unplaced> {
        let fleet = coordinator.fleet(self.policy);
        let decisions = &coordinator.decisions;
        let found = self.prompt.find(&fleet, &self.model, &coordinator.index);
        let splittable =
            if avoid.is_empty() { self.prompt.splittable() } else { Err("another engine failed") };
        let waited = self.arrived.elapsed().as_secs_f64();
        let left = |slo: f64| (slo - waited).max(0.0);
        let slo = Slo { ttft_seconds: self.slo.ttft_seconds.map(left), ..self.slo };
        let request = placement::Request {
            max_tokens: self.max_tokens,
            splittable,
            avoid,
            slo,
            seed: decisions.next_seed(),
            pinned: self.session.and_then(|session| decisions.pinned(session)),
            prefix_key: found.prefix_key,
            fresh_key: found.fresh_key,
            most_in_flight: Some(coordinator.config.limits.max_engine_requests),
            ..placement::Request::new(&self.model, self.prompt.tokens(), &found.overlaps)
        };
        DECIDER.with_borrow_mut(|decider| {
            let decision = decider.decide(self.policy, &fleet, &request);
            let keep = || {
                decisions.with_recent(|recent| {
                    recent.keep(self.policy, &fleet, &request, decider, decision.as_ref());
                });
            };
            let Some(decision) = decision else {
                let unplaced = unplaced(&fleet, &request);
                if meant && unplaced != Unplaced::Full {
                    keep();
                }
                return Err(unplaced);
            };
            let explain = |limit| decider.explain(self.policy, &fleet, &request, &decision, limit);
            let reserved = |at: u32| decider.loads().engines()[at as usize];
            let plan = decision.plan();
            let prefill = plan.prefill();
            let holder = plan.transfer().map_or(prefill, |(holder, _)| holder);
            let in_flight = [holder, prefill, plan.decode()].map(|at| reserved(at).in_flight());
            let beside = in_flight.into_iter().max().unwrap_or(0);
            let placement = Placement {
                reserved: reserved(prefill),
                explanation: explained.map(explain),
                hashes: hashes_of(&found, &fleet, prefill),
                slo,
                had_better_wait: admission::had_better_wait(&self.slo, waited, &decision.chosen, beside),
                decision,
                fleet: fleet.clone(),
            };
            // One that waits is decided on again.
            if meant && !placement.had_better_wait {
                keep();
            }
            Ok(placement)
        })
    }

    /// Until when it may wait: as long as its first token can still come in time, and `longest` at most. `placed` is the plan that it had
    /// without waiting.
    pub fn patience(&self, placed: Option<&Priced>, longest: Duration) -> Instant {
        let unqueued = placed.map_or(0.0, admission::unqueued_ttft_seconds);
        let longest_ms = longest.as_millis() as u64;
        let latest = admission::latest_dispatch_ms(0, self.slo.ttft_seconds, unqueued, longest_ms);
        self.arrived + Duration::from_millis(latest)
    }
}

fn hashes_of(found: &Found, fleet: &Fleet, engine: u32) -> Vec<BlockHash> {
    let info = &fleet.engines()[engine as usize].info;
    found.hashes_of(info).map(<[BlockHash]>::to_vec).unwrap_or_default()
}

fn unplaced(fleet: &Fleet, request: &placement::Request<'_>) -> Unplaced {
    let skipped: Vec<_> = placement::skipped(fleet, request)
        .into_iter()
        .filter(|(_, why)| *why != Skipped::OtherModel)
        .collect();
    let serving = fleet.engines().iter().filter(|engine| engine.serves(request.model)).count();
    // One that is not in the list was full when it was decided, and is not any more.
    if skipped.len() < serving || skipped.iter().any(|(_, why)| *why == Skipped::Full) {
        return Unplaced::Full;
    }
    let why: Vec<String> =
        skipped.into_iter().map(|(id, why)| format!("{id} {why:?}").to_lowercase()).collect();
    Unplaced::NoEngine(match why.is_empty() {
        true => "no engine is registered for it".to_owned(),
        false => why.join(", "),
    })
}
