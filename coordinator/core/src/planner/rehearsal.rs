//! What would have become of the last requests.
//!
//! # Model
//! An engine computes prompts one after another, each in `a + b·n + c·(n·p + n²/2)` seconds ([`crate::speed`]). All that decode on it share steps of
//! `d + e·B + f·Σctx` seconds, and stand still while a prompt is computed. A sequence whose tokens find no room in the KV cache waits until others have
//! ended. Transfers between hosts queue for the cards of both; those within a host do not queue. Of a prompt in several chunks all but the last one may go while
//! the rest is computed ([`crate::cost::overlap`]).
//! Of a prompt is cached what an earlier request of the window with the same beginning left where it was served, unless more tokens than the
//! cache takes came there since.
//!
//! Each request goes where it adds least, as in [`crate::cost`], but whole where no engine only decodes, and else in two parts.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

use super::pool::{Seen, share};
use crate::cost::overlap::{early_seconds, last_share};
use crate::cost::{MOST_SECOND_COPY_SECONDS, SHARERS};
use crate::kv_index::Slot;
use crate::speed::{CHUNK_TOKENS, Speed};

/// Requests that the beginning of a prompt is traced back over.
const ANCESTORS: usize = 6;
/// The first so many of the requests are served but not judged: they find the engines idle.
const SKIPPED: f64 = 0.2;
/// What it counts, in seconds, if a sequence finds no room at all in a cache; it is more than any wait.
const NO_ROOM_SECONDS: f64 = 100.0;

/// An engine that takes part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) speed: Speed,
    /// Engines with the same number share a card.
    pub(super) host: u32,
    /// What its cache takes.
    pub(super) kv_tokens: f64,
    /// Bytes that a token's KV takes on its way to it within its host.
    pub(super) token_bytes: f64,
    /// The same from another one.
    pub(super) wire_token_bytes: f64,
    /// [`crate::fleet::EngineInfo::chunk_tokens`].
    pub(super) chunk_tokens: u32,
}

/// How fast transfers are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roads {
    /// Between two hosts, bytes per second.
    pub(super) between: f64,
    /// Within one.
    pub(super) within: f64,
    /// All round trips of a transfer, seconds.
    pub(super) round_trips: f64,
}

/// What is rehearsed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Play<'a> {
    pub(super) members: &'a [Member],
    /// Their numbers, in order of slots.
    pub(super) slots: &'a [(Slot, u32)],
    pub(super) roads: Roads,
    pub(super) window: &'a VecDeque<Seen>,
    /// The number of the window's first request.
    pub(super) first: u64,
    /// Of an answer that is not over.
    pub(super) answer_tokens: f64,
}

/// Orders by time, then by number.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Event<T> {
    at: f64,
    number: usize,
    what: T,
}

impl<T: PartialEq> Eq for Event<T> {}

impl<T: PartialEq> PartialOrd for Event<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: PartialEq> Ord for Event<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.number.cmp(&other.number))
    }
}

/// A prompt that is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Computed {
    /// Where.
    engine: u32,
    /// For how long before that its KV could leave.
    early: f64,
}

/// A request, once its first token is there.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sequence {
    context: f64,
    /// When the last token is late.
    late: f64,
    judged: bool,
    /// Whether the first token was in time.
    in_time: bool,
}

/// An engine.
#[derive(Clone, Debug, Default)]
struct Engine {
    /// When it has computed all prompts.
    free: f64,
    /// Up to when its steps are counted, and how many there were.
    clock: f64,
    steps: f64,
    /// By the number of steps at which they end.
    decoding: BinaryHeap<Reverse<Event<Sequence>>>,
    context: f64,
    /// Tokens that ever came into its cache.
    stored: f64,
}

impl Engine {
    fn reset(&mut self, now: f64) {
        self.decoding.clear();
        *self =
            Self { free: now, clock: now, decoding: std::mem::take(&mut self.decoding), ..Self::default() };
    }

    fn step(&self, speed: &Speed) -> f64 {
        speed.decode_step_seconds(self.decoding.len() as f64, self.context)
    }

    /// When the next sequence has its last token, as long as nothing else comes.
    fn next_end(&self, speed: &Speed) -> Option<f64> {
        let Reverse(next) = self.decoding.peek()?;
        Some(self.clock + (next.at - self.steps).max(0.0) * self.step(speed))
    }

    /// Decodes until then; those that end are judged.
    fn advance(&mut self, until: f64, speed: &Speed, verdicts: &mut [Option<bool>]) {
        while let Some(end) = self.next_end(speed).filter(|end| *end <= until) {
            self.end_next(end, verdicts);
        }
        if !self.decoding.is_empty() && until > self.clock {
            self.steps += (until - self.clock) / self.step(speed);
        }
        self.clock = self.clock.max(until);
    }

    fn end_next(&mut self, at: f64, verdicts: &mut [Option<bool>]) {
        let Some(Reverse(ended)) = self.decoding.pop() else { return };
        (self.clock, self.steps) = (at, self.steps.max(ended.at));
        self.context -= ended.what.context;
        if ended.what.judged {
            verdicts[ended.number] = Some(ended.what.in_time && at <= ended.what.late);
        }
    }

    /// Decodes until then, and as long as there is no room for so many tokens.
    fn make_room(&mut self, from: f64, tokens: f64, member: &Member, verdicts: &mut [Option<bool>]) {
        self.advance(from, &member.speed, verdicts);
        while self.context + tokens > member.kv_tokens {
            let Some(end) = self.next_end(&member.speed) else { break };
            self.end_next(end, verdicts);
        }
    }

    /// What one more sequence costs, itself and the others.
    fn decode_seconds(&self, speed: &Speed, context: f64, steps: f64) -> f64 {
        let beside = self.decoding.len() as f64;
        let step = speed.decode_step_seconds(beside + 1.0, self.context + context);
        steps * (step + beside * (speed.sequence_seconds + speed.context_seconds * context))
    }
}

/// A request in the course of a rehearsal.
#[derive(Clone, Copy, Debug)]
struct Request {
    number: usize,
    at: f64,
    prompt: f64,
    tokens: f64,
    /// Of its decode on average.
    context: f64,
    /// After the first token.
    steps: f64,
}

/// Rehearsals, one after another in the same memory.
#[derive(Debug, Default)]
pub(super) struct Rehearsal {
    engines: Vec<Engine>,
    /// Of each request: where it was served, and what had come into the caches there by then.
    served: Vec<[(u32, f64); 2]>,
    /// Prompts, by when they are computed.
    computed: BinaryHeap<Reverse<Event<Computed>>>,
    /// What engines hold of a prompt.
    hits: Vec<(u32, f64)>,
    /// By when each host's card has sent, and received, all.
    cards: Vec<(f64, f64)>,
    /// By request: whether it kept its SLOs, if it is judged.
    verdicts: Vec<Option<bool>>,
    /// Members that only decode: the first ones.
    decoding: usize,
    faster: f64,
}

impl Rehearsal {
    /// Requests that the last one judged.
    #[cfg(test)]
    pub(super) fn judged(&self) -> usize {
        self.verdicts.iter().flatten().count()
    }

    /// By request of the window: whether the last one kept its SLOs. `None` for those that are not judged.
    pub(super) fn verdicts(&self) -> impl Iterator<Item = Option<bool>> {
        self.verdicts.iter().copied()
    }

    /// Serves the window with the first `decoding` members only decoding and the others only computing prompts; where it is 0, all do both.
    /// Requests come `faster` than they came. Returns the share of them that was within its SLOs.
    pub(super) fn run(&mut self, play: &Play<'_>, decoding: usize, faster: f64) -> f64 {
        (self.decoding, self.faster) = (decoding, faster);
        let begin = play.window.front().map_or(0.0, |seen| seen.at);
        self.engines.resize_with(play.members.len(), Engine::default);
        self.engines.iter_mut().for_each(|engine| engine.reset(begin));
        let hosts = play.members.iter().map(|member| member.host as usize + 1).max().unwrap_or(0);
        self.cards.clear();
        self.cards.resize(hosts, (begin, begin));
        self.served.clear();
        self.computed.clear();
        self.verdicts.clear();
        self.verdicts.resize(play.window.len(), None);
        for number in 0..play.window.len() {
            let request = self.request(play, number);
            while let Some(computed) = self.computed.peek().filter(|next| next.0.at <= request.at) {
                let computed = computed.0;
                self.computed.pop();
                self.hand_off(play, computed);
            }
            self.find_hits(play, number);
            self.advance_to(play, request.at);
            match decoding {
                0 => self.serve(play, &request),
                _ => self.prefill(play, &request),
            }
        }
        while let Some(Reverse(computed)) = self.computed.pop() {
            self.hand_off(play, computed);
        }
        self.advance_to(play, f64::INFINITY);
        share(self.verdicts().flatten())
    }

    /// All engines decode until then.
    fn advance_to(&mut self, play: &Play<'_>, at: f64) {
        for (engine, member) in self.engines.iter_mut().zip(play.members) {
            engine.advance(at, &member.speed, &mut self.verdicts);
        }
    }

    fn request(&self, play: &Play<'_>, number: usize) -> Request {
        let (seen, begin) = (&play.window[number], play.window[0].at);
        let prompt = seen.prompt_tokens as f64;
        let tokens = seen.tokens.map_or(play.answer_tokens, |tokens| tokens as f64);
        Request {
            number,
            at: begin + (seen.at - begin) / self.faster,
            prompt,
            tokens,
            context: prompt + tokens / 2.0,
            steps: (tokens - 1.0).max(0.0),
        }
    }

    /// What engines hold of a request's prompt.
    fn find_hits(&mut self, play: &Play<'_>, number: usize) {
        self.hits.clear();
        let seen = &play.window[number];
        let (mut tokens, mut from) = (f64::INFINITY, seen.parent);
        for _ in 0..ANCESTORS {
            let Some((parent, shared)) = from else { break };
            let Some(at) = parent.checked_sub(play.first).map(|at| at as usize) else { break };
            tokens = tokens.min(shared as f64);
            for (engine, stored) in self.served[at] {
                let since = self.engines[engine as usize].stored - stored;
                if since <= play.members[engine as usize].kv_tokens && self.hit(engine) == 0.0 {
                    self.hits.push((engine, tokens));
                }
            }
            from = play.window[at].parent;
        }
        if let Some((slot, tokens)) = seen.elsewhere
            && let Ok(at) = play.slots.binary_search_by_key(&slot, |entry| entry.0)
        {
            self.hits.push((play.slots[at].1, tokens as f64));
        }
    }

    fn hit(&self, engine: u32) -> f64 {
        self.hits.iter().find(|hit| hit.0 == engine).map_or(0.0, |hit| hit.1)
    }

    /// Where a prompt is computed at least cost, besides what `also` adds for an engine: which engine, for how long, and what it has cached.
    fn best_prefill(
        &self,
        play: &Play<'_>,
        request: &Request,
        also: impl Fn(&Engine, &Speed, f64, f64) -> f64,
    ) -> (u32, f64, f64) {
        let computers = self.decoding as u32..play.members.len() as u32;
        let longest = computers.clone().map(|at| self.hit(at)).fold(0.0, f64::max);
        let mut best = (f64::INFINITY, (0, 0.0, 0.0));
        for at in computers {
            let (engine, speed) = (&self.engines[at as usize], &play.members[at as usize].speed);
            let hit = self.hit(at);
            let seconds =
                |hit: f64| speed.prefill_seconds((request.prompt - hit).max(1.0) as u64, hit as u64);
            let computing = seconds(hit);
            let second_copy = (SHARERS * (computing - seconds(longest))).clamp(0.0, MOST_SECOND_COPY_SECONDS);
            let wait = (engine.free - request.at).max(0.0);
            let cost = wait + computing + second_copy + also(engine, speed, hit, computing);
            if cost < best.0 {
                best = (cost, (at, computing, hit));
            }
        }
        best.1
    }

    /// Serves a request on one engine.
    fn serve(&mut self, play: &Play<'_>, request: &Request) {
        // Each chunk shares a step with what decodes: that takes longer, but all of them have a token.
        let mixed = |engine: &Engine, speed: &Speed, steps: f64| {
            steps * speed.mixed_seconds(engine.decoding.len() as f64, engine.context)
        };
        let chunks = |hit: f64| ((request.prompt - hit) / CHUNK_TOKENS as f64).ceil().max(1.0);
        let (at, computing, hit) = self.best_prefill(play, request, |engine, speed, hit, computing| {
            let steps = chunks(hit);
            let stall = engine.decoding.len() as f64 * (computing - steps * speed.step_seconds).max(0.0);
            mixed(engine, speed, steps) + stall + engine.decode_seconds(speed, request.context, request.steps)
        });
        let (engine, member) = (&mut self.engines[at as usize], &play.members[at as usize]);
        let start = engine.free.max(request.at);
        engine.make_room(start, request.prompt + request.tokens, member, &mut self.verdicts);
        engine.clock += computing + mixed(engine, &member.speed, chunks(hit));
        engine.steps += chunks(hit);
        engine.free = engine.clock;
        engine.stored += request.prompt - hit + request.tokens;
        self.served.push([(at, engine.stored); 2]);
        let first = engine.clock;
        self.join(play, at, request, first);
    }

    /// The first part of a request.
    fn prefill(&mut self, play: &Play<'_>, request: &Request) {
        let (at, computing, hit) = self.best_prefill(play, request, |_, _, _, _| 0.0);
        let engine = &mut self.engines[at as usize];
        engine.free = engine.free.max(request.at) + computing;
        engine.stored += request.prompt - hit;
        self.served.push([(at, engine.stored); 2]);
        let early = early_seconds(play.members[at as usize].chunk_tokens, request.prompt - hit, computing);
        let what = Computed { engine: at, early };
        self.computed.push(Reverse(Event { at: engine.free, number: request.number, what }));
    }

    /// The second part.
    fn hand_off(&mut self, play: &Play<'_>, computed: Event<Computed>) {
        let request = self.request(play, computed.number);
        self.find_hits(play, computed.number);
        self.advance_to(play, computed.at);
        let Computed { engine, early } = computed.what;
        let source = &play.members[engine as usize];
        let (from, chunk) = (source.host as usize, f64::from(source.chunk_tokens));
        let mut best = (f64::INFINITY, 0, 0.0, 0.0);
        for at in 0..self.decoding as u32 {
            let (engine, member) = (&self.engines[at as usize], &play.members[at as usize]);
            let tokens = (request.prompt - self.hit(at)).max(0.0);
            let to = member.host as usize;
            let (begin, seconds) = match from == to {
                true => (computed.at - early, tokens * member.token_bytes / play.roads.within),
                false => {
                    let begin = self.cards[from].0.max(self.cards[to].1).max(computed.at - early);
                    (begin, tokens * member.wire_token_bytes / play.roads.between)
                }
            };
            // What the last chunk computed goes alone.
            let last = if early > 0.0 { last_share(chunk, 1.0 / tokens) } else { 1.0 };
            let sent = begin + seconds;
            let there = sent.max(computed.at + last * seconds);
            let over = engine.context + request.prompt + request.tokens - member.kv_tokens;
            let cost = there - computed.at
                + engine.decode_seconds(&member.speed, request.context, request.steps)
                + NO_ROOM_SECONDS * (over / member.kv_tokens).max(0.0);
            if cost < best.0 {
                best = (cost, at, sent, there);
            }
        }
        let (_, at, sent, there) = best;
        let (engine, member) = (&mut self.engines[at as usize], &play.members[at as usize]);
        if from != member.host as usize {
            // As long as the bytes take: others go between the chunks.
            self.cards[from].0 = sent;
            self.cards[member.host as usize].1 = sent;
        }
        let there = there + play.roads.round_trips;
        engine.make_room(there, request.prompt + request.tokens, member, &mut self.verdicts);
        engine.stored += request.prompt + request.tokens;
        self.served[computed.number][1] = (at, engine.stored);
        // The second request, and a step that it shares with all that decode, come before the first token.
        let first = engine.clock + member.speed.request_seconds + engine.step(&member.speed);
        self.join(play, at, &request, first);
    }

    /// A request is among those that decode, from the engine's clock on; its first token is there at `first`.
    fn join(&mut self, play: &Play<'_>, at: u32, request: &Request, first: f64) {
        let slo = play.window[request.number].slo;
        let engine = &mut self.engines[at as usize];
        engine.context += request.context;
        let speed = &play.members[at as usize].speed;
        let step = speed.decode_step_seconds(engine.decoding.len() as f64 + 1.0, engine.context);
        let before = (first - engine.clock) / step;
        let sequence = Sequence {
            context: request.context,
            late: first + slo.itl_seconds.map_or(f64::INFINITY, |slo| slo * request.steps),
            judged: request.number as f64 >= SKIPPED * play.window.len() as f64,
            in_time: slo.ttft_seconds.is_none_or(|slo| first - request.at <= slo),
        };
        let end = Event { at: engine.steps + before + request.steps, number: request.number, what: sequence };
        engine.decoding.push(Reverse(end));
    }
}
