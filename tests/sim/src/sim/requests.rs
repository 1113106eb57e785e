//! The way of a request: placed, sent to one engine or two, answered.

use std::sync::Arc;

use super::metrics::Outcome;
use super::placer::{Answer, Overlap, Plan, Progress, Request, Turn};
use super::transfers::Fetching;
use super::{Event, Simulation};
use crate::Nanos;
use crate::engine::{Handle, Job, Output};
use crate::trace::{Arrival, When};

/// Most engines that a request is sent to for its answer.
pub const MAX_ATTEMPTS: usize = 3;

/// What arrived.
#[derive(Debug)]
pub(super) struct Asked {
    number: u64,
    pub(super) session: Option<u64>,
    turn: u32,
    ids: Arc<[u64]>,
    prompt_tokens: u32,
    output_tokens: u32,
    arrived: Nanos,
    pub(super) measured: bool,
    has_waited: bool,
    /// Engines that failed it.
    pub(super) avoid: Vec<u32>,
}

/// A request's first part, on the engine that computes or has what another one fetches.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    pub(super) handle: Handle,
    /// Leading tokens whose KV is there, until all is.
    pub(super) computed: u32,
    /// Whether it is over, and its engine keeps the blocks.
    pub(super) ended: bool,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) asked: Asked,
    pub(super) plan: Plan,
    /// A number of its own, and another one when its engine dies: what was to happen to it under the old one does not happen.
    pub(super) attempt: u64,
    /// Whether it is at the engine that answers, or on its way there.
    pub(super) second: bool,
    /// Until its blocks are let go.
    pub(super) first: Option<First>,
    /// The second part, or the only one.
    pub(super) handle: Option<Handle>,
    overlap: Option<Overlap>,
    /// When the second part comes to its engine, sent while the first one computes.
    comes: Option<Nanos>,
    /// Tokens of the prompt whose KV the first part holds when it is over.
    pub(super) held_tokens: u32,
    pub(super) first_token: Option<Nanos>,
    hit_tokens: Option<u32>,
    pub(super) fetched_tokens: u32,
    pub(super) fetch: Fetching,
    pub(super) fetch_is_over: bool,
    /// By so much longer it may fetch, since not all is computed when it begins to.
    pub(super) more_time: Nanos,
}

impl Flight {
    /// Whether this engine has its first part.
    fn is_first_at(&self, engine: u32) -> bool {
        self.plan.transfer().is_some_and(|of| of.0 == engine)
    }

    /// The engine that its present part goes to.
    pub(super) fn engine(&self) -> u32 {
        match (self.second, self.plan.transfer()) {
            (false, Some((source, _))) => source,
            _ => self.plan.decode(),
        }
    }

    /// The engine that answers is to compute all of the prompt.
    pub(super) fn give_up_first_part(&mut self) {
        (self.second, self.held_tokens, self.hit_tokens) = (true, 0, None);
    }
}

impl Simulation<'_> {
    pub(super) fn arrive(&mut self, arrival: Arrival) {
        self.deliver_kv_events();
        let (number, measured) = (self.arrived, self.window.has(self.now));
        self.arrived += 1;
        self.metrics.requests += u64::from(measured);
        let asked = Asked {
            number,
            session: arrival.session,
            turn: arrival.turn,
            ids: arrival.blocks,
            prompt_tokens: arrival.prompt_tokens,
            output_tokens: arrival.output_tokens,
            arrived: self.now,
            measured,
            has_waited: false,
            avoid: Vec::new(),
        };
        let key = self.vacant.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() as u32 - 1
        });
        self.place(key, asked);
    }

    /// Requests that wait may go now, or have waited for too long.
    pub(super) fn turns(&mut self) {
        self.deliver_kv_events();
        while let Some(turn) = self.placer.turn(self.now) {
            let (Turn::Again(key) | Turn::Refused(key)) = turn;
            let asked = self.waiting.remove(&key).expect("it waits");
            match turn {
                Turn::Again(_) => self.place(key, asked),
                Turn::Refused(_) => self.refuse(key, &asked),
            }
        }
        self.is_turn = false;
        if let Some(at) = self.placer.next_turn().filter(|at| self.turn_at.is_none_or(|known| *at < known)) {
            self.turn_at = Some(at);
            self.push(at.max(self.now), Event::Turn);
        }
    }

    /// The time of a turn has come.
    pub(super) fn turn_came(&mut self) {
        if self.turn_at.is_some_and(|at| at <= self.now) {
            self.turn_at = None;
            self.turns();
        }
    }

    /// Has a request decided on, for the first time or again.
    pub(super) fn place(&mut self, key: u32, mut asked: Asked) {
        let whole = (asked.prompt_tokens / self.block_tokens) as usize;
        let request = Request {
            key,
            number: asked.number,
            session: asked.session,
            arrived: asked.arrived,
            prompt_tokens: asked.prompt_tokens,
            blocks: &asked.ids[..whole.min(asked.ids.len())],
            output_tokens: asked.output_tokens,
            all_blocks: &asked.ids,
            avoid: &asked.avoid,
        };
        match self.placer.place(self.now, &request) {
            Answer::Goes(plan) => self.dispatch(key, asked, plan, None),
            Answer::Overlaps(plan, overlap) => self.dispatch(key, asked, plan, Some(overlap)),
            Answer::Waits => {
                self.metrics.waited += u64::from(asked.measured && !asked.has_waited);
                asked.has_waited = true;
                self.waiting.insert(key, asked);
                self.is_turn = true;
            }
            Answer::Refused => self.refuse(key, &asked),
        }
    }

    /// A request is turned away.
    fn refuse(&mut self, key: u32, asked: &Asked) {
        let refused = match asked.avoid.is_empty() {
            true => &mut self.metrics.refused,
            false => &mut self.metrics.failed,
        };
        *refused += u64::from(asked.measured);
        self.lose(key, asked);
    }

    /// Sends a request on its way.
    fn dispatch(&mut self, key: u32, asked: Asked, plan: Plan, overlap: Option<Overlap>) {
        // What a coordinator does too: nothing is gained by a second engine.
        let plan = match plan {
            Plan::Disaggregated { prefill, decode } if prefill == decode || asked.output_tokens == 1 => {
                Plan::Colocated { engine: prefill }
            }
            Plan::Pull { source, engine } if source == engine => Plan::Colocated { engine },
            plan => plan,
        };
        let fits = |engine: u32| self.engines[engine as usize].fits(asked.prompt_tokens, asked.output_tokens);
        if !fits(plan.prefill()) || !fits(plan.decode()) {
            self.metrics.too_long += u64::from(asked.measured);
            // It was placed, so the placer counts on its end.
            self.placer.progress(self.now, key, &Progress::Finished { tokens: 0, cached_tokens: 0 });
            self.lose(key, &asked);
            return;
        }
        self.metrics.retried += u64::from(asked.measured && !asked.avoid.is_empty());
        self.attempts += 1;
        self.flights[key as usize] = Some(Flight {
            asked,
            plan,
            attempt: self.attempts,
            second: false,
            first: None,
            handle: None,
            overlap: overlap.filter(|_| matches!(plan, Plan::Disaggregated { .. })),
            comes: None,
            held_tokens: 0,
            first_token: None,
            hit_tokens: None,
            fetched_tokens: 0,
            fetch: Fetching::default(),
            fetch_is_over: false,
            more_time: 0,
        });
        self.push(self.now + self.dispatch, Event::Submit(key));
    }

    /// A request ends without its answer. Its session does too: its later turns will not come, and nobody is served with them either.
    pub(super) fn lose(&mut self, key: u32, asked: &Asked) {
        self.vacant.push(key);
        self.is_turn = true;
        let turns = || asked.session.and_then(|session| self.source.follow(session));
        let later = std::iter::from_fn(turns).count();
        if asked.measured {
            self.metrics.end = self.now;
            self.metrics.lost_turns += later as u64;
            for _ in 0..=later {
                self.stop |= (self.observer)(None).is_break();
            }
        }
    }

    pub(super) fn flight(&mut self, key: u32) -> &mut Flight {
        self.flights[key as usize].as_mut().expect("engines name requests that are under way")
    }

    /// A request's attempt, if it is still under way.
    pub(super) fn attempt(&mut self, key: u32, attempt: u64) -> Option<&mut Flight> {
        self.flights[key as usize].as_mut().filter(|flight| flight.attempt == attempt)
    }

    /// Submits a request's next part; returns to which engine, if that is there.
    pub(super) fn submit(&mut self, key: u32) -> Option<u32> {
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        let (prompt_tokens, ids) = (flight.asked.prompt_tokens, &flight.asked.ids);
        let first = match flight.plan {
            _ if flight.second => None,
            Plan::Colocated { .. } => None,
            Plan::Disaggregated { prefill, .. } => Some((prefill, prompt_tokens, prompt_tokens)),
            Plan::Pull { source, .. } => {
                let engine = &self.engines[source as usize];
                let findable = ((prompt_tokens - 1) / self.block_tokens) as usize;
                let cached = engine.cached(&ids[..findable.min(ids.len())]);
                let fits = cached > 0 && engine.fits(cached + 1, 1);
                (fits || engine.is_down()).then_some((source, cached + 1, cached))
            }
        };
        let mut job = Job {
            key,
            ids: Arc::clone(ids),
            prompt_tokens,
            output_tokens: flight.asked.output_tokens,
            remote_tokens: 0,
            hold: false,
        };
        match first {
            Some((_, prompt_tokens, held_tokens)) => {
                (job.prompt_tokens, job.output_tokens, job.hold) = (prompt_tokens, 1, true);
                flight.held_tokens = held_tokens;
            }
            None => {
                flight.second = true;
                if flight.first.is_some() {
                    job.remote_tokens = flight.held_tokens;
                }
            }
        }
        let (engine, attempt) = (flight.engine(), flight.attempt);
        if self.engines[engine as usize].is_down() {
            self.push(self.now + self.dispatch, Event::Refused(key, attempt));
            return None;
        }
        let handle = self.engines[engine as usize].submit(self.now, job);
        match flight.second {
            true => flight.handle = Some(handle),
            false => flight.first = Some(First { handle, computed: 0, ended: false }),
        }
        Some(engine)
    }

    /// The second part of a request comes to its engine, sent while the first one computed.
    pub(super) fn overlap(&mut self, key: u32, attempt: u64) -> Option<u32> {
        let flight = self.attempt(key, attempt)?;
        flight.comes.take()?;
        flight.second = true;
        flight.more_time = flight.overlap.map_or(0, |overlap| overlap.more_time);
        self.placer.progress(self.now, key, &Progress::Sent);
        self.submit(key)
    }

    /// Takes what an engine said, and waits for what it does next.
    pub(super) fn attend(&mut self, engine: u32) {
        let mut outputs = std::mem::take(&mut self.outputs);
        let mut released = Vec::new();
        self.engines[engine as usize].take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            self.take(engine, output, &mut released);
        }
        self.outputs = outputs;
        if let Some((at, version)) = self.engines[engine as usize].next()
            && version != self.awaited[engine as usize]
        {
            self.awaited[engine as usize] = version;
            self.push(at, Event::Wake { engine, version });
        }
        // Blocks that became free may let in who waits there.
        for other in released {
            self.attend(other);
        }
    }

    fn take(&mut self, engine: u32, output: Output, released: &mut Vec<u32>) {
        let (now, dispatch) = (self.now, self.dispatch);
        match output {
            Output::Gaps { gap, count } if self.window.has(now) => {
                self.metrics.distributions.itl.record_n(gap, count);
            }
            Output::Gaps { .. } => {}
            Output::Started { key, hit_tokens } => {
                let flight = self.flight(key);
                let is_first = flight.is_first_at(engine);
                let computes_prompt = match flight.plan {
                    Plan::Colocated { .. } => true,
                    Plan::Pull { .. } => !is_first,
                    // The second part, where the first one failed.
                    Plan::Disaggregated { .. } => is_first || flight.held_tokens == 0,
                };
                if computes_prompt {
                    flight.hit_tokens.get_or_insert(hit_tokens);
                }
                // Not again where it was preempted.
                if let (Some(overlap), true) = (flight.overlap, is_first && !flight.second)
                    && flight.comes.is_none()
                {
                    let (at, attempt) = (now + overlap.after + dispatch, flight.attempt);
                    flight.comes = Some(at);
                    self.push(at, Event::Overlap(key, attempt));
                }
            }
            Output::Computed { key, tokens } => {
                if let Some(first) = &mut self.flight(key).first {
                    // Where it was preempted, what was sent before is not sent again.
                    first.computed = first.computed.max(tokens);
                }
                self.go_on(key);
                self.await_transfers();
            }
            Output::Fetch { key, tokens: 0 } => {
                self.flight(key).fetch_is_over = true;
                released.extend(self.let_go(key));
            }
            Output::Fetch { key, tokens } => self.fetch(key, tokens),
            Output::FirstToken { key } => {
                let flight = self.flight(key);
                if !flight.is_first_at(engine) {
                    flight.first_token = Some(now);
                    self.placer.progress(now, key, &Progress::FirstToken);
                }
            }
            Output::Finished { key } if self.flight(key).is_first_at(engine) => {
                released.extend(self.first_ended(key));
            }
            Output::Finished { key } => {
                released.extend(self.leave(key));
                self.finish(key);
            }
        }
    }

    /// A request's first part is over. Returns which engine may free blocks then.
    fn first_ended(&mut self, key: u32) -> Option<u32> {
        let (now, dispatch) = (self.now, self.dispatch);
        let flight = self.flight(key);
        let attempt = flight.attempt;
        let first = flight.first.as_mut().expect("it was under way");
        first.ended = true;
        // It may have been sent, and not be there yet.
        let is_sent = flight.second || flight.comes.is_some_and(|at| at <= now + dispatch);
        if !is_sent {
            (flight.second, flight.comes) = (true, None);
            self.push(now + dispatch, Event::Submit(key));
        }
        let flight = self.flight(key);
        let (plan, is_over) = (flight.plan, flight.fetch_is_over);
        if matches!(plan, Plan::Disaggregated { .. }) {
            self.placer.progress(now, key, &Progress::Prefilled);
        }
        if is_over {
            return self.let_go(key);
        }
        self.push(now + self.hold, Event::Expire(key, attempt));
        self.go_on(key);
        self.await_transfers();
        None
    }

    fn finish(&mut self, key: u32) {
        let now = self.now;
        let Some(flight) = self.flights[key as usize].take() else { return };
        self.vacant.push(key);
        self.is_turn = true;
        let asked = &flight.asked;
        let cached_tokens = flight.hit_tokens.unwrap_or(0);
        self.placer.progress(now, key, &Progress::Finished { tokens: asked.output_tokens, cached_tokens });
        let outcome = Outcome {
            number: asked.number,
            session: asked.session,
            turn: asked.turn,
            arrived: asked.arrived,
            ttft: flight.first_token.unwrap_or(now) - asked.arrived,
            e2e: now - asked.arrived,
            plan: flight.plan,
            prompt_tokens: asked.prompt_tokens,
            hit_tokens: cached_tokens,
            fetched_tokens: flight.fetched_tokens,
            output_tokens: asked.output_tokens,
        };
        if asked.measured {
            self.metrics.record(now, &outcome, self.slo.as_ref());
            self.stop |= (self.observer)(Some(&outcome)).is_break();
        }
        if let Some(next) = asked.session.and_then(|session| self.source.follow(session)) {
            let at = match next.when {
                When::At(at) => at.max(now),
                When::After(pause) => now + pause,
            };
            self.push(at, Event::Arrive(Box::new(next)));
        }
    }
}
