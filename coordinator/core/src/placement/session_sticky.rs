//! Where the session was before.

use super::{Aim, Modes, Policy, View};

/// Takes the engine that the session is pinned to; the best one where it is not pinned, or that engine cannot.
#[derive(Clone, Copy, Debug)]
pub struct SessionSticky;

impl Policy for SessionSticky {
    fn name(&self) -> &'static str {
        "session_sticky"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let pinned = view.request().pinned.and_then(|slot| view.candidate_of(slot));
        pinned.map_or(Aim::Best(Modes::WHOLE), Aim::Engine)
    }

    fn reason(&self) -> &'static str {
        "the session is pinned to another engine"
    }
}
