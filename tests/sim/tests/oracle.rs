//! The oracle's bounds are bounds whatever the fleet, the workload, the rate and the mode, and they are near where only one thing counts.

use std::sync::atomic::AtomicBool;

use baton_sim::bench::{Bench, Mode, Run, Workload, oracle};
use baton_sim::decision::Speeds;
use baton_sim::fleet::{Fleet, Slo};
use baton_sim::sim::{self, Report};
use baton_sim::trace::{Length, Shape};
use proptest::prelude::*;

static RUNNING: AtomicBool = AtomicBool::new(false);

fn run(fleet: &Fleet, mode: &Mode, workload: &Workload, rate: f64) -> Run {
    let bench = Bench { speeds: Speeds::Learned, threads: 1, stop: &RUNNING, progress: &|_| () };
    bench.replay(fleet, mode, workload, rate).expect("it runs")
}

/// The same where nobody waits for room and nobody is turned away: the decision does not know what is promised.
fn run_all(fleet: &Fleet, mode: &Mode, workload: &Workload, rate: f64) -> Report {
    let shaped = mode.fleet(fleet).expect("it has the engines");
    let unpromised = Fleet { slo: None, ..shaped.clone() };
    let mut placer = mode.placer(&unpromised, workload.block_tokens(), Speeds::Learned).expect("a placer");
    let mut source = workload.open(rate).expect("it is in memory");
    sim::run(&shaped, workload.block_tokens(), &mut *source, &mut *placer).report
}

fn bound(fleet: &Fleet, workload: &Workload, rate: f64) -> oracle::Bound {
    oracle::bound(fleet, workload.block_tokens(), &mut *workload.open(rate).expect("it is in memory"))
}

fn example() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

/// Engines of one or two kinds.
fn fleets() -> impl Strategy<Value = Fleet> {
    let gpu = || prop_oneof![Just("H100"), Just("A100"), Just("L40S")];
    let kind = (gpu(), 2..5u32, 1..3u32, 4..80u32, 9..14u32, any::<bool>(), 17..20u32);
    let slo = (50.0..5000.0f64, 8.0..100.0f64);
    let links = (prop_oneof![Just(1.0), Just(25.0), Just(400.0)], 10.0..1000.0f64);
    (proptest::collection::vec(kind, 1..3), slo, links).prop_map(
        |(kinds, (ttft_ms, tpot_ms), (gbit, rtt_us))| {
            let mut fleet = example().with_gbit(gbit);
            fleet.links.rtt_us = rtt_us;
            fleet.slo = Some(Slo { ttft_ms, tpot_ms });
            let like = fleet.engines[0].clone();
            let kind = |(gpu, count, per_host, seqs, batched, chunked, kv): (
                &str,
                u32,
                u32,
                u32,
                u32,
                bool,
                u32,
            )| {
                let mut kind = like.clone();
                (kind.gpu, kind.count, kind.per_host) = (gpu.to_owned(), count, per_host);
                (kind.max_num_seqs, kind.chunked_prefill) = (seqs, chunked);
                // Without chunks whole prompts must fit into a step.
                kind.max_num_batched_tokens = if chunked { 1 << batched } else { 1 << 15 };
                kind.kv_tokens = 1 << kv;
                kind
            };
            fleet.engines = kinds.into_iter().map(kind).collect();
            fleet.check().expect("it is consistent");
            fleet
        },
    )
}

fn shapes() -> impl Strategy<Value = Shape> {
    let length = |most: u32| {
        (1.0..f64::from(most), 0.0..1.0f64).prop_map(move |(mean, sigma)| Length {
            mean,
            sigma,
            least: 1,
            most,
        })
    };
    (0..6u64, length(4000), length(6000), length(800), length(300), 1..8u32, 0.0..5.0f64).prop_map(
        |(prefixes, prefix, first, later, output, turns, pause_seconds)| Shape {
            prefixes,
            prefix,
            first,
            later,
            output,
            turns: (1, turns),
            pause_seconds,
            most_context: 30_000,
            ..Shape::chat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn no_mode_is_better_than_the_bound(
        fleet in fleets(),
        shapes in proptest::collection::vec(shapes(), 1..3),
        mode in prop_oneof![
            Just("colocated"), Just("adaptive"), Just("random"), Just("session_sticky"), Just("1P1D"), Just("naive@1P1D")
        ],
        rate in 0.02..60.0f64,
        seed in any::<u64>(),
        turns_away in any::<bool>(),
    ) {
        // A split of half and half.
        let half = fleet.len() as u32 / 2;
        let mode: Mode = mode.replace("1P1D", &format!("{half}P{}D", fleet.len() as u32 - half)).parse().expect("a mode");
        // Recorded: which requests come does not depend on how fast earlier ones are served.
        let workload = Workload::generated("random", shapes, 64, seed).with_requests(150).recorded().expect("generated");
        let report = match turns_away {
            true => run(&fleet, &mode, &workload, rate).report,
            false => run_all(&fleet, &mode, &workload, rate),
        };
        let bound = bound(&fleet, &workload, rate);
        let most = bound.most_goodput(report.attainment);
        prop_assert!(turns_away || report.finished == bound.requests);
        prop_assert_eq!(report.finished + report.refused, report.requests);
        prop_assert_eq!(report.requests + report.lost_turns, bound.requests);
        // These are of all requests.
        if report.finished == bound.requests {
            prop_assert!(bound.ttft_ms <= report.ttft_ms.mean + 1e-6, "{} {}", bound.ttft_ms, report.ttft_ms.mean);
            prop_assert!(bound.e2e_ms <= report.e2e_ms.mean + 1e-6, "{} {}", bound.e2e_ms, report.e2e_ms.mean);
            prop_assert!(bound.hit_rate >= report.hit_rate, "{} {}", bound.hit_rate, report.hit_rate);
        }
        prop_assert!(report.goodput_per_second <= most * (1.0 + 1e-9), "{} {most}", report.goodput_per_second);
    }
}

/// How near the goodput of a flood of requests comes to the bound, under SLOs that all of them keep.
fn flood(shape: Shape, requests: u64, tpot_ms: f64) -> f64 {
    let mut fleet = example();
    fleet.slo = Some(Slo { ttft_ms: 1e9, tpot_ms });
    (fleet.control.max_requests, fleet.control.max_engine_requests) = (100_000, 100_000);
    let workload = Workload::generated("flood", vec![shape], 64, 3).with_requests(requests);
    let report = run_all(&fleet, &"least_loaded".parse().expect("a mode"), &workload, 1e6);
    assert_eq!(report.attainment, 1.0);
    report.goodput_per_second / bound(&fleet, &workload, 1e6).most_goodput(1.0)
}

#[test]
fn the_bound_on_goodput_is_near_where_engines_only_prefill_or_only_decode() {
    let prefill = flood(Shape::single(Length::fixed(2000), Length::fixed(1)), 2000, 1e9);
    assert!((0.95..=1.0).contains(&prefill), "{prefill}");
    let decode = flood(Shape::single(Length::fixed(64), Length::fixed(500)), 8 * 256 * 4, 1e9);
    assert!((0.9..=1.0).contains(&decode), "{decode}");
}
