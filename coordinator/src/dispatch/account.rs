//! One request's entry in the metrics, and its permit: made and given back on every way out.

use std::sync::Arc;

use baton_coordinator_core::cost::Term;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::place::Wanted;
use crate::decisions::Decisions;
use crate::metrics::{Mode, Outcome};
use crate::state::Coordinator;

/// Counts the request when it is dropped: as cancelled, unless told otherwise before.
pub(super) struct Account {
    coordinator: Arc<Coordinator>,
    arrived: Instant,
    model: String,
    _permit: OwnedSemaphorePermit,
    pub(super) mode: Mode,
    pub(super) outcome: Outcome,
}

impl Account {
    pub(super) fn open(coordinator: Arc<Coordinator>, wanted: &Wanted, permit: OwnedSemaphorePermit) -> Self {
        Self {
            coordinator,
            arrived: wanted.arrived,
            model: wanted.model.clone(),
            _permit: permit,
            mode: Mode::None,
            outcome: Outcome::Cancelled,
        }
    }

    /// A term of its cost was predicted, and then seen.
    pub(super) fn seen(&self, term: Term, predicted: f64, seen: f64) {
        self.coordinator.seen(term, predicted, seen);
    }

    /// What decisions leave behind.
    pub(super) fn decisions(&self) -> &Decisions {
        &self.coordinator.decisions
    }

    /// The first byte of a stream goes out.
    pub(super) fn first_token(&self) {
        self.coordinator.metrics.first_token(self.mode, self.arrived.elapsed().as_secs_f64());
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.coordinator.metrics.request(self.mode, self.outcome);
        self.coordinator.waiting.departed(&self.model);
    }
}
