//! The way of a request: placed, sent to one engine or two, answered.

use std::sync::Arc;

use super::metrics::Outcome;
use super::placer::{Answer, Plan, Progress, Request, Turn};
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

/// A request under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) asked: Asked,
    pub(super) plan: Plan,
    /// A number of its own, and another one when its engine dies: what was to happen to it under the old one does not happen.
    pub(super) attempt: u64,
    /// Whether it is at the engine that answers.
    pub(super) second: bool,
    pub(super) handle: Option<Handle>,
    /// The ended first part, while its engine keeps its blocks.
    pub(super) held: Option<Handle>,
    /// Tokens of the prompt whose KV the first part holds.
    held_tokens: u32,
    pub(super) first_token: Option<Nanos>,
    hit_tokens: Option<u32>,
    pub(super) fetched_tokens: u32,
    /// Tokens that are to come, while they are.
    pub(super) fetching: u32,
    /// Those that came.
    pub(super) came: u32,
    pub(super) fetch_began: Nanos,
}

impl Flight {
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
            Answer::Goes(plan) => self.dispatch(key, asked, plan),
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
    fn dispatch(&mut self, key: u32, asked: Asked, plan: Plan) {
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
            handle: None,
            held: None,
            held_tokens: 0,
            first_token: None,
            hit_tokens: None,
            fetched_tokens: 0,
            fetching: 0,
            came: 0,
            fetch_began: 0,
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
                if flight.held.is_some() {
                    job.remote_tokens = flight.held_tokens;
                }
            }
        }
        let (engine, attempt) = (flight.engine(), flight.attempt);
        if self.engines[engine as usize].is_down() {
            self.push(self.now + self.dispatch, Event::Refused(key, attempt));
            return None;
        }
        flight.handle = Some(self.engines[engine as usize].submit(self.now, job));
        Some(engine)
    }

    /// Takes what an engine said, and waits for what it does next.
    pub(super) fn attend(&mut self, engine: u32) {
        let mut outputs = std::mem::take(&mut self.outputs);
        let mut released = Vec::new();
        self.engines[engine as usize].take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            self.take(output, &mut released);
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

    fn take(&mut self, output: Output, released: &mut Vec<u32>) {
        let now = self.now;
        match output {
            Output::Gaps { gap, count } if self.window.has(now) => {
                self.metrics.distributions.itl.record_n(gap, count);
            }
            Output::Gaps { .. } => {}
            Output::Started { key, hit_tokens } => {
                let flight = self.flight(key);
                let computes_prompt = match flight.plan {
                    Plan::Colocated { .. } => true,
                    Plan::Pull { .. } => flight.second,
                    // The second part, where the first one failed.
                    Plan::Disaggregated { .. } => !flight.second || flight.held_tokens == 0,
                };
                if computes_prompt {
                    flight.hit_tokens.get_or_insert(hit_tokens);
                }
            }
            Output::Fetch { key, tokens: 0 } => released.extend(self.let_go(key)),
            Output::Fetch { key, tokens } => self.fetch(key, tokens),
            Output::FirstToken { key } => {
                let flight = self.flight(key);
                if flight.second {
                    flight.first_token = Some(now);
                    self.placer.progress(now, key, &Progress::FirstToken);
                }
            }
            Output::Finished { key } => {
                let (dispatch, hold) = (self.dispatch, self.hold);
                let flight = self.flight(key);
                if !flight.second {
                    flight.second = true;
                    flight.held = flight.handle.take();
                    let attempt = flight.attempt;
                    if matches!(flight.plan, Plan::Disaggregated { .. }) {
                        self.placer.progress(now, key, &Progress::Prefilled);
                    }
                    self.push(now + dispatch, Event::Submit(key));
                    self.push(now + hold, Event::Expire(key, attempt));
                } else {
                    self.finish(key);
                }
            }
        }
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
