//! What the demo found, mode by mode.

use std::time::Duration;

use baton_fleet::Policy;
use hdrhistogram::Histogram;
use serde::Serialize;

use super::client::Outcome;
use super::workload::Kind;
use crate::explanation::{bytes, milliseconds};
use crate::table::Table;

/// One mode's figures.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) ttft_ms: Percentiles,
    pub(crate) itl_ms: Percentiles,
    /// Prompt tokens that no engine had to compute, because one had them in its cache.
    pub(crate) hit_tokens: u64,
    /// KV that agents received.
    pub(crate) bytes_moved: u64,
    pub(crate) requests: u64,
    /// Requests without a whole answer, or with another answer than in the first mode.
    pub(crate) failures: u64,
    #[serde(skip)]
    pub(crate) prompt_tokens: u64,
    #[serde(skip)]
    pub(crate) handoffs: u64,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Counters of the fleet's processes that a mode is measured by.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Prompt tokens that engines computed.
    pub(crate) computed_tokens: f64,
    /// Bytes that agents received.
    pub(crate) received_bytes: f64,
}

impl Figures {
    /// Figures of a mode from its outcomes, the texts that the first mode answered, and how far the counters went.
    pub(crate) fn new(outcomes: &[Outcome], expected: Option<&[Outcome]>, went: Counters) -> Self {
        let mut ttft = histogram();
        let mut itl = histogram();
        let (mut prompt_tokens, mut failures, mut handoffs) = (0, 0, 0);
        for (at, outcome) in outcomes.iter().enumerate() {
            let Ok(answer) = &outcome.result else {
                failures += 1;
                continue;
            };
            let other = expected.and_then(|outcomes| outcomes[at].result.as_ref().ok());
            if other.is_some_and(|other| other.text != answer.text) {
                failures += 1;
            }
            record(&mut ttft, answer.ttft);
            answer.gaps.iter().for_each(|gap| record(&mut itl, *gap));
            prompt_tokens += answer.prompt_tokens;
            let chosen = answer.explanation.as_ref().and_then(|explanation| explanation.options.first());
            handoffs += u64::from(chosen.is_some_and(|option| option.prefill != option.decode));
        }
        Self {
            ttft_ms: percentiles(&ttft),
            itl_ms: percentiles(&itl),
            hit_tokens: prompt_tokens.saturating_sub(went.computed_tokens as u64),
            bytes_moved: went.received_bytes as u64,
            requests: outcomes.len() as u64,
            failures,
            prompt_tokens,
            handoffs,
        }
    }
}

impl std::ops::Sub for Counters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            computed_tokens: self.computed_tokens - earlier.computed_tokens,
            received_bytes: self.received_bytes - earlier.received_bytes,
        }
    }
}

/// Microseconds up to ten minutes, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("the bounds are sound")
}

fn record(histogram: &mut Histogram<u64>, value: Duration) {
    histogram.saturating_record(u64::try_from(value.as_micros()).unwrap_or(u64::MAX).max(1));
}

fn percentiles(histogram: &Histogram<u64>) -> Percentiles {
    // To a tenth of a millisecond; what is below is the clock's.
    let at = |quantile| (histogram.value_at_quantile(quantile) as f64 / 100.0).round() / 10.0;
    Percentiles { p50: at(0.5), p99: at(0.99) }
}

/// The modes beside each other.
pub(crate) fn table(modes: &[(Policy, Figures)]) -> Table {
    let mut table = Table::new(
        &[
            "mode",
            "TTFT p50 ms",
            "p99",
            "ITL p50 ms",
            "p99",
            "hit tokens",
            "of",
            "moved",
            "handoffs",
            "requests",
            "failures",
        ],
        &[],
    );
    for (policy, figures) in modes {
        table.row(vec![
            policy.as_str().to_owned(),
            milliseconds(figures.ttft_ms.p50),
            milliseconds(figures.ttft_ms.p99),
            milliseconds(figures.itl_ms.p50),
            milliseconds(figures.itl_ms.p99),
            figures.hit_tokens.to_string(),
            figures.prompt_tokens.to_string(),
            bytes(figures.bytes_moved),
            figures.handoffs.to_string(),
            figures.requests.to_string(),
            figures.failures.to_string(),
        ]);
    }
    table
}

/// Why a few requests went where they went: of each kind a first and a later one.
pub(crate) fn choices(outcomes: &[Outcome]) -> Vec<String> {
    let mut lines = Vec::new();
    for kind in [Kind::Chat, Kind::Agent, Kind::Document] {
        for first in [true, false] {
            let explained = outcomes.iter().find_map(|outcome| {
                let wanted = outcome.kind == kind && (outcome.turn == 0) == first;
                let explanation = outcome.result.as_ref().ok()?.explanation.as_ref()?;
                (wanted && !explanation.options.is_empty()).then_some((outcome.turn, explanation))
            });
            let Some((turn, explanation)) = explained else { continue };
            let best = &explanation.options[0];
            lines.push(format!(
                "{}, request {}, {} prompt tokens",
                kind.name(),
                turn + 1,
                explanation.prompt_tokens
            ));
            lines.push(format!("    chosen  {}", best.line()));
            // The best option of the other mode says more than the same mode on the engine next door.
            if let Some(other) = explanation.options.iter().find(|option| option.mode != best.mode) {
                let reason = other.why_not.as_deref().unwrap_or("no reason given");
                lines.push(format!("    not     {}", other.line()));
                lines.push(format!("            {reason}"));
            } else if let Some(reason) = &explanation.not_splittable {
                lines.push(format!("    no handoff: {reason}"));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::client::Answer;

    fn outcome(text: &str, ttft_ms: u64) -> Outcome {
        let gaps = vec![Duration::from_millis(20), Duration::from_millis(30)];
        let ttft = Duration::from_millis(ttft_ms);
        let answer = Answer { text: text.into(), ttft, gaps, prompt_tokens: 100, explanation: None };
        Outcome { kind: Kind::Chat, turn: 0, result: Ok(answer) }
    }

    #[test]
    fn failures_are_counted_and_left_out_of_the_times() {
        let first = [outcome("a", 10), outcome("b", 20), outcome("c", 30)];
        let mut second = first.clone();
        second[0] = outcome("x", 10);
        second[2].result = Err("lost".into());
        let went = Counters { computed_tokens: 150.0, received_bytes: 77.0 };
        let figures = Figures::new(&second, Some(&first), went);
        assert_eq!((figures.requests, figures.failures), (3, 2));
        assert_eq!((figures.prompt_tokens, figures.hit_tokens, figures.bytes_moved), (200, 50, 77));
        assert_eq!((figures.ttft_ms.p50, figures.ttft_ms.p99), (10.0, 20.0));
        assert_eq!((figures.itl_ms.p50, figures.itl_ms.p99), (20.0, 30.0));
        assert_eq!(Figures::new(&first, Some(&first), went).failures, 0);
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let figures = Figures::new(&[outcome("a", 10)], None, Counters::default());
        let json = serde_json::to_value(figures).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["ttft_ms", "itl_ms", "hit_tokens", "bytes_moved", "requests", "failures"]);
        assert_eq!(json["ttft_ms"]["p99"], 10.0);
    }
}
