//! Logs.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logs to standard error; `RUST_LOG` chooses what, `info` by default.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let stderr = std::io::stderr;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr)
        .init();
}
