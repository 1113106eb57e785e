//! One vLLM engine in virtual time.
//!
//! # The model
//! Requests wait in order of arrival. Before each step the scheduler gives every running sequence that decodes one token, prompts that
//! are being computed their next chunk, and then lets waiting requests in while there is room among `max_num_seqs`, in the step's
//! `max_num_batched_tokens`, and in the [pool](pool::BlockPool) for the whole prompt. Without chunked prefill a prompt is computed in one step or not yet. When the pool
//! has no block for the next token of a sequence, the sequence that was let in last is preempted: it gives up its blocks and waits in front, to be computed
//! again as far as its blocks are not cached any more. A prompt's last token is always computed, also where all of it is cached. Steps follow each other
//! without a pause; how long they take is in [`speed`].
//!
//! A request may come with KV that lies elsewhere: when its turn comes it gets its blocks, [`Output::Fetch`] says what is missing, and it is let
//! in when [`Engine::fetched`] was called. A request may keep its blocks when it ends ([`Job::hold`]), until [`Engine::release`]; of one whose prompt takes several steps
//! [`Output::Computed`] says what of it is there to be fetched. A request that nobody wants any more is [aborted](Engine::abort).
//!
//! An engine may have a second tier of blocks in its host's memory ([`host`]). What is found there behind what the GPU has cached of a prompt is copied
//! instead of computed: the request gets its blocks, waits for the copy, which begins when those before it are over, and is let in. A request that can fetch more than that from
//! elsewhere does so instead. Copies to the host take the other direction of the bus and no time of anybody's.
//!
//! An engine that dies ([`Engine::stop`]) loses its requests and its cache ([`Engine::restart`]).
//!
//! # Coarse where that is exact
//! As long as the same sequences decode, nothing else runs and blocks suffice, the steps until the next sequence ends are taken together: their
//! lengths grow evenly, so the sum is known. A request that arrives meanwhile cuts the run at the next step's border. Nothing that a caller can see
//! differs from single steps, but that [events](events::KvEvents) of blocks filled meanwhile come at the end of the run, and that they are offered to the host then, one sequence's after another's.
//!
//! # Where it differs from vLLM
//! Blocks of a whole prompt are taken when it is let in, not chunk by chunk. No speculative decoding, no priorities, one cache group.

pub mod events;
pub mod host;
pub mod pool;
mod schedule;
pub mod speed;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use self::events::KvEvents;
use self::host::HostTier;
use self::pool::BlockPool;
use self::speed::Speed;
use crate::Nanos;

/// What an engine is started with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// How fast it is.
    pub speed: Speed,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks of its pool.
    pub blocks: u32,
    /// Most sequences that run at once.
    pub max_num_seqs: u32,
    /// Most tokens that a step computes, at least [`Settings::max_num_seqs`].
    pub max_num_batched_tokens: u32,
    /// Whether prompts are computed in chunks.
    pub chunked_prefill: bool,
    /// Whether it tells of its blocks.
    pub kv_events: bool,
    /// Blocks that its host keeps for it; 0 for no such tier.
    pub host_blocks: u32,
    /// How long the copy of one of them to the GPU takes, in seconds.
    pub host_block_seconds: f64,
}

/// A request to one engine.
#[derive(Clone, Debug)]
pub struct Job {
    /// The caller's name for it.
    pub key: u32,
    /// Ids of the whole blocks of prompt and output.
    pub ids: Arc<[u64]>,
    /// Tokens of its prompt, at least 1.
    pub prompt_tokens: u32,
    /// Tokens that it generates, at least 1.
    pub output_tokens: u32,
    /// Leading tokens of the prompt whose KV can be fetched.
    pub remote_tokens: u32,
    /// Whether its blocks stay when it ends, until [`Engine::release`].
    pub hold: bool,
}

/// A request on its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(u32);

/// What an engine says, in the order in which it happened; all at the time of the call that it came out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The request was let in.
    Started {
        /// Which.
        key: u32,
        /// Leading tokens that the engine had cached, in any tier.
        hit_tokens: u32,
    },
    /// The request has blocks for KV that lies elsewhere.
    Fetch {
        /// Which.
        key: u32,
        /// Tokens to be fetched: those of the remote ones that the engine has not cached. May be 0: nothing is fetched then,
        /// and [`Engine::fetched`] must not be called.
        tokens: u32,
    },
    /// A step has computed a chunk of a prompt whose blocks will be held, and more is left.
    Computed {
        /// Which.
        key: u32,
        /// Leading tokens of it whose KV is there.
        tokens: u32,
    },
    /// The request's first token on this engine.
    FirstToken {
        /// Which.
        key: u32,
    },
    /// The request's last token.
    Finished {
        /// Which.
        key: u32,
    },
    /// So many tokens came this long after the token before them in their sequence.
    Gaps {
        /// The time between.
        gap: Nanos,
        /// How many.
        count: u64,
    },
}

/// How an engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests that wait to be let in, those whose KV is being fetched or copied included.
    pub waiting: u32,
    /// Sequences that run.
    pub running: u32,
    /// Blocks that nobody uses.
    pub free_blocks: u32,
}

/// What an engine did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Time in steps that computed prompts.
    pub prefill: Nanos,
    /// Time in steps that only decoded.
    pub decode: Nanos,
    /// Tokens of prompts that were computed, those computed again included.
    pub prefill_tokens: u64,
    /// Tokens of prompts that were copied from the host's memory.
    pub loaded_tokens: u64,
    /// Tokens that were generated.
    pub output_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Sequences that were preempted.
    pub preemptions: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Fetching,
    /// Its KV was fetched; it waits with its blocks.
    Ready,
    Prefill,
    Decode,
    Held,
}

#[derive(Debug)]
struct Sequence {
    job: Job,
    state: State,
    generated: u32,
    /// Tokens whose KV is there.
    computed: u32,
    /// Leading blocks that can be found by others.
    published: u32,
    /// Leading blocks that were offered to the host.
    offered: u32,
    blocks: Vec<u32>,
    last_token: Nanos,
}

impl Sequence {
    /// Tokens whose KV the next token needs.
    fn tokens(&self) -> u32 {
        self.job.prompt_tokens + self.generated
    }
}

/// What is being computed.
#[derive(Clone, Copy, Debug)]
struct Work {
    start: Nanos,
    end: Nanos,
    /// Steps; more than 1 only where all of them just decode.
    steps: u32,
    /// Whether it computes prompts, too.
    prompts: bool,
    /// Seconds of the first step, and by how much each one is longer than the one before.
    first: f64,
    growth: f64,
    sequences: u32,
}

impl Work {
    /// Seconds that so many of the steps take.
    fn seconds(&self, steps: u32) -> f64 {
        let steps = f64::from(steps);
        steps * self.first + self.growth * steps * (steps - 1.0) / 2.0
    }

    fn end_of(&self, steps: u32) -> Nanos {
        self.start + crate::nanos(self.seconds(steps))
    }
}

/// A copy from the host's memory.
#[derive(Clone, Copy, Debug)]
struct Copying {
    ends: Nanos,
    sequence: u32,
    tokens: u32,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    pool: BlockPool,
    host: Option<HostTier>,
    /// One after another.
    copies: VecDeque<Copying>,
    sequences: Vec<Sequence>,
    vacant: Vec<u32>,
    waiting: VecDeque<u32>,
    fetching: u32,
    /// In the order in which they were let in.
    running: Vec<u32>,
    /// The prompts of the step that is being computed, with the tokens of each.
    chunks: Vec<(u32, u32)>,
    work: Option<Work>,
    is_down: bool,
    version: u64,
    outputs: Vec<Output>,
    totals: Totals,
}

impl Engine {
    /// An idle engine with an empty cache.
    pub fn new(settings: Settings) -> Self {
        Self {
            pool: BlockPool::new(settings.blocks, settings.kv_events),
            host: (settings.host_blocks > 0).then(|| HostTier::new(settings.host_blocks, settings.kv_events)),
            copies: VecDeque::new(),
            settings,
            sequences: Vec::new(),
            vacant: Vec::new(),
            waiting: VecDeque::new(),
            fetching: 0,
            running: Vec::new(),
            chunks: Vec::new(),
            work: None,
            is_down: false,
            version: 0,
            outputs: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// What it was started with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What it did so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Time that it computed, up to now.
    pub fn busy(&self, now: Nanos) -> Nanos {
        let current = self.work.as_ref().map_or(0, |work| now.saturating_sub(work.start));
        self.totals.prefill + self.totals.decode + current
    }

    /// How it is doing.
    pub fn load(&self) -> Load {
        Load {
            waiting: self.waiting.len() as u32 + self.fetching,
            running: self.running.len() as u32,
            free_blocks: self.pool.free(),
        }
    }

    /// Whether its pool could hold the request, were it empty.
    pub fn fits(&self, prompt_tokens: u32, output_tokens: u32) -> bool {
        let tokens = u64::from(prompt_tokens) + u64::from(output_tokens);
        let chunk = self.settings.chunked_prefill || prompt_tokens <= self.settings.max_num_batched_tokens;
        chunk && tokens.div_ceil(u64::from(self.settings.block_tokens)) <= u64::from(self.pool.len())
    }

    /// Leading tokens of a prompt that are cached, in any tier.
    pub fn cached(&self, ids: &[u64]) -> u32 {
        let hits = self.pool.hits(ids);
        (hits + self.host_hits(&ids[hits..])) as u32 * self.settings.block_tokens
    }

    fn host_hits(&self, ids: &[u64]) -> usize {
        self.host.as_ref().map_or(0, |host| host.hits(ids))
    }

    /// When [`Engine::wake`] is to be called, and the version of this answer: a call with another version comes too early or too late, and
    /// is to be left out.
    pub fn next(&self) -> Option<(Nanos, u64)> {
        let (step, copy) = (self.work.map(|work| work.end), self.copies.front().map(|copy| copy.ends));
        step.into_iter().chain(copy).min().map(|at| (at, self.version))
    }

    /// Takes what it said.
    pub fn take_outputs(&mut self, into: &mut Vec<Output>) {
        into.append(&mut self.outputs);
    }

    /// What changed in its cache. To be asked when it woke: vLLM tells of its blocks at the end of a step.
    pub fn take_events(&mut self) -> Option<KvEvents> {
        let events = self.pool.take_events();
        let Some(of_host) = self.host.as_mut().and_then(HostTier::take_events) else { return events };
        let mut events = events.unwrap_or_default();
        events.append(&of_host);
        Some(events)
    }

    /// A request arrives.
    ///
    /// # Panics
    /// Where the request does not [fit](Engine::fits).
    pub fn submit(&mut self, now: Nanos, job: Job) -> Handle {
        assert!(self.fits(job.prompt_tokens, job.output_tokens), "the caller asks first");
        let sequence = Sequence {
            job,
            state: State::Waiting,
            generated: 0,
            computed: 0,
            published: 0,
            offered: 0,
            blocks: Vec::new(),
            last_token: now,
        };
        let at = match self.vacant.pop() {
            Some(at) => {
                let blocks = std::mem::take(&mut self.sequences[at as usize].blocks);
                self.sequences[at as usize] = Sequence { blocks, ..sequence };
                at
            }
            None => {
                self.sequences.push(sequence);
                self.sequences.len() as u32 - 1
            }
        };
        self.waiting.push_back(at);
        self.interrupt(now);
        Handle(at)
    }

    /// The KV that a request waits for is there, as many tokens of it as came; the others are computed.
    pub fn fetched(&mut self, now: Nanos, handle: Handle, tokens: u32) {
        let sequence = &mut self.sequences[handle.0 as usize];
        debug_assert_eq!(sequence.state, State::Fetching);
        // At least one token is left to compute: the next one comes out of it.
        sequence.computed = (sequence.computed + tokens).min(sequence.tokens() - 1);
        sequence.job.remote_tokens = 0;
        sequence.state = State::Ready;
        self.fetching -= 1;
        self.publish(handle.0);
        self.waiting.push_front(handle.0);
        self.interrupt(now);
    }

    /// Frees the blocks that an ended request kept.
    pub fn release(&mut self, now: Nanos, handle: Handle) {
        debug_assert_eq!(self.sequences[handle.0 as usize].state, State::Held);
        self.vacate(handle.0);
        self.interrupt(now);
    }

    /// Drops a request, which says nothing more. What the step in hand computes of it is computed.
    pub fn abort(&mut self, now: Nanos, handle: Handle) {
        let at = handle.0;
        match self.sequences[at as usize].state {
            State::Waiting | State::Ready => self.waiting.retain(|other| *other != at),
            State::Fetching => {
                self.fetching -= 1;
                self.copies.retain(|copy| copy.sequence != at);
                self.version += 1;
            }
            State::Prefill | State::Decode => {
                self.running.retain(|other| *other != at);
                let new = self.chunks.extract_if(.., |chunk| chunk.0 == at).map(|chunk| chunk.1).sum::<u32>();
                self.totals.prefill_tokens += u64::from(new);
            }
            State::Held => {}
        }
        self.vacate(at);
        self.interrupt(now);
    }

    /// The time of [`Engine::next`] has come.
    pub fn wake(&mut self, now: Nanos) {
        if let Some(work) = self.work.filter(|work| work.end <= now) {
            self.work = None;
            // A copy may be what comes next.
            self.version += 1;
            self.complete(now, &work);
        }
        while let Some(copy) = self.copies.pop_front_if(|copy| copy.ends <= now) {
            self.version += 1;
            self.totals.loaded_tokens += u64::from(copy.tokens);
            self.fetched(now, Handle(copy.sequence), copy.tokens);
        }
        if self.work.is_none() {
            self.schedule(now);
        }
    }

    /// The copy of so many tokens' blocks begins, or waits for those before it.
    fn copy(&mut self, now: Nanos, sequence: u32, tokens: u32) {
        let begins = self.copies.back().map_or(now, |copy| copy.ends.max(now));
        let blocks = f64::from(tokens / self.settings.block_tokens);
        let ends = begins + crate::nanos(blocks * self.settings.host_block_seconds).max(1);
        self.copies.push_back(Copying { ends, sequence, tokens });
        self.version += 1;
    }

    /// The engine dies. What its steps have made by now it still says; then it does nothing, until [`Engine::restart`] was called and a
    /// request comes.
    pub fn stop(&mut self, now: Nanos) {
        if let Some(mut work) = self.work.take() {
            let (mut low, mut high) = (0, work.steps);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                if work.end_of(middle) <= now { low = middle } else { high = middle - 1 }
            }
            // The step in hand is lost, but not its time.
            let lost = now - if low > 0 { work.end_of(low) } else { work.start };
            match work.prompts {
                true => self.totals.prefill += lost,
                false => self.totals.decode += lost,
            }
            if low > 0 {
                (work.steps, work.end) = (low, work.end_of(low));
                self.complete(now, &work);
            }
        }
        self.is_down = true;
    }

    /// Forgets all requests and everything cached, as a new process has none of it. What it did is still counted. `is_down`: whether it stays away.
    pub fn restart(&mut self, is_down: bool) {
        let (totals, version) = (self.totals, self.version + 1);
        *self = Self { totals, version, is_down, ..Self::new(self.settings) };
    }

    /// Whether it died and is not back.
    pub fn is_down(&self) -> bool {
        self.is_down
    }

    /// Something changed that the next step may depend on.
    fn interrupt(&mut self, now: Nanos) {
        match &mut self.work {
            None if self.is_down => {}
            None => self.schedule(now),
            Some(work) if work.steps > 1 => {
                // The step in hand is the first one that ends now or later; sums of its length grow with each step.
                let (mut low, mut high) = (1, work.steps);
                while low < high {
                    let middle = low + (high - low) / 2;
                    if work.end_of(middle) >= now { high = middle } else { low = middle + 1 }
                }
                if low < work.steps {
                    work.steps = low;
                    work.end = work.end_of(low);
                    self.version += 1;
                }
            }
            Some(_) => {}
        }
    }

    /// Gives back a sequence's blocks and its place.
    fn vacate(&mut self, at: u32) {
        let mut blocks = std::mem::take(&mut self.sequences[at as usize].blocks);
        self.pool.release(&blocks);
        blocks.clear();
        self.sequences[at as usize].blocks = blocks;
        self.vacant.push(at);
    }

    /// Lets others find the blocks whose KV is there.
    fn publish(&mut self, at: u32) {
        let sequence = &mut self.sequences[at as usize];
        let computed = sequence.computed;
        publish(&mut self.pool, &mut self.host, sequence, self.settings.block_tokens, computed);
    }
}

/// Lets others find the blocks of these leading tokens, and offers them to the host.
fn publish(
    pool: &mut BlockPool,
    host: &mut Option<HostTier>,
    sequence: &mut Sequence,
    block_tokens: u32,
    tokens: u32,
) {
    let whole = (tokens / block_tokens).min(sequence.job.ids.len() as u32);
    let parent = |at: u32| at.checked_sub(1).map(|before| sequence.job.ids[before as usize]);
    while sequence.published < whole {
        let at = sequence.published;
        pool.publish(sequence.blocks[at as usize], parent(at), sequence.job.ids[at as usize]);
        sequence.published += 1;
    }
    if let Some(host) = host.as_mut().filter(|_| sequence.offered < whole) {
        host.offer(parent(sequence.offered), &sequence.job.ids[sequence.offered as usize..whole as usize]);
        sequence.offered = whole;
    }
}
