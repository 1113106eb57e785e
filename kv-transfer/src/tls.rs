//! Mutual TLS 1.3 between agents.
//!
//! Every agent has a certificate of the fleet's one authority, with its engine id as DNS name, for both client and
//! server. A client asks for the engine id it wants; a server takes any certificate of the authority.

use std::path::Path;
use std::sync::Arc;

use baton_proto::wire;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Certificates or a key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read, or is no PEM.
    #[error("tls.{field}: {path}: {error}")]
    Pem {
        /// `ca`, `cert` or `key`.
        field: &'static str,
        /// The file.
        path: String,
        /// Why.
        error: rustls_pki_types::pem::Error,
    },
    /// A PEM file without what it should hold.
    #[error("tls.{field}: {path} holds no certificate: name a PEM file with one")]
    Empty {
        /// `ca` or `cert`.
        field: &'static str,
        /// The file.
        path: String,
    },
    /// Certificates and key that do not go together, or not with TLS 1.3.
    #[error("tls: {0}")]
    Config(String),
}

/// An agent's certificate and key, and the authority it trusts.
#[derive(Debug)]
pub struct Identity {
    authority: Vec<CertificateDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { authority: self.authority.clone(), chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl Identity {
    /// Reads PEM files: the authority's certificates, the agent's own chain, and its private key.
    pub fn load(ca: &Path, cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let pem =
            |field, path: &Path, error| TlsError::Pem { field, path: path.display().to_string(), error };
        let certs = |field, path: &Path| -> Result<Vec<_>, TlsError> {
            let certs = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            let certs = certs.map_err(|error| pem(field, path, error))?;
            if certs.is_empty() {
                return Err(TlsError::Empty { field, path: path.display().to_string() });
            }
            Ok(certs)
        };
        Ok(Self {
            authority: certs("ca", ca)?,
            chain: certs("cert", cert)?,
            key: PrivateKeyDer::from_pem_file(key).map_err(|error| pem("key", key, error))?,
        })
    }

    /// From certificates in DER.
    pub fn new(
        authority: Vec<CertificateDer<'static>>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Self {
        Self { authority, chain, key }
    }

    /// The key for stateless resets, from the private key: a restarted agent can then end the connections of its
    /// former life at once, where its peers would otherwise find out by timeout.
    pub(crate) fn reset_key(&self) -> ::ring::hmac::Key {
        let seed = ::ring::hmac::Key::new(::ring::hmac::HMAC_SHA256, self.key.secret_der());
        let derived = ::ring::hmac::sign(&seed, b"baton quic stateless reset v1");
        ::ring::hmac::Key::new(::ring::hmac::HMAC_SHA256, derived.as_ref())
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for cert in &self.authority {
            roots.add(cert.clone()).map_err(|error| TlsError::Config(format!("ca: {error}")))?;
        }
        Ok(Arc::new(roots))
    }

    pub(crate) fn server(&self) -> Result<QuicServerConfig, TlsError> {
        let provider = provider();
        let clients = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider.clone())
            .build()
            .map_err(|error| TlsError::Config(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(config_error)?
            .with_client_cert_verifier(clients)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(config_error)?;
        config.alpn_protocols = vec![wire::ALPN.to_vec()];
        QuicServerConfig::try_from(config).map_err(|error| TlsError::Config(error.to_string()))
    }

    pub(crate) fn client(&self) -> Result<QuicClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(config_error)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(config_error)?;
        config.alpn_protocols = vec![wire::ALPN.to_vec()];
        QuicClientConfig::try_from(config).map_err(|error| TlsError::Config(error.to_string()))
    }
}

fn config_error(error: rustls::Error) -> TlsError {
    TlsError::Config(error.to_string())
}

/// ring, with AES-128-GCM first: it takes a third less time than AES-256-GCM, and time here is CPU of the GPU host.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}
