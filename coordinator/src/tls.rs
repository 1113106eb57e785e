//! Certificates: loading them, and checking whose they are. TLS 1.3 only.

use std::path::Path;
use std::sync::Arc;

use baton_proto::EngineId;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

use crate::config::TlsConfig;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or holds no PEM of the kind that is needed.
    #[error("tls.{field}: {file}: {problem}")]
    File {
        /// The configuration field.
        field: &'static str,
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Certificate, key and CA do not make a usable configuration.
    #[error("tls: {0}: check that cert and key belong together and that ca issued cert")]
    Unusable(String),
}

/// The coordinator's identity, and whom it trusts.
#[derive(Clone, Debug)]
pub struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// Loads the PEM files.
    pub fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates("ca", &config.ca)? {
            roots.add(certificate).map_err(|error| file_error("ca", &config.ca, error))?;
        }
        let key = PrivateKeyDer::from_pem_file(&config.key)
            .map_err(|error| file_error("key", &config.key, error))?;
        Ok(Self {
            roots: Arc::new(roots),
            chain: certificates("cert", &config.cert)?,
            key: Arc::new(key),
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        })
    }

    /// For gRPC: every client shows a certificate of the CA.
    pub fn server(&self) -> Result<ServerConfig, TlsError> {
        let unusable = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
            .map_err(|error| unusable(&error))?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    /// For https to engines: they show a certificate of the CA, and so do we.
    pub fn client(&self) -> Result<ClientConfig, TlsError> {
        let unusable = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
        ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))
    }

    /// Checks that our own certificate is the CA's and carries the name that agents expect.
    pub fn check_own_name(&self) -> Result<(), TlsError> {
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(
            self.roots.clone(),
            self.provider.clone(),
        )
        .build()
        .map_err(|error| TlsError::Unusable(error.to_string()))?;
        let (own, intermediates) =
            self.chain.split_first().ok_or_else(|| TlsError::Unusable("cert is empty".into()))?;
        let name = ServerName::try_from("coordinator").expect("a DNS name");
        verifier
            .verify_server_cert(own, intermediates, &name, &[], rustls_pki_types::UnixTime::now())
            .map_err(|error| {
                TlsError::Unusable(format!("cert is not good for the name coordinator ({error})"))
            })?;
        Ok(())
    }
}

/// Whether a client's certificate carries the engine's name. That the CA issued it was checked by the handshake.
pub fn is_certificate_of(certificate: &CertificateDer<'_>, engine: &EngineId) -> bool {
    let Ok(name) = ServerName::try_from(engine.as_str()) else { return false };
    webpki::EndEntityCert::try_from(certificate)
        .is_ok_and(|certificate| certificate.verify_is_valid_for_subject_name(&name).is_ok())
}

fn certificates(field: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| file_error(field, file, error))?;
    if certificates.is_empty() {
        return Err(file_error(field, file, "holds no certificate"));
    }
    Ok(certificates)
}

fn file_error(field: &'static str, file: &Path, problem: impl std::fmt::Display) -> TlsError {
    TlsError::File { field, file: file.display().to_string(), problem: problem.to_string() }
}
