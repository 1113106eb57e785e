//! A coordinator in this process, with engines and agents that say and do what a test wants.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test file uses its part")]

mod agent;
mod engine;
pub mod paced;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::config::Config;
use baton_coordinator::server::Server;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::agent::{Agent, client, register};
pub use self::engine::{Behaviour, Engine};

/// A development CA, as `baton certs` makes it.
pub struct Certificates {
    issuer: Issuer<'static, KeyPair>,
    ca: String,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), ca }
    }

    /// Certificate and key for a name, as PEM.
    pub fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// The CA's certificate, as PEM.
    pub fn ca(&self) -> &str {
        &self.ca
    }
}

/// A coordinator and what surrounds it.
pub struct Fleet {
    pub directory: TempDir,
    pub certificates: Arc<Certificates>,
    pub server: Server,
    pub http: reqwest::Client,
    limits: String,
    store: String,
}

impl Fleet {
    /// A coordinator that serves the model `m`, with further lines for its `[limits]`.
    pub async fn start(limits: &str) -> Self {
        Self::start_with(limits, "embedded:c.redb").await
    }

    /// The same, with its store.
    pub async fn start_with(limits: &str, store: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let certificates = Arc::new(Certificates::new());
        let (cert, key) = certificates.issue("coordinator");
        for (file, text) in [("ca.pem", certificates.ca()), ("c.pem", &cert), ("c.key", &key)] {
            std::fs::write(directory.path().join(file), text).unwrap();
        }
        let server = Server::start(config(directory.path(), limits, store)).await.unwrap();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
        Self { directory, certificates, server, http, limits: limits.to_owned(), store: store.to_owned() }
    }

    /// Stops the coordinator and starts another one in its place.
    pub async fn restart(mut self) -> Self {
        self.server.stop().await;
        self.server = Server::start(config(self.directory.path(), &self.limits, &self.store)).await.unwrap();
        self
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address)
    }

    /// An engine and its registered agent.
    pub async fn engine(&self, id: &str) -> (Engine, Agent) {
        let engine = Engine::start().await;
        let agent = Agent::connect(self, register(id, &engine.url())).await;
        (engine, agent)
    }

    /// Posts JSON under a policy.
    pub async fn post(&self, path: &str, policy: &str, body: &Value) -> reqwest::Response {
        self.http
            .post(self.url(path))
            .header("x-baton-policy", policy)
            .header("x-baton-explain", "1")
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// A completion's answer under a policy.
    pub async fn complete(&self, policy: &str, body: &Value) -> reqwest::Response {
        self.post("/v1/completions", policy, body).await
    }

    /// A metric by its whole name and labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.http.get(self.url("/metrics")).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub async fn until_metric(&self, name: &str, value: f64) {
        eventually(&format!("{name} {value}"), async || self.metric(name).await == value).await;
    }
}

fn config(directory: &Path, limits: &str, store: &str) -> Config {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/models/chatml");
    let text = format!(
        r#"
        listen = "127.0.0.1:0"
        control_listen = "127.0.0.1:0"
        store = "{store}"
        [tls]
        ca = "ca.pem"
        cert = "c.pem"
        key = "c.key"
        [[models]]
        name = "m"
        path = "{}"
        [limits]
        {limits}
        "#,
        model.display()
    );
    Config::parse(&directory.join("coordinator.toml"), &text).unwrap()
}

/// A completion of some 200 tokens.
pub fn completion() -> Value {
    json!({ "model": "m", "prompt": "The quick brown fox jumps over the lazy dog. ".repeat(12), "max_tokens": 4 })
}

/// Waits for something that must come true, for as long as a slow machine may need.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..400 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("never came true: {what}");
}
