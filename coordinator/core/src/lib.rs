//! Baton's decision: where a request runs, and what each way would have cost.
//!
//! Everything here is pure: no clock, no I/O, no global randomness. Time comes in as numbers, state comes in as
//! values, and a [`placement::Decision`] goes out with the predicted seconds of every option. The simulator
//! runs this same code. Engines stand in order of their names wherever order could matter, so a decision does not depend
//! on the layout of any hash map.
//!
//! | module | concept |
//! |---|---|
//! | [`kv_index`] | which engine holds which blocks |
//! | [`fleet`] | the engines as decisions see them |
//! | [`load`] | work dispatched and not finished |
//! | [`speed`] | what an engine was seen to do per second |
//! | [`links`] | what a link was seen to carry |
//! | [`accuracy`] | what was predicted against what was seen |
//! | [`cost`] | predicted seconds, term by term |
//! | [`placement`] | policies, and the decision |
//! | [`planner`] | which engines only decode for the time being |
//! | [`ring`] | the home of a prefix that nobody owns |
//! | [`sessions`] | which engine a session was served by |
//! | [`admission`] | requests that wait because nothing can serve them in time |
//! | [`record`] | decisions kept, written down and replayed |

pub mod accuracy;
pub mod admission;
pub mod cost;
pub mod fleet;
pub mod kv_index;
pub mod links;
pub mod load;
pub mod placement;
pub mod planner;
pub mod record;
pub mod ring;
pub mod sessions;
pub mod speed;

mod ewma;
mod regression;

/// A permutation of 64-bit numbers that spreads every bit over all (the finaliser of SplitMix64, by Steele, Lea and
/// Flood, 2014).
pub(crate) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Maps a spread number to 0..n.
pub(crate) fn below(spread: u64, n: usize) -> usize {
    ((u128::from(spread) * n as u128) >> 64) as usize
}
