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
//! For goodput, work counts. A step that computes `n` tokens of prompts beside `B` sequences takes `max(a + b·n, d) + c·pairs + Σw`, where a sequence's
//! `w` is `e + f·context`; and `B ≤ max_num_seqs`. So it takes no less than each of
//! - `min(a, d) + b·n + c·pairs + Σw`,
//! - `d + c·pairs + Σw`.
//!
//! Be `g` what stands there first, which no request causes alone. Shared out over the sequences that decode, in whichever of two ways, it adds to each of them
//! - the same: at least `g/max_num_seqs` in each of its steps,
//! - by `w`: `g·w/Σw`, which is at least `g·w/(t - g)` in a step that takes `t`. A request that keeps the SLO for its tokens has steps that take `s` or less on
//!   average, `s` being that SLO; so this is at least `g·w/(s - g)` a step, with the least of its `w`, because `1/(t - g)` is convex.
//!
//! That is four ways to count the least time that a request takes engines, in whatever company. When `k` of `N` requests are within the SLOs, engines
//! worked for at least the sum of the `k` least of these, counted one way; all of them work for no more than their number times the time until the end. So
//! goodput, `k` over that time, is at most `k · engines / sum`, which falls with `k`. A request that would miss an SLO all alone is never within them. Prompts whose
//! pieces fit beside every batch without a pause are more than any schedule reaches, so the bound is not tight.
//!
//! Memory: 8 bytes for each distinct block, 32 for each request.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use serde::Serialize;

use crate::engine::speed::{Speed, pairs};
use crate::fleet::{Fleet, Slo};
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
    /// Least work of each request, seconds, in all ways to count; ascending. Infinite where it cannot be within the SLOs.
    #[serde(skip)]
    work: [Vec<f64>; 4],
}

impl Bound {
    /// Requests per second within both SLOs where at least this share of all is.
    pub fn most_goodput(&self, attainment: f64) -> f64 {
        let served = ((self.requests as f64 * attainment).ceil() as usize).max(1);
        let most = |work: &Vec<f64>| {
            let sum: f64 = work.iter().take(served).sum();
            served as f64 * self.engines as f64 / sum.max(f64::MIN_POSITIVE)
        };
        self.work.iter().map(most).fold(f64::INFINITY, f64::min)
    }
}

/// The least of each constant over a fleet.
struct Least {
    speed: Speed,
    sequences: f64,
}

impl Least {
    fn of(fleet: &Fleet) -> Self {
        let members = fleet.members();
        let least = |of: fn(&Speed) -> f64| {
            members.iter().map(|member| of(&member.speed)).fold(f64::INFINITY, f64::min)
        };
        let sequences = members.iter().map(|member| member.kind.max_num_seqs).max();
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
            sequences: f64::from(sequences.unwrap_or(1)),
        }
    }
}

/// Bounds for a workload on a fleet, in whatever mode.
pub fn bound(fleet: &Fleet, block_tokens: u32, source: &mut dyn Source) -> Bound {
    bound_after(fleet, block_tokens, HashSet::new(), source)
}

/// The same, where these blocks were computed before.
pub fn bound_after(
    fleet: &Fleet,
    block_tokens: u32,
    mut seen: HashSet<u64>,
    source: &mut dyn Source,
) -> Bound {
    let least = Least::of(fleet);
    let speed = &least.speed;
    let slo = fleet.slo.unwrap_or(Slo { ttft_ms: f64::INFINITY, tpot_ms: f64::INFINITY });
    let dispatch = fleet.control.dispatch_us / 1e6;
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
        let decode = steps * (speed.d + speed.e) + speed.f * contexts;
        let all = first + decode / 1e3;
        // Before a later turn comes, others may compute in a run what nobody has here.
        let late = arrival.turn == 0 && first * 1e3 > slo.ttft_ms;
        let hopeless = late || decode > steps * slo.tpot_ms;
        let attention = speed.c * pairs(new, cached);
        let beside = attention + steps * speed.e + speed.f * contexts;
        let least_step = speed.e + speed.f * (tokens + 1) as f64;
        let ways = [(speed.a.min(speed.d), speed.b * new as f64), (speed.d, 0.0)];
        for (way, (common, prefill)) in ways.into_iter().enumerate() {
            // Where nothing is left of the SLO, the request is hopeless, or has no such steps.
            let by_step =
                if steps > 0.0 { steps * common * least_step / (slo.tpot_ms - common) } else { 0.0 };
            for (share, add) in [steps * common / least.sequences, by_step].into_iter().enumerate() {
                let work = if hopeless { f64::INFINITY } else { (prefill + beside + add) / 1e3 };
                bound.work[2 * way + share].push(work);
            }
        }
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
