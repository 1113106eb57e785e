//! The agent's own HTTP server: `/metrics` and `/health`.

use std::future::Future;
use std::io;
use std::sync::Weak;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use baton_kv_transfer::Endpoint;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::metrics::Metrics;

#[derive(Clone)]
struct Shown {
    metrics: Metrics,
    /// Weak, so that a client who keeps its connection does not keep the endpoint's port.
    endpoint: Weak<Endpoint>,
}

/// Serves until `stop` is over.
pub async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    endpoint: Weak<Endpoint>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let app = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/health", get(health))
        .with_state(Shown { metrics, endpoint });
    axum::serve(listener, app).with_graceful_shutdown(stop).await
}

async fn show_metrics(State(shown): State<Shown>) -> impl IntoResponse {
    if let Some(endpoint) = shown.endpoint.upgrade() {
        shown.metrics.set_transfer_totals(endpoint.stats());
    }
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, OPEN_METRICS)], shown.metrics.encode())
}

/// The agent itself is healthy while it answers; what it depends on is told beside.
async fn health(State(shown): State<Shown>) -> Json<Value> {
    let [engine, connector, coordinator] = shown.metrics.up();
    Json(json!({"status": "ok", "engine": engine, "connector": connector, "coordinator": coordinator}))
}
