//! What the coordinator expects an engine to find cached, against what the engine finds.
//!
//! On fleets of their own: one engine with a small cache, so that blocks come and go all the time. Requests go through the
//! coordinator one by one; each answer says both what the placement counted on (`x-baton-hit-tokens`) and what the engine found
//! (`usage.prompt_tokens_details.cached_tokens`). Between them come bursts of requests at once, which leave several copies of
//! blocks behind. Of a burst both figures are reported, but the engine's is of a later moment than the placement: the
//! requests of a burst evict each other's blocks, and find each other's.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use baton_fleet::{EngineKind, EngineSpec, Fleet, FleetSpec, Model, Part};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::bed::Bed;
use crate::recording::{Listener, Recording, Step};
use crate::report::Line;
use crate::traffic::{Traffic, Turn};

/// After so many of them comes a burst.
const BETWEEN_BURSTS: usize = 10;
/// Requests of a burst.
const BURST: usize = 4;
/// Longest prompt, in tokens.
const LONGEST: usize = 384;
/// Blocks in the engine's cache.
const BLOCKS: u64 = 64;
/// The same, where three cache groups share it.
const HYBRID_BLOCKS: u64 = 160;
/// Events have arrived when for so long nothing has.
const QUIET: Duration = Duration::from_millis(60);
/// Least share of equal cases.
const EQUAL: f64 = 0.99;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let spec = bed.fleet.spec();
    let kind = &spec.engines[Bed::PREFILL].kind;
    let record = |name: &str| bed.record.as_ref().map(|folder| folder.join(name));
    let engine = EngineSpec::new("small", small(kind, BLOCKS));
    let plain = fleet(spec, engine, spec.model.clone(), &spec.served_name);
    let cases = bed.scale.index_cases;
    let plan = Plan { blocks: BLOCKS, cases, keeps_all: true, record: record("full.events") };
    let mut lines = vec![differential("index.differential", plain, plan).await?];
    if let Some(model) = &bed.hybrid_model {
        // The connector takes models with one cache group only.
        let engine = EngineSpec::new("small", small(kind, HYBRID_BLOCKS)).without_connector();
        let hybrid = fleet(spec, engine, Model::Dir(model.clone()), "hybrid");
        let plan = Plan { blocks: HYBRID_BLOCKS, cases, keeps_all: false, record: record("hybrid.events") };
        lines.push(differential("index.differential_hybrid", hybrid, plan).await?);
    }
    Ok(lines)
}

/// One comparison.
struct Plan {
    /// Blocks in the engine's cache.
    blocks: u64,
    /// Requests that are compared.
    cases: usize,
    /// Whether all that a request has computed stays cached until the next one comes.
    keeps_all: bool,
    /// The recording to write.
    record: Option<PathBuf>,
}

/// The same kind of engine with a small cache.
fn small(kind: &EngineKind, blocks: u64) -> EngineKind {
    let mut kind = kind.clone();
    match &mut kind {
        EngineKind::Mock(mock) => {
            mock.blocks = blocks;
            mock.args.push("--enable-prompt-tokens-details".into());
        }
        EngineKind::Vllm(vllm) => {
            let blocks = blocks.to_string();
            let args = ["--num-gpu-blocks-override", &blocks, "--max-model-len", "1024"];
            vllm.args.extend(args.map(str::to_owned));
            vllm.args.push("--enable-prompt-tokens-details".into());
        }
    }
    kind
}

/// A fleet of that engine alone.
fn fleet(like: &FleetSpec, engine: EngineSpec, model: Model, name: &str) -> FleetSpec {
    let mut spec = FleetSpec::new(vec![engine], model, name);
    spec.bin_dir.clone_from(&like.bin_dir);
    spec
}

/// Compares on this fleet, and writes a recording where one is asked for.
async fn differential(name: &str, spec: FleetSpec, plan: Plan) -> anyhow::Result<Line> {
    let mut line = Line::new(name);
    let fleet = Fleet::start(spec).await?;
    let outcome = compare(&fleet, &mut line, &plan).await;
    let stopped = fleet.shutdown().await;
    outcome?;
    stopped?;
    Ok(line)
}

/// How two counts of tokens compare.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    cases: usize,
    equal: usize,
    /// More was expected than found, by a block at most.
    over: usize,
    /// By more than a block.
    far_over: usize,
    /// Less was expected than found.
    under: usize,
    found_tokens: u64,
}

impl Tally {
    fn take(&mut self, expected: u64, found: u64, block: u64) {
        self.cases += 1;
        self.found_tokens += found;
        match () {
            () if expected == found => self.equal += 1,
            () if expected < found => self.under += 1,
            () if expected <= found + block => self.over += 1,
            () => self.far_over += 1,
        }
    }

    fn share(&self) -> f64 {
        self.equal as f64 / self.cases.max(1) as f64
    }
}

async fn compare(fleet: &Fleet, line: &mut Line, plan: &Plan) -> anyhow::Result<()> {
    let mut listener = Listener::start(fleet.kv_events(0)).await?;
    let block = match &fleet.spec().engines[0].kind {
        EngineKind::Mock(mock) => mock.block_size,
        EngineKind::Vllm(vllm) => vllm.block_size,
    };
    let mut recording = Recording {
        about: format!("the end-to-end line {}", line.name),
        model: fleet.model().to_owned(),
        block_size: block,
        num_blocks: plan.blocks,
        steps: Vec::new(),
    };
    let mut traffic = Traffic::new(3, block as usize, LONGEST);
    let (mut alone, mut together) = (Tally::default(), Tally::default());
    let (mut batches, mut tokens, mut unsettled) = (0, 0, 0);
    let block = u64::from(block);
    for case in 0..plan.cases {
        if case % BETWEEN_BURSTS == BETWEEN_BURSTS - 1 {
            let turns = traffic.burst(BURST);
            let mut asked = tokio::task::JoinSet::new();
            for turn in turns {
                let (client, model) = (fleet.client(), fleet.model().to_owned());
                asked.spawn(async move { (ask(&client, &model, &turn).await, turn) });
            }
            let mut last = None;
            while let Some(answered) = asked.join_next().await {
                let (answer, turn) = answered?;
                let answer = answer?;
                together.take(answer.expected, answer.found, block);
                traffic.answered(&turn, &answer.tokens);
                last = Some((turn, answer));
            }
            let (turn, answer) = last.context("an empty burst")?;
            settle(fleet, &turn, &answer.tokens, block, false).await?;
            batches += keep(&mut listener, &mut recording).await?;
        }
        let turn = traffic.next_turn();
        let answer = ask(&fleet.client(), fleet.model(), &turn).await?;
        alone.take(answer.expected, answer.found, block);
        tokens += turn.tokens.len();
        line.check(answer.expected <= answer.found + block, || {
            format!(
                "case {case}: {} tokens expected, {} found, of {}",
                answer.expected,
                answer.found,
                turn.tokens.len()
            )
        });
        recording.steps.push(Step::Prompt {
            tokens: turn.tokens.clone(),
            salt: turn.salt.map(str::to_owned),
            cached: answer.found,
        });
        traffic.answered(&turn, &answer.tokens);
        unsettled += usize::from(!settle(fleet, &turn, &answer.tokens, block, plan.keeps_all).await?);
        batches += keep(&mut listener, &mut recording).await?;
    }
    let evicted = recording.steps.iter().any(|step| match step {
        Step::Events(payload) => payload.windows(12).any(|bytes| bytes == b"BlockRemoved"),
        Step::Prompt { .. } => false,
    });
    line.figure("cases", alone.cases)
        .figure("equal_share", alone.share())
        .figure("over", alone.over)
        .figure("over_by_more_than_a_block", alone.far_over)
        .figure("under", alone.under)
        .figure("found_share", alone.found_tokens as f64 / tokens as f64)
        .figure("event_batches", batches)
        .figure("own_blocks_not_known", unsettled)
        .figure("burst_cases", together.cases)
        .figure("burst_equal_share", together.share())
        .figure("burst_over_by_more_than_a_block", together.far_over)
        .check(alone.share() >= EQUAL, || format!("{:?}: too few are equal", alone))
        .check(alone.far_over == 0, || format!("{:?}: too much was expected", alone))
        .check(evicted, || "nothing was evicted: the cache is too large to show anything".into());
    if let Some(path) = &plan.record {
        let bytes = recording.write(path)?;
        line.figure("recorded_bytes", bytes);
    }
    Ok(())
}

struct Answered {
    /// Tokens that the placement counted on.
    expected: u64,
    /// Tokens that the engine found cached.
    found: u64,
    /// What it generated.
    tokens: Vec<u32>,
}

fn body(model: &str, turn: &Turn) -> Value {
    let mut body = json!({
        "model": model,
        "prompt": turn.tokens,
        "max_tokens": turn.answer_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    });
    if let Some(salt) = turn.salt {
        body["cache_salt"] = salt.into();
    }
    body
}

async fn ask(client: &baton_fleet::Client, model: &str, turn: &Turn) -> anyhow::Result<Answered> {
    let reply = client.post("/v1/completions", &body(model, turn), &[]).await?.ok()?;
    let expected = reply.header("x-baton-hit-tokens").context("no x-baton-hit-tokens")?.parse()?;
    let value = reply.json()?;
    let ids = value["choices"][0]["token_ids"].as_array().context("no token_ids")?;
    // vLLM leaves the details out where nothing was cached.
    let found = value["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    let tokens = ids.iter().filter_map(|id| Some(id.as_u64()? as u32)).collect();
    Ok(Answered { expected, found, tokens })
}

/// Waits until the coordinator knows what the engine has done. With `own`, the request's own blocks are the last ones that the
/// engine cached, and the coordinator should know all of them; returns whether it does.
async fn settle(fleet: &Fleet, turn: &Turn, answer: &[u32], block: u64, own: bool) -> anyhow::Result<bool> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + PATIENCE;
    let whole = Turn { tokens: [&turn.tokens[..], answer].concat(), ..turn.clone() };
    // The last token of the answer was never computed.
    let computed = (whole.tokens.len() as u64 - 1) / block * block;
    let client = fleet.client();
    let (mut before, mut since) = (None, Instant::now());
    loop {
        let now = (
            fleet
                .metrics(Part::Coordinator)
                .await?
                .get("baton_event_batches_total", &[("result", "applied")]),
            fleet.metrics(Part::Agent(0)).await?.get("baton_agent_owned_blocks", &[]),
        );
        if before != Some(now) {
            (before, since) = (Some(now), Instant::now());
        }
        if since.elapsed() >= QUIET {
            let reply = client.post("/v1/route", &body(fleet.model(), &whole), &[]).await?.ok()?;
            let known = super::store::predicted_hit(&reply.json()?)?;
            if !own || known >= computed {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Takes the engine's events over into the recording.
async fn keep(listener: &mut Listener, recording: &mut Recording) -> anyhow::Result<usize> {
    let batches = listener.heard(Duration::from_millis(5)).await?;
    let heard = batches.len();
    recording.steps.extend(batches.into_iter().map(|batch| Step::Events(batch.to_vec())));
    Ok(heard)
}
