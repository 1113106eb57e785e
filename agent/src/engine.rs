//! What the agent hears from its engine.

pub mod connector;
pub mod event;
pub mod kv_events;
pub mod sequence;
pub mod stats;
