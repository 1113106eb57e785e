//! `baton-e2e`: runs the acceptance suite and prints its lines.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use baton_e2e::bed::Bed;
use baton_e2e::fleets;
use baton_e2e::report::{Line, Report};
use baton_e2e::scenarios::Scenario;
use clap::{Parser, ValueEnum};

/// Shows what Baton promises, on a fleet of its own on loopback.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// What serves as engine.
    #[arg(long, value_enum)]
    engine: Engine,
    /// What vLLM serves: SmolLM2-135M, or a small model with random weights.
    #[arg(long, value_enum, default_value = "smollm2")]
    model: ModelName,
    /// Tensor-parallel ranks of the first vLLM engine; the others have one.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// Folder with vllm-0.32.0/ and models/, as scripts/install-vllm.sh and tests/e2e/models.py fill it.
    #[arg(long, env = "BATON_CACHE")]
    cache: Option<PathBuf>,
    /// Folder to import `baton_connector` from.
    #[arg(long, default_value = "agent/connector")]
    connector: PathBuf,
    /// Keep configs and logs in this folder.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Only these scenarios, by name; a prefix will do.
    #[arg(long, num_args = 1..)]
    only: Vec<String>,
    /// Not these scenarios, by name; a prefix will do. `ttft` and `sim` compare times, which needs an idle machine.
    #[arg(long, num_args = 1..)]
    skip: Vec<String>,
    /// Keep the KV events of the scenario `index` in this folder, as tests/e2e/fixtures has them.
    #[arg(long)]
    record: Option<PathBuf>,
    /// End in one JSON line: {line: {figure…, ok}}.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    Mock,
    Vllm,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModelName {
    Smollm2,
    Random,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("baton-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "the report is what this program is for")]
async fn run(options: &Options) -> anyhow::Result<bool> {
    let scenarios = chosen(&options.only, &options.skip)?;
    let mut hybrid_model = None;
    let (mut spec, scale) = match options.engine {
        Engine::Mock => fleets::mock(),
        Engine::Vllm => {
            let cache = cache(options.cache.clone())?;
            let python = cache.join("vllm-0.32.0/bin/python");
            ensure!(python.exists(), "{} is not there: run scripts/install-vllm.sh", python.display());
            let (dir, fast) = match options.model {
                ModelName::Smollm2 => ("smollm2-float32", false),
                ModelName::Random => ("random", true),
            };
            let [model, hybrid] = [dir, "hybrid"].map(|dir| cache.join("models").join(dir));
            for model in [&model, &hybrid] {
                ensure!(
                    model.join("config.json").exists(),
                    "{} has no model: start the suite with tests/e2e/run.sh",
                    model.display()
                );
            }
            hybrid_model = Some(hybrid);
            fleets::vllm(&python, &options.connector, model, dir, fast, options.ranks)
        }
    };
    spec.dir.clone_from(&options.dir);
    let started = Instant::now();
    let mut bed = Bed::start(spec, scale).await?;
    bed.hybrid_model = hybrid_model;
    bed.record.clone_from(&options.record);
    println!("fleet up after {:.0} s", started.elapsed().as_secs_f64());

    let mut report = Report::default();
    for scenario in scenarios {
        let started = Instant::now();
        let lines = scenario.run(&mut bed).await;
        for line in &lines {
            println!("{line}");
        }
        println!("     {} took {:.1} s", scenario.name(), started.elapsed().as_secs_f64());
        report.lines.extend(lines);
    }
    let mut stopped = Line::new("shutdown");
    let result = bed.shutdown().await;
    stopped.check(result.is_ok(), || format!("{:#}", result.unwrap_err()));
    println!("{stopped}");
    report.lines.push(stopped);
    println!(
        "{} in {:.0} s",
        if report.ok() { "all lines hold" } else { "FAILED" },
        started.elapsed().as_secs_f64()
    );
    if options.json {
        println!("{}", report.to_json());
    }
    Ok(report.ok())
}

fn chosen(only: &[String], skip: &[String]) -> anyhow::Result<Vec<Scenario>> {
    let is = |scenario: &Scenario, name: &String| scenario.name().starts_with(name.as_str());
    for (flag, name) in
        only.iter().map(|name| ("--only", name)).chain(skip.iter().map(|name| ("--skip", name)))
    {
        let names: Vec<&str> = Scenario::ALL.iter().map(|scenario| scenario.name()).collect();
        let known = Scenario::ALL.iter().any(|scenario| is(scenario, name));
        ensure!(known, "{flag} {name}: no such scenario; there are {}", names.join(", "));
    }
    let wanted = |scenario: &Scenario| {
        (only.is_empty() || only.iter().any(|name| is(scenario, name)))
            && !skip.iter().any(|name| is(scenario, name))
    };
    Ok(Scenario::ALL.into_iter().filter(wanted).collect())
}

fn cache(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    if let Some(cache) = given {
        return Ok(cache);
    }
    let home = std::env::home_dir().context("no home directory: name the cache with --cache")?;
    Ok(home.join(".cache/baton"))
}
