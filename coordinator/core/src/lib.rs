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
//! | [`fleet`] | the engines as one decision sees them |
//! | [`load`] | work dispatched and not finished |
//! | [`speed`] | what an engine was seen to do per second |
//! | [`links`] | what a link was seen to carry |
//! | [`cost`] | predicted seconds, term by term |
//! | [`placement`] | policies, and the decision |

pub mod cost;
pub mod fleet;
pub mod kv_index;
pub mod links;
pub mod load;
pub mod placement;
pub mod speed;

mod ewma;
