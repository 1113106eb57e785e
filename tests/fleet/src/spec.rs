//! What a fleet consists of.

use std::path::PathBuf;
use std::time::Duration;

use baton_proto::EngineId;
use serde::Serialize;

/// A fleet to start. Fields not set by a constructor have plain defaults; change them before
/// [`Fleet::start`](crate::Fleet::start).
#[derive(Clone, Debug)]
pub struct FleetSpec {
    /// The engines, in the order in which [`Part::Engine`](crate::Part::Engine) counts them.
    pub engines: Vec<EngineSpec>,
    /// The model they serve.
    pub model: Model,
    /// The name they serve it under.
    pub served_name: String,
    /// Where the coordinator keeps its state.
    pub store: Store,
    /// What the coordinator does with requests that name no policy.
    pub policy: Policy,
    /// Log filter of the coordinator, the agents and mock engines, in `RUST_LOG`'s syntax.
    pub log: String,
    /// Where configs, certificates and logs go. They stay there; without a directory they go to a temporary one
    /// that is removed with the fleet.
    pub dir: Option<PathBuf>,
    /// Where the binaries lie. Without it: beside the current executable, or one level up.
    pub bin_dir: Option<PathBuf>,
    /// Laid over the coordinator's config, table by table.
    pub coordinator_config: toml::Table,
    /// How long all parts together may take until they serve. vLLM on a CPU needs minutes.
    pub start_deadline: Duration,
}

impl FleetSpec {
    /// Mock engines `e0`, `e1` … of role `both`, with agents, the embedded store and the adaptive policy.
    pub fn mock(engines: usize) -> Self {
        Self::new((0..engines).map(|i| EngineSpec::mock(&format!("e{i}"))).collect(), Model::Mock, "mock")
    }

    /// These engines with an agent each, the embedded store and the adaptive policy.
    pub fn new(engines: Vec<EngineSpec>, model: Model, served_name: &str) -> Self {
        let vllm = engines.iter().any(|engine| matches!(engine.kind, EngineKind::Vllm(_)));
        Self {
            engines,
            model,
            served_name: served_name.to_owned(),
            store: Store::Embedded,
            policy: Policy::Adaptive,
            log: "info".to_owned(),
            dir: None,
            bin_dir: None,
            coordinator_config: toml::Table::new(),
            start_deadline: Duration::from_secs(if vllm { 420 } else { 30 }),
        }
    }
}

/// Where the model's files come from.
#[derive(Clone, Debug)]
pub enum Model {
    /// Made by `baton-mock-engine make-model`.
    Mock,
    /// A directory with tokenizer, chat template and config, and weights where vLLM serves it.
    Dir(PathBuf),
}

/// Where the coordinator keeps its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// In a file of its own.
    Embedded,
    /// In an etcd server that the fleet starts: `etcd`, or `etcd-server`, from the search path.
    Etcd,
}

/// How the coordinator places requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// By predicted seconds.
    Adaptive,
    /// Prefill and decode on one engine, always.
    Colocated,
    /// Prefill and decode on different engines, always.
    Disaggregated,
}

impl Policy {
    /// As configs and the request header `x-baton-policy` spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Adaptive => "adaptive",
            Policy::Colocated => "colocated",
            Policy::Disaggregated => "disaggregated",
        }
    }
}

/// What an engine may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
    /// Either.
    Both,
}

/// One engine, and the agent beside it.
#[derive(Clone, Debug)]
pub struct EngineSpec {
    /// Its name in the fleet.
    pub id: EngineId,
    /// What it may be used for.
    pub role: Role,
    /// What runs.
    pub kind: EngineKind,
    /// Whether an agent runs beside it. Without one the engine is plain: no connector, unknown to the coordinator.
    pub agent: bool,
    /// Whether a vLLM engine with an agent gets Baton's connector. Without it, it serves and tells what it caches, and
    /// takes part in no transfer.
    pub connector: bool,
    /// UDP port of the agent's transfer endpoint on 127.0.0.1; a free one where not given.
    pub transfer_port: Option<u16>,
    /// `host:port` under which other agents are to reach it, such as a relay's; the endpoint itself where
    /// not given.
    pub advertise: Option<String>,
    /// Laid over the agent's config, table by table.
    pub agent_config: toml::Table,
}

impl EngineSpec {
    /// A mock engine of role `both` with an agent.
    ///
    /// # Panics
    /// If `id` is no engine id.
    pub fn mock(id: &str) -> Self {
        Self::new(id, EngineKind::Mock(MockEngine::default()))
    }

    /// An engine of role `both` with an agent.
    ///
    /// # Panics
    /// If `id` is no engine id.
    pub fn new(id: &str, kind: EngineKind) -> Self {
        Self {
            id: id.parse().unwrap_or_else(|error| panic!("{error}")),
            role: Role::Both,
            kind,
            agent: true,
            connector: true,
            transfer_port: None,
            advertise: None,
            agent_config: toml::Table::new(),
        }
    }

    /// The same engine in that role.
    pub fn role(self, role: Role) -> Self {
        Self { role, ..self }
    }

    /// The same engine with an agent and without connector; for vLLM only.
    pub fn without_connector(self) -> Self {
        Self { connector: false, ..self }
    }

    /// The same engine without agent and connector.
    pub fn plain(self) -> Self {
        Self { agent: false, ..self }
    }
}

/// What serves as engine.
#[derive(Clone, Debug)]
pub enum EngineKind {
    /// `baton-mock-engine`.
    Mock(MockEngine),
    /// vLLM.
    Vllm(VllmEngine),
}

/// A mock engine's size and speed.
#[derive(Clone, Debug, PartialEq)]
pub struct MockEngine {
    /// Tokens in one block.
    pub block_size: u32,
    /// Blocks in its cache.
    pub blocks: u64,
    /// Prefill takes `a + b·n + c·(n·p + n²/2)` ms for `n` new tokens after `p` cached ones. `None`: the
    /// engine's own default.
    pub prefill_ms: Option<[f64; 3]>,
    /// A decode step takes `d + e·B + f·Σctx` ms for `B` sequences. `None`: the engine's own default.
    pub decode_ms: Option<[f64; 3]>,
    /// Further flags of `baton-mock-engine serve`.
    pub args: Vec<String>,
}

impl Default for MockEngine {
    fn default() -> Self {
        Self { block_size: 32, blocks: 2048, prefill_ms: None, decode_ms: None, args: Vec::new() }
    }
}

/// A vLLM server.
#[derive(Clone, Debug)]
pub struct VllmEngine {
    /// A Python that has vLLM.
    pub python: PathBuf,
    /// Directory to import `baton_connector` from. Needed where an agent runs beside the engine.
    pub connector: Option<PathBuf>,
    /// Flags besides those for the address, the model, the block size, KV events and the connector.
    pub args: Vec<String>,
    /// Environment besides what the CPU build needs.
    pub env: Vec<(String, String)>,
    /// Tokens in one block.
    pub block_size: u32,
}

impl VllmEngine {
    /// vLLM of that Python, with Baton's connector from that directory.
    pub fn new(python: impl Into<PathBuf>, connector: impl Into<PathBuf>) -> Self {
        Self {
            python: python.into(),
            connector: Some(connector.into()),
            args: vec!["--enforce-eager".into()],
            env: [
                ("VLLM_CPU_KVCACHE_SPACE", "1"),
                ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                ("OMP_NUM_THREADS", "1"),
                ("HF_HUB_OFFLINE", "1"),
                ("VLLM_NO_USAGE_STATS", "1"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
            block_size: 32,
        }
    }
}
