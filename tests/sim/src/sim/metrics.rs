//! What a run measures.

use hdrhistogram::Histogram;
use serde::Serialize;

use super::placer::Plan;
use crate::fleet::Slo;
use crate::trace::Rows;
use crate::{MILLISECOND, Nanos, seconds};

/// Points of a [`Timeline`] at most.
const MOST_POINTS: usize = 256;

/// Durations: a histogram in microseconds with three significant digits, and their exact sum. Memory does not grow with their number.
#[derive(Clone, Debug)]
pub struct Durations {
    histogram: Histogram<u64>,
    sum: u128,
}

impl Default for Durations {
    fn default() -> Self {
        Self { histogram: Histogram::new(3).expect("three digits are allowed"), sum: 0 }
    }
}

impl Durations {
    /// One more.
    pub fn record(&mut self, duration: Nanos) {
        self.record_n(duration, 1);
    }

    /// So many more.
    pub fn record_n(&mut self, duration: Nanos, count: u64) {
        // The histogram grows as it needs to: every value fits.
        self.histogram.record_n((duration + 500) / 1000, count).expect("it resizes");
        self.sum += u128::from(duration) * u128::from(count);
    }

    /// The histogram, in microseconds: for distributions.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }

    /// Their mean; 0 where there are none.
    pub fn mean_seconds(&self) -> f64 {
        match self.histogram.len() {
            0 => 0.0,
            count => self.sum as f64 / count as f64 / 1e9,
        }
    }

    /// In milliseconds.
    pub fn summary(&self) -> Summary {
        let at = |quantile: f64| self.histogram.value_at_quantile(quantile) as f64 / 1e3;
        Summary {
            count: self.histogram.len(),
            mean: self.mean_seconds() * 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            max: self.histogram.max() as f64 / 1e3,
        }
    }
}

/// A distribution in a few figures, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Summary {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Its number, counted from 0 in order of arrival.
    pub number: u64,
    /// The session that it was a turn of.
    pub session: Option<u64>,
    /// Its place there.
    pub turn: u32,
    /// When it arrived.
    pub arrived: Nanos,
    /// From there to its first token.
    pub ttft: Nanos,
    /// From its arrival to its last token.
    pub e2e: Nanos,
    /// How it was served.
    pub plan: Plan,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Those that the engine that computed it had cached.
    pub hit_tokens: u32,
    /// Tokens whose KV crossed a link.
    pub fetched_tokens: u32,
    /// Tokens that it generated.
    pub output_tokens: u32,
}

impl Outcome {
    /// Mean time between its tokens; `None` where it had one only.
    pub fn tpot(&self) -> Option<Nanos> {
        (self.output_tokens > 1).then(|| (self.e2e - self.ttft) / u64::from(self.output_tokens - 1))
    }

    /// Whether it had both that it was promised.
    pub fn within(&self, slo: &Slo) -> bool {
        self.first_token_within(slo) && self.tokens_within(slo)
    }

    /// Whether its first token came in time.
    pub fn first_token_within(&self, slo: &Slo) -> bool {
        milliseconds(self.ttft) <= slo.ttft_ms
    }

    /// Whether its other tokens came fast enough.
    pub fn tokens_within(&self, slo: &Slo) -> bool {
        self.tpot().is_none_or(|tpot| milliseconds(tpot) <= slo.tpot_ms)
    }
}

fn milliseconds(duration: Nanos) -> f64 {
    duration as f64 / MILLISECOND as f64
}

/// How the fleet was doing at a time, over the interval before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The end of the interval, seconds.
    pub seconds: f64,
    /// The share of their time that engines computed.
    pub utilisation: f64,
    /// Requests that waited on engines, at that time.
    pub waiting: u32,
    /// Sequences that ran.
    pub running: u32,
}

/// Points at even distances: when there are too many, each two become one.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    points: Vec<Point>,
    /// Samples that make a point.
    stride: u64,
    samples: u64,
    last: (Nanos, Nanos),
}

impl Default for Timeline {
    fn default() -> Self {
        Self { points: Vec::new(), stride: 1, samples: 0, last: (0, 0) }
    }
}

impl Timeline {
    /// At this time so many engines had computed for so long in all.
    pub(super) fn sample(&mut self, now: Nanos, engines: usize, busy: Nanos, waiting: u32, running: u32) {
        self.samples += 1;
        if !self.samples.is_multiple_of(self.stride) {
            return;
        }
        let (then, before) = std::mem::replace(&mut self.last, (now, busy));
        let all = (now - then) as f64 * engines as f64;
        let utilisation = (busy - before) as f64 / all.max(1.0);
        self.points.push(Point { seconds: seconds(now), utilisation, waiting, running });
        if self.points.len() == MOST_POINTS {
            self.stride *= 2;
            let pair = |pair: &[Point]| Point {
                utilisation: (pair[0].utilisation + pair[1].utilisation) / 2.0,
                ..pair[1]
            };
            self.points = self.points.chunks_exact(2).map(pair).collect();
        }
    }
}

/// Counters and distributions of a run under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) requests: u64,
    pub(super) refused: u64,
    pub(super) waited: u64,
    pub(super) too_long: u64,
    pub(super) failed: u64,
    pub(super) retried: u64,
    pub(super) lost_turns: u64,
    pub(super) failed_transfers: u64,
    pub(super) expired_holds: u64,
    pub(super) transfers: u64,
    finished: u64,
    within: u64,
    late_first_token: u64,
    slow_tokens: u64,
    prompt_tokens: u64,
    hit_tokens: u64,
    fetched_tokens: u64,
    output_tokens: u64,
    plans: Plans,
    pub(super) end: Nanos,
    pub(super) distributions: Distributions,
    pub(super) timeline: Timeline,
}

/// How requests were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plans {
    /// On one engine.
    pub colocated: u64,
    /// On one engine, after a pull.
    pub pull: u64,
    /// On two.
    pub disaggregated: u64,
}

/// All distributions of a run.
#[derive(Clone, Debug, Default)]
pub struct Distributions {
    /// Time to first token.
    pub ttft: Durations,
    /// Time between two tokens, each by itself: of all sequences, as far as they came in the window.
    pub itl: Durations,
    /// Time between two tokens, mean of each request.
    pub tpot: Durations,
    /// From arrival to last token.
    pub e2e: Durations,
}

impl Metrics {
    pub(super) fn record(&mut self, now: Nanos, outcome: &Outcome, slo: Option<&Slo>) {
        self.end = now;
        self.finished += 1;
        self.within += u64::from(slo.is_none_or(|slo| outcome.within(slo)));
        self.late_first_token += u64::from(slo.is_some_and(|slo| !outcome.first_token_within(slo)));
        self.slow_tokens += u64::from(slo.is_some_and(|slo| !outcome.tokens_within(slo)));
        self.prompt_tokens += u64::from(outcome.prompt_tokens);
        self.hit_tokens += u64::from(outcome.hit_tokens);
        self.fetched_tokens += u64::from(outcome.fetched_tokens);
        self.output_tokens += u64::from(outcome.output_tokens);
        *match outcome.plan {
            Plan::Colocated { .. } => &mut self.plans.colocated,
            Plan::Pull { .. } => &mut self.plans.pull,
            Plan::Disaggregated { .. } => &mut self.plans.disaggregated,
        } += 1;
        self.distributions.ttft.record(outcome.ttft);
        self.distributions.e2e.record(outcome.e2e);
        if let Some(tpot) = outcome.tpot() {
            self.distributions.tpot.record(tpot);
        }
    }

    /// Requests under way.
    pub(super) fn unfinished(&self) -> u64 {
        self.requests - self.finished - self.refused - self.too_long - self.failed
    }

    /// `measured`: the time in which requests were measured.
    pub(super) fn results(
        self,
        measured: Nanos,
        kv_bytes_per_token: f64,
        engines: Vec<EngineReport>,
        rows: Rows,
    ) -> Results {
        let span = seconds(measured);
        let per_second = |count: u64| if span > 0.0 { count as f64 / span } else { 0.0 };
        let share = |part: u64, whole: u64| if whole > 0 { part as f64 / whole as f64 } else { 0.0 };
        let report = Report {
            requests: self.requests,
            finished: self.finished,
            refused: self.refused,
            waited: self.waited,
            too_long: self.too_long,
            failed: self.failed,
            retried: self.retried,
            lost_turns: self.lost_turns,
            unfinished: self.unfinished(),
            seconds: seconds(self.end),
            measured_seconds: span,
            requests_per_second: per_second(self.finished),
            goodput_per_second: per_second(self.within),
            attainment: share(self.within, self.requests + self.lost_turns),
            late_first_token: self.late_first_token,
            slow_tokens: self.slow_tokens,
            prompt_tokens: self.prompt_tokens,
            hit_tokens: self.hit_tokens,
            hit_rate: share(self.hit_tokens, self.prompt_tokens),
            fetched_tokens: self.fetched_tokens,
            output_tokens: self.output_tokens,
            transfers: self.transfers,
            failed_transfers: self.failed_transfers,
            expired_holds: self.expired_holds,
            bytes_moved: (self.fetched_tokens as f64 * kv_bytes_per_token).round() as u64,
            plans: self.plans,
            ttft_ms: self.distributions.ttft.summary(),
            itl_ms: self.distributions.itl.summary(),
            tpot_ms: self.distributions.tpot.summary(),
            e2e_ms: self.distributions.e2e.summary(),
            engines,
            timeline: self.timeline.points,
            rows,
        };
        Results { report, distributions: self.distributions }
    }
}

/// What one engine did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EngineReport {
    /// The share of the run that it computed.
    pub utilisation: f64,
    /// The share of the run in steps that computed prompts.
    pub prefill_share: f64,
    /// Tokens of prompts that it computed.
    pub prefill_tokens: u64,
    /// Tokens of prompts that it copied from its host's memory.
    pub loaded_tokens: u64,
    /// Tokens that it generated.
    pub output_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Sequences that it preempted.
    pub preemptions: u64,
}

/// A run in figures, of the requests that were measured; what engines did and the timeline are of all the run. Equal runs are equal to the byte when
/// written as JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Requests that arrived.
    pub requests: u64,
    /// Those that were served.
    pub finished: u64,
    /// Those that the placer turned away, at once or after they had waited.
    pub refused: u64,
    /// Those that had to wait before they were sent anywhere, or turned away.
    pub waited: u64,
    /// Those that fit on no engine that they were sent to.
    pub too_long: u64,
    /// Those whose answer broke off, or that no engine could take after one had failed them.
    pub failed: u64,
    /// How often a request was sent to another engine after one had failed it.
    pub retried: u64,
    /// Requests that did not come, since an earlier one of their session was turned away or failed.
    pub lost_turns: u64,
    /// Those that were under way when the run was stopped.
    pub unfinished: u64,
    /// When the last request ended.
    pub seconds: f64,
    /// The time in which requests were measured: the window's, or until the last one ended.
    pub measured_seconds: f64,
    /// Requests served, over the measured time.
    pub requests_per_second: f64,
    /// Requests served within both SLOs, over the measured time; all that were served where there are none.
    pub goodput_per_second: f64,
    /// Requests served within both SLOs, as a share of those that arrived or were lost with their session.
    pub attainment: f64,
    /// Requests whose first token came too late.
    pub late_first_token: u64,
    /// Requests whose other tokens came too slowly.
    pub slow_tokens: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those that the engine that computed the prompt had cached.
    pub hit_tokens: u64,
    /// Their share.
    pub hit_rate: f64,
    /// Tokens whose KV crossed a link.
    pub fetched_tokens: u64,
    /// Tokens that were generated.
    pub output_tokens: u64,
    /// Transfers between engines.
    pub transfers: u64,
    /// Those that ended early, or had nothing to fetch any more: what was missing was computed.
    pub failed_transfers: u64,
    /// Held blocks that were freed because nobody fetched them in time.
    pub expired_holds: u64,
    /// Bytes that their transfers moved.
    pub bytes_moved: u64,
    /// How requests were served.
    pub plans: Plans,
    /// Time to first token.
    pub ttft_ms: Summary,
    /// Time between two tokens, each by itself.
    pub itl_ms: Summary,
    /// Time between two tokens, mean of each request.
    pub tpot_ms: Summary,
    /// From arrival to last token.
    pub e2e_ms: Summary,
    /// In the fleet's order.
    pub engines: Vec<EngineReport>,
    /// The fleet over time.
    pub timeline: Vec<Point>,
    /// The trace's rows.
    pub rows: Rows,
}

/// What a run comes to.
#[derive(Clone, Debug)]
pub struct Results {
    /// In figures.
    pub report: Report,
    /// In full.
    pub distributions: Distributions,
}
