//! The engine's metrics under vLLM's names, in Prometheus text form.

use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::request::{FinishReason, PrefillStats};
use crate::scheduler::Stats;

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const ITL: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0,
    100000.0,
];

/// What does not change.
#[derive(Clone, Debug)]
pub struct MetricLabels {
    /// Model, as served.
    pub model_name: String,
    /// Blocks of the pool.
    pub num_blocks: u32,
    /// Tokens in a block.
    pub block_size: u32,
}

#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.sum += value;
    }
}

/// Counters and histograms that grow with every step.
#[derive(Debug)]
pub struct Recorded {
    stats: Stats,
    prompt_tokens: u64,
    generation_tokens: u64,
    by_source: [u64; 3],
    finished: [u64; 3],
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    computed: Histogram,
}

impl Recorded {
    /// What is going on after a step.
    pub fn stats(&mut self, stats: Stats) {
        self.stats = stats;
    }

    /// A request's first token came, `since` its arrival.
    pub fn first_token(&mut self, since: Duration, prefill: PrefillStats) {
        let computed = prefill.prompt - prefill.local - prefill.external;
        self.prompt_tokens += prefill.prompt as u64;
        for (counter, tokens) in self.by_source.iter_mut().zip([computed, prefill.local, prefill.external]) {
            *counter += tokens as u64;
        }
        self.computed.observe(computed as f64);
        self.ttft.observe(since.as_secs_f64());
        self.generation_tokens += 1;
    }

    /// A later token came, `since` the one before it.
    pub fn next_token(&mut self, since: Duration) {
        self.itl.observe(since.as_secs_f64());
        self.generation_tokens += 1;
    }

    /// A request ended, `since` its arrival; `None`: it was aborted.
    pub fn finished(&mut self, reason: Option<FinishReason>, since: Duration) {
        let index = match reason {
            Some(FinishReason::Stop) => 0,
            Some(FinishReason::Length) => 1,
            None => 2,
        };
        self.finished[index] += 1;
        self.e2e.observe(since.as_secs_f64());
    }
}

/// All metrics of an engine.
#[derive(Debug)]
pub struct Metrics {
    labels: MetricLabels,
    recorded: Mutex<Recorded>,
}

impl Metrics {
    /// Metrics that start at zero.
    pub fn new(labels: MetricLabels) -> Self {
        let recorded = Recorded {
            stats: Stats::default(),
            prompt_tokens: 0,
            generation_tokens: 0,
            by_source: [0; 3],
            finished: [0; 3],
            ttft: Histogram::new(TTFT),
            itl: Histogram::new(ITL),
            e2e: Histogram::new(LATENCY),
            computed: Histogram::new(TOKENS),
        };
        Self { labels, recorded: Mutex::new(recorded) }
    }

    /// To record; the engine takes this once per step.
    pub fn record(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metrics as text.
    pub fn render(&self) -> String {
        let recorded = self.record();
        let stats = &recorded.stats;
        let model = self.labels.model_name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut page = Page {
            text: String::with_capacity(16 << 10),
            labels: format!("engine=\"0\",model_name=\"{model}\""),
        };

        page.gauge("num_requests_running", "Requests in the engine's steps.", stats.running as f64);
        let waiting = (stats.waiting + stats.pulling) as f64;
        page.gauge("num_requests_waiting", "Requests that wait.", waiting);
        page.head("num_requests_waiting_by_reason", "gauge", "Requests that wait, by reason.");
        page.value("num_requests_waiting_by_reason", "reason=\"capacity\"", stats.waiting as f64);
        page.value("num_requests_waiting_by_reason", "reason=\"deferred\"", stats.pulling as f64);
        page.gauge("kv_cache_usage_perc", "Share of the KV blocks in use. 1 means all.", stats.usage);
        page.counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.queries);
        page.counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.hits);
        let help = "Tokens offered to the KV connector.";
        page.counter("external_prefix_cache_queries", help, stats.external_queries);
        let help = "Tokens the KV connector took on.";
        page.counter("external_prefix_cache_hits", help, stats.external_hits);
        page.counter("num_preemptions", "Preemptions.", stats.preemptions);
        page.counter(
            "prompt_tokens",
            "Prompt tokens of requests past their prefill.",
            recorded.prompt_tokens,
        );
        page.head("prompt_tokens_by_source_total", "counter", "Prompt tokens by source.");
        let sources = ["local_compute", "local_cache_hit", "external_kv_transfer"];
        for (source, tokens) in sources.into_iter().zip(recorded.by_source) {
            page.value("prompt_tokens_by_source_total", &format!("source=\"{source}\""), tokens as f64);
        }
        page.counter("generation_tokens", "Tokens generated.", recorded.generation_tokens);
        page.head("request_success_total", "counter", "Requests that ended, by reason.");
        for (reason, requests) in ["stop", "length", "abort"].into_iter().zip(recorded.finished) {
            page.value("request_success_total", &format!("finished_reason=\"{reason}\""), requests as f64);
        }
        page.histogram("time_to_first_token_seconds", "Time to first token.", &recorded.ttft);
        page.histogram("inter_token_latency_seconds", "Time between tokens.", &recorded.itl);
        page.histogram("e2e_request_latency_seconds", "Time from arrival to end.", &recorded.e2e);
        let help = "Prompt tokens computed here, per request.";
        page.histogram("request_prefill_kv_computed_tokens", help, &recorded.computed);
        page.head("cache_config_info", "gauge", "The KV cache's configuration.");
        let MetricLabels { num_blocks, block_size, .. } = self.labels;
        let _ = writeln!(
            page.text,
            "vllm:cache_config_info{{block_size=\"{block_size}\",cache_dtype=\"uint8\",\
             enable_prefix_caching=\"True\",engine=\"0\",num_gpu_blocks=\"{num_blocks}\"}} 1.0"
        );
        page.text
    }
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
    }

    fn value(&mut self, name: &str, label: &str, value: f64) {
        let comma = if label.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "vllm:{name}{{{}{comma}{label}}} {value:?}", self.labels);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, "gauge", help);
        self.value(name, "", value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let name = format!("{name}_total");
        self.head(&name, "counter", help);
        self.value(&name, "", value as f64);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut below = 0;
        for (count, bound) in histogram.counts.iter().zip(histogram.bounds.iter().chain([&f64::INFINITY])) {
            below += count;
            let bound =
                if bound.is_finite() { format!("le=\"{bound:?}\"") } else { "le=\"+Inf\"".to_owned() };
            self.value(&format!("{name}_bucket"), &bound, below as f64);
        }
        self.value(&format!("{name}_count"), "", below as f64);
        self.value(&format!("{name}_sum"), "", histogram.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_vllms_names_and_labels() {
        let metrics = Metrics::new(MetricLabels { model_name: "m\"".into(), num_blocks: 10, block_size: 16 });
        {
            let mut record = metrics.record();
            record.stats(Stats { running: 2, usage: 0.25, hits: 32, ..Stats::default() });
            let prefill = PrefillStats { prompt: 100, local: 32, external: 60 };
            record.first_token(Duration::from_millis(30), prefill);
            record.next_token(Duration::from_millis(5));
            record.finished(Some(FinishReason::Length), Duration::from_millis(35));
        }
        let text = metrics.render();
        for line in [
            "# TYPE vllm:num_requests_running gauge",
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\\\"\"} 2.0",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\\\"\"} 0.25",
            "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"m\\\"\"} 32.0",
            "vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\\\"\"} 100.0",
            "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"m\\\"\",source=\"local_compute\"} 8.0",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\\\"\"} 2.0",
            "vllm:request_success_total{engine=\"0\",model_name=\"m\\\"\",finished_reason=\"length\"} 1.0",
            "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"m\\\"\",le=\"0.02\"} 0.0",
            "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"m\\\"\",le=\"0.04\"} 1.0",
            "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"m\\\"\",le=\"+Inf\"} 1.0",
            "vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"m\\\"\"} 1.0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} not in\n{text}");
        }
        assert!(text.contains("num_gpu_blocks=\"10\"} 1.0"));
    }
}
