//! A placer that is looked over its shoulder.

use baton_sim::Nanos;
use baton_sim::engine::events::KvEvents;
use baton_sim::sim::{Answer, Health, LoadReport, Placer, Plan, Progress, Request, Turn};

/// Another placer, watched.
pub(crate) struct Watched {
    pub(crate) placer: Box<dyn Placer>,
    pub(crate) placed: Vec<(Nanos, Plan)>,
    pub(crate) health: Vec<(Nanos, u32, Health)>,
    pub(crate) attempts: usize,
    /// Each request's: how it went on.
    pub(crate) progress: Vec<(Nanos, u32, Progress)>,
}

pub(crate) fn watched(placer: impl Placer + 'static) -> Watched {
    watched_box(Box::new(placer))
}

pub(crate) fn watched_box(placer: Box<dyn Placer>) -> Watched {
    Watched { placer, placed: Vec::new(), health: Vec::new(), attempts: 0, progress: Vec::new() }
}

impl Placer for Watched {
    fn place(&mut self, now: Nanos, request: &Request<'_>) -> Answer {
        let answer = self.placer.place(now, request);
        let plan = match answer {
            Answer::Goes(plan) | Answer::Overlaps(plan, _) => Some(plan),
            Answer::Waits | Answer::Refused => None,
        };
        self.placed.extend(plan.map(|plan| (now, plan)));
        self.attempts = self.attempts.max(request.avoid.len() + 1);
        if let (Some(plan), false) = (plan, request.avoid.is_empty()) {
            assert!(!request.avoid.contains(&plan.decode()), "{:?} {plan:?}", request.avoid);
        }
        answer
    }
    fn turn(&mut self, now: Nanos) -> Option<Turn> {
        self.placer.turn(now)
    }
    fn next_turn(&self) -> Option<Nanos> {
        self.placer.next_turn()
    }
    fn wants_kv_events(&self) -> bool {
        self.placer.wants_kv_events()
    }
    fn kv_events(&mut self, now: Nanos, engine: u32, events: &KvEvents) {
        self.placer.kv_events(now, engine, events);
    }
    fn load(&mut self, now: Nanos, engine: u32, report: &LoadReport) {
        self.placer.load(now, engine, report);
    }
    fn loads_reported(&mut self, now: Nanos) {
        self.placer.loads_reported(now);
    }
    fn health(&mut self, now: Nanos, engine: u32, health: Health) {
        self.health.push((now, engine, health));
        self.placer.health(now, engine, health);
    }
    fn progress(&mut self, now: Nanos, key: u32, progress: &Progress) {
        self.progress.push((now, key, *progress));
        self.placer.progress(now, key, progress);
    }
}
