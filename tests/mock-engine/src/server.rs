//! The whole engine as one process: configuration, start and end.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use axum::serve::ListenerExt;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::chat::ChatTemplate;
use crate::connector::{self, ConnectorConfig};
use crate::engine::{self, EngineHandle, EngineParts};
use crate::events::{self, PublisherConfig};
use crate::hashing::EngineHasher;
use crate::http::{App, HttpConfig, Ids, router};
use crate::kv_memory::{KvMemory, KvShape};
use crate::metrics::{MetricLabels, Metrics};
use crate::model::Model;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::timing::{Coefficients, Timing};
use crate::tokenizer::Tokenizer;
use crate::vocabulary::Vocabulary;

/// Answers that are under way at the end get this long.
const GRACE: Duration = Duration::from_secs(1);

/// How an engine is set up. Named after vLLM's options where vLLM has them.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeConfig {
    /// Folder of the model: tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json
    #[arg(long)]
    pub model: PathBuf,
    /// Names under which the model is served; the first one stands in answers
    #[arg(long, num_args = 1.., required = true)]
    pub served_model_name: Vec<String>,
    /// Names of LoRA adapters to serve
    #[arg(long, num_args = 1..)]
    pub lora: Vec<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one and logs it
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Tokens in a KV block
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub block_size: u32,
    /// KV blocks, with the first one, which stays unused
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    pub blocks: u32,
    /// Tokens of prompt and output together, at most [default: what the model's config.json says, or as many as the blocks hold]
    #[arg(long)]
    pub max_model_len: Option<usize>,
    /// Tokens computed in one step, at most
    #[arg(long, default_value_t = 8192)]
    pub max_num_batched_tokens: usize,
    /// Requests in one step, at most
    #[arg(long, default_value_t = 256)]
    pub max_num_seqs: usize,
    /// Address for KV events, such as tcp://127.0.0.1:5557; without it, none are published
    #[arg(long)]
    pub kv_events_endpoint: Option<String>,
    /// Address for replays of KV events
    #[arg(long, requires = "kv_events_endpoint")]
    pub kv_replay_endpoint: Option<String>,
    /// First frame of each KV event message
    #[arg(long, default_value = "kv-events")]
    pub kv_events_topic: String,
    /// Batches of KV events that can be replayed
    #[arg(long, default_value_t = 10_000)]
    pub kv_events_buffer_steps: usize,
    /// Socket of the agent; without it, the engine has no connector
    #[arg(long)]
    pub baton_socket: Option<PathBuf>,
    /// Milliseconds a,b,c: a prefill of n tokens after p cached ones takes a + b·n + c·(n·p + n²/2)
    #[arg(long, default_value = "0,0,0")]
    pub prefill_ms: Coefficients,
    /// Milliseconds d,e,f: a decode step of B sequences takes d + e·B + f·(their tokens)
    #[arg(long, default_value = "0,0,0")]
    pub decode_ms: Coefficients,
    /// Layers of the KV cache
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub kv_layers: u32,
    /// KV heads of a layer
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub kv_heads: u32,
    /// Bytes of a token in one head; times heads, a multiple of 8
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub kv_head_bytes: u32,
    /// One output token in so many is the end of the sequence; 0: none
    #[arg(long, default_value_t = 0)]
    pub eos_one_in: u64,
    /// Tell the cached prompt tokens in the usage
    #[arg(long)]
    pub enable_prompt_tokens_details: bool,
}

/// An engine that runs. It stops when this is dropped; [`Server::stop`] also lets answers end, and waits.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    engine: EngineHandle,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
    end: Option<tokio::sync::oneshot::Sender<()>>,
    /// Publisher and connector.
    tasks: Vec<tokio::task::JoinHandle<()>>,
    storages: Vec<std::os::fd::OwnedFd>,
}

impl Server {
    /// Starts an engine. Runs on a multi-threaded runtime.
    pub async fn start(config: ServeConfig) -> anyhow::Result<Self> {
        let tokenizer = Arc::new(Tokenizer::load(&config.model)?);
        let chat = ChatTemplate::load(&config.model).context("--model")?;
        let model_config = json_file(&config.model, "config.json");
        let generation_config = json_file(&config.model, "generation_config.json");
        let eos = eos(&generation_config, &model_config, &tokenizer);
        let max_model_len = max_model_len(&config, &model_config)?;
        let printable = tokenizer.printable();
        ensure!(!printable.is_empty(), "--model: the tokenizer has no printable token");

        let shape = kv_shape(&config)?;
        ensure!(config.max_num_seqs > 0, "--max-num-seqs: give at least 1");
        ensure!(config.max_num_batched_tokens > 0, "--max-num-batched-tokens: give at least 1");
        let memory = KvMemory::new(shape).context("cannot make the KV memory")?;
        let shared = memory.share().context("cannot share the KV memory")?;
        let storages = memory.share().context("cannot share the KV memory")?;
        let metrics = Arc::new(Metrics::new(MetricLabels {
            model_name: config.served_model_name[0].clone(),
            num_blocks: config.blocks,
            block_size: config.block_size,
        }));
        let mut tasks = Vec::new();
        let events = match &config.kv_events_endpoint {
            None => None,
            Some(endpoint) => {
                let publisher = PublisherConfig {
                    endpoint: endpoint.clone(),
                    replay_endpoint: config.kv_replay_endpoint.clone(),
                    topic: config.kv_events_topic.clone(),
                    buffer_steps: config.kv_events_buffer_steps,
                };
                let (sender, publishing) = events::publisher(publisher).await?;
                tasks.push(tokio::spawn(publishing));
                Some(sender)
            }
        };
        let listener = TcpListener::bind((config.host, config.port))
            .await
            .with_context(|| format!("cannot listen on --host {} --port {}", config.host, config.port))?;
        let address = listener.local_addr()?;

        let scheduler = SchedulerConfig {
            block_size: config.block_size,
            num_blocks: config.blocks,
            max_model_len,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_num_seqs: config.max_num_seqs,
            events: events.is_some(),
        };
        let (engine, thread) = engine::start(EngineParts {
            scheduler: Scheduler::new(scheduler, EngineHasher::random()),
            model: Model::new(memory),
            vocabulary: Vocabulary { printable, eos, eos_one_in: config.eos_one_in },
            timing: Timing { prefill: config.prefill_ms, decode: config.decode_ms },
            metrics: metrics.clone(),
            events,
        })?;
        let ids = Ids::default();
        if let Some(socket) = config.baton_socket.clone() {
            let connector = ConnectorConfig {
                socket,
                instance: ids.next(),
                model: config.served_model_name[0].clone(),
                block_size: config.block_size,
                num_blocks: u64::from(config.blocks),
                chunk_tokens: scheduler.max_num_batched_tokens as u32,
                storages: shared,
                layout: shape.layout(),
            };
            tasks.push(tokio::spawn(connector::run(connector, engine.clone())));
        }
        let app = App {
            config: HttpConfig {
                served_model_names: config.served_model_name,
                loras: config.lora,
                model_path: config.model.display().to_string(),
                max_model_len,
                default_max_tokens: generation_config["max_new_tokens"].as_i64(),
                prompt_tokens_details: config.enable_prompt_tokens_details,
            },
            engine: engine.clone(),
            metrics,
            tokenizer,
            chat,
            eos,
            ids,
        };
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let listener = listener.tap_io(|stream| {
            // Tokens go out one by one. A connection that is gone already fails elsewhere.
            let _ = stream.set_nodelay(true);
        });
        let serving = axum::serve(listener, router(Arc::new(app))).with_graceful_shutdown(async {
            // Dropping the sender says it.
            let _ = ended.await;
        });
        let serving = tokio::spawn(serving.into_future());
        let kv_bytes = shape.kv_bytes_per_token();
        tracing::info!(%address, max_model_len, kv_bytes_per_token = kv_bytes, "serving");
        let storages = storages.into_iter().map(|(fd, _)| fd).collect();
        Ok(Self { address, engine, thread: Some(thread), serving, end: Some(end), tasks, storages })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The engine, for checks.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// The KV memory's file descriptors, in order of layers, for checks.
    pub fn storages(&self) -> &[std::os::fd::OwnedFd] {
        &self.storages
    }

    /// Waits until the engine or its HTTP server fails. Cancel safe.
    pub async fn failed(&mut self) {
        loop {
            if self.serving.is_finished() || !self.engine.is_alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Stops: answers that are under way get a second to end.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.end = None;
        if tokio::time::timeout(GRACE, &mut self.serving).await.is_err() {
            self.serving.abort();
        }
        self.end_tasks();
        let Some(thread) = self.thread.take() else { return Ok(()) };
        match tokio::task::spawn_blocking(move || thread.join()).await? {
            Ok(result) => result.context("the engine failed"),
            Err(_) => bail!("the engine panicked"),
        }
    }

    fn end_tasks(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.engine.stop();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
        self.end_tasks();
    }
}

fn json_file(model: &Path, name: &str) -> Value {
    let read = std::fs::read(model.join(name)).ok();
    read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// The token that ends a sequence: what generation_config.json says, else config.json, else the usual name.
fn eos(generation_config: &Value, model_config: &Value, tokenizer: &Tokenizer) -> Option<u32> {
    let id = |config: &Value| {
        let eos = &config["eos_token_id"];
        let eos = eos.get(0).unwrap_or(eos).as_u64()?;
        u32::try_from(eos).ok()
    };
    id(generation_config).or_else(|| id(model_config)).or_else(|| tokenizer.id("<|im_end|>"))
}

fn max_model_len(config: &ServeConfig, model_config: &Value) -> anyhow::Result<usize> {
    let held = (config.blocks as usize - 1) * config.block_size as usize;
    let len = match config.max_model_len {
        Some(len) => {
            ensure!(
                len <= held,
                "--max-model-len {len}: the blocks hold {held} tokens; give at most that, or more --blocks"
            );
            len
        }
        None => {
            let of_model =
                model_config["max_position_embeddings"].as_u64().map_or(usize::MAX, |len| len as usize);
            of_model.min(held)
        }
    };
    ensure!(len >= 2, "--max-model-len {len}: give at least 2, for a prompt and an answer");
    Ok(len)
}

fn kv_shape(config: &ServeConfig) -> anyhow::Result<KvShape> {
    let shape = KvShape {
        layers: config.kv_layers,
        heads: config.kv_heads,
        head_bytes: config.kv_head_bytes,
        block_size: config.block_size,
        num_blocks: config.blocks,
    };
    ensure!(
        shape.token_bytes().is_multiple_of(8),
        "--kv-heads {} times --kv-head-bytes {}: give a multiple of 8",
        shape.heads,
        shape.head_bytes
    );
    ensure!(
        shape.piece_bytes() <= 64 << 20,
        "a block has {} bytes in a layer: give fewer --kv-heads, --kv-head-bytes or --block-size (at most 64 MiB)",
        shape.piece_bytes()
    );
    Ok(shape)
}
