//! The coordinator's control plane, as operators see it: gRPC over mutual TLS.

use std::path::Path;
use std::time::Duration;

use baton_proto::control::v1::control_client::ControlClient;
use baton_proto::control::v1::{EngineStatus, FleetRequest};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// The name that the coordinator's certificate carries.
const COORDINATOR: &str = "coordinator";

/// A call to the control plane that failed. Causes are in the chain of sources, not in the text.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A certificate or key that cannot be read.
    #[error("{path}")]
    File {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// An address or TLS material of no use.
    #[error("{url}: {detail}; use https://host:port of the coordinator's control_listen")]
    Address {
        /// The address.
        url: String,
        /// What is wrong.
        detail: String,
    },
    /// The call got no answer, or a refusal.
    #[error("{url}: {detail}")]
    Call {
        /// The address.
        url: String,
        /// What happened.
        detail: String,
    },
}

/// An operator's connection. It connects on the first call and again after a loss.
#[derive(Clone, Debug)]
pub struct Operator {
    url: String,
    client: ControlClient<Channel>,
}

impl Operator {
    /// A connection to the control plane at `url` (`https://host:port`), with the authority's certificate and
    /// one of its certificates, PEM files all. Whatever host the URL names, the server must be `coordinator`.
    pub fn new(url: &str, ca: &Path, cert: &Path, key: &Path) -> Result<Self, ControlError> {
        let read = |path: &Path| {
            std::fs::read(path)
                .map_err(|source| ControlError::File { path: path.display().to_string(), source })
        };
        let address = |detail: &dyn std::fmt::Display| ControlError::Address {
            url: url.to_owned(),
            detail: detail.to_string(),
        };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| address(&error))?;
        if endpoint.uri().scheme_str() != Some("https") {
            return Err(address(&"the control plane speaks TLS only"));
        }
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(ca)?))
            .identity(Identity::from_pem(read(cert)?, read(key)?))
            .domain_name(COORDINATOR);
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(10))
            .tls_config(tls)
            .map_err(|error| address(&error))?;
        let client = ControlClient::new(endpoint.connect_lazy()).max_decoding_message_size(64 << 20);
        Ok(Self { url: url.to_owned(), client })
    }

    /// The engines the coordinator knows, by id.
    pub async fn fleet(&self) -> Result<Vec<EngineStatus>, ControlError> {
        let reply = self.client.clone().fleet(FleetRequest {}).await.map_err(|status| {
            let cause =
                std::error::Error::source(&status).map(|cause| format!(" ({cause})")).unwrap_or_default();
            let detail = format!("{}: {}{cause}", status.code().description(), status.message());
            ControlError::Call { url: self.url.clone(), detail }
        })?;
        let mut engines = reply.into_inner().engines;
        engines.sort_by(|a, b| id(a).cmp(id(b)));
        Ok(engines)
    }
}

fn id(status: &EngineStatus) -> &str {
    status.registration.as_ref().map_or("", |registration| &registration.engine_id)
}
