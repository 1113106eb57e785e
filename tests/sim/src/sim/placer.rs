//! Who decides where requests run.

use std::sync::Arc;

use crate::Nanos;
use crate::engine::events::KvEvents;

/// A way to serve a request. Engines are numbered in the fleet's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// All on one engine.
    Colocated {
        /// Where.
        engine: u32,
    },
    /// What one engine has cached of the prompt is copied to another, which does the rest.
    Pull {
        /// Who has it.
        source: u32,
        /// Who answers.
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
    /// The engine that computes the prompt.
    pub fn prefill(self) -> u32 {
        match self {
            Plan::Colocated { engine } | Plan::Pull { engine, .. } => engine,
            Plan::Disaggregated { prefill, .. } => prefill,
        }
    }

    /// The engine that answers.
    pub fn decode(self) -> u32 {
        match self {
            Plan::Colocated { engine } | Plan::Pull { engine, .. } => engine,
            Plan::Disaggregated { decode, .. } => decode,
        }
    }

    /// Who sends blocks, and to whom.
    pub fn transfer(self) -> Option<(u32, u32)> {
        match self {
            Plan::Colocated { .. } => None,
            Plan::Pull { source, engine } => Some((source, engine)),
            Plan::Disaggregated { prefill, decode } => Some((prefill, decode)),
        }
    }
}

/// When the second part of a handoff is sent while the first one computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// So long after the first part was let in, unless that is over before.
    pub after: Nanos,
    /// What it may fetch for longer than another one, since not all is computed when it begins to.
    pub more_time: Nanos,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is sent on this way; the second part of it when the first one is over.
    Goes(Plan),
    /// It is sent on this way, a handoff whose second part need not wait for the end of the first.
    Overlaps(Plan, Overlap),
    /// It waits until it is its [`Turn`].
    Waits,
    /// It is turned away.
    Refused,
}

/// Whose turn it is among requests that wait. They go by their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// This one is placed again.
    Again(u32),
    /// This one is turned away: its time is over, or a more urgent one took its place.
    Refused(u32),
}

/// A request that is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Names it until it has ended; may be used again afterwards.
    pub key: u32,
    /// Counts requests from 0.
    pub number: u64,
    /// The session that it is a turn of.
    pub session: Option<u64>,
    /// When it arrived; it may be placed again later.
    pub arrived: Nanos,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Ids of the prompt's whole blocks.
    pub blocks: &'a [u64],
    /// Tokens that it will generate. Only a clairvoyant may look at this.
    pub output_tokens: u32,
    /// Ids of the blocks of prompt and output. Only a clairvoyant may look at those of the output.
    pub all_blocks: &'a Arc<[u64]>,
    /// Engines that failed it.
    pub avoid: &'a [u32],
}

/// An engine's own report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadReport {
    /// Requests that wait to be let in.
    pub waiting: u32,
    /// Sequences that run.
    pub running: u32,
    /// The share of its blocks that somebody uses.
    pub kv_usage: f64,
}

/// What is heard of an engine besides its load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It died: its connections broke, and nothing is cached there any more.
    Died,
    /// It could not be reached.
    Refused,
    /// It is back, in another life, with nothing cached.
    Back,
}

/// Where a request has come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// Handoff: the second part was sent before the first one was over.
    Sent,
    /// Handoff: the prefill engine has computed the prompt and holds its blocks.
    Prefilled,
    /// Blocks went from one engine to another.
    Transferred {
        /// Who sent.
        source: u32,
        /// Who received.
        destination: u32,
        /// How much.
        bytes: u64,
        /// From the first message to the confirmation.
        seconds: f64,
        /// A round trip.
        rtt_seconds: f64,
    },
    /// They were still on their way when the time for it was over.
    GivenUp {
        /// Who sent.
        source: u32,
        /// Who received.
        destination: u32,
        /// How much had come.
        bytes: u64,
        /// For how long any were on their way.
        seconds: f64,
    },
    /// The client has the first token.
    FirstToken,
    /// The client has the last token.
    Finished {
        /// How many were generated.
        tokens: u32,
        /// Tokens of the prompt that the engine that computed it had cached, as its usage report says.
        cached_tokens: u32,
    },
    /// The first part failed: the engine that answers is sent all of the request.
    FellBack,
    /// The engine that answers failed it. It is over, or placed again at once.
    Failed,
}

/// Decides, from what a coordinator can see: delayed events of blocks, load reports as of their time, and what it remembers of
/// its own decisions. Nothing else of the simulation is visible to it. Calls come in order of time.
pub trait Placer {
    /// What becomes of the request.
    fn place(&mut self, now: Nanos, request: &Request<'_>) -> Answer;

    /// Whose turn it is: to be asked at [`Placer::next_turn`] and whenever a request has ended or waits, until it is nobody's.
    fn turn(&mut self, _now: Nanos) -> Option<Turn> {
        None
    }

    /// When it will be somebody's turn, if somebody waits and nothing ends before.
    fn next_turn(&self) -> Option<Nanos> {
        None
    }

    /// Whether [`Placer::kv_events`] is to be called. Leaving that out makes a run faster.
    fn wants_kv_events(&self) -> bool {
        false
    }

    /// An engine's cache changed a while ago. All that is due comes before the next [`Placer::place`].
    fn kv_events(&mut self, _now: Nanos, _engine: u32, _events: &KvEvents) {}

    /// An engine reports its load.
    fn load(&mut self, _now: Nanos, _engine: u32, _report: &LoadReport) {}

    /// All engines that can have reported their load.
    fn loads_reported(&mut self, _now: Nanos) {}

    /// Something is heard of an engine.
    fn health(&mut self, _now: Nanos, _engine: u32, _health: Health) {}

    /// A request that was placed comes along.
    fn progress(&mut self, _now: Nanos, _key: u32, _progress: &Progress) {}
}
