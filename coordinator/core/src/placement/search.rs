//! Pairs of engines, best first.
//!
//! A pair costs the prefill part of one engine, the decode part of the other and the transfer between them. With
//! the least that any transfer to the decode engine can take added to its part, the sum of two parts is a lower bound. Pairs come
//! out of a heap in order of that bound, which lists the neighbours of what it gave out; once the bound is no better
//! than the best pair priced, no other pair is.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Entries sorted at a time.
const CHUNK: usize = 16;

/// Costs with places, sorted as far as anyone asked.
#[derive(Debug, Default)]
pub(super) struct Lazy {
    entries: Vec<(f64, u32)>,
    sorted: usize,
}

impl Lazy {
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.sorted = 0;
    }

    pub(super) fn push(&mut self, cost: f64, at: u32) {
        self.entries.push((cost, at));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn least(&self) -> f64 {
        self.entries.iter().map(|entry| entry.0).fold(f64::INFINITY, f64::min)
    }

    /// Drops entries that cost so much or more. Not after the first [`Lazy::get`].
    pub(super) fn keep_below(&mut self, cost: f64) {
        self.entries.retain(|entry| entry.0 < cost);
    }

    /// The entry at this place of the order by cost and place.
    pub(super) fn get(&mut self, at: usize) -> Option<(f64, u32)> {
        while at >= self.sorted && self.sorted < self.entries.len() {
            let order = |a: &(f64, u32), b: &(f64, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
            let rest = &mut self.entries[self.sorted..];
            let chunk = rest.len().min(CHUNK);
            if rest.len() > chunk {
                rest.select_nth_unstable_by(chunk, order);
            }
            rest[..chunk].sort_unstable_by(order);
            self.sorted += chunk;
        }
        self.entries.get(at).copied()
    }
}

/// What is left to look at: bound, and places in the two orders. Bounds are not negative, so that their bits are in
/// their order.
pub(super) type Frontier = BinaryHeap<Reverse<(u64, u32, u32)>>;

/// How a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// No further pair can be better.
    Done,
    /// There was no pair to look at any more, or no more were to be priced.
    Cut,
}

/// Gives pairs of places to `price`, in order of the sum of their costs. It returns the cost at and above which no
/// further pair is of interest.
pub(super) fn pairs(
    firsts: &mut Lazy,
    seconds: &mut Lazy,
    frontier: &mut Frontier,
    budget: &mut usize,
    mut price: impl FnMut(u32, u32) -> f64,
) -> Ended {
    frontier.clear();
    let (Some(first), Some(second)) = (firsts.get(0), seconds.get(0)) else { return Ended::Done };
    let mut limit = f64::INFINITY;
    frontier.push(Reverse(((first.0 + second.0).to_bits(), 0, 0)));
    while let Some(Reverse((bound, i, j))) = frontier.pop() {
        if f64::from_bits(bound) >= limit {
            return Ended::Done;
        }
        if *budget == 0 {
            return Ended::Cut;
        }
        *budget -= 1;
        let (Some(first), Some(second)) = (firsts.get(i as usize), seconds.get(j as usize)) else {
            continue;
        };
        limit = price(first.1, second.1);
        if let Some(next) = seconds.get(j as usize + 1) {
            frontier.push(Reverse(((first.0 + next.0).to_bits(), i, j + 1)));
        }
        if j == 0
            && let Some(next) = firsts.get(i as usize + 1)
        {
            frontier.push(Reverse(((next.0 + second.0).to_bits(), i + 1, 0)));
        }
    }
    Ended::Done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pairs_come_in_order_each_once(
            a in prop::collection::vec(0.0f64..10.0, 0..40), b in prop::collection::vec(0.0f64..10.0, 0..40),
        ) {
            let (mut firsts, mut seconds) = (Lazy::default(), Lazy::default());
            a.iter().enumerate().for_each(|(at, cost)| firsts.push(*cost, at as u32));
            b.iter().enumerate().for_each(|(at, cost)| seconds.push(*cost, at as u32));
            let mut seen = Vec::new();
            let mut budget = usize::MAX;
            pairs(&mut firsts, &mut seconds, &mut Frontier::new(), &mut budget, |i, j| {
                seen.push((i, j));
                f64::INFINITY
            });
            let costs: Vec<f64> = seen.iter().map(|(i, j)| a[*i as usize] + b[*j as usize]).collect();
            prop_assert!(costs.is_sorted());
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), a.len() * b.len());
        }
    }
}
