//! Requests per second through Baton's coordinator, every one tokenised and placed by its blocks, beside vllm-router's
//! `cache_aware`, in one run on one machine.
//!
//! Both sides stand before the same two mock engines, which answer from a constant. 64 shared prefixes, each
//! followed by a tail that is used once; wrk sends them over 16 connections. The sides take turns; figures are medians over
//! the rounds. Baton's engines are registered over real control sessions and hold every shared prefix, half of
//! them each. The bench fails unless every answer is 200, the engines count what wrk counts, and Baton's ids and hits
//! are those of the tokenizer on whole texts.

mod agent;
mod backend;
mod client;
mod process;
mod text;
mod workload;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_proto::ContentKeys;
use baton_proto::block_hash::BlockHasher;
use clap::Parser;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use self::agent::{Agent, Certificates};
use self::backend::Backend;
use self::process::{Program, own_cpu_seconds};
use self::text::Words;
use self::workload::{PREFIXES, Workload, encode};

const MODEL: &str = "bench";
const BLOCK: usize = 16;
/// What the load sent to an engine is expected there for less than this after its end.
const EXPECTED: Duration = Duration::from_secs(6);
const CONNECTIONS: usize = 16;
/// Most requests of one run of wrk: each run's numbers are its own.
const NUMBERS_PER_RUN: usize = 1_000_000;

/// Baton's proxy path beside vllm-router.
#[derive(Parser)]
struct Arguments {
    /// The release build of baton-coordinator.
    #[arg(long)]
    coordinator: PathBuf,
    /// The program vllm-router.
    #[arg(long)]
    router: PathBuf,
    /// A directory with the model's tokenizer.json and tokenizer_config.json.
    #[arg(long)]
    model: PathBuf,
    /// The script for wrk.
    #[arg(long)]
    script: PathBuf,
    /// Bodies' sizes in bytes.
    #[arg(long, value_delimiter = ',', default_values_t = [200, 8192, 225_280])]
    sizes: Vec<usize>,
    /// Rounds of each side and size.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of a round.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Leaves the peer out, for work on our own side.
    #[arg(long)]
    alone: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tokenizer =
        Tokenizer::from_file(arguments.model.join("tokenizer.json")).map_err(|error| anyhow!("{error}"))?;
    let words = Words::of(&tokenizer)?;
    let folder = tempfile::tempdir()?;
    let mut workloads = Vec::new();
    for &bytes in &arguments.sizes {
        let workload = Workload::new(&words, MODEL, bytes);
        let files = workload.write(folder.path())?;
        workloads.push((workload, files));
    }

    let backends = [Backend::start(MODEL).await?, Backend::start(MODEL).await?];
    let mut baton = Baton::start(&arguments, folder.path(), &backends).await?;
    let mut shared = Vec::new();
    for (workload, _) in &workloads {
        shared.push(baton.register_prefixes(&tokenizer, workload).await?);
    }
    let router = match arguments.alone {
        true => None,
        false => Some(Router::start(&arguments, folder.path(), &backends).await?),
    };

    // The largest texts first, while nothing is cached.
    let mut cold = Value::Null;
    for (workload, _) in workloads.iter().rev() {
        let rates = baton.cold_rates(&tokenizer, workload).await?;
        eprintln!("cold, {} B: {rates}", workload.bytes);
        if cold.is_null() {
            cold = rates;
        }
    }

    let mut sizes = serde_json::Map::new();
    let mut runs = 0;
    for ((workload, files), shared) in workloads.iter().zip(&shared) {
        let mut sides: Vec<(&str, &str, &Program, Vec<Run>)> =
            vec![("baton", &baton.address, &baton.program, Vec::new())];
        if let Some(router) = &router {
            sides.insert(0, ("vllm_router", &router.address, &router.program, Vec::new()));
        }
        for round in 0..=arguments.rounds {
            // Round 0 warms both sides up.
            let seconds = if round == 0 { 2 } else { arguments.seconds };
            let first = runs * NUMBERS_PER_RUN % 900_000_000;
            runs += 1;
            for (name, address, program, done) in &mut sides {
                let before = (*name == "baton").then(|| baton_counters(address));
                let before = match before {
                    Some(counters) => Some(counters.await?),
                    None => None,
                };
                let run = load(&arguments.script, files, address, program, &backends, first, seconds).await?;
                if let Some(before) = before {
                    check_hits(workload, shared, &before, &baton_counters(address).await?)?;
                }
                eprintln!(
                    "{:>7} B  round {round}  {name:<12} {:>8.0}/s  p50 {:>6} us  p99 {:>6} us  {:>6.0} us of CPU each, {:>4.0} around",
                    workload.bytes, run.per_second, run.p50_us, run.p99_us, run.cpu_us, run.around_us
                );
                if round > 0 {
                    done.push(run);
                }
            }
        }
        baton.check_tokens(&tokenizer, workload, shared).await?;
        sizes.insert(workload.bytes.to_string(), summary(&mut sides));
    }

    println!(
        "{}",
        json!({
            "bench": "peers-http",
            "peer": "vllm-router 0.1.17 cache_aware",
            "tokenizer": arguments.model.file_name().map(|name| name.to_string_lossy()),
            "connections": CONNECTIONS,
            "shared_prefixes": PREFIXES,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "sizes": sizes,
            "cold": cold,
            "token_exact": true,
        })
    );
    Ok(())
}

/// What one run of wrk came to.
struct Run {
    per_second: f64,
    p50_us: u64,
    p99_us: u64,
    /// Processor time of the proxy for each request, in microseconds.
    cpu_us: f64,
    /// The same of wrk and the engines together.
    around_us: f64,
}

fn summary(sides: &mut [(&str, &str, &Program, Vec<Run>)]) -> Value {
    let mut all = serde_json::Map::new();
    for (name, _, _, runs) in sides.iter_mut() {
        let median = |of: fn(&Run) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let figures = json!({
            "requests_per_second": median(|run| run.per_second).round(),
            "p50_us": median(|run| run.p50_us as f64),
            "p99_us": median(|run| run.p99_us as f64),
            "cpu_us_per_request": median(|run| run.cpu_us).round(),
            "cpu_us_of_load_and_engines": median(|run| run.around_us).round(),
        });
        all.insert((*name).to_owned(), figures);
    }
    let rate = |name: &str| all.get(name).and_then(|side| side["requests_per_second"].as_f64());
    if let (Some(ours), Some(theirs)) = (rate("baton"), rate("vllm_router")) {
        all.insert("ratio".to_owned(), json!((ours / theirs * 100.0).round() / 100.0));
    }
    Value::Object(all)
}

/// Runs wrk, and checks that all went well on either end.
async fn load(
    script: &Path,
    files: &Path,
    address: &str,
    program: &Program,
    backends: &[Backend],
    first: usize,
    seconds: u64,
) -> Result<Run> {
    let served = || backends.iter().map(|backend| backend.counts().0).sum::<u64>();
    let around = || {
        let (own, children) = own_cpu_seconds();
        own + children
    };
    let (cpu, before_around, before) = (program.cpu_seconds(), around(), served());
    let output = tokio::process::Command::new("wrk")
        .args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{seconds}s"), "--timeout", "10s", "-s"])
        .arg(script)
        .arg(format!("http://{address}"))
        .arg("--")
        .arg(files)
        .args([address, &first.to_string()])
        .output()
        .await
        .context("wrk")?;
    let (cpu, around) = (program.cpu_seconds() - cpu, around() - before_around);
    let text = String::from_utf8_lossy(&output.stdout);
    let line =
        text.lines().rev().find(|line| line.starts_with('{')).with_context(|| {
            format!("wrk gave no figures: {text}{}", String::from_utf8_lossy(&output.stderr))
        })?;
    let figures: Value = serde_json::from_str(line)?;
    let number = |name: &str| figures[name].as_u64().unwrap_or(0);
    let requests = number("requests");
    ensure!(number("refused") == 0 && number("broken") == 0, "not every answer was 200: {line}");
    ensure!(requests > 0, "nothing was answered");
    // Requests in flight when wrk ends were counted by the engines alone.
    let engines = served() - before;
    ensure!(
        (requests..=requests + CONNECTIONS as u64).contains(&engines),
        "wrk counts {requests} answers, the engines {engines}"
    );
    Ok(Run {
        per_second: requests as f64 / (number("microseconds") as f64 / 1e6),
        p50_us: number("p50_us"),
        p99_us: number("p99_us"),
        cpu_us: cpu * 1e6 / requests as f64,
        around_us: around * 1e6 / requests as f64,
    })
}

/// The coordinator's counters of placed requests: prompts, prompt tokens, hit tokens.
async fn baton_counters(address: &str) -> Result<[f64; 3]> {
    let metrics = Metrics::of(address).await?;
    Ok([
        metrics.get("baton_tokenize_seconds_count"),
        metrics.get("baton_prompt_tokens_total"),
        metrics.get("baton_hit_tokens_total"),
    ])
}

/// The hits of a run must be those of requests that all went to the engine with their prefix, but for the few that a busy
/// engine makes go elsewhere. There are more where the load repeats a tail: what was sent to an engine is expected there.
fn check_hits(workload: &Workload, shared: &[usize], before: &[f64; 3], after: &[f64; 3]) -> Result<()> {
    let [prompts, _, hits] = [0, 1, 2].map(|i| after[i] - before[i]);
    let expected = shared.iter().sum::<usize>() as f64 / shared.len() as f64;
    let share = hits / prompts / expected;
    ensure!(share >= 0.9, "{} B: hits are {share:.2} of what the engines hold", workload.bytes);
    Ok(())
}

/// A reading of the coordinator's `/metrics`.
struct Metrics(String);

impl Metrics {
    async fn of(address: &str) -> Result<Self> {
        let answer = client::ask(address, "GET", "/metrics", b"").await?;
        Ok(Self(String::from_utf8(answer.body)?))
    }

    fn get(&self, name: &str) -> f64 {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
    }
}

/// The coordinator and the sessions of its two engines.
struct Baton {
    program: Program,
    address: String,
    agents: Vec<Agent>,
}

impl Baton {
    async fn start(arguments: &Arguments, folder: &Path, backends: &[Backend]) -> Result<Self> {
        let certificates = Certificates::new()?;
        let (cert, key) = certificates.issue("coordinator")?;
        for (file, text) in [("ca.pem", certificates.ca()), ("c.pem", &cert), ("c.key", &key)] {
            std::fs::write(folder.join(file), text)?;
        }
        let (address, control) = (free_address()?, free_address()?);
        let config = format!(
            "listen = \"{address}\"\ncontrol_listen = \"{control}\"\nstore = \"embedded:c.redb\"\n\
             [tls]\nca = \"ca.pem\"\ncert = \"c.pem\"\nkey = \"c.key\"\n\
             [[models]]\nname = \"{MODEL}\"\npath = \"{}\"\n",
            std::path::absolute(&arguments.model)?.display()
        );
        let file = folder.join("coordinator.toml");
        std::fs::write(&file, config)?;
        let mut command = Command::new(&arguments.coordinator);
        let mut program =
            Program::start(command.arg("--config").arg(&file), &folder.join("coordinator.log"))?;
        until_healthy(&mut program, &address, &folder.join("coordinator.log")).await?;
        let mut agents = Vec::new();
        for (n, backend) in backends.iter().enumerate() {
            let id = format!("engine-{n}");
            agents.push(
                Agent::connect(&certificates, &control, &id, &backend.url(), MODEL, BLOCK as u32).await?,
            );
        }
        Ok(Self { program, address, agents })
    }

    /// Reports the prefixes' blocks, to the first engine for even prefixes and the second for odd ones. Returns how many
    /// tokens of each are held.
    async fn register_prefixes(&mut self, tokenizer: &Tokenizer, workload: &Workload) -> Result<Vec<usize>> {
        let hasher = BlockHasher::new(MODEL);
        let mut shared = Vec::new();
        for prefix in 0..PREFIXES {
            let tokens = workload.shared_tokens(tokenizer, prefix, BLOCK)?;
            let hashes = hasher.chain(&tokens, BLOCK, &ContentKeys::default());
            self.agents[prefix % 2].stored(&hashes).await?;
            shared.push(tokens.len());
        }
        Ok(shared)
    }

    /// Sends each prefix once, one after the other, and reads off what tokenising took; beside it the tokenizer's own rate on
    /// the same texts, on one thread of this process.
    async fn cold_rates(&self, tokenizer: &Tokenizer, workload: &Workload) -> Result<Value> {
        let before = Metrics::of(&self.address).await?;
        let mut bytes = 0;
        for prefix in 0..PREFIXES {
            bytes += workload.prefixes[prefix].len();
            let body = workload.body(prefix, &workload.tail(prefix));
            client::ask(&self.address, "POST", "/v1/completions", body.as_bytes()).await?.json()?;
        }
        let after = Metrics::of(&self.address).await?;
        let of = |name: &str| after.get(name) - before.get(name);
        let seconds = of("baton_tokenize_seconds_sum");
        ensure!(of("baton_tokenize_seconds_count") as usize == PREFIXES, "some prompts were not tokenised");
        let began = Instant::now();
        let mut tokens = 0;
        for text in &workload.prefixes {
            tokens += encode(tokenizer, text)?.len();
        }
        let plain = began.elapsed().as_secs_f64();
        let rates = |seconds: f64| {
            json!({
                "megabytes_per_second": (bytes as f64 / seconds / 1e4).round() / 100.0,
                "tokens_per_second": (tokens as f64 / seconds).round(),
            })
        };
        Ok(
            json!({ "text_bytes": bytes / PREFIXES, "baton": rates(seconds), "tokenizers_whole_texts": rates(plain) }),
        )
    }

    /// Compares ids and hits with the tokenizer's, for one request of each prefix, once nothing of the load is expected any more.
    async fn check_tokens(&self, tokenizer: &Tokenizer, workload: &Workload, shared: &[usize]) -> Result<()> {
        tokio::time::sleep(EXPECTED).await;
        for (prefix, held) in shared.iter().enumerate() {
            let tail = workload.tail(1000 + prefix);
            let body = workload.body(prefix, &tail);
            let expected = encode(tokenizer, &format!("{}{tail}", workload.prefixes[prefix]))?;
            let answer = client::ask(&self.address, "POST", "/tokenize", body.as_bytes()).await?.json()?;
            ensure!(
                answer["tokens"] == json!(expected),
                "prefix {prefix}: other tokens than the tokenizer's"
            );
            let answer = client::ask(&self.address, "POST", "/v1/completions", body.as_bytes()).await?;
            answer.json()?;
            let hits: usize = answer.header("x-baton-hit-tokens").context("no hits told")?.parse()?;
            let engine = answer.header("x-baton-decode").context("no engine told")?;
            ensure!(
                hits == *held && engine == format!("engine-{}", prefix % 2),
                "prefix {prefix}: {hits} tokens on {engine}, but engine-{} holds {held}",
                prefix % 2
            );
        }
        Ok(())
    }
}

/// The peer.
struct Router {
    program: Program,
    address: String,
}

impl Router {
    async fn start(arguments: &Arguments, folder: &Path, backends: &[Backend]) -> Result<Self> {
        let (address, metrics) = (free_address()?, free_address()?);
        let port =
            |address: &str| address.rsplit_once(':').map(|parts| parts.1.to_owned()).unwrap_or_default();
        let log = folder.join("router.log");
        let mut command = Command::new(&arguments.router);
        command.arg("--worker-urls").args(backends.iter().map(Backend::url)).args([
            "--policy",
            "cache_aware",
            "--port",
            &port(&address),
            "--prometheus-port",
            &port(&metrics),
        ]);
        let mut program = Program::start(&mut command, &log)?;
        until_healthy(&mut program, &address, &log).await?;
        Ok(Self { program, address })
    }
}

async fn until_healthy(program: &mut Program, address: &str, log: &Path) -> Result<()> {
    for _ in 0..300 {
        if program.ended() {
            bail!("it ended at once: {}", std::fs::read_to_string(log).unwrap_or_default());
        }
        if client::ask(address, "GET", "/health", b"").await.is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("it is not healthy: {}", std::fs::read_to_string(log).unwrap_or_default())
}

/// An address of the loopback that is free now.
fn free_address() -> Result<String> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}
