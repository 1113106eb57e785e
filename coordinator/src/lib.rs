//! Baton's coordinator: an OpenAI-compatible server in front of a fleet of vLLM engines.
//!
//! ```text
//!  client ──HTTP──▶ http ──▶ tokenizer ──▶ dispatch ──HTTP──▶ engines
//!                                            │ ▲
//!                              placement ◀───┘ └─── state: registry, index, links, load
//!                         (baton-coordinator-core)    ▲
//!  agents ──gRPC──▶ control ──────────────────────────┘──▶ ownership ──▶ embedded store or etcd
//! ```

pub mod config;
pub mod control;
pub mod decisions;
pub mod dispatch;
pub mod http;
pub mod metrics;
pub mod ownership;
pub mod registry;
pub mod server;
pub mod state;
pub mod telemetry;
pub mod tls;
pub mod tokenizer;

#[cfg(test)]
pub(crate) mod testing;
