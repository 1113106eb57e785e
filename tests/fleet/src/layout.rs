//! From a spec to jobs: files, certificates, ports, configs and command lines.

use std::fs;
use std::path::{Path, PathBuf};

use baton_proto::EngineId;
use tempfile::TempDir;

use crate::binaries;
use crate::certs::{Authority, DEFAULT_DAYS};
use crate::config::{self, AgentSide, CoordinatorInputs, EngineInputs, loopback};
use crate::error::FleetError;
use crate::ports::Ports;
use crate::process::Job;
use crate::spec::{EngineKind, EngineSpec, FleetSpec, Model, Store};

/// Longest path of a Unix socket, in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// The ports of one engine and its agent, all on 127.0.0.1.
#[derive(Clone, Copy, Debug)]
pub struct EnginePorts {
    /// The engine's HTTP.
    pub http: u16,
    /// The agent's transfer endpoint, UDP.
    pub transfer: u16,
    /// The agent's own `/metrics` and `/health`.
    pub metrics: u16,
}

/// Where a fleet's files lie.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
    /// Removes them.
    pub(crate) temporary: Option<TempDir>,
}

impl Files {
    /// Makes the directories of a fleet.
    pub(crate) fn new(dir: Option<&Path>) -> Result<Self, FleetError> {
        let (dir, temporary) = match dir {
            Some(dir) => (absolute(dir)?, None),
            None => {
                let temporary = tempfile::Builder::new()
                    .prefix("baton-")
                    .tempdir()
                    .map_err(FleetError::io("temporary directory"))?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let files = Self { dir, temporary };
        for dir in [files.dir.join("logs"), files.dir.join("run")] {
            fs::create_dir_all(&dir).map_err(FleetError::io(dir.display().to_string()))?;
        }
        Ok(files)
    }

    pub(crate) fn certs(&self) -> PathBuf {
        self.dir.join("certs")
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.dir.join("model")
    }

    /// Path of one of an engine's Unix sockets.
    fn socket(&self, id: &EngineId, suffix: &str) -> Result<String, FleetError> {
        let path = self.dir.join("run").join(format!("{id}.{suffix}")).display().to_string();
        match path.len() {
            ..=MAX_SOCKET_PATH => Ok(path),
            _ => Err(FleetError::Spec(format!(
                "socket path {path} is longer than {MAX_SOCKET_PATH} bytes: use a shorter directory"
            ))),
        }
    }

    /// A job whose log is named like it.
    pub(crate) fn job(
        &self,
        name: String,
        program: PathBuf,
        args: Vec<String>,
        env: Vec<(String, String)>,
    ) -> Job {
        let log = self.dir.join("logs").join(format!("{name}.log"));
        Job { name, program, args, env, dir: self.dir.clone(), log }
    }

    /// A job that runs one of Baton's services with that config. Its first two arguments name the config.
    fn service(&self, name: String, program: PathBuf, config: &str, log: &str) -> Result<Job, FleetError> {
        let path = self.dir.join(format!("{name}.toml"));
        fs::write(&path, config).map_err(FleetError::io(path.display().to_string()))?;
        let args = vec!["--config".into(), path.display().to_string()];
        Ok(self.job(name, program, args, vec![("RUST_LOG".to_owned(), log.to_owned())]))
    }
}

/// ZMQ addresses of an engine's KV events.
pub(crate) struct KvEvents {
    pub(crate) live: String,
    pub(crate) replay: String,
}

/// Everything that is to run.
pub(crate) struct Layout {
    pub(crate) http: u16,
    pub(crate) control: u16,
    pub(crate) coordinator: Job,
    pub(crate) engines: Vec<EngineLayout>,
    /// With its client port.
    pub(crate) etcd: Option<(Job, u16)>,
}

/// One engine and its agent.
pub(crate) struct EngineLayout {
    pub(crate) ports: EnginePorts,
    pub(crate) engine: Job,
    pub(crate) agent: Option<Job>,
    /// Where it publishes its KV events.
    pub(crate) kv_events: String,
}

impl Layout {
    /// Chooses ports, and writes certificates and configs.
    pub(crate) fn new(spec: &FleetSpec, files: &Files) -> Result<Self, FleetError> {
        check(spec)?;
        let certs = files.certs();
        let authority = match certs.join("ca.pem").exists() {
            true => Authority::load(&certs)?,
            false => Authority::init(&certs, false)?,
        };
        for name in ["coordinator", "operator"] {
            authority.issue(name, DEFAULT_DAYS, true)?;
        }
        let model = match &spec.model {
            Model::Mock => files.model(),
            Model::Dir(dir) => absolute(dir)?,
        };

        let mut ports = Ports::default();
        for port in spec.engines.iter().filter_map(|engine| engine.transfer_port) {
            ports.reserve(port);
        }
        let (http, control) = (free(&mut ports)?, free(&mut ports)?);
        let etcd = match spec.store {
            Store::Embedded => None,
            Store::Etcd => {
                let (client, peer) = (free(&mut ports)?, free(&mut ports)?);
                Some((etcd_job(files, client, peer)?, client))
            }
        };
        let engines = spec
            .engines
            .iter()
            .map(|engine| {
                if engine.agent {
                    authority.issue(engine.id.as_str(), DEFAULT_DAYS, true)?;
                }
                EngineLayout::new(spec, engine, files, &model, &mut ports, control)
            })
            .collect::<Result<_, _>>()?;

        let config = config::coordinator(&CoordinatorInputs {
            http,
            control,
            policy: spec.policy,
            store: match &etcd {
                None => format!("embedded:{}", files.dir.join("coordinator.redb").display()),
                Some((_, port)) => format!("etcd:http://{}", loopback(*port)),
            },
            certs: &certs,
            served_name: &spec.served_name,
            model: &model,
            overlay: &spec.coordinator_config,
        });
        let program = ours(spec, "baton-coordinator")?;
        let coordinator = files.service("coordinator".into(), program, &config, &spec.log)?;
        Ok(Self { http, control, coordinator, engines, etcd })
    }
}

impl EngineLayout {
    fn new(
        spec: &FleetSpec,
        engine: &EngineSpec,
        files: &Files,
        model: &Path,
        ports: &mut Ports,
        control: u16,
    ) -> Result<Self, FleetError> {
        let socket = files.socket(&engine.id, "sock")?;
        let events = match &engine.kind {
            EngineKind::Mock(_) => KvEvents {
                live: format!("tcp://{}", loopback(free(ports)?)),
                replay: format!("tcp://{}", loopback(free(ports)?)),
            },
            // vLLM binds a tcp address only on all interfaces.
            EngineKind::Vllm(_) => KvEvents {
                live: format!("ipc://{}", files.socket(&engine.id, "events")?),
                replay: format!("ipc://{}", files.socket(&engine.id, "replay")?),
            },
        };
        let ports = EnginePorts {
            http: free(ports)?,
            transfer: match engine.transfer_port {
                Some(port) => port,
                None => free(ports)?,
            },
            metrics: free(ports)?,
        };
        let inputs = EngineInputs {
            port: ports.http,
            model,
            served_name: &spec.served_name,
            agent: engine.agent.then_some(AgentSide { socket: &socket, events: &events }),
            connector: engine.connector,
        };
        let (program, args, env) = match &engine.kind {
            EngineKind::Mock(mock) => {
                let env = vec![("RUST_LOG".to_owned(), spec.log.clone())];
                (ours(spec, "baton-mock-engine")?, config::mock_args(mock, &inputs), env)
            }
            EngineKind::Vllm(vllm) => {
                let mut env = vllm.env.clone();
                if let Some(connector) = &vllm.connector {
                    env.push(("PYTHONPATH".into(), absolute(connector)?.display().to_string()));
                }
                // A bare name is looked for on the search path.
                let python = match vllm.python.components().count() {
                    1 => vllm.python.clone(),
                    _ => absolute(&vllm.python)?,
                };
                (python, config::vllm_args(vllm, &inputs), env)
            }
        };
        let agent = match engine.agent {
            false => None,
            true => {
                let config = config::agent(
                    engine,
                    &ports,
                    control,
                    &files.certs(),
                    AgentSide { socket: &socket, events: &events },
                );
                let name = format!("agent-{}", engine.id);
                Some(files.service(name, ours(spec, "baton-agent")?, &config, &spec.log)?)
            }
        };
        let engine = files.job(format!("engine-{}", engine.id), program, args, env);
        Ok(Self { ports, engine, agent, kv_events: events.live })
    }
}

/// The job that makes the mock model.
pub(crate) fn make_model(spec: &FleetSpec, files: &Files) -> Result<Job, FleetError> {
    let args = vec!["make-model".into(), files.model().display().to_string()];
    Ok(files.job("make-model".into(), ours(spec, "baton-mock-engine")?, args, Vec::new()))
}

fn check(spec: &FleetSpec) -> Result<(), FleetError> {
    let mut ids: Vec<_> = spec.engines.iter().map(|engine| &engine.id).collect();
    ids.sort();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(FleetError::Spec(format!("two engines are named {}: rename one", pair[0])));
    }
    for engine in &spec.engines {
        match &engine.kind {
            EngineKind::Vllm(vllm) if engine.agent && engine.connector && vllm.connector.is_none() => {
                return Err(FleetError::Spec(format!(
                    "engine {} has an agent but no connector: name the directory of baton_connector",
                    engine.id
                )));
            }
            EngineKind::Vllm(_) if matches!(spec.model, Model::Mock) => {
                return Err(FleetError::Spec(format!(
                    "engine {} is vLLM, and the mock model has no weights: name a model directory",
                    engine.id
                )));
            }
            EngineKind::Vllm(_) | EngineKind::Mock(_) => {}
        }
    }
    Ok(())
}

fn free(ports: &mut Ports) -> Result<u16, FleetError> {
    ports.free().ok_or_else(|| FleetError::Spec("no free port on 127.0.0.1".into()))
}

fn ours(spec: &FleetSpec, name: &str) -> Result<PathBuf, FleetError> {
    binaries::ours(name, spec.bin_dir.as_deref())
}

fn absolute(path: &Path) -> Result<PathBuf, FleetError> {
    std::path::absolute(path).map_err(FleetError::io(path.display().to_string()))
}

fn etcd_job(files: &Files, client: u16, peer: u16) -> Result<Job, FleetError> {
    let (client, peer) = (format!("http://{}", loopback(client)), format!("http://{}", loopback(peer)));
    let cluster = format!("fleet={peer}");
    let data = files.dir.join("etcd").display().to_string();
    let args = [
        ["--name", "fleet"],
        ["--data-dir", &data],
        ["--listen-client-urls", &client],
        ["--advertise-client-urls", &client],
        ["--listen-peer-urls", &peer],
        ["--initial-advertise-peer-urls", &peer],
        ["--initial-cluster", &cluster],
    ];
    let args = args.concat().into_iter().map(str::to_owned).collect();
    Ok(files.job("etcd".into(), binaries::etcd()?, args, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VllmEngine;

    fn refused(spec: &FleetSpec) -> String {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Some(dir.path())).unwrap();
        Layout::new(spec, &files).err().expect("the spec is of no use").to_string()
    }

    #[test]
    fn specs_that_cannot_run_are_refused_with_a_mend() {
        let twice = FleetSpec::new(vec![EngineSpec::mock("a"), EngineSpec::mock("a")], Model::Mock, "m");
        assert!(refused(&twice).contains("rename one"));

        let vllm = |connector: Option<&str>| {
            let mut engine = VllmEngine::new("python3", "x");
            engine.connector = connector.map(PathBuf::from);
            vec![EngineSpec::new("a", EngineKind::Vllm(engine))]
        };
        let unconnected = FleetSpec::new(vllm(None), Model::Dir("m".into()), "m");
        assert!(refused(&unconnected).contains("name the directory of baton_connector"));
        let weightless = FleetSpec::new(vllm(Some("x")), Model::Mock, "m");
        assert!(refused(&weightless).contains("name a model directory"));

        let mut missing = FleetSpec::mock(1);
        missing.bin_dir = Some("/nowhere".into());
        let message = refused(&missing);
        assert!(message.contains("/nowhere") && message.contains("cargo build"), "{message}");
    }

    #[test]
    fn sockets_must_fit_their_address() {
        let long = Files { dir: PathBuf::from("/").join("x".repeat(100)), temporary: None };
        assert!(
            long.socket(&"e0".parse().unwrap(), "sock")
                .unwrap_err()
                .to_string()
                .contains("shorter directory")
        );
    }
}
