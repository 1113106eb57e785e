//! Engines that are given parts while more requests keep their SLOs by that, and do both again once it is otherwise.

mod support;

use baton_sim::decision::{Production, Speeds};
use baton_sim::fleet::{Card, Fleet, Slo};
use baton_sim::sim::{Plan, run};
use baton_sim::trace::{First, Generator, Length, Shape};
use baton_sim::{Nanos, seconds};
use support::watched::watched;

/// When all cards become slow.
const SLOW_SECONDS: f64 = 200.0;

/// Eight engines on hosts of their own. Where all do both, prompts of others hold up one answer in fourteen for too long; the cards carry
/// every handoff, until they have another width.
fn fleet(then_gbit: f64) -> Fleet {
    let example = include_str!("../../../benches/fleets/8b-h100x8.toml");
    let mut fleet = Fleet::parse(example).expect("an example");
    fleet.engines[0].per_host = 1;
    fleet.slo = Some(Slo { ttft_ms: 2000.0, tpot_ms: 9.0 });
    let slow = |host| Card { host, from_seconds: SLOW_SECONDS, until_seconds: None, gbit: then_gbit };
    fleet.cards = (0..8).map(slow).collect();
    fleet
}

#[test]
fn parts_are_given_and_taken_back_when_handoffs_have_become_slow() {
    // A prompt's KV takes eight seconds, so that two of them are given up when ten are over; or for ever.
    for then_gbit in [0.5, 0.0] {
        let fleet = fleet(then_gbit);
        let input = Length { mean: 3000.0, sigma: 0.3, least: 1000, most: 6000 };
        let output = Length { mean: 60.0, sigma: 0.3, least: 10, most: 200 };
        let requests = Generator::new(vec![Shape::single(input, output)], 30.0, 64, 9);
        let production = Production::new(&fleet, 64, "adaptive", Speeds::Learned).expect("a policy");
        let mut placer = watched(production);
        let report = run(&fleet, 64, &mut First::new(requests, 15_000), &mut placer).report;
        let handed_off = |from: f64, to: f64| {
            let within = |at: Nanos| (from..to).contains(&seconds(at));
            let plans: Vec<&Plan> =
                placer.placed.iter().filter(|(at, _)| within(*at)).map(|(_, plan)| plan).collect();
            let handoffs = plans.iter().filter(|plan| matches!(plan, Plan::Disaggregated { .. })).count();
            handoffs as f64 / plans.len() as f64
        };
        assert_eq!(report.unfinished, 0);
        assert!(handed_off(0.0, 3.0) < 0.5, "before the planner has seen enough");
        assert!(handed_off(100.0, SLOW_SECONDS) > 0.99);
        // Transfers that were given up are learnt from: nearly nobody's is tried any more.
        assert!(handed_off(SLOW_SECONDS + 60.0, 500.0) < 0.005);
        assert!(report.refused < 450 && report.failed_transfers < 150, "{report:?}");
    }
}
