//! vLLM's HTTP surface.

mod answer;
mod chat;
mod completions;
pub mod error;
mod fields;
mod params;
mod tokenize;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::oneshot;

use self::error::ApiError;
use crate::chat::ChatTemplate;
use crate::engine::{Command, EngineHandle};
use crate::metrics::Metrics;
use crate::tokenizer::Tokenizer;

/// Bytes of a request body at most.
const MAX_BODY: usize = 64 << 20;
/// Texts from this size on are tokenized where they hold up nobody else.
const LONG_TEXT: usize = 32 << 10;

/// What the server needs to know.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Names of the model; the first is the one that answers carry where a request names none.
    pub served_model_names: Vec<String>,
    /// Names of LoRA adapters.
    pub loras: Vec<String>,
    /// The model's folder, as /v1/models shows it.
    pub model_path: String,
    /// Tokens of prompt and output together, at most.
    pub max_model_len: usize,
    /// Output tokens where a client does not say, as the model's generation_config.json sets them.
    pub default_max_tokens: Option<i64>,
    /// Whether the usage tells the cached prompt tokens.
    pub prompt_tokens_details: bool,
}

impl HttpConfig {
    fn model_name(&self) -> &str {
        &self.served_model_names[0]
    }
}

/// What the handlers share.
#[derive(Debug)]
pub struct App {
    /// Configuration.
    pub config: HttpConfig,
    /// The engine.
    pub engine: EngineHandle,
    /// Its metrics.
    pub metrics: Arc<Metrics>,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template.
    pub chat: ChatTemplate,
    /// The token that ends a sequence.
    pub eos: Option<u32>,
    /// Tells requests of this process apart.
    pub ids: Ids,
}

/// Makes request ids.
#[derive(Debug, Default)]
pub struct Ids {
    next: std::sync::atomic::AtomicU64,
    seed: std::hash::RandomState,
}

impl Ids {
    /// A new id of 32 hexadecimal digits, like vLLM's.
    pub fn next(&self) -> String {
        use std::hash::BuildHasher;
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        format!("{:016x}{:016x}", self.seed.hash_one((0, number)), self.seed.hash_one((1, number)))
    }
}

impl App {
    /// The id of a request: the client's own, if it gave one.
    fn request_id(&self, headers: &HeaderMap) -> String {
        let given = headers.get("x-request-id").and_then(|id| id.to_str().ok());
        given.map_or_else(|| self.ids.next(), str::to_owned)
    }

    /// The tokens of a text.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        let encode = || self.tokenizer.encode(text, add_special_tokens);
        let tokens = if text.len() >= LONG_TEXT { tokio::task::block_in_place(encode) } else { encode() };
        tokens.map_err(|error| ApiError::bad_request("prompt", error.to_string()))
    }
}

/// The routes. Runs on a multi-threaded runtime.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/metrics", get(metrics))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "Not Found", "Not Found"))
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed", "Method Not Allowed")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(app)
}

async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.engine.is_alive() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=1.0.0; charset=utf-8")];
    (content_type, app.metrics.render()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let created = unix_seconds();
    let card = |id: &str, root: &str, parent: Option<&str>, max_model_len: Option<usize>| {
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
            "max_model_len": max_model_len,
            "permission": [{
                "id": format!("modelperm-{}", app.ids.next()), "object": "model_permission", "created": created,
                "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": false,
                "allow_search_indices": false, "allow_view": true, "allow_fine_tuning": false, "organization": "*",
                "group": null, "is_blocking": false,
            }],
        })
    };
    let config = &app.config;
    let base = config.served_model_names.iter();
    let base = base.map(|name| card(name, &config.model_path, None, Some(config.max_model_len)));
    let loras = config.loras.iter().map(|name| card(name, name, Some(config.model_name()), None));
    Json(json!({"object": "list", "data": base.chain(loras).collect::<Vec<_>>()})).into_response()
}

#[derive(Deserialize)]
struct Reset {
    #[serde(default)]
    reset_running_requests: bool,
}

async fn reset_prefix_cache(
    State(app): State<Arc<App>>,
    Query(reset): Query<Reset>,
) -> Result<Response, ApiError> {
    let (sender, answer) = oneshot::channel();
    app.engine.send(Command::Reset(reset.reset_running_requests, sender));
    let success = answer.await.map_err(|_| stopped())?;
    Ok(Json(json!({"success": success})).into_response())
}

fn stopped() -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", "the engine has stopped")
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
