//! The protocol over QUIC: [`Endpoint`] serves pulls of what a [`Source`] holds, and pulls from others.

mod api;

pub use api::{
    BindError, Canceller, Endpoint, EndpointConfig, Limits, PathReport, Peer, Pull, PullError, PullReport,
    PullRequest, SendReport, Source, Stats,
};
