//! Baton's KV index beside its peers', on the same trace in one run: `dynamo-kv-router` (a radix tree, and a concurrent
//! one behind a pool of threads) and `kv-index` (a chain index).
//!
//! The trace's requests are replayed over engines whose caches hold a million tokens each ([`workload`]). Every side
//! takes the same events in its own form and looks up the same prompts. Measured, in turns so that the machine's moods hit all
//! alike, and reported as medians over the rounds:
//! - writes: all events, with no lookups between, on one thread (the pool: two);
//! - memory: bytes on the heap after all events, counted by the allocator, by live membership;
//! - lookups: every prompt once after all events (`final`), and every prompt just before its own events (`arrival`);
//! - ours alone: lookups while another thread replays the events over and over, and allocations of a warm lookup.
//!
//! All sides must agree on the sum of overlaps over all final lookups; the run fails if ours differs from the best peer's.
#![expect(clippy::print_stdout, reason = "a report")]

mod heap;
mod sides;
mod workload;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use serde_json::{Value, json};

use self::sides::{Baton, Chain, Pool, Radix, Side};
use self::workload::Workload;

#[global_allocator]
static HEAP: heap::Counting = heap::COUNTING;

/// Baton's KV index beside its peers'.
#[derive(Parser)]
struct Args {
    /// Mooncake conversation trace: JSON lines with input_length and hash_ids of 512-token blocks.
    #[arg(long)]
    trace: PathBuf,
    /// Rounds of each measurement; of few, the medians depend on what else the machine does.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Ours alone, without the peers.
    #[arg(long)]
    alone: bool,
}

/// Tokens that an engine's cache holds.
const CAPACITY: usize = 1 << 20;

/// Nanoseconds at a quantile, by nearest rank.
fn quantile(sorted: &[u64], q: f64) -> f64 {
    sorted[((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len()) - 1] as f64 / 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One side's samples.
#[derive(Default)]
struct Samples {
    writes: Vec<f64>,
    bytes: Vec<f64>,
    last: [Vec<f64>; 2],
    arrival: [Vec<f64>; 2],
    refused: u64,
    sum: u64,
}

impl Samples {
    fn record(into: &mut [Vec<f64>; 2], mut nanos: Vec<u64>) {
        nanos.sort_unstable();
        into[0].push(quantile(&nanos, 0.5));
        into[1].push(quantile(&nanos, 0.99));
    }

    fn json(&self, name: &str, memberships: u64) -> Value {
        let [p50, p99] = self.last.clone().map(median);
        let [arrival_p50, arrival_p99] = self.arrival.clone().map(median);
        json!({
            "name": name,
            "writes_mblocks_per_s": median(self.writes.clone()),
            "bytes_per_membership": median(self.bytes.clone()) / memberships as f64,
            "lookup_p50_us": p50,
            "lookup_p99_us": p99,
            "lookup_arrival_p50_us": arrival_p50,
            "lookup_arrival_p99_us": arrival_p99,
            "events_refused": self.refused,
            "overlap_sum": self.sum,
        })
    }
}

/// One round of one side.
fn round<S: Side>(workload: &Workload, samples: &mut Samples) {
    let events: Vec<S::Event> = workload.events.iter().map(|event| S::event(workload, event)).collect();
    let prompts: Vec<S::Prompt> = workload.prompts.iter().map(|prompt| S::prompt(workload, prompt)).collect();

    // Memory and final lookups: events are cloned, so that what the side keeps is all that is counted.
    let before = heap::bytes();
    let mut side = S::new(workload);
    samples.refused = events.iter().map(|event| u64::from(side.apply(event.clone()))).sum();
    side.settle();
    samples.bytes.push((heap::bytes() - before) as f64);
    let mut nanos = Vec::with_capacity(prompts.len());
    samples.sum = 0;
    for prompt in &prompts {
        let prompt = prompt.clone();
        let start = Instant::now();
        let sum = std::hint::black_box(side.lookup(prompt));
        nanos.push(start.elapsed().as_nanos() as u64);
        samples.sum += sum;
    }
    Samples::record(&mut samples.last, nanos);
    drop(side);

    // Lookups on arrival.
    let mut side = S::new(workload);
    let mut nanos = Vec::with_capacity(prompts.len());
    for (i, prompt) in prompts.iter().enumerate() {
        let prompt = prompt.clone();
        let start = Instant::now();
        std::hint::black_box(side.lookup(prompt));
        nanos.push(start.elapsed().as_nanos() as u64);
        for event in &events[workload.starts[i]..workload.starts[i + 1]] {
            side.apply(event.clone());
        }
        side.settle();
    }
    Samples::record(&mut samples.arrival, nanos);
    drop(side);

    // Writes.
    let mut side = S::new(workload);
    let start = Instant::now();
    for event in events {
        side.apply(event);
    }
    side.settle();
    samples.writes.push(workload.writes() as f64 / start.elapsed().as_secs_f64() / 1e6);
}

/// Lookups of ours beside writes, and what a warm lookup allocates.
fn beside_writes(workload: &Workload) -> Value {
    let events: Vec<_> = workload.events.iter().map(|event| Baton::event(workload, event)).collect();
    let prompts: Vec<_> = workload.prompts.iter().map(|prompt| Baton::prompt(workload, prompt)).collect();
    let mut side = Baton::new(workload);
    for event in &events {
        Baton::apply_shared(&side.index, event);
    }
    let mut found = baton_coordinator_core::kv_index::Overlaps::default();
    let index = std::mem::replace(&mut side, Baton::new(workload)).index;
    let mut measure = || {
        let mut nanos: Vec<u64> = prompts
            .iter()
            .map(|prompt| {
                let start = Instant::now();
                index.overlaps(prompt, &mut found);
                start.elapsed().as_nanos() as u64
            })
            .collect();
        nanos.sort_unstable();
        [quantile(&nanos, 0.5), quantile(&nanos, 0.99)]
    };
    let mut quiet = [Vec::new(), Vec::new()];
    let mut busy = [Vec::new(), Vec::new()];
    let written = AtomicU64::new(0);
    let mut seconds = 0.0;
    for _ in 0..5 {
        for (into, value) in quiet.iter_mut().zip(measure()) {
            into.push(value);
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for event in &events {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        Baton::apply_shared(&index, event);
                        let blocks = match event {
                            sides::BatonEvent::Stored(_, _, blocks)
                            | sides::BatonEvent::Removed(_, blocks) => blocks.len(),
                        };
                        written.fetch_add(blocks as u64, Ordering::Relaxed);
                    }
                }
            });
            // The writer is at work before the first lookup.
            while written.load(Ordering::Relaxed) == 0 {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            for (into, value) in busy.iter_mut().zip(measure()) {
                into.push(value);
            }
            seconds += start.elapsed().as_secs_f64();
            done.store(true, Ordering::Relaxed);
        });
    }
    let before = heap::calls();
    for prompt in &prompts {
        index.overlaps(prompt, &mut found);
    }
    let allocations = heap::calls() - before;
    let [quiet_p50, quiet_p99] = quiet.map(median);
    let [busy_p50, busy_p99] = busy.map(median);
    json!({
        "quiet_p50_us": quiet_p50,
        "quiet_p99_us": quiet_p99,
        "beside_writes_p50_us": busy_p50,
        "beside_writes_p99_us": busy_p99,
        "writes_meanwhile_mblocks_per_s": written.load(Ordering::Relaxed) as f64 / seconds / 1e6,
        "p99_ratio": busy_p99 / quiet_p99,
        "warm_lookup_allocations": allocations,
    })
}

fn best(sides: &[Value], key: &str, largest: bool) -> f64 {
    let values = sides[1..].iter().filter_map(|side| side[key].as_f64());
    if largest { values.fold(f64::MIN, f64::max) } else { values.fold(f64::MAX, f64::min) }
}

fn compare(args: &Args, engines: u32, block_size: usize) -> Result<Value> {
    let workload = Workload::replay(&args.trace, engines, block_size, CAPACITY)?;
    let (memberships, distinct) = workload.memberships();
    println!(
        "\n{engines} engines, blocks of {block_size} tokens: {} block writes in {} events, {memberships} memberships of \
         {distinct} blocks at the end, {} lookups",
        workload.writes(),
        workload.events.len(),
        workload.prompts.len()
    );
    let mut samples: [Samples; 4] = Default::default();
    for _ in 0..args.rounds {
        round::<Baton>(&workload, &mut samples[0]);
        if !args.alone {
            round::<Chain>(&workload, &mut samples[1]);
            round::<Radix>(&workload, &mut samples[2]);
            round::<Pool>(&workload, &mut samples[3]);
        }
    }
    let names = [Baton::NAME, Chain::NAME, Radix::NAME, Pool::NAME];
    let count = if args.alone { 1 } else { 4 };
    let sides: Vec<Value> = names
        .iter()
        .zip(&samples)
        .take(count)
        .map(|(name, samples)| samples.json(name, memberships))
        .collect();
    println!(
        "{:36} {:>9} {:>8} {:>16} {:>16}",
        "", "Mblocks/s", "B/member", "final p50/p99", "arrival p50/p99"
    );
    for side in &sides {
        let figure = |key: &str| side[key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:36} {:9.1} {:8.1} {:7.2} /{:7.2} {:7.2} /{:7.2}",
            side["name"].as_str().unwrap_or(""),
            figure("writes_mblocks_per_s"),
            figure("bytes_per_membership"),
            figure("lookup_p50_us"),
            figure("lookup_p99_us"),
            figure("lookup_arrival_p50_us"),
            figure("lookup_arrival_p99_us"),
        );
    }
    let mut result = json!({
        "engines": engines,
        "block_size": block_size,
        "block_writes": workload.writes(),
        "memberships": memberships,
        "distinct_blocks": distinct,
        "lookups": workload.prompts.len(),
    });
    if !args.alone {
        for (side, samples) in names.iter().zip(&samples).skip(1) {
            ensure!(
                samples.sum == samples_sum(&sides),
                "{side} finds {}, ours {}",
                samples.sum,
                samples_sum(&sides)
            );
        }
        let mut ratios = json!({});
        for (key, largest) in [
            ("writes_mblocks_per_s", true),
            ("bytes_per_membership", false),
            ("lookup_p50_us", false),
            ("lookup_p99_us", false),
            ("lookup_arrival_p50_us", false),
            ("lookup_arrival_p99_us", false),
        ] {
            ratios[key] = json!(sides[0][key].as_f64().unwrap_or(f64::NAN) / best(&sides, key, largest));
        }
        result["ratios_to_best_peer"] = ratios;
    }
    let beside = beside_writes(&workload);
    println!(
        "ours, p99 of lookups: {:.2} µs quiet, {:.2} beside {:.1} M block writes/s; {} allocations in {} warm lookups",
        beside["quiet_p99_us"].as_f64().unwrap_or(f64::NAN),
        beside["beside_writes_p99_us"].as_f64().unwrap_or(f64::NAN),
        beside["writes_meanwhile_mblocks_per_s"].as_f64().unwrap_or(f64::NAN),
        beside["warm_lookup_allocations"],
        workload.prompts.len(),
    );
    result["sides"] = Value::Array(sides);
    result["beside_writes"] = beside;
    Ok(result)
}

fn samples_sum(sides: &[Value]) -> u64 {
    sides[0]["overlap_sum"].as_u64().unwrap_or(0)
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.rounds > 0, "at least one round");
    let runs = [compare(&args, 64, 16)?, compare(&args, 512, 128)?];
    println!("{}", json!({ "bench": "peers-index", "rounds": args.rounds, "runs": runs }));
    Ok(())
}
