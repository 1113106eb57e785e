//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;

use super::App;
use super::answer::{Answering, Api};
use super::error::ApiError;
use super::fields::{Fields, RawBody};

pub(super) async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let fields = Fields::parse(&body)?;
    let model = app.model(&fields)?;
    let prompt = app.chat_tokens(&fields)?;
    let max_tokens = match fields.get("max_completion_tokens")? {
        Some(tokens) => ("max_completion_tokens", Some(tokens)),
        None => ("max_tokens", fields.get("max_tokens")?),
    };
    let max_tokens = (max_tokens.0, max_tokens.1.or(app.config.default_max_tokens));
    let params = app.params(&fields, model, prompt.len(), max_tokens)?;
    let id = app.request_id(&headers);
    drop(body);
    Answering::start(app, Api::Chat, arrived, id, prompt, params)?.respond().await
}
