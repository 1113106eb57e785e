//! `baton fleet`: the coordinator's view of its engines.

use std::path::PathBuf;

use anyhow::Context as _;
use baton_fleet::control::Operator;
use baton_proto::control::v1::{EngineStatus, Role};
use serde_json::json;

use crate::table::Table;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The coordinator's control_listen
    #[arg(long, default_value = "https://127.0.0.1:8001")]
    coordinator: String,
    /// Directory with ca.pem, operator.pem and operator.key, as `baton certs` makes them
    #[arg(long, default_value = "/etc/baton")]
    certs: PathBuf,
    /// Print one JSON line instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let [ca, cert, key] = ["ca.pem", "operator.pem", "operator.key"].map(|file| arguments.certs.join(file));
    let operator = Operator::new(&arguments.coordinator, &ca, &cert, &key)?;
    let engines = operator.fleet().await.context("the coordinator's fleet")?;
    if arguments.json {
        println!("{}", json!({"engines": engines.iter().map(as_json).collect::<Vec<_>>()}));
        return Ok(());
    }
    let head = [
        "engine",
        "role",
        "part",
        "model",
        "health",
        "transfers",
        "epoch",
        "running",
        "waiting",
        "cache",
        "owned blocks",
        "url",
    ];
    let mut table = Table::new(&head, &["role", "part", "model", "health", "transfers", "url"]);
    for engine in &engines {
        table.row(row(engine));
    }
    print!("{table}");
    if engines.is_empty() {
        println!("no engine is registered");
    }
    Ok(())
}

fn row(status: &EngineStatus) -> Vec<String> {
    let registration = status.registration.clone().unwrap_or_default();
    let load = status.load.unwrap_or_default();
    vec![
        registration.engine_id.clone(),
        name(registration.role()).unwrap_or("?").to_owned(),
        name(status.part()).unwrap_or("-").to_owned(),
        registration.models.first().cloned().unwrap_or_default(),
        if status.healthy { "healthy" } else { "gone" }.to_owned(),
        if registration.can_transfer { "yes" } else { "no connector" }.to_owned(),
        registration.epoch.to_string(),
        load.running.to_string(),
        load.waiting.to_string(),
        format!("{:.0} %", load.kv_usage * 100.0),
        format!("{} of {}", status.owned_blocks, registration.num_blocks),
        registration.engine_url,
    ]
}

fn as_json(status: &EngineStatus) -> serde_json::Value {
    let registration = status.registration.clone().unwrap_or_default();
    let load = status.load.unwrap_or_default();
    json!({
        "engine_id": registration.engine_id,
        "role": name(registration.role()).unwrap_or("?"),
        "part": name(status.part()),
        "models": registration.models,
        "healthy": status.healthy,
        "can_transfer": registration.can_transfer,
        "epoch": registration.epoch,
        "running": load.running,
        "waiting": load.waiting,
        "kv_usage": load.kv_usage,
        "owned_blocks": status.owned_blocks,
        "num_blocks": registration.num_blocks,
        "engine_url": registration.engine_url,
        "transfer_address": registration.transfer_address,
    })
}

fn name(role: Role) -> Option<&'static str> {
    match role {
        Role::Both => Some("both"),
        Role::Prefill => Some("prefill"),
        Role::Decode => Some("decode"),
        Role::Unspecified => None,
    }
}
