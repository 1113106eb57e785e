use super::testing::{engine, fleet, request, with};
use super::*;
use crate::cost::Term;
use crate::fleet::{EngineInfo, Role};
use crate::kv_index::{Overlap, Slot};

fn holding(of: &[(u32, u32)]) -> Overlaps {
    of.iter().map(|(slot, n)| (Slot(*slot), Overlap { blocks: *n, gpu_blocks: *n })).collect()
}

#[test]
fn an_idle_fleet_keeps_a_request_where_its_prefix_is() {
    let overlaps = holding(&[(2, 100)]);
    let decision = decide(&Adaptive, &fleet(4), &request(&overlaps)).unwrap();
    assert_eq!(decision.plan(), Plan::Colocated { engine: 2 });
    assert_eq!(decision.chosen().hit_tokens, 1600);
    assert_eq!(decision.options().len(), 4 + 12);
}

#[test]
fn equal_costs_go_to_the_first_name_and_to_one_engine() {
    let overlaps = Overlaps::default();
    let decision = decide(&Adaptive, &fleet(4), &request(&overlaps)).unwrap();
    assert_eq!(decision.plan(), Plan::Colocated { engine: 0 });
    assert_eq!(decision.passed(1), Some(Passed::Tie));
}

#[test]
fn a_long_prefill_is_split_off_where_many_sequences_decode() {
    let mut decoder = with(engine(0), |info| info.role = Role::Decode);
    decoder.reserved.sequences = 30;
    let prefiller = with(engine(1), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![decoder, prefiller], Default::default());
    let overlaps = Overlaps::default();
    let decision = decide(&Adaptive, &fleet, &request(&overlaps)).unwrap();
    assert_eq!(decision.plan(), Plan::Disaggregated { prefill: 1, decode: 0 });
    assert!(matches!(decision.passed(1), Some(Passed::Slower { mostly: Term::DecodeStall, .. })));
    let tiny = Request { prompt_tokens: 3, ..request(&overlaps) };
    assert_eq!(decide(&Adaptive, &fleet, &tiny).unwrap().plan(), Plan::Colocated { engine: 0 });
}

#[test]
fn policies_take_their_mode_and_fall_back_where_it_is_impossible() {
    let overlaps = Overlaps::default();
    let two = fleet(2);
    let pair = decide(&Disaggregated, &two, &request(&overlaps)).unwrap();
    assert_eq!(pair.plan(), Plan::Disaggregated { prefill: 0, decode: 1 });
    assert_eq!(decide(&Colocated, &two, &request(&overlaps)).unwrap().plan().mode(), "colocated");
    let whole = Request { splittable: Err("echo"), ..request(&overlaps) };
    assert_eq!(decide(&Disaggregated, &two, &whole).unwrap().plan().mode(), "colocated");
    assert_eq!(decide(&Disaggregated, &fleet(1), &request(&overlaps)).unwrap().plan().mode(), "colocated");
}

#[test]
fn a_pair_needs_transfer_roles_and_equal_layouts() {
    let overlaps = Overlaps::default();
    let pairs_of = |changed: Engine| {
        let fleet = Fleet::new(vec![engine(0), changed], Default::default());
        let decision = decide(&Disaggregated, &fleet, &request(&overlaps)).unwrap();
        decision.options().filter(|option| option.plan.mode() == "disaggregated").count()
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
fn a_prefill_engine_serves_whole_requests_only_where_no_other_is_left() {
    let overlaps = Overlaps::default();
    let prefiller = with(engine(0), |info| info.role = Role::Prefill);
    let fleet = Fleet::new(vec![prefiller, engine(1)], Default::default());
    let taken = decide(&Colocated, &fleet, &request(&overlaps)).unwrap();
    assert_eq!(taken.plan(), Plan::Colocated { engine: 1 });
    let avoid = ["e0001".parse().unwrap()];
    let last = Request { avoid: &avoid, ..request(&overlaps) };
    assert_eq!(decide(&Colocated, &fleet, &last).unwrap().plan(), Plan::Colocated { engine: 0 });
    assert_eq!(skipped(&fleet, &last), [("e0001".parse().unwrap(), Skipped::Failed)]);
}

#[test]
fn without_an_engine_there_is_no_decision() {
    let overlaps = Overlaps::default();
    let other = Request { model: "other", ..request(&overlaps) };
    assert!(decide(&Adaptive, &fleet(3), &other).is_none());
    assert_eq!(skipped(&fleet(1), &other), [("e0000".parse().unwrap(), Skipped::OtherModel)]);
}

#[test]
fn an_explanation_names_terms_and_reasons() {
    let overlaps = holding(&[(1, 10)]);
    let fleet = fleet(2);
    let decision = decide(&Colocated, &fleet, &request(&overlaps)).unwrap();
    let explanation = decision.explain(&fleet, 2);
    assert_eq!(explanation.options[0].decode.as_str(), "e0001");
    assert_eq!(explanation.options[0].why_not, None);
    assert!(explanation.options[0].terms_ms.iter().any(|(name, ms)| *name == "prefill" && *ms > 0.0));
    assert!(explanation.options[1].why_not.as_deref().unwrap().ends_with("mostly prefill"));
    assert_eq!(explanation.options_left_out, 2);
}

#[test]
fn a_large_fleet_prices_a_bounded_number_of_pairs() {
    let overlaps = holding(&[(200, 100)]);
    let decision = decide(&Disaggregated, &fleet(300), &request(&overlaps)).unwrap();
    assert!(decision.options().len() <= 300 + PAIR_CANDIDATES * PAIR_CANDIDATES);
    assert_eq!(decision.plan().prefill(), 200, "the holder of the prefix is among the candidates");
}
