//! What one server did, in figures.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_sim::Nanos;
use baton_sim::sim::{Distributions, Durations, Summary};
use serde::Serialize;
use serde_json::{Map, Value};

use super::ask::{Answer, Failure};

/// Failures that are kept with their reason; all are counted.
const KEPT: usize = 5;

/// What is promised to a request; what is not promised is always kept.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slo {
    pub(super) ttft_ms: Option<f64>,
    pub(super) tpot_ms: Option<f64>,
}

/// Counts and distributions of a run under way. Memory does not grow with it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    requests: u64,
    finished: u64,
    unfinished: u64,
    failed: BTreeMap<String, u64>,
    first_failures: Vec<String>,
    held_back: u64,
    under_way: u64,
    most_in_flight: u64,
    within: u64,
    late_first_token: u64,
    slow_tokens: u64,
    prompt_tokens: u64,
    hit_tokens: u64,
    /// Prompt tokens of the answers that say what was cached.
    told_tokens: u64,
    output_tokens: u64,
    answers_without_ids: u64,
    lag: Durations,
    times: Distributions,
    end: Duration,
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Tally {
    /// A request had to wait for others to end.
    pub(super) fn held_back(&mut self) {
        self.held_back += 1;
    }

    /// A request is sent, so long after it was due.
    pub(super) fn sent(&mut self, lag: Duration) {
        self.lag.record(nanos(lag));
        self.under_way += 1;
        self.most_in_flight = self.most_in_flight.max(self.under_way);
    }

    /// A request that was sent is under way no more.
    pub(super) fn ended(&mut self) {
        self.under_way -= 1;
    }

    /// A request got its whole answer, at that time of the run, and was sent so long after it was due.
    pub(super) fn answered(&mut self, at: Duration, lag: Duration, answer: &Answer, slo: Slo) {
        self.requests += 1;
        self.finished += 1;
        self.end = self.end.max(at);
        let (ttft, e2e) = (lag + answer.first, lag + answer.last);
        self.times.ttft.record(nanos(ttft));
        self.times.e2e.record(nanos(e2e));
        answer.gaps.iter().for_each(|gap| self.times.itl.record(nanos(*gap)));
        let spoken = nanos(answer.last.saturating_sub(answer.first));
        let tpot = (answer.output_tokens > 1).then(|| spoken / (answer.output_tokens - 1));
        tpot.into_iter().for_each(|tpot| self.times.tpot.record(tpot));
        let over = |time: f64, bound: Option<f64>| bound.is_some_and(|bound| time > bound);
        let late = over(ttft.as_secs_f64() * 1e3, slo.ttft_ms);
        let slow = tpot.is_some_and(|tpot| over(tpot as f64 / 1e6, slo.tpot_ms));
        self.late_first_token += u64::from(late);
        self.slow_tokens += u64::from(slow);
        self.within += u64::from(!late && !slow);
        self.prompt_tokens += answer.prompt_tokens.unwrap_or(0);
        self.output_tokens += answer.output_tokens;
        if let Some(cached) = answer.cached_tokens {
            self.hit_tokens += cached;
            self.told_tokens += answer.prompt_tokens.unwrap_or(0);
        }
    }

    /// An answer told no token ids where the next prompt goes on from them.
    pub(super) fn without_ids(&mut self) {
        self.answers_without_ids += 1;
    }

    /// A request failed, or could not be sent.
    pub(super) fn failed(&mut self, at: Duration, failure: &Failure) {
        self.requests += 1;
        self.end = self.end.max(at);
        *self.failed.entry(failure.kind.clone()).or_default() += 1;
        if self.first_failures.len() < KEPT {
            self.first_failures.push(format!("{}: {}", failure.kind, failure.detail));
        }
    }

    /// So many requests could not be sent because one before them in their session failed.
    pub(super) fn behind_a_failure(&mut self, requests: u64) {
        self.requests += requests;
        if requests > 0 {
            *self.failed.entry("after_a_failure".to_owned()).or_default() += requests;
        }
    }

    /// A request was due, and had no answer when the run was ended.
    pub(super) fn unfinished(&mut self) {
        self.requests += 1;
        self.unfinished += 1;
    }

    pub(super) fn report(&self, url: &str, model: &str) -> Report {
        let seconds = self.end.as_secs_f64();
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let share = |part: u64, whole: u64| if whole > 0 { part as f64 / whole as f64 } else { 0.0 };
        Report {
            url: url.to_owned(),
            model: model.to_owned(),
            requests: self.requests,
            finished: self.finished,
            failed: self.failed.clone(),
            first_failures: self.first_failures.clone(),
            unfinished: self.unfinished,
            held_back: self.held_back,
            most_in_flight: self.most_in_flight,
            seconds,
            requests_per_second: per_second(self.finished),
            output_tokens_per_second: per_second(self.output_tokens),
            goodput_per_second: per_second(self.within),
            attainment: share(self.within, self.requests - self.unfinished),
            late_first_token: self.late_first_token,
            slow_tokens: self.slow_tokens,
            prompt_tokens: self.prompt_tokens,
            hit_tokens: (self.told_tokens > 0).then_some(self.hit_tokens),
            hit_rate: (self.told_tokens > 0).then(|| share(self.hit_tokens, self.told_tokens)),
            output_tokens: self.output_tokens,
            answers_without_ids: self.answers_without_ids,
            ttft_ms: self.times.ttft.summary(),
            itl_ms: self.times.itl.summary(),
            tpot_ms: self.times.tpot.summary(),
            e2e_ms: self.times.e2e.summary(),
            lag_ms: self.lag.summary(),
        }
    }
}

/// What one server did.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) url: String,
    pub(super) model: String,
    /// Requests that were due.
    pub(super) requests: u64,
    /// Those with a whole answer; all figures but the counts are of these.
    pub(super) finished: u64,
    /// Those without, by what happened.
    pub(super) failed: BTreeMap<String, u64>,
    #[serde(skip)]
    pub(super) first_failures: Vec<String>,
    /// Those under way when the run was ended early.
    pub(super) unfinished: u64,
    /// Requests that were due while as many as may be were under way; they waited.
    pub(super) held_back: u64,
    pub(super) most_in_flight: u64,
    /// From the run's start to the end of its last request.
    pub(super) seconds: f64,
    pub(super) requests_per_second: f64,
    pub(super) output_tokens_per_second: f64,
    /// Requests within both SLOs per second.
    pub(super) goodput_per_second: f64,
    /// Their share of all that were due; failures are not within.
    pub(super) attainment: f64,
    pub(super) late_first_token: u64,
    pub(super) slow_tokens: u64,
    pub(super) prompt_tokens: u64,
    /// Prompt tokens that the server says were cached, and their share of the prompts of those answers.
    pub(super) hit_tokens: Option<u64>,
    pub(super) hit_rate: Option<f64>,
    pub(super) output_tokens: u64,
    /// Answers whose ids would have been a part of the next prompt, and were not told.
    pub(super) answers_without_ids: u64,
    /// From when requests were due.
    pub(super) ttft_ms: Summary,
    pub(super) itl_ms: Summary,
    pub(super) tpot_ms: Summary,
    /// From when requests were due.
    pub(super) e2e_ms: Summary,
    /// From when requests were due to when they were sent; a part of the two above.
    pub(super) lag_ms: Summary,
}

/// The columns of [`Report::row`].
pub(super) const HEAD: [&str; 14] = [
    "server",
    "answered",
    "failed",
    "req/s",
    "tokens/s",
    "TTFT p50",
    "p99",
    "ITL p50",
    "p99",
    "e2e p50",
    "p99",
    "hits",
    "goodput/s",
    "sent late p99",
];

impl Report {
    pub(super) fn row(&self) -> Vec<String> {
        let ms = |ms: f64| format!("{ms:.1}");
        vec![
            self.url.clone(),
            self.finished.to_string(),
            self.failed.values().sum::<u64>().to_string(),
            format!("{:.2}", self.requests_per_second),
            format!("{:.1}", self.output_tokens_per_second),
            ms(self.ttft_ms.p50),
            ms(self.ttft_ms.p99),
            ms(self.itl_ms.p50),
            ms(self.itl_ms.p99),
            ms(self.e2e_ms.p50),
            ms(self.e2e_ms.p99),
            self.hit_rate.map_or_else(|| "not told".to_owned(), |rate| format!("{:.1} %", 100.0 * rate)),
            format!("{:.2}", self.goodput_per_second),
            ms(self.lag_ms.p99),
        ]
    }
}

/// The first server's figures over the second's; those that the second has none of are left out.
pub(super) fn ratios(first: &Report, second: &Report) -> Value {
    let mut ratios = Map::new();
    let mut put = |name: String, first: f64, second: f64| {
        if second > 0.0 {
            ratios.insert(name, (first / second).into());
        }
    };
    for (name, first, second) in [
        ("ttft", &first.ttft_ms, &second.ttft_ms),
        ("itl", &first.itl_ms, &second.itl_ms),
        ("tpot", &first.tpot_ms, &second.tpot_ms),
        ("e2e", &first.e2e_ms, &second.e2e_ms),
    ] {
        put(format!("{name}_mean"), first.mean, second.mean);
        put(format!("{name}_p50"), first.p50, second.p50);
        put(format!("{name}_p99"), first.p99, second.p99);
    }
    put("goodput".to_owned(), first.goodput_per_second, second.goodput_per_second);
    put("requests_per_second".to_owned(), first.requests_per_second, second.requests_per_second);
    if let (Some(first), Some(second)) = (first.hit_rate, second.hit_rate) {
        put("hit_rate".to_owned(), first, second);
    }
    Value::Object(ratios)
}

/// The ratios in a line for the terminal.
pub(super) fn line(ratios: &Value) -> String {
    let entries = ratios.as_object().into_iter().flatten();
    let text = entries.map(|(name, ratio)| format!("{name} {:.3}", ratio.as_f64().unwrap_or_default()));
    text.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn answer() -> Answer {
        Answer {
            first: 100 * MS,
            last: 160 * MS,
            gaps: vec![20 * MS, 40 * MS],
            output_tokens: 4,
            prompt_tokens: Some(50),
            cached_tokens: Some(32),
            ..Answer::default()
        }
    }

    #[test]
    fn what_was_sent_late_is_late_for_the_user() {
        let mut tally = Tally::default();
        let slo = Slo { ttft_ms: Some(500.0), tpot_ms: Some(20.0) };
        tally.answered(200 * MS, Duration::ZERO, &answer(), slo);
        tally.answered(1200 * MS, 900 * MS, &answer(), slo);
        let report = tally.report("u", "m");
        assert_eq!((report.ttft_ms.mean, report.e2e_ms.mean), (550.0, 610.0));
        // Between its tokens nobody waited longer.
        assert_eq!((report.itl_ms.mean, report.tpot_ms.mean), (30.0, 20.0));
        assert_eq!((report.late_first_token, report.slow_tokens, report.attainment), (1, 0, 0.5));
        assert_eq!((report.hit_tokens, report.hit_rate), (Some(64), Some(0.64)));
    }

    #[test]
    fn every_request_is_in_one_count() {
        let mut tally = Tally::default();
        tally.answered(MS, Duration::ZERO, &answer(), Slo::default());
        tally.failed(2 * MS, &Failure::new("http_503", "busy"));
        tally.failed(2 * MS, &Failure::new("http_503", "busy"));
        tally.behind_a_failure(3);
        tally.unfinished();
        let report = tally.report("u", "m");
        let failed: u64 = report.failed.values().sum();
        assert_eq!((report.requests, report.finished + failed + report.unfinished), (7, 7));
        assert_eq!((report.failed["http_503"], report.failed["after_a_failure"]), (2, 3));
        // Of what was due and not cut off, one in six.
        assert!((report.attainment - 1.0 / 6.0).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_of_the_first_over_the_second() {
        let mut sides = [Tally::default(), Tally::default()];
        sides[0].answered(MS, Duration::ZERO, &answer(), Slo::default());
        sides[1].answered(MS, 100 * MS, &answer(), Slo::default());
        let [first, second] = sides.map(|tally| tally.report("u", "m"));
        let ratios = ratios(&first, &second);
        assert!((ratios["ttft_p50"].as_f64().unwrap() - 0.5).abs() < 0.01, "{ratios}");
        assert_eq!((ratios["itl_p50"].as_f64(), ratios["goodput"].as_f64()), (Some(1.0), Some(1.0)));
    }
}
