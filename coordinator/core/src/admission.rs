//! Requests that wait because nothing can serve them in time: bounded, by priority and deadline.
//!
//! A pure queue. Whoever drives it asks [`Admission::offer`] for each request that finds no room, takes the next one with
//! [`Admission::next`] whenever something was finished, and refuses what [`Admission::expired`] gives. Within a priority the earliest deadline
//! goes first, which serves the most requests in time where any order does; equal deadlines go in order of arrival.
//!
//! # Bounds
//! At most `most` requests wait. When one more comes, the last in order is refused: the new one, or one that waited. None
//! waits beyond its deadline. A refused request is told when to come back: how long the requests before it will take at the rate at which
//! others left, one second to a minute.
//!
//! # Memory
//! About 100 bytes for each request that waits, besides what the driver keeps for it.

use std::collections::{BTreeMap, BTreeSet};

use crate::cost::{Priced, Slo, Term};

/// Retry-After, at least and at most.
const SHORTEST_RETRY_SECONDS: u64 = 1;
const LONGEST_RETRY_SECONDS: u64 = 60;
/// Weight of a new interval between two departures.
const WEIGHT: f64 = 0.1;

/// A request that would wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The driver's name for it; unique among those that wait.
    pub id: u64,
    /// The smaller goes first.
    pub priority: u8,
    /// It is refused at this time, milliseconds on any clock that does not run backwards.
    pub deadline_ms: u64,
}

/// A refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Whose.
    pub id: u64,
    /// When to come back.
    pub retry_after_seconds: u64,
}

/// What becomes of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// It waits; nobody is refused.
    Waits,
    /// It waits, and one that waited is refused for it.
    Displaces(Refused),
    /// It is refused.
    Refused(Refused),
}

/// Priority, deadline, arrival.
type Key = (u8, u64, u64);

/// The queue.
#[derive(Clone, Debug)]
pub struct Admission {
    most: usize,
    waiting: BTreeMap<Key, u64>,
    keys: BTreeMap<u64, Key>,
    deadlines: BTreeSet<(u64, u64)>,
    arrivals: u64,
    last_departure_ms: Option<u64>,
    interval_ms: f64,
}

impl Admission {
    /// An empty queue for at most `most` requests; 0 refuses at once.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            waiting: BTreeMap::new(),
            keys: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            arrivals: 0,
            last_departure_ms: None,
            interval_ms: 0.0,
        }
    }

    /// A request finds no room. One whose deadline is over, or whose id waits already, is refused.
    pub fn offer(&mut self, now_ms: u64, ticket: Ticket) -> Offer {
        if ticket.deadline_ms <= now_ms || self.keys.contains_key(&ticket.id) || self.most == 0 {
            return Offer::Refused(self.refusal(ticket.id));
        }
        self.arrivals += 1;
        let key = (ticket.priority, ticket.deadline_ms, self.arrivals);
        let mut displaced = None;
        if self.waiting.len() >= self.most {
            match self.waiting.last_key_value() {
                Some((last, id)) if *last > key => displaced = Some(*id),
                _ => return Offer::Refused(self.refusal(ticket.id)),
            }
        }
        let offer = match displaced {
            None => Offer::Waits,
            Some(id) => {
                let refused = self.refusal(id);
                self.cancel(id);
                Offer::Displaces(refused)
            }
        };
        self.waiting.insert(key, ticket.id);
        self.keys.insert(ticket.id, key);
        self.deadlines.insert((ticket.deadline_ms, ticket.id));
        offer
    }

    /// The request that is to be tried next; it keeps its place. Those whose deadline is over are passed by.
    pub fn next(&self, now_ms: u64) -> Option<u64> {
        self.waiting.iter().find(|(key, _)| key.1 > now_ms).map(|entry| *entry.1)
    }

    /// A request that waited is dispatched.
    pub fn admitted(&mut self, now_ms: u64, id: u64) {
        self.cancel(id);
        self.departed(now_ms);
    }

    /// A request was dispatched or finished, so that the rate at which room becomes free is known. Every
    /// dispatch counts once: [`Admission::admitted`] does so itself.
    pub fn departed(&mut self, now_ms: u64) {
        if let Some(last) = self.last_departure_ms {
            let interval = now_ms.saturating_sub(last) as f64;
            let weight = if self.interval_ms == 0.0 { 1.0 } else { WEIGHT };
            self.interval_ms += weight * (interval - self.interval_ms);
        }
        self.last_departure_ms = Some(now_ms);
    }

    /// A request does not wait any more: its client left. Returns whether it waited.
    pub fn cancel(&mut self, id: u64) -> bool {
        let Some(key) = self.keys.remove(&id) else { return false };
        self.waiting.remove(&key);
        self.deadlines.remove(&(key.1, id));
        true
    }

    /// Takes out one request whose deadline is over; ask until there is none.
    pub fn expired(&mut self, now_ms: u64) -> Option<Refused> {
        let (deadline, id) = *self.deadlines.first()?;
        if deadline > now_ms {
            return None;
        }
        let refused = self.refusal(id);
        self.cancel(id);
        Some(refused)
    }

    /// When [`Admission::expired`] will have something.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.first().map(|entry| entry.0)
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn refusal(&self, id: u64) -> Refused {
        let milliseconds = self.interval_ms * (self.waiting.len() as f64 + 1.0);
        let seconds = (milliseconds / 1e3).ceil() as u64;
        let retry_after_seconds = seconds.clamp(SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS);
        Refused { id, retry_after_seconds }
    }
}

/// The latest time at which a request can be dispatched and still have its first token in time: when it arrived,
/// plus its SLO, less what the option that is best without any queue takes. Milliseconds; no later than `longest_wait_ms` after its
/// arrival, and no earlier than its arrival.
pub fn latest_dispatch_ms(
    arrived_ms: u64,
    ttft_slo_seconds: Option<f64>,
    unqueued_ttft_seconds: f64,
    longest_wait_ms: u64,
) -> u64 {
    let patience = match ttft_slo_seconds {
        Some(slo) => ((slo - unqueued_ttft_seconds).max(0.0) * 1e3) as u64,
        None => longest_wait_ms,
    };
    arrived_ms.saturating_add(patience.min(longest_wait_ms))
}

/// Whether a request that has waited for so long had better wait on than be dispatched as decided: it would come late, and with fewer requests
/// beside it, it would not. `beside` counts the requests that are in flight on the plan's engines. A request that could not have been served in time by
/// idle engines when it came is dispatched as well as possible; one that could have been, and waited for too long, would only hold up others.
pub fn had_better_wait(slo: &Slo, waited_seconds: f64, chosen: &Priced, beside: u64) -> bool {
    let unqueued = unqueued_ttft_seconds(chosen);
    let late = |slo: f64| waited_seconds + chosen.ttft_seconds > slo && unqueued <= slo;
    let first_late = slo.ttft_seconds.is_some_and(late);
    let others_late = slo.itl_seconds.is_some_and(|slo| chosen.itl_seconds > slo);
    beside > 0 && (first_late || others_late)
}

/// The time to the first token that a plan would have, were nothing queued before it.
pub fn unqueued_ttft_seconds(chosen: &Priced) -> f64 {
    let queues = [Term::QueueWait, Term::TransferWait, Term::DecodeQueueWait, Term::RoomWait];
    let queued: f64 = queues.iter().map(|term| chosen.terms.get(*term)).sum();
    (chosen.ttft_seconds - queued).max(0.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::{Plan, Terms};

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Offer { id: u64, priority: u8, patience: u64 },
        Admit,
        Cancel(u64),
        Pass(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0u64..20, 0u8..3, 0u64..500)
                .prop_map(|(id, priority, patience)| Op::Offer { id, priority, patience }),
            2 => Just(Op::Admit),
            1 => (0u64..20).prop_map(Op::Cancel),
            2 => (0u64..200).prop_map(Op::Pass),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_bounded_sorted_list(most in 0usize..6, ops in prop::collection::vec(op(), 0..150)) {
            let mut queue = Admission::new(most);
            // Priority, deadline, arrival, id; sorted.
            let mut model: Vec<(u8, u64, u64, u64)> = Vec::new();
            let (mut now, mut arrivals) = (1000, 0);
            for op in ops {
                match op {
                    Op::Pass(ms) => {
                        now += ms;
                        let mut over: Vec<u64> = model.iter().filter(|e| e.1 <= now).map(|e| e.3).collect();
                        model.retain(|e| e.1 > now);
                        let mut refused: Vec<u64> =
                            std::iter::from_fn(|| queue.expired(now)).map(|refused| refused.id).collect();
                        over.sort_unstable();
                        refused.sort_unstable();
                        prop_assert_eq!(refused, over);
                    }
                    Op::Offer { id, priority, patience } => {
                        let ticket = Ticket { id, priority, deadline_ms: now + patience };
                        let offer = queue.offer(now, ticket);
                        let known = model.iter().any(|entry| entry.3 == id);
                        arrivals += 1;
                        let mut last = None;
                        if patience > 0 && !known {
                            model.push((priority, now + patience, arrivals, id));
                            model.sort_unstable();
                            if model.len() > most {
                                last = model.pop();
                            }
                        }
                        match offer {
                            Offer::Waits => prop_assert!(last.is_none() && !known && patience > 0),
                            Offer::Displaces(refused) => {
                                prop_assert_eq!(Some(refused.id), last.map(|entry| entry.3));
                                prop_assert_ne!(refused.id, id);
                            }
                            Offer::Refused(refused) => {
                                prop_assert_eq!(refused.id, id);
                                prop_assert!((1..=60).contains(&refused.retry_after_seconds));
                                prop_assert!(known || patience == 0 || last.map(|entry| entry.3) == Some(id));
                            }
                        }
                    }
                    Op::Admit => {
                        let next = queue.next(now);
                        prop_assert_eq!(next, model.first().map(|entry| entry.3));
                        if let Some(id) = next {
                            queue.admitted(now, id);
                            model.remove(0);
                        }
                    }
                    Op::Cancel(id) => {
                        let known = model.iter().any(|entry| entry.3 == id);
                        prop_assert_eq!(queue.cancel(id), known);
                        model.retain(|entry| entry.3 != id);
                    }
                }
                prop_assert_eq!(queue.len(), model.len());
                prop_assert!(queue.len() <= most);
                prop_assert_eq!(queue.next_deadline_ms(), model.iter().map(|entry| entry.1).min());
            }
        }
    }

    #[test]
    fn who_is_refused_is_told_when_room_is_likely() {
        let mut queue = Admission::new(3);
        for at in 0..50 {
            queue.departed(at * 2000);
        }
        let ticket = |id| Ticket { id, priority: 0, deadline_ms: 200_000 };
        for id in 0..3 {
            assert_eq!(queue.offer(100_000, ticket(id)), Offer::Waits);
        }
        let refused = Refused { id: 3, retry_after_seconds: 8 };
        assert_eq!(queue.offer(100_000, ticket(3)), Offer::Refused(refused));
        let urgent = Ticket { priority: 0, deadline_ms: 150_000, id: 4 };
        assert!(matches!(queue.offer(100_000, urgent), Offer::Displaces(Refused { id: 2, .. })));
    }

    #[test]
    fn who_would_be_in_time_but_for_others_waits() {
        let mut terms = Terms::default();
        terms.set(Term::QueueWait, 1.0);
        terms.set(Term::Prefill, 0.5);
        let chosen = Priced {
            plan: Plan::Colocated { engine: 0 },
            terms,
            seconds: 1.5,
            ttft_seconds: 1.5,
            itl_seconds: 0.02,
            late_seconds: 0.0,
            hit_tokens: 0,
            uncached_tokens: 10,
            transfer_bytes: 0,
            transfer_seconds: 0.0,
            early_seconds: None,
            prefill_seconds: 0.5,
        };
        assert_eq!(unqueued_ttft_seconds(&chosen), 0.5);
        let slo = |ttft_seconds, itl_seconds| Slo { ttft_seconds, itl_seconds };
        for (slo, waited, beside, waits) in [
            (slo(None, None), 0.0, 9, false),
            (slo(Some(2.0), None), 0.0, 9, false),
            (slo(Some(2.0), None), 0.6, 9, true),
            // There is not even the time for the prefill left.
            (slo(Some(2.0), None), 1.6, 9, true),
            (slo(Some(1.0), None), 0.0, 9, true),
            (slo(Some(1.0), None), 0.0, 0, false),
            (slo(Some(0.4), None), 0.0, 9, false),
            (slo(None, Some(0.01)), 5.0, 9, true),
            (slo(None, Some(0.01)), 0.0, 0, false),
            (slo(None, Some(0.03)), 5.0, 9, false),
        ] {
            assert_eq!(had_better_wait(&slo, waited, &chosen, beside), waits, "{slo:?} {waited} {beside}");
        }
    }

    #[test]
    fn the_latest_dispatch_leaves_time_for_the_prefill() {
        assert_eq!(latest_dispatch_ms(1000, Some(2.0), 0.5, 10_000), 2500);
        assert_eq!(latest_dispatch_ms(1000, Some(2.0), 3.0, 10_000), 1000);
        assert_eq!(latest_dispatch_ms(1000, None, 3.0, 10_000), 11_000);
        assert_eq!(latest_dispatch_ms(1000, Some(60.0), 0.0, 10_000), 11_000);
    }
}
