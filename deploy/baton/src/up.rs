//! `baton up`: a fleet of mock engines to play with.

use std::path::PathBuf;
use std::time::Duration;

use baton_fleet::{Fleet, Part, Store};
use serde_json::json;

use crate::demo;
use crate::signals;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Engines
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    engines: u8,
    /// Keep the coordinator's state in an etcd server instead of a file
    #[arg(long)]
    etcd: bool,
    /// Keep configs, certificates and logs here [default: a temporary directory]
    #[arg(long)]
    dir: Option<PathBuf>,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut spec = demo::spec(arguments.engines.into());
    spec.dir = arguments.dir;
    if arguments.etcd {
        spec.store = Store::Etcd;
    }
    println!("starting a coordinator and {} mock engines with their agents", arguments.engines);
    let fleet = signals::until_interrupted(async { Ok(Fleet::start(spec).await?) }).await?;
    describe(&fleet);
    let result = signals::until_interrupted(watch(&fleet)).await;
    println!("stopping");
    signals::until_interrupted(async { Ok(fleet.shutdown().await?) }).await?;
    match result {
        // Ctrl-C is how this command is meant to end.
        Err(error) if error.is::<signals::Interrupted>() => Ok(()),
        result => result,
    }
}

fn describe(fleet: &Fleet) {
    let url = fleet.url(Part::Coordinator);
    let body = json!({
        "model": fleet.model(),
        "messages": [{"role": "user", "content": "Say hello to the fleet."}],
        "max_tokens": 32,
        "stream": true,
    });
    println!("\nThe fleet is up. Ask it something:\n");
    println!("  curl -sN {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n");
    println!("Add  -i -H 'x-baton-explain: 1'  to see where the request went and why, and");
    println!("     -H 'x-baton-policy: disaggregated'  (or colocated, adaptive) to choose how.\n");
    println!("coordinator  {url}  ({url}/metrics)");
    for (i, engine) in fleet.spec().engines.iter().enumerate() {
        let [engine_url, agent_url] = [Part::Engine(i), Part::Agent(i)].map(|part| fleet.url(part));
        println!("engine {:<5} {engine_url}/metrics  agent {agent_url}/metrics", engine.id.as_str());
    }
    let dir = fleet.dir();
    println!("logs         {}", dir.join("logs").display());
    println!(
        "engines now  baton fleet --coordinator {} --certs {}",
        fleet.control_url(),
        dir.join("certs").display()
    );
    println!("\nCtrl-C stops it.");
}

/// Ends where a part does.
async fn watch(fleet: &Fleet) -> anyhow::Result<()> {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        fleet.check_alive()?;
    }
}
