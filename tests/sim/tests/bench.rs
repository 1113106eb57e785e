//! Benches: bounds bound, capacities are where they are said to be, and nothing depends on the number of threads.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use baton_sim::bench::capacity::{ATTAINMENT, BEYOND, capacity};
use baton_sim::bench::grid::{Grid, score};
use baton_sim::bench::page::Page;
use baton_sim::bench::sweep::Sweep;
use baton_sim::bench::{Bench, BenchError, Mode, Workload, oracle, scenarios};
use baton_sim::decision::Speeds;
use baton_sim::fleet::{Fleet, Slo};
use baton_sim::sim::{Answer, Placer, Plan, Request, run_observed};
use baton_sim::trace::{Length, Shape};

fn fleet() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

static RUNNING: AtomicBool = AtomicBool::new(false);

fn bench(threads: usize) -> Bench<'static> {
    Bench { speeds: Speeds::Learned, threads, stop: &RUNNING, progress: &|_| () }
}

fn workload(name: &str, requests: u64) -> Workload {
    Workload::named(name, 64, 5).expect("a generated workload").with_requests(requests)
}

#[test]
fn no_policy_is_better_than_the_bound() {
    let modes = ["colocated", "adaptive", "4P4D", "naive@4P4D", "session_sticky", "random", "threshold@2P6D"];
    let mut compared = 0;
    for (name, rate) in [("mix", 1.0), ("chat", 4.0), ("agent", 0.3), ("documents", 1.0), ("documents", 0.01)]
    {
        let workload = workload(name, 600);
        let bound =
            oracle::bound(&fleet(), 64, &mut *workload.open(rate).expect("nothing is read from a disk"));
        assert_eq!(bound.requests, 600);
        for mode in modes {
            let mode: Mode = mode.parse().expect("a mode");
            let report = bench(1).run(&fleet(), &mode, &workload, rate).expect("it runs").report;
            assert_eq!(report.finished + report.refused, report.requests, "{name} {mode}");
            // Of requests that are all served, and the same.
            if report.finished == 600 {
                compared += 1;
                assert!(
                    bound.ttft_ms <= report.ttft_ms.mean,
                    "{name} {mode}: {} {}",
                    bound.ttft_ms,
                    report.ttft_ms.mean
                );
                assert!(
                    bound.e2e_ms <= report.e2e_ms.mean,
                    "{name} {mode}: {} {}",
                    bound.e2e_ms,
                    report.e2e_ms.mean
                );
            }
            assert!(
                bound.hit_rate >= report.hit_rate,
                "{name} {mode}: {} {}",
                bound.hit_rate,
                report.hit_rate
            );
            assert_eq!(report.requests + report.lost_turns, 600, "{name} {mode}");
            let most = bound.most_goodput(report.attainment);
            assert!(report.goodput_per_second <= most, "{name} {mode}: {} {most}", report.goodput_per_second);
        }
    }
    assert!(compared > 20, "{compared}");
}

#[test]
fn the_bound_is_reached_where_nobody_meets_anybody() {
    // One request at a time, nothing in common: what the bound counts is all that happens.
    let single = baton_sim::trace::Shape::single(
        baton_sim::trace::Length::fixed(4000),
        baton_sim::trace::Length::fixed(50),
    );
    let workload = Workload::generated("single", vec![single], 64, 1).with_requests(50);
    let bound = oracle::bound(&fleet(), 64, &mut *workload.open(0.01).expect("generated"));
    let report = bench(1).run(&fleet(), &Mode::COLOCATED, &workload, 0.01).expect("it runs").report;
    assert!(
        (report.ttft_ms.mean / bound.ttft_ms - 1.0).abs() < 1e-4,
        "{} {}",
        report.ttft_ms.mean,
        bound.ttft_ms
    );
    assert!(
        (report.e2e_ms.mean / bound.e2e_ms - 1.0).abs() < 1e-4,
        "{} {}",
        report.e2e_ms.mean,
        bound.e2e_ms
    );
}

#[test]
fn a_capacity_is_the_highest_rate_that_keeps_the_slos() {
    let workload = workload("documents", 1500).recorded().expect("generated");
    let (mode, bench) = (Mode::COLOCATED, bench(1));
    let found = capacity(&bench, &fleet(), &mode, &workload, 2.0, 0.02).expect("it runs");
    let at = |rate| bench.run(&fleet(), &mode, &workload, rate).expect("it runs").report.attainment;
    assert!(at(found.rate) >= ATTAINMENT);
    // None of those above it, of which there are enough.
    let above: Vec<_> = found.probes.iter().filter(|probe| probe.rate > found.rate).collect();
    let near = above.iter().filter(|probe| probe.rate < 1.25 * found.rate).count();
    assert!(near >= BEYOND as usize && above.iter().all(|probe| !probe.kept), "{:?}", found.probes);
    assert!(at(above.last().expect("tried").rate) < ATTAINMENT);
    let run = found.run.as_ref().expect("a rate keeps them");
    // About a lap's requests come while a lap's sessions begin.
    assert!((run.report.finished as f64 / 1500.0 - 1.0).abs() < 0.1, "{}", run.report.finished);
    assert_eq!(run.report.attainment, at(found.rate));
    // Where it begins does not matter much.
    let other = capacity(&bench, &fleet(), &mode, &workload, 100.0, 0.02).expect("it runs");
    assert!((other.rate / found.rate - 1.0).abs() < 0.1, "{} {}", other.rate, found.rate);
}

/// Agent calls with short pauses on two slow engines.
fn closed_loop(requests: u64) -> (Fleet, Workload) {
    let mut fleet = fleet();
    (fleet.engines[0].gpu, fleet.engines[0].count) = ("L40S".to_owned(), 2);
    fleet.slo = Some(Slo { ttft_ms: 2000.0, tpot_ms: 60.0 });
    let shape = Shape { turns: (3, 9), pause_seconds: 1.0, ..Shape::agent() };
    let workload = Workload::generated("agents", vec![shape], 64, 5).with_requests(requests);
    (fleet, workload.recorded().expect("generated"))
}

#[test]
fn a_closed_loop_has_a_capacity_that_the_recording_s_length_does_not_change() {
    let found = |requests| {
        let (fleet, workload) = closed_loop(requests);
        let found = capacity(&bench(1), &fleet, &Mode::COLOCATED, &workload, 0.2, 0.02).expect("it runs");
        let most = workload.bound(&fleet, found.rate).expect("generated").most_goodput(ATTAINMENT);
        assert!(found.goodput() > 0.3 * most && found.goodput() < most, "{} {most}", found.goodput());
        // What is offered comes, and is served as fast: the state is steady.
        let report = &found.run.as_ref().expect("a rate keeps them").report;
        let offered = found.rate * workload.offered_per_second().expect("recorded");
        let came = report.requests as f64 / report.measured_seconds;
        assert!((came / offered - 1.0).abs() < 0.1, "{came} {offered}");
        assert!((report.goodput_per_second / found.goodput() - 1.0).abs() < 0.1);
        found.goodput()
    };
    let (short, long) = (found(2000), found(4000));
    assert!((short / long - 1.0).abs() < 0.1, "{short} {long}");
}

#[test]
fn a_window_counts_who_arrives_in_it() {
    let (fleet, workload) = closed_loop(500);
    let slo = fleet.slo.expect("it has SLOs");
    let (mut source, window) = workload.steady(0.3, &slo).expect("a closed loop");
    let mut arrived = Vec::new();
    let report = run_observed(&fleet, 64, &mut *source, &mut Turns, window, &mut |outcome| {
        arrived.extend(outcome.map(|outcome| outcome.arrived));
        ControlFlow::Continue(())
    })
    .report;
    assert!(arrived.iter().all(|at| (window.from..window.until).contains(at)));
    assert_eq!(
        (report.requests, report.finished, report.unfinished),
        (arrived.len() as u64, arrived.len() as u64, 0)
    );
    let laps = workload.laps(0.3, &slo).expect("a closed loop");
    let expected = laps * workload.requests().expect("recorded");
    assert!((report.requests as f64 / expected as f64 - 1.0).abs() < 0.2);
    // At least as long as before it.
    assert!(window.until >= 2 * window.from && workload.laps(30.0, &slo) > Some(laps));
    assert_eq!(report.measured_seconds, (window.until - window.from) as f64 / 1e9);
    assert!(Workload::named("mix", 64, 1).expect("generated").steady(1.0, &slo).is_none());
}

/// Engines in turn.
struct Turns;

impl Placer for Turns {
    fn place(&mut self, _now: u64, request: &Request<'_>) -> Answer {
        Answer::Goes(Plan::Colocated { engine: (request.number % 2) as u32 })
    }
}

#[test]
fn slos_that_nothing_keeps_have_no_capacity() {
    let mut fleet = fleet();
    fleet.slo.as_mut().expect("the example has one").ttft_ms = 0.1;
    let found =
        capacity(&bench(1), &fleet, &Mode::ADAPTIVE, &workload("chat", 100), 1.0, 0.1).expect("it runs");
    assert_eq!((found.rate, found.goodput(), found.run.is_none()), (0.0, 0.0, true));
}

#[test]
fn reports_do_not_depend_on_threads() {
    let html = |threads: usize| {
        let mut page = Page::new("test");
        let mut fleet = fleet();
        fleet.links.choices = vec![25.0];
        let done = AtomicUsize::new(0);
        let count = || {
            done.fetch_add(1, Ordering::Relaxed);
        };
        let output = Length { mean: 50.0, sigma: 0.5, least: 5, most: 200 };
        let shape = Shape { turns: (2, 3), pause_seconds: 1.0, output, ..Shape::agent() };
        let workload = Workload::generated("short sessions", vec![shape], 64, 1).with_requests(150);
        let grid = Grid { workloads: vec![workload], fleets: vec![fleet.clone()] };
        let cells = grid.run(&bench(threads), &count).expect("it runs");
        assert_eq!((cells.len(), score(&cells).cells, done.load(Ordering::Relaxed)), (1, 1, grid.len()));
        assert!(cells[0].goodput.iter().all(|(_, goodput)| *goodput > 0.0));
        Grid::show(&mut page, &cells);
        let sweep = Sweep {
            tokens: vec![2000],
            hits: vec![0.0, 0.5],
            gbit: vec![100.0],
            output_tokens: 50,
            requests: 100,
            block_tokens: 64,
            seed: 3,
        };
        let points = sweep
            .run(&bench(threads), &fleet, &[Mode::COLOCATED, Mode::split(4, 4)], &count)
            .expect("it runs");
        assert!(points.iter().all(|point| point.split_over_colocated > 0.0), "{points:?}");
        sweep.show(&mut page, &fleet, &points);
        page.finish()
    };
    let one = html(1);
    assert!(one.contains("<svg") && one.contains("co-located"));
    assert_eq!(one, html(2));
    assert_eq!(one, html(1));
}

#[test]
fn every_set_up_can_run() {
    for scenario in scenarios::all(&fleet(), 64, 1) {
        assert!(scenario.ways() >= 3, "{}", scenario.name);
    }
}

#[test]
fn a_stopped_bench_keeps_what_was_done() {
    let stop = AtomicBool::new(false);
    let bench = Bench { speeds: Speeds::Known, threads: 1, stop: &stop, progress: &|_| () };
    let modes = [Mode::COLOCATED, Mode::ADAPTIVE, Mode::split(4, 4)];
    let work = |mode: &Mode| {
        let run = bench.run(&fleet(), mode, &workload("chat", 100), 1.0);
        stop.store(*mode == Mode::ADAPTIVE, Ordering::Relaxed);
        run.map(|run| run.report.finished)
    };
    let found = bench.all(&modes, work, &|_| ()).expect("stopping is no error");
    assert_eq!(found, [Some(100), Some(100), None]);
    let stopped = bench.run(&fleet(), &Mode::COLOCATED, &workload("chat", 1000), 1.0);
    assert!(matches!(stopped, Err(BenchError::Stopped)));
}

#[test]
fn a_mode_that_the_fleet_cannot_run_is_said() {
    let run = |mode: &str| {
        let mode: Mode = mode.parse().expect("a mode");
        bench(1).run(&fleet(), &mode, &workload("chat", 10), 1.0).expect_err("it cannot run").to_string()
    };
    assert!(run("3P4D").contains("the fleet has 8"));
    assert!(run("naive").contains("naive@3P5D"));
}
