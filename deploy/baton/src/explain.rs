//! `baton explain`: where a request would go, and why.

use std::io::Read as _;

use anyhow::{Context as _, bail};
use baton_coordinator_core::placement::POLICIES;
use baton_fleet::Client;

use crate::explanation::Explanation;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// File with the body of a completion or chat completion request, JSON; `-` for standard input
    file: String,
    /// The coordinator's listen
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    coordinator: String,
    /// Place it under this policy instead of the coordinator's own
    #[arg(long, value_parser = POLICIES.map(|policy| policy.name()))]
    policy: Option<String>,
    /// Print the coordinator's answer instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let text = match arguments.file.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        }
        file => std::fs::read_to_string(file).with_context(|| file.to_owned())?,
    };
    let body = serde_json::from_str(&text)
        .with_context(|| format!("{}: not the body of a request", arguments.file))?;
    let headers: Vec<(&str, &str)> =
        arguments.policy.iter().map(|policy| ("x-baton-policy", policy.as_str())).collect();
    let reply = Client::new(&arguments.coordinator)?.post("/v1/route", &body, &headers).await?;
    if !reply.status.is_success() {
        // The coordinator's errors have OpenAI's shape.
        let message = reply.json().ok().and_then(|body| Some(body["error"]["message"].as_str()?.to_owned()));
        bail!("the coordinator: {}", message.unwrap_or_else(|| format!("HTTP {}", reply.status)));
    }
    if arguments.json {
        println!("{}", reply.json()?);
        return Ok(());
    }
    let explanation: Explanation =
        serde_json::from_slice(&reply.body).context("the coordinator's answer has another form")?;
    println!("{} prompt tokens, policy {}", explanation.prompt_tokens, explanation.policy);
    if let Some(reason) = &explanation.not_splittable {
        println!("no handoff: {reason}");
    }
    for note in &explanation.notes {
        println!("{note}");
    }
    print!("{}", explanation.table());
    if explanation.options_left_out > 0 {
        println!("and {} more", explanation.options_left_out);
    }
    Ok(())
}
