//! Requests that generate: what of them the placement needs to know.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use baton_coordinator_core::cost::Slo;
use baton_coordinator_core::placement::{self, Policy};
use baton_coordinator_core::record::Record;
use baton_coordinator_core::sessions::Sessions;
use baton_proto::ContentKeys;
use baton_proto::control::v1;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::tokenize::chat_of;
use super::{ApiError, RequestBody, read};
use crate::dispatch::{self, Endpoint, Prompt, Wanted};
use crate::metrics::{Mode, Outcome};
use crate::state::Coordinator;
use crate::tokenizer::{Model, RenderError, Text, Tokens};

/// Names the conversation that a request belongs to.
const SESSION: &str = "x-session-id";
/// The request's own SLOs, milliseconds.
const TTFT_MS: &str = "x-baton-ttft-ms";
const ITL_MS: &str = "x-baton-itl-ms";
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
    match wanted.place(&coordinator, &[], Some(usize::MAX), false) {
        Ok(placed) => Json(json!(placed.explanation)).into_response(),
        Err(unplaced) => unplaced.refusal(&wanted.model).into_response(),
    }
}

/// `GET /v1/route/recent`: the last decisions, oldest first, a JSON record on each line; `baton route --replay` reads them.
pub(super) async fn recent(State(coordinator): State<Arc<Coordinator>>, query: Query<Recent>) -> Response {
    let last = query.last.unwrap_or(usize::MAX);
    // A large fleet's records are long: they are written one by one, and the ring is free in between.
    let records: Vec<Record> = coordinator.decisions.with_recent(|recent| {
        let left_out = recent.len().saturating_sub(last);
        recent.records().skip(left_out).collect()
    });
    let lines = records.into_iter().map(|record| Ok::<_, std::io::Error>(record.to_json() + "\n"));
    let body = Body::from_stream(futures::stream::iter(lines));
    ([(http::header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// What of the ring is wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recent {
    /// The last so many; all without it.
    last: Option<usize>,
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
    let Named { model, adapter } = named(coordinator, &name)?;
    if body.get("kv_transfer_params").is_some() {
        let message = "kv_transfer_params is set by the coordinator: leave it out";
        return Err(ApiError::bad_request(message, Some("kv_transfer_params")));
    }
    let max_tokens = match endpoint {
        Endpoint::Chat => body.peek("max_completion_tokens").or_else(|| body.peek("max_tokens")),
        Endpoint::Completions => Some(body.peek("max_tokens").unwrap_or(16)),
    };
    let policy = policy(coordinator, &headers)?;
    let slo = slo(coordinator, model.name(), &headers)?;
    let session = session(&headers, &body)?;
    let priority = priority(&body);
    let keys = ContentKeys {
        lora: adapter.then(|| name.clone()),
        salt: body.peek("cache_salt"),
        ..ContentKeys::default()
    };
    let prompt = prompt(coordinator, endpoint, model, &body, keys).await;
    Ok(Wanted {
        endpoint,
        stream: body.peek("stream").unwrap_or(false),
        explain: headers.get("x-baton-explain").is_some_and(|value| value == "1"),
        model: name,
        max_tokens,
        policy,
        slo,
        session,
        priority,
        prompt,
        headers,
        body,
        arrived,
    })
}

/// What a name stands for.
pub(super) struct Named {
    /// The configured model.
    pub model: Arc<Model>,
    /// The name is that of a LoRA adapter on it.
    pub adapter: bool,
}

/// Whose name it is: a configured model's own, an alias under which an engine serves one too, or an adapter's that an engine has
/// loaded on one.
pub(super) fn named(coordinator: &Coordinator, name: &str) -> Result<Named, ApiError> {
    if let Some(model) = coordinator.models.get(name) {
        return Ok(Named { model: model.clone(), adapter: false });
    }
    let found = coordinator.registry.entries().into_iter().find_map(|entry| {
        let registration = entry.registration();
        let v1::Register { models, adapters, .. } = &registration.message;
        let known = models.iter().find_map(|other| coordinator.models.get(other))?;
        let adapter = !models.iter().any(|other| other == name);
        let is_there = !adapter || adapters.iter().any(|other| other == name);
        is_there.then(|| Named { model: known.clone(), adapter })
    });
    found.ok_or_else(|| ApiError::unknown_model(name))
}

fn policy(coordinator: &Coordinator, headers: &HeaderMap) -> Result<&'static dyn Policy, ApiError> {
    let wrong = || {
        let names = placement::POLICIES.map(|policy| policy.name()).join(", ");
        ApiError::bad_request(format!("x-baton-policy: one of {names}"), Some("x-baton-policy"))
    };
    let name = match headers.get("x-baton-policy") {
        Some(value) => value.to_str().map_err(|_| wrong())?,
        None => return Ok(coordinator.config.policy.0),
    };
    placement::policy(name).ok_or_else(wrong)
}

/// What is promised to the request: what it asks for, else what the model's configuration says.
fn slo(coordinator: &Coordinator, model: &str, headers: &HeaderMap) -> Result<Slo, ApiError> {
    let configured = coordinator.config.models.iter().find(|configured| configured.name == model);
    let mut slo = configured.map_or_else(Slo::default, |configured| configured.slo.slo());
    for (name, of) in [(TTFT_MS, &mut slo.ttft_seconds), (ITL_MS, &mut slo.itl_seconds)] {
        let Some(value) = headers.get(name) else { continue };
        let ms = value.to_str().ok().and_then(|text| text.parse::<f64>().ok());
        let ms = ms.filter(|ms| ms.is_finite() && *ms > 0.0).ok_or_else(|| {
            ApiError::bad_request(format!("{name}: milliseconds, a number above 0"), Some(name))
        })?;
        *of = Some(ms / 1e3);
    }
    Ok(slo)
}

/// The session that a request belongs to: by header, or by OpenAI's own member for what shares a cache.
fn session(headers: &HeaderMap, body: &RequestBody) -> Result<Option<u64>, ApiError> {
    let named = match headers.get(SESSION) {
        Some(value) => {
            let name = value.to_str().map_err(|_| {
                ApiError::bad_request(format!("{SESSION}: visible ASCII characters"), Some(SESSION))
            })?;
            Some(name.to_owned())
        }
        None => body.peek::<String>("prompt_cache_key"),
    };
    Ok(named.filter(|name| !name.is_empty()).map(|name| Sessions::key(&name)))
}

/// vLLM's priority, the smaller first, around 0; what is beyond a byte is as urgent as its end.
fn priority(body: &RequestBody) -> u8 {
    let given = body.peek::<i64>("priority").unwrap_or(0);
    (given.clamp(-128, 127) + 128) as u8
}

/// What is known of the request's prompt. Never an error: the engine is the judge.
async fn prompt(
    coordinator: &Arc<Coordinator>,
    endpoint: Endpoint,
    model: Arc<Model>,
    body: &RequestBody,
    keys: ContentKeys,
) -> Prompt {
    let began = Instant::now();
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
