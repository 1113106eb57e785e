//! The HTTP surface: the OpenAI API for clients, and health and metrics for operators.

mod body;
mod error;
mod generate;
mod info;
mod tokenize;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use bytes::Bytes;
use http::{Method, StatusCode, Uri};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use self::body::RequestBody;
pub use self::error::ApiError;
pub use self::generate::token_ids;
use crate::state::Coordinator;

/// Answers in flight may go on for so long after a stop was asked for.
const DRAIN: Duration = Duration::from_secs(5);

/// All routes.
pub fn router(coordinator: Arc<Coordinator>) -> Router {
    Router::new()
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/route", post(generate::route))
        .route("/v1/route/recent", get(generate::recent))
        .route("/v1/models", get(info::models))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/metrics", get(info::metrics))
        .method_not_allowed_fallback(wrong_method)
        .fallback(no_such_path)
        .with_state(coordinator)
}

/// Serves until stopped; then answers in flight get some seconds to end.
pub async fn serve(
    coordinator: Arc<Coordinator>,
    listener: TcpListener,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|socket| {
        let _ = socket.set_nodelay(true);
    });
    let drained = {
        let stop = stop.clone();
        async move {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        }
    };
    let serving = axum::serve(listener, router(coordinator)).with_graceful_shutdown(stop.cancelled_owned());
    tokio::select! {
        served = serving.into_future() => served,
        () = drained => Ok(()),
    }
}

/// Reads a body of at most `limit` bytes.
async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        let source = std::error::Error::source(&error);
        if source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>()) {
            let message = format!("The body is larger than {limit} bytes.");
            return ApiError::of(StatusCode::PAYLOAD_TOO_LARGE, message);
        }
        ApiError::bad_request(format!("The body could not be read: {error}"), None)
    })
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message = format!("{method} is not allowed on {}.", uri.path());
    ApiError::of(StatusCode::METHOD_NOT_ALLOWED, message).into_response()
}

async fn no_such_path(uri: Uri) -> Response {
    ApiError::of(StatusCode::NOT_FOUND, format!("There is no {}.", uri.path())).into_response()
}
