//! Predicted seconds of one way to serve a request, term by term.
//!
//! A term is a duration that somebody waits: the request itself, sequences that it holds up, or requests to come. Their sum is what a
//! placement adds to the fleet's waiting, in seconds. No term is a weight, but `second_copy` rests on two numbers that are assumed, and
//! `slo_risk` on one.
//!
//! # Formulas
//! With `n` tokens to compute after `p` cached ones, `B` sequences with `Σctx` tokens of context on an engine, `T` tokens of output that are
//! expected (what answers have on average, but no more than the request may generate), and the coefficients of [`crate::speed`]:
//!
//! | term | seconds | who waits |
//! |---|---|---|
//! | `queue_wait` | predicted prefills that are reserved there, half of one less: the one that is being computed is half done on average; a `pull` plan meets two queues at once, and waits for the longer | it |
//! | `hold` | `pull` plans: the source's prefill of one token behind the cached ones, and its mixed step, as below; less what the longer queue hides of it | it |
//! | `mixed_steps` | `⌈n / chunk⌉ · (e·B + f·Σctx)`: each chunk shares its step with the sequences that decode; the step's base `d` is in `prefill` | it |
//! | `prefill` | `a + b·n + c·(n·p + n²/2)` | it |
//! | `decode_stall` | `B · (prefill - ⌈n / chunk⌉ · d)`, at least 0: in each chunk's step every sequence has a token, which is late by what the chunk adds to a step | others |
//! | `transfer_wait`, `transfer` | [`crate::links`]; a handoff's as far as it shows after the prefill ([`overlap`]) | it |
//! | `decode_queue_wait` | as `queue_wait`, at the decode engine | it |
//! | `room_wait` | `over / used · A · ITL`: until so many of the others end, who have `A` tokens of answer on average; `used` are the tokens of KV in use on the engine that answers, `over` by how many they and the prompt exceed [`ROOM`] of what its cache takes | it |
//! | `first_step` | `a + (d + e·(B+1) + f·(Σctx+ctx))`: the second request and its step | it |
//! | `decode` | `(T-1) · (d + e·(B+1) + f·(Σctx+ctx)) / (1-share)`, `share` of the engine's time going to prefills | it |
//! | `decode_batch` | `B · (T-1) · (e + f·ctx)`: what one more sequence adds to each step of the others | others |
//! | `second_copy` | [`SHARERS`]` · (prefill - prefill after P)`, at most [`MOST_SECOND_COPY_SECONDS`]; `P` are the most prompt tokens that an engine holds which may take part. For `m` tokens of KV that are on this engine too then, with `c = reused·b·m`: `c · (1 + B + Q)`, and `B · promise · (risk(itl) with c - without)`; `Q` are prompts that are queued there | those to come |
//! | `slo_risk` | `promise · (risk(ttft) + risk(itl), at most 1, + B · what it adds to risk(itl) of the others)`; see below | it, others |
//!
//! That a step that mixes prefill and decode costs about the sum of its parts, one pass over the weights less, and that chunked prefill
//! stalls every decoding sequence, is how Sarathi-Serve (Agrawal et al., OSDI 2024) describes it, and DistServe (Zhong et al., OSDI 2024) why splitting helps. Time to
//! first token as the sum of queue, transfer and prefill is Mooncake's (Qin et al., FAST 2025); what others lose is ours to add.
//!
//! # Leaving a prefix
//! Whoever leaves the engine that holds its prefix for one where less goes on gains its own seconds at once. What that costs comes
//! later: an engine computed what another one had, in time that was to be shared by those to come, and the second copy took the
//! room of other blocks, which are computed anew in their turn. Without `second_copy` a fleet with engines to spare gives up a
//! prefix for however little. It is bounded, so that no request waits long for a prefix where an engine is free.
//!
//! Any second copy takes room, computed, pulled or handed over: what it displaces was cached, and a part of it will be wanted again and computed anew. That part is
//! `reused`, the share of all prompts' tokens that are found cached: of all the times that a block is computed or found, so many are followed by one more at which it is
//! found. (What is displaced was not wanted for the longest time, so it is less; how much less is not known.) The time for it is taken from
//! whoever is served here, which is priced as if it were computed now: at an engine with little to do a copy costs next to nothing, at one that hardly keeps the SLOs
//! it costs a multiple of the prefill. Where prompts have nothing in common, it costs nothing.
//!
//! # Pulls
//! Blocks that are merely cached cannot be kept from being evicted, so the source is asked for one token behind them, which
//! makes it hold them. Meanwhile the request's turn comes at its own engine, which only then asks for the blocks; so the two queues
//! run at once, and the transfer comes behind both. What one token at the source costs the sequences there is not counted.
//!
//! # Both SLOs
//! A request that misses an SLO has waited in vain for what was promised to it: `promise` seconds, the SLO of its first token and that
//! of each token of an answer as long as answers are on average. A plan is charged that for every request that is likely to miss because
//! of it, times how likely that is. What is predicted may turn out up to [`SPREAD`] of the SLO higher or lower; so `risk` is 0 below
//! `1 - SPREAD` of the SLO, 1 above `1 + SPREAD` of it, and linear between.
//! Where a miss is certain on any way, it is charged on any way, and the other terms decide.
//!
//! The time to first token is the sum of the request's own terms up to it, `room_wait` included. The inter-token latency (ITL) is a mean over the output:
//! `decode / (T-1)`, and the prompts that are queued on the engine spread over `T`. For those that decode there already these are all that
//! are queued, before and with the request's own; for a handoff's, all that are queued on its decode engine; for a request whose
//! prompt is computed on the same engine, those that come behind it while it waits, `share` of its queue. [`Priced::late_seconds`] says
//! by how much the request itself is predicted to miss.

pub mod overlap;
mod pricing;

use serde::{Deserialize, Serialize};

pub(crate) use self::pricing::{DecodeSums, Fetch, Key, Moving, PrefillSums, Pricing, Sender};

/// Output assumed of a request where no answer of its model was seen yet.
pub const EXPECTED_OUTPUT_TOKENS: f64 = 128.0;

/// What a predicted TTFT or ITL may be off by, as a part of the SLO. An assumption.
pub const SPREAD: f64 = 0.25;

/// The part of a KV cache that is used before a request is expected to wait for room: those that are there will grow. An assumption.
pub const ROOM: f64 = 0.9;

/// Sequences that share an engine's time where a fleet is busy: each of them waits for a second that it loses. An assumption: on
/// the Mooncake conversation trace it keeps the hit rate of ten engines within a point of one common cache's, and 4 does not.
pub const SHARERS: f64 = 8.0;

/// The most that a second copy of a prefix is charged, seconds.
pub const MOST_SECOND_COPY_SECONDS: f64 = 2.0;

/// A named part of the cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Term {
    /// Prompts that the prefill engine computes first; for a pull, those of the source where they take longer.
    QueueWait,
    /// Pull: what makes the source hold its cached blocks, as far as the queue does not hide it.
    Hold,
    /// What decoding sequences add to the prefill's steps.
    MixedSteps,
    /// Prefill of the tokens that the prefill engine does not hold.
    Prefill,
    /// What that prefill adds to the sequences that already decode there, summed over them.
    DecodeStall,
    /// Handoff and pull: what is queued before it on the link or at its ends.
    TransferWait,
    /// Handoff and pull: blocks that the destination does not hold, over the link.
    Transfer,
    /// Handoff: prompts that the decode engine computes first.
    DecodeQueueWait,
    /// Sequences that end first, so that its KV finds room on the engine that answers.
    RoomWait,
    /// Handoff: the second request, and its one step.
    FirstStep,
    /// The request's own decode steps.
    Decode,
    /// What the request adds to the decode steps of the sequences beside it, summed over them.
    DecodeBatch,
    /// What it takes from those to come that blocks which another engine holds are on this one too.
    SecondCopy,
    /// What was promised to it and to the sequences beside it, times how likely it is missed because of this plan.
    SloRisk,
}

impl Term {
    /// All terms, in the order in which they happen to a handoff; a pull's transfer comes before its prefill.
    pub const ALL: [Term; 14] = [
        Term::QueueWait,
        Term::Hold,
        Term::MixedSteps,
        Term::Prefill,
        Term::DecodeStall,
        Term::TransferWait,
        Term::Transfer,
        Term::DecodeQueueWait,
        Term::RoomWait,
        Term::FirstStep,
        Term::Decode,
        Term::DecodeBatch,
        Term::SecondCopy,
        Term::SloRisk,
    ];

    /// Its name in explanations.
    pub fn name(self) -> &'static str {
        match self {
            Term::QueueWait => "queue_wait",
            Term::Hold => "hold",
            Term::MixedSteps => "mixed_steps",
            Term::Prefill => "prefill",
            Term::DecodeStall => "decode_stall",
            Term::TransferWait => "transfer_wait",
            Term::Transfer => "transfer",
            Term::DecodeQueueWait => "decode_queue_wait",
            Term::RoomWait => "room_wait",
            Term::FirstStep => "first_step",
            Term::Decode => "decode",
            Term::DecodeBatch => "decode_batch",
            Term::SecondCopy => "second_copy",
            Term::SloRisk => "slo_risk",
        }
    }
}

/// Seconds of every term; those that do not occur are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Terms([f64; Term::ALL.len()]);

impl Terms {
    /// One term's seconds.
    pub fn get(&self, term: Term) -> f64 {
        self.0[term as usize]
    }

    pub(crate) fn set(&mut self, term: Term, seconds: f64) {
        debug_assert!(seconds.is_finite() && seconds >= 0.0, "{term:?}: {seconds}");
        self.0[term as usize] = seconds;
    }

    /// The terms that occur, in the order of [`Term::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Term, f64)> + '_ {
        Term::ALL.into_iter().map(|term| (term, self.get(term))).filter(|(_, seconds)| *seconds > 0.0)
    }

    /// Their sum.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }
}

/// A way to serve a request. Engines are named by their place in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum Plan {
    /// All on one engine.
    Colocated {
        /// Where.
        engine: u32,
    },
    /// All on one engine whose role is decode and which holds a part of the prompt: a later turn, of which it computes
    /// the new tail beside its decoding sequences. Runs like [`Plan::Colocated`].
    Append {
        /// Where.
        engine: u32,
    },
    /// A cached prefix is fetched from one engine, and the rest computed on another, which answers.
    Pull {
        /// Who holds the prefix.
        source: u32,
        /// Who computes and answers.
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
    /// `colocated`, `append`, `pull` or `disaggregated`.
    pub fn mode(self) -> &'static str {
        match self {
            Plan::Colocated { .. } => "colocated",
            Plan::Append { .. } => "append",
            Plan::Pull { .. } => "pull",
            Plan::Disaggregated { .. } => "disaggregated",
        }
    }

    /// The engine that computes the prompt.
    pub fn prefill(self) -> u32 {
        match self {
            Plan::Colocated { engine } | Plan::Append { engine } | Plan::Pull { engine, .. } => engine,
            Plan::Disaggregated { prefill, .. } => prefill,
        }
    }

    /// The engine that answers.
    pub fn decode(self) -> u32 {
        match self {
            Plan::Colocated { engine } | Plan::Append { engine } | Plan::Pull { engine, .. } => engine,
            Plan::Disaggregated { decode, .. } => decode,
        }
    }

    /// Who sends blocks, and to whom.
    pub fn transfer(self) -> Option<(u32, u32)> {
        match self {
            Plan::Colocated { .. } | Plan::Append { .. } => None,
            Plan::Pull { source, engine } => Some((source, engine)),
            Plan::Disaggregated { prefill, decode } => Some((prefill, decode)),
        }
    }
}

/// What is promised to a request; `None` where nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// From its arrival here to its first token, seconds.
    pub ttft_seconds: Option<f64>,
    /// Between tokens after the first, mean over the output, seconds.
    pub itl_seconds: Option<f64>,
}

/// A plan and its predicted cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Priced {
    /// The plan.
    pub plan: Plan,
    /// Its cost.
    pub terms: Terms,
    /// What it adds to the fleet's waiting: the sum of the terms, but for rounding. Plans compare by this.
    pub seconds: f64,
    /// Predicted time to the first token.
    pub ttft_seconds: f64,
    /// Predicted mean time between its tokens.
    pub itl_seconds: f64,
    /// By how much it is predicted to miss its SLOs: its first token, and all others together. 0 where it meets them, or has none.
    pub late_seconds: f64,
    /// Prompt tokens that the prefill engine holds already, or pulls.
    pub hit_tokens: u64,
    /// Prompt tokens that it computes.
    pub uncached_tokens: u64,
    /// Bytes that cross a link.
    pub transfer_bytes: u64,
    /// What they take, waiting included and whatever of it the prefill hides.
    pub transfer_seconds: f64,
    /// A handoff's: for how long before its prefill ends KV can leave; 0 for a prompt of one chunk. `None` where it leaves only when all of the
    /// prompt is computed, and of other plans.
    pub early_seconds: Option<f64>,
    /// What computing takes the prefill engine: what to reserve there.
    pub prefill_seconds: f64,
}
