//! One after another.

use super::{Aim, Policy, View};

/// Takes the engines in turn, by the request's number.
#[derive(Clone, Copy, Debug)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round_robin"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let candidates = view.candidates();
        Aim::Engine(candidates[(view.request().seed % candidates.len() as u64) as usize])
    }

    fn reason(&self) -> &'static str {
        "it was another engine's turn"
    }
}
