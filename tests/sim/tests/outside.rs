//! Figures that others know: of caches, of queues, of the constants.
//!
//! Checks on the Mooncake conversation trace run where `BATON_TRACES` names a folder with `mooncake_conversation_trace.jsonl`.

#![allow(clippy::print_stdout, reason = "a test that fails shows the figures beside each other")]

mod support;

use std::path::PathBuf;

use baton_sim::engine::pool::BlockPool;
use baton_sim::engine::speed::TABLE;
use baton_sim::sim::run;
use baton_sim::trace::{
    Arrival, First, Generator, Length, Mooncake, MooncakeRow, MooncakeRows, Rows, Shape, Source, When,
};
use support::{RoundRobin, plain_fleet};

fn mooncake() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("BATON_TRACES") else {
        eprintln!(
            "SKIPPED: BATON_TRACES is not set; set it to a folder with mooncake_conversation_trace.jsonl"
        );
        return None;
    };
    Some(PathBuf::from(folder).join("mooncake_conversation_trace.jsonl"))
}

fn rows(path: &PathBuf) -> Vec<MooncakeRow> {
    let file = std::fs::File::open(path).expect("BATON_TRACES has the trace");
    let mut rows = MooncakeRows::new(std::io::BufReader::new(file));
    let all: Vec<MooncakeRow> = rows.by_ref().collect();
    assert_eq!((rows.report.good, rows.report.bad), (12_031, 0));
    all
}

/// Tokens found, of the rows `from` on, in percent: so many caches of so many blocks each that take one row after the other, without
/// time. `cache` says which cache a row goes to.
fn hit_rate(
    rows: &[MooncakeRow],
    from: usize,
    (caches, blocks): (usize, u32),
    cache: impl Fn(usize, &MooncakeRow) -> usize,
) -> f64 {
    let mut pools: Vec<BlockPool> = (0..caches).map(|_| BlockPool::new(blocks, false)).collect();
    let (mut hit, mut all) = (0u64, 0u64);
    for (at, row) in rows.iter().enumerate() {
        let pool = &mut pools[cache(at, row)];
        // Ids from 1 on: 0 means nothing.
        let ids: Vec<u64> = row.hash_ids.iter().map(|id| id + 1).collect();
        let hits = pool.hits(&ids);
        let mut taken = Vec::new();
        pool.share(&ids[..hits], &mut taken);
        assert!(pool.allocate((ids.len() - hits) as u32, &mut taken));
        for block in hits..ids.len() {
            pool.publish(taken[block], block.checked_sub(1).map(|before| ids[before]), ids[block]);
        }
        pool.release(&taken);
        if at >= from {
            hit += (hits as u64 * 512).min(u64::from(row.input_length));
            all += u64::from(row.input_length);
        }
    }
    100.0 * hit as f64 / all as f64
}

#[test]
fn one_cache_on_the_mooncake_trace() {
    let Some(path) = mooncake() else { return };
    let rows = rows(&path);
    // kvcache-simulator 0.1.3 finds the same.
    for (blocks, expected) in [(1638, 5.2), (6553, 15.3), (13_107, 25.0), (26_214, 33.0), (1 << 20, 39.8)] {
        let found = hit_rate(&rows, rows.len() / 2, (1, blocks), |_, _| 0);
        println!("{blocks} blocks: {found:.2} %");
        assert!((found - expected).abs() <= 0.1, "{blocks} blocks: {found:.2} % instead of {expected} %");
    }
}

#[test]
fn ten_caches_on_the_mooncake_trace() {
    let Some(path) = mooncake() else { return };
    let rows = rows(&path);
    // All requests share the first block, so the second one decides: the first of their own.
    let own = |row: &MooncakeRow| row.hash_ids[row.hash_ids.len().min(2) - 1] as usize;
    let found = [
        ("round robin", 8.5, hit_rate(&rows, 0, (10, 2700), |at, _| at % 10)),
        ("first own block", 32.1, hit_rate(&rows, 0, (10, 2700), |_, row| own(row) % 10)),
        ("one pool", 32.4, hit_rate(&rows, 0, (1, 27_000), |_, _| 0)),
    ];
    for (name, expected, found) in found {
        println!("{name}: {found:.2} %");
        assert!((found - expected).abs() <= 0.1, "{name}: {found:.2} % instead of {expected} %");
    }
}

#[test]
fn engines_on_the_mooncake_trace() {
    let Some(path) = mooncake() else { return };
    // As fast as the trace asks, so that the cache alone decides: what engines find is what caches find without time.
    let fleet = plain_fleet(1, [0.0, 1e-6, 0.0, 1e-6, 0.0, 0.0], 256, 26_214 * 512);
    let open = || Mooncake::open(&path, 512).expect("BATON_TRACES has the trace");
    let report = run(&fleet, 512, &mut open(), &mut RoundRobin(1)).report;
    assert_eq!((report.finished, report.rows.bad), (12_031, 0));
    // Each request by itself, what it generates included.
    let mut pool = BlockPool::new(26_214, false);
    let (mut hit, mut all) = (0, 0);
    let mut source = open();
    while let Some(arrival) = source.open() {
        let (prompt, tokens) = (arrival.prompt_tokens, arrival.prompt_tokens + arrival.output_tokens - 1);
        let hits = pool.hits(&arrival.blocks[..((prompt - 1) / 512) as usize]);
        let mut taken = Vec::new();
        pool.share(&arrival.blocks[..hits], &mut taken);
        assert!(pool.allocate(tokens.div_ceil(512) - hits as u32, &mut taken));
        let full = taken.iter().zip(&arrival.blocks[..(tokens / 512) as usize]).enumerate().skip(hits);
        for (at, (block, id)) in full {
            let parent = at.checked_sub(1).map(|before| arrival.blocks[before]);
            pool.publish(*block, parent, *id);
        }
        pool.release(&taken);
        hit += 512 * hits as u64;
        all += u64::from(prompt);
    }
    let expected = hit as f64 / all as f64;
    println!("hit rate {:.2} %, without time {:.2} %", 100.0 * report.hit_rate, 100.0 * expected);
    assert!((report.hit_rate - expected).abs() < 0.005);
}

/// Requests one after the other, each when the one before it has long ended.
struct Spaced(Vec<(u32, u32)>, Rows);

impl Source for Spaced {
    fn open(&mut self) -> Option<Arrival> {
        let (prompt_tokens, output_tokens) = self.0.pop()?;
        let at = (1000 - self.0.len() as u64) * 10_000 * baton_sim::SECOND;
        let name = 1_000_000 * self.0.len() as u64;
        let blocks =
            (1..=u64::from((prompt_tokens + output_tokens) / 16)).map(|block| name + block).collect();
        let when = When::At(at);
        Some(Arrival {
            when,
            session: None,
            turn: 0,
            prompt_tokens,
            new_tokens: prompt_tokens,
            output_tokens,
            blocks,
        })
    }

    fn follow(&mut self, _session: u64) -> Option<Arrival> {
        None
    }

    fn rows(&self) -> &Rows {
        &self.1
    }
}

#[test]
fn engines_take_the_time_that_the_constants_say() {
    for (model, gpu, speed) in TABLE {
        let constants = [speed.a, speed.b, speed.c, speed.d, speed.e, speed.f];
        for (prompt, output) in [(256, 1), (2048, 100), (8192, 500), (32_000, 200)] {
            let mut fleet = plain_fleet(1, constants, 256, 1 << 20);
            fleet.engines[0].max_num_batched_tokens = 1 << 17;
            let report =
                run(&fleet, 16, &mut Spaced(vec![(prompt, output)], Rows::default()), &mut RoundRobin(1))
                    .report;
            let (n, t) = (f64::from(prompt), f64::from(output - 1));
            let prefill = speed.a + speed.b * n + speed.c * n * n / 2.0;
            assert!(
                (report.ttft_ms.mean / prefill - 1.0).abs() < 0.01,
                "{model} on {gpu}: prefill of {prompt}"
            );
            // Contexts of n + 1, n + 2, ... tokens.
            let decode = t * (speed.d + speed.e + speed.f * (n + 1.0)) + speed.f * t * (t - 1.0) / 2.0;
            let found = report.e2e_ms.mean - report.ttft_ms.mean;
            assert!(
                (found - decode).abs() <= 0.01 * decode,
                "{model} on {gpu}: {output} tokens after {prompt}"
            );
            if output > 1 {
                assert!((report.itl_ms.mean * t / decode - 1.0).abs() < 0.01);
            }
        }
    }
}

#[test]
fn chunks_cost_one_more_base_each_and_no_more_attention() {
    let (_, _, speed) = TABLE[0];
    let constants = [speed.a, speed.b, speed.c, speed.d, speed.e, speed.f];
    let fleet = plain_fleet(1, constants, 256, 1 << 20);
    let report = run(&fleet, 16, &mut Spaced(vec![(32_000, 1)], Rows::default()), &mut RoundRobin(1)).report;
    let n = 32_000.0;
    let expected = 4.0 * speed.a + speed.b * n + speed.c * n * n / 2.0;
    assert!((report.ttft_ms.mean / expected - 1.0).abs() < 1e-3, "{}", report.ttft_ms.mean);
}

#[test]
fn one_slot_is_an_m_d_1_queue() {
    // Every prompt takes 1 s, at a load of 0.7: one waits ρ·S / (2·(1-ρ)) on average (Pollaczek and Khinchine).
    let fleet = plain_fleet(1, [1000.0, 0.0, 0.0, 1.0, 0.0, 0.0], 1, 1 << 20);
    let shape = Shape::single(Length::fixed(64), Length::fixed(1));
    let mut source = First::new(Generator::new(vec![shape], 0.7, 64, 11), 400_000);
    let report = run(&fleet, 64, &mut source, &mut RoundRobin(1)).report;
    let expected = 1000.0 + 0.7 * 1000.0 / (2.0 * 0.3);
    println!("M/D/1: {:.1} ms, expected {expected:.1}", report.ttft_ms.mean);
    assert!(
        (report.ttft_ms.mean / expected - 1.0).abs() < 0.02,
        "{} instead of {expected}",
        report.ttft_ms.mean
    );
    assert!((report.engines[0].utilisation - 0.7).abs() < 0.01);
}

#[test]
fn decode_slots_are_a_processor_sharing_queue() {
    // A step takes 1 ms for each sequence in it, so each of B sequences gets 1/B of the engine. Whatever the lengths' distribution, a
    // request takes its own length over (1 - ρ) on average.
    let fleet = plain_fleet(1, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], 4096, 1 << 30);
    let mut fleet = fleet;
    fleet.engines[0].max_num_batched_tokens = 8192;
    let tokens = 1000.0;
    let output = Length { mean: tokens, sigma: 0.5, least: 1, most: 100_000 };
    let shape = Shape::single(Length::fixed(1), output);
    let rate = 0.6 / (tokens / 1e3);
    let mut source = First::new(Generator::new(vec![shape], rate, 1024, 5), 200_000);
    let report = run(&fleet, 1024, &mut source, &mut RoundRobin(1)).report;
    let mean = report.output_tokens as f64 / report.finished as f64;
    let load = rate * (mean - 1.0) / 1e3;
    let expected = (mean - 1.0) / (1.0 - load);
    println!("processor sharing: {:.1} ms, expected {expected:.1}", report.e2e_ms.mean);
    assert!(
        (report.e2e_ms.mean / expected - 1.0).abs() < 0.02,
        "{} instead of {expected}",
        report.e2e_ms.mean
    );
}
