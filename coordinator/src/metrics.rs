//! What `/metrics` shows. Families are registered once; the handles that requests use are resolved here, so
//! that no request looks a label set up.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use baton_coordinator_core::accuracy::TermAccuracy;
use baton_coordinator_core::cost::Term;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// How a request was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// On one engine.
    Colocated,
    /// On one engine, behind a prefix that it pulled from another.
    Pull,
    /// On two.
    Disaggregated,
    /// Not at all.
    None,
}

impl Mode {
    const ALL: [Mode; 4] = [Mode::Colocated, Mode::Pull, Mode::Disaggregated, Mode::None];

    /// Its label.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Colocated => "colocated",
            Mode::Pull => "pull",
            Mode::Disaggregated => "disaggregated",
            Mode::None => "none",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The engine answered, to the end.
    Ok,
    /// The engine refused it (4xx), and so did we.
    EngineRefused,
    /// We refused it.
    Refused,
    /// Every engine that was tried failed, or the answer broke off.
    Failed,
    /// No engine could serve it.
    NoEngine,
    /// No engine had room for it in time.
    NoRoom,
    /// The client went away.
    Cancelled,
}

impl Outcome {
    const ALL: [Outcome; 7] = [
        Outcome::Ok,
        Outcome::EngineRefused,
        Outcome::Refused,
        Outcome::Failed,
        Outcome::NoEngine,
        Outcome::NoRoom,
        Outcome::Cancelled,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::EngineRefused => "engine_refused",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
            Outcome::NoEngine => "no_engine",
            Outcome::NoRoom => "no_room",
            Outcome::Cancelled => "cancelled",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    mode: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabel {
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TermLabel {
    term: &'static str,
    of: &'static str,
}

type SecondsGauge = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// A counter for each of a fixed set of reasons.
#[derive(Clone, Debug)]
pub struct Reasons(Family<ReasonLabel, Counter>);

impl Reasons {
    /// Counts one. `reason` must be one of a fixed set of words.
    pub fn inc(&self, reason: &'static str) {
        self.0.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// How often that was counted.
    pub fn get(&self, reason: &'static str) -> u64 {
        self.0.get_or_create(&ReasonLabel { reason }).get()
    }
}

/// All handles.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: [[Counter; 7]; 4],
    ttft: [Histogram; 3],
    /// Engines whose agent was heard from within its lease.
    pub engines_healthy: Gauge,
    /// Engines whose agent was not.
    pub engines_unhealthy: Gauge,
    /// Engines that only decode for the time being, by the planner.
    pub engines_decode_only: Gauge,
    /// Memberships in the index.
    pub index_blocks: Gauge,
    /// Memberships that the index's cap kept out.
    pub index_dropped: Gauge,
    /// Handoffs and pulls that went on without a plan.
    pub handoff_fallbacks: Reasons,
    /// Handoffs whose answer was asked for while the prompt was computed.
    pub handoffs_overlapped: Counter,
    /// By term: the running means of what was seen, of the error of predictions, and of its size.
    predictions: [[SecondsGauge; 3]; Term::ALL.len()],
    /// Requests that had to wait for room.
    pub waited: Counter,
    /// Attempts on a further engine.
    pub retries: Counter,
    /// Requests placed without knowing their tokens.
    pub untokenised: Reasons,
    /// Rendering and tokenising, in seconds, waiting for a thread included.
    pub tokenize_seconds: Histogram,
    /// Prompts of which an engine counted other tokens than we did.
    pub token_mismatches: Counter,
    /// Prompt tokens of placed requests.
    pub prompt_tokens: Counter,
    /// Those that the chosen engine was predicted to hold, or to pull.
    pub hit_tokens: Counter,
    /// Event batches applied.
    pub batches_applied: Counter,
    /// Event batches that were seen before.
    pub batches_repeated: Counter,
    /// Event batches after a gap; each asked for a resync.
    pub batches_gap: Counter,
    /// Writes to the store that failed; they are tried again.
    pub store_errors: Counter,
    /// Buckets of ownership that wait to be written.
    pub store_dirty_buckets: Gauge,
    /// Transfers that agents reported as completed.
    pub transfers_completed: Counter,
    /// Transfers that agents reported as failed.
    pub transfers_failed: Counter,
    /// Holds that agents reported as expired.
    pub transfers_expired: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers all families.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("baton");

        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "Requests by mode and outcome", requests.clone());
        let ttft = Family::<ModeLabel, Histogram>::new_with_constructor(latency);
        registry.register(
            "ttft_seconds",
            "From the whole request's arrival to the first byte of its answer, streams only",
            ttft.clone(),
        );
        let engines = Family::<StateLabel, Gauge>::default();
        registry.register("engines", "Registered engines by state", engines.clone());
        let engines_decode_only = Gauge::default();
        registry.register(
            "engines_decode_only",
            "Engines that only decode for the time being, because rehearsals of the last requests say so",
            engines_decode_only.clone(),
        );
        let index_blocks = Gauge::default();
        registry.register(
            "index_blocks",
            "Blocks in the index, counted once for each owner",
            index_blocks.clone(),
        );
        let index_dropped = Gauge::default();
        registry.register("index_dropped", "Blocks that the index's cap kept out", index_dropped.clone());
        let handoff_fallbacks = Reasons(Family::default());
        registry.register(
            "handoff_fallbacks",
            "Handoffs and pulls that went on without a plan, the engine that answers computing",
            handoff_fallbacks.0.clone(),
        );
        let handoffs_overlapped = Counter::default();
        registry.register(
            "handoffs_overlapped",
            "Handoffs whose answer was asked for while the prompt was computed",
            handoffs_overlapped.clone(),
        );
        let predictions = Family::<TermLabel, SecondsGauge>::default();
        registry.register(
            "prediction_seconds",
            "Terms of the cost model: running means of what was seen, its difference to what was predicted, and the size of that",
            predictions.clone(),
        );
        let waited = Counter::default();
        registry.register("waited", "Requests that had to wait for room at an engine", waited.clone());
        let retries = Counter::default();
        registry.register("retries", "Attempts on a further engine after one failed", retries.clone());
        let untokenised = Reasons(Family::default());
        registry.register(
            "untokenised",
            "Requests placed by load alone, because their tokens are not known",
            untokenised.0.clone(),
        );
        let tokenize_seconds = latency();
        registry.register("tokenize_seconds", "Rendering and tokenising a prompt", tokenize_seconds.clone());
        let token_mismatches = Counter::default();
        registry.register(
            "token_mismatches",
            "Prompts of which an engine counted other tokens than the coordinator",
            token_mismatches.clone(),
        );
        let prompt_tokens = Counter::default();
        registry.register("prompt_tokens", "Prompt tokens of placed requests", prompt_tokens.clone());
        let hit_tokens = Counter::default();
        registry.register(
            "hit_tokens",
            "Prompt tokens predicted to be cached or pulled where placed",
            hit_tokens.clone(),
        );
        let batches = Family::<ResultLabel, Counter>::default();
        registry.register("event_batches", "Event batches from agents", batches.clone());
        let store_errors = Counter::default();
        registry.register("store_errors", "Failed writes to the ownership store", store_errors.clone());
        let store_dirty_buckets = Gauge::default();
        registry.register(
            "store_dirty_buckets",
            "Buckets of ownership that wait to be written",
            store_dirty_buckets.clone(),
        );
        let transfers = Family::<ResultLabel, Counter>::default();
        registry.register("transfers", "Transfers as agents reported them", transfers.clone());

        let result = |family: &Family<ResultLabel, Counter>, result| {
            family.get_or_create(&ResultLabel { result }).clone()
        };
        let state = |state| engines.get_or_create(&StateLabel { state }).clone();
        Self {
            requests: Mode::ALL.map(|mode| {
                Outcome::ALL.map(|outcome| {
                    let labels = RequestLabels { mode: mode.as_str(), outcome: outcome.as_str() };
                    requests.get_or_create(&labels).clone()
                })
            }),
            ttft: [Mode::Colocated, Mode::Pull, Mode::Disaggregated]
                .map(|mode| ttft.get_or_create(&ModeLabel { mode: mode.as_str() }).clone()),
            engines_healthy: state("healthy"),
            engines_unhealthy: state("unhealthy"),
            engines_decode_only,
            index_blocks,
            index_dropped,
            handoff_fallbacks,
            handoffs_overlapped,
            predictions: Term::ALL.map(|term| {
                ["seen", "error", "absolute_error"]
                    .map(|of| predictions.get_or_create(&TermLabel { term: term.name(), of }).clone())
            }),
            waited,
            retries,
            untokenised,
            tokenize_seconds,
            token_mismatches,
            prompt_tokens,
            hit_tokens,
            batches_applied: result(&batches, "applied"),
            batches_repeated: result(&batches, "repeated"),
            batches_gap: result(&batches, "gap"),
            store_errors,
            store_dirty_buckets,
            transfers_completed: result(&transfers, "completed"),
            transfers_failed: result(&transfers, "failed"),
            transfers_expired: result(&transfers, "expired"),
            registry: Mutex::new(registry),
        }
    }

    /// Counts a finished request.
    pub fn request(&self, mode: Mode, outcome: Outcome) {
        self.requests[mode as usize][outcome as usize].inc();
    }

    /// How many requests ended so.
    pub fn requests(&self, mode: Mode, outcome: Outcome) -> u64 {
        self.requests[mode as usize][outcome as usize].get()
    }

    /// Takes a time to first token.
    pub fn first_token(&self, mode: Mode, seconds: f64) {
        if let Some(histogram) = self.ttft.get(mode as usize) {
            histogram.observe(seconds);
        }
    }

    /// A term was measured: how well it is predicted now.
    pub fn predicted(&self, term: Term, accuracy: &TermAccuracy) {
        let [seen, error, absolute_error] = &self.predictions[term as usize];
        seen.set(accuracy.observed_seconds);
        error.set(accuracy.error_seconds);
        absolute_error.set(accuracy.absolute_error_seconds);
    }

    /// The text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().expect("encoding does not panic");
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_dashboards_know_them() {
        let metrics = Metrics::new();
        metrics.request(Mode::Disaggregated, Outcome::Ok);
        metrics.request(Mode::Pull, Outcome::Cancelled);
        metrics.first_token(Mode::Pull, 0.1);
        metrics.handoff_fallbacks.inc("no_hold");
        metrics.first_token(Mode::Colocated, 0.1);
        metrics.first_token(Mode::None, 0.1);
        let text = metrics.encode();
        for line in [
            "baton_requests_total{mode=\"disaggregated\",outcome=\"ok\"} 1",
            "baton_requests_total{mode=\"pull\",outcome=\"cancelled\"} 1",
            "baton_ttft_seconds_count{mode=\"pull\"} 1",
            "baton_ttft_seconds_count{mode=\"disaggregated\"} 0",
            "baton_handoff_fallbacks_total{reason=\"no_hold\"} 1",
            "baton_ttft_seconds_count{mode=\"colocated\"} 1",
            "baton_retries_total 0",
            "baton_engines{state=\"healthy\"} 0",
            "baton_index_blocks 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
