//! Two agents, `a` and `b`, with certificates of their own making, for a program that plays their engines: each a process
//! of its own, as on two engines of one host. Neither needs a coordinator.
//!
//! ```text
//! two_agents
//! ```
//! Prints one line of JSON: of each agent its connector's socket, its address for transfers, and its metrics' address.
//! Ends when its standard input does.

#![allow(clippy::print_stdout, reason = "a program that prints its results")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use baton_agent::agent::Agent;
use baton_agent::config::Config;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => both(),
        ["--agent", config] => one(Path::new(config)),
        other => bail!("{other:?}: use no argument"),
    }
}

/// Makes certificates and configuration in `dir`.
fn set_up(dir: &Path) -> Result<()> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(dir.join("ca.pem"), authority.pem())?;
    for name in ["a", "b"] {
        let key = KeyPair::generate()?;
        let cert = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &authority)?;
        std::fs::write(dir.join(format!("{name}.pem")), cert.pem())?;
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
        // Nobody is where the coordinator and the engine's server should be: they are not needed here.
        let config = format!(
            r#"
            engine_id = "{name}"
            coordinator = "https://127.0.0.1:9"
            metrics_listen = "127.0.0.1:0"
            [engine]
            url = "https://127.0.0.1:9"
            kv_events = "ipc://{dir}/{name}.events"
            socket = "{dir}/{name}.sock"
            [transfer]
            listen = "127.0.0.1:0"
            [tls]
            ca = "ca.pem"
            cert = "{name}.pem"
            key = "{name}.key"
            "#,
            dir = dir.display(),
        );
        std::fs::write(dir.join(format!("{name}.toml")), config)?;
    }
    Ok(())
}

/// An agent in a process of its own, which ends with its standard input.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn both() -> Result<()> {
    let dir = tempfile::tempdir()?;
    set_up(dir.path())?;
    let mut agents = Vec::new();
    let mut said = serde_json::Map::new();
    for name in ["a", "b"] {
        let child = Command::new(std::env::current_exe()?)
            .arg("--agent")
            .arg(dir.path().join(format!("{name}.toml")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        agents.push(Running(child));
        let stdout = agents.last_mut().and_then(|agent| agent.0.stdout.take()).context("stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let addresses: Value = serde_json::from_str(&line).context("an agent did not start")?;
        said.insert(name.to_owned(), addresses);
    }
    println!("{}", Value::Object(said));
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

fn one(file: &Path) -> Result<()> {
    let config = Config::load(file)?;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(
            filter.unwrap_or_else(|_| "warn,baton_agent::session=error,baton_agent::engine=error".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let socket = config.engine.socket.clone();
        let agent = Agent::start(config).await?;
        let (transfer, metrics) = (agent.transfer_addr().to_string(), agent.metrics_addr().to_string());
        println!("{}", json!({"socket": socket, "address": transfer, "metrics": metrics}));
        tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop)).await?;
        agent.stop().await;
        Ok(())
    })
}
