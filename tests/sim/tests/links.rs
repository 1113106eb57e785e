//! Fair shares, and transfers over them.

use baton_sim::link::fair::{Demand, Shares};
use baton_sim::link::{Background, Network, Widths};
use baton_sim::rng::Rng;
use baton_sim::{SECOND, nanos, seconds};
use proptest::prelude::*;

fn network() -> impl Strategy<Value = (Vec<f64>, Vec<Demand>)> {
    let capacities = proptest::collection::vec(1.0..100.0f64, 4..8);
    let most = prop_oneof![2 => Just(f64::INFINITY), 1 => 0.5..30.0f64];
    let demand = (0..4u32, 1..4u32, any::<bool>(), most).prop_map(|(first, step, two, most)| match two {
        true => Demand::new(&[first, (first + step) % 4], most),
        false => Demand::new(&[first], most),
    });
    (capacities, proptest::collection::vec(demand, 0..20))
}

proptest! {
    #[test]
    fn shares_are_max_min_fair((capacities, demands) in network()) {
        let mut shares = Shares::default();
        let rates = shares.compute(&capacities, &demands).to_vec();
        let on = |link: usize| {
            let crosses = move |demand: &Demand| demand.links().any(|other| other == link);
            demands.iter().zip(&rates).filter(move |(demand, _)| crosses(demand)).map(|(_, rate)| *rate)
        };
        for (link, capacity) in capacities.iter().enumerate() {
            prop_assert!(on(link).sum::<f64>() <= capacity * (1.0 + 1e-9));
        }
        for (demand, rate) in demands.iter().zip(&rates) {
            prop_assert!(*rate > 0.0 && *rate <= demand.most() * (1.0 + 1e-9));
            let met = *rate >= demand.most() * (1.0 - 1e-9);
            // A full link on which nobody has more.
            let bottleneck = demand.links().any(|link| {
                let full = on(link).sum::<f64>() >= capacities[link] * (1.0 - 1e-9);
                full && on(link).all(|other| other <= rate * (1.0 + 1e-9))
            });
            prop_assert!(met || bottleneck, "rate {} can be raised", rate);
        }
    }
}

const WIDTHS: Widths = Widths { host: 100.0, local: 1000.0, spine: None, transfer: None };

/// Runs all transfers to their end; when each one ended, in seconds.
fn ends(network: &mut Network, starts: &[(u64, u64, u32, u32, f64)]) -> Vec<(u64, f64)> {
    let mut starts = starts.iter().peekable();
    let mut ends = Vec::new();
    loop {
        let next = network.next();
        let start = starts.peek().map(|start| start.0);
        match (start, next) {
            (Some(at), next) if next.is_none_or(|(end, _)| at <= end) => {
                let (at, name, from, to, bytes) = *starts.next().expect("it was peeked");
                network.start(at, name, from, to, bytes);
            }
            (_, Some((at, _))) => {
                let mut names = Vec::new();
                network.ended(at, &mut names);
                ends.extend(names.into_iter().map(|name| (name, seconds(at))));
            }
            _ => return ends,
        }
    }
}

fn assert_ends(found: &[(u64, f64)], expected: &[(u64, f64)]) {
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6,
            "{found:?} is not {expected:?}"
        );
    }
}

#[test]
fn transfers_share_and_get_back_what_others_leave() {
    // Alone for 1 s, shared for 2 s, alone again.
    let mut network = Network::new(3, WIDTHS, &[]);
    let found = ends(&mut network, &[(0, 1, 0, 1, 300.0), (SECOND, 2, 0, 2, 100.0)]);
    assert_ends(&found, &[(2, 3.0), (1, 4.0)]);
    assert!((network.moved() - 400.0).abs() < 1e-3);
    // The two directions of a card do not disturb each other.
    let found = ends(&mut Network::new(2, WIDTHS, &[]), &[(0, 1, 0, 1, 100.0), (0, 2, 1, 0, 100.0)]);
    assert_ends(&found, &[(1, 1.0), (2, 1.0)]);
}

#[test]
fn spine_background_and_single_transfers_bound_rates() {
    let widths = Widths { spine: Some(120.0), ..WIDTHS };
    let starts = [(0, 1, 0, 1, 60.0), (0, 2, 2, 3, 60.0), (0, 3, 3, 3, 1000.0)];
    assert_ends(&ends(&mut Network::new(4, widths, &[]), &starts), &[(1, 1.0), (2, 1.0), (3, 1.0)]);
    let others = Background { from: 0, to: 1, rate: 75.0 };
    assert_ends(&ends(&mut Network::new(2, WIDTHS, &[others]), &[(0, 1, 0, 1, 100.0)]), &[(1, 2.0)]);
    let small = Background { rate: 20.0, ..others };
    assert_ends(&ends(&mut Network::new(2, WIDTHS, &[small]), &[(0, 1, 0, 1, 80.0)]), &[(1, 1.0)]);
    let widths = Widths { transfer: Some(25.0), ..WIDTHS };
    assert_ends(&ends(&mut Network::new(2, widths, &[]), &[(0, 1, 0, 1, 100.0)]), &[(1, 4.0)]);
}

#[test]
fn a_link_is_a_processor_sharing_queue() {
    // Poisson arrivals, exponential sizes, load 0.6: the mean time is the size over (1 - load).
    let (load, size) = (0.6, 1.0);
    let mut rng = Rng::new(3);
    let mut at = 0.0;
    let mut starts = Vec::new();
    for name in 0..150_000u64 {
        at += rng.exponential(size / load);
        starts.push((nanos(at), name, 0, 1, rng.exponential(size * 100.0)));
    }
    let found = ends(&mut Network::new(2, WIDTHS, &[]), &starts);
    assert_eq!(found.len(), starts.len());
    let total: f64 = found.iter().map(|(name, end)| end - seconds(starts[*name as usize].0)).sum();
    let mean = total / found.len() as f64;
    let expected = size / (1.0 - load);
    assert!((mean / expected - 1.0).abs() < 0.02, "{mean} instead of {expected}");
}
