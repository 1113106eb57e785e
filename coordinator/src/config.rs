//! The coordinator's configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_coordinator_core::cost::Slo;
use baton_coordinator_core::placement::{self, Adaptive, POLICIES, Policy};
use serde::Deserialize;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML of this form.
    #[error("{}: {source}", .file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// What and where; names the field.
        source: Box<toml::de::Error>,
    },
    /// A field has a value that cannot be used.
    #[error("{}: {field}: {problem}", .file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong, and what would mend it.
        problem: String,
    },
    /// `--store` or `--policy` has a value that cannot be used.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong, and what would mend it.
        problem: String,
    },
}

/// The configuration. Relative paths in the file are taken from the file's own directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where clients connect: the OpenAI API, `/metrics`, `/health`, `/ready`.
    pub listen: SocketAddr,
    /// Where agents and operators connect: gRPC over mutual TLS.
    pub control_listen: SocketAddr,
    /// How requests are placed.
    #[serde(default)]
    pub policy: PolicyName,
    /// Where ownership is kept.
    pub store: StoreConfig,
    /// The coordinator's certificate.
    pub tls: TlsConfig,
    /// The models that clients may name.
    pub models: Vec<ModelConfig>,
    /// Times and caps; each has a default.
    #[serde(default)]
    pub limits: Limits,
}

/// A placement policy, by its name.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
pub struct PolicyName(pub &'static dyn Policy);

impl Default for PolicyName {
    fn default() -> Self {
        Self(&Adaptive)
    }
}

impl std::fmt::Debug for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name())
    }
}

impl std::str::FromStr for PolicyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || POLICIES.map(|policy| policy.name()).join(", ");
        placement::policy(text).map(Self).ok_or_else(|| format!("{text:?} is none of {}", names()))
    }
}

impl TryFrom<String> for PolicyName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Where ownership is kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum StoreConfig {
    /// A file of this process alone.
    Embedded(PathBuf),
    /// An etcd cluster, by the URLs of its members.
    Etcd(Vec<String>),
}

impl std::str::FromStr for StoreConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("embedded", path)) if !path.is_empty() => Ok(StoreConfig::Embedded(path.into())),
            Some(("etcd", urls)) if !urls.is_empty() => {
                let urls: Vec<String> = urls.split(',').map(str::to_owned).collect();
                match urls.iter().find(|url| !url.starts_with("http://") && !url.starts_with("https://")) {
                    Some(url) => Err(format!("{url:?} is no URL of an etcd member: write https://host:2379")),
                    None => Ok(StoreConfig::Etcd(urls)),
                }
            }
            _ => Err(format!("{text:?}: write embedded:PATH, or etcd:URL[,URL...]")),
        }
    }
}

impl TryFrom<String> for StoreConfig {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The fleet's certificate authority.
    pub ca: PathBuf,
    /// The coordinator's certificate, with the DNS name `coordinator`.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A model that clients may name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// As engines serve it.
    pub name: String,
    /// Directory with tokenizer.json, tokenizer_config.json, config.json and, for chat, its template.
    pub path: PathBuf,
    /// What is promised to its requests, where they do not say themselves.
    #[serde(default)]
    pub slo: SloConfig,
}

/// What is promised to requests. Nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SloConfig {
    /// From a request's arrival to its first token.
    pub ttft_ms: Option<f64>,
    /// Between two tokens, on average.
    pub itl_ms: Option<f64>,
}

impl SloConfig {
    /// The same, for the cost model.
    pub fn slo(&self) -> Slo {
        let seconds = |ms: f64| ms / 1e3;
        Slo { ttft_seconds: self.ttft_ms.map(seconds), itl_seconds: self.itl_ms.map(seconds) }
    }
}

/// Times and caps.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// An agent that was not heard from for so long counts as gone, its engine as unhealthy.
    pub lease_ms: u32,
    /// What an engine owned is dropped when it was gone for so long.
    pub forget_after_ms: u64,
    /// How long an engine keeps held blocks that nobody pulls.
    pub hold_lease_ms: u32,
    /// How long an engine pulls before it computes instead, and how long it waits for a cached prefix to be held.
    pub pull_deadline_ms: u32,
    /// Most requests in flight; further ones are answered 503.
    pub max_requests: usize,
    /// Most requests in flight on an engine; further ones wait here, where their priority counts.
    pub max_engine_requests: u32,
    /// Most requests of a model that wait for room at an engine; past it the last in order are answered 429.
    pub max_waiting: usize,
    /// Longest that a request waits for room before it is answered 429.
    pub longest_wait_ms: u32,
    /// A session that sends nothing for so long is placed like a new one.
    pub session_idle_ms: u64,
    /// Decisions that are kept to be shown and replayed, 70 KB each in a fleet of 1,024 engines.
    pub recent_decisions: usize,
    /// Largest request body. Two of them may be in memory for each request in flight.
    pub max_body_bytes: usize,
    /// Most memberships (an engine holds a block) in the index, about 80 bytes each: 640 MB by default. Past it
    /// the index takes no further blocks, and requests for them count as cold.
    pub index_max_blocks: u64,
    /// Most engines; further ones are refused at registration.
    pub max_engines: u32,
    /// Most texts that are tokenised or wait for it; past it requests are placed by load alone.
    pub tokenizer_queue: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lease_ms: 5_000,
            forget_after_ms: 60_000,
            hold_lease_ms: 30_000,
            pull_deadline_ms: 10_000,
            max_requests: 4_096,
            max_engine_requests: 512,
            max_waiting: 1_024,
            longest_wait_ms: 30_000,
            session_idle_ms: 1_800_000,
            recent_decisions: 128,
            max_body_bytes: 64 << 20,
            index_max_blocks: 8_000_000,
            max_engines: 1_024,
            tokenizer_queue: 256,
        }
    }
}

impl Limits {
    /// [`Limits::lease_ms`].
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms.into())
    }

    /// [`Limits::forget_after_ms`].
    pub fn forget_after(&self) -> Duration {
        Duration::from_millis(self.forget_after_ms)
    }
}

impl Config {
    /// Reads and checks the file. Nothing is opened besides it.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        Self::parse(file, &text)
    }

    /// Like [`Config::read`], with the file's text given.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Config = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { file: file.to_owned(), source: Box::new(source) })?;
        let base = file.parent().unwrap_or(Path::new("."));
        for path in [&mut config.tls.ca, &mut config.tls.cert, &mut config.tls.key] {
            *path = base.join(&*path);
        }
        for model in &mut config.models {
            model.path = base.join(&model.path);
        }
        if let StoreConfig::Embedded(path) = &mut config.store {
            *path = base.join(&*path);
        }
        config.check().map_err(|(field, problem)| ConfigError::Field {
            file: file.to_owned(),
            field,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.models.is_empty() {
            return Err(("models", "name at least one: [[models]] with name and path".into()));
        }
        for (i, model) in self.models.iter().enumerate() {
            if model.name.is_empty() {
                return Err(("models.name", "must not be empty".into()));
            }
            if self.models[..i].iter().any(|other| other.name == model.name) {
                return Err(("models.name", format!("{:?} is there twice: remove one", model.name)));
            }
            let slo = &model.slo;
            for (field, ms) in [("models.slo.ttft_ms", slo.ttft_ms), ("models.slo.itl_ms", slo.itl_ms)] {
                if ms.is_some_and(|ms| !(ms.is_finite() && ms > 0.0)) {
                    return Err((field, "must be more than 0 milliseconds, or left out".into()));
                }
            }
        }
        let limits = &self.limits;
        let least: [(&'static str, u64, u64); 9] = [
            ("limits.max_requests", limits.max_requests as u64, 1),
            ("limits.max_engine_requests", limits.max_engine_requests.into(), 1),
            ("limits.lease_ms", limits.lease_ms.into(), 100),
            ("limits.hold_lease_ms", limits.hold_lease_ms.into(), 100),
            ("limits.pull_deadline_ms", limits.pull_deadline_ms.into(), 10),
            ("limits.max_body_bytes", limits.max_body_bytes as u64, 1024),
            ("limits.index_max_blocks", limits.index_max_blocks, 1),
            ("limits.max_engines", limits.max_engines.into(), 1),
            ("limits.tokenizer_queue", limits.tokenizer_queue as u64, 1),
        ];
        match least.iter().find(|(_, value, least)| value < least) {
            Some((field, value, least)) => Err((field, format!("{value} is too small: at least {least}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        listen = "127.0.0.1:8000"
        control_listen = "127.0.0.1:8001"
        store = "embedded:state/coordinator.redb"
        [tls]
        ca = "ca.pem"
        cert = "coordinator.pem"
        key = "/secret/coordinator.key"
        [[models]]
        name = "m"
        path = "models/m"
    "#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/etc/baton/coordinator.toml"), text)
    }

    #[test]
    fn paths_are_relative_to_the_file_and_limits_have_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.tls.ca, Path::new("/etc/baton/ca.pem"));
        assert_eq!(config.tls.key, Path::new("/secret/coordinator.key"));
        assert_eq!(config.models[0].path, Path::new("/etc/baton/models/m"));
        assert_eq!(config.store, StoreConfig::Embedded("/etc/baton/state/coordinator.redb".into()));
        assert_eq!(config.policy.0.name(), "adaptive");
        assert_eq!(config.models[0].slo.slo(), Slo::default());
        assert_eq!(config.limits.max_body_bytes, 64 << 20);
    }

    #[test]
    fn errors_name_file_field_and_mend() {
        let error = |from: &str, to: &str| parse(&GOOD.replace(from, to)).unwrap_err().to_string();
        for (from, to, say) in [
            ("listen = \"127.0.0.1:8000\"", "listen = \"nowhere\"", "listen"),
            ("[tls]", "colour = \"red\"\n[tls]", "unknown field `colour`"),
            ("embedded:state/coordinator.redb", "sqlite:x", "write embedded:PATH, or etcd:URL"),
            ("embedded:state/coordinator.redb", "etcd:localhost:2379", "https://host:2379"),
            ("name = \"m\"", "name = \"\"", "models.name"),
            (
                "[tls]",
                "policy = \"clever\"\n[tls]",
                "is none of adaptive, colocated, disaggregated, threshold",
            ),
            (
                "name = \"m\"",
                "name = \"m\"\nslo = { ttft_ms = 0 }",
                "models.slo.ttft_ms: must be more than 0",
            ),
            ("[tls]", "[limits]\nlease_ms = 5\n[tls]", "limits.lease_ms: 5 is too small: at least 100"),
        ] {
            let message = error(from, to);
            assert!(message.contains(say) && message.contains("coordinator.toml"), "{message}");
        }
    }

    #[test]
    fn the_example_parses_and_shows_the_defaults() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/coordinator.toml");
        let config = Config::read(&file).unwrap();
        assert_eq!(format!("{:?}", config.limits), format!("{:?}", Limits::default()));
    }

    #[test]
    fn stores_parse() {
        assert_eq!(
            "etcd:http://a:2379,https://b:2379".parse(),
            Ok(StoreConfig::Etcd(vec!["http://a:2379".into(), "https://b:2379".into()]))
        );
        assert_eq!("embedded:/x".parse(), Ok(StoreConfig::Embedded("/x".into())));
    }
}
