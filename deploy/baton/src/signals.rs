//! Ending early without leaving anything behind.

use tokio::signal::unix::{SignalKind, signal};

/// A signal asked the command to end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted; everything is stopped")
    }
}

impl std::error::Error for Interrupted {}

/// Runs `work`; at SIGINT, SIGTERM or SIGHUP drops it instead, which stops whatever it started.
pub(crate) async fn until_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let interrupted = tokio::select! {
        result = work => return result,
        _ = interrupt.recv() => Interrupted,
        _ = terminate.recv() => Interrupted,
        _ = hangup.recv() => Interrupted,
    };
    Err(interrupted.into())
}
