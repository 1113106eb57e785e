//! From an engine's KV events to the coordinator's index, without an engine: on recorded events, and on those of a model of
//! vLLM with several cache groups.

mod hybrid;
mod pipeline;
mod recorded;
