//! Models, health and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::ApiError;
use crate::state::Coordinator;

/// `GET /v1/models`
pub(super) async fn models(State(coordinator): State<Arc<Coordinator>>) -> Json<Value> {
    let models: Vec<Value> = coordinator
        .models
        .iter()
        .map(|model| {
            let length = Some(model.max_model_len()).filter(|length| *length > 0);
            json!({
                "id": model.name(), "object": "model", "created": 0, "owned_by": "baton",
                "root": model.name(), "parent": null, "max_model_len": length,
            })
        })
        .collect();
    Json(json!({ "object": "list", "data": models }))
}

/// `GET /health`: the process lives.
pub(super) async fn health() -> StatusCode {
    StatusCode::OK
}

/// `GET /ready`: every model has an engine.
pub(super) async fn ready(State(coordinator): State<Arc<Coordinator>>) -> Response {
    match coordinator.ready() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(model) => {
            let message = format!("No healthy engine is registered for {model}.");
            ApiError::of(StatusCode::SERVICE_UNAVAILABLE, message).into_response()
        }
    }
}

/// `GET /metrics`
pub(super) async fn metrics(State(coordinator): State<Arc<Coordinator>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], coordinator.metrics.encode()).into_response()
}
