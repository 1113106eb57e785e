//! The scheduler: continuous batching with chunked prefill, as a pure core.
//!
//! It knows neither clock nor sockets. The engine calls [`Scheduler::schedule`], computes what it says, and hands the sampled
//! tokens to [`Scheduler::complete`]; in between it tells what the connector reported. What is to be sent to the agent and
//! published as KV events collects here until it is taken.
//!
//! A prompt that takes several steps is held from the first one on, if it is to be held, and more of its blocks with each
//! step; a prompt of one step when it is over.
//!
//! Its order of things is vLLM's: running requests first, in order of arrival, then those whose pull is over, then the
//! waiting ones; a running request that finds no block preempts the youngest one; a block enters the prefix cache when
//! the step that fills it is scheduled; pulled blocks enter it when the pull is over.

use std::collections::{HashMap, VecDeque};

use baton_proto::ContentKeys;
use baton_proto::connector::{Computed, Content, Hold, Pull, ToAgent};
use baton_proto::ids::Epoch;
use baton_proto::plan::{Action, Held};

use crate::block_pool::{BlockId, BlockPool};
use crate::events::{BlockStored, KvEvent};
use crate::hashing::EngineHasher;
use crate::request::{Finish, Holding, NewRequest, Output, PrefillStats, Request};

/// Limits of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks, block 0 included. Without it they hold at least `max_model_len` tokens.
    pub num_blocks: u32,
    /// Tokens of prompt and output together, at most.
    pub max_model_len: usize,
    /// Tokens computed in one step, at most.
    pub max_num_batched_tokens: usize,
    /// Requests in one step, at most.
    pub max_num_seqs: usize,
    /// Whether changes of the cache are recorded as events.
    pub events: bool,
}

/// A request's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index among the running requests.
    pub running: usize,
    /// Tokens before the first one to compute.
    pub start: usize,
    /// Tokens to compute.
    pub len: usize,
    /// Whether all tokens are computed then, so that the next one is sampled.
    pub samples: bool,
}

/// Counters since the engine's start, and what is going on now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests that take part in steps.
    pub running: usize,
    /// Requests that wait for room.
    pub waiting: usize,
    /// Requests that wait for a pull.
    pub pulling: usize,
    /// Finished requests whose blocks are held.
    pub held: usize,
    /// Share of the blocks in use, from 0 to 1.
    pub usage: f64,
    /// Tokens looked up in the prefix cache.
    pub queries: u64,
    /// Tokens found there.
    pub hits: u64,
    /// Tokens offered to the connector.
    pub external_queries: u64,
    /// Tokens it pulls.
    pub external_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
}

/// The scheduler of one engine.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    hasher: EngineHasher,
    pool: BlockPool,
    running: Vec<Request>,
    waiting: VecDeque<Request>,
    /// Pull under way.
    pulling: Vec<Request>,
    /// Pull over, to be admitted before `waiting`.
    pulled: VecDeque<Request>,
    /// Blocks of requests that were aborted during their pull; something may still write to them.
    aborted: HashMap<String, Vec<BlockId>>,
    /// Blocks that the agent holds and their requests have no use for any more.
    held: HashMap<String, Vec<BlockId>>,
    epoch: Option<Epoch>,
    messages: Vec<ToAgent>,
    stats: Stats,
}

impl Scheduler {
    /// A scheduler with an empty cache.
    pub fn new(config: SchedulerConfig, hasher: EngineHasher) -> Self {
        Self {
            config,
            hasher,
            pool: BlockPool::new(config.num_blocks, config.events),
            running: Vec::new(),
            waiting: VecDeque::new(),
            pulling: Vec::new(),
            pulled: VecDeque::new(),
            aborted: HashMap::new(),
            held: HashMap::new(),
            epoch: None,
            messages: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Queues a request.
    pub fn add(&mut self, new: NewRequest) {
        assert!(!new.prompt.is_empty() && new.prompt.len() < self.config.max_model_len);
        let request = Request::new(new, self.config.block_size as usize, &mut self.hasher);
        self.waiting.push_back(request);
    }

    /// Drops a request. Its blocks are free at once, unless a pull may still write to them, or read them.
    pub fn abort(&mut self, key: u64) {
        if let Some(at) = self.running.iter().position(|request| request.key == key) {
            let mut request = self.running.remove(at);
            self.let_go(&mut request);
        } else if let Some(at) = self.waiting.iter().position(|request| request.key == key) {
            self.waiting.remove(at);
        } else if let Some(at) = self.pulled.iter().position(|request| request.key == key)
            && let Some(request) = self.pulled.remove(at)
        {
            self.free(request.blocks);
        } else if let Some(at) = self.pulling.iter().position(|request| request.key == key) {
            let request = self.pulling.swap_remove(at);
            self.messages.push(ToAgent::Cancel { request_id: request.id.clone() });
            self.aborted.insert(request.id, request.blocks);
        }
    }

    /// Plans a step. No rows and no preemption means that nothing can be done until something is reported.
    pub fn schedule(&mut self) -> (Vec<Row>, usize) {
        let mut rows = Vec::with_capacity(self.running.len() + 1);
        let mut budget = self.config.max_num_batched_tokens;
        let preempted = self.schedule_running(&mut rows, &mut budget);
        if preempted == 0 {
            while budget > 0 && self.running.len() < self.config.max_num_seqs {
                if !self.admit(&mut rows, &mut budget) {
                    break;
                }
            }
        }
        (rows, preempted)
    }

    fn schedule_running(&mut self, rows: &mut Vec<Row>, budget: &mut usize) -> usize {
        let mut preempted = 0;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let request = &self.running[index];
            let len = (request.tokens.len() - request.computed).min(*budget);
            let missing = self.blocks_for(request.computed + len).saturating_sub(request.blocks.len());
            while missing > self.pool.num_free() && self.running.len() > index {
                let victim = self.running.pop().expect("a request is running");
                self.preempt(victim);
                preempted += 1;
            }
            if self.running.len() == index {
                break;
            }
            rows.push(self.advance(index, missing, len));
            *budget -= len;
            index += 1;
        }
        preempted
    }

    /// Gives a running request its missing blocks and schedules its next `len` tokens.
    fn advance(&mut self, index: usize, missing: usize, len: usize) -> Row {
        let request = &mut self.running[index];
        self.pool.allocate(missing, &mut request.blocks).expect("free blocks were counted");
        let start = request.computed;
        request.computed += len;
        let samples = request.computed == request.tokens.len();
        cache(&mut self.pool, request, self.config.block_size);
        Row { running: index, start, len, samples }
    }

    /// Admits the next request, to run or to pull. `false` where none can be.
    fn admit(&mut self, rows: &mut Vec<Row>, budget: &mut usize) -> bool {
        let from_pulled = !self.pulled.is_empty();
        let queue = if from_pulled { &mut self.pulled } else { &mut self.waiting };
        let Some(mut request) = queue.pop_front() else { return false };
        let admitted = self.admit_one(&mut request, *budget);
        match admitted {
            None => {
                let queue = if from_pulled { &mut self.pulled } else { &mut self.waiting };
                queue.push_front(request);
                false
            }
            Some(0) => {
                self.pulling.push(request);
                true
            }
            Some(len) => {
                let missing = self.blocks_for(request.computed + len).saturating_sub(request.blocks.len());
                self.running.push(request);
                rows.push(self.advance(self.running.len() - 1, missing, len));
                *budget -= len;
                true
            }
        }
    }

    /// How many tokens to compute for this request now; 0 where its pull was begun, `None` where there is no room.
    fn admit_one(&mut self, request: &mut Request, budget: usize) -> Option<usize> {
        let fresh = request.computed == 0;
        let hits = if fresh { self.lookup(request) } else { Vec::new() };
        let local = hits.len() * self.config.block_size as usize;
        let external = match self.epoch {
            Some(_) if fresh => request.pullable(local, self.config.block_size as usize),
            _ => 0,
        };

        // A request is admitted once all its tokens so far fit; a pull, once it leaves what others still need.
        let all = self.blocks_for(request.tokens.len());
        let evictable = hits.iter().filter(|id| self.pool.is_free(**id)).count();
        let wanted = all.saturating_sub(request.blocks.len() + hits.len()) + evictable;
        let reserved = if external > 0 { self.reserved() } else { 0 };
        if wanted + reserved > self.pool.num_free() {
            return None;
        }

        if fresh {
            self.stats.queries += request.tokens.len() as u64;
            self.stats.hits += local as u64;
            if self.epoch.is_some() {
                self.stats.external_queries += (request.tokens.len() - local) as u64;
                self.stats.external_hits += external as u64;
            }
            if request.preemptions == 0 {
                request.prefill = Some(PrefillStats { prompt: request.prompt_len, local, external });
            }
            for id in &hits {
                self.pool.touch(*id);
            }
            request.cached = hits.len();
            request.blocks = hits;
            request.computed = local + external;
        }
        if external > 0 {
            self.begin_pull(request);
            return Some(0);
        }
        Some((request.tokens.len() - request.computed).min(budget))
    }

    fn lookup(&self, request: &Request) -> Vec<BlockId> {
        // The last token is always computed, for the next one follows from that step.
        let most = (request.tokens.len() - 1) / self.config.block_size as usize;
        request.hashes[..most].iter().map_while(|hash| self.pool.lookup(*hash)).collect()
    }

    /// Blocks that requests under way still need for the tokens they have: who runs, and who pulls or has pulled a part.
    fn reserved(&self) -> usize {
        let missing =
            |request: &Request| self.blocks_for(request.tokens.len()).saturating_sub(request.blocks.len());
        self.running.iter().chain(&self.pulling).chain(&self.pulled).map(missing).sum()
    }

    /// Gets blocks for what is there when the pull is over, and none yet for what is computed then.
    fn begin_pull(&mut self, request: &mut Request) {
        let Some(plan) = &request.plan else { return };
        let Action::Pull { source, deadline_ms, .. } = &plan.action else { return };
        let first = request.blocks.len();
        let missing = self.blocks_for(request.computed) - first;
        self.pool.allocate(missing, &mut request.blocks).expect("free blocks were counted");
        request.pulled = true;
        request.pull_first = first;
        self.messages.push(ToAgent::Pull(Pull {
            request_id: request.id.clone(),
            transfer_id: plan.transfer_id,
            source: source.clone(),
            deadline_ms: *deadline_ms,
            content: content(request, request.computed),
            first_block: first as u32,
            block_ids: request.blocks[first..].to_vec(),
        }));
    }

    /// Takes the sampled tokens of a step, in order of those of its rows that sample.
    pub fn complete(&mut self, rows: &[Row], sampled: impl IntoIterator<Item = u32>) -> Vec<Output> {
        for row in rows {
            let message = grow(&mut self.running[row.running], row, self.epoch, self.config.block_size);
            self.messages.extend(message);
        }
        let mut sampled = sampled.into_iter();
        let mut outputs = Vec::new();
        for row in rows.iter().filter(|row| row.samples) {
            let token = sampled.next().expect("every sampling row has its token");
            let request = &mut self.running[row.running];
            let end = request.append(token, self.config.max_model_len);
            request.hash_full_blocks(self.config.block_size as usize, &mut self.hasher);
            let prefill = request.prefill.take().filter(|_| request.outputs() == 1);
            let finish = end.map(|(reason, stop_token)| {
                request.finished = true;
                let blocks = std::mem::take(&mut request.blocks);
                let held = held(request, self.epoch);
                let hold = held.as_ref().filter(|_| request.holding == Holding::No).and_then(|_| {
                    let whole = request.prompt_len.div_ceil(self.config.block_size as usize);
                    hold(request, blocks[..whole].to_vec())
                });
                match held {
                    Some(_) => drop(self.held.insert(request.id.clone(), blocks)),
                    None => self.pool.free(blocks.into_iter().rev()),
                }
                self.messages.extend(hold.map(ToAgent::Hold));
                Finish { reason, stop_token, held }
            });
            outputs.push(Output { key: request.key, token, prefill, finish });
        }
        self.running.retain(|request| !request.finished);
        outputs
    }

    /// The agent accepted the connector; from now on plans are followed.
    pub fn connector_up(&mut self, epoch: Epoch) {
        self.epoch = Some(epoch);
    }

    /// The connection to the agent is gone, and so nothing reads or writes blocks any more: pulls have failed, holds are
    /// released.
    pub fn connector_down(&mut self) {
        self.epoch = None;
        self.messages.clear();
        for request in std::mem::take(&mut self.pulling) {
            let first = request.pull_first;
            self.end_pull(request, Some(first));
        }
        for request in &mut self.running {
            if let Holding::Blocks(_) = request.holding {
                request.holding = Holding::Over;
            }
        }
        let unread = std::mem::take(&mut self.aborted).into_values();
        for blocks in unread.chain(std::mem::take(&mut self.held).into_values()) {
            self.free(blocks);
        }
    }

    /// A pull is over. With an error and no failed blocks, all of them count as failed.
    pub fn pull_done(&mut self, request_id: &str, failed: &[BlockId], error: &str) {
        if let Some(blocks) = self.aborted.remove(request_id) {
            self.free(blocks);
            return;
        }
        let Some(at) = self.pulling.iter().position(|request| request.id == request_id) else { return };
        let request = self.pulling.swap_remove(at);
        let pulled = &request.blocks[request.pull_first..];
        let first_failed = match failed.is_empty() && !error.is_empty() {
            true => Some(request.pull_first),
            false => pulled.iter().position(|id| failed.contains(id)).map(|at| at + request.pull_first),
        };
        self.end_pull(request, first_failed);
    }

    fn end_pull(&mut self, mut request: Request, first_failed: Option<usize>) {
        if let Some(index) = first_failed {
            request.computed = index * self.config.block_size as usize;
            if request.computed == 0 {
                request.cached = 0;
                let blocks = std::mem::take(&mut request.blocks);
                self.free(blocks);
            }
        }
        cache(&mut self.pool, &mut request, self.config.block_size);
        if request.computed == request.tokens.len() {
            request.computed -= 1;
        }
        self.pulled.push_back(request);
    }

    /// The agent has no more use for the blocks of these requests.
    pub fn released<'a>(&mut self, request_ids: impl IntoIterator<Item = &'a str>) {
        for id in request_ids {
            if let Some(blocks) = self.held.remove(id) {
                self.free(blocks);
            } else if let Some(request) = self.running.iter_mut().find(|request| request.id == id) {
                // Its lease ran out, or nobody wants it any more.
                request.holding = Holding::Over;
            }
        }
    }

    /// Forgets the prefix cache. Refused, with `false`, while blocks are in use; with `preempt_running`, running requests
    /// give theirs back first and start over.
    pub fn reset_prefix_cache(&mut self, preempt_running: bool) -> bool {
        if preempt_running {
            while let Some(request) = self.running.pop() {
                self.preempt(request);
            }
        }
        self.pool.reset()
    }

    fn preempt(&mut self, mut request: Request) {
        self.let_go(&mut request);
        (request.computed, request.cached) = (0, 0);
        request.preemptions += 1;
        self.stats.preemptions += 1;
        self.waiting.push_front(request);
    }

    /// Takes a request's blocks before it is over. Where its prompt is held they are free when the agent says so.
    fn let_go(&mut self, request: &mut Request) {
        let blocks = std::mem::take(&mut request.blocks);
        match request.holding {
            Holding::Blocks(_) => {
                self.messages.push(ToAgent::Cancel { request_id: request.id.clone() });
                self.held.insert(request.id.clone(), blocks);
                request.holding = Holding::Over;
            }
            Holding::No | Holding::Over => self.free(blocks),
        }
    }

    /// Frees a request's blocks from its tail.
    fn free(&mut self, blocks: Vec<BlockId>) {
        self.pool.free(blocks.into_iter().rev());
    }

    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.config.block_size as usize)
    }

    /// The running requests, to which rows refer.
    pub fn running(&self) -> &[Request] {
        &self.running
    }

    /// A running request.
    pub fn running_mut(&mut self, index: usize) -> &mut Request {
        &mut self.running[index]
    }

    /// Whether a step may find something to do.
    pub fn has_work(&self) -> bool {
        !(self.running.is_empty() && self.waiting.is_empty() && self.pulled.is_empty())
    }

    /// Messages for the agent, in order.
    pub fn take_messages(&mut self) -> Vec<ToAgent> {
        std::mem::take(&mut self.messages)
    }

    /// Changes of the cache, in order.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.pool.take_events()
    }

    /// The pool, for checks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The blocks of everyone who references some, for checks.
    pub fn block_users(&self) -> impl Iterator<Item = &[BlockId]> {
        let requests = self.running.iter().chain(&self.waiting).chain(&self.pulling).chain(&self.pulled);
        let others = self.aborted.values().chain(self.held.values());
        requests.map(|request| request.blocks.as_slice()).chain(others.map(Vec::as_slice))
    }

    /// Counters and what is going on.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len() + self.pulled.len(),
            pulling: self.pulling.len(),
            held: self.held.len(),
            usage: self.pool.usage(),
            ..self.stats
        }
    }
}

/// Caches the request's full blocks whose KV is computed.
fn cache(pool: &mut BlockPool, request: &mut Request, block_size: u32) {
    let size = block_size as usize;
    let (from, to) = (request.cached, request.computed / size);
    if from >= to {
        return;
    }
    let blocks: Vec<_> =
        request.blocks[from..to].iter().copied().zip(request.hashes[from..to].iter().copied()).collect();
    request.cached = to;
    let request = &*request;
    pool.cache(&blocks, |block_hashes| BlockStored {
        block_hashes,
        parent_block_hash: from.checked_sub(1).map(|parent| request.hashes[parent].external()),
        token_ids: request.tokens[from * size..to * size].to_vec(),
        block_size,
        lora: request.keys.lora.clone(),
        extra_keys: (from..to).map(|index| request.keys.of_block(index)).collect(),
    });
}

/// What is said of a finished request's hold, where its plan and the connector allow one.
fn held(request: &Request, epoch: Option<Epoch>) -> Option<Held> {
    let (plan, epoch) = (request.plan.as_ref()?, epoch?);
    let holds = matches!(plan.action, Action::Hold { .. }) && request.holding != Holding::Over;
    let num_tokens = request.prompt_len as u32;
    holds.then_some(Held { transfer_id: plan.transfer_id, epoch, num_tokens })
}

/// The hold of a request's prompt, of which these blocks are computed.
fn hold(request: &Request, block_ids: Vec<BlockId>) -> Option<Hold> {
    let plan = request.plan.as_ref()?;
    let Action::Hold { lease_ms } = plan.action else { return None };
    Some(Hold {
        request_id: request.id.clone(),
        transfer_id: plan.transfer_id,
        lease_ms,
        content: content(request, request.prompt_len),
        block_ids,
    })
}

/// What the agent is told of a prompt that takes several steps, behind one of them.
fn grow(request: &mut Request, row: &Row, epoch: Option<Epoch>, block_size: u32) -> Option<ToAgent> {
    epoch?;
    let (computed, size) = (row.start + row.len, block_size as usize);
    let is_whole = computed >= request.prompt_len;
    let blocks = if is_whole { request.prompt_len.div_ceil(size) } else { computed / size };
    let first = match request.holding {
        Holding::No if !is_whole => {
            let hold = hold(request, request.blocks[..blocks].to_vec())?;
            request.holding = Holding::Blocks(blocks);
            return Some(ToAgent::Hold(hold));
        }
        Holding::Blocks(first) if first < blocks => first,
        _ => return None,
    };
    request.holding = Holding::Blocks(blocks);
    Some(ToAgent::Computed(Computed {
        request_id: request.id.clone(),
        first_block: first as u32,
        block_ids: request.blocks[first..blocks].to_vec(),
    }))
}

/// What the KV of the first `len` tokens is computed from.
fn content(request: &Request, len: usize) -> Content {
    let tokens = &request.tokens[..len];
    Content {
        tokens: tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
        keys: ContentKeys {
            lora: request.keys.lora.as_ref().map(|(_, name)| name.clone()),
            salt: request.keys.salt.clone(),
            multimodal: Vec::new(),
        },
    }
}
