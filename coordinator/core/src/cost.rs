//! Predicted seconds of one way to serve a request, term by term.
//!
//! A term is a duration that somebody waits: the request itself, or sequences that it holds up. Their sum is what a
//! placement adds to the fleet's waiting, in seconds. No term is a weight.

use crate::fleet::{Engine, Fleet};
use crate::kv_index::Overlaps;
use crate::speed::DECODE_STEP_SECONDS_PER_SEQUENCE;

/// Output assumed of a request that does not say how long it may become, and the most that is charged for.
const EXPECTED_OUTPUT_TOKENS: u64 = 128;

/// A named part of the cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Term {
    /// Prompts that the prefill engine computes first.
    QueueWait,
    /// The fixed cost of a request on the prefill engine.
    Request,
    /// Prefill of the tokens that the prefill engine does not hold.
    Prefill,
    /// What that prefill adds to the sequences that already decode there, summed over them.
    DecodeStall,
    /// Handoff: blocks that the decode engine does not hold, over the link.
    Transfer,
    /// Handoff: prompts that the decode engine computes first.
    DecodeQueueWait,
    /// Handoff: the fixed cost of the second request, and its one step.
    FirstStep,
    /// What the sequences that already decode on the engine add to this one's decode steps.
    DecodeBatch,
}

impl Term {
    /// All terms, in the order in which they happen.
    pub const ALL: [Term; 8] = [
        Term::QueueWait,
        Term::Request,
        Term::Prefill,
        Term::DecodeStall,
        Term::Transfer,
        Term::DecodeQueueWait,
        Term::FirstStep,
        Term::DecodeBatch,
    ];

    /// Its name in explanations.
    pub fn name(self) -> &'static str {
        match self {
            Term::QueueWait => "queue_wait",
            Term::Request => "request",
            Term::Prefill => "prefill",
            Term::DecodeStall => "decode_stall",
            Term::Transfer => "transfer",
            Term::DecodeQueueWait => "decode_queue_wait",
            Term::FirstStep => "first_step",
            Term::DecodeBatch => "decode_batch",
        }
    }
}

/// Seconds of every term; those that do not occur are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms([f64; Term::ALL.len()]);

impl Terms {
    /// One term's seconds.
    pub fn get(&self, term: Term) -> f64 {
        self.0[term as usize]
    }

    fn set(&mut self, term: Term, seconds: f64) {
        debug_assert!(seconds.is_finite() && seconds >= 0.0, "{term:?}: {seconds}");
        self.0[term as usize] = seconds;
    }

    /// The terms that occur, in the order in which they happen.
    pub fn iter(&self) -> impl Iterator<Item = (Term, f64)> + '_ {
        Term::ALL.into_iter().map(|term| (term, self.get(term))).filter(|(_, seconds)| *seconds > 0.0)
    }

    /// Their sum.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// The predicted time to the request's own first token: the sum without what others wait and what comes
    /// later.
    pub fn time_to_first_token(&self) -> f64 {
        self.total() - self.get(Term::DecodeStall) - self.get(Term::DecodeBatch)
    }
}

/// A way to serve a request. Engines are named by their place in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Plan {
    /// All on one engine.
    Colocated {
        /// Where.
        engine: u32,
    },
    /// Prefill on one engine, decode on another.
    Disaggregated {
        /// The first.
        prefill: u32,
        /// The second.
        decode: u32,
    },
}

impl Plan {
    /// `colocated` or `disaggregated`.
    pub fn mode(self) -> &'static str {
        match self {
            Plan::Colocated { .. } => "colocated",
            Plan::Disaggregated { .. } => "disaggregated",
        }
    }

    /// The engine that computes the prompt.
    pub fn prefill(self) -> u32 {
        match self {
            Plan::Colocated { engine } => engine,
            Plan::Disaggregated { prefill, .. } => prefill,
        }
    }

    /// The engine that answers.
    pub fn decode(self) -> u32 {
        match self {
            Plan::Colocated { engine } => engine,
            Plan::Disaggregated { decode, .. } => decode,
        }
    }
}

/// A plan and its predicted cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Priced {
    /// The plan.
    pub plan: Plan,
    /// Its cost.
    pub terms: Terms,
    /// Prompt tokens that the prefill engine holds already.
    pub hit_tokens: u64,
    /// Prompt tokens that it computes.
    pub uncached_tokens: u64,
    /// Bytes that cross the link.
    pub transfer_bytes: u64,
}

/// What the cost of a request depends on.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// Prompt tokens; an estimate where the prompt was not tokenised.
    pub prompt_tokens: u64,
    /// Most tokens that it may generate, where it says so.
    pub max_tokens: Option<u64>,
    /// What each engine holds of it.
    pub overlaps: &'a Overlaps,
}

impl Workload<'_> {
    /// Prompt tokens that the engine need not compute. An engine always computes the last one, so a prompt
    /// that it holds wholly counts one block less.
    pub fn hit_tokens(&self, engine: &Engine) -> u64 {
        let block_size = u64::from(engine.info.block_size);
        let held = u64::from(self.overlaps.of(engine.info.slot).blocks);
        held.min(self.prompt_tokens.saturating_sub(1) / block_size) * block_size
    }

    fn output_tokens(&self) -> u64 {
        self.max_tokens.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS)
    }
}

/// Predicts the cost of a plan.
pub fn price(fleet: &Fleet, work: &Workload<'_>, plan: Plan) -> Priced {
    let prefill = &fleet.engines()[plan.prefill() as usize];
    let hit_tokens = work.hit_tokens(prefill);
    let uncached_tokens = work.prompt_tokens.saturating_sub(hit_tokens);
    let prefill_seconds = prefill.speed.prefill_seconds(uncached_tokens);

    let mut terms = Terms::default();
    terms.set(Term::QueueWait, queue_wait(prefill));
    terms.set(Term::Request, prefill.speed.request_seconds);
    terms.set(Term::Prefill, prefill_seconds);
    terms.set(Term::DecodeStall, prefill_seconds * prefill.sequences() as f64);

    let decode = &fleet.engines()[plan.decode() as usize];
    let mut transfer_bytes = 0;
    if let Plan::Disaggregated { .. } = plan {
        let blocks = work.prompt_tokens.div_ceil(u64::from(decode.info.block_size));
        let missing = blocks.saturating_sub(u64::from(work.overlaps.of(decode.info.slot).blocks));
        transfer_bytes = missing * decode.info.block_bytes.max(prefill.info.block_bytes);
        terms.set(
            Term::Transfer,
            fleet.links.get(prefill.info.slot, decode.info.slot).seconds(transfer_bytes),
        );
        terms.set(Term::DecodeQueueWait, queue_wait(decode));
        terms.set(Term::FirstStep, decode.speed.request_seconds + decode.speed.decode_step_seconds);
    }
    let steps = work.output_tokens() as f64;
    terms.set(Term::DecodeBatch, steps * DECODE_STEP_SECONDS_PER_SEQUENCE * decode.sequences() as f64);
    Priced { plan, terms, hit_tokens, uncached_tokens, transfer_bytes }
}

/// Seconds until the engine has computed the prompts dispatched to it before. Requests of others count with
/// what a request of ours costs there on average.
fn queue_wait(engine: &Engine) -> f64 {
    let ours = engine.speed.prefill_seconds(engine.reserved.prefill_tokens);
    let mean = match engine.reserved.prefills {
        0 => 0.0,
        n => ours / n as f64,
    };
    ours + f64::from(engine.foreign_waiting) * (engine.speed.request_seconds + mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_index::{Overlap, Slot};
    use crate::placement::testing::{engine, fleet};

    fn overlaps(of: &[(u32, u32)]) -> Overlaps {
        of.iter().map(|(slot, n)| (Slot(*slot), Overlap { blocks: *n, gpu_blocks: *n })).collect()
    }

    #[test]
    fn an_engine_always_computes_the_last_token() {
        let overlaps = overlaps(&[(0, 4)]);
        let of = |prompt_tokens| Workload { prompt_tokens, max_tokens: None, overlaps: &overlaps };
        let engine = engine(0);
        assert_eq!(of(64).hit_tokens(&engine), 48);
        assert_eq!(of(65).hit_tokens(&engine), 64);
        assert_eq!(of(1000).hit_tokens(&engine), 64);
        assert_eq!(of(0).hit_tokens(&engine), 0);
    }

    #[test]
    fn a_handoff_moves_only_what_the_decode_engine_lacks() {
        let overlaps = overlaps(&[(0, 10), (1, 30)]);
        let work = Workload { prompt_tokens: 1000, max_tokens: None, overlaps: &overlaps };
        let fleet = fleet(2);
        let priced = price(&fleet, &work, Plan::Disaggregated { prefill: 0, decode: 1 });
        assert_eq!(priced.hit_tokens, 160);
        assert_eq!(priced.uncached_tokens, 840);
        assert_eq!(priced.transfer_bytes, (63 - 30) * fleet.engines()[0].info.block_bytes);
        let sum: f64 = priced.terms.iter().map(|(_, seconds)| seconds).sum();
        assert!((sum - priced.terms.total()).abs() < 1e-12);
    }

    #[test]
    fn a_queue_and_running_sequences_are_charged_in_seconds() {
        let mut busy = engine(0);
        busy.speed.prefill_tokens_per_second = 1000.0;
        busy.reserved.prefill_tokens = 500;
        busy.reserved.prefills = 1;
        busy.reserved.sequences = 3;
        let fleet = Fleet::new(vec![busy], Default::default());
        let overlaps = Overlaps::default();
        let work = Workload { prompt_tokens: 2000, max_tokens: Some(1), overlaps: &overlaps };
        let terms = price(&fleet, &work, Plan::Colocated { engine: 0 }).terms;
        assert_eq!(terms.get(Term::QueueWait), 0.5);
        assert_eq!(terms.get(Term::Prefill), 2.0);
        assert_eq!(terms.get(Term::DecodeStall), 6.0);
        assert_eq!(terms.get(Term::Transfer), 0.0);
    }
}
