//! Connections to one engine's server.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request, Response, Uri};
use hyper::body::Incoming;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls_pki_types::ServerName;

use super::Endpoint;
use crate::registry::{EngineUrl, Registration};

/// Engines close idle connections after some seconds (uvicorn: 5); ours go before, so that no request meets a
/// connection that is being closed.
const IDLE: Duration = Duration::from_secs(4);
/// A host that does not answer for so long counts as unreachable.
const CONNECT: Duration = Duration::from_secs(3);
/// Headers of the client that the engine needs: its key and trace context. All others are ours to set.
const FORWARDED: [&str; 6] =
    ["accept", "authorization", "x-request-id", "traceparent", "tracestate", "x-session-id"];

/// An engine that could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] hyper_util::client::legacy::Error),
    /// The connection broke before an answer.
    #[error("broke off before answering: {0}")]
    Broken(#[source] hyper_util::client::legacy::Error),
    /// The URL does not take the path.
    #[error("{0}")]
    Url(#[from] http::Error),
}

/// A pool of connections to one engine. Its size follows the requests in flight. Clones share it.
#[derive(Clone, Debug)]
pub struct Upstream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    url: EngineUrl,
    /// The URLs of the paths that requests go to.
    placed: [(&'static str, Uri); 2],
    client: Client<HttpsConnector<HttpConnector>, Body>,
}

impl Upstream {
    /// Opens nothing yet. An https server must show a certificate of the CA with the engine's id as its name.
    pub fn new(registration: &Registration, tls: rustls::ClientConfig) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        connector.enforce_http(false);
        let name = ServerName::try_from(registration.engine_id.as_str().to_owned())
            .expect("an engine id is a DNS label");
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .with_server_name_resolver(FixedServerNameResolver::new(name))
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(https);
        let url = registration.url.clone();
        let placed = [Endpoint::Completions, Endpoint::Chat].map(|endpoint| {
            let path = endpoint.path();
            (path, url.join(path).expect("a checked URL takes our paths"))
        });
        Self(Arc::new(Inner { url, placed, client }))
    }

    /// Whether it still leads where the registration says.
    pub fn leads_to(&self, registration: &Registration) -> bool {
        self.0.url == registration.url
    }

    /// Posts a JSON body. Dropping the future, or the answer's body before its end, closes the connection,
    /// and the engine aborts the request.
    pub async fn post(
        &self,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let uri = match self.0.placed.iter().find(|placed| placed.0 == path) {
            Some((_, uri)) => uri.clone(),
            None => self.0.url.join(path)?,
        };
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(uri)
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(body))?;
        for name in FORWARDED {
            for value in headers.get_all(name) {
                request.headers_mut().append(http::HeaderName::from_static(name), value.clone());
            }
        }
        self.0.client.request(request).await.map_err(|error| match error.is_connect() {
            true => UpstreamError::Connect(error),
            false => UpstreamError::Broken(error),
        })
    }
}
