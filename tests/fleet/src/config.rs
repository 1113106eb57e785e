//! The configs of a fleet's parts, and the command lines of its engines.

use std::path::Path;

use serde::Serialize;
use serde_json::json;
use toml::Table;

use crate::layout::{EnginePorts, KvEvents};
use crate::spec::{EngineSpec, MockEngine, Policy, Role, VllmEngine};

#[derive(Serialize)]
struct Tls {
    ca: String,
    cert: String,
    key: String,
}

impl Tls {
    fn of(certs: &Path, name: &str) -> Self {
        let path = |file: String| certs.join(file).display().to_string();
        Self {
            ca: path("ca.pem".into()),
            cert: path(format!("{name}.pem")),
            key: path(format!("{name}.key")),
        }
    }
}

#[derive(Serialize)]
struct Coordinator {
    listen: String,
    control_listen: String,
    policy: Policy,
    store: String,
    tls: Tls,
    models: Vec<ModelEntry>,
}

#[derive(Serialize)]
struct ModelEntry {
    name: String,
    path: String,
}

#[derive(Serialize)]
struct Agent<'a> {
    engine_id: &'a str,
    role: Role,
    coordinator: String,
    metrics_listen: String,
    engine: Engine<'a>,
    transfer: Transfer<'a>,
    tls: Tls,
}

#[derive(Serialize)]
struct Engine<'a> {
    url: String,
    kv_events: &'a str,
    kv_events_replay: &'a str,
    socket: &'a str,
}

#[derive(Serialize)]
struct Transfer<'a> {
    listen: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advertise: Option<&'a str>,
}

/// What the coordinator is told.
pub(crate) struct CoordinatorInputs<'a> {
    pub(crate) http: u16,
    pub(crate) control: u16,
    pub(crate) policy: Policy,
    pub(crate) store: String,
    pub(crate) certs: &'a Path,
    pub(crate) served_name: &'a str,
    pub(crate) model: &'a Path,
    pub(crate) overlay: &'a Table,
}

pub(crate) fn coordinator(inputs: &CoordinatorInputs<'_>) -> String {
    let config = Coordinator {
        listen: loopback(inputs.http),
        control_listen: loopback(inputs.control),
        policy: inputs.policy,
        store: inputs.store.clone(),
        tls: Tls::of(inputs.certs, "coordinator"),
        models: vec![ModelEntry {
            name: inputs.served_name.to_owned(),
            path: inputs.model.display().to_string(),
        }],
    };
    overlaid(&config, inputs.overlay)
}

pub(crate) fn agent(
    spec: &EngineSpec,
    ports: &EnginePorts,
    control: u16,
    certs: &Path,
    side: AgentSide<'_>,
) -> String {
    let config = Agent {
        engine_id: spec.id.as_str(),
        role: spec.role,
        coordinator: format!("https://{}", loopback(control)),
        metrics_listen: loopback(ports.metrics),
        engine: Engine {
            url: format!("http://{}", loopback(ports.http)),
            kv_events: &side.events.live,
            kv_events_replay: &side.events.replay,
            socket: side.socket,
        },
        transfer: Transfer { listen: loopback(ports.transfer), advertise: spec.advertise.as_deref() },
        tls: Tls::of(certs, spec.id.as_str()),
    };
    overlaid(&config, &spec.agent_config)
}

pub(crate) fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn overlaid(config: &impl Serialize, overlay: &Table) -> String {
    let mut table = Table::try_from(config).expect("configs are tables of strings");
    lay_over(&mut table, overlay);
    table.to_string()
}

/// Tables merge, everything else is replaced.
fn lay_over(table: &mut Table, overlay: &Table) {
    for (key, value) in overlay {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => lay_over(below, above),
            _ => {
                table.insert(key.clone(), value.clone());
            }
        }
    }
}

/// What an engine serves, and where.
pub(crate) struct EngineInputs<'a> {
    pub(crate) port: u16,
    pub(crate) model: &'a Path,
    pub(crate) served_name: &'a str,
    /// `None` for a plain engine.
    pub(crate) agent: Option<AgentSide<'a>>,
    /// Whether it takes part in transfers.
    pub(crate) connector: bool,
}

/// Where an engine and its agent meet.
#[derive(Clone, Copy)]
pub(crate) struct AgentSide<'a> {
    /// The connector's socket.
    pub(crate) socket: &'a str,
    pub(crate) events: &'a KvEvents,
}

pub(crate) fn mock_args(mock: &MockEngine, inputs: &EngineInputs<'_>) -> Vec<String> {
    let mut args = Args(vec!["serve".into()]);
    args.flag("--model", inputs.model.display());
    args.flag("--served-model-name", inputs.served_name);
    args.flag("--port", inputs.port);
    args.flag("--block-size", mock.block_size);
    args.flag("--blocks", mock.blocks);
    if let Some(agent) = inputs.agent {
        args.flag("--kv-events-endpoint", &agent.events.live);
        args.flag("--kv-replay-endpoint", &agent.events.replay);
        args.flag("--baton-socket", agent.socket);
    }
    for (flag, constants) in [("--prefill-ms", mock.prefill_ms), ("--decode-ms", mock.decode_ms)] {
        if let Some(constants) = constants {
            args.flag(flag, constants.map(|c| c.to_string()).join(","));
        }
    }
    args.0.extend_from_slice(&mock.args);
    args.0
}

pub(crate) fn vllm_args(vllm: &VllmEngine, inputs: &EngineInputs<'_>) -> Vec<String> {
    let mut args = Args(vec!["-m".into(), "vllm.entrypoints.openai.api_server".into()]);
    args.flag("--model", inputs.model.display());
    args.flag("--served-model-name", inputs.served_name);
    args.flag("--host", "127.0.0.1");
    args.flag("--port", inputs.port);
    args.flag("--block-size", vllm.block_size);
    if let Some(agent) = inputs.agent {
        let events = json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "topic": "kv-events",
            "endpoint": agent.events.live,
            "replay_endpoint": agent.events.replay,
        });
        args.flag("--kv-events-config", events);
    }
    if let Some(agent) = inputs.agent.filter(|_| inputs.connector) {
        let transfer = json!({
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "baton_connector.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": agent.socket},
        });
        args.flag("--kv-transfer-config", transfer);
    }
    args.0.extend_from_slice(&vllm.args);
    args.0
}

struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, name: &str, value: impl ToString) {
        self.0.push(name.to_owned());
        self.0.push(value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_configs_have_the_documented_keys_and_take_an_overlay() {
        let mut spec = EngineSpec::mock("e0");
        spec.agent_config = "[transfer]\nadvertise = \"127.0.0.1:9\"\n[limits]\nx = 1".parse().unwrap();
        let ports = EnginePorts { http: 1, transfer: 4, metrics: 5 };
        let events = KvEvents { live: "tcp://127.0.0.1:2".into(), replay: "tcp://127.0.0.1:3".into() };
        let side = AgentSide { socket: "/run/e0.sock", events: &events };
        let text = agent(&spec, &ports, 6, Path::new("/c"), side);
        let table: Table = text.parse().unwrap();
        let expected: Table = r#"
            engine_id = "e0"
            role = "both"
            coordinator = "https://127.0.0.1:6"
            metrics_listen = "127.0.0.1:5"
            [engine]
            url = "http://127.0.0.1:1"
            kv_events = "tcp://127.0.0.1:2"
            kv_events_replay = "tcp://127.0.0.1:3"
            socket = "/run/e0.sock"
            [transfer]
            listen = "127.0.0.1:4"
            advertise = "127.0.0.1:9"
            [tls]
            ca = "/c/ca.pem"
            cert = "/c/e0.pem"
            key = "/c/e0.key"
            [limits]
            x = 1
        "#
        .parse()
        .unwrap();
        assert_eq!(table, expected);
    }

    #[test]
    fn a_plain_engine_is_told_of_no_agent() {
        let events = KvEvents { live: "ipc:///e".into(), replay: "ipc:///r".into() };
        let side = AgentSide { socket: "/s", events: &events };
        let inputs = |agent| EngineInputs {
            port: 1,
            model: Path::new("/m"),
            served_name: "m",
            agent,
            connector: true,
        };
        let vllm = VllmEngine::new("python3", "agent/connector");
        for args in [mock_args(&MockEngine::default(), &inputs(None)), vllm_args(&vllm, &inputs(None))] {
            assert!(!args.iter().any(|arg| arg.contains("kv") || arg.contains("socket")), "{args:?}");
        }
        let with = vllm_args(&vllm, &inputs(Some(side)));
        assert!(with.iter().any(|arg| arg.contains(r#""socket":"/s""#)));
        let without = vllm_args(&vllm, &EngineInputs { connector: false, ..inputs(Some(side)) });
        assert!(without.iter().any(|arg| arg.contains("ipc:///e")));
        assert!(!without.iter().any(|arg| arg.contains("/s")), "{without:?}");
    }
}
