//! The home of a prefix that nobody owns: consistent hashing with bounded load.
//!
//! The one place that knows the crate `consistent_hash`. Its ring is built from the engines' names when membership changes,
//! and read out into a table: each of [`PARTITIONS`] parts of the key space has its first [`CANDIDATES`] engines. A lookup is one
//! access to the table, and allocates nothing. An engine that joins takes keys from all others in equal parts; one that leaves gives
//! its keys to their next candidates; nothing else moves.
//!
//! *Bounded load* (Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016): the first candidate goes that has
//! less than 1.25 times the mean load.

use std::hash::{Hash, Hasher};

use consistent_hash::{Node, RingHash, StaticHashRing};
use xxhash_rust::xxh3::Xxh3Default;

/// Parts of the key space. 4 bytes for each of its candidates: 256 KiB in all.
pub const PARTITIONS: usize = 8192;
/// Engines that are remembered for each part.
pub const CANDIDATES: usize = 8;
/// Points of an engine on the ring.
const POINTS: usize = 64;
/// An engine takes a new key while it has less than this many times the mean load.
const LOAD_BOUND: f64 = 1.25;
/// Every coordinator must give a key the same home, so the seed is fixed. Who can choose keys chooses an engine at
/// worst, and that one's load is bounded.
const SEED: u64 = 0x6261_746f_6e31_3131;

/// A hash of bytes that is the same on every machine and in every release.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

struct ByteHasher(Xxh3Default);

impl Hasher for ByteHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn write_u64(&mut self, value: u64) {
        self.write(&value.to_le_bytes());
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0.digest()
    }
}

impl RingHash for Seeded {
    fn hash_item<T: Hash>(&self, item: &T) -> u64 {
        let mut hasher = ByteHasher(Xxh3Default::new());
        hasher.write_u64(self.0);
        item.hash(&mut hasher);
        hasher.finish()
    }
}

/// The table.
#[derive(Clone, Debug)]
pub struct Ring {
    /// [`CANDIDATES`], or as many as there are engines, for each partition.
    table: Vec<u32>,
    width: usize,
}

impl Ring {
    /// Builds the table. Engines are named by their place in the order given.
    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let nodes: Vec<Node<String, u32>> = names
            .enumerate()
            .map(|(at, name)| Node::new(name.to_owned()).value(at as u32).quantity(POINTS))
            .collect();
        let width = nodes.len().min(CANDIDATES);
        let ring = StaticHashRing::new(Seeded(SEED), nodes.into_iter());
        let mut table = Vec::with_capacity(PARTITIONS * width);
        for partition in 0..PARTITIONS as u64 {
            table.extend(ring.calc_candidates(&partition).take(width).map(|node| node.value));
        }
        Self { table, width }
    }

    /// The first candidates for a key, best first: at most [`CANDIDATES`] places of engines.
    #[inline]
    pub fn candidates(&self, key: u64) -> &[u32] {
        let partition = (crate::mix(key) % PARTITIONS as u64) as usize;
        &self.table[partition * self.width..][..self.width]
    }

    /// The home of a key among the engines that `load` gives a load for, the mean of which is `mean_load`: the first
    /// candidate within the bound. `None` where no candidate is.
    pub fn home(&self, key: u64, mean_load: f64, load: impl Fn(u32) -> Option<u64>) -> Option<u32> {
        // One more than there is, so that an idle fleet has room for the first.
        let bound = (LOAD_BOUND * (mean_load + 1.0)).ceil() as u64;
        self.candidates(key).iter().copied().find(|at| load(*at).is_some_and(|load| load < bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: u32) -> Vec<String> {
        (0..n).map(|i| format!("engine-{i}")).collect()
    }

    fn ring(names: &[String]) -> Ring {
        Ring::new(names.iter().map(String::as_str))
    }

    #[test]
    fn the_hash_is_the_same_everywhere() {
        // Another value here would give every prefix another home after an upgrade.
        assert_eq!(Seeded(SEED).hash_item(&"engine-0"), 13_972_157_790_621_128_068);
        assert_eq!(Seeded(SEED).hash_vnode(&"engine-0", 1), 13_292_534_310_969_015_323);
    }

    #[test]
    fn keys_spread_and_few_move_when_an_engine_joins_or_leaves() {
        let ten = names(10);
        let (before, grown) = (ring(&ten), ring(&names(11)));
        let shrunk = ring(&ten[..9]);
        let keys = 20_000;
        let mut owned = [0; 10];
        let (mut moved, mut strayed) = (0, 0);
        for key in 0..keys {
            let home = before.candidates(key)[0];
            owned[home as usize] += 1;
            moved += u32::from(grown.candidates(key)[0] != home);
            assert!([home, 10].contains(&grown.candidates(key)[0]), "only the new engine takes keys");
            strayed += u32::from(home != 9 && shrunk.candidates(key)[0] != home);
        }
        assert!(owned.iter().all(|n| (1200..=3000).contains(n)), "{owned:?}");
        assert!((600..=3000).contains(&moved), "{moved}");
        assert_eq!(strayed, 0, "keys of the engines that stay do not move");
    }

    #[test]
    fn a_full_engine_is_passed_over_and_an_absent_one_too() {
        let ring = ring(&names(4));
        let order: Vec<u32> = ring.candidates(7).to_vec();
        assert_eq!(order.len(), 4);
        assert_eq!(ring.home(7, 0.0, |_| Some(0)), Some(order[0]));
        let busy = |at| Some(if at == order[0] { 8 } else { 0 });
        assert_eq!(ring.home(7, 2.0, busy), Some(order[1]));
        assert_eq!(ring.home(7, 0.0, |at| (at == order[2]).then_some(0)), Some(order[2]));
        assert_eq!(ring.home(7, 0.0, |_| None), None);
        assert_eq!(Ring::new(std::iter::empty()).home(7, 0.0, |_| Some(0)), None);
    }
}
