//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use super::error::ApiError;
use super::fields::{Fields, RawBody};
use crate::chat::ChatInput;

impl App {
    /// The tokens of the chat that a request holds.
    pub(super) fn chat_tokens(&self, fields: &Fields) -> Result<Vec<u32>, ApiError> {
        if fields.raw("chat_template").is_some() {
            return Err(ApiError::unsupported("chat_template", "it uses the model's own; leave it out"));
        }
        if fields.get_or("continue_final_message", false)? {
            return Err(ApiError::unsupported("continue_final_message", "leave it out"));
        }
        let input = ChatInput {
            messages: fields.get("messages")?.ok_or_else(|| {
                ApiError::bad_request("messages", "messages: a list of messages is required")
            })?,
            tools: fields.get("tools")?,
            add_generation_prompt: fields.get_or("add_generation_prompt", true)?,
            kwargs: fields.get_or("chat_template_kwargs", serde_json::Map::new())?,
        };
        let prompt =
            self.chat.render(&input).map_err(|error| ApiError::bad_request("messages", error.to_string()))?;
        self.encode(&prompt, fields.get_or("add_special_tokens", false)?)
    }
}

pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    let fields = Fields::parse(&body)?;
    app.model(&fields)?;
    let tokens = if fields.raw("messages").is_some() {
        app.chat_tokens(&fields)?
    } else {
        let prompt: String = fields.get("prompt")?.ok_or_else(|| {
            ApiError::bad_request("prompt", "prompt: a string is required, or messages for a chat")
        })?;
        app.encode(&prompt, fields.get_or("add_special_tokens", true)?)?
    };
    let token_strs = fields
        .get_or("return_token_strs", false)?
        .then(|| tokens.iter().map(|id| app.tokenizer.token(*id).unwrap_or_default()).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.config.max_model_len,
        "tokens": tokens,
        "token_strs": token_strs,
    }))
    .into_response())
}

pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    let fields = Fields::parse(&body)?;
    app.model(&fields)?;
    let tokens: Vec<u32> = fields
        .get("tokens")?
        .ok_or_else(|| ApiError::bad_request("tokens", "tokens: a list of token ids is required"))?;
    Ok(Json(json!({"prompt": app.tokenizer.decode(&tokens)})).into_response())
}
