//! `baton bench`: co-located, disaggregated and adaptive, simulated on traces with the coordinator's own decision; and the same workloads
//! sent to running servers.

mod commands;
mod live;
mod load;
mod report;

use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use baton_sim::bench::Bench;
use baton_sim::bench::page::Page;
use baton_sim::decision::Speeds;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;

use self::load::Shown;
use crate::signals;
use crate::table::Table;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Run a trace once, under one policy
    Replay(commands::Replay),
    /// Run policies and splits side by side at the same rates
    Compare(commands::Compare),
    /// Find the highest rate at which 90 % of requests are within both SLOs; closed-loop sessions repeat until they are in a steady state
    Capacity(commands::Capacity),
    /// Map which mode wins where, over prompt length, hit rate and link speed
    Sweep(commands::Sweep),
    /// Adaptive beside the best static mode on traces, fleets and links, with the reason where it loses
    Grid(commands::Grid),
    /// All of it in one HTML file
    Report(report::Arguments),
    /// Send a workload to running servers and measure what their clients see, one server or two side by side
    Live(live::Live),
}

/// Runs a bench beside the signals: at the first one it ends, and what was done is shown.
pub(crate) async fn run(command: Command) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&stop);
    let mut work = tokio::task::spawn_blocking(move || match command {
        Command::Replay(arguments) => commands::replay(&arguments, &ends),
        Command::Compare(arguments) => commands::compare(&arguments, &ends),
        Command::Capacity(arguments) => commands::capacity(&arguments, &ends),
        Command::Sweep(arguments) => commands::sweep(&arguments, &ends),
        Command::Grid(arguments) => commands::grid(&arguments, &ends),
        Command::Report(arguments) => report::run(&arguments, &ends),
        Command::Live(arguments) => Handle::current().block_on(live::run(&arguments, &ends)),
    });
    let ended = signals::until_interrupted(async { Ok((&mut work).await?) }).await;
    match ended {
        Err(error) if error.is::<signals::Interrupted>() => {
            stop.store(true, Ordering::Relaxed);
            work.await??;
            Err(error)
        }
        ended => ended?,
    }
}

/// What a bench's results carry, and where they go.
struct Output<'a> {
    shown: &'a Shown,
    seed: u64,
    stop: &'a AtomicBool,
    results: Map<String, Value>,
}

impl<'a> Output<'a> {
    fn new(shown: &'a Shown, seed: u64, stop: &'a AtomicBool) -> Self {
        let mut results = Map::new();
        results.insert("command".to_owned(), command_line().into());
        results.insert("version".to_owned(), env!("CARGO_PKG_VERSION").into());
        results.insert("seed".to_owned(), seed.into());
        Self { shown, seed, stop, results }
    }

    fn bench(&self, speeds: Speeds) -> Bench<'a> {
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Bench {
            speeds,
            threads: self.shown.threads.unwrap_or_else(cores).max(1),
            stop: self.stop,
            progress: &|_| (),
        }
    }

    fn put(&mut self, name: &str, value: impl serde::Serialize) -> anyhow::Result<()> {
        self.results.insert(name.to_owned(), serde_json::to_value(value)?);
        Ok(())
    }

    /// A table for the terminal.
    fn say(&self, text: impl std::fmt::Display) {
        if !self.shown.json {
            println!("{text}");
        }
    }

    fn page(&self, title: &str) -> Page {
        let mut page = Page::new(title);
        page.code(&command_line());
        page.note(&format!(
            "baton {}, seed {}. Simulated in virtual time: engines on modelled constants, the decision is the coordinator's own. The same command gives the same bytes.",
            env!("CARGO_PKG_VERSION"),
            self.seed
        ));
        page
    }

    fn finish(self, page: Page) -> anyhow::Result<()> {
        if let Some(file) = &self.shown.html {
            write(file, page)?;
        }
        self.end();
        Ok(())
    }

    /// Ends in the JSON line, where one is wanted.
    fn end(mut self) {
        if self.stop.load(Ordering::Relaxed) {
            self.results.insert("interrupted".to_owned(), true.into());
        }
        if self.shown.json {
            println!("{}", Value::Object(self.results));
        }
    }
}

fn write(file: &Path, page: Page) -> anyhow::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    std::fs::write(file, page.finish()).with_context(|| file.display().to_string())?;
    eprintln!("report: {}", file.display());
    Ok(())
}

/// The command as it was typed, for whoever wants to repeat it.
fn command_line() -> String {
    let quoted = |argument: String| match argument.contains(char::is_whitespace) {
        true => format!("'{argument}'"),
        false => argument,
    };
    std::iter::once("baton".to_owned())
        .chain(std::env::args().skip(1).map(quoted))
        .collect::<Vec<_>>()
        .join(" ")
}

/// A table with these rows.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> Table {
    let head: Vec<&str> = head.iter().map(|name| name.trim_start_matches('<')).collect();
    let mut table = Table::new(&head, &["best static", "fleet", "reason, where adaptive loses", "why"]);
    rows.into_iter().for_each(|row| table.row(row));
    table
}

/// A bar on a terminal; nothing elsewhere.
fn progress(length: u64, what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let shape =
        if length > 0 { "{msg} {wide_bar} {pos}/{len} {elapsed}" } else { "{spinner} {pos} {msg} {elapsed}" };
    let style = ProgressStyle::with_template(shape).expect("a template");
    ProgressBar::new(length).with_style(style).with_message(what.to_owned())
}

/// What the fleet promises; an error where that is nothing.
fn slo(fleet: &baton_sim::fleet::Fleet) -> anyhow::Result<Value> {
    let slo =
        fleet.slo.context("the fleet promises nothing: give it an [slo] table with ttft_ms and tpot_ms")?;
    Ok(json!({"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms}))
}
