//! Fleets, loads and requests as proptest draws them.

use std::sync::Arc;

use proptest::prelude::*;

use super::testing::{engine, with};
use super::*;
use crate::fleet::Role;
use crate::kv_index::Overlap;
use crate::links::Links;
use crate::load::{LinkLoad, Loads, Reserved};

/// One decision's inputs.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) loads: Loads,
    pub(crate) overlaps: Overlaps,
    pub(crate) prompt_tokens: u64,
    pub(crate) slo: Slo,
    pub(crate) seed: u64,
}

impl Case {
    pub(crate) fn request(&self) -> Request<'_> {
        Request {
            max_tokens: (!self.seed.is_multiple_of(3)).then_some(self.seed % 300),
            slo: self.slo,
            seed: self.seed,
            pinned: Some(Slot((self.seed % 7) as u32)),
            prefix_key: Some(self.seed / 3),
            fresh_key: (!self.seed.is_multiple_of(5)).then_some(self.seed / 2),
            ..Request::new("m", self.prompt_tokens, &self.overlaps)
        }
    }
}

fn reserved() -> impl Strategy<Value = Reserved> {
    let prefill = prop_oneof![Just((0, 0.0, 0)), (0u64..50_000, 0.0f64..3.0, 1u64..9)];
    let decode = prop_oneof![Just((0, 0)), (1u64..80, 0u64..1_000_000)];
    (prefill, decode, 0u64..2_000_000_000).prop_map(|(prefill, decode, bytes)| Reserved {
        prefill_tokens: prefill.0,
        prefill_seconds: prefill.1,
        prefills: prefill.2,
        sequences: decode.0,
        context_tokens: decode.1,
        sending_bytes: bytes,
        receiving_bytes: bytes / 2,
    })
}

/// Kind, role, speed, whether it can transfer, foreign sequences, load, overlap.
type Member = (u8, u8, f64, bool, u32, Reserved, u32);
/// Source, destination, bytes per second, RTT.
type LinkSample = (u32, u32, f64, f64);

fn member() -> impl Strategy<Value = Member> {
    let speed = prop_oneof![Just(1.0), 0.3f64..3.0];
    (0u8..10, 0u8..4, speed, prop::bool::weighted(0.9), 0u32..3, reserved(), 0u32..3000)
}

fn slo() -> impl Strategy<Value = Slo> {
    (prop::option::of(0.01f64..6.0), prop::option::of(0.005f64..0.1))
        .prop_map(|(ttft_seconds, itl_seconds)| Slo { ttft_seconds, itl_seconds })
}

/// A fleet of up to a dozen engines, with all that can be special about them.
pub(crate) fn case() -> impl Strategy<Value = Case> {
    let links = prop::collection::vec((0u32..12, 0u32..12, 1e8f64..1e10, 1e-5f64..1e-3), 0..30);
    (prop::collection::vec(member(), 0..12), links, 0u64..50_000, slo(), any::<u64>()).prop_map(build)
}

/// A case that is always the same.
pub(crate) fn fixed() -> Case {
    let member = (0, 0, 1.0, true, 0, Reserved::default(), 10);
    build((vec![member; 3], vec![(0, 1, 1e9, 1e-4)], 3000, Slo::default(), 1))
}

fn host(role: u8) -> &'static str {
    ["", "a", "b", "a"][usize::from(role)]
}

fn build(
    (members, samples, prompt_tokens, slo, seed): (Vec<Member>, Vec<LinkSample>, u64, Slo, u64),
) -> Case {
    let mut links = Links::default();
    for (n, member) in members.iter().enumerate() {
        links.place(Slot(n as u32), host(member.1));
    }
    for (n, (source, destination, width, rtt)) in samples.into_iter().enumerate() {
        let bytes = 1 << 28;
        let seconds = bytes as f64 / width + 2.0 * rtt;
        links.observe(n as f64 / 10.0, (Slot(source), Slot(destination)), bytes, seconds, rtt);
    }
    let (mut engines, mut loads, mut overlaps) = (Vec::new(), Vec::new(), Vec::new());
    for (n, (kind, role, speed, can_transfer, foreign, reserved, blocks)) in members.into_iter().enumerate() {
        let mut engine = with(engine(n as u32), |info| {
            info.host = host(role).into();
            info.role = [Role::Both, Role::Prefill, Role::Decode, Role::Both][usize::from(role)];
            match kind {
                1 => info.layout = "other".into(),
                2 => info.models = vec!["other".into()],
                3 => info.chunk_tokens = 512,
                4 => (info.block_size, info.chunk_tokens) = (32, 8192),
                5..7 => info.can_pull_cached = true,
                7 => (info.can_pull_cached, info.num_blocks, info.chunk_tokens) = (true, 4000, 2048),
                _ => {}
            }
        });
        engine.healthy = kind != 9;
        engine.part = (kind == 8).then_some([Role::DecodeOnly, Role::Prefill][usize::from(role % 2)]);
        engine.can_transfer = can_transfer;
        engine.foreign_running = foreign;
        engine.foreign_waiting = foreign / 2;
        engine.prefill_share = f64::from(foreign) / 8.0;
        engine.kv_beyond = f64::from(foreign) * 20_000.0 - 10_000.0;
        engine.reused = (foreign % 3 == 0).then(|| f64::from(foreign) / 8.0);
        engine.answer_tokens = (foreign % 2 == 0).then(|| 10.0 + 50.0 * f64::from(foreign));
        let s = &mut engine.speed;
        for coefficient in [&mut s.request_seconds, &mut s.token_seconds, &mut s.attention_seconds] {
            *coefficient *= speed;
        }
        engines.push(engine);
        loads.push(reserved);
        if blocks > 1000 {
            overlaps.push((Slot(n as u32), Overlap { blocks: blocks - 1000, gpu_blocks: blocks / 4 }));
        }
    }
    let on_links = (1..engines.len() as u32)
        .map(|n| LinkLoad { destination: n, source: n - 1, bytes: u64::from(n) * 10_000_000 })
        .collect();
    let fleet = Arc::new(Fleet::new(engines, links));
    let mut loads = Loads::new(loads, on_links);
    loads.sum_by_host(&fleet);
    Case { fleet, loads, overlaps: overlaps.into_iter().collect(), prompt_tokens, slo, seed }
}
