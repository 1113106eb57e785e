//! Engines that die and cards that are cut off: nobody is lost from the accounts, and nothing goes where nothing is.

mod support;

use std::ops::ControlFlow;

use baton_sim::bench::Mode;
use baton_sim::decision::{Production, Speeds};
use baton_sim::engine::speed::known;
use baton_sim::fleet::{Card, Fleet, Outage};
use baton_sim::sim::{
    Answer, Health, MAX_ATTEMPTS, Outcome, Placer, Plan, Progress, Report, Request, Window, run, run_observed,
};
use baton_sim::trace::{First, Generator, Length, Shape};
use baton_sim::{Nanos, SECOND, seconds};
use proptest::prelude::*;
use support::watched::{watched, watched_box};
use support::{FixedSplit, RoundRobin};

fn promised() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

/// The same without SLOs: nobody waits.
fn example() -> Fleet {
    Fleet { slo: None, ..promised() }
}

fn outage(engine: u32, from_seconds: f64, until_seconds: Option<f64>) -> Outage {
    Outage { engine, from_seconds, until_seconds }
}

/// Calls of agents: sessions that go on where their context lies.
fn agents(requests: u64) -> First<Generator> {
    First::new(Generator::new(vec![Shape::agent()], 2.5, 64, 7), requests)
}

fn production(fleet: &Fleet, policy: &str) -> Production {
    Production::new(fleet, 64, policy, Speeds::Learned).expect("a policy")
}

fn accounts_are_whole(report: &Report) {
    let ended = report.finished + report.refused + report.too_long + report.failed + report.unfinished;
    assert_eq!(report.requests, ended);
}

fn observe(
    fleet: &Fleet,
    source: &mut dyn baton_sim::trace::Source,
    placer: &mut dyn Placer,
) -> (Report, Vec<Outcome>) {
    let mut outcomes = Vec::new();
    let results = run_observed(fleet, 64, source, placer, Window::ALL, &mut |outcome| {
        outcomes.extend(outcome.copied());
        ControlFlow::Continue(())
    });
    (results.report, outcomes)
}

#[test]
fn an_engine_dies_under_load_and_comes_back_empty() {
    let dies = |fleet: Fleet| Fleet { outages: vec![outage(2, 100.0, Some(160.0))], ..fleet };
    for policy in ["adaptive", "colocated", "session_sticky", "disaggregated@4P4D", "disaggregated@2P6D"] {
        let mode: Mode = policy.parse().expect("a mode");
        let fleet = mode.fleet(&dies(example())).expect("eight engines");
        let mut placer = watched(production(&fleet, policy.split('@').next().expect("a policy")));
        let (report, outcomes) = observe(&fleet, &mut agents(8000), &mut placer);
        accounts_are_whole(&report);
        assert_eq!(report.unfinished, 0, "{policy}");
        assert_eq!(outcomes.len() as u64, report.finished, "{policy}");
        // Nobody's answer is lost with an engine that only computes prompts.
        let fell_back = placer.progress.iter().filter(|of| of.2 == Progress::FellBack).count();
        match policy {
            "disaggregated@2P6D" => assert!(report.failed < 200, "{policy}: {}", report.failed),
            "disaggregated@4P4D" => {
                assert!(report.failed == 0 && fell_back > 0, "{policy}: {}", report.failed)
            }
            _ => assert!(report.failed > 0 && report.failed < 200, "{policy}: {}", report.failed),
        }
        let second = |at: &Nanos| seconds(*at);
        let touches = |plan: &Plan| plan.decode() == 2 || plan.transfer().is_some_and(|of| of.0 == 2);
        let went = |from: f64, to: f64| {
            let at = placer.placed.iter().filter(|(at, _)| (from..to).contains(&second(at)));
            at.filter(|(_, plan)| touches(plan)).count()
        };
        assert!(went(0.0, 100.0) > 50 && went(161.0, 400.0) > 50, "{policy}");
        // While its lease lasts, one every two seconds finds out; then nothing goes there any more.
        assert!((0..=4).contains(&went(100.01, 105.01)), "{policy}: {}", went(100.01, 105.01));
        assert_eq!(went(105.01, 160.0), 0, "{policy}");
        let heard: Vec<Health> =
            placer.health.iter().map(|of| of.2).filter(|health| *health != Health::Refused).collect();
        assert_eq!(heard, [Health::Died, Health::Back], "{policy}");
        assert!(placer.health.iter().all(|of| of.1 == 2), "{policy}");
    }
}

#[test]
fn what_came_back_has_nothing_cached() {
    // The same prompt again and again, to an engine that dies between.
    struct Always;
    impl Placer for Always {
        fn place(&mut self, _now: Nanos, _request: &Request<'_>) -> Answer {
            Answer::Goes(Plan::Colocated { engine: 0 })
        }
    }
    let shape = Shape {
        prefixes: 1,
        prefix: Length::fixed(6400),
        ..Shape::single(Length::fixed(10), Length::fixed(2))
    };
    let fleet = Fleet { outages: vec![outage(0, 50.0, Some(60.0))], ..example() };
    let mut source = First::new(Generator::new(vec![shape], 1.0, 64, 3), 100);
    let (report, outcomes) = observe(&fleet, &mut source, &mut Always);
    accounts_are_whole(&report);
    let hits = |from: u64, to: u64| {
        let during = move |outcome: &&Outcome| (from * SECOND..to * SECOND).contains(&outcome.arrived);
        outcomes.iter().filter(during).map(|outcome| outcome.hit_tokens).collect::<Vec<_>>()
    };
    let expected = |hits: &[u32]| hits[0] == 0 && hits[1..].iter().all(|hit| *hit == 6400);
    assert!(expected(&hits(0, 50)) && expected(&hits(60, 1000)), "{:?}", hits(0, 1000));
    // Between, each is sent to the same engine until it has failed.
    assert_eq!(hits(51, 60), Vec::<u32>::new());
    assert!(report.failed > 5 && report.retried == 2 * report.failed, "{} {}", report.failed, report.retried);
}

/// One request, alone, on engines 0 and then 1.
struct Next;

impl Placer for Next {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        assert_eq!(request.avoid.len() as u32, request.avoid.last().map_or(0, |last| last + 1));
        Answer::Goes(Plan::Colocated { engine: request.avoid.len() as u32 })
    }
}

fn single(prompt: u32, output: u32) -> First<Generator> {
    let shape = Shape::single(Length::fixed(prompt), Length::fixed(output));
    First::new(Generator::new(vec![shape], 1.0, 64, 1), 1)
}

/// When the one request of [`single`] arrives.
fn arrival() -> f64 {
    let (_, outcomes) = observe(&example(), &mut single(16_000, 100), &mut Next);
    seconds(outcomes[0].arrived)
}

#[test]
fn before_its_first_token_a_request_goes_elsewhere_and_after_it_fails() {
    let speed = known("8B", "H100").expect("a row of the table");
    let (at, prefill) = (arrival(), speed.prefill_seconds(16_000, 0));
    let dispatch = example().control.dispatch_us / 1e6;
    // In the midst of its prefill, which is then made again.
    let fleet = Fleet { outages: vec![outage(0, at + prefill / 2.0, None)], ..example() };
    let (report, outcomes) = observe(&fleet, &mut single(16_000, 100), &mut Next);
    assert_eq!((report.finished, report.failed, report.retried), (1, 0, 1));
    let expected = prefill / 2.0 + dispatch + dispatch + prefill;
    // The engine's chunks of 8,192 tokens cost the request's constant twice.
    assert!((seconds(outcomes[0].ttft) / expected - 1.0).abs() < 0.02, "{} {expected}", outcomes[0].ttft);
    // After its first token.
    let fleet = Fleet { outages: vec![outage(0, at + 1.5 * prefill, None)], ..example() };
    let (report, _) = observe(&fleet, &mut single(16_000, 100), &mut Next);
    assert_eq!((report.finished, report.failed, report.retried), (0, 1, 0));
    assert!(report.engines[0].output_tokens > 1 && report.engines[0].output_tokens < 100);
    // Nobody is there: three are tried.
    let outages = (0..8).map(|engine| outage(engine, 0.0, None)).collect();
    let fleet = Fleet { outages, ..example() };
    let mut placer = watched(Next);
    let (report, _) = observe(&fleet, &mut single(16_000, 100), &mut placer);
    assert_eq!((report.finished, report.failed, report.retried), (0, 1, 2));
    assert_eq!((placer.attempts, placer.placed.len()), (MAX_ATTEMPTS, MAX_ATTEMPTS));
}

#[test]
fn a_first_part_that_fails_is_left_out() {
    let (speed, at) = (known("8B", "H100").expect("a row of the table"), arrival());
    let prefill = speed.prefill_seconds(16_000, 0);
    for dies in [0.0, at + prefill / 2.0] {
        let fleet = Fleet { outages: vec![outage(0, dies, None)], ..example() };
        let mut placer = watched(FixedSplit { prefill: 1, decode: 7 });
        let (report, _) = observe(&fleet, &mut single(16_000, 100), &mut placer);
        assert_eq!((report.finished, report.failed, report.retried, report.transfers), (1, 0, 0, 0));
        assert_eq!(report.engines[1].prefill_tokens, 16_000);
        let fell_back = |of: &&(Nanos, u32, Progress)| of.2 == Progress::FellBack;
        assert_eq!(placer.progress.iter().filter(fell_back).count(), 1);
    }
}

/// Engines on hosts of their own, over 10 Gbit/s: the blocks of 16,000 tokens are on their way for two seconds.
fn narrow() -> (Fleet, f64) {
    let mut fleet = example().with_gbit(10.0);
    fleet.engines[0].per_host = 1;
    let speed = known("8B", "H100").expect("a row of the table");
    let bytes = speed.kv_bytes(16_000);
    let takes = bytes / (10e9 / 8.0 * fleet.links.efficiency);
    (fleet, takes)
}

#[test]
fn a_transfer_from_an_engine_that_dies_ends_early_and_the_rest_is_computed() {
    let (fleet, takes) = narrow();
    let speed = known("8B", "H100").expect("a row of the table");
    let begins = arrival() + speed.prefill_seconds(16_000, 0);
    let dies = Fleet { outages: vec![outage(0, begins + takes / 2.0, None)], ..fleet.clone() };
    let mut placer = FixedSplit { prefill: 1, decode: 7 };
    let (report, outcomes) = observe(&dies, &mut single(16_000, 100), &mut placer);
    assert_eq!((report.finished, report.failed, report.transfers, report.failed_transfers), (1, 0, 0, 1));
    let came = report.fetched_tokens as f64;
    assert!((came / 8000.0 - 1.0).abs() < 0.02 && came % 64.0 == 0.0, "{came}");
    assert_eq!(report.engines[1].prefill_tokens, 16_000 - report.fetched_tokens);
    assert_eq!(outcomes[0].hit_tokens, 0);
    // The engine that fetches dies: the request is computed by the next one.
    let dies = Fleet { outages: vec![outage(1, begins + takes / 2.0, None)], ..fleet };
    struct Then;
    impl Placer for Then {
        fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
            Answer::Goes(match request.avoid.len() {
                0 => Plan::Disaggregated { prefill: 0, decode: 1 },
                _ => Plan::Colocated { engine: 2 },
            })
        }
    }
    let (report, _) = observe(&dies, &mut single(16_000, 100), &mut Then);
    assert_eq!((report.finished, report.retried, report.transfers), (1, 1, 0));
    assert_eq!(report.engines[2].prefill_tokens, 16_000);
    assert_eq!(report.expired_holds, 0, "what was held for it is let go");
}

#[test]
fn a_card_that_is_narrow_for_a_time_slows_what_crosses_it_then() {
    let (fleet, takes) = narrow();
    let speed = known("8B", "H100").expect("a row of the table");
    let (at, prefill) = (arrival(), speed.prefill_seconds(16_000, 0));
    let begins = at + prefill + 2.0 * fleet.control.dispatch_us / 1e6;
    let ttft = |cards: Vec<Card>, deadline_ms: f64| {
        let mut fleet = Fleet { cards, ..fleet.clone() };
        fleet.control.pull_deadline_ms = deadline_ms;
        let (report, outcomes) =
            observe(&fleet, &mut single(16_000, 100), &mut FixedSplit { prefill: 1, decode: 7 });
        (seconds(outcomes[0].ttft), report)
    };
    let card = |gbit: f64, until_seconds: Option<f64>| Card {
        host: 1,
        from_seconds: begins + takes / 2.0,
        until_seconds,
        gbit,
    };
    let (plain, _) = ttft(Vec::new(), 10_000.0);
    // Half goes at full width, and half at a tenth of it.
    let (slow, report) = ttft(vec![card(1.0, None)], 100_000.0);
    assert!(((slow - plain) / (9.0 * takes / 2.0) - 1.0).abs() < 0.01, "{plain} {slow}");
    assert_eq!((report.transfers, report.failed_transfers), (1, 0));
    // Nothing goes through for three seconds.
    let (cut, report) = ttft(vec![card(0.0, Some(begins + takes / 2.0 + 3.0))], 10_000.0);
    assert!((cut - plain - 3.0).abs() < 1e-3, "{plain} {cut}");
    assert_eq!((report.transfers, report.failed_transfers), (1, 0));
    // It is cut off for good: the rest is computed when the time for it is over.
    let (late, report) = ttft(vec![card(0.0, None)], 10_000.0);
    assert_eq!((report.transfers, report.failed_transfers, report.finished), (0, 1, 1));
    let came = report.fetched_tokens;
    let expected = begins - at + 10.0 + speed.prefill_seconds(16_000 - came, came);
    assert!((late / expected - 1.0).abs() < 0.01, "{late} {expected}");
}

#[test]
fn links_are_measured_as_wide_as_they_are() {
    // A host's card is narrow from the start: adaptive learns it, and hands off less over it than where it is not.
    let shape = Shape::documents();
    let moved = |cards: Vec<Card>| {
        let mut fleet = Fleet { cards, ..example().with_gbit(100.0) };
        fleet.engines[0].per_host = 1;
        let mut source = First::new(Generator::new(vec![shape.clone()], 2.0, 64, 5), 600);
        let mut placer = watched(production(&fleet, "adaptive"));
        let (report, _) = observe(&fleet, &mut source, &mut placer);
        accounts_are_whole(&report);
        let over = |plan: &Plan| plan.transfer().is_some_and(|(from, to)| from == 3 || to == 3);
        placer.placed.iter().filter(|(_, plan)| over(plan)).count()
    };
    let narrow = Card { host: 3, from_seconds: 0.0, until_seconds: None, gbit: 0.2 };
    let (wide, narrow) = (moved(Vec::new()), moved(vec![narrow]));
    assert!(wide > 20 && narrow < wide / 4, "{wide} {narrow}");
}

#[test]
fn two_runs_with_failures_are_equal_to_the_byte() {
    let mut fleet = promised();
    fleet.outages = vec![outage(2, 40.0, Some(90.0)), outage(5, 60.0, None), outage(2, 120.0, Some(130.0))];
    fleet.cards = vec![Card { host: 0, from_seconds: 30.0, until_seconds: Some(80.0), gbit: 0.0 }];
    let json = || {
        let report = run(&fleet, 64, &mut agents(2000), &mut production(&fleet, "adaptive")).report;
        accounts_are_whole(&report);
        assert!(report.failed > 0 && report.retried > 0);
        serde_json::to_string(&report).expect("a report is JSON")
    };
    assert_eq!(json(), json());
}

#[test]
fn what_happens_after_the_last_request_does_not_prolong_a_run() {
    let plain = run(&example(), 64, &mut agents(200), &mut RoundRobin(8)).report;
    let fleet = Fleet { outages: vec![outage(1, 1e6, None)], ..example() };
    assert_eq!(run(&fleet, 64, &mut agents(200), &mut RoundRobin(8)).report, plain);
}

fn outages() -> impl Strategy<Value = Vec<Outage>> {
    let one = (0..8u32, 0.0..40.0f64, proptest::option::of(0.0001..20.0f64));
    proptest::collection::vec(one, 0..12).prop_map(|mut all| {
        // One after another.
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut outages: Vec<Outage> = Vec::new();
        for (engine, from, takes) in all {
            let before = outages.iter().rev().find(|other| other.engine == engine);
            if before.is_none_or(|other| other.until_seconds.is_some_and(|until| until < from)) {
                outages.push(outage(engine, from, takes.map(|takes| from + takes)));
            }
        }
        outages
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn accounts_are_whole_whatever_fails(
        outages in outages(),
        cut in proptest::option::of((0..4u32, 0.0..30.0f64, 0.0..2.0f64)),
        mode in 0..4usize,
    ) {
        let card = |(host, from_seconds, gbit)| Card { host, from_seconds, until_seconds: Some(35.0), gbit };
        let mut fleet = Fleet { outages, cards: cut.map(card).into_iter().collect(), ..promised().with_gbit(10.0) };
        fleet.engines[0].per_host = 2;
        fleet.check().expect("consistent");
        let mode: Mode = ["adaptive", "4P4D", "naive@4P4D", "round_robin"][mode].parse().expect("a mode");
        let fleet = mode.fleet(&fleet).expect("eight engines");
        let mut placer = watched_box(mode.placer(&fleet, 64, Speeds::Learned).expect("a placer"));
        let source = || First::new(Generator::new(Shape::mix(), 4.0, 64, 11), 250);
        let (report, _) = observe(&fleet, &mut source(), &mut placer);
        accounts_are_whole(&report);
        prop_assert_eq!(report.unfinished, 0);
        prop_assert!(placer.attempts <= MAX_ATTEMPTS);
    }
}
