//! Requests that wait for room, as at a coordinator: the same queue, asked in the same way.
//!
//! The first in the queue is decided on again whenever a request ends, and every [`TRY_AGAIN`], since room also comes of prompts that were
//! computed. Who comes while others wait goes behind them. A request whose time is over, or whose place a more urgent one took, is turned away, and the
//! planner hears that it got nothing of what it was promised. A request that an engine failed does not wait a second time.

use std::collections::BTreeMap;

use baton_coordinator_core::admission::{self, Admission, Offer, Ticket};
use baton_coordinator_core::cost::{EXPECTED_OUTPUT_TOKENS, Priced, Slo};
use baton_coordinator_core::fleet as core;
use baton_coordinator_core::kv_index::Slot;
use baton_coordinator_core::placement::{self, Decision, Skipped};
use baton_coordinator_core::planner::{Beginnings, Finished, Placed};

use super::Production;
use crate::fleet::Control;
use crate::sim::{Answer, Request, Turn};
use crate::{MILLISECOND, Nanos};

/// How often the first is tried where nothing ends.
const TRY_AGAIN: Nanos = 20 * MILLISECOND;
/// All requests are alike.
const PRIORITY: u8 = 0;

/// What the planner knows of a request that was not sent anywhere: its number, and how long its answer is expected to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    number: u64,
    tokens: u64,
}

/// Who waits.
#[derive(Debug)]
pub(super) struct Room {
    queue: Admission,
    /// By key, which is also the ticket's id.
    waiting: BTreeMap<u32, Option<Noted>>,
    /// Those whose place others took.
    displaced: Vec<u32>,
    /// Whether the first is to try at once.
    told: bool,
    /// When it tries where nothing ends.
    try_at: Nanos,
}

impl Room {
    pub(super) fn new(control: &Control) -> Self {
        Self {
            queue: Admission::new(control.max_waiting as usize),
            waiting: BTreeMap::new(),
            displaced: Vec::new(),
            told: false,
            try_at: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> u64 {
        self.waiting.len() as u64
    }

    pub(super) fn has(&self, key: u32) -> bool {
        !self.waiting.is_empty() && self.waiting.contains_key(&key)
    }

    /// Whether the planner knows of a request that waits.
    pub(super) fn is_noted(&self, key: u32) -> bool {
        self.waiting.get(&key).is_some_and(Option::is_some)
    }

    /// A request that waited is dispatched, or cannot be.
    pub(super) fn admitted(&mut self, now_ms: u64, key: u32) {
        self.waiting.remove(&key);
        self.queue.admitted(now_ms, key.into());
        // There may be room for more than one.
        self.told = true;
    }

    /// A request ended: there may be room.
    pub(super) fn departed(&mut self, now_ms: u64) {
        self.queue.departed(now_ms);
        self.told = true;
    }

    /// Whose turn it is, and what the planner knows of who is turned away.
    pub(super) fn turn(&mut self, now: Nanos) -> Option<(Turn, Option<Noted>)> {
        let now_ms = now / MILLISECOND;
        let over = self.displaced.pop().or_else(|| Some(self.queue.expired(now_ms)?.id as u32));
        if let Some(key) = over {
            self.told = true;
            return Some((Turn::Refused(key), self.waiting.remove(&key).flatten()));
        }
        if !self.told && now < self.try_at {
            return None;
        }
        let first = self.queue.next(now_ms)?;
        Some((Turn::Again(first as u32), None))
    }

    /// When it is somebody's.
    pub(super) fn next_turn(&self) -> Option<Nanos> {
        let deadline = self.queue.next_deadline_ms()?;
        Some(self.try_at.min(deadline * MILLISECOND))
    }
}

/// Whether no engine is left to a request because all that could serve it have as many as they may.
pub(super) fn is_full(fleet: &core::Fleet, request: &placement::Request<'_>) -> bool {
    placement::skipped(fleet, request).iter().any(|(_, why)| *why == Skipped::Full)
}

impl Production {
    /// Tells the planner of a request, as it was first decided on.
    pub(super) fn note(
        &mut self,
        now_ms: u64,
        request: &Request<'_>,
        decision: &Decision,
        slo: Slo,
    ) -> Option<Noted> {
        let planner = self.planner.as_mut()?;
        let (prefill, hit_tokens) = (decision.plan().prefill(), decision.chosen.hit_tokens);
        let placed = Placed {
            now_ms,
            model: self.model.clone(),
            prompt_tokens: u64::from(request.prompt_tokens),
            beginnings: Beginnings::of(&self.hashes, self.block_tokens),
            cached: (Slot(prefill), hit_tokens),
            slo,
        };
        planner.placed(request.number, placed);
        let expected = self.fleet.engines()[prefill as usize].answer_tokens.unwrap_or(EXPECTED_OUTPUT_TOKENS);
        let tokens = self.max_tokens.map_or(expected as u64, |most| most.min(expected as u64));
        Some(Noted { number: request.number, tokens })
    }

    /// A request waits, if there is room for it and it has the time. `priced`: the plan that it had without waiting.
    pub(super) fn wait(
        &mut self,
        now: Nanos,
        request: &Request<'_>,
        priced: Option<&Priced>,
        noted: Option<Noted>,
    ) -> Answer {
        let room = &mut self.room;
        if room.is_empty() || room.has(request.key) {
            (room.told, room.try_at) = (false, now + TRY_AGAIN);
        }
        if let Some(known) = room.waiting.get_mut(&request.key) {
            *known = known.or(noted);
            return Answer::Waits;
        }
        let now_ms = now / MILLISECOND;
        let longest_ms = u64::from(self.described.control.longest_wait_ms);
        let unqueued = priced.map_or(0.0, admission::unqueued_ttft_seconds);
        let patience = admission::latest_dispatch_ms(0, self.slo.ttft_seconds, unqueued, longest_ms);
        let deadline_ms = (request.arrived + patience * MILLISECOND) / MILLISECOND;
        let ticket = Ticket { id: request.key.into(), priority: PRIORITY, deadline_ms };
        match room.queue.offer(now_ms, ticket) {
            Offer::Waits => {}
            Offer::Displaces(refused) => room.displaced.push(refused.id as u32),
            Offer::Refused(_) => {
                noted.into_iter().for_each(|noted| self.turned_away(noted));
                return Answer::Refused;
            }
        }
        room.waiting.insert(request.key, noted);
        Answer::Waits
    }

    /// A request was not sent anywhere in time: whatever it was promised, it did not get.
    pub(super) fn turned_away(&mut self, noted: Noted) {
        if let Some(planner) = &mut self.planner {
            let never = f64::INFINITY;
            let finished = Finished { tokens: noted.tokens, ttft_seconds: never, itl_seconds: never };
            planner.finished(noted.number, &finished);
        }
    }
}
