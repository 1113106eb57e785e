//! Any engine.

use super::{Aim, Policy, View};

/// Draws an engine, from the request's number.
#[derive(Clone, Copy, Debug)]
pub struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let candidates = view.candidates();
        Aim::Engine(candidates[crate::below(crate::mix(view.request().seed), candidates.len())])
    }

    fn reason(&self) -> &'static str {
        "another engine was drawn"
    }
}
