//! The fleet under test: two engines with agents, a plain one beside them as reference, the coordinator, etcd.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use baton_fleet::{Client, EngineKind, Fleet, FleetSpec, Metrics, Part};
use baton_proto::{EngineId, TransferId};
use serde_json::json;
use tokio::time::Instant;

use crate::ask::{Answer, Ask};
use crate::legs::{self, HeldPrompt};
use crate::prompts::Prompts;

/// How large the scenarios' prompts are. What a mock engine does in milliseconds takes a CPU seconds.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Longest prompt, in tokens.
    pub longest: usize,
    /// Prompts that go through a fault, in tokens.
    pub fault_tokens: usize,
    /// Tokens generated for each answer that is compared.
    pub answer_tokens: u32,
    /// Requests for which the index is compared with the engine.
    pub index_cases: usize,
    /// Repetitions of a timed comparison.
    pub rounds: usize,
    /// How long to wait for something that has to happen soon.
    pub patience: Duration,
}

/// The fleet under test, and what the scenarios share.
pub struct Bed {
    /// The fleet: engines [`Bed::PREFILL`] and [`Bed::DECODE`] with agents, [`Bed::PLAIN`] without.
    pub fleet: Fleet,
    /// Sizes.
    pub scale: Scale,
    /// Source of fresh prompts.
    pub prompts: Prompts,
    /// A model of which some layers see a window only, for vLLM.
    pub hybrid_model: Option<PathBuf>,
    /// The folder in which the scenario `index` keeps engines' KV events.
    pub record: Option<PathBuf>,
    next_transfer: u64,
}

/// Counters of both engines with agents and of their agents at one moment.
pub struct Counters {
    engines: [Metrics; 2],
    agents: [Option<Metrics>; 2],
}

impl Counters {
    /// Growth of an engine's counter since `before`.
    pub fn engine(&self, before: &Counters, i: usize, name: &str) -> f64 {
        self.engine_labelled(before, i, name, &[])
    }

    /// The same, of the series that carry these labels.
    pub fn engine_labelled(&self, before: &Counters, i: usize, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.engines[i].sum(name, labels) - before.engines[i].sum(name, labels)
    }

    /// Growth of an agent's counter since `before`; all of it where the agent was restarted in between.
    pub fn agent(&self, before: &Counters, i: usize, name: &str, labels: &[(&str, &str)]) -> f64 {
        let at = |counters: &Counters| counters.agents[i].as_ref().map_or(0.0, |m| m.sum(name, labels));
        let (now, then) = (at(self), at(before));
        if now < then { now } else { now - then }
    }

    /// An agent's gauge.
    pub fn agent_gauge(&self, i: usize, name: &str) -> f64 {
        self.agents[i].as_ref().map_or(0.0, |m| m.sum(name, &[]))
    }

    /// The errors of failed pulls that an agent counted since `before`, with how many of each.
    pub fn pull_errors(&self, before: &Counters, i: usize) -> Vec<String> {
        const PULLS: &str = "baton_agent_pulls_total";
        let Some(now) = &self.agents[i] else { return Vec::new() };
        let errors: std::collections::BTreeSet<&String> = now
            .matching(PULLS, &[("result", "failed")])
            .filter_map(|sample| sample.labels.get("error"))
            .collect();
        errors
            .into_iter()
            .map(|error| (error, self.agent(before, i, PULLS, &[("result", "failed"), ("error", error)])))
            .filter(|(_, by)| *by > 0.0)
            .map(|(error, by)| format!("{error}:{by}"))
            .collect()
    }
}

impl Bed {
    /// The engine whose part in a handoff that the suite itself runs is prefill.
    pub const PREFILL: usize = 0;
    /// The engine whose part in such a handoff is decode.
    pub const DECODE: usize = 1;
    /// The reference: no connector, no agent, unknown to the coordinator.
    pub const PLAIN: usize = 2;

    /// Starts the fleet. The spec has three engines, the last one plain.
    pub async fn start(spec: FleetSpec, scale: Scale) -> anyhow::Result<Self> {
        let fits = spec.engines.len() == 3 && spec.engines.iter().map(|e| e.agent).eq([true, true, false]);
        ensure!(fits, "the suite needs two engines with agents and a plain one");
        let fleet = Fleet::start(spec).await?;
        let bed = Self {
            fleet,
            scale,
            prompts: Prompts::new(20),
            hybrid_model: None,
            record: None,
            next_transfer: 1,
        };
        // The first request to an engine pays for what it sets up lazily.
        for i in [Self::PREFILL, Self::DECODE, Self::PLAIN] {
            Ask::completion(bed.model(), "Warm up.", 4).send(&bed.engine(i), &[]).await?;
        }
        Ok(bed)
    }

    /// Stops the fleet in order; fails where a part has died or does not stop.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        Ok(self.fleet.shutdown().await?)
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        self.fleet.model()
    }

    fn client(&self, part: Part) -> Client {
        self.fleet.client_of(part).deadline(Duration::from_secs(300))
    }

    /// A client of the coordinator.
    pub fn coordinator(&self) -> Client {
        self.client(Part::Coordinator)
    }

    /// A client of an engine.
    pub fn engine(&self, i: usize) -> Client {
        self.client(Part::Engine(i))
    }

    /// A client of the reference engine.
    pub fn plain(&self) -> Client {
        self.engine(Self::PLAIN)
    }

    /// Name of an engine.
    pub fn engine_id(&self, i: usize) -> EngineId {
        self.fleet.spec().engines[i].id.clone()
    }

    /// The engine of that name.
    pub fn index_of(&self, name: &str) -> anyhow::Result<usize> {
        let engines = &self.fleet.spec().engines;
        let found = engines.iter().position(|engine| engine.agent && engine.id.as_str() == name);
        found.with_context(|| format!("{name:?} is no engine of the fleet"))
    }

    /// Where an agent's QUIC endpoint listens.
    pub fn transfer_address(&self, i: usize) -> SocketAddr {
        ([127, 0, 0, 1], self.fleet.ports(i).transfer).into()
    }

    /// Logs of both agents.
    pub fn agent_logs(&self) -> [&Path; 2] {
        [Self::PREFILL, Self::DECODE].map(|i| self.fleet.log_path(Part::Agent(i)))
    }

    /// Counters of engines and agents; nothing for an agent that is down.
    pub async fn counters(&self) -> anyhow::Result<Counters> {
        let mut agents = [None, None];
        for (i, slot) in agents.iter_mut().enumerate() {
            if self.fleet.pid(Part::Agent(i)).is_some() {
                *slot = Some(self.fleet.metrics(Part::Agent(i)).await?);
            }
        }
        let engine = |i| self.fleet.metrics(Part::Engine(i));
        Ok(Counters { engines: [engine(0).await?, engine(1).await?], agents })
    }

    /// The coordinator's metrics.
    pub async fn coordinator_metrics(&self) -> anyhow::Result<Metrics> {
        Ok(self.fleet.metrics(Part::Coordinator).await?)
    }

    /// A completion over a fresh prompt of about that many tokens, and what the plain engine answers.
    pub async fn fresh(&mut self, tokens: usize) -> anyhow::Result<(Ask, Answer)> {
        let ask = self.fresh_ask(tokens).await?;
        let expected = ask.send(&self.plain(), &[]).await.context("the plain engine")?;
        Ok((ask, expected))
    }

    /// A completion over a fresh prompt of about that many tokens.
    pub async fn fresh_ask(&mut self, tokens: usize) -> anyhow::Result<Ask> {
        let plain = self.plain();
        let model = self.model().to_owned();
        let (text, _) = self.prompts.fit(&plain, &model, tokens).await?;
        Ok(Ask::completion(&model, text, self.scale.answer_tokens))
    }

    /// Has engine `i` compute a request's prompt and hold it.
    pub async fn hold(&mut self, i: usize, ask: &Ask, lease_ms: u32) -> anyhow::Result<HeldPrompt> {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.prompts.number().to_be_bytes());
        id[8..].copy_from_slice(&self.next_transfer.to_be_bytes());
        self.next_transfer += 1;
        let id = TransferId::from_bytes(id);
        legs::hold(&self.engine(i), self.engine_id(i), id, ask, lease_ms).await
    }

    /// Has engine `i` pull what is held from `address`, and answer.
    pub async fn pull(
        &self,
        i: usize,
        ask: &Ask,
        held: &HeldPrompt,
        address: SocketAddr,
    ) -> anyhow::Result<Answer> {
        const DEADLINE_MS: u32 = 15_000;
        let ask = legs::pulling(ask, held, &address.to_string(), DEADLINE_MS)?;
        ask.send(&self.engine(i), &[]).await.context("pull leg")
    }

    /// Bytes that the KV of one block takes.
    pub async fn block_bytes(&self) -> anyhow::Result<u64> {
        let engines = self.fleet.operator().fleet().await?;
        let known = engines.iter().filter_map(|status| Some(status.registration.as_ref()?.block_bytes)).max();
        known.filter(|bytes| *bytes > 0).context("the coordinator knows no block size in bytes")
    }

    /// Tokens in one block.
    pub fn block_size(&self) -> u64 {
        match &self.fleet.spec().engines[Self::PREFILL].kind {
            EngineKind::Mock(mock) => mock.block_size.into(),
            EngineKind::Vllm(vllm) => vllm.block_size.into(),
        }
    }

    /// See [`until`].
    pub async fn until(
        &self,
        what: &str,
        done: impl AsyncFnMut() -> anyhow::Result<Result<(), String>>,
    ) -> anyhow::Result<()> {
        until(self.scale.patience, what, done).await
    }

    /// See [`settled`].
    pub async fn settled(&self) -> anyhow::Result<()> {
        settled(&self.fleet, self.scale.patience).await
    }

    /// Empties the prefix caches of the engines with agents, which succeeds only where every block is free.
    pub async fn empty_caches(&self) -> anyhow::Result<()> {
        for i in [Self::PREFILL, Self::DECODE] {
            let reply = self.engine(i).post("/reset_prefix_cache", &json!({}), &[]).await?.ok()?;
            let success = reply.json()?["success"] == true;
            ensure!(success, "{} did not empty its prefix cache: blocks are in use", self.engine_id(i));
        }
        Ok(())
    }

    /// Brings back every part that a failed scenario left stopped.
    pub async fn mend(&mut self) -> anyhow::Result<()> {
        for part in self.fleet.parts() {
            if self.fleet.pid(part).is_none() {
                self.fleet.start_part(part)?;
            }
            self.fleet.resume(part);
        }
        Ok(self.fleet.wait_ready().await?)
    }
}

/// Waits until `done` says so; its words for what is missing go into the error.
async fn until(
    patience: Duration,
    what: &str,
    mut done: impl AsyncFnMut() -> anyhow::Result<Result<(), String>>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let missing = match done().await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(missing)) => missing,
            Err(error) => format!("{error:#}"),
        };
        ensure!(Instant::now() < deadline, "{what}: not within {patience:?}: {missing}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the first two engines run nothing and have no block in use, and their agents hold none: nothing has leaked. Blocks
/// that are cached but free do not count as used.
pub async fn settled(fleet: &Fleet, patience: Duration) -> anyhow::Result<()> {
    until(patience, "nothing running, used or held", async || {
        for i in [Bed::PREFILL, Bed::DECODE] {
            let engine = fleet.metrics(Part::Engine(i)).await?;
            let id = &fleet.spec().engines[i].id;
            for gauge in
                ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
            {
                let value = engine.get(gauge, &[]).with_context(|| format!("no {gauge}"))?;
                if value.abs() > 1e-9 {
                    return Ok(Err(format!("{gauge} of {id} is {value}")));
                }
            }
            if fleet.pid(Part::Agent(i)).is_some() {
                let holds = fleet.metrics(Part::Agent(i)).await?;
                let holds = holds.get("baton_agent_holds", &[]).context("no baton_agent_holds")?;
                if holds != 0.0 {
                    return Ok(Err(format!("agent of {id} has {holds} holds")));
                }
            }
        }
        Ok(Ok(()))
    })
    .await
}
