//! Pairs of engines, best first.
//!
//! A pair costs the prefill part of one engine, the decode part of the other and the transfer between them. With
//! the least that any transfer to the decode engine can take added to its part, the sum of two parts is a lower bound. Both
//! parts are gone through in order of cost, the second for each of the first, until the bound is no better than the best pair
//! priced: no other pair is then.

/// Entries sorted at a time.
const CHUNK: usize = 16;

/// Costs with places, sorted as far as anyone asked.
#[derive(Debug, Default)]
pub(super) struct Lazy {
    entries: Vec<(f64, u32)>,
    sorted: usize,
}

impl Lazy {
    /// Empties it and makes room for so many entries.
    pub(super) fn clear(&mut self, entries: usize) {
        self.entries.clear();
        self.entries.reserve(entries);
        self.sorted = 0;
    }

    pub(super) fn push(&mut self, cost: f64, at: u32) {
        self.entries.push((cost, at));
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

/// How a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// No further pair can be better.
    Done,
    /// No more pairs were to be looked at, or priced.
    Cut,
}

/// Gives pairs of places to `look`, with the sum of their costs, as long as that is below what `look` returned last, at first
/// `limit`. For every first one, in order, the second ones in order. `look` returns the cost at and above which no further
/// pair is of interest, or `None` to end the search.
pub(super) fn pairs(
    firsts: &mut Lazy,
    seconds: &mut Lazy,
    looks: &mut usize,
    mut limit: f64,
    mut look: impl FnMut(f64, u32, u32) -> Option<f64>,
) -> Ended {
    for i in 0.. {
        let Some(first) = firsts.get(i) else { break };
        for j in 0.. {
            let Some(second) = seconds.get(j) else { break };
            let sum = first.0 + second.0;
            if sum >= limit {
                if j == 0 {
                    return Ended::Done;
                }
                break;
            }
            if *looks == 0 {
                return Ended::Cut;
            }
            *looks -= 1;
            match look(sum, first.1, second.1) {
                Some(next) => limit = next,
                None => return Ended::Cut,
            }
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
        fn every_pair_below_the_limit_comes_once_the_cheapest_first_part_first(
            a in prop::collection::vec(0.0f64..10.0, 0..40), b in prop::collection::vec(0.0f64..10.0, 0..40),
            limit in 0.0f64..20.0,
        ) {
            let (mut firsts, mut seconds) = (Lazy::default(), Lazy::default());
            a.iter().enumerate().for_each(|(at, cost)| firsts.push(*cost, at as u32));
            b.iter().enumerate().for_each(|(at, cost)| seconds.push(*cost, at as u32));
            let mut seen = Vec::new();
            let mut looks = usize::MAX;
            let ended = pairs(&mut firsts, &mut seconds, &mut looks, limit, |sum, i, j| {
                assert_eq!(sum, a[i as usize] + b[j as usize]);
                seen.push((i, j));
                Some(limit)
            });
            prop_assert_eq!(ended, Ended::Done);
            prop_assert!(seen.iter().map(|pair| (a[pair.0 as usize], b[pair.1 as usize])).is_sorted());
            seen.sort_unstable();
            let below = |pair: &(u32, u32)| a[pair.0 as usize] + b[pair.1 as usize] < limit;
            let all = (0..a.len() as u32).flat_map(|i| (0..b.len() as u32).map(move |j| (i, j)));
            prop_assert_eq!(seen, all.filter(below).collect::<Vec<_>>());
        }
    }
}
