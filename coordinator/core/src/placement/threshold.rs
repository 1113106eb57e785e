//! Split what is long and not cached.

use super::{Aim, Modes, Policy, View};

/// Fewer uncached tokens than this stay where they decode.
const UNCACHED_TOKENS: u64 = 2048;
/// And so does a prompt of which less than this part is uncached.
const UNCACHED_PART: f64 = 0.7;

/// Keeps a request on the engine that is best for it as a whole where fewer than 2,048 tokens and less than 70 % of its prompt are
/// uncached there; else takes the best pair.
#[derive(Clone, Copy, Debug)]
pub struct Threshold;

impl Policy for Threshold {
    fn name(&self) -> &'static str {
        "threshold"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let local = view.best_whole();
        let uncached = view.request().prompt_tokens - view.hit_tokens(local);
        let part = uncached as f64 / view.request().prompt_tokens.max(1) as f64;
        match uncached < UNCACHED_TOKENS && part < UNCACHED_PART {
            true => Aim::Engine(local),
            false => Aim::Best(Modes::PAIRS),
        }
    }

    fn reason(&self) -> &'static str {
        "the policy's threshold of uncached tokens decides between one engine and two"
    }
}
