//! The trap of a shared first block: a trace in which every prompt begins alike.
//!
//! Who routes by the longest prefix alone sends all of it to one engine. Here ten engines with a cache of 2,700 blocks each serve the
//! trace in virtual time: an engine computes its prompts one after another and decodes beside, as the cost model says. How even its
//! tokens are, and how close the hit rate comes to that of one cache with all the blocks, is measured.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use anyhow::Context as _;
use baton_coordinator_core::fleet::{Fleet, Role};
use baton_coordinator_core::kv_index::{Holder, KvIndex, Limits, Overlaps, Run, Slot, Tier};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::load::{DecodeReservation, PrefillReservation};
use baton_coordinator_core::placement::{
    Adaptive, ConsistentHash, Decider, LongestPrefix, Policy, Request, RoundRobin, fresh_key, prefix_key,
};
use baton_proto::{BlockHash, Epoch};
use serde::{Deserialize, Serialize};

use crate::decisions::{SPEED, engine};

const ENGINES: u32 = 10;
const BLOCKS: usize = 2_700;
const BLOCK_SIZE: u32 = 512;
/// Most of an engine's share of all tokens, in fair shares, and most that the hit rate may be below one cache's.
const LARGEST_SHARE: f64 = 1.5;
const LARGEST_LOSS: f64 = 0.01;

#[derive(Deserialize)]
struct Row {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    requests: usize,
    one_cache_hit_rate: f64,
    adaptive: Spread,
    round_robin: Spread,
    longest_prefix: Spread,
    consistent_hash: Spread,
    pub(crate) kept: bool,
}

/// How a policy spread the trace.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    /// Prompt tokens found cached, of all.
    hit_rate: f64,
    /// The largest share of an engine, in fair shares: of prompt tokens, and of those that had to be computed.
    largest_token_share: f64,
    largest_computed_share: f64,
}

/// A cache that drops what was not used for longest, of equals the deepest block.
#[derive(Default)]
struct Cache {
    capacity: usize,
    blocks: HashMap<u64, (u64, usize)>,
    order: BTreeSet<(u64, Reverse<usize>, u64)>,
    clock: u64,
}

impl Cache {
    fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Leading blocks that it has.
    fn hit(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|id| self.blocks.contains_key(*id)).count()
    }

    /// Uses a chain; returns what came in and what went out.
    fn touch(&mut self, chain: &[u64]) -> (Vec<u64>, Vec<u64>) {
        self.clock += 1;
        let mut stored = Vec::new();
        for (depth, id) in chain.iter().enumerate() {
            match self.blocks.insert(*id, (self.clock, depth)) {
                Some((clock, depth)) => {
                    self.order.remove(&(clock, Reverse(depth), *id));
                }
                None => stored.push(*id),
            }
            self.order.insert((self.clock, Reverse(depth), *id));
        }
        let mut removed = Vec::new();
        while self.blocks.len() > self.capacity {
            let Some((_, _, id)) = self.order.pop_first() else { break };
            self.blocks.remove(&id);
            removed.push(id);
        }
        (stored, removed)
    }
}

fn hash(id: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&id.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    bytes[8..].copy_from_slice(&id.to_le_bytes());
    BlockHash::from_bytes(bytes)
}

fn read(file: &Path) -> anyhow::Result<Vec<Row>> {
    let lines = BufReader::new(File::open(file).with_context(|| file.display().to_string())?).lines();
    lines
        .enumerate()
        .map(|(at, line)| {
            serde_json::from_str(&line?).with_context(|| format!("{} line {}", file.display(), at + 1))
        })
        .collect()
}

/// Whole blocks of a prompt; the last, partial one is never found again.
fn chain(row: &Row) -> &[u64] {
    &row.hash_ids[..row.hash_ids.len().min((row.input_length / u64::from(BLOCK_SIZE)) as usize)]
}

pub(crate) fn measure(file: &Path) -> anyhow::Result<Measured> {
    let rows = read(file)?;
    let mut one = Cache::new(BLOCKS * ENGINES as usize);
    let (mut hit, mut all) = (0, 0);
    for row in &rows {
        hit += one.hit(chain(row)) as u64 * u64::from(BLOCK_SIZE);
        all += row.input_length;
        one.touch(chain(row));
    }
    let one_cache_hit_rate = hit as f64 / all as f64;
    let adaptive = spread(&rows, &Adaptive)?;
    let measured = Measured {
        requests: rows.len(),
        one_cache_hit_rate,
        adaptive,
        round_robin: spread(&rows, &RoundRobin)?,
        longest_prefix: spread(&rows, &LongestPrefix)?,
        consistent_hash: spread(&rows, &ConsistentHash)?,
        kept: adaptive.largest_token_share <= LARGEST_SHARE
            && adaptive.hit_rate >= one_cache_hit_rate - LARGEST_LOSS,
    };
    eprintln!("{measured:#?}");
    Ok(measured)
}

/// What ends at a time, in microseconds.
enum End {
    Prefill { _guard: PrefillReservation },
    Decode { _guard: DecodeReservation },
}

fn spread(rows: &[Row], policy: &dyn Policy) -> anyhow::Result<Spread> {
    let engines = (0..ENGINES)
        .map(|n| {
            let mut engine = engine(n, Role::Both, BLOCK_SIZE, SPEED);
            engine.can_transfer = false;
            engine
        })
        .collect();
    let fleet = Fleet::new(engines, Links::default());
    let index = KvIndex::new(Limits::of(1 << 30), 7);
    let mut overlaps = Overlaps::default();
    let mut caches: Vec<Cache> = (0..ENGINES).map(|_| Cache::new(BLOCKS)).collect();
    for n in 0..ENGINES {
        index.open(Slot(n), Epoch(1))?;
    }
    let mut free_at = vec![0.0f64; ENGINES as usize];
    let mut ends: HashMap<u64, End> = HashMap::new();
    let mut timeline: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let mut decider = Decider::new();
    let (mut tokens, mut computed) = (vec![0u64; ENGINES as usize], vec![0u64; ENGINES as usize]);
    let mut hit = 0;
    for (number, row) in rows.iter().enumerate() {
        let now = row.timestamp / 1e3;
        while timeline.peek().is_some_and(|Reverse((at, _))| *at as f64 / 1e6 <= now) {
            let Some(Reverse((_, id))) = timeline.pop() else { break };
            ends.remove(&id);
        }
        let chain = chain(row);
        let hashes: Vec<BlockHash> = chain.iter().map(|id| hash(*id)).collect();
        index.overlaps(&hashes, &mut overlaps);
        let request = Request {
            max_tokens: Some(row.output_length),
            seed: number as u64,
            prefix_key: prefix_key(&hashes, BLOCK_SIZE),
            fresh_key: fresh_key(&hashes, &overlaps),
            ..Request::new("model", row.input_length, &overlaps)
        };
        let decision = decider.decide(policy, &fleet, &request).context("no engine")?;
        let at = decision.plan().prefill() as usize;
        let blocks = caches[at].hit(chain) as u64;
        hit += blocks * u64::from(BLOCK_SIZE);
        tokens[at] += row.input_length;
        computed[at] += row.input_length - blocks * u64::from(BLOCK_SIZE);

        let load = &fleet.engines()[at].load;
        let prefill_ends = free_at[at].max(now) + decision.chosen.prefill_seconds;
        free_at[at] = prefill_ends;
        let decode_ends = prefill_ends + row.output_length as f64 * decision.chosen.itl_seconds;
        let prefill = load.reserve_prefill(decision.chosen.uncached_tokens, decision.chosen.prefill_seconds);
        let decode = load.reserve_decode(row.input_length);
        for (kind, time, end) in [
            (0, prefill_ends, End::Prefill { _guard: prefill }),
            (1, decode_ends, End::Decode { _guard: decode }),
        ] {
            let id = number as u64 * 2 + kind;
            timeline.push(Reverse(((time * 1e6) as u64, id)));
            ends.insert(id, end);
        }
        let (stored, removed) = caches[at].touch(chain);
        let holder = Holder::new(Slot(at as u32), Epoch(1));
        let stored: Vec<BlockHash> = stored.into_iter().map(hash).collect();
        let removed: Vec<BlockHash> = removed.into_iter().map(hash).collect();
        index.store(holder, Tier::Gpu, Run::loose(&stored))?;
        index.remove(holder, Tier::Gpu, &removed)?;
    }
    let all: u64 = tokens.iter().sum();
    let share = |of: &[u64]| {
        let most = of.iter().copied().max().unwrap_or(0) as f64;
        most * f64::from(ENGINES) / of.iter().sum::<u64>().max(1) as f64
    };
    Ok(Spread {
        hit_rate: hit as f64 / all as f64,
        largest_token_share: share(&tokens),
        largest_computed_share: share(&computed),
    })
}
