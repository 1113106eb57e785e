//! The event loop: requests of a trace, a placer that decides, engines that compute, links that carry.
//!
//! # The way of a request
//! - *Co-located*: after the time of a dispatch it is submitted to its engine.
//! - *Disaggregated*: first to the prefill engine, with one token of output and a hold; when that has ended and after another dispatch, to the decode engine, which fetches
//!   what it has not cached itself of the prompt's KV, computes the prompt's last token and answers. A request of one token of output is not split. Where the placer
//!   says so ([`Answer::Overlaps`]), the second part is sent while the first one computes, and gets the blocks as they come to be there: those of a chunk when
//!   the step that computed it has ended.
//! - *Pull*: first to the source, as a request for one token behind what it has cached of the prompt when that arrives there, with a hold; when that has ended and after
//!   another dispatch, to its engine, which fetches what it has not cached itself of that prefix, computes the rest and answers. Where the source has nothing cached any more, the
//!   request goes straight to its engine. (A coordinator asks for the prefix that it believes to be there, and has the source compute what is not.)
//!
//! A transfer takes a round trip before its first byte and one after its last. A hold that nobody has begun to fetch from in time is freed;
//! the decode engine then computes the prompt. So it does with what has not come when it has fetched for as long as it may. That deadline comes with the request from who
//! places it, as a coordinator sends it: where it lets both parts overlap, it is later by what the prompt may take.
//!
//! Where the placer says so, a request waits before it is sent anywhere, until it is its turn ([`Placer::turn`]) or it is refused.
//!
//! # Failures
//! happen by the fleet's script. An engine that dies loses its requests and its cache. Whoever waits for it hears so after the time of a
//! dispatch, and so does who sends it something before it is back. As with a coordinator,
//! - a first part that fails is left out: the request goes to the engine that answers, which computes all of it, or what has not come where it was sent already;
//! - a request that fails on the engine that answers before its first token is placed again, without that engine, [`MAX_ATTEMPTS`] times in all;
//! - one whose answer breaks off, or that no other engine can take, has failed, and its session ends;
//! - a transfer from an engine that dies ends early: what has come is used, the rest is computed;
//! - a first part that is not over when the second one failed or ended is aborted.
//!
//! # What is measured
//! All requests, or those that arrive in a [`Window`]: others are served too, so that there is a load before and behind, but nobody
//! counts them.

mod failures;
mod metrics;
mod placer;
mod requests;
mod transfers;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::ops::ControlFlow;

use self::failures::{Broken, Script};
use self::metrics::Metrics;
pub use self::metrics::{
    Distributions, Durations, EngineReport, Outcome, Plans, Point, Report, Results, Summary,
};
pub use self::placer::{Answer, Health, LoadReport, Overlap, Placer, Plan, Progress, Request, Turn};
pub use self::requests::MAX_ATTEMPTS;
use self::requests::{Asked, Flight};
use crate::engine::events::KvEvents;
use crate::engine::{Engine, Output, Settings};
use crate::fleet::{Fleet, Slo};
use crate::link::Network;
use crate::trace::{Arrival, Source, When};
use crate::{Nanos, nanos};

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

/// Who looks on.
pub type Observer<'a> = dyn FnMut(Option<&Outcome>) -> ControlFlow<()> + 'a;

/// Runs a trace to its end.
pub fn run(fleet: &Fleet, block_tokens: u32, source: &mut dyn Source, placer: &mut dyn Placer) -> Results {
    run_observed(fleet, block_tokens, source, placer, Window::ALL, &mut |_| ControlFlow::Continue(()))
}

/// Runs a trace until all requests of the window have ended, or the observer, who sees each of those that ended (`None`: without its answer, or it did not come at all), breaks. `block_tokens` is the
/// engines' block size, which must be the one that the source cuts its requests by. A source that does not end needs a window that does.
pub fn run_observed(
    fleet: &Fleet,
    block_tokens: u32,
    source: &mut dyn Source,
    placer: &mut dyn Placer,
    window: Window,
    observer: &mut Observer<'_>,
) -> Results {
    let mut simulation = Simulation::new(fleet, block_tokens, source, placer, window, observer);
    simulation.run();
    simulation.results()
}

#[derive(Debug)]
enum Event {
    Arrive(Box<Arrival>),
    /// The next part of a request goes to its engine.
    Submit(u32),
    /// The second part of this attempt of a request comes to its engine, sent while the first one computed.
    Overlap(u32, u64),
    Wake {
        engine: u32,
        version: u64,
    },
    Transfers {
        version: u64,
    },
    /// Blocks begin to go. This and what follows is of an attempt of a request.
    Send(u32, u64),
    /// All that will come has come.
    Fetched(u32, u64),
    /// Blocks have been on their way for as long as they may.
    Late(u32, u64),
    /// Held blocks were not asked for in time.
    Expire(u32, u64),
    /// The engine that a part of the request went to could not be reached.
    Refused(u32, u64),
    /// Those who wait for an engine hear that it died.
    Died(u32),
    /// It is heard of an engine that it is back.
    Back(u32),
    /// It is the turn of somebody who waits.
    Turn,
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

struct Simulation<'a> {
    source: &'a mut dyn Source,
    placer: &'a mut dyn Placer,
    observer: &'a mut Observer<'a>,
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
    pull_deadline: Nanos,
    rtt: Nanos,
    now: Nanos,
    heap: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    /// Requests so far, measured or not.
    arrived: u64,
    /// Attempts so far, of all requests.
    attempts: u64,
    next_open: Option<Arrival>,
    /// Versions for which an event lies in the heap.
    awaited: Vec<u64>,
    awaited_transfers: u64,
    /// Events of blocks on their way to the placer.
    kv_events: VecDeque<(Nanos, u32, KvEvents)>,
    flights: Vec<Option<Flight>>,
    vacant: Vec<u32>,
    /// Requests that wait to be placed again.
    waiting: BTreeMap<u32, Asked>,
    /// Whether a request has ended, or waits, since it was last asked whose turn it is.
    is_turn: bool,
    /// When it is asked again; for that time an event lies in the heap.
    turn_at: Option<Nanos>,
    outputs: Vec<Output>,
    script: Script,
    /// What broke off with engines and is not heard of yet, in order of their deaths.
    broken: VecDeque<Broken>,
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
        observer: &'a mut Observer<'a>,
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
            host_blocks: (member.kind.host_kv_tokens / u64::from(block_tokens)) as u32,
            host_block_seconds: member.host_seconds(u64::from(block_tokens)),
        };
        let next_open = source.open();
        let mut simulation = Self {
            source,
            placer,
            observer,
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
            pull_deadline: nanos(fleet.control.pull_deadline_ms / 1e3),
            rtt: nanos(fleet.links.rtt_us / 1e6),
            now: 0,
            heap: BinaryHeap::new(),
            sequence: 0,
            arrived: 0,
            attempts: 0,
            next_open,
            awaited: vec![0; members.len()],
            awaited_transfers: 0,
            kv_events: VecDeque::new(),
            flights: Vec::new(),
            vacant: Vec::new(),
            waiting: BTreeMap::new(),
            is_turn: false,
            turn_at: None,
            outputs: Vec::new(),
            script: Script::of(fleet),
            broken: VecDeque::new(),
            metrics: Metrics::default(),
            stop: false,
        };
        simulation.push(simulation.load_interval, Event::Load);
        simulation
    }

    fn push(&mut self, at: Nanos, event: Event) {
        debug_assert!(at >= self.now, "{event:?}");
        self.sequence += 1;
        self.heap.push(Reverse(Entry(at, self.sequence, event)));
    }

    fn run(&mut self) {
        while !self.stop && (self.now < self.window.until || self.metrics.unfinished() > 0) {
            let opens_at = self.next_open.as_ref().map(|arrival| match arrival.when {
                When::At(at) | When::After(at) => at,
            });
            let due = self.heap.peek().map(|entry| entry.0.0);
            // A change of the fleet comes before what else happens at its time, and only where something else will happen.
            let next = opens_at.into_iter().chain(due).min();
            if let Some((at, change)) = next.and_then(|next| self.script.next(next)) {
                self.now = self.now.max(at);
                self.change(change);
                continue;
            }
            match (opens_at, due) {
                (Some(at), due) if due.is_none_or(|due| at <= due) => {
                    self.now = self.now.max(at);
                    let arrival = std::mem::replace(&mut self.next_open, self.source.open());
                    arrival.into_iter().for_each(|arrival| self.arrive(arrival));
                }
                (_, Some(_)) => {
                    if let Some(Reverse(Entry(at, _, event))) = self.heap.pop() {
                        self.now = at;
                        self.handle(event);
                    }
                }
                (_, None) => break,
            }
            if self.is_turn && !self.waiting.is_empty() {
                self.turns();
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(arrival) => self.arrive(*arrival),
            Event::Submit(key) => {
                if let Some(engine) = self.submit(key) {
                    self.attend(engine);
                }
            }
            Event::Overlap(key, attempt) => {
                if let Some(engine) = self.overlap(key, attempt) {
                    self.attend(engine);
                }
            }
            Event::Wake { engine, version } => {
                let at = engine as usize;
                if self.engines[at].next().is_some_and(|next| next.1 == version) {
                    self.engines[at].wake(self.now);
                    if let Some(events) = self.engines[at].take_events() {
                        self.kv_events.push_back((self.now + self.event_delay, engine, events));
                    }
                    self.attend(engine);
                }
            }
            Event::Transfers { version } => self.transfers_ended(version),
            Event::Send(key, attempt) => self.send(key, attempt),
            Event::Fetched(key, attempt) => self.fetched(key, attempt),
            Event::Late(key, attempt) => self.late(key, attempt),
            Event::Expire(key, attempt) => self.expire(key, attempt),
            Event::Refused(key, attempt) => self.refused(key, attempt),
            Event::Died(engine) => self.died(engine),
            Event::Back(engine) => self.placer.health(self.now, engine, Health::Back),
            Event::Turn => self.turn_came(),
            Event::Load => self.report_load(),
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
            busy += engine.busy(self.now);
            if engine.is_down() {
                continue;
            }
            let load = engine.load();
            let used = 1.0 - f64::from(load.free_blocks) / f64::from(engine.settings().blocks.max(1));
            let report = LoadReport { waiting: load.waiting, running: load.running, kv_usage: used };
            self.placer.load(self.now, at as u32, &report);
            waiting += load.waiting;
            running += load.running;
        }
        self.placer.loads_reported(self.now);
        self.metrics.timeline.sample(self.now, self.engines.len(), busy, waiting, running);
        if self.next_open.is_some() || !self.heap.is_empty() {
            self.push(self.now + self.load_interval, Event::Load);
        }
    }

    /// Where no request is under way, nobody uses a block.
    fn leaks(&self) -> bool {
        let is_used = |engine: &Engine| engine.load().free_blocks < engine.settings().blocks;
        self.flights.iter().all(Option::is_none) && self.engines.iter().any(is_used)
    }

    fn results(self) -> Results {
        debug_assert!(!self.leaks(), "blocks are kept for nobody");
        let span = self.metrics.end.max(1) as f64;
        let report = |engine: &Engine| {
            let totals = engine.totals();
            EngineReport {
                utilisation: engine.busy(self.metrics.end) as f64 / span,
                prefill_share: totals.prefill as f64 / span,
                prefill_tokens: totals.prefill_tokens,
                loaded_tokens: totals.loaded_tokens,
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
