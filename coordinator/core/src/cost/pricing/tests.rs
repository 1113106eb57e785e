use super::*;
use crate::links::Links;
use crate::load::LinkLoad;
use crate::placement::testing::{engine, fleet, with};

fn pricing<'a>(fleet: &'a Fleet, loads: &'a Loads, held: &'a [u32], prompt_tokens: u64) -> Pricing<'a> {
    Pricing::new(fleet, loads, held, prompt_tokens, (128.0, Some(11)), Slo::default())
}

fn idle(engines: usize) -> Loads {
    Loads::new(vec![Reserved::default(); engines], Vec::new())
}

fn sum_is_total(priced: &Priced) {
    assert!((priced.terms.total() / priced.seconds - 1.0).abs() < 1e-12, "{priced:?}");
}

#[test]
fn an_engine_always_computes_the_last_token() {
    let (fleet, loads) = (fleet(1), idle(1));
    let hit = |prompt_tokens| pricing(&fleet, &loads, &[4], prompt_tokens).hit_tokens(0);
    assert_eq!([hit(64), hit(65), hit(1000), hit(0)], [48, 64, 64, 0]);
}

#[test]
fn a_handoff_moves_only_what_the_decode_engine_lacks() {
    let (fleet, loads) = (fleet(2), idle(2));
    let priced =
        pricing(&fleet, &loads, &[10, 30], 1000).price(Plan::Disaggregated { prefill: 0, decode: 1 });
    assert_eq!((priced.hit_tokens, priced.uncached_tokens), (160, 840));
    assert_eq!(priced.transfer_bytes, (63 - 30) * fleet.engines()[0].info.block_bytes);
    sum_is_total(&priced);
    let own = [Term::Prefill, Term::Transfer, Term::FirstStep].map(|term| priced.terms.get(term));
    assert!((own.iter().sum::<f64>() - priced.ttft_seconds).abs() < 1e-12);
}

#[test]
fn a_block_is_priced_as_it_travels_to_who_pulls_it() {
    let on = |n, host: &str, block, wire| {
        with(engine(n), |info| {
            (info.host, info.block_bytes, info.wire_block_bytes) = (host.into(), block, wire);
            info.can_pull_cached = true;
        })
    };
    // The last one has every head on two ranks, each of which pulls its own.
    let engines =
        vec![on(0, "a", 1000, 510), on(1, "a", 1000, 1000), on(2, "b", 1000, 1000), on(3, "b", 2000, 1020)];
    let (fleet, loads) = (Fleet::new(engines, Links::default()), idle(4));
    let pricing = pricing(&fleet, &loads, &[0, 10, 0, 0], 161);
    for (from, to, block) in
        [(1, 0, 1000), (2, 0, 510), (0, 1, 1000), (2, 1, 1000), (3, 2, 1000), (2, 3, 2000), (0, 3, 1020)]
    {
        let blocks = 11 - u64::from(pricing.held[to as usize]);
        assert_eq!(pricing.handoff_bytes(from, to), blocks * block, "{from} to {to}");
        let least = pricing.moving(to, 0.0);
        assert!(least.bytes <= (blocks * block) as f64);
        let way = pricing.transfer(from, to, blocks * block);
        assert!(least.least <= way.wait + way.transfer, "{from} to {to}");
    }
    assert_eq!(pricing.pulled(1, 0), Some((160, 10 * 1000)));
    assert_eq!(pricing.pulled(1, 3), Some((160, 10 * 1020)));
}

#[test]
fn queue_stall_and_steps_are_what_the_table_says() {
    let mut slow = engine(0);
    slow.speed = crate::speed::Speed {
        request_seconds: 0.0,
        token_seconds: 1e-3,
        attention_seconds: 0.0,
        step_seconds: 0.01,
        sequence_seconds: 0.001,
        context_seconds: 1e-6,
    };
    let fleet = Fleet::new(vec![slow], Links::default());
    let reserved = Reserved {
        prefill_seconds: 1.0,
        prefills: 2,
        sequences: 3,
        context_tokens: 3000,
        ..Reserved::default()
    };
    let loads = Loads::new(vec![reserved], Vec::new());
    let priced = pricing(&fleet, &loads, &[0], 4000).price(Plan::Colocated { engine: 0 });
    let near = |term, seconds: f64| {
        let got = priced.terms.get(term);
        assert!((got - seconds).abs() < 1e-9, "{term:?}: {got}");
    };
    near(Term::QueueWait, 0.75);
    near(Term::Prefill, 4.0);
    near(Term::MixedSteps, 2.0 * (0.003 + 0.003));
    near(Term::DecodeStall, 3.0 * (4.0 - 2.0 * 0.01));
    near(Term::Decode, 10.0 * (0.01 + 0.004 + (3000.0 + 4005.5) * 1e-6));
    near(Term::DecodeBatch, 3.0 * 10.0 * (0.001 + 4005.5e-6));
    near(Term::Transfer, 0.0);
    sum_is_total(&priced);
}

#[test]
fn a_full_cache_makes_wait_until_sequences_end() {
    let mut full = with(engine(0), |info| info.num_blocks = 10_000 / 16);
    full.kv_beyond = 1000.0;
    let fleet = Fleet::new(vec![full, engine(1)], Links::default());
    let reserved = Reserved { sequences: 4, context_tokens: 7000, ..Reserved::default() };
    let loads = Loads::new(vec![reserved; 2], Vec::new());
    let priced = |engine, prompt_tokens| {
        let priced = pricing(&fleet, &loads, &[0, 0], prompt_tokens).price(Plan::Colocated { engine });
        sum_is_total(&priced);
        priced
    };
    assert_eq!(priced(0, 1000).terms.get(Term::RoomWait), 0.0);
    assert_eq!(priced(1, 100_000).terms.get(Term::RoomWait), 0.0, "it is not known what the cache takes");
    // A quarter of 8,000 tokens is too much: that goes when a quarter of what the others still have to say is said.
    let over = priced(0, 3000);
    let wait = over.terms.get(Term::RoomWait);
    assert!((wait - 0.25 * 128.0 * over.itl_seconds).abs() < 1e-9, "{wait}");
    let own = [Term::MixedSteps, Term::Prefill, Term::RoomWait].map(|term| over.terms.get(term));
    assert!((own.iter().sum::<f64>() - over.ttft_seconds).abs() < 1e-12);
    let to = |decode| {
        pricing(&fleet, &loads, &[0, 0], 3000).price(Plan::Disaggregated { prefill: 1 - decode, decode })
    };
    assert_eq!(to(0).terms.get(Term::RoomWait), wait);
    assert_eq!(to(1).terms.get(Term::RoomWait), 0.0);
    sum_is_total(&to(0));
}

#[test]
fn a_second_copy_is_charged_for_those_to_come() {
    let (fleet, loads) = (fleet(2), idle(2));
    let mut pricing = pricing(&fleet, &loads, &[0, 10], 3000);
    let charged = |pricing: &Pricing<'_>, engine| {
        let priced = pricing.price(Plan::Colocated { engine });
        sum_is_total(&priced);
        (priced.terms.get(Term::SecondCopy), priced.ttft_seconds)
    };
    let (nothing, ttft) = charged(&pricing, 0);
    assert_eq!(nothing, 0.0);
    pricing.longest_hit = 160;
    assert_eq!(charged(&pricing, 1).0, 0.0);
    let speed = &fleet.engines()[0].speed;
    let lost = speed.prefill_seconds(3000, 0) - speed.prefill_seconds(2840, 160);
    let (second, same) = charged(&pricing, 0);
    assert!((second - SHARERS * lost).abs() < 1e-12);
    assert_eq!(same, ttft, "the request itself does not wait for it");
    let mut long = Pricing::new(&fleet, &loads, &[0, 6000], 100_000, (128.0, Some(11)), Slo::default());
    long.longest_hit = 96_000;
    assert_eq!(charged(&long, 0).0, MOST_SECOND_COPY_SECONDS);
}

#[test]
fn what_a_copy_displaces_is_charged_by_how_much_is_found_again_and_by_who_waits() {
    let charged = |reused: f64, reserved: Reserved, slo: Slo, plan: Plan| {
        let of = |n| {
            let engine = with(engine(n), |info| info.can_pull_cached = true);
            crate::fleet::Engine { reused: Some(reused), ..engine }
        };
        let fleet = Fleet::new(vec![of(0), of(1)], Links::default());
        let loads = Loads::new(vec![Reserved::default(), reserved], Vec::new());
        let held = [1000, 10];
        let pricing = Pricing::new(&fleet, &loads, &held, 20_000, (100.0, None), slo);
        let priced = pricing.price(plan);
        sum_is_total(&priced);
        priced.terms.get(Term::SecondCopy)
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    let (pull, handoff) =
        (Plan::Pull { source: 0, engine: 1 }, Plan::Disaggregated { prefill: 0, decode: 1 });
    let (idle, free) = (Reserved::default(), Slo::default());
    let token = engine(0).speed.token_seconds;
    for (plan, tokens) in [(pull, 990.0 * 16.0), (handoff, 1240.0 * 16.0)] {
        near(charged(0.0, idle, free, plan), 0.0);
        near(charged(0.5, idle, free, plan), 0.5 * tokens * token);
        let busy = Reserved { sequences: 3, context_tokens: 3000, prefills: 2, ..idle };
        near(charged(0.5, busy, free, plan), 6.0 * 0.5 * tokens * token);
        // Three that are as likely late as not without it, more likely with it.
        let itl = engine(0).speed.decode_step_seconds(3.0, 3000.0);
        let slo = Slo { itl_seconds: Some(itl), ..free };
        let computing = 1e-4 * tokens * token;
        let risk = 3.0 * 100.0 * itl * (computing / 100.0 / itl / (2.0 * SPREAD));
        near(charged(1e-4, busy, slo, plan), 6.0 * computing + risk);
    }
}

#[test]
fn a_pull_waits_for_the_longer_queue_and_then_for_the_transfer() {
    let pulls = |n| with(engine(n), |info| info.can_pull_cached = true);
    let fleet = Fleet::new(vec![pulls(0), pulls(1)], Links::default());
    let plan = Plan::Pull { source: 0, engine: 1 };
    let price = |source: f64, destination: f64| {
        let reserved = |prefill_seconds: f64| Reserved {
            prefill_seconds,
            prefills: u64::from(prefill_seconds > 0.0),
            ..Reserved::default()
        };
        // Of the one prompt before it half is done.
        let loads = Loads::new(vec![reserved(2.0 * source), reserved(2.0 * destination)], Vec::new());
        let priced = pricing(&fleet, &loads, &[1000, 10], 20_000).price(plan);
        sum_is_total(&priced);
        assert_eq!((priced.hit_tokens, priced.uncached_tokens), (16_000, 4000));
        assert_eq!(priced.transfer_bytes, 990 * 100_000);
        assert!((priced.terms.get(Term::Transfer) - 0.101).abs() < 1e-9);
        (priced.terms.get(Term::QueueWait), priced.terms.get(Term::Hold), priced.ttft_seconds)
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    let step = fleet.engines()[0].speed.prefill_seconds(1, 16_000);
    let (queue, hold, idle) = price(0.0, 0.0);
    near(queue, 0.0);
    near(hold, step);
    for (source, destination, queue, hold) in
        [(4.0, 0.0, 4.0, step), (0.0, 4.0, 4.0, 0.0), (4.0, 4.0 + step / 4.0, 4.0 + step / 4.0, step * 0.75)]
    {
        let got = price(source, destination);
        near(got.0, queue);
        near(got.1, hold);
        near(got.2, idle - step + queue + hold);
    }
    // Beside sequences that decode, the one token shares a step with them.
    let busy = Reserved { sequences: 3, context_tokens: 3000, ..Reserved::default() };
    let loads = Loads::new(vec![busy, Reserved::default()], Vec::new());
    let priced = pricing(&fleet, &loads, &[1000, 10], 20_000).price(plan);
    let mixed = fleet.engines()[0].speed.mixed_seconds(3.0, 3000.0);
    near(priced.terms.get(Term::Hold), step + mixed);
    assert_eq!(priced.terms.get(Term::DecodeStall), 0.0);
}

#[test]
fn a_transfer_waits_for_what_other_engines_of_its_hosts_exchange_with_other_hosts() {
    let on = |n, host: &str| with(engine(n), |info| info.host = host.to_owned());
    let fleet =
        Fleet::new(vec![on(0, "a"), on(1, "a"), on(2, "b"), on(3, "b"), on(4, "c")], Links::default());
    let link = LinkLoad { destination: 3, source: 1, bytes: 1_000_000_000 };
    let mut loads = Loads::new(vec![Reserved::default(); 5], vec![link]);
    loads.sum_by_host(&fleet);
    let pricing = pricing(&fleet, &loads, &[0; 5], 1000);
    let wait = |prefill, decode| {
        let priced = pricing.price(Plan::Disaggregated { prefill, decode });
        sum_is_total(&priced);
        let own = pricing.transfer(prefill, decode, 0).wait;
        let terms = priced.terms.get(Term::TransferWait);
        assert!((own - terms).abs() < 1e-9);
        terms
    };
    for (prefill, decode, seconds) in
        [(0, 2, 1.0), (0, 4, 1.0), (4, 2, 1.0), (0, 1, 0.0), (2, 0, 0.0), (4, 0, 0.0)]
    {
        assert!((wait(prefill, decode) - seconds).abs() < 1e-9, "{prefill} to {decode}");
    }
}

#[test]
fn lateness_is_the_requests_own_and_risk_is_a_part_of_what_was_promised() {
    let fleet = fleet(1);
    let reserved = Reserved { sequences: 2, context_tokens: 2000, ..Reserved::default() };
    let loads = Loads::new(vec![reserved], Vec::new());
    let with = |ttft_seconds, itl_seconds| {
        let slo = Slo { ttft_seconds, itl_seconds };
        let pricing = Pricing::new(&fleet, &loads, &[0], 10_000, (128.0, Some(11)), slo);
        let priced = pricing.price(Plan::Colocated { engine: 0 });
        sum_is_total(&priced);
        (priced, priced.terms.get(Term::SloRisk))
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    let (free, nothing) = with(None, None);
    assert_eq!((free.late_seconds, nothing), (0.0, 0.0));
    let (kept, nothing) = with(Some(10.0), Some(1.0));
    assert_eq!((kept.late_seconds, nothing), (0.0, 0.0));

    // Predicted as promised: as likely late as not.
    near(with(Some(free.ttft_seconds), None).1, free.ttft_seconds / 2.0);
    let (late, certain) = with(Some(free.ttft_seconds / 2.0), None);
    near(late.late_seconds, free.ttft_seconds / 2.0);
    near(certain, free.ttft_seconds / 2.0);

    // Ten further tokens are late. Those beside it are more likely so by its prefill, and by its own steps.
    let step = fleet.engines()[0].speed.decode_step_seconds(2.0, 2000.0);
    let stalled = free.terms.get(Term::DecodeStall) / 2.0 / 128.0;
    let slo = step / 0.75;
    let (late, risk) = with(None, Some(slo));
    near(late.late_seconds, 10.0 * (free.itl_seconds - slo).max(0.0));
    let of = |itl: f64| ((itl / slo - 0.75) / 0.5).clamp(0.0, 1.0);
    let added = free.terms.get(Term::DecodeBatch) / 2.0 / 10.0;
    let beside = of(step + stalled) + of(free.itl_seconds) - of(free.itl_seconds - added);
    near(risk, 128.0 * slo * (of(free.itl_seconds) + 2.0 * beside));
}
