//! Whatever adds the fewest seconds.

use super::{Policy, Rank, Request};
use crate::cost::Priced;

/// Takes the option whose predicted seconds sum to the least, whatever its mode.
#[derive(Clone, Copy, Debug)]
pub struct Adaptive;

impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn rank(&self, _: &Request<'_>, option: &Priced) -> Rank {
        Rank { class: 0, seconds: option.terms.total() }
    }

    fn reason(&self, _: u8) -> &'static str {
        ""
    }
}
