use std::collections::BTreeSet;

use proptest::prelude::*;

use super::random_fleet::{self, Case};
use super::testing::{engine, fleet, request, with};
use super::*;
use crate::cost::{Key, Plan, Pricing, Term};
use crate::fleet::{Engine, EngineInfo, Role};
use crate::kv_index::Overlap;
use crate::links::Links;
use crate::load::{Loads, Reserved};

fn holding(of: &[(u32, u32)]) -> Overlaps {
    of.iter().map(|(slot, n)| (Slot(*slot), Overlap { blocks: *n, gpu_blocks: *n })).collect()
}

fn decide(policy: &dyn Policy, fleet: &Fleet, request: &Request<'_>) -> Option<Decision> {
    Decider::new().decide(policy, fleet, request)
}

fn decide_loaded(policy: &dyn Policy, fleet: &Fleet, loads: &[Reserved], request: &Request<'_>) -> Decision {
    let loads = Loads::new(loads.to_vec(), Vec::new());
    Decider::new().decide_with(policy, fleet, &loads, request).unwrap()
}

fn explain(policy: &dyn Policy, fleet: &Fleet, request: &Request<'_>, limit: usize) -> Explanation {
    let mut decider = Decider::new();
    let decision = decider.decide(policy, fleet, request).unwrap();
    decider.explain(policy, fleet, request, &decision, limit)
}

#[test]
fn an_idle_fleet_keeps_a_request_where_its_prefix_is() {
    let overlaps = holding(&[(2, 100)]);
    let decision = decide(&Adaptive, &fleet(4), &request(&overlaps)).unwrap();
    assert_eq!(decision.plan(), Plan::Colocated { engine: 2 });
    assert_eq!(decision.chosen.hit_tokens, 1600);
    assert!(decision.alone && decision.meets_slo() && !decision.fell_back);
    assert_eq!(explain(&Adaptive, &fleet(4), &request(&overlaps), usize::MAX).options.len(), 4 + 12);
}

#[test]
fn equal_costs_go_to_one_engine_the_home_or_the_first_name() {
    let overlaps = Overlaps::default();
    let fleet = fleet(4);
    let plain = request(&overlaps);
    assert_eq!(decide(&Adaptive, &fleet, &plain).unwrap().plan(), Plan::Colocated { engine: 0 });
    let why = explain(&Adaptive, &fleet, &plain, 2).options[1].why_not.clone();
    assert_eq!(why.as_deref(), Some("equal cost; settled by mode, home and name"));
    let home = |key| {
        let request = Request { fresh_key: Some(key), ..plain };
        decide(&Adaptive, &fleet, &request).unwrap().plan().decode()
    };
    assert!((0..50).all(|key| home(key) == fleet.ring().candidates(key)[0]));
    assert_eq!((0..50).map(home).collect::<BTreeSet<_>>().len(), 4);
}

#[test]
fn a_long_prefill_is_split_off_where_many_sequences_decode() {
    let decoder = with(engine(0), |info| info.role = Role::Decode);
    let prefiller = with(engine(1), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![decoder, prefiller], Links::default());
    let overlaps = Overlaps::default();
    let busy = Reserved { sequences: 30, context_tokens: 30_000, ..Reserved::default() };
    let loads = [busy, Reserved::default()];
    let decision = decide_loaded(&Adaptive, &fleet, &loads, &request(&overlaps));
    assert_eq!(decision.plan(), Plan::Disaggregated { prefill: 1, decode: 0 });
    let tiny = Request { prompt_tokens: 3, ..request(&overlaps) };
    let decision = decide_loaded(&Adaptive, &fleet, &loads, &tiny);
    assert_eq!(decision.plan(), Plan::Colocated { engine: 0 });
}

#[test]
fn an_itl_slo_moves_a_prefill_away_that_seconds_alone_would_not() {
    // Two sequences decode; a slow link makes the handoff dearer than their stall.
    let mut links = Links::default();
    links.observe(0.0, (Slot(1), Slot(0)), 1 << 30, (1u64 << 30) as f64 / 3e7, 1e-4);
    let decoder = with(engine(0), |info| info.role = Role::Decode);
    let prefiller = with(engine(1), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![decoder, prefiller], links);
    let overlaps = Overlaps::default();
    let busy = Reserved { sequences: 2, context_tokens: 2000, ..Reserved::default() };
    let place = |slo| {
        let request = Request { prompt_tokens: 8000, slo, ..request(&overlaps) };
        decide_loaded(&Adaptive, &fleet, &[busy, Reserved::default()], &request)
    };
    assert_eq!(place(Slo::default()).plan().mode(), "colocated");
    let itl = Slo { ttft_seconds: None, itl_seconds: Some(0.015) };
    let decision = place(itl);
    assert_eq!(decision.plan().mode(), "disaggregated");
    assert!(decision.meets_slo());
    // With a first token wanted at once as well, nothing meets both, and that is said.
    let both = Slo { ttft_seconds: Some(0.2), itl_seconds: Some(0.015) };
    let decision = place(both);
    assert!(!decision.meets_slo());
    let mut decider = Decider::new();
    let request = Request { prompt_tokens: 8000, slo: both, ..request(&overlaps) };
    let loads = Loads::new(vec![busy, Reserved::default()], Vec::new());
    let decision = decider.decide_with(&Adaptive, &fleet, &loads, &request).unwrap();
    let explanation = decider.explain(&Adaptive, &fleet, &request, &decision, 9);
    assert!(explanation.notes[0].starts_with("predicted to miss its SLOs by"), "{explanation:?}");
    assert!(explanation.options[0].terms_ms.iter().any(|(name, _)| *name == "slo_risk"));
}

#[test]
fn answers_are_as_long_as_those_of_all_engines_of_the_model() {
    let of = |n, model: &str, answer_tokens| {
        let engine = with(engine(n), |info| info.models = vec![model.to_owned()]);
        Engine { answer_tokens, ..engine }
    };
    let engines = vec![of(0, "m", Some(100.0)), of(1, "m", Some(300.0)), of(2, "m", None), of(3, "x", None)];
    let fleet = Fleet::new(engines, Links::default());
    let tokens: Vec<f64> = fleet.hot().iter().map(|hot| hot.answer_tokens).collect();
    assert_eq!(tokens, [200.0, 200.0, 200.0, crate::cost::EXPECTED_OUTPUT_TOKENS]);
    let overlaps = Overlaps::default();
    let decode = |max_tokens| {
        let chosen =
            decide(&Colocated, &fleet, &Request { max_tokens, ..request(&overlaps) }).unwrap().chosen;
        chosen.terms.get(Term::Decode) / chosen.itl_seconds
    };
    // Tokens after the first: no more than it may have, and no more than is usual.
    assert!((decode(None) - 199.0).abs() < 1e-9);
    assert!((decode(Some(10)) - 9.0).abs() < 1e-9);
    assert!((decode(Some(5000)) - 199.0).abs() < 1e-9);
}

#[test]
fn policies_take_their_mode_and_fall_back_where_it_is_impossible() {
    let overlaps = Overlaps::default();
    let two = fleet(2);
    let pair = decide(&Disaggregated, &two, &request(&overlaps)).unwrap();
    assert_eq!(pair.plan(), Plan::Disaggregated { prefill: 0, decode: 1 });
    assert_eq!(decide(&Colocated, &two, &request(&overlaps)).unwrap().plan().mode(), "colocated");
    let whole = Request { splittable: Err("echo"), ..request(&overlaps) };
    let fallen = decide(&Disaggregated, &two, &whole).unwrap();
    assert_eq!((fallen.plan().mode(), fallen.fell_back), ("colocated", true));
    assert_eq!(decide(&Disaggregated, &fleet(1), &request(&overlaps)).unwrap().plan().mode(), "colocated");
}

#[test]
fn a_pair_needs_transfer_roles_and_equal_layouts() {
    let overlaps = Overlaps::default();
    let pairs_of = |changed: Engine| {
        let fleet = Fleet::new(vec![engine(0), changed], Links::default());
        let explanation = explain(&Disaggregated, &fleet, &request(&overlaps), usize::MAX);
        explanation.options.iter().filter(|option| option.mode == "disaggregated").count()
    };
    let pairs = |change: fn(&mut EngineInfo)| pairs_of(with(engine(1), change));
    assert_eq!(pairs(|_| ()), 2);
    assert_eq!(pairs(|info| info.role = Role::Decode), 1);
    assert_eq!(pairs_of(Engine { can_transfer: false, ..engine(1) }), 0);
    assert_eq!(pairs(|info| info.layout = "other".into()), 0);
    assert_eq!(pairs(|info| info.layout = String::new()), 0);
    assert_eq!(pairs_of(Engine { healthy: false, ..engine(1) }), 0);
    assert_eq!(pairs(|info| info.models = vec!["n".into()]), 0);
}

#[test]
fn a_prefix_is_pulled_only_between_engines_that_can() {
    let overlaps = holding(&[(0, 1800)]);
    let busy = Reserved { sequences: 30, context_tokens: 30_000, ..Reserved::default() };
    let place = |can: bool, splittable, source| {
        let pulls = |n| with(engine(n), |info| info.can_pull_cached = can);
        let fleet = Fleet::new(vec![pulls(0), pulls(1)], Links::default());
        let request = Request { prompt_tokens: 30_000, splittable, ..request(&overlaps) };
        decide_loaded(&Adaptive, &fleet, &[source, Reserved::default()], &request)
    };
    assert_eq!(place(false, Ok(()), busy).plan(), Plan::Colocated { engine: 1 });
    assert_eq!(place(true, Err("echo"), busy).plan(), Plan::Colocated { engine: 1 });
    let pulled = place(true, Ok(()), busy);
    assert_eq!(pulled.plan(), Plan::Pull { source: 0, engine: 1 });
    assert_eq!((pulled.chosen.hit_tokens, pulled.chosen.transfer_bytes), (28_800, 180_000_000));
    // The source holds it only when its own queue comes to that: till then the other one has computed it.
    let queued = Reserved { prefill_seconds: 9.0, prefills: 9, ..busy };
    assert_eq!(place(true, Ok(()), queued).plan(), Plan::Colocated { engine: 1 });
}

#[test]
fn a_later_turn_is_appended_on_the_decode_engine() {
    let overlaps = holding(&[(0, 180)]);
    let decoder = with(engine(0), |info| info.role = Role::Decode);
    let prefiller = with(engine(1), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![decoder, prefiller], Links::default());
    let decision = decide(&Adaptive, &fleet, &request(&overlaps)).unwrap();
    assert_eq!(decision.plan(), Plan::Append { engine: 0 });
    assert_eq!(decision.chosen.uncached_tokens, 120);
}

#[test]
fn a_prefill_engine_serves_whole_requests_only_where_no_other_is_left() {
    let overlaps = Overlaps::default();
    let prefiller = with(engine(0), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![prefiller, engine(1)], Links::default());
    let taken = decide(&Colocated, &fleet, &request(&overlaps)).unwrap();
    assert_eq!(taken.plan(), Plan::Colocated { engine: 1 });
    let avoid = ["e0001".parse().unwrap()];
    let last = Request { avoid: &avoid, ..request(&overlaps) };
    assert_eq!(decide(&Colocated, &fleet, &last).unwrap().plan(), Plan::Colocated { engine: 0 });
    assert_eq!(skipped(&fleet, &last), [("e0001".parse().unwrap(), Skipped::Failed)]);
}

#[test]
fn an_engine_that_only_decodes_computes_what_would_come_late_otherwise() {
    let part = |n, part| Engine { part: Some(part), ..engine(n) };
    let engines = vec![part(0, Role::Prefill), part(1, Role::Prefill), part(2, Role::DecodeOnly)];
    let fleet = Fleet::new(engines, Links::default());
    let overlaps = Overlaps::default();
    let busy = Reserved { prefills: 4, prefill_seconds: 8.0, ..Reserved::default() };
    let loads = [busy, busy, Reserved::default()];
    let plan = |ttft_seconds| {
        let slo = Slo { ttft_seconds, itl_seconds: None };
        decide_loaded(&Adaptive, &fleet, &loads, &Request { slo, ..request(&overlaps) }).plan()
    };
    let handoff = Plan::Disaggregated { prefill: 0, decode: 2 };
    assert_eq!([plan(None), plan(Some(20.0))], [handoff; 2]);
    assert_eq!(plan(Some(4.0)), Plan::Colocated { engine: 2 });
    // The one that computes prompts is told apart from those that would be better but only decode.
    let request = Request { slo: Slo { ttft_seconds: Some(20.0), itl_seconds: None }, ..request(&overlaps) };
    let mut decider = Decider::new();
    let decision =
        decider.decide_with(&Adaptive, &fleet, &Loads::new(loads.to_vec(), Vec::new()), &request).unwrap();
    let explanation = decider.explain(&Adaptive, &fleet, &request, &decision, 10);
    let whole = explanation.options.iter().find(|option| option.mode == "colocated").unwrap();
    assert!(whole.why_not.as_ref().unwrap().contains("only decodes"), "{whole:?}");
}

#[test]
fn without_an_engine_there_is_no_decision() {
    let overlaps = Overlaps::default();
    let other = Request { model: "other", ..request(&overlaps) };
    for policy in POLICIES {
        assert!(decide(policy, &fleet(3), &other).is_none());
    }
    assert_eq!(skipped(&fleet(1), &other), [("e0000".parse().unwrap(), Skipped::OtherModel)]);
}

#[test]
fn an_explanation_names_terms_and_reasons() {
    let overlaps = holding(&[(1, 10)]);
    let explanation = explain(&Colocated, &fleet(2), &request(&overlaps), 3);
    assert_eq!(explanation.options[0].decode.as_str(), "e0001");
    assert_eq!(explanation.options[0].why_not, None);
    assert!(explanation.options[0].terms_ms.iter().any(|(name, ms)| *name == "prefill" && *ms > 0.0));
    assert!(explanation.options[1].why_not.as_deref().unwrap().ends_with("mostly second_copy"));
    assert_eq!(explanation.options[2].why_not.as_deref(), Some("the policy never splits a request"));
    assert_eq!(explanation.options_left_out, 1);
}

#[test]
fn turns_draws_and_pins_are_the_requests_own() {
    let overlaps = holding(&[(3, 50), (4, 50), (1, 10)]);
    let fleet = fleet(5);
    let loads: Vec<Reserved> =
        [2, 0, 3, 1, 0].map(|sequences| Reserved { sequences, ..Reserved::default() }).into();
    let at = |policy: &dyn Policy, seed, pinned: Option<u32>| {
        let request = Request { seed, pinned: pinned.map(Slot), ..request(&overlaps) };
        decide_loaded(policy, &fleet, &loads, &request).plan().decode()
    };
    assert_eq!((0..7).map(|seed| at(&RoundRobin, seed, None)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 0, 1]);
    let mut drawn = [0; 5];
    (0..1000).for_each(|seed| drawn[at(&Random, seed, None) as usize] += 1);
    assert!(drawn.iter().all(|n| (150..250).contains(n)), "{drawn:?}");
    let mut drawn = [0; 5];
    (0..1000).for_each(|seed| drawn[at(&PowerOfTwo, seed, None) as usize] += 1);
    // The most loaded of five never wins; the two idlest win 40 % each but where they meet.
    assert_eq!(drawn[2], 0);
    assert!(drawn[1] + drawn[4] > 600, "{drawn:?}");
    assert_eq!(at(&LeastLoaded, 9, None), 1);
    assert_eq!(at(&LongestPrefix, 9, None), 4, "of two that hold as much, the less loaded");
    assert_eq!(at(&SessionSticky, 9, Some(2)), 2);
    assert_ne!(at(&SessionSticky, 9, Some(77)), 2);
}

#[test]
fn a_failed_pin_is_not_held_on_to() {
    let overlaps = holding(&[(0, 10)]);
    let avoid = ["e0002".parse().unwrap()];
    let request = Request { pinned: Some(Slot(2)), avoid: &avoid, ..request(&overlaps) };
    assert_eq!(decide(&SessionSticky, &fleet(3), &request).unwrap().plan().decode(), 0);
}

#[test]
fn the_threshold_keeps_short_and_mostly_cached_prompts() {
    let mode = |prompt_tokens, blocks| {
        let overlaps = holding(&[(0, blocks)]);
        let request = Request { prompt_tokens, ..request(&overlaps) };
        decide(&Threshold, &fleet(2), &request).unwrap().plan().mode()
    };
    assert_eq!(mode(3000, 100), "colocated", "1,400 of 3,000 uncached");
    assert_eq!(mode(1000, 0), "disaggregated", "all of it uncached");
    assert_eq!(mode(6000, 200), "disaggregated", "2,800 uncached");
}

#[test]
fn a_hash_sends_a_prefix_home_until_that_is_full() {
    let overlaps = Overlaps::default();
    let fleet = fleet(6);
    let at = |key, loads: &[Reserved]| {
        let request = Request { prefix_key: Some(key), ..request(&overlaps) };
        decide_loaded(&ConsistentHash, &fleet, loads, &request).plan().decode()
    };
    let mut loads = vec![Reserved { sequences: 4, ..Reserved::default() }; 6];
    let order = fleet.ring().candidates(5).to_vec();
    assert_eq!(at(5, &loads), order[0]);
    loads[order[0] as usize].sequences = 30;
    assert_eq!(at(5, &loads), order[1]);
}

#[test]
fn keys_name_a_prefix_and_what_follows_the_known_part() {
    let hashes: Vec<BlockHash> = (0..100u8).map(|n| BlockHash::from_bytes([n; 16])).collect();
    let of = |n: u8| Some(u64::from_le_bytes([n; 8]));
    assert_eq!(prefix_key(&hashes, 16), of(63));
    assert_eq!(prefix_key(&hashes, 512), of(1));
    assert_eq!(prefix_key(&hashes[..5], 16), of(4));
    assert_eq!(prefix_key(&[], 16), None);
    assert_eq!(fresh_key(&hashes, &holding(&[(0, 7), (1, 30)])), of(30));
    assert_eq!(fresh_key(&hashes, &Overlaps::default()), of(0));
    assert_eq!(fresh_key(&hashes, &holding(&[(1, 100)])), None);
}

/// Every plan that is possible, priced one by one.
fn all_plans(case: &Case, held: &[u32], modes: Modes) -> Vec<(Key, Plan)> {
    let request = case.request();
    let hot = case.fleet.hot();
    let engines = case.fleet.engines();
    let able: Vec<u32> = (0..engines.len() as u32)
        .filter(|at| engines[*at as usize].serves("m") && engines[*at as usize].healthy)
        .collect();
    let output = (able.first().map_or(1.0, |at| hot[*at as usize].answer_tokens), request.max_tokens);
    let mut pricing =
        Pricing::new(&case.fleet, &case.loads, held, request.prompt_tokens, output, request.slo);
    pricing.longest_hit = able.iter().map(|at| pricing.hit_tokens(*at)).max().unwrap_or(0);
    let of = |role: Role| able.iter().copied().filter(move |at| engines[*at as usize].role() == role);
    let mut whole: Vec<u32> = of(Role::Both).chain(of(Role::Decode)).collect();
    let last_resort = whole.is_empty() && of(Role::DecodeOnly).next().is_some();
    if whole.is_empty() && !last_resort {
        whole = able.clone();
    }
    let mut plans = Vec::new();
    if last_resort && modes == Modes::WHOLE {
        plans.extend(of(Role::DecodeOnly).map(|at| pricing.whole_plan(at)));
    }
    if modes.whole {
        plans.extend(whole.iter().map(|at| pricing.whole_plan(*at)));
    }
    let alike = |a: u32, b: u32| {
        let (a, b) = (hot[a as usize].exchange, hot[b as usize].exchange);
        a.is_some() && a == b
    };
    for &a in able.iter().filter(|_| request.prompt_tokens > 0) {
        for &b in able.iter().filter(|b| **b != a && alike(a, **b)) {
            let (first, second) = (&engines[a as usize].info, &engines[b as usize].info);
            let roles = [a, b].map(|at| engines[at as usize].role());
            if modes.pairs && roles[0].prefills() && roles[1].decodes() {
                plans.push(Plan::Disaggregated { prefill: a, decode: b });
            }
            let can = first.can_pull_cached && second.can_pull_cached && whole.contains(&b);
            if modes.pulls && can && pricing.pulled(a, b).is_some() {
                plans.push(Plan::Pull { source: a, engine: b });
            }
        }
    }
    plans
        .into_iter()
        .map(|plan| {
            let priced = pricing.price(plan);
            let key = Key { seconds: priced.seconds, ttft: priced.ttft_seconds };
            (key, plan)
        })
        .collect()
}

fn holds(case: &Case) -> Vec<u32> {
    case.fleet.engines().iter().map(|engine| case.overlaps.of(engine.info.slot).blocks).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn the_search_finds_what_pricing_every_plan_finds(case in random_fleet::case(), at in 0usize..3) {
        let (policy, modes): (&dyn Policy, Modes) = [
            (&Adaptive as &dyn Policy, Modes::ALL),
            (&Disaggregated, Modes::PAIRS),
            (&Colocated, Modes::WHOLE),
        ][at];
        let held = holds(&case);
        // Sources of pulls are limited to those that hold most: compare where that leaves none out.
        let sources = held.iter().filter(|blocks| **blocks > 0).count();
        prop_assume!(!modes.pulls || sources <= PULL_SOURCES);
        let mut all = all_plans(&case, &held, modes);
        if all.is_empty() {
            all = all_plans(&case, &held, Modes::WHOLE);
        }
        let decision = Decider::new().decide_with(policy, &case.fleet, &case.loads, &case.request());
        let least = |all: &[(Key, Plan)]| all.iter().map(|entry| entry.0).min_by(Key::order);
        let late = |key: Key| case.request().slo.ttft_seconds.is_some_and(|slo| key.ttft > slo);
        if modes.whole && least(&all).is_some_and(late) {
            // Engines that only decode give way.
            all.extend(all_plans(&case, &held, Modes::WHOLE));
        }
        let Some(best) = least(&all) else {
            prop_assert!(decision.is_none());
            return Ok(());
        };
        let decision = decision.unwrap();
        prop_assert!(!decision.cut);
        let chosen = &decision.chosen;
        prop_assert!(all.iter().any(|entry| entry.1 == chosen.plan), "{:?} is not possible", chosen.plan);
        // Up to the rounding of sums.
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * (1.0 + a.abs());
        prop_assert!(near(chosen.seconds, best.seconds), "{chosen:?} {best:?}");
        prop_assert!(chosen.terms.iter().all(|(_, seconds)| seconds.is_finite() && seconds >= 0.0));
        prop_assert!(near(chosen.terms.total(), chosen.seconds));
    }

    #[test]
    fn a_decision_does_not_depend_on_the_order_of_its_inputs(case in random_fleet::case(), rotation in 0..12usize) {
        let mut engines = case.fleet.engines().to_vec();
        let middle = rotation.min(engines.len());
        engines.rotate_left(middle);
        let rotated = Fleet::new(engines, case.fleet.links().clone());
        for policy in POLICIES {
            let decide = |fleet| Decider::new().decide_with(policy, fleet, &case.loads, &case.request());
            prop_assert_eq!(decide(&case.fleet), decide(&rotated));
        }
    }

    #[test]
    fn a_used_decider_decides_like_a_new_one(cases in prop::collection::vec(random_fleet::case(), 1..6)) {
        let mut used = Decider::new();
        for case in &cases {
            for policy in POLICIES {
                let again = used.decide_with(policy, &case.fleet, &case.loads, &case.request());
                let fresh = Decider::new().decide_with(policy, &case.fleet, &case.loads, &case.request());
                prop_assert_eq!(&again, &fresh);
                if let Some(decision) = again {
                    let explanation =
                        used.explain(policy, &case.fleet, &case.request(), &decision, usize::MAX);
                    prop_assert_eq!(explanation.options[0].priced, decision.chosen);
                    let tied = |option: &&OptionExplanation| {
                        option.why_not.as_deref() == Some("equal cost; settled by mode, home and name")
                    };
                    let in_order = explanation.options.iter().filter(tied).all(|option| {
                        option.priced.seconds - decision.chosen.seconds > -1e-9
                    });
                    prop_assert!(in_order);
                }
            }
        }
    }
}

#[test]
fn a_large_fleet_prices_a_bounded_number_of_pairs() {
    let overlaps = holding(&[(200, 100)]);
    let decision = decide(&Disaggregated, &fleet(300), &request(&overlaps)).unwrap();
    assert!(decision.priced as usize <= 300 + MAX_PAIRS);
    assert_eq!(decision.plan().prefill(), 200, "the holder of the prefix");
    assert!(decision.chosen.terms.get(Term::Transfer) > 0.0);
}
