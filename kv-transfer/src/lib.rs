//! Moves KV blocks from the memory of the engine that holds them into the memory of the engine that needs them.
//!
//! - [`protocol`]: what agents say to each other, as state machines without I/O.
//! - [`HoldTable`]: what is held, for whom and until when, without I/O.
//! - [`Endpoint`]: both over QUIC with mutual TLS.
//! - [`direct`]: how blocks are copied between engines of one host, without QUIC.

#[cfg(test)]
extern crate self as baton_kv_transfer;

pub mod checksum;
pub mod direct;
pub mod hold;
pub mod protocol;
pub mod quic;
pub mod tls;

pub use hold::{
    Claim, GrowError, Growth, HeldBlocks, Hold, HoldEnd, HoldError, HoldTable, Making, RankHold, ReleasedHold,
};
pub use quic::{
    BindError, Canceller, Endpoint, EndpointConfig, Limits, PathReport, Peer, Pull, PullError, PullReport,
    PullRequest, SendReport, Source, Stats,
};
