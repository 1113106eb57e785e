//! What Baton's parts say to each other, and the types they share.
//!
//! | module | between | encoding |
//! |---|---|---|
//! | [`control`] | agent and coordinator | gRPC over mutual TLS |
//! | [`wire`] | agent and agent | rkyv headers and raw bytes over QUIC |
//! | [`connector`] | engine's connector and agent | msgpack over a Unix socket |
//! | [`plan`] | coordinator and connector, through the engine | JSON in `kv_transfer_params` |
//!
//! [`ids`] and [`block_hash`] hold the types that all of them use.

pub mod block_hash;
pub mod connector;
pub mod control;
pub mod ids;
pub mod plan;
pub mod wire;

pub use block_hash::{BlockHash, ContentKeys};
pub use ids::{EngineId, Epoch, TransferId};
