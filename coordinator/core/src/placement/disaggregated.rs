//! Always split where a pair of engines can.

use super::{Aim, Modes, Policy, View};

/// Takes the best pair; one engine only where no pair can serve the request.
#[derive(Clone, Copy, Debug)]
pub struct Disaggregated;

impl Policy for Disaggregated {
    fn name(&self) -> &'static str {
        "disaggregated"
    }

    fn aim(&self, _: &View<'_>) -> Aim {
        Aim::Best(Modes::PAIRS)
    }

    fn reason(&self) -> &'static str {
        "the policy splits every request it can"
    }
}
