//! Polls the engine's HTTP server: whether it answers, which models it serves, and its load.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_proto::EngineId;
use baton_proto::control::v1::EngineLoad;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::ClientConfig;
use rustls_pki_types::{InvalidDnsNameError, ServerName};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// How often the engine is asked.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait for an answer. An engine that is starting or busy can take seconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// Timeouts in a row after which the engine counts as down. A refused connection counts at once.
const TIMEOUTS: u32 = 3;
/// Largest answer that is read.
const MAX_BODY: usize = 16 << 20;
/// Polls of the load for one of the model names: adapters come and go while the engine is up.
const POLLS_PER_NAMES: u32 = 10;
/// Most model names that are passed on.
const MAX_MODELS: usize = 64;
/// Most names of adapters that are passed on.
const MAX_ADAPTERS: usize = 1024;
/// Longest model name that is passed on, in bytes.
const MAX_NAME: usize = 1024;

/// What the engine says of itself. Fields keep their last value while it is down.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Whether its HTTP server answers.
    pub up: bool,
    /// Names under which it serves the model, adapters left out.
    pub models: Vec<String>,
    /// Names of the LoRA adapters that it has loaded on the model.
    pub adapters: Vec<String>,
    /// Tokens in one block, where its metrics tell.
    pub block_size: Option<u32>,
    /// Blocks in its GPU cache, where its metrics tell.
    pub num_blocks: Option<u64>,
    /// Its load.
    pub load: EngineLoad,
}

#[derive(Debug, thiserror::Error)]
enum PollError {
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Timeout,
    #[error("{}", crate::causes(.0))]
    Connect(hyper_util::client::legacy::Error),
    #[error("{0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("{0} answered {1}")]
    Status(&'static str, http::StatusCode),
    #[error("/v1/models: {0}")]
    Models(serde_json::Error),
}

type HttpClient = Client<HttpsConnector<HttpConnector>, Empty<bytes::Bytes>>;

/// Asks one engine.
pub struct Poller {
    client: HttpClient,
    url: String,
}

impl Poller {
    /// For the engine at `url`; where that is https, its certificate has to carry `engine_id`.
    pub fn new(url: &str, engine_id: &EngineId, tls: ClientConfig) -> Result<Self, InvalidDnsNameError> {
        let name = ServerName::try_from(String::from(engine_id.clone()))?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .with_server_name_resolver(FixedServerNameResolver::new(name))
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(1).build(connector);
        Ok(Self { client, url: url.to_owned() })
    }

    /// Polls until `stop` is cancelled.
    pub async fn run(self, status: watch::Sender<Status>, metrics: Metrics, stop: CancellationToken) {
        let mut tick = interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut timeouts = 0;
        let mut polls: u32 = 0;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let known = status.borrow().clone();
            let names = !known.up || polls.is_multiple_of(POLLS_PER_NAMES);
            polls = polls.wrapping_add(1);
            let polled = tokio::select! {
                () = stop.cancelled() => return,
                polled = self.poll(known.clone(), names) => polled,
            };
            let next = match polled {
                Ok(next) => {
                    timeouts = 0;
                    if !known.up {
                        tracing::info!(url = self.url, models = ?next.models, "the engine is up");
                    }
                    next
                }
                Err(error) => {
                    timeouts += 1;
                    let down = !matches!(error, PollError::Timeout) || timeouts >= TIMEOUTS;
                    if known.up && down {
                        tracing::warn!(url = self.url, %error, "the engine is down");
                    } else {
                        tracing::debug!(url = self.url, %error, "the engine does not answer");
                    }
                    Status { up: known.up && !down, ..known }
                }
            };
            metrics.set_engine_up(next.up);
            status.send_if_modified(|status| {
                let changed = *status != next;
                *status = next;
                changed
            });
        }
    }

    async fn poll(&self, mut status: Status, names: bool) -> Result<Status, PollError> {
        if names {
            let answer = serde_json::from_slice(&self.get("/v1/models").await?).map_err(PollError::Models)?;
            read_models(answer, &mut status);
        }
        let text = self.get("/metrics").await?;
        read_metrics(&String::from_utf8_lossy(&text), &mut status);
        status.up = !status.models.is_empty();
        Ok(status)
    }

    async fn get(&self, path: &'static str) -> Result<bytes::Bytes, PollError> {
        let fetch = async {
            let uri =
                format!("{}{path}", self.url).parse::<http::Uri>().map_err(|e| PollError::Body(e.into()))?;
            let answer = self.client.get(uri).await.map_err(PollError::Connect)?;
            if answer.status() != http::StatusCode::OK {
                return Err(PollError::Status(path, answer.status()));
            }
            let body = Limited::new(answer.into_body(), MAX_BODY).collect().await.map_err(PollError::Body)?;
            Ok(body.to_bytes())
        };
        timeout(PATIENCE, fetch).await.map_err(|_| PollError::Timeout)?
    }
}

/// Takes the names from an answer to `/v1/models`: adapters have a parent.
fn read_models(answer: Models, status: &mut Status) {
    let short = answer.data.into_iter().filter(|model| model.id.len() <= MAX_NAME);
    let (models, adapters): (Vec<Model>, Vec<Model>) = short.partition(|model| model.parent.is_none());
    let names = |models: Vec<Model>, most| models.into_iter().map(|model| model.id).take(most).collect();
    status.models = names(models, MAX_MODELS);
    status.adapters = names(adapters, MAX_ADAPTERS);
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    /// Of an adapter: the model that it belongs to.
    #[serde(default)]
    parent: Option<String>,
}

/// Takes from a text in Prometheus' format what is there of vLLM's metrics. Values of several models or ranks add up.
pub fn read_metrics(text: &str, status: &mut Status) {
    let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
    let mut usage: Option<f64> = None;
    for line in text.lines() {
        let Some(sample) = Sample::parse(line) else { continue };
        match sample.name {
            "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" => {
                usage = Some(usage.unwrap_or_default().max(sample.value));
            }
            "vllm:cache_config_info" => {
                status.block_size =
                    sample.label("block_size").and_then(|v| v.parse().ok()).filter(|n| *n > 0);
                status.num_blocks = sample.label("num_gpu_blocks").and_then(|v| v.parse().ok());
            }
            name => *sums.entry(name).or_default() += sample.value,
        }
    }
    let sum = |name: &str| sums.get(name).copied().unwrap_or_default().max(0.0);
    status.load = EngineLoad {
        running: sum("vllm:num_requests_running") as u32,
        waiting: sum("vllm:num_requests_waiting") as u32,
        kv_usage: usage.unwrap_or_default().clamp(0.0, 1.0),
        prompt_tokens: sum("vllm:prompt_tokens_total") as u64,
        generated_tokens: sum("vllm:generation_tokens_total") as u64,
    };
}

/// One line of Prometheus' text format.
struct Sample<'a> {
    name: &'a str,
    labels: &'a str,
    value: f64,
}

impl<'a> Sample<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        if !line.starts_with("vllm:") {
            return None;
        }
        let (name, labels, rest) = match line.find('{') {
            Some(open) => {
                let close = line.rfind('}')?;
                (&line[..open], line.get(open + 1..close)?, line.get(close + 1..)?)
            }
            None => {
                let (name, rest) = line.split_once(' ')?;
                (name, "", rest)
            }
        };
        let value = rest.split_ascii_whitespace().next()?.parse().ok().filter(|v: &f64| v.is_finite())?;
        Some(Self { name, labels, value })
    }

    /// A label's value; those looked for have no escapes.
    fn label(&self, name: &str) -> Option<&'a str> {
        self.labels
            .split(',')
            .find_map(|label| label.trim().strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.234e+06
vllm:generation_tokens_total{engine="0",model_name="m"} 77.0 1700000000000
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="1456",num_cpu_blocks="None"} 1.0
vllm:request_success_total{engine="0",finished_reason="a}b"} 5.0
python_gc_objects_collected_total{generation="0"} 12.0
vllm:broken{ 3
vllm:nan NaN
"#;

    #[test]
    fn reads_what_vllm_says() {
        let mut status = Status::default();
        read_metrics(TEXT, &mut status);
        assert_eq!((status.block_size, status.num_blocks), (Some(32), Some(1456)));
        let load = status.load;
        assert_eq!(
            (load.running, load.waiting, load.prompt_tokens, load.generated_tokens),
            (4, 2, 1_234_000, 77)
        );
        assert!((load.kv_usage - 0.25).abs() < 1e-9);
    }

    #[test]
    fn adapters_are_told_from_models() {
        let answer = serde_json::json!({ "object": "list", "data": [
            { "id": "m", "root": "/models/m", "parent": null },
            { "id": "alias", "root": "/models/m" },
            { "id": "sql", "root": "/adapters/sql", "parent": "m" },
            { "id": "x".repeat(MAX_NAME + 1), "parent": null },
        ]});
        let mut status = Status { adapters: vec!["unloaded since".into()], ..Status::default() };
        read_models(serde_json::from_value(answer).unwrap(), &mut status);
        assert_eq!(status.models, ["m", "alias"]);
        assert_eq!(status.adapters, ["sql"]);
    }

    #[test]
    fn what_is_absent_is_zero() {
        let mut status = Status::default();
        read_metrics("", &mut status);
        assert_eq!(status, Status::default());
    }
}
