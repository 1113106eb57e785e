//! A Baton fleet on loopback, made of child processes: a coordinator, engines (mock or vLLM), an agent beside
//! each, and etcd where asked for. The demo, the acceptance suite and the benches stand on it.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use baton_fleet::{Fleet, FleetSpec, Part};
//!
//! let mut fleet = Fleet::start(FleetSpec::mock(2)).await?;
//! let body = serde_json::json!({"model": fleet.model(), "prompt": "Hello", "max_tokens": 8, "stream": true});
//! let answer = fleet.client().stream("/v1/completions", &body, &[("x-baton-policy", "disaggregated")]).await?;
//! println!("{:?} {}", answer.ttft(), answer.text());
//! fleet.kill(Part::Agent(0));
//! fleet.restart(Part::Agent(0)).await?;
//! fleet.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is left behind
//! Nothing: not on return, not on panic, and not when the process that holds the [`Fleet`] is killed. Every child leads a
//! process group of its own, and a small watchdog process holds the read end of a pipe from this one: when the pipe closes, it
//! kills every group and removes the fleet's files, unless [`FleetSpec::dir`] named a directory to keep them in.
//!
//! | module | what |
//! |---|---|
//! | [`spec`] | what to start |
//! | [`fleet`] | the running fleet |
//! | [`http`] | HTTP client with server-sent events and their times |
//! | [`metrics`] | Prometheus text |
//! | [`control`] | the coordinator's control plane, as operators see it |
//! | [`certs`] | the certificate authority behind `baton certs` |

mod binaries;
pub mod certs;
mod config;
pub mod control;
mod error;
pub mod fleet;
pub mod http;
mod layout;
pub mod metrics;
mod ports;
mod process;
pub mod spec;
mod watchdog;

pub use error::{FleetError, PartError};
pub use fleet::{Fleet, Part};
pub use http::Client;
pub use layout::EnginePorts;
pub use metrics::Metrics;
pub use spec::{EngineKind, EngineSpec, FleetSpec, MockEngine, Model, Policy, Role, Store, VllmEngine};
