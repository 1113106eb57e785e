//! The control plane: agents' sessions and operators' calls, gRPC over mutual TLS.

mod accept;
mod operator;
mod session;

use std::pin::Pin;
use std::sync::Arc;

use baton_proto::control::v1;
use baton_proto::control::v1::control_server::{Control, ControlServer};
use futures::Stream;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::state::Coordinator;
use crate::tls::{Identity, TlsError};

/// Largest message of an agent: a batch of a million block hashes.
const MAX_MESSAGE: usize = 16 << 20;

struct Service {
    coordinator: Arc<Coordinator>,
    stop: CancellationToken,
}

/// Serves until stopped; sessions end then.
pub async fn serve(
    coordinator: Arc<Coordinator>,
    identity: &Identity,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let incoming = accept::incoming(listener, identity.server()?, stop.clone());
    let service = Service { coordinator, stop: stop.clone() };
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(10)))
        .add_service(ControlServer::new(service).max_decoding_message_size(MAX_MESSAGE))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .map_err(ServeError::Transport)
}

/// The control plane could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No usable certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server ended.
    #[error("control plane: {0}")]
    Transport(#[source] tonic::transport::Error),
}

#[tonic::async_trait]
impl Control for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::CoordinatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let certificate = request
            .peer_certs()
            .and_then(|certificates| certificates.first().cloned())
            .ok_or_else(|| Status::unauthenticated("a session needs a client certificate"))?;
        let messages =
            session::start(self.coordinator.clone(), certificate, request.into_inner(), self.stop.clone());
        Ok(Response::new(Box::pin(messages)))
    }

    async fn route(&self, request: Request<v1::RouteRequest>) -> Result<Response<v1::RouteReply>, Status> {
        operator::route(&self.coordinator, request.into_inner()).map(Response::new)
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetReply>, Status> {
        Ok(Response::new(operator::fleet(&self.coordinator)))
    }
}
