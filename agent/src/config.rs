//! The agent's configuration: one TOML file, read and checked before anything opens.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use baton_proto::EngineId;
use baton_proto::control::v1;
use baton_proto::wire::WireDtype;
use http::Uri;
use serde::Deserialize;

/// What is wrong with a configuration file. Every variant names the file, the field, and what would mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot be read: {source}; name an existing file with --config", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a field that is missing, unknown or of another type.
    #[error("{}: {message}; see deploy/examples/agent.toml for every field", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// Line, field, and what was expected.
        message: String,
    },
    /// A field whose value cannot be used.
    #[error("{}: {field} = {value:?}: {mend}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with its table.
        field: &'static str,
        /// Its value.
        value: String,
        /// What to write instead.
        mend: &'static str,
    },
}

/// Everything an agent is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Unique in the fleet.
    pub engine_id: EngineId,
    /// What the engine is for.
    #[serde(default)]
    pub role: Role,
    /// URL of the coordinator's control listener; https.
    pub coordinator: String,
    /// Where the agent serves its own /metrics and /health.
    pub metrics_listen: SocketAddr,
    /// How to reach the engine.
    pub engine: EngineConfig,
    /// The QUIC endpoint.
    pub transfer: TransferConfig,
    /// Certificates.
    pub tls: TlsConfig,
}

/// What an engine is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill for others.
    Prefill,
    /// Decode what others prefilled.
    Decode,
    /// Either, as the placement sees fit.
    #[default]
    Both,
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
            Role::Both => Self::Both,
        }
    }
}

/// How to reach the engine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Base URL of its OpenAI server, as the coordinator and the agent reach it.
    pub url: String,
    /// Its KV events, `tcp://host:port` or `ipc://path`.
    pub kv_events: String,
    /// Where it replays KV events. Without it every gap is mended by forgetting what the engine holds.
    pub kv_events_replay: Option<String>,
    /// Unix socket for its connector; created by the agent.
    pub socket: PathBuf,
}

/// The QUIC endpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferConfig {
    /// UDP address to bind.
    pub listen: SocketAddr,
    /// host:port by which other agents reach it; by default `listen`.
    pub advertise: Option<String>,
    /// What the KV that this engine pulls from other hosts travels as; by default as it is stored, bit by bit. An engine
    /// whose KV cannot be packed so is refused when it registers its memory.
    #[serde(default)]
    pub wire_dtype: WireDtype,
}

impl TransferConfig {
    /// host:port by which other agents reach the endpoint.
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }
}

/// Certificates, PEM files. Relative paths are taken from the configuration file's folder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The authority that signed every certificate of the fleet.
    pub ca: PathBuf,
    /// This agent's certificate; it carries the engine id as a DNS name.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Config {
    /// Reads and checks `file`.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        Self::parse(&text, file)
    }

    /// Checks `text`; `file` is where it came from.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            file: file.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let wrong = |field, value: &str, mend| {
            Err(ConfigError::Field { file: file.to_owned(), field, value: value.to_owned(), mend })
        };
        if !is_url(&config.coordinator, |scheme, _| scheme == "https") {
            return wrong(
                "coordinator",
                &config.coordinator,
                "write https://HOST:PORT (the control plane always runs over TLS)",
            );
        }
        let plain_on_loopback =
            |scheme: &str, host: &str| scheme == "https" || (scheme == "http" && is_loopback(host));
        if !is_url(&config.engine.url, plain_on_loopback) {
            return wrong(
                "engine.url",
                &config.engine.url,
                "write https://HOST:PORT, or http://127.0.0.1:PORT for an engine on this host, without a path",
            );
        }
        config.engine.url.truncate(config.engine.url.trim_end_matches('/').len());
        const ENDPOINT: &str = "write tcp://HOST:PORT or ipc://PATH, as the engine can be reached (no `*`)";
        if !is_zmq_endpoint(&config.engine.kv_events) {
            return wrong("engine.kv_events", &config.engine.kv_events, ENDPOINT);
        }
        if let Some(replay) = &config.engine.kv_events_replay
            && !is_zmq_endpoint(replay)
        {
            return wrong("engine.kv_events_replay", replay, ENDPOINT);
        }
        // The address of a Unix socket has room for 108 bytes, the last of them zero.
        if config.engine.socket.as_os_str().len() > 107 || !config.engine.socket.is_absolute() {
            return wrong(
                "engine.socket",
                &config.engine.socket.to_string_lossy(),
                "write an absolute path of at most 107 bytes",
            );
        }
        let advertised = config.transfer.advertised();
        if advertised.parse::<SocketAddr>().map_or(!is_host_port(&advertised), |a| a.ip().is_unspecified()) {
            return wrong(
                "transfer.advertise",
                &advertised,
                "write the host:port by which other agents reach this one",
            );
        }
        let folder = file.parent().unwrap_or(Path::new(""));
        for path in [&mut config.tls.ca, &mut config.tls.cert, &mut config.tls.key] {
            *path = folder.join(&*path);
        }
        Ok(config)
    }
}

fn is_url(text: &str, accept: impl Fn(&str, &str) -> bool) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return false };
    uri.path().trim_end_matches('/').is_empty()
        && uri.query().is_none()
        && !authority.as_str().contains('@')
        && accept(scheme, authority.host())
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_zmq_endpoint(text: &str) -> bool {
    match text.split_once("://") {
        Some(("tcp", rest)) => is_host_port(rest) && !rest.contains('*'),
        Some(("ipc", path)) => !path.is_empty(),
        _ => false,
    }
}

fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../deploy/examples/agent.toml");

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/baton/agent.toml")).map_err(|error| error.to_string())
    }

    fn changed(from: &str, to: &str) -> Result<Config, String> {
        assert!(EXAMPLE.contains(from), "the example has no {from}");
        parse(&EXAMPLE.replacen(from, to, 1))
    }

    #[test]
    fn the_example_is_a_configuration() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.engine_id.as_str(), "e0");
        assert_eq!(config.role, Role::Both);
        assert_eq!(config.tls.ca, Path::new("/etc/baton/ca.pem"));
        assert_eq!(config.transfer.advertised(), "gpu-7:7420");
        assert_eq!(config.transfer.wire_dtype, WireDtype::AsStored);
    }

    #[test]
    fn what_has_a_default_may_be_left_out() {
        let example = EXAMPLE.replace("0.0.0.0:7420", "127.0.0.1:7420");
        let text: String = example
            .lines()
            .filter(|line| {
                !line.starts_with("role")
                    && !line.starts_with("advertise")
                    && !line.starts_with("wire_dtype")
                    && !line.starts_with("kv_events_replay")
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let config = parse(&text).unwrap();
        assert_eq!(config.role, Role::Both);
        assert_eq!(config.engine.kv_events_replay, None);
        assert_eq!(config.transfer.advertised(), "127.0.0.1:7420");
        assert_eq!(config.transfer.wire_dtype, WireDtype::AsStored);
    }

    #[test]
    fn kv_is_packed_for_the_wire_where_the_operator_says_so() {
        let config = changed("wire_dtype = \"as_stored\"", "wire_dtype = \"fp8\"").unwrap();
        assert_eq!(config.transfer.wire_dtype, WireDtype::Fp8);
    }

    #[test]
    fn errors_name_file_field_and_mend() {
        for (from, to, field) in [
            ("engine_id = \"e0\"", "engine_id = \"E0\"", "engine id \"E0\""),
            ("engine_id = \"e0\"", "engine_id = \"coordinator\"", "reserved"),
            ("engine_id = \"e0\"", "", "engine_id"),
            ("engine_id = \"e0\"", "engine_id = \"e0\"\nengine = 3", "engine"),
            ("engine_id = \"e0\"", "engine_id = \"e0\"\nengine_name = \"x\"", "engine_name"),
            ("role = \"both\"", "role = \"all\"", "all"),
            ("https://control-1:8001", "http://control-1:8001", "coordinator ="),
            ("https://gpu-7:8100", "http://gpu-7:8100", "engine.url ="),
            ("https://gpu-7:8100", "https://gpu-7:8100/v1", "engine.url ="),
            ("ipc:///run/baton/e0.events", "tcp://*:5571", "engine.kv_events ="),
            ("ipc:///run/baton/e0.replay", "127.0.0.1:5572", "engine.kv_events_replay ="),
            ("/run/baton/e0.sock", "e0.sock", "engine.socket ="),
            ("listen = \"0.0.0.0:7420\"", "listen = \"7420\"", "listen"),
            ("advertise = \"gpu-7:7420\"", "advertise = \"0.0.0.0:7420\"", "transfer.advertise ="),
            ("advertise = \"gpu-7:7420\"", "advertise = \"gpu-7\"", "transfer.advertise ="),
            ("wire_dtype = \"as_stored\"", "wire_dtype = \"int4\"", "expected `as_stored` or `fp8`"),
            ("wire_dtype = \"as_stored\"", "wire_dtype = true", "wire_dtype"),
            ("cert = \"e0.pem\"", "certificate = \"e0.pem\"", "certificate"),
        ] {
            let error = changed(from, to).expect_err(to);
            assert!(error.starts_with("/etc/baton/agent.toml: "), "{error}");
            assert!(error.contains(field), "{to}: {error}");
        }
        changed("https://gpu-7:8100", "http://127.0.0.1:8100").unwrap();
        changed("https://gpu-7:8100", "http://[::1]:8100/").unwrap();
        changed("ipc:///run/baton/e0.events", "tcp://127.0.0.1:5571").unwrap();
    }
}
