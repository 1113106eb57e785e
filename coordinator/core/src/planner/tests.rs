use std::collections::VecDeque;

use baton_proto::BlockHash;
use proptest::prelude::*;

use super::pool::Seen;
use super::prefixes::{Beginnings, Prefixes};
use super::rehearsal::{Member, Play, Rehearsal, Roads};
use super::*;
use crate::links::Links;
use crate::placement::testing::{engine, with};
use crate::speed::Speed;

const SLO: Slo = Slo { ttft_seconds: Some(2.0), itl_seconds: Some(0.02) };

/// Of a prompt of so many blocks, of which the first `shared` are like those of any other.
fn hashes(prompt: u64, blocks: usize, shared: usize) -> Vec<BlockHash> {
    let hash = |at: usize| {
        let whose = if at < shared { 0 } else { prompt + 1 };
        let mut bytes = [0; BlockHash::LEN];
        bytes[..8].copy_from_slice(&whose.to_le_bytes());
        bytes[8..16].copy_from_slice(&(at as u64).to_le_bytes());
        BlockHash::from_bytes(bytes)
    };
    (0..blocks).map(hash).collect()
}

/// Engines of which two share a host, in blocks of 16 tokens.
fn engines(count: u32) -> Vec<Engine> {
    let on_host = |n: u32| {
        with(engine(n), |info| {
            info.host = format!("h{}", n / 2);
            info.num_blocks = 20_000;
        })
    };
    (0..count).map(on_host).collect()
}

fn links(count: u32, bytes_per_second: f64) -> Links {
    let mut links = Links::default();
    for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
        links.observe(0.0, (Slot(from), Slot(to)), 1 << 30, (1u64 << 30) as f64 / bytes_per_second, 1e-4);
    }
    links
}

/// Requests with long prompts and short answers, more of them than engines that do both serve in time.
fn busy(planner: &mut Planner, requests: u64, slo: Slo, kept: bool) {
    for n in 0..requests {
        let placed = Placed {
            now_ms: n * 20,
            model: "m".to_owned(),
            prompt_tokens: 2000,
            beginnings: Beginnings::of(&hashes(n, 125, 0), 16),
            cached: (Slot(0), 0),
            slo,
        };
        planner.placed(n, placed);
        let itl_seconds = if kept { 0.01 } else { 0.05 };
        planner.finished(n, &Finished { tokens: 20, ttft_seconds: 0.3, itl_seconds });
    }
}

#[test]
fn engines_are_split_where_that_keeps_the_slos_and_one_of_each_host_decodes() {
    let fleet = Fleet::new(engines(8), links(8, 2e10));
    let mut planner = Planner::new();
    busy(&mut planner, 400, SLO, false);
    let parts = planner.plan(16_000, &fleet);
    let decoding: Vec<u32> = (0..8).filter(|slot| parts.of(Slot(*slot)) == Some(Role::DecodeOnly)).collect();
    assert!((1..=4).contains(&decoding.len()), "{decoding:?}");
    assert!(decoding.iter().all(|slot| slot % 2 == 0), "not one of each host: {decoding:?}");
    assert_eq!(parts.decoding(), decoding.len());
    let mut given = engines(8);
    parts.give(&mut given);
    let prefills = given.iter().filter(|engine| engine.role() == Role::Prefill).count();
    assert_eq!(prefills, 8 - decoding.len());
    // With nothing new, nothing changes; a model that nobody serves any more is forgotten.
    assert_eq!(planner.plan(17_000, &fleet), parts);
    assert_eq!(planner.plan(18_000, &Fleet::default()), Parts::default());
    assert_eq!(planner.plan(19_000, &fleet), Parts::default());
}

#[test]
fn nothing_is_split_without_need_or_against_an_operator() {
    let plan = |engines: Vec<Engine>, slo, kept| {
        let mut planner = Planner::new();
        busy(&mut planner, 400, slo, kept);
        planner.plan(16_000, &Fleet::new(engines, links(8, 2e10))).decoding()
    };
    assert!(plan(engines(8), SLO, false) > 0);
    assert_eq!(plan(engines(8), SLO, true), 0, "the SLOs are kept");
    assert_eq!(plan(engines(8), Slo::default(), false), 0, "there are none");
    let mut set = engines(8);
    set[7] = with(set[7].clone(), |info| info.role = Role::Prefill);
    assert_eq!(plan(set, SLO, false), 0, "an operator has split them");
    let mut other = engines(8);
    other[7] = with(other[7].clone(), |info| info.layout = "other".into());
    assert_eq!(plan(other, SLO, false), 0, "not all can exchange blocks");
    assert_eq!(plan(engines(1), SLO, false), 0, "there is but one");
}

#[test]
fn an_engine_that_cannot_exchange_blocks_does_both() {
    let mut engines = engines(8);
    engines[2].can_transfer = false;
    engines[3].healthy = false;
    let mut planner = Planner::new();
    busy(&mut planner, 400, SLO, false);
    let parts = planner.plan(16_000, &Fleet::new(engines, links(8, 2e10)));
    assert!(parts.decoding() > 0);
    assert_eq!((parts.of(Slot(2)), parts.of(Slot(3))), (None, None));
}

#[test]
fn all_do_both_again_once_that_is_clearly_better() {
    let fleet = Fleet::new(engines(8), links(8, 2e10));
    let mut planner = Planner::new();
    busy(&mut planner, 400, SLO, false);
    assert!(planner.plan(16_000, &fleet).decoding() > 0);
    // Minutes later the links are slow, and there is little to do.
    for n in 0..900u64 {
        let placed = Placed {
            now_ms: 600_000 + n * 400,
            model: "m".to_owned(),
            prompt_tokens: 2000,
            beginnings: Beginnings::of(&hashes(1000 + n, 125, 0), 16),
            cached: (Slot(0), 0),
            slo: SLO,
        };
        planner.placed(1000 + n, placed);
        planner.finished(1000 + n, &Finished { tokens: 20, ttft_seconds: 10.0, itl_seconds: 0.01 });
    }
    let slow = Fleet::new(engines(8), links(8, 1e6));
    assert_eq!(planner.plan(960_000, &slow).decoding(), 0);
}

#[test]
fn of_many_engines_a_part_is_rehearsed_and_as_large_a_share_decodes() {
    let share = |count: u32| {
        let mut planner = Planner::new();
        for n in 0..800u64 {
            let placed = Placed {
                now_ms: n * 160 / u64::from(count),
                model: "m".to_owned(),
                prompt_tokens: 2000,
                beginnings: Beginnings::of(&hashes(n, 125, 0), 16),
                cached: (Slot(0), 0),
                slo: SLO,
            };
            planner.placed(n, placed);
            planner.finished(n, &Finished { tokens: 20, ttft_seconds: 0.3, itl_seconds: 0.05 });
        }
        let parts = planner.plan(60_000, &Fleet::new(engines(count), links(16, 2e10)));
        parts.decoding() as f64 / f64::from(count)
    };
    let (few, many) = (share(16), share(256));
    assert!(few > 0.0 && (few - many).abs() < 0.1, "{few} of 16, {many} of 256");
}

#[test]
fn a_prompt_is_traced_to_the_last_request_that_began_like_it() {
    let mut prefixes = Prefixes::default();
    let of = |prompt, shared| Beginnings::of(&hashes(prompt, 1000, shared), 16);
    prefixes.insert(0, &of(0, 300));
    prefixes.insert(1, &of(1, 300));
    assert_eq!(prefixes.find(&of(2, 0)), None);
    let (parent, tokens) = prefixes.find(&of(2, 500)).unwrap();
    assert_eq!(parent, 1);
    assert!((3840..=4800).contains(&tokens), "{tokens}");
    let (parent, tokens) = prefixes.find(&of(0, 300)).unwrap();
    assert_eq!(parent, 0);
    assert!(tokens > 12_800);
    prefixes.forget(1, &of(1, 300));
    assert_eq!(prefixes.find(&of(2, 500)), None);
    prefixes.forget(0, &of(0, 300));
    assert_eq!(prefixes.find(&of(0, 300)), None);
    assert_eq!(Beginnings::of(&hashes(0, 0, 0), 16), Beginnings::default());
}

fn members(count: u32, speed: Speed) -> Vec<Member> {
    (0..count)
        .map(|n| Member {
            speed,
            host: n / 2,
            kv_tokens: 1e5,
            token_bytes: 1e5,
            wire_token_bytes: 1e5,
            chunk_tokens: if n % 3 == 0 { 0 } else { 1000 },
        })
        .collect()
}

const ROADS: Roads = Roads { between: 1e9, within: 1e10, round_trips: 2e-4 };

#[test]
fn one_request_at_a_time_takes_what_the_formulas_say() {
    let speed = Speed::default();
    let (prompt, tokens) = (3000.0, 50.0);
    let attained = |slo: Slo, decoding: usize, chunk_tokens: u32, host: u32| {
        let mut members = members(2, speed);
        (members[1].chunk_tokens, members[1].host) = (chunk_tokens, host);
        let window: VecDeque<Seen> =
            (0..10).map(|n| Seen::new(f64::from(n) * 100.0, 3000, 50, slo)).collect();
        let play = Play {
            members: &members,
            slots: &[],
            roads: ROADS,
            window: &window,
            first: 0,
            answer_tokens: 1.0,
        };
        Rehearsal::default().run(&play, decoding, 1.0)
    };
    let ttft = |seconds: f64| Slo { ttft_seconds: Some(seconds), itl_seconds: None };
    let itl = |seconds: f64| Slo { ttft_seconds: None, itl_seconds: Some(seconds) };
    let prefill = speed.prefill_seconds(3000, 0);
    let step = speed.decode_step_seconds(1.0, prompt + tokens / 2.0);
    let handoff =
        |shown: f64| prefill + shown + 2e-4 + speed.request_seconds + speed.decode_step_seconds(0.0, 0.0);
    let (within, between) = (prompt * 1e5 / 1e10, prompt * 1e5 / 1e9);
    for (decoding, chunk, host, first) in [
        (0, 1000, 1, prefill),
        (1, 0, 0, handoff(within)),
        (1, 0, 1, handoff(between)),
        (1, 3000, 1, handoff(between)),
        // A third goes alone; between hosts it takes longer than the prefill of the other two.
        (1, 1000, 0, handoff(within / 3.0)),
        (1, 1000, 1, handoff(between - prefill * 2.0 / 3.0)),
    ] {
        assert_eq!(attained(ttft(first * 1.0001), decoding, chunk, host), 1.0);
        assert_eq!(attained(ttft(first * 0.9999), decoding, chunk, host), 0.0);
        assert_eq!(attained(itl(step * 1.0001), decoding, chunk, host), 1.0);
        assert_eq!(attained(itl(step * 0.9999), decoding, chunk, host), 0.0);
    }
}

#[test]
fn a_cached_beginning_is_found_where_it_was_served_until_the_cache_is_full() {
    let speed = Speed::default();
    let attained = |kv_tokens: f64| {
        let members: Vec<Member> =
            members(1, speed).into_iter().map(|member| Member { kv_tokens, ..member }).collect();
        let cached = speed.prefill_seconds(100, 2900);
        let slo = Slo { ttft_seconds: Some(cached * 1.01), itl_seconds: None };
        // Turns of three sessions in turn.
        let turn = |n: u64| {
            let mut seen = Seen::new(n as f64 * 100.0, 3000, 1, slo);
            seen.parent = n.checked_sub(3).map(|parent| (parent, 2900));
            seen
        };
        let window: VecDeque<Seen> = (0..30).map(turn).collect();
        let play = Play {
            members: &members,
            slots: &[],
            roads: ROADS,
            window: &window,
            first: 0,
            answer_tokens: 1.0,
        };
        Rehearsal::default().run(&play, 0, 1.0)
    };
    assert_eq!(attained(1e5), 1.0);
    assert_eq!(attained(3010.0), 0.0);
}

proptest! {
    #[test]
    fn whatever_comes_all_is_served_and_judged(
        requests in prop::collection::vec((0.0f64..0.2, 1u64..20_000, 0u64..500, 0usize..40, 0u64..20_000), 1..120),
        count in 2u32..9, decoding in 0usize..8, kv_tokens in 1e3f64..1e6, faster in 0.5f64..3.0,
    ) {
        let members: Vec<Member> =
            members(count, Speed::default()).into_iter().map(|member| Member { kv_tokens, ..member }).collect();
        let mut at = 0.0;
        let mut window = VecDeque::new();
        for (number, (gap, prompt, tokens, back, shared)) in requests.into_iter().enumerate() {
            at += gap;
            let mut seen = Seen::new(at, prompt, tokens, Slo::default());
            seen.parent = number.checked_sub(back + 1).map(|parent| (parent as u64 + 7, shared.min(prompt)));
            window.push_back(seen);
        }
        let play = Play { members: &members, slots: &[], roads: ROADS, window: &window, first: 7, answer_tokens: 100.0 };
        let mut rehearsal = Rehearsal::default();
        let decoding = decoding.min(count as usize - 1);
        let attained = rehearsal.run(&play, decoding, faster);
        let judged = window.len() - (0.2 * window.len() as f64).ceil() as usize;
        prop_assert_eq!(rehearsal.judged(), judged);
        // Without SLOs all that are judged are within them.
        prop_assert_eq!(attained, f64::from(u8::from(judged > 0)));
    }
}
