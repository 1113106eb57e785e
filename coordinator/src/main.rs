//! `baton-coordinator`

use std::path::PathBuf;
use std::process::ExitCode;

use baton_coordinator::config::{Config, ConfigError, PolicyName, StoreConfig};
use baton_coordinator::server::Server;
use baton_coordinator::telemetry;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// Places requests on a fleet of vLLM engines, and serves their OpenAI API.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where ownership is kept, instead of the file's: embedded:PATH or etcd:URL[,URL...]
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// How requests are placed, instead of the file's: adaptive, colocated, disaggregated, or another policy's name.
    #[arg(long, value_name = "POLICY")]
    policy: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    telemetry::init();
    // The one crypto provider of the process; a second call would be a bug, not a condition.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut config = Config::read(&arguments.config)?;
    if let Some(store) = arguments.store {
        config.store =
            store.parse::<StoreConfig>().map_err(|problem| ConfigError::Flag { flag: "--store", problem })?;
    }
    if let Some(policy) = arguments.policy {
        config.policy = policy
            .parse::<PolicyName>()
            .map_err(|problem| ConfigError::Flag { flag: "--policy", problem })?;
    }
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let server = Server::start(config).await?;
    notify(sd_notify::NotifyState::Ready);
    tokio::select! {
        _ = interrupt.recv() => info!("interrupted"),
        _ = terminate.recv() => info!("told to stop"),
        () = server.stopping() => warn!("a part of the server ended"),
    }
    notify(sd_notify::NotifyState::Stopping);
    server.stop().await;
    Ok(())
}

/// Tells systemd, where it started us.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "systemd was not told");
    }
}
