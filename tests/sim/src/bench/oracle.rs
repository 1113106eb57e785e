//! What no policy can do better than: bounds of a clairvoyant that has one cache for all.
//!
//! # What is bounded
//! [`Bound::ttft_ms`] and [`Bound::e2e_ms`]: mean latencies, from below. [`Bound::most_goodput`]: requests per second within both SLOs, from above,
//! for any rate at which a given share of all requests is within them.
//!
//! # Why these are bounds
//! The clairvoyant finds a block of a prompt as soon as any request that has it arrived, wherever that ran: caches are
//! endless and common, transfers take no time, nobody waits for anybody, and each step costs the least that any engine of the fleet
//! takes for it. In the simulation a block is cached only where it was computed or brought to, so each distinct block is computed at least once, by some request;
//! computing tokens `p..p+n` costs `b·n + c·(n·p + n²/2)`, which is the same for whoever does it, and adds up over pieces. So the sum over
//! requests of `a + b·n + c·pairs`, `n` counted where a block comes first, is least, whoever computes what; and so is the mean time to first
//! token. A decode step of a sequence takes `d + e + f·context` or more.
//!
//! For goodput, work counts: a step that computes `n` tokens of prompts beside `B` sequences takes `max(a + b·n, d) + c·pairs + e·B + f·Σctx`, and has
//! `n ≤ max_num_batched_tokens`, `B ≤ max_num_seqs`. As `max(x, y)` is no less than either, a request takes engines no less than
//! each of
//! - `n·(b + a/max_num_batched_tokens) + c·pairs + (T-1)·e + f·Σctx`,
//! - `c·pairs + (T-1)·(d/max_num_seqs + e) + f·Σctx`,
//!
//! in whatever company. When `k` of `N` requests are within the SLOs, engines worked for at least the sum of the `k` least of these; all of
//! them work for no more than their number times the time until the end. So goodput, `k` over that time, is at most `k · engines / sum`, which falls
//! with `k`. Decoding in full batches beside every prefill is more than any schedule reaches, so the bound is not tight.
//!
//! Memory: 8 bytes for each distinct block, 16 for each request.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use serde::Serialize;

use crate::engine::speed::{Speed, pairs};
use crate::fleet::Fleet;
use crate::trace::{Arrival, Source, When};
use crate::{Nanos, nanos, seconds};

/// The bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Bound {
    /// Requests of the workload.
    pub requests: u64,
    /// No policy has a lower mean time to first token.
    pub ttft_ms: f64,
    /// No policy has a lower mean time from arrival to last token.
    pub e2e_ms: f64,
    /// Prompt tokens that a common, endless cache finds, as a share.
    pub hit_rate: f64,
    /// When the last request would end, seconds.
    pub seconds: f64,
    engines: u64,
    /// Least work of each request, seconds, both ways to count; ascending.
    #[serde(skip)]
    work: [Vec<f64>; 2],
}

impl Bound {
    /// Requests per second within both SLOs where at least this share of all is.
    pub fn most_goodput(&self, attainment: f64) -> f64 {
        let served = ((self.requests as f64 * attainment).ceil() as usize).max(1);
        let most = |work: &Vec<f64>| {
            let sum: f64 = work.iter().take(served).sum();
            served as f64 * self.engines as f64 / sum.max(f64::MIN_POSITIVE)
        };
        most(&self.work[0]).min(most(&self.work[1]))
    }
}

/// The least of each constant over a fleet.
struct Least {
    speed: Speed,
    batched_tokens: f64,
    sequences: f64,
}

impl Least {
    fn of(fleet: &Fleet) -> Self {
        let members = fleet.members();
        let least = |of: fn(&Speed) -> f64| {
            members.iter().map(|member| of(&member.speed)).fold(f64::INFINITY, f64::min)
        };
        let most = |of: fn(&crate::fleet::Kind) -> u32| members.iter().map(|member| of(member.kind)).max();
        Self {
            speed: Speed {
                a: least(|speed| speed.a),
                b: least(|speed| speed.b),
                c: least(|speed| speed.c),
                d: least(|speed| speed.d),
                e: least(|speed| speed.e),
                f: least(|speed| speed.f),
                kv_kib: members[0].speed.kv_kib,
            },
            batched_tokens: f64::from(most(|kind| kind.max_num_batched_tokens).unwrap_or(1)),
            sequences: f64::from(most(|kind| kind.max_num_seqs).unwrap_or(1)),
        }
    }
}

/// Bounds for a workload on a fleet, in whatever mode.
pub fn bound(fleet: &Fleet, block_tokens: u32, source: &mut dyn Source) -> Bound {
    let least = Least::of(fleet);
    let speed = &least.speed;
    let dispatch = fleet.control.dispatch_us / 1e6;
    let mut seen: HashSet<u64> = HashSet::new();
    let mut follows: BinaryHeap<Reverse<(Nanos, u64)>> = BinaryHeap::new();
    let mut waiting: std::collections::HashMap<u64, Arrival> = Default::default();
    let mut bound = Bound { engines: fleet.len() as u64, ..Bound::default() };
    let (mut ttft, mut e2e, mut prompt, mut hit) = (0.0, 0.0, 0u64, 0u64);
    let at = |arrival: &Arrival| match arrival.when {
        When::At(at) | When::After(at) => at,
    };
    let mut next_open = source.open();
    let mut end: Nanos = 0;
    loop {
        let opens = next_open.as_ref().map(at);
        let due = follows.peek().map(|entry| entry.0.0);
        let (now, arrival) = match (opens, due) {
            (Some(opens), due) if due.is_none_or(|due| opens <= due) => {
                let Some(arrival) = std::mem::replace(&mut next_open, source.open()) else { break };
                (opens, arrival)
            }
            (_, Some(due)) => {
                let session = follows.pop().map_or(0, |entry| entry.0.1);
                let Some(arrival) = waiting.remove(&session) else { break };
                (due, arrival)
            }
            (_, None) => break,
        };
        let tokens = u64::from(arrival.prompt_tokens);
        let findable = ((tokens - 1) / u64::from(block_tokens)) as usize;
        let found = arrival.blocks.iter().take(findable).take_while(|id| seen.contains(id)).count() as u64;
        seen.extend(arrival.blocks.iter().copied());
        let cached = found * u64::from(block_tokens);
        let new = tokens - cached;
        let steps = f64::from(arrival.output_tokens - 1);
        // Contexts of tokens+1, tokens+2, ...
        let contexts = steps * tokens as f64 + steps * (steps + 1.0) / 2.0;
        let first = dispatch + speed.prefill_seconds(new, cached);
        let all = first + (steps * (speed.d + speed.e) + speed.f * contexts) / 1e3;
        let attention = speed.c * pairs(new, cached);
        let beside = attention + steps * speed.e + speed.f * contexts;
        bound.work[0].push((new as f64 * (speed.b + speed.a / least.batched_tokens) + beside) / 1e3);
        bound.work[1].push((steps * speed.d / least.sequences + beside) / 1e3);
        (ttft, e2e) = (ttft + first, e2e + all);
        (prompt, hit) = (prompt + tokens, hit + cached);
        bound.requests += 1;
        let ended = now + nanos(all);
        end = end.max(ended);
        if let Some(session) = arrival.session
            && let Some(next) = source.follow(session)
        {
            let then = match next.when {
                When::At(at) => at.max(ended),
                When::After(pause) => ended + pause,
            };
            follows.push(Reverse((then, session)));
            waiting.insert(session, next);
        }
    }
    let mean_ms = |sum: f64| 1e3 * sum / bound.requests.max(1) as f64;
    (bound.ttft_ms, bound.e2e_ms) = (mean_ms(ttft), mean_ms(e2e));
    bound.hit_rate = hit as f64 / prompt.max(1) as f64;
    bound.seconds = seconds(end);
    for work in &mut bound.work {
        work.sort_unstable_by(f64::total_cmp);
    }
    bound
}
