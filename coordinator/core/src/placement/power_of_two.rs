//! The less loaded of two.

use super::{Aim, Policy, View};

/// Draws two engines, from the request's number, and takes the one with fewer requests in flight.
#[derive(Clone, Copy, Debug)]
pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power_of_two"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let candidates = view.candidates();
        let first = crate::mix(view.request().seed);
        let one = crate::below(first, candidates.len());
        // Any of the others.
        let other = match candidates.len() {
            1 => one,
            n => (one + 1 + crate::below(crate::mix(first), n - 1)) % n,
        };
        let (one, other) = (candidates[one], candidates[other]);
        let load = |at| (view.in_flight(at), at);
        Aim::Engine(if load(other) < load(one) { other } else { one })
    }

    fn reason(&self) -> &'static str {
        "it was not drawn, or had more requests in flight than the other one"
    }
}
