//! The agent: sits beside one vLLM engine, tells the coordinator what the engine owns and how loaded it is, and
//! moves its KV blocks to and from other engines.
//!
//! | module | does |
//! |---|---|
//! | [`agent`] | puts all parts together |
//! | [`engine`] | hears the engine: its KV events, its HTTP server, its connectors |
//! | [`ownership`] | names what the engine owns by Baton's block hashes |
//! | [`session`] | tells the coordinator |
//! | [`layout`] | names how a block lies in memory |
//! | [`metrics`], [`http`] | tell operators |

pub mod agent;
pub mod config;
pub mod engine;
pub mod http;
pub mod layout;
pub mod metrics;
pub mod ownership;
pub mod session;
pub mod tls;

/// An error and what caused it, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
