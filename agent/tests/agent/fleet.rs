//! Agents, their certificates, and waiting for what they do.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use baton_agent::agent::Agent;
use baton_agent::config::Config;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use crate::engine::Engine;

/// Longest wait for anything; only a failing test waits that long.
pub(crate) const LONG: Duration = Duration::from_secs(40);

/// A folder with a certificate authority.
pub(crate) struct Site {
    dir: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let site = Self { dir: tempfile::tempdir().unwrap(), authority };
        std::fs::write(site.path().join("ca.pem"), site.authority.pem()).unwrap();
        site
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// PEM of the authority, a new certificate for `name`, and its key.
    pub(crate) fn certify(&self, name: &str) -> (String, String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.authority).unwrap();
        (self.authority.pem(), cert.pem(), key.serialize_pem())
    }

    /// Configuration of the agent `id` beside `engine`.
    pub(crate) fn config(&self, id: &str, engine: &Engine, coordinator: &str) -> Config {
        let (_, cert, key) = self.certify(id);
        std::fs::write(self.path().join(format!("{id}.pem")), cert).unwrap();
        std::fs::write(self.path().join(format!("{id}.key")), key).unwrap();
        let replay = engine
            .replay
            .as_ref()
            .map(|replay| format!("kv_events_replay = \"{replay}\""))
            .unwrap_or_default();
        let text = format!(
            r#"
            engine_id = "{id}"
            coordinator = "{coordinator}"
            metrics_listen = "127.0.0.1:0"
            [engine]
            url = "{url}"
            kv_events = "{events}"
            {replay}
            socket = "{socket}"
            [transfer]
            listen = "127.0.0.1:0"
            [tls]
            ca = "ca.pem"
            cert = "{id}.pem"
            key = "{id}.key"
            "#,
            url = engine.url,
            events = engine.events,
            socket = self.socket(id).display(),
        );
        Config::parse(&text, &self.path().join("agent.toml")).unwrap()
    }

    /// The connector's socket of the agent `id`.
    pub(crate) fn socket(&self, id: &str) -> std::path::PathBuf {
        self.path().join(format!("{id}.sock"))
    }
}

/// Where nobody listens.
pub(crate) const NOWHERE: &str = "https://127.0.0.1:9";

/// Waits until `probe` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut probe: impl FnMut() -> F,
) -> T {
    let found = async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    match tokio::time::timeout(LONG, found).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// The value of a sample of the agent's metrics, by its name and labels; 0 where there is none.
pub(crate) async fn metric(agent: &Agent, sample: &str) -> f64 {
    let text = get(agent, "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// Waits until a sample has a value.
pub(crate) async fn metric_is(agent: &Agent, sample: &str, value: f64) {
    eventually(&format!("{sample} = {value}"), || async {
        (metric(agent, sample).await == value).then_some(())
    })
    .await;
}

/// What the agent's own HTTP server answers.
pub(crate) async fn get(agent: &Agent, path: &str) -> String {
    use http_body_util::{BodyExt, Empty};
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;

    let client: Client<_, Empty<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let uri = format!("http://{}{path}", agent.metrics_addr()).parse().unwrap();
    let answer = client.get(uri).await.unwrap();
    assert_eq!(answer.status(), 200);
    String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}
