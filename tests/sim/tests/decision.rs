//! The coordinator's decision in the simulator.

use baton_sim::decision::{Production, Speeds};
use baton_sim::fleet::Fleet;
use baton_sim::sim::{Report, run};
use baton_sim::trace::{First, Generator, Shape};

fn fleet() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

fn report(fleet: &Fleet, policy: &str, speeds: Speeds, rate: f64) -> Report {
    let mut source = First::new(Generator::new(Shape::mix(), rate, 64, 9), 1500);
    let mut placer = Production::new(fleet, 64, policy, speeds).expect("a policy");
    run(fleet, 64, &mut source, &mut placer).report
}

#[test]
fn every_policy_serves_nearly_everyone_and_the_same_way_twice() {
    let policies = baton_coordinator_core::placement::POLICIES;
    for policy in policies.map(|policy| policy.name()) {
        let json = |report: &Report| serde_json::to_string(report).expect("a report is JSON");
        let first = report(&fleet(), policy, Speeds::Learned, 1.0);
        // One sends requests to engines where they come late: some wait, and are turned away.
        let ended = first.finished + first.refused + first.lost_turns;
        assert_eq!((ended, first.expired_holds), (1500, 0), "{policy}");
        assert!(first.finished > if policy == "longest_prefix" { 1400 } else { 1490 }, "{policy}");
        assert_eq!(json(&first), json(&report(&fleet(), policy, Speeds::Learned, 1.0)), "{policy}");
    }
    assert!(
        Production::new(&fleet(), 64, "best", Speeds::Known)
            .is_err_and(|error| error.to_string().contains("adaptive"))
    );
}

#[test]
fn it_finds_what_engines_hold() {
    let adaptive = report(&fleet(), "adaptive", Speeds::Known, 1.0);
    let blind = report(&fleet(), "round_robin", Speeds::Known, 1.0);
    assert!(adaptive.hit_rate > blind.hit_rate + 0.1, "{} {}", adaptive.hit_rate, blind.hit_rate);
    assert!(adaptive.ttft_ms.mean < blind.ttft_ms.mean, "{} {}", adaptive.ttft_ms.mean, blind.ttft_ms.mean);
}

#[test]
fn static_policies_do_what_they_are_called() {
    let split = fleet().with_split("4P4D".parse().expect("a split")).expect("eight engines");
    let disaggregated = report(&split, "disaggregated", Speeds::Known, 1.0);
    assert!(disaggregated.plans.disaggregated > 1400, "{:?}", disaggregated.plans);
    assert!(disaggregated.bytes_moved > 0);
    let colocated = report(&fleet(), "colocated", Speeds::Known, 1.0);
    assert_eq!((colocated.plans.colocated, colocated.bytes_moved), (1500, 0));
}
