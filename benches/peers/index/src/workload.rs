//! A trace as the events that engines would send and the lookups that a router would make.

use std::collections::{HashMap, VecDeque};
use std::io::BufRead;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use baton_proto::BlockHash;
use baton_proto::block_hash::BlockHasher;
use serde::Deserialize;

/// Tokens that one id of the trace stands for.
const TRACE_BLOCK: usize = 512;

/// One block of content, by number.
pub type Block = u32;

#[derive(Deserialize)]
struct Line {
    input_length: usize,
    hash_ids: Vec<u32>,
}

/// What an engine says.
pub enum Event {
    /// It holds these blocks, of which each follows the one before; the first follows `parent`.
    Stored { engine: u32, parent: Option<Block>, blocks: Vec<Block> },
    /// It evicted these.
    Removed { engine: u32, blocks: Vec<Block> },
}

/// A trace, replayed over engines with caches of limited size.
pub struct Workload {
    pub engines: u32,
    pub block_size: usize,
    /// Every request's whole blocks.
    pub prompts: Vec<Vec<Block>>,
    pub events: Vec<Event>,
    /// Baton's hash of each block.
    pub hashes: Vec<BlockHash>,
    /// For the first prompt's index: where its events begin. One more for the end.
    pub starts: Vec<usize>,
}

/// An engine's cache: least recently used blocks go first, of one request the last first, as in vLLM.
#[derive(Default)]
struct Cache {
    /// When each block was used last.
    used: HashMap<Block, u64>,
    queue: VecDeque<(u64, Block)>,
    clock: u64,
}

impl Cache {
    fn leading(&self, prompt: &[Block]) -> usize {
        prompt.iter().take_while(|block| self.used.contains_key(block)).count()
    }

    fn use_all(&mut self, prompt: &[Block]) {
        for block in prompt.iter().rev() {
            self.clock += 1;
            self.used.insert(*block, self.clock);
            self.queue.push_back((self.clock, *block));
        }
    }

    fn evict(&mut self, capacity: usize) -> Vec<Block> {
        let mut evicted = Vec::new();
        while self.used.len() > capacity {
            let Some((time, block)) = self.queue.pop_front() else { break };
            if self.used.get(&block) == Some(&time) {
                self.used.remove(&block);
                evicted.push(block);
            }
        }
        evicted
    }
}

impl Workload {
    /// Replays a trace over `engines` caches of `capacity` tokens each. Two requests of three go where most of their
    /// prefix lies, among engines that did not get more than their share yet; every third goes to the next engine in turn.
    pub fn replay(trace: &Path, engines: u32, block_size: usize, capacity: usize) -> Result<Self> {
        ensure!(TRACE_BLOCK.is_multiple_of(block_size), "blocks must divide {TRACE_BLOCK} tokens");
        let file = std::fs::File::open(trace).with_context(|| format!("{}", trace.display()))?;
        let per_id = TRACE_BLOCK / block_size;
        let mut prompts: Vec<Vec<Block>> = Vec::new();
        for line in std::io::BufReader::new(file).lines() {
            let line: Line = serde_json::from_str(&line?).context("a line with input_length and hash_ids")?;
            let blocks = line
                .hash_ids
                .iter()
                .flat_map(|id| (0..per_id).map(move |part| id * per_id as u32 + part as u32));
            prompts.push(blocks.take(line.input_length / block_size).collect());
        }

        let most = prompts.iter().flatten().max().copied().context("an empty trace")?;
        let hasher = BlockHasher::new("m");
        let mut parents: Vec<Option<Option<Block>>> = vec![None; most as usize + 1];
        let mut hashes = vec![BlockHash::from_bytes([0; 16]); most as usize + 1];
        for prompt in &prompts {
            let mut parent = None;
            for block in prompt {
                match &parents[*block as usize] {
                    None => {
                        parents[*block as usize] = Some(parent);
                        let before = parent.map(|parent: Block| hashes[parent as usize]);
                        hashes[*block as usize] = hasher.block(before, &[*block], []);
                    }
                    Some(known) => ensure!(*known == parent, "block {block} follows two different ones"),
                }
                parent = Some(*block);
            }
        }

        let mut caches: Vec<Cache> = (0..engines).map(|_| Cache::default()).collect();
        let mut load = vec![0u64; engines as usize];
        let (mut events, mut starts) = (Vec::new(), Vec::new());
        for (i, prompt) in prompts.iter().enumerate() {
            starts.push(events.len());
            let engine = if i % 3 == 2 {
                i / 3 % engines as usize
            } else {
                let share = load.iter().sum::<u64>() / u64::from(engines) + prompt.len() as u64;
                (0..engines as usize)
                    .filter(|engine| load[*engine] <= share)
                    .max_by_key(|engine| {
                        // A prefix that all requests share says nothing.
                        let leading = caches[*engine].leading(prompt);
                        (if leading > per_id { leading } else { 0 }, std::cmp::Reverse(load[*engine]))
                    })
                    .context("some engine has at most its share")?
            };
            load[engine] += prompt.len() as u64;
            let cache = &mut caches[engine];
            let leading = cache.leading(prompt);
            cache.use_all(prompt);
            let evicted = cache.evict(capacity / block_size);
            let engine = engine as u32;
            if !evicted.is_empty() {
                events.push(Event::Removed { engine, blocks: evicted });
            }
            if leading < prompt.len() {
                let parent = leading.checked_sub(1).map(|last| prompt[last]);
                events.push(Event::Stored { engine, parent, blocks: prompt[leading..].to_vec() });
            }
        }
        starts.push(events.len());
        Ok(Self { engines, block_size, prompts, events, hashes, starts })
    }

    /// Blocks stored and removed over all events.
    pub fn writes(&self) -> u64 {
        let blocks = |event: &Event| match event {
            Event::Stored { blocks, .. } | Event::Removed { blocks, .. } => blocks.len() as u64,
        };
        self.events.iter().map(blocks).sum()
    }

    /// What all engines hold at the end, and how many different blocks that is.
    pub fn memberships(&self) -> (u64, u64) {
        let mut held: std::collections::HashSet<(u32, Block)> = std::collections::HashSet::new();
        for event in &self.events {
            match event {
                Event::Stored { engine, blocks, .. } => {
                    held.extend(blocks.iter().map(|block| (*engine, *block)))
                }
                Event::Removed { engine, blocks } => {
                    for block in blocks {
                        held.remove(&(*engine, *block));
                    }
                }
            }
        }
        let distinct: std::collections::HashSet<Block> = held.iter().map(|(_, block)| *block).collect();
        (held.len() as u64, distinct.len() as u64)
    }

    /// What a peer that hashes blocks without their prefix takes for the block.
    pub fn content(&self, block: Block) -> u64 {
        let mixed = (u64::from(block) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    /// What a peer that takes the engine's 64-bit chained hash takes for it.
    pub fn sequence(&self, block: Block) -> u64 {
        let (words, _) = self.hashes[block as usize].as_bytes().as_chunks::<8>();
        u64::from_le_bytes(words[0])
    }
}
