//! Whole runs: each is the same twice, every request ends, and the parts of a request happen as they must.

mod support;

use std::ops::ControlFlow;

use baton_sim::engine::speed::known;
use baton_sim::fleet::Fleet;
use baton_sim::sim::{
    Answer, LoadReport, Outcome, Placer, Plan, Progress, Request, Window, run, run_observed,
};
use baton_sim::trace::{First, Generator, Length, Scaled, Shape};
use baton_sim::{Nanos, SECOND};
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
    let results = run_observed(fleet, 64, &mut source, placer, Window::ALL, &mut |outcome| {
        outcomes.extend(outcome.copied());
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
struct Puller(Vec<(Nanos, Progress)>);

impl Placer for Puller {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        Answer::Goes(match request.number {
            0 => Plan::Colocated { engine: 0 },
            2.. => Plan::Colocated { engine: 2 },
            1 => Plan::Pull { source: 0, engine: 7 },
        })
    }

    fn progress(&mut self, now: Nanos, _key: u32, progress: &Progress) {
        self.0.push((now, *progress));
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
    let fleet = example().with_gbit(10.0);
    let mut outcomes = Vec::new();
    let report = run_observed(&fleet, 16, &mut source, &mut placer, Window::ALL, &mut |outcome| {
        outcomes.extend(outcome.copied());
        ControlFlow::Continue(())
    })
    .report;
    // All blocks of the first turn but what its last token, which was never computed on, leaves unfinished.
    let pulled = 4080;
    assert_eq!((report.fetched_tokens, report.plans.pull), (pulled, 1));
    // The source computes one token behind them to hold them.
    assert_eq!(report.engines[0].prefill_tokens, 4000 + 1);
    let rest = 4000 + 96 + 500 - pulled;
    assert_eq!(report.engines[7].prefill_tokens, rest);
    let sent = placer.0.iter().find_map(|progress| match progress.1 {
        Progress::Transferred { source: 0, destination: 7, bytes, seconds, .. } => Some((bytes, seconds)),
        _ => None,
    });
    let (bytes, seconds) = sent.expect("they were sent");
    assert_eq!(bytes, pulled * 128 * 1024);
    // Nothing else runs: two dispatches, the source's step of one token, the transfer, the prefill of the rest.
    let speed = known("8B", "H100").expect("a row of the table");
    let step = (speed.d + speed.c * pulled as f64) / 1e3;
    let expected =
        2.0 * fleet.control.dispatch_us / 1e6 + step + seconds + speed.prefill_seconds(rest, pulled);
    let ttft = outcomes[1].ttft as f64 / 1e9;
    assert!((ttft / expected - 1.0).abs() < 1e-4, "{ttft} {expected}");
}

#[test]
fn a_pull_of_what_is_gone_is_computed() {
    let shape = Shape::single(Length::fixed(4000), Length::fixed(96));
    let mut source = First::new(Generator::new(vec![shape], 1e-4, 16, 1), 2);
    let report = run(&example(), 16, &mut source, &mut Puller(Vec::new())).report;
    assert_eq!((report.finished, report.fetched_tokens, report.transfers), (2, 0, 0));
    assert_eq!((report.engines[0].prefill_tokens, report.engines[7].prefill_tokens), (4000, 4000));
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
        fn place(&mut self, now: Nanos, _request: &Request<'_>) -> Answer {
            assert!(now >= self.latest);
            Answer::Goes(Plan::Colocated { engine: 0 })
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

#[test]
fn an_observer_stops_a_run() {
    let mut seen = 0;
    let mut source = workload(500, 1);
    let results = run_observed(&example(), 64, &mut source, &mut RoundRobin(8), Window::ALL, &mut |_| {
        seen += 1;
        if seen == 100 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(results.report.finished, 100);
    assert!(results.report.unfinished > 0);
}
