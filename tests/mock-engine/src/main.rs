//! The mock engine's command.

use std::io::IsTerminal;
use std::path::PathBuf;

use baton_mock_engine::make_model::make_model;
use baton_mock_engine::server::{ServeConfig, Server};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A mock of a vLLM server with real KV bytes: for demos, tests and benches
#[derive(Debug, Parser)]
#[command(version)]
enum Arguments {
    /// Make a model folder: a tokenizer, a chat template and configuration, without weights
    MakeModel {
        /// The folder; made if need be
        folder: PathBuf,
    },
    /// Serve a model
    Serve(Box<ServeConfig>),
}

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let stderr = std::io::stderr;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr)
        .init();
    match Arguments::parse() {
        Arguments::MakeModel { folder } => Ok(make_model(&folder)?),
        Arguments::Serve(config) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(*config))
        }
    }
}

async fn serve(config: ServeConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut server = Server::start(config).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = server.failed() => tracing::error!("the engine or its HTTP server has failed"),
    }
    server.stop().await
}
