//! What the tests have in common.

#![allow(dead_code, reason = "no test uses all of it")]

pub(crate) mod watched;

use baton_sim::Nanos;
use baton_sim::fleet::Fleet;
use baton_sim::sim::{Answer, Placer, Plan, Request};

/// One engine after the other.
#[derive(Debug)]
pub(crate) struct RoundRobin(pub u32);

impl Placer for RoundRobin {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        Answer::Goes(Plan::Colocated { engine: (request.number % u64::from(self.0)) as u32 })
    }
}

/// A request's first block decides.
#[derive(Debug)]
pub(crate) struct FirstBlock(pub u32);

impl Placer for FirstBlock {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        let block = request.blocks.first().copied().unwrap_or(request.number);
        Answer::Goes(Plan::Colocated { engine: (block % u64::from(self.0)) as u32 })
    }
}

/// Prefill on the first engines, decode on the others, both in turn.
#[derive(Debug)]
pub(crate) struct FixedSplit {
    pub prefill: u32,
    pub decode: u32,
}

impl Placer for FixedSplit {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        let at = |count: u32| (request.number % u64::from(count)) as u32;
        Answer::Goes(Plan::Disaggregated {
            prefill: at(self.prefill),
            decode: self.prefill + at(self.decode),
        })
    }
}

/// Engines that compute by these constants, a, b, c, d, e, f in ms, with nothing around them that takes time.
pub(crate) fn plain_fleet(engines: u32, constants: [f64; 6], max_num_seqs: u32, kv_tokens: u64) -> Fleet {
    let [a, b, c, d, e, f] = constants;
    let text = format!(
        r#"
        name = "test"
        model = "test"
        [[engines]]
        gpu = "test"
        count = {engines}
        kv_tokens = {kv_tokens}
        max_num_seqs = {max_num_seqs}
        constants = {{ a = {a:?}, b = {b:?}, c = {c:?}, d = {d:?}, e = {e:?}, f = {f:?}, kv_kib = 128.0 }}
        [links]
        gbit = 100.0
        efficiency = 1.0
        rtt_us = 0.0
        [control]
        dispatch_us = 0.0
        "#
    );
    Fleet::parse(&text).expect("a consistent fleet")
}
