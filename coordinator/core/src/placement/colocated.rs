//! Never split.

use super::{Aim, Modes, Policy, View};

/// Takes the best engine for the whole request, what it holds of the prompt included.
#[derive(Clone, Copy, Debug)]
pub struct Colocated;

impl Policy for Colocated {
    fn name(&self) -> &'static str {
        "colocated"
    }

    fn aim(&self, _: &View<'_>) -> Aim {
        Aim::Best(Modes::WHOLE)
    }

    fn reason(&self) -> &'static str {
        "the policy never splits a request"
    }
}
