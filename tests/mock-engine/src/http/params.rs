//! What completions and chat completions have in common in a request.

use baton_proto::plan::{KvTransferParams, TransferPlan};
use serde::Deserialize;
use serde_json::Value;

use super::App;
use super::error::ApiError;
use super::fields::Fields;
use crate::detokenize::TextOptions;
use crate::hashing::CacheKeys;
use crate::request::Stops;

/// Stop strings at most.
const MAX_STOPS: usize = 64;
/// Characters in a cache salt at most.
const MAX_SALT: usize = 128;

/// A generation request without its prompt.
#[derive(Debug)]
pub struct Params {
    /// The model's name as the client knows it.
    pub model: String,
    /// What sets its blocks apart.
    pub keys: CacheKeys,
    /// When it ends; `max_tokens` as far as the context allows.
    pub stops: Stops,
    /// How its text is made.
    pub text: TextOptions,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub include_usage: bool,
    /// Whether every chunk carries the usage so far.
    pub continuous_usage: bool,
    /// Whether token ids are returned.
    pub return_token_ids: bool,
    /// The engine's part in a handoff.
    pub plan: Option<TransferPlan>,
}

#[derive(Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl App {
    /// Finds the model or LoRA adapter that a request names.
    pub fn model(&self, fields: &Fields) -> Result<(String, CacheKeys), ApiError> {
        let Some(name) = fields.get::<String>("model")?.filter(|name| !name.is_empty()) else {
            return Ok((self.config.model_name().to_owned(), CacheKeys::default()));
        };
        if self.config.served_model_names.contains(&name) {
            return Ok((name, CacheKeys::default()));
        }
        match self.config.loras.iter().position(|lora| *lora == name) {
            Some(index) => {
                let lora = Some((index as u32 + 1, name.clone()));
                Ok((name, CacheKeys { lora, salt: None }))
            }
            None => Err(ApiError {
                status: axum::http::StatusCode::NOT_FOUND,
                kind: "NotFoundError",
                message: format!(
                    "The model `{name}` does not exist. Valid aliases: {:?}.",
                    self.config.served_model_names
                ),
                param: Some("model".into()),
            }),
        }
    }

    /// Reads the parameters of a request with a prompt of `prompt_len` tokens. `max_tokens` is what the client asked for.
    pub fn params(
        &self,
        fields: &Fields,
        (model, mut keys): (String, CacheKeys),
        prompt_len: usize,
        max_tokens: (&'static str, Option<i64>),
    ) -> Result<Params, ApiError> {
        check_sampling(fields)?;
        keys.salt = salt(fields)?;
        let stops = self.stops(fields, prompt_len, max_tokens)?;
        let stream = fields.get_or("stream", false)?;
        if fields.raw("stream_options").is_some_and(|options| options != "{}") && !stream {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(ApiError::bad_request("stream_options", message));
        }
        let options = fields.get_or("stream_options", StreamOptions::default())?;
        let include_usage = options.include_usage.unwrap_or(false);
        Ok(Params {
            model,
            keys,
            text: TextOptions {
                stop: stop_strings(fields)?,
                include_stop: fields.get_or("include_stop_str_in_output", false)?,
                min_tokens: stops.min_tokens,
                skip_special_tokens: fields.get_or("skip_special_tokens", true)?,
            },
            stops,
            stream,
            include_usage,
            continuous_usage: include_usage && options.continuous_usage_stats.unwrap_or(false),
            return_token_ids: fields.get_or("return_token_ids", false)?,
            plan: plan(fields)?,
        })
    }

    fn stops(
        &self,
        fields: &Fields,
        prompt_len: usize,
        (name, max_tokens): (&'static str, Option<i64>),
    ) -> Result<Stops, ApiError> {
        let max_model_len = self.config.max_model_len;
        if prompt_len == 0 {
            let message = "Either prompt or prompt_embeds must be provided and non-empty.";
            return Err(ApiError::bad_request("prompt", message));
        }
        if let Some(tokens) = max_tokens.filter(|tokens| *tokens > max_model_len as i64) {
            let message = format!(
                "{name}={tokens} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens."
            );
            return Err(ApiError::bad_request(name, message));
        }
        if prompt_len > max_model_len {
            let message = format!(
                "This model's maximum context length is {max_model_len} tokens. However, your prompt contains \
                 {prompt_len} input tokens, which exceeds this limit even without any output tokens. Please reduce \
                 the length of the input prompt."
            );
            return Err(ApiError::bad_request("input_tokens", message));
        }
        let room = (max_model_len - prompt_len) as i64;
        let max_tokens = max_tokens.unwrap_or(room).min(room);
        if max_tokens < 1 {
            let message = format!("max_tokens must be at least 1, got {max_tokens}.");
            return Err(ApiError::bad_request("max_tokens", message));
        }
        let min_tokens = fields.get_or("min_tokens", 0i64)?;
        if !(0..=max_tokens).contains(&min_tokens) {
            let message =
                format!("min_tokens must be between 0 and max_tokens={max_tokens}, got {min_tokens}.");
            return Err(ApiError::bad_request("min_tokens", message));
        }
        let ignore_eos = fields.get_or("ignore_eos", false)?;
        Ok(Stops {
            max_tokens: max_tokens as usize,
            min_tokens: min_tokens as usize,
            eos: self.eos.filter(|_| !ignore_eos),
            stop_token_ids: fields.get_or("stop_token_ids", Vec::new())?,
        })
    }
}

/// Refuses what the mock cannot do, rather than leave it out silently. What only shapes the distribution to sample from (such as
/// temperature) is accepted: the mock is greedy.
fn check_sampling(fields: &Fields) -> Result<(), ApiError> {
    let n = fields.get_or("n", 1i64)?;
    if n != 1 {
        return Err(ApiError::unsupported("n", &format!("it makes one choice, not {n}; send more requests")));
    }
    let asks = |name: &str| {
        let nothing = ["false", "0", "{}", "[]", "\"\"", "[\"\"]"];
        fields.raw(name).is_some_and(|value| !nothing.contains(&value))
    };
    // `logprobs: 0` asks for the sampled token's own.
    if fields.raw("logprobs").is_some_and(|value| value != "false") {
        return Err(ApiError::unsupported("logprobs", "it has no probabilities; leave it out"));
    }
    for name in ["top_logprobs", "prompt_logprobs", "logprob_token_ids"] {
        if asks(name) || (name == "prompt_logprobs" && fields.raw(name).is_some()) {
            return Err(ApiError::unsupported(name, "it has no probabilities; leave it out"));
        }
    }
    for name in [
        "use_beam_search",
        "structured_outputs",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
        "suffix",
        "prompt_embeds",
        "echo",
        "truncate_prompt_tokens",
        "repetition_detection",
        "priority",
        "continue_final_message",
    ] {
        if asks(name) {
            return Err(ApiError::unsupported(name, "leave it out"));
        }
    }
    #[derive(Deserialize)]
    struct Format {
        r#type: String,
    }
    if let Some(format) = fields.get::<Format>("response_format")?
        && format.r#type != "text"
    {
        return Err(ApiError::unsupported(
            "response_format",
            "it makes text without a grammar; leave it out",
        ));
    }
    if let Some(choice) = fields.get::<Value>("tool_choice")?
        && choice != "auto"
        && choice != "none"
    {
        return Err(ApiError::unsupported(
            "tool_choice",
            "it makes no tool calls; send \"auto\" or \"none\"",
        ));
    }
    Ok(())
}

fn stop_strings(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stop = match fields.get("stop")? {
        None => Vec::new(),
        Some(OneOrMore::One(stop)) => vec![stop],
        Some(OneOrMore::More(stops)) => stops,
    };
    if stop.len() > MAX_STOPS {
        let message = format!("stop: {} strings are more than the {MAX_STOPS} that are allowed", stop.len());
        return Err(ApiError::bad_request("stop", message));
    }
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::bad_request("stop", "stop cannot contain an empty string."));
    }
    Ok(stop)
}

fn salt(fields: &Fields) -> Result<Option<String>, ApiError> {
    let salt: Option<String> = fields.get("cache_salt")?;
    if let Some(salt) = &salt {
        if salt.is_empty() {
            let message = "Parameter 'cache_salt' must be a non-empty string if provided.";
            return Err(ApiError::bad_request("cache_salt", message));
        }
        if salt.chars().count() > MAX_SALT || salt.contains(['@', '/', '\\', '\0']) {
            let message = "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\\\', or NUL.";
            return Err(ApiError::bad_request("cache_salt", message));
        }
    }
    Ok(salt)
}

/// Baton's plan among the transfer parameters. One that cannot be read is left out, as the connector does: the request is then
/// computed like any other.
fn plan(fields: &Fields) -> Result<Option<TransferPlan>, ApiError> {
    let Some(params) = fields.get::<serde_json::Map<String, Value>>("kv_transfer_params")? else {
        return Ok(None);
    };
    if !params.contains_key("baton") {
        return Ok(None);
    }
    match serde_json::from_value::<KvTransferParams<TransferPlan>>(params.into()) {
        Ok(params) if params.baton.version == baton_proto::plan::VERSION => Ok(Some(params.baton)),
        Ok(params) => {
            tracing::warn!(version = params.baton.version, "a transfer plan of another version; computing");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(%error, "a transfer plan that cannot be read; computing");
            Ok(None)
        }
    }
}
