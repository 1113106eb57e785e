//! Requests that generate: what of them the placement needs to know.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use baton_coordinator_core::placement::{self, Policy};
use baton_proto::ContentKeys;
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::tokenize::chat_of;
use super::{ApiError, RequestBody, read};
use crate::dispatch::{self, Endpoint, Prompt, Wanted};
use crate::metrics::{Mode, Outcome};
use crate::state::Coordinator;
use crate::tokenizer::{Model, RenderError, Text, Tokens};

/// Bytes of JSON that are counted as a token where the prompt is not tokenised.
const BYTES_PER_TOKEN: u64 = 4;
/// So many bytes of a JSON string are read in the time that one is tokenised, at least.
const READ_TO_TOKENISE: usize = 64;

/// `POST /v1/completions`
pub(super) async fn completions(
    State(coordinator): State<Arc<Coordinator>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    generate(coordinator, Endpoint::Completions, headers, body).await
}

/// `POST /v1/chat/completions`
pub(super) async fn chat(
    State(coordinator): State<Arc<Coordinator>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    generate(coordinator, Endpoint::Chat, headers, body).await
}

async fn generate(
    coordinator: Arc<Coordinator>,
    endpoint: Endpoint,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let Ok(permit) = coordinator.requests.clone().try_acquire_owned() else {
        coordinator.metrics.request(Mode::None, Outcome::Refused);
        let message = "Too many requests are in flight.";
        return ApiError::of(StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    };
    match wanted(&coordinator, Some(endpoint), headers, body).await {
        Ok(wanted) => dispatch::serve(coordinator, wanted, permit).await,
        Err(error) => {
            coordinator.metrics.request(Mode::None, Outcome::Refused);
            error.into_response()
        }
    }
}

/// `POST /v1/route`: what would be chosen for a body of either kind; nothing is sent to an engine.
pub(super) async fn route(
    State(coordinator): State<Arc<Coordinator>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let wanted = match wanted(&coordinator, None, headers, body).await {
        Ok(wanted) => wanted,
        Err(error) => return error.into_response(),
    };
    match wanted.place(&coordinator, &[], Some(usize::MAX)) {
        Ok(placed) => Json(json!(placed.explanation)).into_response(),
        Err(why) => {
            let message = format!("No engine can serve {}: {why}", wanted.model);
            ApiError::of(StatusCode::SERVICE_UNAVAILABLE, message).into_response()
        }
    }
}

/// Reads a request. Without an endpoint given, messages make it a chat.
async fn wanted(
    coordinator: &Arc<Coordinator>,
    endpoint: Option<Endpoint>,
    headers: HeaderMap,
    body: Body,
) -> Result<Wanted, ApiError> {
    let body = RequestBody::parse(read(body, coordinator.config.limits.max_body_bytes).await?)?;
    let arrived = Instant::now();
    let endpoint = endpoint.unwrap_or(match body.get("messages") {
        Some(_) => Endpoint::Chat,
        None => Endpoint::Completions,
    });
    let name: String =
        body.read("model")?.ok_or_else(|| ApiError::bad_request("model: name the model", Some("model")))?;
    let model = model(coordinator, &name)?;
    if body.get("kv_transfer_params").is_some() {
        let message = "kv_transfer_params is set by the coordinator: leave it out";
        return Err(ApiError::bad_request(message, Some("kv_transfer_params")));
    }
    let max_tokens = match endpoint {
        Endpoint::Chat => body.peek("max_completion_tokens").or_else(|| body.peek("max_tokens")),
        Endpoint::Completions => Some(body.peek("max_tokens").unwrap_or(16)),
    };
    let policy = policy(coordinator, &headers)?;
    let prompt = prompt(coordinator, endpoint, model, &body).await;
    Ok(Wanted {
        endpoint,
        stream: body.peek("stream").unwrap_or(false),
        explain: headers.get("x-baton-explain").is_some_and(|value| value == "1"),
        model: name,
        max_tokens,
        policy,
        prompt,
        headers,
        body,
        arrived,
    })
}

/// The configured model that a name stands for: its own, or an alias under which an engine serves it too.
pub(super) fn model(coordinator: &Coordinator, name: &str) -> Result<Arc<Model>, ApiError> {
    if let Some(model) = coordinator.models.get(name) {
        return Ok(model.clone());
    }
    let aliases = coordinator.registry.entries().into_iter().find_map(|entry| {
        let registration = entry.registration();
        let names = &registration.message.models;
        let known = names.iter().find_map(|other| coordinator.models.get(other));
        names.iter().any(|other| other == name).then(|| known.cloned()).flatten()
    });
    aliases.ok_or_else(|| ApiError::unknown_model(name))
}

fn policy(coordinator: &Coordinator, headers: &HeaderMap) -> Result<&'static dyn Policy, ApiError> {
    let wrong = || {
        let names = placement::POLICIES.map(|policy| policy.name()).join(", ");
        ApiError::bad_request(format!("x-baton-policy: one of {names}"), Some("x-baton-policy"))
    };
    let name = match headers.get("x-baton-policy") {
        Some(value) => value.to_str().map_err(|_| wrong())?,
        None => coordinator.config.policy.as_str(),
    };
    placement::policy(name).ok_or_else(wrong)
}

/// What is known of the request's prompt. Never an error: the engine is the judge.
async fn prompt(
    coordinator: &Arc<Coordinator>,
    endpoint: Endpoint,
    model: Arc<Model>,
    body: &RequestBody,
) -> Prompt {
    let began = Instant::now();
    let keys = ContentKeys { salt: body.peek("cache_salt"), ..ContentKeys::default() };
    match tokens(coordinator, endpoint, &model, body, &keys).await {
        Ok(tokens) => {
            coordinator.metrics.tokenize_seconds.observe(began.elapsed().as_secs_f64());
            let prompt = Prompt::of_tokens(tokens, keys);
            match unsplittable(body) {
                Some(why) => prompt.whole(why),
                None => prompt,
            }
        }
        Err(error) => {
            tracing::debug!(%error, "a prompt is placed by load alone");
            coordinator.metrics.untokenised.inc(error.word());
            Prompt::unknown(body.bytes().len() as u64 / BYTES_PER_TOKEN, error.word())
        }
    }
}

/// Tokenises a request, on a thread where that takes long.
async fn tokens(
    coordinator: &Arc<Coordinator>,
    endpoint: Endpoint,
    model: &Arc<Model>,
    body: &RequestBody,
    keys: &ContentKeys,
) -> Result<Tokens, RenderError> {
    let size = match endpoint {
        Endpoint::Chat => body.bytes().len(),
        // There is nothing to render: reading a JSON string costs next to nothing beside tokenising it.
        Endpoint::Completions => body.bytes().len() / READ_TO_TOKENISE,
    };
    let read = {
        let (model, body, keys) = (model.clone(), body.clone(), keys.clone());
        move || read_prompt(&model, endpoint, &body, &keys)
    };
    match coordinator.models.run(model, size, read).await? {
        Source::Ids(ids) => Ok(ids.into()),
        Source::Text(text) => {
            let worker = model.clone();
            coordinator.models.run(model, text.unknown_bytes(), move || worker.complete(text)).await
        }
    }
}

/// The token ids that an engine of the model makes of a request.
pub fn token_ids(model: &Model, endpoint: Endpoint, body: &RequestBody) -> Result<Vec<u32>, RenderError> {
    match read_prompt(model, endpoint, body, &ContentKeys::default())? {
        Source::Ids(ids) => Ok(ids),
        Source::Text(text) => model.complete(text).map(|tokens| tokens.to_vec()),
    }
}

/// What a request's tokens are made of.
enum Source {
    Ids(Vec<u32>),
    Text(Text),
}

fn read_prompt(
    model: &Model,
    endpoint: Endpoint,
    body: &RequestBody,
    keys: &ContentKeys,
) -> Result<Source, RenderError> {
    if let Some(why) = opaque(body) {
        return Err(RenderError::Unknown(why));
    }
    let special = |default| body.peek("add_special_tokens").unwrap_or(default);
    let text = |text, default| Ok(Source::Text(model.find(text, special(default), keys)));
    if endpoint == Endpoint::Chat {
        return text(model.render(chat_of(body)?)?, false);
    }
    if let Some(prompt) = body.text("prompt") {
        return text(prompt, true);
    }
    match body.peek::<Value>("prompt") {
        Some(Value::Array(ids)) if ids.first().is_some_and(Value::is_u64) => ids
            .iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<_>>()
            .map(Source::Ids)
            .ok_or_else(|| RenderError::Refused("prompt: token ids are numbers".into())),
        Some(Value::Array(_)) => Err(RenderError::Unknown("batch")),
        _ => Err(RenderError::Refused("prompt: a text or a list of token ids".into())),
    }
}

/// Members that make the engine see other tokens than the prompt's text has.
fn opaque(body: &RequestBody) -> Option<&'static str> {
    let kwargs_template = || {
        body.peek::<Value>("chat_template_kwargs").is_some_and(|kwargs| !kwargs["chat_template"].is_null())
    };
    [
        ("prompt_embeds", "prompt_embeds"),
        ("truncate_prompt_tokens", "truncation"),
        ("suffix", "suffix"),
        ("chat_template", "request_template"),
        ("mm_processor_kwargs", "multimodal"),
        ("media_io_kwargs", "multimodal"),
    ]
    .into_iter()
    .find(|(member, _)| body.get(member).is_some())
    .map(|(_, why)| why)
    .or_else(|| kwargs_template().then_some("request_template"))
}

/// What keeps a request on one engine: an answer that tells about the prompt needs all of it computed there,
/// and several sequences would pull one hold several times.
fn unsplittable(body: &RequestBody) -> Option<&'static str> {
    let is_true = |member: &str| body.peek::<bool>(member).unwrap_or(false);
    let above = |member: &str, least: u64| body.peek::<u64>(member).is_some_and(|value| value > least);
    if is_true("echo") {
        return Some("echo");
    }
    if body.get("prompt_logprobs").is_some() {
        return Some("prompt_logprobs");
    }
    if above("n", 1) || above("best_of", 1) {
        return Some("several sequences");
    }
    if is_true("use_beam_search") {
        return Some("beam search");
    }
    if body.get("ec_transfer_params").is_some() {
        return Some("ec_transfer_params");
    }
    let none = |member: &str| body.peek::<u64>(member) == Some(0);
    (none("max_tokens") || none("max_completion_tokens")).then_some("no output")
}
