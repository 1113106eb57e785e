//! The agent's certificates, for its connections to the coordinator and to its engine. The QUIC endpoint has
//! its own, in `baton_kv_transfer::tls`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::config::TlsConfig;

/// Name that the coordinator's certificate carries.
const COORDINATOR: &str = "coordinator";

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error("tls.{field}: {}: {error}; name a readable PEM file", path.display())]
    Read {
        /// `ca`, `cert` or `key`.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("tls.{field}: {error}; name a PEM file as `baton certs` writes it")]
    Pem {
        /// `ca`, `cert` or `key`.
        field: &'static str,
        /// Why.
        error: rustls_pki_types::pem::Error,
    },
    /// Certificates and key that do not go together.
    #[error("tls: {0}")]
    Config(#[from] rustls::Error),
}

/// The three files.
#[derive(Clone)]
pub struct Pem {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Pem {
    /// Reads them.
    pub fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        let read = |field, path: &Path| {
            std::fs::read(path).map_err(|error| TlsError::Read { field, path: path.to_owned(), error })
        };
        Ok(Self {
            ca: read("ca", &config.ca)?,
            cert: read("cert", &config.cert)?,
            key: read("key", &config.key)?,
        })
    }

    /// For gRPC to the coordinator.
    pub fn coordinator(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(&self.cert, &self.key))
            .domain_name(COORDINATOR)
    }

    /// For HTTPS to the engine.
    pub fn https(&self) -> Result<ClientConfig, TlsError> {
        let certs = |field, pem: &[u8]| {
            CertificateDer::pem_slice_iter(pem)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| TlsError::Pem { field, error })
        };
        let mut roots = RootCertStore::empty();
        for cert in certs("ca", &self.ca)? {
            roots.add(cert)?;
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| TlsError::Pem { field: "key", error })?;
        Ok(ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(certs("cert", &self.cert)?, key)?)
    }
}
