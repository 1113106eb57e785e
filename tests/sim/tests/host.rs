//! Blocks in the host's memory: which are there, what a copy from there takes, and what is told of them.

use std::collections::BTreeSet;

use baton_sim::decision::{Production, Speeds};
use baton_sim::engine::events::{Change, Tier};
use baton_sim::engine::host::HostTier;
use baton_sim::engine::speed::{Step, known, pairs};
use baton_sim::engine::{Engine, Job, Output, Settings};
use baton_sim::fleet::Fleet;
use baton_sim::sim::{Report, run};
use baton_sim::trace::{First, Generator, Shape};
use baton_sim::{Nanos, nanos};
use proptest::prelude::*;

/// Blocks as a list, what was used the longest ago first; everything is searched.
#[derive(Default)]
struct Model {
    most: usize,
    held: Vec<u64>,
}

impl Model {
    fn offer(&mut self, ids: &[u64]) {
        let missing: Vec<u64> = ids.iter().copied().filter(|id| !self.held.contains(id)).collect();
        let needed = (self.held.len() + missing.len()).saturating_sub(self.most);
        let others: Vec<u64> = self.held.iter().copied().filter(|id| !ids.contains(id)).collect();
        if others.len() >= needed {
            self.held.retain(|id| !others[..needed].contains(id));
            self.held.extend(missing);
        }
    }

    fn used(&mut self, ids: &[u64]) {
        for id in ids.iter().rev().filter(|id| self.held.contains(id)).copied().collect::<Vec<_>>() {
            self.held.retain(|other| *other != id);
            self.held.push(id);
        }
    }
}

proptest! {
    #[test]
    fn the_tier_equals_a_sorted_list(
        most in 0..40usize,
        actions in proptest::collection::vec((any::<bool>(), 0..4u64, 0..20usize, 1..24usize), 1..120),
    ) {
        let mut tier = HostTier::new(most as u32, true);
        let mut model = Model { most, ..Model::default() };
        let mut told: BTreeSet<u64> = BTreeSet::new();
        for (offers, family, from, length) in actions {
            // Prompts of a family begin alike with those of others.
            let id = |at: usize| if at < 6 { 1 + at as u64 } else { 100 * (family + 1) + at as u64 };
            let ids: Vec<u64> = (from..from + length).map(id).collect();
            match offers {
                true => {
                    tier.offer(from.checked_sub(1).map(id), &ids);
                    model.offer(&ids);
                }
                false => {
                    tier.used(&ids);
                    model.used(&ids);
                }
            }
            prop_assert_eq!(tier.len() as usize, model.held.len());
            prop_assert!(model.held.len() <= most);
            prop_assert_eq!(tier.is_empty(), model.held.is_empty());
            let hits = ids.iter().take_while(|id| model.held.contains(id)).count();
            prop_assert_eq!(tier.hits(&ids), hits);
            for (change, ids) in tier.take_events().iter().flat_map(|events| events.iter().map(|(change, ids)| (change, ids.to_vec())).collect::<Vec<_>>()) {
                for id in ids {
                    match change {
                        Change::Stored { tier: Tier::Host, .. } => prop_assert!(told.insert(id), "stored twice"),
                        Change::Removed { tier: Tier::Host } => prop_assert!(told.remove(&id), "removed twice"),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
            }
            prop_assert_eq!(&told, &model.held.iter().copied().collect::<BTreeSet<u64>>());
        }
    }
}

const BLOCK: u32 = 16;
const BLOCK_SECONDS: f64 = 1e-3;

/// An engine whose GPU has room for little more than one prompt of a hundred blocks.
fn engine(host_blocks: u32) -> Engine {
    Engine::new(Settings {
        speed: known("8B", "H100").expect("a row of the table"),
        block_tokens: BLOCK,
        blocks: 110,
        max_num_seqs: 16,
        max_num_batched_tokens: 8192,
        chunked_prefill: true,
        kv_events: true,
        host_blocks,
        host_block_seconds: BLOCK_SECONDS,
    })
}

fn job(key: u32, family: u64, blocks: u32) -> Job {
    Job {
        key,
        ids: (1..=u64::from(blocks)).map(|at| 1000 * family + at).collect(),
        prompt_tokens: blocks * BLOCK + 1,
        output_tokens: 2,
        remote_tokens: 0,
        hold: false,
    }
}

/// Until nothing is left to do. Returns when, and what was said.
fn drive(engine: &mut Engine, mut now: Nanos, said: &mut Vec<(Nanos, Output)>) -> Nanos {
    let mut outputs = Vec::new();
    loop {
        engine.take_outputs(&mut outputs);
        said.extend(outputs.drain(..).map(|output| (now, output)));
        match engine.next() {
            Some((at, _)) => {
                now = at;
                engine.wake(now);
            }
            None => return now,
        }
    }
}

/// Serves one after another; returns what the last one was said to have, how long it took to its first token, and what was computed and copied for it.
fn after(engine: &mut Engine, families: &[u64]) -> (u32, Nanos, u64, u64) {
    let (mut now, mut said) = (0, Vec::new());
    let (mut began, mut before) = (0, *engine.totals());
    for (key, family) in families.iter().enumerate() {
        said.clear();
        (began, before) = (now, *engine.totals());
        engine.submit(now, job(key as u32, *family, 100));
        now = drive(engine, now, &mut said);
    }
    let of = |pick: &dyn Fn(&Output) -> Option<u32>| {
        said.iter().find_map(|(at, output)| pick(output).map(|value| (*at, value))).expect("it was said")
    };
    let hits = of(&|output| match output {
        Output::Started { hit_tokens, .. } => Some(*hit_tokens),
        _ => None,
    });
    let first = of(&|output| matches!(output, Output::FirstToken { .. }).then_some(0));
    assert_eq!(said.iter().filter(|of| matches!(of.1, Output::Started { .. })).count(), 1);
    let totals = engine.totals();
    let (computed, copied) =
        (totals.prefill_tokens - before.prefill_tokens, totals.loaded_tokens - before.loaded_tokens);
    (hits.1, first.0 - began, computed, copied)
}

#[test]
fn what_the_gpu_gave_up_is_copied_instead_of_computed() {
    let speed = known("8B", "H100").expect("a row of the table");
    let (hits, ttft, computed, copied) = after(&mut engine(1000), &[1, 2, 1]);
    // All but the last token; what is left in the GPU's cache of it need not be copied.
    assert_eq!((hits, computed), (1600, 1));
    assert!(copied > 1300 && copied < 1600, "{copied}");
    let step = Step { new: 1, pairs: pairs(1, 1600), ..Step::default() };
    let expected = nanos(copied as f64 / f64::from(BLOCK) * BLOCK_SECONDS) + nanos(speed.step_seconds(&step));
    assert!(ttft.abs_diff(expected) <= 2, "{ttft} {expected}");
    // Without the tier it is computed.
    let (hits, _, computed, copied) = after(&mut engine(0), &[1, 2, 1]);
    assert!(hits < 300 && computed > 1300 && copied == 0, "{hits} {computed}");
    // A tier that has room for one of them has the one that was used last: the other one's blocks went, its leaves first.
    let (hits, _, _, copied) = after(&mut engine(120), &[1, 2, 3, 3]);
    assert_eq!((hits, copied), (1600, 0), "the GPU has it");
    let (hits, _, _, copied) = after(&mut engine(120), &[1, 2, 1]);
    assert!(hits < 600, "{hits} {copied}");
}

#[test]
fn copies_follow_each_other() {
    let mut engine = engine(1000);
    let (mut said, mut now) = (Vec::new(), 0);
    // Two of forty blocks each, and one that takes their places.
    for (family, blocks) in [(1, 40), (2, 40), (3, 105)] {
        engine.submit(now, job(9, family, blocks));
        now = drive(&mut engine, now, &mut said);
    }
    said.clear();
    let before = engine.totals().loaded_tokens;
    engine.submit(now, job(1, 1, 40));
    engine.submit(now, job(2, 2, 40));
    assert_eq!(engine.load().waiting, 2, "both wait for their copies");
    drive(&mut engine, now, &mut said);
    let copied = engine.totals().loaded_tokens - before;
    let first = |key: u32| {
        let of = |output: &Output| *output == Output::FirstToken { key };
        said.iter().find(|of_it| of(&of_it.1)).expect("it was said").0 - now
    };
    let all = nanos(copied as f64 / f64::from(BLOCK) * BLOCK_SECONDS);
    assert!(first(1) < all && first(2) > all, "{} {} {all}", first(1), first(2));
    assert!(copied >= 70 * u64::from(BLOCK), "{copied}");
}

#[test]
fn events_name_the_tier() {
    let mut engine = engine(150);
    let (mut gpu, mut host) = (BTreeSet::new(), BTreeSet::new());
    let (mut now, mut said) = (0, Vec::new());
    for (key, family) in [1u64, 2, 1, 3, 2].into_iter().enumerate() {
        engine.submit(now, job(key as u32, family, 100));
        now = drive(&mut engine, now, &mut said);
        let events = engine.take_events().expect("something was stored");
        for (change, ids) in events.iter() {
            for id in ids {
                let told = match change {
                    Change::Stored { tier: Tier::Gpu, .. } => gpu.insert(*id),
                    Change::Stored { tier: Tier::Host, .. } => host.insert(*id),
                    Change::Removed { tier: Tier::Gpu } => gpu.remove(id),
                    Change::Removed { tier: Tier::Host } => host.remove(id),
                };
                assert!(told, "{change:?} {id}");
            }
        }
        // As told, so it is.
        assert!(host.len() <= 150 && gpu.len() <= 110);
        for family in 1..=3 {
            let ids: Vec<u64> = (1..=100).map(|at| 1000 * family + at).collect();
            let leading = ids.iter().take_while(|id| gpu.contains(id)).count();
            let behind = ids[leading..].iter().take_while(|id| host.contains(id)).count();
            assert_eq!(engine.cached(&ids), (leading + behind) as u32 * BLOCK);
        }
    }
    assert!(host.difference(&gpu).count() > 40, "what the GPU gave up is there");
}

fn example() -> Fleet {
    Fleet::parse(include_str!("../../../benches/fleets/8b-h100x8.toml")).expect("an example")
}

/// Sessions stay where they began, so that what is cached changes no placement.
fn report(fleet: &Fleet, requests: u64) -> Report {
    let mut source = First::new(Generator::new(vec![Shape::agent()], 0.6, 64, 7), requests);
    let mut placer = Production::new(fleet, 64, "session_sticky", Speeds::Learned).expect("a policy");
    run(fleet, 64, &mut source, &mut placer).report
}

#[test]
fn a_tier_that_is_not_needed_changes_nothing() {
    let mut fleet = example();
    fleet.engines[0].kv_tokens = 1 << 24;
    let without = report(&fleet, 1000);
    fleet.engines[0].host_kv_tokens = 1 << 24;
    assert_eq!(report(&fleet, 1000), without);
}

#[test]
fn with_little_room_on_gpus_hosts_keep_what_comes_back() {
    let mut fleet = Fleet { slo: None, ..example() };
    fleet.engines[0].kv_tokens = 150_000;
    let without = report(&fleet, 1500);
    fleet.engines[0].host_kv_tokens = 2_000_000;
    let with = report(&fleet, 1500);
    assert_eq!(report(&fleet, 1500), with);
    let loaded = |report: &Report| report.engines.iter().map(|engine| engine.loaded_tokens).sum::<u64>();
    assert_eq!(loaded(&without), 0);
    assert!(loaded(&with) > 1_000_000, "{}", loaded(&with));
    assert!(with.hit_rate > without.hit_rate + 0.01, "{} {}", with.hit_rate, without.hit_rate);
    assert!(with.ttft_ms.mean < without.ttft_ms.mean, "{} {}", with.ttft_ms.mean, without.ttft_ms.mean);
    // A bus that is too slow to be worth it costs time.
    fleet.engines[0].host_gbit = 1.0;
    assert!(report(&fleet, 1500).ttft_ms.mean > 2.0 * with.ttft_ms.mean);
}
