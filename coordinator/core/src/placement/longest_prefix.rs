//! The engine that holds most.

use std::cmp::Reverse;

use super::{Aim, Policy, View};

/// Takes the engine that holds most of the prompt; of equals the least loaded.
#[derive(Clone, Copy, Debug)]
pub struct LongestPrefix;

impl Policy for LongestPrefix {
    fn name(&self) -> &'static str {
        "longest_prefix"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let order = |at: &u32| (Reverse(view.hit_tokens(*at)), view.load_order(*at));
        Aim::Engine(view.candidates().iter().copied().min_by_key(order).unwrap_or(view.candidates()[0]))
    }

    fn reason(&self) -> &'static str {
        "it holds less of the prompt, or as much and is more loaded"
    }
}
