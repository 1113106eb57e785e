//! Whether a request goes now, waits, or is turned away.

use std::time::Duration;

use http::StatusCode;

use super::flow::Flow;
use super::noted::Noted;
use super::place::{Placement, Unplaced};
use super::waiting::{NoRoom, Place};
use crate::http::ApiError;

/// Most options in the explanation header, so that it stays in the size that clients take.
const MAX_EXPLAINED: usize = 12;

/// Why a request is not dispatched.
pub(super) enum Turned {
    Away(Unplaced),
    NoRoom(NoRoom),
}

impl Flow<'_> {
    /// Decides anew.
    pub(super) fn decide(&self) -> Result<Placement, Unplaced> {
        let explained = self.wanted.explain.then_some(MAX_EXPLAINED);
        self.wanted.place(self.coordinator, &self.avoid, explained, true)
    }

    /// Decides; where no engine has room, or its first token would come late, once that is better, and where it does not become better
    /// in time, not at all. The planner hears of it at the first decision.
    pub(super) async fn wait_for_room(&mut self) -> Result<Placement, Turned> {
        let (room, model) = (&self.coordinator.waiting, &self.wanted.model);
        let longest = Duration::from_millis(self.coordinator.config.limits.longest_wait_ms.into());
        let mut place: Option<Place> = None;
        loop {
            let first = self.decide();
            if let (None, Ok(placement)) = (&self.noted, &first) {
                self.noted = Noted::new(&self.coordinator.decisions, self.wanted, placement);
            }
            let ready = match &first {
                Ok(placement) => !placement.had_better_wait,
                Err(unplaced) => *unplaced != Unplaced::Full,
            };
            // Who comes while others wait goes behind them.
            if ready && (place.is_some() || !room.is_busy(model)) {
                if let Some(place) = place {
                    place.admitted();
                }
                return first.map_err(Turned::Away);
            }
            let place = match &mut place {
                Some(place) => place,
                None => {
                    let priced = first.as_ref().ok().map(|placement| &placement.decision.chosen);
                    let until = self.wanted.patience(priced, longest);
                    let entered = room.enter(model, self.wanted.priority, until).map_err(Turned::NoRoom)?;
                    self.coordinator.metrics.waited.inc();
                    place.insert(entered)
                }
            };
            place.turn().await.map_err(Turned::NoRoom)?;
        }
    }

    /// The answer to a request that is not dispatched.
    pub(super) fn refusal(&self, turned: Turned) -> ApiError {
        let model = &self.wanted.model;
        match turned {
            Turned::Away(unplaced) => unplaced.refusal(model),
            Turned::NoRoom(NoRoom { retry_after_seconds }) => {
                let message = format!("No engine of {model} could have answered in time.");
                ApiError::of(StatusCode::TOO_MANY_REQUESTS, message).retry_after(retry_after_seconds)
            }
        }
    }
}
