//! `POST /tokenize`, in vLLM's form.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::generate::named;
use super::{ApiError, RequestBody, read};
use crate::state::Coordinator;
use crate::tokenizer::{Chat, RenderError};

/// Token ids of a text or a chat.
pub(super) async fn tokenize(State(coordinator): State<Arc<Coordinator>>, body: Body) -> Response {
    match answer(&coordinator, body).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn answer(coordinator: &Arc<Coordinator>, body: Body) -> Result<Value, ApiError> {
    let body = RequestBody::parse(read(body, coordinator.config.limits.max_body_bytes).await?)?;
    let model = match body.read::<String>("model")? {
        Some(name) => named(coordinator, &name)?.model,
        None => {
            let mut models = coordinator.models.iter();
            let (first, more) = (models.next(), models.next());
            first
                .filter(|_| more.is_none())
                .cloned()
                .ok_or_else(|| ApiError::bad_request("model: name one of several", Some("model")))?
        }
    };
    let texts = body.read::<bool>("return_token_strs")?.unwrap_or(false);
    let is_chat = body.get("messages").is_some();
    if is_chat && body.get("chat_template").is_some() {
        let message = "Chat template is passed with request, but the coordinator trusts none. Leave it out.";
        return Err(ApiError::bad_request(message, Some("chat_template")));
    }
    let special = body.read::<bool>("add_special_tokens")?.unwrap_or(!is_chat);
    let size = body.bytes().len();
    let work = {
        let model = model.clone();
        move || {
            let text = match is_chat {
                true => model.render(chat_of(&body)?)?,
                false => body
                    .peek("prompt")
                    .ok_or_else(|| RenderError::Refused("prompt: give a text, or messages".into()))?,
            };
            model.encode(text, special)
        }
    };
    let ids = coordinator
        .models
        .run(&model, size, work)
        .await
        .map_err(|error| ApiError::bad_request(error.to_string(), None))?;
    Ok(json!({
        "count": ids.len(),
        "max_model_len": model.max_model_len(),
        "token_strs": texts.then(|| model.token_texts(&ids)),
        "tokens": ids,
    }))
}

/// The part of a chat request that its template sees.
pub(super) fn chat_of(body: &RequestBody) -> Result<Chat, RenderError> {
    let refused = |member: &str, form: &str| RenderError::Refused(format!("{member}: must be {form}"));
    let read = |member: &'static str, form: &str| match body.get(member) {
        None => Ok(None),
        Some(_) => body.peek::<Value>(member).map(Some).ok_or_else(|| refused(member, form)),
    };
    let list = |member: &'static str| match read(member, "a list")? {
        None => Ok(None),
        Some(Value::Array(items)) => Ok(Some(items)),
        Some(_) => Err(refused(member, "a list")),
    };
    let flag = |member: &'static str, default: bool| match read(member, "true or false")? {
        None => Ok(default),
        Some(Value::Bool(flag)) => Ok(flag),
        Some(_) => Err(refused(member, "true or false")),
    };
    Ok(Chat {
        messages: list("messages")?.ok_or_else(|| refused("messages", "a list"))?,
        tools: list("tools")?,
        documents: read("documents", "a list")?,
        add_generation_prompt: flag("add_generation_prompt", true)?,
        continue_final_message: flag("continue_final_message", false)?,
        reasoning_effort: body.peek("reasoning_effort"),
        kwargs: match read("chat_template_kwargs", "an object")? {
            None => serde_json::Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(_) => return Err(refused("chat_template_kwargs", "an object")),
        },
    })
}
