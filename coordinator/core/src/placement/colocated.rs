//! Never split.

use super::{Policy, Rank, Request};
use crate::cost::{Plan, Priced};

/// Takes the cheapest engine for the whole request.
#[derive(Clone, Copy, Debug)]
pub struct Colocated;

impl Policy for Colocated {
    fn name(&self) -> &'static str {
        "colocated"
    }

    fn rank(&self, _: &Request<'_>, option: &Priced) -> Rank {
        let class = u8::from(matches!(option.plan, Plan::Disaggregated { .. }));
        Rank { class, seconds: option.terms.total() }
    }

    fn reason(&self, _: u8) -> &'static str {
        "the policy never splits a request"
    }
}
