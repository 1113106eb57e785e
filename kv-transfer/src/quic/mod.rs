//! The protocol over QUIC: [`Endpoint`] serves pulls of what a [`Source`] holds, and pulls from others.

mod api;
mod endpoint;
mod gate;
mod peers;
mod probe;
mod pull;
mod serve;
mod socket;
mod transport;

pub(crate) use endpoint::Shared;
pub(crate) use pull::Job;
pub(crate) use serve::{checksum_made, hold_ended};

pub use api::{
    BindError, EndpointConfig, Limits, PathReport, Peer, PullError, PullReport, PullRequest, SendReport,
    Source, Stats,
};
pub use endpoint::Endpoint;
pub use pull::{Canceller, Pull};
