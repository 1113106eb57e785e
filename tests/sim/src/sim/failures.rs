//! Engines that die and come back, and cards that change their width, by the fleet's script.

use super::placer::{Health, Progress};
use super::requests::{Flight, MAX_ATTEMPTS};
use super::transfers::Fetching;
use super::{Event, Simulation};
use crate::fleet::Fleet;
use crate::{Nanos, nanos};

/// Something that happens to the fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    /// An engine dies.
    Down(u32),
    /// It is back.
    Up(u32),
    /// A host's card has another width, bytes per second.
    Card(u32, f64),
}

/// What broke off with an engine: attempts of requests.
#[derive(Debug)]
pub(super) struct Broken {
    engine: u32,
    /// Those whose part there was all they were waiting for.
    parts: Vec<(u32, u64)>,
    /// Those whose second part is under way and got some of the first one's blocks at most.
    firsts: Vec<(u32, u64)>,
}

/// What is still to happen.
#[derive(Debug)]
pub(super) struct Script {
    /// The next one is the last.
    changes: Vec<(Nanos, Change)>,
}

impl Script {
    pub(super) fn of(fleet: &Fleet) -> Self {
        let mut changes = Vec::new();
        for outage in &fleet.outages {
            changes.push((nanos(outage.from_seconds), Change::Down(outage.engine)));
            let back = outage.until_seconds;
            changes.extend(back.map(|until| (nanos(until), Change::Up(outage.engine))));
        }
        for card in &fleet.cards {
            for at in [Some(card.from_seconds), card.until_seconds].into_iter().flatten() {
                let width = fleet.card_width(card.host, at);
                changes.push((nanos(at), Change::Card(card.host, width)));
            }
        }
        // At one time in the order of the file, the end of one outage before the beginning of the next.
        changes.sort_by_key(|(at, change)| (*at, matches!(change, Change::Down(_))));
        changes.reverse();
        Self { changes }
    }

    /// What happens next, if it is not later than this.
    pub(super) fn next(&mut self, until: Nanos) -> Option<(Nanos, Change)> {
        self.changes.pop_if(|change| change.0 <= until)
    }
}

impl Simulation<'_> {
    pub(super) fn change(&mut self, change: Change) {
        match change {
            Change::Down(engine) => self.down(engine),
            Change::Up(engine) => {
                self.engines[engine as usize].restart(false);
                self.push(self.now + self.dispatch, Event::Back(engine));
            }
            Change::Card(host, width) => {
                self.network.set_card(self.now, host, width);
                self.await_transfers();
            }
        }
    }

    /// An engine dies, and all that it had to do with it.
    fn down(&mut self, engine: u32) {
        self.engines[engine as usize].stop(self.now);
        // What it said until then counts.
        self.attend(engine);
        self.kv_events.retain(|event| event.1 != engine);
        let (mut parts, mut firsts, mut cut) = (Vec::new(), Vec::new(), Vec::new());
        for (key, flight) in self.flights.iter_mut().enumerate() {
            let Some(flight) = flight else { continue };
            let sends = flight.plan.transfer().is_some_and(|of| of.0 == engine);
            let breaks = match (sends, flight.first) {
                (true, Some(first)) => !first.ended && !flight.second,
                (true, None) => continue,
                (false, _) => flight.handle.is_some() && flight.plan.decode() == engine,
            };
            if breaks {
                self.attempts += 1;
                flight.attempt = self.attempts;
                (flight.handle, flight.fetch) = (None, Fetching::default());
                parts.push((key as u32, flight.attempt));
            } else if sends {
                if flight.first.is_some_and(|first| !first.ended) {
                    firsts.push((key as u32, flight.attempt));
                }
                cut.push((key as u32, flight.attempt));
            }
            if sends {
                flight.first = None;
            }
        }
        for (key, attempt) in cut {
            let flight = self.flight(key);
            // All of it may have come.
            if flight.fetch.lacks() {
                self.cut_short(key);
                self.push(self.now + self.rtt, Event::Fetched(key, attempt));
            }
        }
        for (key, _) in &parts {
            self.network.cancel(self.now, u64::from(*key));
        }
        self.await_transfers();
        self.engines[engine as usize].restart(true);
        self.broken.push_back(Broken { engine, parts, firsts });
        self.push(self.now + self.dispatch, Event::Died(engine));
    }

    /// Those who wait for an engine hear that it died.
    pub(super) fn died(&mut self, engine: u32) {
        self.deliver_kv_events();
        let Some(broken) = self.broken.pop_front() else { return };
        debug_assert_eq!(broken.engine, engine);
        self.placer.health(self.now, engine, Health::Died);
        for (key, attempt) in broken.parts {
            if self.attempt(key, attempt).is_some() {
                self.part_failed(key);
            }
        }
        for (key, attempt) in broken.firsts {
            if self.attempt(key, attempt).is_some_and(|flight| flight.first_token.is_none()) {
                self.placer.progress(self.now, key, &Progress::FellBack);
            }
        }
    }

    /// An engine could not be reached.
    pub(super) fn refused(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        let engine = flight.engine();
        self.placer.health(self.now, engine, Health::Refused);
        self.part_failed(key);
    }

    /// A part of a request failed.
    fn part_failed(&mut self, key: u32) {
        let flight = self.flight(key);
        if !flight.second {
            flight.give_up_first_part();
            self.placer.progress(self.now, key, &Progress::FellBack);
            self.push(self.now + self.dispatch, Event::Submit(key));
            return;
        }
        let released = self.leave(key);
        if let Some(flight) = self.flights[key as usize].take() {
            self.placer.progress(self.now, key, &Progress::Failed);
            let Flight { mut asked, plan, first_token, .. } = flight;
            asked.avoid.push(plan.decode());
            if first_token.is_none() && asked.avoid.len() < MAX_ATTEMPTS {
                self.deliver_kv_events();
                self.place(key, asked);
            } else {
                self.metrics.failed += u64::from(asked.measured);
                self.lose(key, &asked);
            }
        }
        released.into_iter().for_each(|engine| self.attend(engine));
    }
}
