//! `baton`: what an operator types.
//!
//! It makes certificates, shows what Baton does on a fleet of mock engines, keeps such a fleet up to play with, and
//! looks into a running one. Results go to standard output, progress and errors to standard error.
#![allow(clippy::print_stdout)]

mod bench;
mod certs;
mod demo;
mod explain;
mod explanation;
mod fleet;
mod route;
mod signals;
mod table;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Baton hands the KV cache from the engine that prefills to the engine that decodes, when that pays
#[derive(Debug, Parser)]
#[command(version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a certificate authority, and certificates for coordinator, operators and engines
    #[command(subcommand)]
    Certs(certs::Command),
    /// Run a small mixed workload on four mock engines: co-located, disaggregated, adaptive
    Demo(demo::Arguments),
    /// Keep a fleet of mock engines up until Ctrl-C
    Up(up::Arguments),
    /// Show the engines that a coordinator knows
    Fleet(fleet::Arguments),
    /// Show where a request would be placed, and why
    Explain(explain::Arguments),
    /// Replay decisions that a coordinator wrote down
    Route(route::Arguments),
    /// Compare co-located, disaggregated and adaptive on traces: on simulated fleets, or live
    #[command(subcommand)]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(arguments.command)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<signals::Interrupted>() => {
            eprintln!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("baton: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Certs(command) => certs::run(command),
        Command::Demo(arguments) => signals::until_interrupted(demo::run(arguments)).await,
        Command::Up(arguments) => up::run(arguments).await,
        Command::Fleet(arguments) => fleet::run(arguments).await,
        Command::Explain(arguments) => explain::run(arguments).await,
        Command::Route(arguments) => route::run(&arguments),
        Command::Bench(command) => bench::run(command).await,
    }
}
