//! How long a placement decision takes, what it allocates, and how it spreads a trace over engines.
//!
//! Everything is drawn from fixed seeds. Results go to standard error as they come, and to standard output as one line of
//! JSON.
#![allow(clippy::print_stdout)]

mod decisions;
mod trap;

use std::alloc::System;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Measures placement decisions
#[derive(Debug, Parser)]
struct Arguments {
    /// Decisions that are measured for each size of fleet
    #[arg(long, default_value_t = 20_000)]
    decisions: u32,
    /// Mooncake's conversation trace (JSONL: timestamp in ms, input_length, output_length, hash_ids of 512 tokens each); without
    /// it, how decisions spread a trace is not measured
    #[arg(long, env = "BATON_TRACE")]
    trace: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("baton-bench-placement: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all bounds were kept.
fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let sizes = [
        decisions::Size { engines: 256, prompt_tokens: 32 << 10, p99_micros: 20.0 },
        decisions::Size { engines: 1024, prompt_tokens: 128 << 10, p99_micros: 150.0 },
    ];
    let mut measured = Vec::new();
    for size in &sizes {
        measured.push(decisions::measure(size, arguments.decisions)?);
    }
    let trap = match &arguments.trace {
        Some(file) => Some(trap::measure(file)?),
        None => {
            eprintln!("spread of a trace: skipped, no trace given (--trace FILE, or BATON_TRACE)");
            None
        }
    };
    let kept = measured.iter().all(|m| m.kept) && trap.as_ref().is_none_or(|trap| trap.kept);
    println!(
        "{}",
        json!({ "bench": "placement", "decisions": measured, "spread": trap, "bounds_kept": kept })
    );
    Ok(kept)
}
