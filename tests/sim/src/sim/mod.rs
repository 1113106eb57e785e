//! The event loop: requests of a trace, a placer that decides, engines that compute, links that carry.
//!
//! # The way of a request
//! - *Co-located*: after the time of a dispatch it is submitted to its engine.
//! - *Disaggregated*: first to the prefill engine, with one token of output and a hold; when that has ended and after another dispatch, to the decode engine, which fetches
//!   what it has not cached itself of the prompt's KV, computes the prompt's last token and answers. A request of one token of output is not split.
//! - *Pull*: first to the source, as a request for one token behind what it has cached of the prompt when that arrives there, with a hold; when that has ended and after
//!   another dispatch, to its engine, which fetches what it has not cached itself of that prefix, computes the rest and answers. Where the source has nothing cached any more, the
//!   request goes straight to its engine. (A coordinator asks for the prefix that it believes to be there, and has the source compute what is not.)
//!
//! A transfer takes a round trip before its first byte and one after its last. A hold that nobody has begun to fetch from in time is freed;
//! the decode engine then computes the prompt.
//!
//! # What is measured
//! All requests, or those that arrive in a [`Window`]: others are served too, so that there is a load before and behind, but nobody
//! counts them.

mod metrics;
mod placer;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;

use self::metrics::Metrics;
pub use self::metrics::{
    Distributions, Durations, EngineReport, Outcome, Plans, Point, Report, Results, Summary,
};
pub use self::placer::{LoadReport, Placer, Plan, Progress, Request};
use crate::engine::events::KvEvents;
use crate::engine::{Engine, Handle, Job, Output, Settings};
use crate::fleet::{Fleet, Slo};
use crate::link::Network;
use crate::trace::{Arrival, Source, When};
use crate::{Nanos, nanos, seconds};

/// Which requests are measured: those that arrive from `from` on and before `until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its beginning.
    pub from: Nanos,
    /// Its end.
    pub until: Nanos,
}

impl Window {
    /// All requests.
    pub const ALL: Window = Window { from: 0, until: Nanos::MAX };

    fn has(&self, at: Nanos) -> bool {
        (self.from..self.until).contains(&at)
    }
}

/// Runs a trace to its end.
pub fn run(fleet: &Fleet, block_tokens: u32, source: &mut dyn Source, placer: &mut dyn Placer) -> Results {
    run_observed(fleet, block_tokens, source, placer, Window::ALL, &mut |_| ControlFlow::Continue(()))
}

/// Runs a trace until all requests of the window have ended, or the observer, who sees each of those that ended, breaks. `block_tokens` is the
/// engines' block size, which must be the one that the source cuts its requests by. A source that does not end needs a window that does.
pub fn run_observed(
    fleet: &Fleet,
    block_tokens: u32,
    source: &mut dyn Source,
    placer: &mut dyn Placer,
    window: Window,
    observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>,
) -> Results {
    let mut simulation = Simulation::new(fleet, block_tokens, source, placer, window);
    simulation.run(observer);
    simulation.results()
}

#[derive(Debug)]
enum Event {
    Arrive(Box<Arrival>),
    /// The next part of a request goes to its engine.
    Submit(u32),
    Wake {
        engine: u32,
        version: u64,
    },
    Transfers {
        version: u64,
    },
    Send(u32),
    Fetched(u32),
    /// Hold of request `number` under a key.
    Expire(u32, u64),
    Load,
}

/// An event in its order: by time, then in the order in which events came up.
#[derive(Debug)]
struct Entry(Nanos, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// A request under way.
#[derive(Debug)]
struct Flight {
    number: u64,
    session: Option<u64>,
    turn: u32,
    ids: Arc<[u64]>,
    prompt_tokens: u32,
    output_tokens: u32,
    arrived: Nanos,
    measured: bool,
    plan: Plan,
    /// Whether it is at the engine that answers.
    second: bool,
    handle: Option<Handle>,
    /// The ended first part, while its engine keeps its blocks.
    held: Option<Handle>,
    /// Tokens of the prompt whose KV the first part holds.
    held_tokens: u32,
    first_token: Option<Nanos>,
    hit_tokens: Option<u32>,
    fetched_tokens: u32,
    fetching: u32,
    fetch_began: Nanos,
}

struct Simulation<'a> {
    source: &'a mut dyn Source,
    placer: &'a mut dyn Placer,
    window: Window,
    slo: Option<Slo>,
    block_tokens: u32,
    engines: Vec<Engine>,
    hosts: Vec<u32>,
    kv_bytes_per_token: f64,
    network: Network,
    dispatch: Nanos,
    event_delay: Nanos,
    load_interval: Nanos,
    hold: Nanos,
    rtt: Nanos,
    now: Nanos,
    heap: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    /// Requests so far, measured or not.
    arrived: u64,
    next_open: Option<Arrival>,
    /// Versions for which an event lies in the heap.
    awaited: Vec<u64>,
    awaited_transfers: u64,
    /// Events of blocks on their way to the placer.
    kv_events: VecDeque<(Nanos, u32, KvEvents)>,
    flights: Vec<Option<Flight>>,
    vacant: Vec<u32>,
    outputs: Vec<Output>,
    metrics: Metrics,
    stop: bool,
}

impl<'a> Simulation<'a> {
    fn new(
        fleet: &Fleet,
        block_tokens: u32,
        source: &'a mut dyn Source,
        placer: &'a mut dyn Placer,
        window: Window,
    ) -> Self {
        let block_tokens = block_tokens.max(1);
        let wants_kv_events = placer.wants_kv_events();
        let members = fleet.members();
        let settings = |member: &crate::fleet::Member<'_>| Settings {
            speed: member.speed,
            block_tokens,
            blocks: (member.kind.kv_tokens / u64::from(block_tokens)) as u32,
            max_num_seqs: member.kind.max_num_seqs,
            max_num_batched_tokens: member.kind.max_num_batched_tokens,
            chunked_prefill: member.kind.chunked_prefill,
            kv_events: wants_kv_events,
        };
        let next_open = source.open();
        let mut simulation = Self {
            source,
            placer,
            window,
            slo: fleet.slo,
            block_tokens,
            engines: members.iter().map(|member| Engine::new(settings(member))).collect(),
            hosts: members.iter().map(|member| member.host).collect(),
            kv_bytes_per_token: members[0].speed.kv_bytes(1),
            network: Network::new(fleet.hosts(), fleet.widths(), &fleet.background_traffic()),
            dispatch: nanos(fleet.control.dispatch_us / 1e6),
            event_delay: nanos(fleet.control.event_delay_ms / 1e3),
            load_interval: nanos(fleet.control.load_interval_ms / 1e3).max(1),
            hold: nanos(fleet.control.hold_seconds),
            rtt: nanos(fleet.links.rtt_us / 1e6),
            now: 0,
            heap: BinaryHeap::new(),
            sequence: 0,
            arrived: 0,
            next_open,
            awaited: vec![0; members.len()],
            awaited_transfers: 0,
            kv_events: VecDeque::new(),
            flights: Vec::new(),
            vacant: Vec::new(),
            outputs: Vec::new(),
            metrics: Metrics::default(),
            stop: false,
        };
        simulation.push(simulation.load_interval, Event::Load);
        simulation
    }

    fn push(&mut self, at: Nanos, event: Event) {
        self.sequence += 1;
        self.heap.push(Reverse(Entry(at, self.sequence, event)));
    }

    fn run(&mut self, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        while !self.stop && (self.now < self.window.until || self.metrics.unfinished() > 0) {
            let opens_at = self.next_open.as_ref().map(|arrival| match arrival.when {
                When::At(at) | When::After(at) => at,
            });
            let due = self.heap.peek().map(|entry| entry.0.0);
            match (opens_at, due) {
                (Some(at), due) if due.is_none_or(|due| at <= due) => {
                    self.now = self.now.max(at);
                    let arrival = std::mem::replace(&mut self.next_open, self.source.open());
                    arrival.into_iter().for_each(|arrival| self.arrive(arrival));
                }
                (_, Some(_)) => {
                    if let Some(Reverse(Entry(at, _, event))) = self.heap.pop() {
                        self.now = at;
                        self.handle(event, observer);
                    }
                }
                (_, None) => break,
            }
        }
    }

    fn handle(&mut self, event: Event, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        match event {
            Event::Arrive(arrival) => self.arrive(*arrival),
            Event::Submit(key) => {
                let engine = self.submit(key);
                self.attend(engine, observer);
            }
            Event::Wake { engine, version } => {
                let at = engine as usize;
                if self.engines[at].next().is_some_and(|next| next.1 == version) {
                    self.engines[at].wake(self.now);
                    if let Some(events) = self.engines[at].take_events() {
                        self.kv_events.push_back((self.now + self.event_delay, engine, events));
                    }
                    self.attend(engine, observer);
                }
            }
            Event::Transfers { version } => {
                if self.network.next().is_some_and(|next| next.1 == version) {
                    let mut ended = Vec::new();
                    self.network.ended(self.now, &mut ended);
                    for key in ended {
                        self.push(self.now + self.rtt, Event::Fetched(key as u32));
                    }
                    self.await_transfers();
                }
            }
            Event::Send(key) => {
                let flight = self.flights[key as usize].as_ref().expect("it is under way");
                let (from, to) = flight.plan.transfer().expect("it fetches");
                let bytes = self.kv_bytes_per_token * f64::from(flight.fetching);
                let (from, to) = (self.hosts[from as usize], self.hosts[to as usize]);
                self.network.start(self.now, u64::from(key), from, to, bytes);
                self.await_transfers();
            }
            Event::Fetched(key) => self.fetched(key, observer),
            Event::Expire(key, number) => self.expire(key, number, observer),
            Event::Load => self.report_load(),
        }
    }

    fn await_transfers(&mut self) {
        if let Some((at, version)) = self.network.next()
            && version != self.awaited_transfers
        {
            self.awaited_transfers = version;
            self.push(at, Event::Transfers { version });
        }
    }

    fn deliver_kv_events(&mut self) {
        while self.kv_events.front().is_some_and(|front| front.0 <= self.now) {
            if let Some((at, engine, events)) = self.kv_events.pop_front() {
                self.placer.kv_events(at, engine, &events);
            }
        }
    }

    fn report_load(&mut self) {
        self.deliver_kv_events();
        let (mut busy, mut waiting, mut running) = (0, 0, 0);
        for (at, engine) in self.engines.iter().enumerate() {
            let load = engine.load();
            let used = 1.0 - f64::from(load.free_blocks) / f64::from(engine.settings().blocks.max(1));
            let report = LoadReport { waiting: load.waiting, running: load.running, kv_usage: used };
            self.placer.load(self.now, at as u32, &report);
            busy += engine.busy(self.now);
            waiting += load.waiting;
            running += load.running;
        }
        self.metrics.timeline.sample(self.now, self.engines.len(), busy, waiting, running);
        if self.next_open.is_some() || !self.heap.is_empty() {
            self.push(self.now + self.load_interval, Event::Load);
        }
    }

    fn arrive(&mut self, arrival: Arrival) {
        self.deliver_kv_events();
        let (number, measured) = (self.arrived, self.window.has(self.now));
        self.arrived += 1;
        self.metrics.requests += u64::from(measured);
        let whole = (arrival.prompt_tokens / self.block_tokens) as usize;
        let key = self.vacant.last().copied().unwrap_or(self.flights.len() as u32);
        let request = Request {
            key,
            number,
            session: arrival.session,
            prompt_tokens: arrival.prompt_tokens,
            blocks: &arrival.blocks[..whole.min(arrival.blocks.len())],
            output_tokens: arrival.output_tokens,
            all_blocks: &arrival.blocks,
        };
        let plan = self.placer.place(self.now, &request);
        let Some(plan) = plan else {
            self.metrics.refused += u64::from(measured);
            arrival.session.into_iter().for_each(|session| self.source.abandon(session));
            return;
        };
        // What a coordinator does too: nothing is gained by a second engine.
        let plan = match plan {
            Plan::Disaggregated { prefill, decode } if prefill == decode || arrival.output_tokens == 1 => {
                Plan::Colocated { engine: prefill }
            }
            Plan::Pull { source, engine } if source == engine => Plan::Colocated { engine },
            plan => plan,
        };
        let fits =
            |engine: u32| self.engines[engine as usize].fits(arrival.prompt_tokens, arrival.output_tokens);
        if !fits(plan.prefill()) || !fits(plan.decode()) {
            self.metrics.too_long += u64::from(measured);
            // It was placed, so the placer counts on its end.
            self.placer.progress(self.now, key, &Progress::Finished { tokens: 0, cached_tokens: 0 });
            arrival.session.into_iter().for_each(|session| self.source.abandon(session));
            return;
        }
        let flight = Flight {
            number,
            session: arrival.session,
            turn: arrival.turn,
            ids: arrival.blocks,
            prompt_tokens: arrival.prompt_tokens,
            output_tokens: arrival.output_tokens,
            arrived: self.now,
            measured,
            plan,
            second: false,
            handle: None,
            held: None,
            held_tokens: 0,
            first_token: None,
            hit_tokens: None,
            fetched_tokens: 0,
            fetching: 0,
            fetch_began: 0,
        };
        match self.vacant.pop() {
            Some(at) => self.flights[at as usize] = Some(flight),
            None => self.flights.push(Some(flight)),
        }
        self.push(self.now + self.dispatch, Event::Submit(key));
    }

    fn flight(&mut self, key: u32) -> &mut Flight {
        self.flights[key as usize].as_mut().expect("engines name requests that are under way")
    }

    /// Submits a request's next part; returns to which engine.
    fn submit(&mut self, key: u32) -> u32 {
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        let first = match flight.plan {
            _ if flight.second => None,
            Plan::Colocated { .. } => None,
            Plan::Disaggregated { prefill, .. } => {
                Some((prefill, flight.prompt_tokens, flight.prompt_tokens))
            }
            Plan::Pull { source, .. } => {
                let engine = &self.engines[source as usize];
                let findable = ((flight.prompt_tokens - 1) / self.block_tokens) as usize;
                let cached = engine.cached(&flight.ids[..findable.min(flight.ids.len())]);
                let fits = cached > 0 && engine.fits(cached + 1, 1);
                fits.then_some((source, cached + 1, cached))
            }
        };
        let mut job = Job {
            key,
            ids: Arc::clone(&flight.ids),
            prompt_tokens: flight.prompt_tokens,
            output_tokens: flight.output_tokens,
            remote_tokens: 0,
            hold: false,
        };
        let engine = match first {
            Some((engine, prompt_tokens, held_tokens)) => {
                (job.prompt_tokens, job.output_tokens, job.hold) = (prompt_tokens, 1, true);
                flight.held_tokens = held_tokens;
                engine
            }
            None => {
                flight.second = true;
                if flight.held.is_some() {
                    job.remote_tokens = flight.held_tokens;
                }
                flight.plan.decode()
            }
        };
        flight.handle = Some(self.engines[engine as usize].submit(self.now, job));
        engine
    }

    /// Takes what an engine said, and waits for what it does next.
    fn attend(&mut self, engine: u32, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        let mut outputs = std::mem::take(&mut self.outputs);
        let mut released = Vec::new();
        self.engines[engine as usize].take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            self.take(output, &mut released, observer);
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
            self.attend(other, observer);
        }
    }

    fn take(
        &mut self,
        output: Output,
        released: &mut Vec<u32>,
        observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>,
    ) {
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
                    Plan::Disaggregated { .. } => !flight.second,
                };
                if computes_prompt {
                    flight.hit_tokens.get_or_insert(hit_tokens);
                }
            }
            Output::Fetch { key, tokens: 0 } => released.extend(self.let_go(key)),
            Output::Fetch { key, tokens } => {
                let rtt = self.rtt;
                let flight = self.flight(key);
                flight.fetching = tokens;
                flight.fetch_began = now;
                // Where its hold has expired meanwhile, there is nothing to fetch.
                let event = match flight.held {
                    None => Event::Fetched(key),
                    Some(_) => Event::Send(key),
                };
                self.push(now + rtt, event);
            }
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
                    let number = flight.number;
                    if matches!(flight.plan, Plan::Disaggregated { .. }) {
                        self.placer.progress(now, key, &Progress::Prefilled);
                    }
                    self.push(now + dispatch, Event::Submit(key));
                    self.push(now + hold, Event::Expire(key, number));
                } else {
                    self.finish(key, observer);
                }
            }
        }
    }

    fn finish(&mut self, key: u32, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        let now = self.now;
        let Some(flight) = self.flights[key as usize].take() else { return };
        self.vacant.push(key);
        let cached_tokens = flight.hit_tokens.unwrap_or(0);
        self.placer.progress(now, key, &Progress::Finished { tokens: flight.output_tokens, cached_tokens });
        let outcome = Outcome {
            number: flight.number,
            session: flight.session,
            turn: flight.turn,
            arrived: flight.arrived,
            ttft: flight.first_token.unwrap_or(now) - flight.arrived,
            e2e: now - flight.arrived,
            plan: flight.plan,
            prompt_tokens: flight.prompt_tokens,
            hit_tokens: cached_tokens,
            fetched_tokens: flight.fetched_tokens,
            output_tokens: flight.output_tokens,
        };
        if flight.measured {
            self.metrics.record(now, &outcome, self.slo.as_ref());
            self.stop |= observer(&outcome).is_break();
        }
        if let Some(next) = flight.session.and_then(|session| self.source.follow(session)) {
            let at = match next.when {
                When::At(at) => at.max(now),
                When::After(pause) => now + pause,
            };
            self.push(at, Event::Arrive(Box::new(next)));
        }
    }

    fn fetched(&mut self, key: u32, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        let (now, rtt) = (self.now, self.rtt);
        let kv_bytes_per_token = self.kv_bytes_per_token;
        let flight = self.flight(key);
        let arrived = flight.held.is_some();
        let handle = flight.handle.expect("it was submitted");
        let tokens = std::mem::take(&mut flight.fetching);
        let (plan, measured) = (flight.plan, flight.measured);
        if arrived {
            flight.fetched_tokens = tokens;
            let (source, destination) = plan.transfer().expect("it fetched");
            let transferred = Progress::Transferred {
                source,
                destination,
                bytes: (kv_bytes_per_token * f64::from(tokens)).round() as u64,
                seconds: seconds(now - flight.fetch_began),
                rtt_seconds: seconds(rtt),
            };
            self.metrics.transfers += u64::from(measured);
            self.placer.progress(now, key, &transferred);
        }
        self.engines[plan.decode() as usize].fetched(now, handle, arrived);
        let released = self.let_go(key);
        self.attend(plan.decode(), observer);
        released.into_iter().for_each(|engine| self.attend(engine, observer));
    }

    /// The source of a request's transfer may free its blocks. Returns which engine that is.
    fn let_go(&mut self, key: u32) -> Option<u32> {
        let now = self.now;
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        let (source, _) = flight.plan.transfer()?;
        let handle = flight.held.take()?;
        self.engines[source as usize].release(now, handle);
        Some(source)
    }

    fn expire(&mut self, key: u32, number: u64, observer: &mut dyn FnMut(&Outcome) -> ControlFlow<()>) {
        let waits =
            |flight: &Flight| flight.number == number && flight.fetching == 0 && flight.held.is_some();
        if let Some(flight) = self.flights[key as usize].as_ref().filter(|flight| waits(flight)) {
            self.metrics.expired_holds += u64::from(flight.measured);
            let released = self.let_go(key);
            released.into_iter().for_each(|engine| self.attend(engine, observer));
        }
    }

    fn results(self) -> Results {
        let span = self.metrics.end.max(1) as f64;
        let report = |engine: &Engine| {
            let totals = engine.totals();
            EngineReport {
                utilisation: engine.busy(self.metrics.end) as f64 / span,
                prefill_share: totals.prefill as f64 / span,
                prefill_tokens: totals.prefill_tokens,
                output_tokens: totals.output_tokens,
                steps: totals.steps,
                preemptions: totals.preemptions,
            }
        };
        let engines = self.engines.iter().map(report).collect();
        let measured = match self.window.until {
            Nanos::MAX => self.metrics.end,
            until => until - self.window.from,
        };
        self.metrics.results(measured, self.kv_bytes_per_token, engines, self.source.rows().clone())
    }
}
