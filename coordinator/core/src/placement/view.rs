//! What a policy sees.

use super::Request;
use super::decider::Scratch;
use crate::cost::{Key, Pricing};
use crate::kv_index::Slot;

/// A request, and the engines that could serve all of it, priced.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(super) request: &'a Request<'a>,
    pub(super) pricing: &'a Pricing<'a>,
    pub(super) scratch: &'a Scratch,
}

impl<'a> View<'a> {
    /// The request.
    pub fn request(&self) -> &'a Request<'a> {
        self.request
    }

    /// Places of the engines that can serve all of it, in order of their names. At least one.
    pub fn candidates(&self) -> &'a [u32] {
        &self.scratch.whole
    }

    /// The candidate that has this slot.
    pub fn candidate_of(&self, slot: Slot) -> Option<u32> {
        let at = self.pricing.fleet.place_of(slot)?;
        self.is_candidate(at).then_some(at)
    }

    /// Prompt tokens that the engine at this place holds.
    pub fn hit_tokens(&self, at: u32) -> u64 {
        self.pricing.hit_tokens(at)
    }

    /// Requests that were dispatched to the engine and are not finished.
    pub fn in_flight(&self, at: u32) -> u64 {
        self.pricing.loads.engines[at as usize].sequences
    }

    /// The order of [`super::LeastLoaded`].
    pub(super) fn load_order(&self, at: u32) -> (u64, u64, u32) {
        (self.in_flight(at), self.pricing.loads.engines[at as usize].prefill_tokens, at)
    }

    /// The candidate with the fewest requests in flight, then the fewest tokens to prefill, then the first by name.
    pub fn least_loaded(&self) -> u32 {
        let candidates = self.candidates();
        candidates.iter().copied().min_by_key(|at| self.load_order(*at)).unwrap_or(candidates[0])
    }

    /// The candidate that is best for all of the request, and what that costs.
    pub(super) fn best(&self) -> (Key, u32) {
        let mut candidates = self.candidates().iter().copied();
        let first = candidates.next().unwrap_or(0);
        let mut best = (self.whole_key(first), first);
        let mut ties = 1;
        for at in candidates {
            let key = self.whole_key(at);
            match key.order(&best.0) {
                std::cmp::Ordering::Less => (best, ties) = ((key, at), 1),
                std::cmp::Ordering::Equal => ties += 1,
                std::cmp::Ordering::Greater => {}
            }
        }
        if let (Some(key), true) = (self.request.fresh_key, ties > 1) {
            let homes = self.pricing.fleet.ring().candidates(key);
            let tied = |at: &u32| self.is_candidate(*at) && self.whole_key(*at).order(&best.0).is_eq();
            if let Some(home) = homes.iter().copied().find(tied) {
                best.1 = home;
            }
        }
        best
    }

    /// The candidate that is best for all of the request.
    pub fn best_whole(&self) -> u32 {
        self.best().1
    }

    /// The home of a key among the candidates, with bounded load ([`crate::ring::Ring::home`]).
    pub fn home(&self, key: u64) -> Option<u32> {
        let candidates = self.candidates();
        let all: u64 = candidates.iter().map(|at| self.in_flight(*at)).sum();
        let load = |at| self.is_candidate(at).then(|| self.in_flight(at));
        self.pricing.fleet.ring().home(key, all as f64 / candidates.len() as f64, load)
    }

    pub(super) fn whole_key(&self, at: u32) -> Key {
        let costs = &self.scratch.costs[at as usize];
        self.pricing.whole_key(&costs.prefill, &costs.decode)
    }

    fn is_candidate(&self, at: u32) -> bool {
        self.candidates().binary_search(&at).is_ok()
    }
}
