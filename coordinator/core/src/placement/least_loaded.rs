//! The idlest engine.

use super::{Aim, Policy, View};

/// Takes the engine with the fewest requests in flight; of equals the one with the fewest tokens to prefill.
#[derive(Clone, Copy, Debug)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least_loaded"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        Aim::Engine(view.least_loaded())
    }

    fn reason(&self) -> &'static str {
        "it had more requests in flight"
    }
}
