//! Whatever is best.

use super::{Aim, Modes, Policy, View};

/// Takes the best plan, whatever its kind.
#[derive(Clone, Copy, Debug)]
pub struct Adaptive;

impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn aim(&self, _: &View<'_>) -> Aim {
        Aim::Best(Modes::ALL)
    }

    fn gives_parts(&self) -> bool {
        true
    }

    fn reason(&self) -> &'static str {
        "the policy takes any plan"
    }
}
