//! The decision under random fleets.

use std::sync::Arc;

use baton_coordinator_core::cost::Plan;
use baton_coordinator_core::fleet::{Engine, EngineInfo, Fleet, Role};
use baton_coordinator_core::kv_index::{Overlap, Overlaps, Slot};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::load::Reserved;
use baton_coordinator_core::placement::{Request, decide, policy};
use baton_coordinator_core::speed::Speed;
use baton_proto::Epoch;
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_decision_does_not_depend_on_the_order_of_its_inputs(
        fleet in prop::collection::vec(engine(), 1..8),
        tokens in 0..20_000u64,
        blocks in prop::collection::vec(0..1200u32, 8),
        name in prop_oneof![Just("adaptive"), Just("colocated"), Just("disaggregated")],
        rotation in 0..8usize,
    ) {
        let mut engines = fleet;
        for (i, engine) in engines.iter_mut().enumerate() {
            let info = Arc::make_mut(&mut engine.info);
            info.slot = Slot(i as u32);
            info.id = format!("e{i}").parse().unwrap();
        }
        let overlaps: Overlaps = blocks.iter().enumerate()
            .map(|(slot, n)| (Slot(slot as u32), Overlap { blocks: *n, gpu_blocks: *n }))
            .collect();
        let request = Request {
            model: "m", prompt_tokens: tokens, max_tokens: None, overlaps: &overlaps, splittable: Ok(()), avoid: &[],
        };
        let policy = policy(name).unwrap();
        let ordered = Fleet::new(engines.clone(), Links::default());
        let middle = rotation % engines.len();
        engines.rotate_left(middle);
        let rotated = Fleet::new(engines, Links::default());
        let decision = decide(policy, &ordered, &request);
        prop_assert_eq!(&decision, &decide(policy, &rotated, &request));

        let healthy = ordered.engines().iter().any(|engine| engine.healthy);
        prop_assert_eq!(decision.is_some(), healthy);
        let Some(decision) = decision else { return Ok(()) };
        for option in decision.options() {
            let (prefill, decode) = (option.plan.prefill() as usize, option.plan.decode() as usize);
            let (prefill, decode) = (&ordered.engines()[prefill], &ordered.engines()[decode]);
            prop_assert!(prefill.healthy && decode.healthy);
            prop_assert!(option.terms.total().is_finite());
            prop_assert!(option.hit_tokens <= tokens.saturating_sub(1));
            if let Plan::Disaggregated { .. } = option.plan {
                prop_assert!(prefill.info.id != decode.info.id && prefill.info.layout == decode.info.layout);
                prop_assert!(prefill.can_transfer && decode.can_transfer);
                prop_assert!(prefill.info.role != Role::Decode && decode.info.role != Role::Prefill);
            }
        }
        if name == "adaptive" {
            let least = decision.options().map(|option| option.terms.total()).fold(f64::INFINITY, f64::min);
            prop_assert_eq!(decision.chosen().terms.total(), least);
        }
    }
}

fn engine() -> impl Strategy<Value = Engine> {
    (
        prop_oneof![Just(Role::Both), Just(Role::Prefill), Just(Role::Decode)],
        prop_oneof![Just("a"), Just("b"), Just("")],
        any::<bool>(),
        prop::bool::weighted(0.8),
        0..50_000u64,
        0..64u64,
        1.0..100_000.0f64,
    )
        .prop_map(|(role, layout, can_transfer, healthy, queued, sequences, speed)| Engine {
            info: Arc::new(EngineInfo {
                slot: Slot(0),
                id: "x".parse().unwrap(),
                epoch: Epoch(1),
                models: vec!["m".into()],
                role,
                block_size: 16,
                block_bytes: 1 << 20,
                layout: layout.into(),
            }),
            healthy,
            can_transfer,
            speed: Speed { prefill_tokens_per_second: speed, ..Speed::default() },
            reserved: Reserved { prefill_tokens: queued, prefills: u64::from(queued > 0), sequences },
            foreign_waiting: 0,
            foreign_running: 0,
        })
}
