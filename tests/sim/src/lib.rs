//! A fleet of vLLM engines and the links between them, in virtual time.
//!
//! Pure but for the reading of traces: no clock, no threads, no global randomness. The same inputs and seed give
//! the same results to the byte. Time is in nanoseconds since the start of a run ([`Nanos`]).
//!
//! | module | concept |
//! |---|---|
//! | [`trace`] | what arrives: recorded traces, seeded generators, closed-loop sessions |
//! | [`engine`] | one engine: continuous batching over a paged, prefix-cached pool of blocks |
//! | [`link`] | transfers between hosts that share links fairly |
//! | [`fleet`] | the file that describes engines and links |
//! | [`decision`] | the coordinator's own decision, as a placer |
//! | [`bench`] | what a bench is made of: workloads, modes, capacities, bounds, reports |
//! | [`sim`] | the event loop, the [`sim::Placer`] that it asks, and what it measures |

pub mod bench;
pub mod decision;
pub mod engine;
pub mod fleet;
pub mod link;
pub mod rng;
pub mod sim;
pub mod trace;

/// Virtual time: nanoseconds since the start of a run, or a duration.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const SECOND: Nanos = 1_000_000_000;
/// Nanoseconds in a millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// Seconds as nanoseconds, to the nearest. What is negative or not a number is 0.
pub fn nanos(seconds: f64) -> Nanos {
    // A cast saturates, and turns what is not a number into 0.
    (seconds * 1e9).round() as Nanos
}

/// Nanoseconds as seconds.
pub fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e9
}

/// A permutation of 64-bit numbers that spreads every bit over all (the finaliser of SplitMix64, by Steele, Lea and
/// Flood, 2014).
pub(crate) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
