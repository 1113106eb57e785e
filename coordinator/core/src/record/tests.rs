use proptest::prelude::*;

use super::*;
use crate::placement::POLICIES;
use crate::placement::random_fleet::{self, Case};

fn record(case: &Case, policy: &dyn Policy) -> Record {
    let mut decider = Decider::new();
    let request = case.request();
    let decision = decider.decide_with(policy, &case.fleet, &case.loads, &request);
    let mut recent = Recent::new(2);
    for _ in 0..3 {
        recent.keep(policy, &case.fleet, &request, &decider, decision.as_ref());
    }
    assert_eq!(recent.len(), 2);
    recent.records().last().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_record_goes_through_json_and_replays_to_the_bit(case in random_fleet::case(), at in 0..POLICIES.len()) {
        let record = record(&case, POLICIES[at]);
        let read = Record::parse(&record.to_json()).unwrap();
        prop_assert_eq!(&read, &record);
        prop_assert_eq!(replay(&read), Ok(()));
    }

    #[test]
    fn one_bit_off_is_found(case in random_fleet::case()) {
        let mut record = record(&case, &placement::Adaptive);
        let Some(outcome) = &mut record.outcome else { return Ok(()) };
        outcome.seconds = f64::from_bits(outcome.seconds.to_bits() ^ 1);
        let Err(ReplayError::Difference(difference)) = replay(&record) else { panic!("not found") };
        prop_assert_eq!(difference.field, "outcome.seconds");
    }
}

#[test]
fn a_broken_record_is_told_by_its_field() {
    let case = random_fleet::fixed();
    let text = record(&case, &placement::Adaptive).to_json();
    let error = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} in {text}");
        Record::parse(&text.replacen(from, to, 1)).unwrap_err()
    };
    assert_eq!(error("\"block_size\":16", "\"block_size\":\"x\"").field, "inputs.engines[0].block_size");
    assert_eq!(error("\"block_size\":16", "\"block_size\":0").field, "inputs.engines[0].block_size");
    assert_eq!(error("\"policy\":\"adaptive\"", "\"policy\":\"clever\"").field, "inputs.policy");
    assert_eq!(error(&format!("\"version\":{VERSION}"), "\"version\":99").field, "version");
    assert!(error("\"seed\":", "\"seeds\":").problem.contains("unknown field `seeds`"));
    assert!(Record::parse("").is_err() && Record::parse("[]").is_err());
    assert!(Record::parse(&format!("{text} {text}")).is_err());
}
