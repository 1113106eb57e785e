//! The end-to-end acceptance suite: what Baton promises, shown on a whole fleet, with mock engines or with real vLLM.
//!
//! | module | what |
//! |---|---|
//! | [`scenarios`] | what is shown, one acceptance line after the other |
//! | [`bed`] | the fleet under test: two engines with agents, and a plain one as reference |
//! | [`fleets`] | which fleets there are: mock engines, vLLM with either model |
//! | [`ask`], [`legs`] | requests, whole and as the two legs of a handoff |
//! | [`relay`], [`memory`] | ways to do harm: on the wire, and in an engine's memory |
//! | [`traffic`], [`recording`] | conversations, and an engine's KV events under them |
//! | [`audit`] | the agents' digests of what left and what arrived |
//! | [`report`] | acceptance lines |

pub mod ask;
pub mod audit;
pub mod bed;
pub mod fleets;
pub mod legs;
pub mod memory;
pub mod prompts;
pub mod recording;
pub mod relay;
pub mod report;
pub mod scenarios;
pub mod traffic;
