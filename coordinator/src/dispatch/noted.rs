//! What the planner is told of a request: that it came, whether or not it has to wait for room, and what it was answered.

use baton_coordinator_core::cost::EXPECTED_OUTPUT_TOKENS;
use baton_coordinator_core::planner::{Beginnings, Finished, Placed};
use tokio::time::Instant;

use super::place::{Placement, Wanted};
use crate::decisions::Decisions;

/// A request that the planner knows.
pub(super) struct Noted {
    key: u64,
    at: Instant,
    /// What its answer is expected to have.
    tokens: u64,
}

/// One that was given its first token.
#[derive(Clone, Copy)]
pub(super) struct Begun {
    key: u64,
    ttft_seconds: f64,
}

impl Noted {
    /// Tells the planner that it came, as it was first decided on; `None` where its policy leaves no parts to a planner.
    pub(super) fn new(decisions: &Decisions, wanted: &Wanted, placement: &Placement) -> Option<Self> {
        if !wanted.policy.gives_parts() {
            return None;
        }
        let chosen = &placement.decision.chosen;
        let engine = &placement.fleet.engines()[chosen.plan.prefill() as usize];
        let key = decisions.placed(Placed {
            now_ms: decisions.now_ms(),
            model: engine.info.models.first().cloned().unwrap_or_default(),
            prompt_tokens: wanted.prompt.tokens(),
            beginnings: Beginnings::of(&placement.hashes, engine.info.block_size),
            cached: (engine.info.slot, chosen.hit_tokens),
            slo: placement.slo,
        });
        let expected = engine.answer_tokens.unwrap_or(EXPECTED_OUTPUT_TOKENS) as u64;
        let tokens = wanted.max_tokens.map_or(expected, |most| most.min(expected));
        Some(Self { key, at: Instant::now(), tokens })
    }

    /// Its first token is here.
    pub(super) fn begun(&self) -> Begun {
        Begun { key: self.key, ttft_seconds: self.at.elapsed().as_secs_f64() }
    }

    /// No engine had room for it in time: whatever it was promised, it did not get.
    pub(super) fn turned_away(self, decisions: &Decisions) {
        let never = f64::INFINITY;
        let finished = Finished { tokens: self.tokens, ttft_seconds: never, itl_seconds: never };
        decisions.finished(self.key, finished);
    }
}

impl Begun {
    /// It was answered whole: so many tokens after the first, in so many seconds.
    pub(super) fn finished(self, decisions: &Decisions, tokens: u64, seconds: f64) {
        let finished = Finished {
            tokens: tokens + 1,
            ttft_seconds: self.ttft_seconds,
            itl_seconds: seconds / (tokens as f64).max(1.0),
        };
        decisions.finished(self.key, finished);
    }
}
