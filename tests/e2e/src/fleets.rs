//! The fleets that the suite runs on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_fleet::{EngineKind, EngineSpec, FleetSpec, MockEngine, Model, Store, VllmEngine};

use crate::bed::Scale;

/// Agents log audit lines at this level, and read back what arrived.
const LOG: &str = "info,baton::audit=debug";

/// Mock engines, as slow as it takes to catch them at work: 0.1 ms a prompt token, 3 ms a step.
pub fn mock() -> (FleetSpec, Scale) {
    let engine = || {
        EngineKind::Mock(MockEngine {
            prefill_ms: Some([1.0, 0.1, 0.0]),
            decode_ms: Some([3.0, 0.0, 0.0]),
            ..MockEngine::default()
        })
    };
    let scale = Scale {
        longest: 3000,
        fault_tokens: 1000,
        answer_tokens: 16,
        index_cases: 120,
        rounds: 5,
        patience: Duration::from_secs(20),
    };
    (spec(engine, Model::Mock, "mock"), scale)
}

/// vLLM engines with the model in `model`, served as `name`; `fast` where the model is small enough to prefill
/// thousands of tokens a second on a CPU. The first engine has `ranks` tensor-parallel ranks, the others one.
pub fn vllm(
    python: &Path,
    connector: &Path,
    model: PathBuf,
    name: &str,
    fast: bool,
    ranks: u32,
) -> (FleetSpec, Scale) {
    let engine = || {
        let mut engine = VllmEngine::new(python, connector);
        // Greedy answers are compared token by token: in float32 no near-tie decides them.
        engine.args.extend(["--dtype", "float32", "--max-model-len", "4096"].map(str::to_owned));
        // Chat requests with tools need a parser, /render its own switch.
        engine.args.extend(
            ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"]
                .map(str::to_owned),
        );
        // For /reset_prefix_cache, which succeeds only where no block is in use.
        engine.env.push(("VLLM_SERVER_DEV_MODE".into(), "1".into()));
        EngineKind::Vllm(engine)
    };
    let scale = Scale {
        longest: 3000,
        fault_tokens: if fast { 1000 } else { 600 },
        answer_tokens: 16,
        index_cases: 300,
        rounds: if fast { 5 } else { 3 },
        patience: Duration::from_secs(60),
    };
    let mut spec = spec(engine, Model::Dir(model), name);
    if let EngineKind::Vllm(first) = &mut spec.engines[0].kind
        && ranks > 1
    {
        first.args.extend(["--tensor-parallel-size".to_owned(), ranks.to_string()]);
    }
    (spec, scale)
}

fn spec(engine: impl Fn() -> EngineKind, model: Model, name: &str) -> FleetSpec {
    let engines = vec![
        EngineSpec::new("e0", engine()),
        EngineSpec::new("e1", engine()),
        EngineSpec::new("plain", engine()).plain(),
    ];
    let mut spec = FleetSpec::new(engines, model, name);
    spec.store = Store::Etcd;
    spec.log = LOG.to_owned();
    spec
}
