//! TLS connections for tonic: TLS 1.3 only, handshakes beside each other and bounded in number and time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Handshakes at once.
const HANDSHAKES: usize = 64;
/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// After an error of the listener (no file descriptors left, most likely).
const PAUSE: Duration = Duration::from_millis(200);

/// Accepts until stopped.
pub(super) fn incoming(
    listener: TcpListener,
    config: ServerConfig,
    stop: CancellationToken,
) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> {
    let (connections, incoming) = mpsc::channel(HANDSHAKES);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let permits = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        let accept = async {
            loop {
                let Ok(permit) = permits.clone().acquire_owned().await else { return };
                let (socket, peer) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        warn!(%error, "control plane cannot accept");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                };
                let (acceptor, connections) = (acceptor.clone(), connections.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    let _ = socket.set_nodelay(true);
                    match tokio::time::timeout(HANDSHAKE, acceptor.accept(socket)).await {
                        Ok(Ok(stream)) => {
                            let _ = connections.send(Ok(stream)).await;
                        }
                        Ok(Err(error)) => debug!(%peer, %error, "handshake failed"),
                        Err(_) => debug!(%peer, "handshake took too long"),
                    }
                });
            }
        };
        tokio::select! {
            () = accept => {}
            () = stop.cancelled() => {}
        }
    });
    ReceiverStream::new(incoming)
}
