//! Whole runs: each is the same twice, every request ends, and the parts of a request happen as they must.

mod support;

use std::ops::ControlFlow;

use baton_sim::engine::speed::{Speed, known};
use baton_sim::engine::{Engine, Job, Output, Settings};
use baton_sim::fleet::Fleet;
use baton_sim::sim::{LoadReport, Outcome, Placer, Plan, Progress, Request, run, run_observed};
use baton_sim::trace::{First, Generator, Length, Scaled, Shape};
use baton_sim::{Nanos, SECOND};
use proptest::prelude::*;
use support::{FirstBlock, FixedSplit, RoundRobin, plain_fleet};

fn example() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

fn workload(requests: u64, seed: u64) -> First<Scaled<Generator>> {
    First::new(Scaled::new(Generator::new(Shape::mix(), 0.5, 64, seed), 2.0), requests)
}

fn outcomes(fleet: &Fleet, placer: &mut dyn Placer, requests: u64, seed: u64) -> (Vec<Outcome>, String) {
    let mut outcomes = Vec::new();
    let mut source = workload(requests, seed);
    let results = run_observed(fleet, 64, &mut source, placer, &mut |outcome| {
        outcomes.push(*outcome);
        ControlFlow::Continue(())
    });
    (outcomes, serde_json::to_string(&results.report).expect("a report is JSON"))
}

#[test]
fn two_runs_are_equal_to_the_byte() {
    let split = || FixedSplit { prefill: 3, decode: 5 };
    let first = outcomes(&example(), &mut split(), 1500, 9);
    assert_eq!(first, outcomes(&example(), &mut split(), 1500, 9));
    assert_ne!(first.1, outcomes(&example(), &mut split(), 1500, 10).1);
}

#[test]
fn every_request_ends_and_later_turns_wait() {
    let placers: [Box<dyn Placer>; 3] =
        [Box::new(RoundRobin(8)), Box::new(FirstBlock(8)), Box::new(FixedSplit { prefill: 4, decode: 4 })];
    for mut placer in placers {
        let (outcomes, _) = outcomes(&example(), &mut *placer, 2000, 4);
        assert_eq!(outcomes.len(), 2000);
        let mut ends = std::collections::HashMap::new();
        for outcome in &outcomes {
            assert!(outcome.ttft > 0 && outcome.ttft <= outcome.e2e);
            assert!(outcome.hit_tokens < outcome.prompt_tokens);
            if outcome.turn > 0 {
                let before = ends.get(&(outcome.session, outcome.turn - 1)).expect("turns end in order");
                assert!(outcome.arrived >= *before);
            }
            ends.insert((outcome.session, outcome.turn), outcome.arrived + outcome.e2e);
        }
    }
}

#[test]
fn sessions_on_one_engine_find_their_context() {
    let mut source = First::new(Generator::new(vec![Shape::agent()], 0.02, 16, 1), 400);
    let report = run(
        &plain_fleet(1, [1.0, 0.001, 0.0, 1.0, 0.0, 0.0], 256, 4 << 20),
        16,
        &mut source,
        &mut RoundRobin(1),
    )
    .report;
    assert_eq!(report.finished, 400);
    assert!(report.hit_rate > 0.85, "{}", report.hit_rate);
}

/// One request on two engines, alone: time by time.
#[test]
fn a_handoff_takes_the_time_of_its_parts() {
    let mut fleet = example().with_gbit(10.0);
    (fleet.engines[0].per_host, fleet.links.rtt_us, fleet.links.transfer_gbit) = (1, 200.0, None);
    let prompt = 8000;
    let shape = Shape::single(Length::fixed(prompt), Length::fixed(11));
    let mut source = First::new(Generator::new(vec![shape], 1.0, 16, 1), 1);
    let mut placer = FixedSplit { prefill: 1, decode: 1 };
    let report = run(&fleet, 16, &mut source, &mut placer).report;
    let speed = known("8B", "H100").expect("a row of the table");
    let prefill = speed.prefill_seconds(8000, 0);
    let bytes = speed.kv_bytes(8000);
    let transfer = bytes / (10e9 / 8.0 * fleet.links.efficiency) + 2.0 * 200e-6;
    // The last token once more, on the decode engine: no step is shorter than reading the weights.
    let first_step = (speed.d + speed.c * 8000.0) / 1e3;
    let expected = 2.0 * fleet.control.dispatch_us / 1e6 + prefill + transfer + first_step;
    assert!((report.ttft_ms.mean / 1e3 / expected - 1.0).abs() < 1e-3, "{} ms", report.ttft_ms.mean);
    let decode: f64 = (1..11).map(|token| speed.decode_seconds(1, 8000 + token)).sum();
    assert!(((report.e2e_ms.mean - report.ttft_ms.mean) / 1e3 / decode - 1.0).abs() < 1e-3);
    assert_eq!((report.fetched_tokens, report.transfers, report.expired_holds), (8000, 1, 0));
    assert!((report.bytes_moved as f64 / bytes - 1.0).abs() < 1e-6);
}

/// The second request pulls what the first one left elsewhere.
struct Puller(Vec<Progress>);

impl Placer for Puller {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Option<Plan> {
        Some(match request.number {
            0 => Plan::Colocated { engine: 0 },
            2.. => Plan::Colocated { engine: 2 },
            1 => Plan::Pull { source: 0, engine: 1 },
        })
    }

    fn progress(&mut self, _now: Nanos, _key: u32, progress: &Progress) {
        self.0.push(*progress);
    }
}

#[test]
fn a_pull_brings_what_the_source_has_cached() {
    let shape =
        Shape { turns: (2, 2), pause_seconds: 5.0, ..Shape::single(Length::fixed(4000), Length::fixed(96)) };
    let shape = Shape { later: Length::fixed(500), ..shape };
    // The session that opens next is counted too, but it does so long afterwards.
    let mut source = First::new(Generator::new(vec![shape], 1e-4, 16, 1), 3);
    let mut placer = Puller(Vec::new());
    let report = run(&example(), 16, &mut source, &mut placer).report;
    // All blocks of the first turn but what its last token, which was never computed on, leaves unfinished.
    assert_eq!((report.fetched_tokens, report.plans.pull), (4080, 1));
    assert_eq!(report.engines[1].prefill_tokens, 4000 + 96 + 500 - 4080);
    let sent = placer.0.iter().find_map(|progress| match progress {
        Progress::Transferred { source: 0, destination: 1, bytes, .. } => Some(*bytes),
        _ => None,
    });
    assert_eq!(sent, Some(4080 * 128 * 1024));
}

#[test]
fn what_the_placer_sees_is_late() {
    #[derive(Default)]
    struct Watcher {
        events: u64,
        latest: Nanos,
        reports: u64,
    }
    impl Placer for Watcher {
        fn place(&mut self, now: Nanos, _request: &Request<'_>) -> Option<Plan> {
            assert!(now >= self.latest);
            Some(Plan::Colocated { engine: 0 })
        }
        fn wants_kv_events(&self) -> bool {
            true
        }
        fn kv_events(&mut self, now: Nanos, _engine: u32, _events: &baton_sim::engine::events::KvEvents) {
            assert!(now >= self.latest);
            (self.events, self.latest) = (self.events + 1, now);
        }
        fn load(&mut self, now: Nanos, _engine: u32, report: &LoadReport) {
            assert!(now.is_multiple_of(SECOND) && (0.0..=1.0).contains(&report.kv_usage));
            self.reports += 1;
        }
    }
    let mut watcher = Watcher::default();
    run(&example(), 64, &mut workload(300, 2), &mut watcher);
    assert!(watcher.events > 300 && watcher.reports > 100);
}

#[test]
fn chunked_prefill_spares_those_who_decode() {
    let mut slow = example();
    let source = || First::new(Generator::new(vec![Shape::documents()], 1.5, 64, 3), 300);
    let chunked = run(&slow, 64, &mut source(), &mut RoundRobin(8)).report;
    (slow.engines[0].chunked_prefill, slow.engines[0].max_num_batched_tokens) = (false, 1 << 17);
    let whole = run(&slow, 64, &mut source(), &mut RoundRobin(8)).report;
    assert!(chunked.itl_ms.max < whole.itl_ms.max / 2.0, "{} {}", chunked.itl_ms.max, whole.itl_ms.max);
}

fn settings(blocks: u32) -> Settings {
    // Every step takes whole nanoseconds, so that a run of them, which is rounded once, ends where its steps do.
    let row = known("8B", "H100").expect("a row of the table");
    Settings {
        speed: Speed { c: 2e-6, f: 4.2e-5, ..row },
        block_tokens: 16,
        blocks,
        max_num_seqs: 16,
        max_num_batched_tokens: 512,
        chunked_prefill: true,
        kv_events: true,
    }
}

/// All that an engine says to these jobs, each with its arrival. `single`: every step by itself.
fn transcript(blocks: u32, jobs: &[(Nanos, u32, u32)], single: bool) -> (Vec<(Nanos, Output)>, u64, u128) {
    let mut engine = Engine::new(settings(blocks));
    let mut jobs = jobs.iter().enumerate().peekable();
    let (mut said, mut outputs, mut gaps) = (Vec::new(), Vec::new(), 0);
    loop {
        let arrival = jobs.peek().map(|(_, job)| job.0);
        let next = engine.next().map(|next| next.0);
        let now = match (arrival, next) {
            (Some(at), next) if next.is_none_or(|next| at < next) => {
                let (key, job) = jobs.next().expect("it was peeked");
                // Half of the prompts begin alike. No two generate the same block at the same time: in a run of steps, the
                // order in which they would come to the pool is another one.
                let shared = |at: u64| key % 2 == 0 && at < u64::from(job.1 / 16);
                let id = |at| if shared(at) { 1000 + at } else { 100_000 * (key as u64 + 1) + at };
                let ids = (0..u64::from((job.1 + job.2) / 16)).map(id).collect();
                let (prompt_tokens, output_tokens) = (job.1, job.2);
                let key = key as u32;
                engine.submit(
                    at,
                    Job { key, ids, prompt_tokens, output_tokens, remote_tokens: 0, hold: false },
                );
                at
            }
            (_, Some(next)) => {
                engine.wake(next);
                next
            }
            (_, None) => break,
        };
        if single {
            // Nothing is given back, but the run in hand is cut at its first step.
            engine.give_back(now, &[]);
        }
        engine.take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            match output {
                Output::Gaps { gap, count } => gaps += u128::from(gap) * u128::from(count),
                output => said.push((now, output)),
            }
        }
    }
    assert_eq!(engine.load().free_blocks, blocks);
    (said, engine.totals().preemptions, gaps)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn runs_of_steps_are_exact(
        blocks in 40..400u32,
        jobs in proptest::collection::vec((0..3 * SECOND, 1..500u32, 1..120u32), 1..40),
    ) {
        let mut jobs = jobs;
        jobs.sort();
        let (coarse, coarse_preemptions, coarse_gaps) = transcript(blocks, &jobs, false);
        let (single, single_preemptions, single_gaps) = transcript(blocks, &jobs, true);
        prop_assert_eq!(coarse.len(), single.len());
        let ends = |output: &Output| matches!(output, Output::Finished { .. });
        prop_assert_eq!(coarse.iter().filter(|said| ends(&said.1)).count(), jobs.len());
        prop_assert_eq!(coarse_preemptions, single_preemptions);
        for (coarse, single) in coarse.iter().zip(&single) {
            prop_assert_eq!(coarse, single);
        }
        prop_assert!((coarse_gaps as f64 - single_gaps as f64).abs() <= 1e-5 * single_gaps as f64 + 1e6);
    }
}

#[test]
fn a_full_pool_preempts_and_still_serves_everyone() {
    let jobs: Vec<(Nanos, u32, u32)> = (0..12).map(|at| (at, 100, 300)).collect();
    let (said, preemptions, _) = transcript(60, &jobs, false);
    assert!(preemptions > 0);
    assert_eq!(said.iter().filter(|said| matches!(said.1, Output::Finished { .. })).count(), 12);
}

#[test]
fn an_observer_stops_a_run() {
    let mut seen = 0;
    let mut source = workload(500, 1);
    let results = run_observed(&example(), 64, &mut source, &mut RoundRobin(8), &mut |_| {
        seen += 1;
        if seen == 100 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(results.report.finished, 100);
    assert!(results.report.unfinished > 0);
}

#[test]
fn lending_leaves_the_step_in_hand_its_blocks() {
    // A prompt of 20 blocks stays cached; then the answers of four others grow into what is left, in runs of many steps.
    for lent_after in 0..40u64 {
        let mut engine = Engine::new(settings(64));
        let job = |key: u32, prompt_tokens, output_tokens| {
            let ids = (0..64).map(|at| u64::from(key + 1) * 1000 + at).collect();
            Job { key, ids, prompt_tokens, output_tokens, remote_tokens: 0, hold: false }
        };
        engine.submit(0, job(0, 320, 1));
        let mut now = 0;
        while let Some((next, _)) = engine.next() {
            now = next;
            engine.wake(now);
        }
        for key in 1..5 {
            engine.submit(now, job(key, 40, 300));
        }
        for _ in 0..2 {
            now = engine.next().expect("prompts are computed").0;
            engine.wake(now);
        }
        let end = engine.next().expect("they decode").0;
        let lent = engine.lend(now + (end - now) * lent_after / 40, &job(0, 320, 1).ids[..20]);
        assert!(lent.len() <= 20);
        while let Some((next, _)) = engine.next() {
            now = next;
            engine.wake(now);
        }
        engine.give_back(now, &lent);
        while let Some((next, _)) = engine.next() {
            now = next;
            engine.wake(now);
        }
        assert_eq!(
            (engine.load().free_blocks, engine.totals().output_tokens),
            (64, 1 + 4 * 300),
            "{lent_after}"
        );
    }
}
