//! Always split where a pair of engines can.

use super::{Policy, Rank, Request};
use crate::cost::{Plan, Priced};

/// Takes the cheapest pair; one engine only where no pair can serve the request.
#[derive(Clone, Copy, Debug)]
pub struct Disaggregated;

impl Policy for Disaggregated {
    fn name(&self) -> &'static str {
        "disaggregated"
    }

    fn rank(&self, _: &Request<'_>, option: &Priced) -> Rank {
        let class = u8::from(matches!(option.plan, Plan::Colocated { .. }));
        Rank { class, seconds: option.terms.total() }
    }

    fn reason(&self, _: u8) -> &'static str {
        "the policy splits every request it can"
    }
}
