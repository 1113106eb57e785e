//! The running fleet.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::control::v1::EngineStatus;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::config::loopback;
use crate::control::Operator;
use crate::error::{FleetError, PartError};
use crate::http::Client;
use crate::layout::{self, EnginePorts, Files, Layout};
use crate::metrics::Metrics;
use crate::process::{self, CLEAN, Job, POLL, Process};
use crate::spec::{EngineKind, FleetSpec, Model};
use crate::watchdog::Watchdog;

/// How often a fleet is started anew on other ports where another program took one of its own.
const ATTEMPTS: usize = 3;

/// How long a part may take to stop once asked, before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// A process of a fleet. Engines and agents count as in [`FleetSpec::engines`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The coordinator.
    Coordinator,
    /// An engine.
    Engine(usize),
    /// The agent beside an engine.
    Agent(usize),
    /// The etcd server.
    Etcd,
}

/// A fleet of child processes. Dropping it kills them all; [`Fleet::shutdown`] stops them in order.
pub struct Fleet {
    // Dropped in this order: processes, watchdog, files.
    coordinator: Slot,
    engines: Vec<EngineSlot>,
    etcd: Option<(Slot, u16)>,
    operator: Operator,
    http: u16,
    control: u16,
    spec: FleetSpec,
    watchdog: Arc<Watchdog>,
    files: Files,
}

/// A part that may be running.
struct Slot {
    job: Job,
    process: Option<Process>,
}

struct EngineSlot {
    ports: EnginePorts,
    engine: Slot,
    agent: Option<Slot>,
    kv_events: String,
    /// The newest epoch that the coordinator was seen to know.
    epoch: u64,
}

impl Fleet {
    /// Starts a fleet and waits until the coordinator serves, with every engine registered, healthy and able to
    /// transfer.
    ///
    /// # Errors
    /// Where a part ends or is not ready in time, the error quotes the end of its log. Nothing is left running.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing running.
    pub async fn start(spec: FleetSpec) -> Result<Self, FleetError> {
        let mut attempt = 1;
        loop {
            match Self::attempt(spec.clone()).await {
                Err(error) if error.is_port_clash() && attempt < ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    async fn attempt(spec: FleetSpec) -> Result<Self, FleetError> {
        let deadline = Instant::now() + spec.start_deadline;
        let mut fleet = Self::new(spec)?;
        fleet.make_model(deadline).await?;
        if let Some((slot, _)) = &mut fleet.etcd {
            slot.spawn(&fleet.watchdog)?;
            fleet.wait_healthy(Part::Etcd, deadline).await?;
        }
        // Agents before engines: the connector looks for its agent's socket when the engine starts.
        fleet.coordinator.spawn(&fleet.watchdog)?;
        for slot in &mut fleet.engines {
            if let Some(agent) = &mut slot.agent {
                agent.spawn(&fleet.watchdog)?;
            }
            slot.engine.spawn(&fleet.watchdog)?;
        }
        fleet.wait_ready_until(deadline).await?;
        Ok(fleet)
    }

    /// A fleet of which nothing runs yet.
    fn new(spec: FleetSpec) -> Result<Self, FleetError> {
        let files = Files::new(spec.dir.as_deref())?;
        let watchdog = Watchdog::start(files.temporary.as_ref().map(TempDir::path))
            .map_err(FleetError::io("start the watchdog, /bin/sh"))?;
        let Layout { http, control, coordinator, engines, etcd } = Layout::new(&spec, &files)?;
        let [ca, cert, key] = ["ca.pem", "operator.pem", "operator.key"].map(|file| files.certs().join(file));
        let operator = Operator::new(&format!("https://{}", loopback(control)), &ca, &cert, &key)?;
        let engines = engines
            .into_iter()
            .map(|layout| EngineSlot {
                ports: layout.ports,
                engine: Slot::new(layout.engine),
                agent: layout.agent.map(Slot::new),
                kv_events: layout.kv_events,
                epoch: 0,
            })
            .collect();
        let etcd = etcd.map(|(job, port)| (Slot::new(job), port));
        let coordinator = Slot::new(coordinator);
        Ok(Self { coordinator, engines, etcd, operator, http, control, spec, watchdog, files })
    }

    async fn make_model(&self, deadline: Instant) -> Result<(), FleetError> {
        let made = self.files.model().join("tokenizer.json").exists();
        if made || !matches!(self.spec.model, Model::Mock) {
            return Ok(());
        }
        let job = layout::make_model(&self.spec, &self.files)?;
        let started = Instant::now();
        let process = Process::spawn(&job, &self.watchdog)?;
        loop {
            match process.ended() {
                Some(status) if status == CLEAN => return Ok(()),
                Some(status) => return Err(ended(&job, status, "it was making the model")),
                None if Instant::now() >= deadline => {
                    return Err(not_ready(&job, "done", started, "still running".into()));
                }
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// What it was started from.
    pub fn spec(&self) -> &FleetSpec {
        &self.spec
    }

    /// The model's name in requests.
    pub fn model(&self) -> &str {
        &self.spec.served_name
    }

    /// The directory of its configs, certificates and logs.
    pub fn dir(&self) -> &Path {
        &self.files.dir
    }

    /// Base URL of a part's HTTP: an agent's and etcd's serve `/metrics` and `/health`.
    pub fn url(&self, part: Part) -> String {
        let port = match part {
            Part::Coordinator => self.http,
            Part::Engine(i) => self.engines[i].ports.http,
            Part::Agent(i) => self.engines[i].ports.metrics,
            Part::Etcd => self.etcd.as_ref().expect("the fleet runs etcd").1,
        };
        format!("http://{}", loopback(port))
    }

    /// URL of the coordinator's control plane.
    pub fn control_url(&self) -> String {
        format!("https://{}", loopback(self.control))
    }

    /// The ports of engine `i` and its agent.
    pub fn ports(&self, i: usize) -> &EnginePorts {
        &self.engines[i].ports
    }

    /// The ZMQ address at which an engine with an agent publishes its KV events.
    pub fn kv_events(&self, i: usize) -> &str {
        &self.engines[i].kv_events
    }

    /// A new client of the coordinator, without connections yet.
    pub fn client(&self) -> Client {
        self.client_of(Part::Coordinator)
    }

    /// A new client of any part.
    pub fn client_of(&self, part: Part) -> Client {
        Client::new(&self.url(part)).expect("the fleet's own URLs are of the right form")
    }

    /// The control plane, with the operator's certificate.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Scrapes a part.
    pub async fn metrics(&self, part: Part) -> Result<Metrics, FleetError> {
        Ok(self.client_of(part).metrics().await?)
    }

    /// A part's log: both its output streams, over all its lives.
    pub fn log_path(&self, part: Part) -> &Path {
        &self.slot(part).job.log
    }

    /// The last lines of a part's log.
    pub fn log_tail(&self, part: Part) -> String {
        process::tail(self.log_path(part))
    }

    /// A part's process id, which is its process group's too; `None` where it was stopped or killed.
    pub fn pid(&self, part: Part) -> Option<u32> {
        self.slot(part).process.as_ref().map(Process::pid)
    }

    /// All parts, in the order in which they start.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = self.etcd.iter().map(|_| Part::Etcd).collect();
        parts.push(Part::Coordinator);
        for (i, slot) in self.engines.iter().enumerate() {
            parts.extend(slot.agent.iter().map(|_| Part::Agent(i)));
            parts.push(Part::Engine(i));
        }
        parts
    }

    /// Fails where a part that was not stopped has ended.
    pub fn check_alive(&self) -> Result<(), FleetError> {
        for part in self.parts() {
            self.slot(part).check_alive("it was to serve")?;
        }
        Ok(())
    }

    /// Kills a part at once: SIGKILL to its whole process group.
    pub fn kill(&mut self, part: Part) {
        // Dropping a process kills its group and waits for it.
        self.slot_mut(part).process = None;
    }

    /// Asks a part to stop (SIGTERM) and waits; kills it after 20 s. Returns how it ended, such as `exit code
    /// 0`, or `None` where it had to be killed or was not running.
    pub async fn stop(&mut self, part: Part) -> Option<String> {
        self.slot_mut(part).process.take()?.stop(STOP_GRACE).await
    }

    /// Freezes a part: SIGSTOP to its whole process group.
    pub fn pause(&self, part: Part) {
        if let Some(process) = &self.slot(part).process {
            process.signal(Signal::STOP);
        }
    }

    /// Ends a [`Fleet::pause`].
    pub fn resume(&self, part: Part) {
        if let Some(process) = &self.slot(part).process {
            process.signal(Signal::CONT);
        }
    }

    /// Stops a part if it runs, starts it with the same config and ports, and waits until it serves again and,
    /// where it is an engine or an agent, the coordinator knows its new epoch.
    pub async fn restart(&mut self, part: Part) -> Result<(), FleetError> {
        self.stop(part).await;
        self.start_part(part)?;
        let known = match part {
            Part::Engine(i) | Part::Agent(i) => self.engines[i].agent.is_some().then_some(i),
            Part::Coordinator | Part::Etcd => None,
        };
        if let Some(i) = known {
            // What was known before the restart does not count.
            self.engines[i].epoch += 1;
        }
        self.wait_ready().await
    }

    /// Command-line arguments that the coordinator is given besides its config from its next start on, such as
    /// `--store embedded:PATH`. They replace those of an earlier call.
    pub fn set_coordinator_args(&mut self, args: &[&str]) {
        // Before them: --config and its file.
        self.coordinator.job.args.truncate(2);
        self.coordinator.job.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    }

    /// Starts a part that was killed or stopped, and does not wait.
    pub fn start_part(&mut self, part: Part) -> Result<(), FleetError> {
        let watchdog = Arc::clone(&self.watchdog);
        self.slot_mut(part).spawn(&watchdog)
    }

    /// Waits until every part that was not stopped serves, and the coordinator knows every engine that runs with
    /// its agent as healthy and able to transfer, at an epoch no smaller than seen before.
    pub async fn wait_ready(&mut self) -> Result<(), FleetError> {
        self.wait_ready_until(Instant::now() + self.spec.start_deadline).await
    }

    async fn wait_ready_until(&mut self, deadline: Instant) -> Result<(), FleetError> {
        for part in self.parts() {
            if self.slot(part).process.is_some() {
                self.wait_healthy(part, deadline).await?;
            }
        }
        if self.coordinator.process.is_none() {
            return Ok(());
        }
        let started = Instant::now();
        loop {
            let missing = match self.operator.fleet().await {
                Ok(engines) => match self.missing(&engines) {
                    None => break,
                    Some((i, detail)) => (Part::Agent(i), detail),
                },
                Err(error) => (Part::Coordinator, error.to_string()),
            };
            self.check_alive()?;
            if Instant::now() >= deadline {
                return Err(not_ready(&self.slot(missing.0).job, "registered", started, missing.1));
            }
            tokio::time::sleep(POLL).await;
        }
        if self.engines.iter().any(EngineSlot::runs_with_agent) {
            self.wait_for(Part::Coordinator, "/ready", deadline).await?;
        }
        Ok(())
    }

    /// The first engine that the coordinator does not know as ready, and what it lacks; takes note of epochs.
    fn missing(&mut self, engines: &[EngineStatus]) -> Option<(usize, String)> {
        for (i, (slot, spec)) in self.engines.iter_mut().zip(&self.spec.engines).enumerate() {
            if !slot.runs_with_agent() {
                continue;
            }
            let found = engines.iter().find_map(|status| {
                let registration = status.registration.as_ref()?;
                (registration.engine_id == spec.id.as_str()).then_some((status, registration))
            });
            let lack = match found {
                None => "not registered with the coordinator".to_owned(),
                Some((_, registration)) if registration.epoch < slot.epoch => {
                    format!("registered under the old epoch {}", registration.epoch)
                }
                Some((_, registration)) if spec.connector && !registration.can_transfer => {
                    "its connector is not attached".into()
                }
                Some((status, _)) if !status.healthy => "not healthy".into(),
                Some((_, registration)) => {
                    slot.epoch = registration.epoch;
                    continue;
                }
            };
            return Some((i, format!("engine {}: {lack}", spec.id)));
        }
        None
    }

    async fn wait_healthy(&self, part: Part, deadline: Instant) -> Result<(), FleetError> {
        self.wait_for(part, "/health", deadline).await
    }

    async fn wait_for(&self, part: Part, path: &str, deadline: Instant) -> Result<(), FleetError> {
        let started = Instant::now();
        let client = self.client_of(part).deadline(Duration::from_secs(5));
        loop {
            let last = match client.get(path).await {
                Ok(reply) if reply.status.is_success() => return Ok(()),
                Ok(reply) => format!("{path} answers {}", reply.status),
                Err(error) => error.to_string(),
            };
            // Whichever part ended is the one to read about, not the one that waits for it.
            self.check_alive()?;
            if Instant::now() >= deadline {
                let waiting = if path == "/ready" { "ready" } else { "healthy" };
                return Err(not_ready(&self.slot(part).job, waiting, started, last));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops everything in order: coordinator, engines, agents, etcd.
    ///
    /// # Errors
    /// Names the parts that had ended before, that had to be killed, or that ended with an error. Everything is
    /// stopped all the same.
    pub async fn shutdown(mut self) -> Result<(), FleetError> {
        let mut unclean = Vec::new();
        let order = |part: &Part| match part {
            Part::Coordinator => 0,
            Part::Engine(_) => 1,
            Part::Agent(_) => 2,
            Part::Etcd => 3,
        };
        let mut parts = self.parts();
        parts.sort_by_key(order);
        for stage in parts.chunk_by(|a, b| order(a) == order(b)) {
            let mut stopping = tokio::task::JoinSet::new();
            for part in stage {
                let slot = self.slot_mut(*part);
                let Some(process) = slot.process.take() else { continue };
                let name = slot.job.name.clone();
                // etcd ends with the signal; vLLM with the signal or with 0, as its version has it.
                let any_code = match part {
                    Part::Etcd => true,
                    Part::Engine(i) => matches!(self.spec.engines[*i].kind, EngineKind::Vllm(_)),
                    Part::Coordinator | Part::Agent(_) => false,
                };
                stopping.spawn(async move {
                    let early = process.ended();
                    let status = process.stop(STOP_GRACE).await;
                    match (early, status) {
                        (Some(status), _) => Some(format!("{name} had ended with {status}")),
                        (None, None) => Some(format!("{name} did not stop within {STOP_GRACE:?}")),
                        (None, Some(status)) if status == CLEAN || any_code => None,
                        (None, Some(status)) => Some(format!("{name} ended with {status}")),
                    }
                });
            }
            unclean.extend(stopping.join_all().await.into_iter().flatten());
        }
        if unclean.is_empty() { Ok(()) } else { Err(FleetError::Unclean(unclean.join("; "))) }
    }

    fn slot(&self, part: Part) -> &Slot {
        match part {
            Part::Coordinator => &self.coordinator,
            Part::Engine(i) => &self.engines[i].engine,
            Part::Agent(i) => self.engines[i].agent.as_ref().expect("the engine has an agent"),
            Part::Etcd => &self.etcd.as_ref().expect("the fleet runs etcd").0,
        }
    }

    fn slot_mut(&mut self, part: Part) -> &mut Slot {
        match part {
            Part::Coordinator => &mut self.coordinator,
            Part::Engine(i) => &mut self.engines[i].engine,
            Part::Agent(i) => self.engines[i].agent.as_mut().expect("the engine has an agent"),
            Part::Etcd => &mut self.etcd.as_mut().expect("the fleet runs etcd").0,
        }
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet")
            .field("dir", &self.files.dir)
            .field("http", &self.http)
            .finish_non_exhaustive()
    }
}

impl Slot {
    fn new(job: Job) -> Self {
        Self { job, process: None }
    }

    fn spawn(&mut self, watchdog: &Arc<Watchdog>) -> Result<(), FleetError> {
        self.process = None;
        self.process = Some(Process::spawn(&self.job, watchdog)?);
        Ok(())
    }

    fn check_alive(&self, waiting: &str) -> Result<(), FleetError> {
        match self.process.as_ref().and_then(Process::ended) {
            Some(status) => Err(ended(&self.job, status, waiting)),
            None => Ok(()),
        }
    }
}

impl EngineSlot {
    fn runs_with_agent(&self) -> bool {
        self.engine.process.is_some() && self.agent.as_ref().is_some_and(|agent| agent.process.is_some())
    }
}

fn ended(job: &Job, status: String, waiting: &str) -> FleetError {
    failed(job, format!("ended with {status} while {waiting}"))
}

fn not_ready(job: &Job, waiting: &str, started: Instant, last: String) -> FleetError {
    failed(job, format!("is not {waiting} after {:.1?} ({last})", started.elapsed()))
}

fn failed(job: &Job, problem: String) -> FleetError {
    let (part, log, tail) = (job.name.clone(), job.log.clone(), process::tail(&job.log));
    FleetError::Part(Box::new(PartError { part, problem, log, tail }))
}
