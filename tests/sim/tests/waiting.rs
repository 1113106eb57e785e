//! Requests that wait for room, driven by the coordinator's own queue.

mod support;

use std::ops::ControlFlow;

use baton_sim::decision::{Production, Speeds};
use baton_sim::engine::speed::known;
use baton_sim::fleet::{Fleet, Slo};
use baton_sim::sim::{Outcome, Report, Window, run_observed};
use baton_sim::trace::{First, Generator, Length, Shape};
use baton_sim::{MILLISECOND, SECOND, seconds};

fn example() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

/// One engine that takes one request at a time, and promises nothing.
fn narrow() -> Fleet {
    let mut fleet = Fleet { slo: None, ..example() };
    fleet.engines[0].count = 1;
    fleet.control.max_engine_requests = 1;
    fleet
}

fn observe(fleet: &Fleet, policy: &str, rate: f64, shape: Shape, requests: u64) -> (Report, Vec<Outcome>) {
    let mut outcomes = Vec::new();
    let mut source = First::new(Generator::new(vec![shape], rate, 64, 3), requests);
    let mut placer = Production::new(fleet, 64, policy, Speeds::Known).expect("a policy");
    let results = run_observed(fleet, 64, &mut source, &mut placer, Window::ALL, &mut |outcome| {
        outcomes.extend(outcome.copied());
        ControlFlow::Continue(())
    });
    let report = results.report;
    let ended = report.finished + report.refused + report.too_long + report.failed + report.unfinished;
    assert_eq!((report.requests, report.unfinished), (ended, 0));
    outcomes.sort_by_key(|outcome| outcome.number);
    (report, outcomes)
}

fn single() -> Shape {
    Shape::single(Length::fixed(4000), Length::fixed(100))
}

#[test]
fn one_goes_when_the_one_before_it_has_ended() {
    let fleet = narrow();
    let (report, outcomes) = observe(&fleet, "adaptive", 2.0, single(), 40);
    assert_eq!((report.finished, report.refused), (40, 0));
    assert!(report.waited > 10 && report.waited < 40, "{}", report.waited);
    let speed = known("8B", "H100").expect("a row of the table");
    let prefill = speed.prefill_seconds(4000, 0) + fleet.control.dispatch_us / 1e6;
    let decode: f64 = (1..100).map(|token| speed.decode_seconds(1, 4000 + token)).sum();
    // A queue with one server, first come, first served.
    let mut free = 0.0f64;
    for outcome in &outcomes {
        let arrived = seconds(outcome.arrived);
        let ends = free.max(arrived) + prefill + decode;
        assert!((seconds(outcome.arrived + outcome.e2e) - ends).abs() < 1e-5, "{} {ends}", outcome.number);
        free = ends;
    }
}

#[test]
fn nobody_waits_for_longer_than_is_allowed_nor_more_than_may() {
    let mut fleet = narrow();
    fleet.control.longest_wait_ms = 3000;
    let (report, outcomes) = observe(&fleet, "adaptive", 8.0, single(), 200);
    assert!(report.refused > 100 && report.finished > 30, "{} {}", report.refused, report.finished);
    let alone = known("8B", "H100").expect("a row of the table").prefill_seconds(4000, 0);
    let waited = outcomes.iter().map(|outcome| seconds(outcome.ttft) - alone).fold(0.0, f64::max);
    assert!(waited > 2.0 && waited < 3.01, "{waited}");
    // No more than so many at once.
    fleet.control.max_waiting = 2;
    let (few, outcomes) = observe(&fleet, "adaptive", 8.0, single(), 200);
    let waited = outcomes.iter().map(|outcome| seconds(outcome.ttft) - alone).fold(0.0, f64::max);
    assert!(few.refused > report.refused && waited < 2.5, "{} {} {waited}", few.refused, report.refused);
    fleet.control.max_waiting = 0;
    let (none, _) = observe(&fleet, "adaptive", 8.0, single(), 200);
    assert_eq!(none.waited, 0);
    assert!(none.refused > few.refused);
}

#[test]
fn so_many_may_be_there_at_once() {
    let mut fleet = narrow();
    fleet.control.max_engine_requests = 512;
    fleet.control.max_requests = 3;
    let (report, outcomes) = observe(&fleet, "adaptive", 8.0, single(), 200);
    assert_eq!(report.waited, 0);
    assert!(report.refused > 20, "{}", report.refused);
    for outcome in &outcomes {
        let beside = outcomes.iter().filter(|other| {
            (other.arrived..other.arrived + other.e2e).contains(&outcome.arrived)
                && other.number != outcome.number
        });
        assert!(beside.count() < 3);
    }
}

#[test]
fn without_promises_and_limits_nobody_waits() {
    let fleet = Fleet { slo: None, ..example() };
    let (report, _) = observe(&fleet, "adaptive", 40.0, single(), 2000);
    assert_eq!((report.finished, report.waited), (2000, 0));
}

#[test]
fn who_would_come_late_waits_and_is_turned_away_where_that_does_not_change() {
    let promised = |ttft_ms, tpot_ms| Fleet { slo: Some(Slo { ttft_ms, tpot_ms }), ..example() };
    for policy in ["adaptive", "colocated", "round_robin"] {
        // Twice as much as the engines can compute.
        let fleet = promised(1000.0, 1000.0);
        let (report, outcomes) = observe(&fleet, policy, 200.0, single(), 3000);
        assert!(report.refused > 500 && report.waited > report.refused, "{policy}: {}", report.refused);
        // Who was sent on its way came in time, or nearly so, where the policy looks at the time: the prediction is not the future.
        let late = outcomes.iter().filter(|outcome| outcome.ttft > 1500 * MILLISECOND).count();
        assert!(
            policy == "round_robin" || late < outcomes.len() / 20,
            "{policy}: {late} of {}",
            outcomes.len()
        );
        // Without the promise all are served, and late.
        let unbounded = Fleet { slo: None, ..fleet };
        let (all, _) = observe(&unbounded, policy, 200.0, single(), 3000);
        assert_eq!((all.finished, all.waited), (3000, 0), "{policy}");
        assert!(all.ttft_ms.p99 > 2000.0, "{policy}: {}", all.ttft_ms.p99);
    }
    // What no idle engine could do in time is served as well as possible.
    let (report, _) = observe(&promised(10.0, 1000.0), "adaptive", 1.0, single(), 100);
    assert_eq!((report.finished, report.waited), (100, 0));
}

#[test]
fn two_runs_in_which_requests_wait_are_equal_to_the_byte() {
    let json = || {
        let (report, _) = observe(&example(), "adaptive", 4.0, Shape::documents(), 1500);
        assert!(report.waited > 100, "{}", report.waited);
        serde_json::to_string(&report).expect("a report is JSON")
    };
    assert_eq!(json(), json());
}

#[test]
fn a_session_whose_turn_is_turned_away_ends() {
    let mut fleet = narrow();
    fleet.control.longest_wait_ms = 100;
    let shape = Shape { turns: (5, 5), pause_seconds: 0.5, ..Shape::chat() };
    let (report, outcomes) = observe(&fleet, "adaptive", 3.0, shape, 300);
    assert!(report.refused > 50, "{}", report.refused);
    let mut turns = std::collections::BTreeMap::<_, Vec<u32>>::new();
    for outcome in &outcomes {
        turns.entry(outcome.session).or_default().push(outcome.turn);
    }
    // Turns follow each other without a gap, whatever the session's end.
    assert!(turns.values().all(|turns| turns.iter().enumerate().all(|(at, turn)| at as u32 == *turn)));
    assert_eq!(report.requests + report.lost_turns, 300);
    assert!(outcomes.last().is_some_and(|last| last.arrived > SECOND));
}
