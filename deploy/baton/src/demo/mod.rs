//! `baton demo`: one workload, three modes, one table.

mod client;
mod report;
pub(crate) mod workload;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use baton_fleet::{EngineKind, EngineSpec, Fleet, FleetSpec, MockEngine, Model, Part, Policy};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::task::JoinSet;

use self::client::Outcome;
use self::report::{Counters, Figures};

/// Order of the modes. The adaptive one comes last, so that what it knows of engines and links has been measured.
const MODES: [Policy; 3] = [Policy::Colocated, Policy::Disaggregated, Policy::Adaptive];

const ENGINES: usize = 4;

/// How long caches may take to be empty between two modes.
const RESET_DEADLINE: Duration = Duration::from_secs(15);

/// Failed requests that are shown with their reason.
const MOST_REASONS: usize = 5;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// End with the figures as one JSON line
    #[arg(long)]
    json: bool,
    /// Seed of the workload
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep configs, certificates and logs here [default: a temporary directory]
    #[arg(long)]
    dir: Option<std::path::PathBuf>,
}

/// A fleet of mock engines, each as fast as an L40S with an 8B model in bf16 (modelled, not measured: prefill
/// 11.4 + 0.0622·n + 3.07e-6·(n·p + n²/2) ms, decode step 22.2 + 0.0302·B + 1.95e-4·Σctx ms). KV takes 2 KiB a token,
/// 1/64 of that model's, since all of it is really computed, hashed and sent here.
pub(crate) fn spec(engines: usize) -> FleetSpec {
    let mock = MockEngine {
        block_size: 32,
        blocks: 2048,
        prefill_ms: Some([11.41, 0.06222, 3.07e-6]),
        decode_ms: Some([22.23, 0.0302, 1.95e-4]),
        args: ["--kv-layers", "4", "--kv-heads", "2", "--kv-head-bytes", "128"].map(str::to_owned).to_vec(),
    };
    let engines =
        (0..engines).map(|i| EngineSpec::new(&format!("e{i}"), EngineKind::Mock(mock.clone()))).collect();
    FleetSpec::new(engines, Model::Mock, "mock")
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let progress = Progress::new();
    let scripts = workload::scripts(arguments.seed);
    let mut spec = spec(ENGINES);
    spec.dir = arguments.dir;

    progress.say(&format!("starting a coordinator and {ENGINES} mock engines with their agents"));
    let fleet = Fleet::start(spec).await?;
    progress.say("measuring engines and links");
    warm_up(&fleet).await.context("warm-up")?;

    let mut modes: Vec<(Policy, Figures)> = Vec::new();
    let mut runs: Vec<Vec<Outcome>> = Vec::new();
    for policy in MODES {
        reset(&fleet).await.with_context(|| format!("before mode {}", policy.as_str()))?;
        let before = counters(&fleet).await?;
        let outcomes = run_mode(&fleet, &scripts, policy, &progress).await?;
        let went = counters(&fleet).await? - before;
        modes.push((policy, Figures::new(&outcomes, runs.first().map(Vec::as_slice), went)));
        runs.push(outcomes);
    }
    fleet.check_alive()?;
    let stopped = fleet.shutdown().await;

    show(&modes, &runs, arguments.seed);
    println!("\nwhole run {:.0} s, nothing left running", started.elapsed().as_secs_f64());
    let failures: u64 = modes.iter().map(|(_, figures)| figures.failures).sum();
    if arguments.json {
        let figures: serde_json::Map<_, _> = modes
            .iter()
            .map(|(policy, figures)| Ok((policy.as_str().to_owned(), serde_json::to_value(figures)?)))
            .collect::<Result<_, serde_json::Error>>()?;
        println!("{}", serde_json::Value::Object(figures));
    }
    stopped?;
    ensure!(failures == 0, "{failures} requests failed");
    Ok(())
}

/// Has every engine prefill and decode, and every pair of engines hand over, so that the coordinator has measured
/// what it prices.
async fn warm_up(fleet: &Fleet) -> anyhow::Result<()> {
    let client = fleet.client();
    for round in 0..3 {
        for policy in [Policy::Colocated, Policy::Disaggregated] {
            let mut asking = JoinSet::new();
            for i in 0..2 * ENGINES {
                let (client, model) = (client.clone(), fleet.model().to_owned());
                let prompt = format!("{round} {i} {}", "warm ".repeat(200 * (i + 1)));
                asking.spawn(async move {
                    let body = json!({"prompt": prompt, "max_tokens": 4});
                    client::ask(&client, &model, policy, ("/v1/completions", body)).await
                });
            }
            for result in asking.join_all().await {
                if let Err(reason) = result {
                    bail!("{}: {reason}", policy.as_str());
                }
            }
        }
    }
    Ok(())
}

/// Empties every engine's prefix cache, and waits until the coordinator knows.
async fn reset(fleet: &Fleet) -> anyhow::Result<()> {
    let deadline = Instant::now() + RESET_DEADLINE;
    for i in 0..ENGINES {
        let client = fleet.client_of(Part::Engine(i));
        // Blocks that are still held for a transfer cannot be dropped.
        while client.post("/reset_prefix_cache", &json!({}), &[]).await?.ok()?.json()?["success"] == false {
            ensure!(Instant::now() < deadline, "engine {i} still has blocks in use");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    loop {
        let owned: u64 = fleet.operator().fleet().await?.iter().map(|engine| engine.owned_blocks).sum();
        if owned == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the coordinator still counts {owned} blocks in emptied caches");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn run_mode(
    fleet: &Fleet,
    scripts: &[workload::Script],
    policy: Policy,
    progress: &Progress,
) -> anyhow::Result<Vec<Outcome>> {
    let requests: usize = scripts.iter().map(|script| script.turns.len()).sum();
    let bar = progress.bar(policy, requests);
    let client = fleet.client();
    let clients: Vec<_> = scripts
        .iter()
        .map(|script| {
            let bar = bar.clone();
            let script = script.clone();
            let playing =
                client::play(client.clone(), fleet.model().to_owned(), script, policy, move || bar.inc(1));
            tokio::spawn(playing)
        })
        .collect();
    let mut outcomes = Vec::with_capacity(requests);
    for playing in clients {
        outcomes.extend(playing.await.context("a client of the workload")?);
    }
    bar.finish_and_clear();
    Ok(outcomes)
}

async fn counters(fleet: &Fleet) -> anyhow::Result<Counters> {
    let mut sum = Counters::default();
    for i in 0..ENGINES {
        let engine = fleet.metrics(Part::Engine(i)).await?;
        let local = [("source", "local_compute")];
        sum.computed_tokens += engine.sum("vllm:prompt_tokens_by_source_total", &local);
        let agent = fleet.metrics(Part::Agent(i)).await?;
        sum.received_bytes += agent.sum("baton_agent_received_bytes_total", &[]);
    }
    Ok(sum)
}

fn show(modes: &[(Policy, Figures)], runs: &[Vec<Outcome>], seed: u64) {
    println!("\n{ENGINES} mock engines, each timed like an 8B model on an L40S; workload of seed {seed}.");
    println!("Prefix caches were emptied before each mode; every mode ran the same requests.\n");
    print!("{}", report::table(modes));
    println!("\nhit tokens: prompt tokens that no engine had to compute; moved: KV that agents received.");

    for ((policy, _), outcomes) in modes.iter().zip(runs) {
        let failed = outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err());
        for reason in failed.take(MOST_REASONS) {
            println!("{}: failed: {reason}", policy.as_str());
        }
        let differing =
            runs[0].iter().zip(outcomes).filter(|(first, this)| match (&first.result, &this.result) {
                (Ok(first), Ok(this)) => first.text != this.text,
                _ => false,
            });
        let differing = differing.count();
        if differing > 0 {
            println!("{}: {differing} answers differ from those of {}", policy.as_str(), modes[0].0.as_str());
        }
    }
    if modes.iter().all(|(_, figures)| figures.failures == 0) {
        println!("\nAll modes gave the same answers, to the letter.");
    }
    if let Some(((policy, _), outcomes)) = modes.iter().zip(runs).next_back() {
        println!("\nWhat {} chose, and why (predicted):", policy.as_str());
        for line in report::choices(outcomes) {
            println!("  {line}");
        }
    }
}

/// Progress on standard error: a bar on a terminal, else a line now and then.
struct Progress {
    terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() }
    }

    fn say(&self, text: &str) {
        eprintln!("{text}");
    }

    fn bar(&self, policy: Policy, requests: usize) -> ProgressBar {
        if !self.terminal {
            eprintln!("{}: {requests} requests", policy.as_str());
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(requests as u64).with_message(policy.as_str());
        let style = ProgressStyle::with_template("{msg:13} {bar:40} {pos}/{len} requests, {elapsed}");
        bar.with_style(style.expect("the template is sound"))
    }
}
