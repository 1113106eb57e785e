//! Models, health and metrics.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use baton_proto::control::v1;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::ApiError;
use crate::state::Coordinator;
use crate::tokenizer::Model;

/// `GET /v1/models`: the configured models, and the adapters that engines have loaded on them.
pub(super) async fn models(State(coordinator): State<Arc<Coordinator>>) -> Json<Value> {
    let mut adapters = BTreeMap::new();
    for entry in coordinator.registry.entries() {
        let registration = entry.registration();
        let v1::Register { models, adapters: loaded, .. } = &registration.message;
        if let Some(base) = models.iter().find_map(|name| coordinator.models.get(name)) {
            let fresh = loaded.iter().filter(|name| coordinator.models.get(name).is_none());
            adapters.extend(fresh.map(|name| (name.clone(), base.clone())));
        }
    }
    let of = |id: &str, parent: Option<&str>, model: &Model| {
        let length = Some(model.max_model_len()).filter(|length| *length > 0);
        json!({
            "id": id, "object": "model", "created": 0, "owned_by": "baton", "root": id, "parent": parent,
            "max_model_len": length,
        })
    };
    let models = coordinator.models.iter().map(|model| of(model.name(), None, model));
    let adapters = adapters.iter().map(|(id, base)| of(id, Some(base.name()), base));
    let models: Vec<Value> = models.chain(adapters).collect();
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
