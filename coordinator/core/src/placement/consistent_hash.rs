//! The home of the prefix.

use super::{Aim, Policy, View};

/// Takes the engine that is the home of the prompt's first tokens, while its load is within bounds ([`crate::ring`]); the
/// least loaded where none of the first candidates' is.
#[derive(Clone, Copy, Debug)]
pub struct ConsistentHash;

impl Policy for ConsistentHash {
    fn name(&self) -> &'static str {
        "consistent_hash"
    }

    fn aim(&self, view: &View<'_>) -> Aim {
        let request = view.request();
        let key = request.prefix_key.unwrap_or(request.seed);
        Aim::Engine(view.home(key).unwrap_or_else(|| view.least_loaded()))
    }

    fn reason(&self) -> &'static str {
        "it is not the home of the prefix, or was loaded beyond the bound"
    }
}
