//! `/v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;

use super::App;
use super::answer::{Answering, Api};
use super::error::ApiError;
use super::fields::{Fields, RawBody};

/// Output tokens where the client does not say.
const DEFAULT_MAX_TOKENS: i64 = 16;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let fields = Fields::parse(&body)?;
    let model = app.model(&fields)?;
    let prompt = app.prompt(&fields)?;
    let max_tokens = ("max_tokens", Some(fields.get_or("max_tokens", DEFAULT_MAX_TOKENS)?));
    let params = app.params(&fields, model, prompt.len(), max_tokens)?;
    let id = app.request_id(&headers);
    drop(body);
    Answering::start(app, Api::Completions, arrived, id, prompt, params)?.respond().await
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

impl App {
    fn prompt(&self, fields: &Fields) -> Result<Vec<u32>, ApiError> {
        let prompt = fields.raw("prompt").unwrap_or("\"\"");
        let add_special_tokens = fields.get_or("add_special_tokens", true)?;
        let wrong = || {
            let message = "prompt: expected a string, a list of token ids, or a list with one of these";
            ApiError::bad_request("prompt", message)
        };
        let several = |count| {
            let mend = format!("it takes one prompt, not {count}; send more requests");
            ApiError::unsupported("prompt", &mend)
        };
        let tokens = if prompt.starts_with('"') {
            let text: String = serde_json::from_str(prompt).map_err(|_| wrong())?;
            return self.encode(&text, add_special_tokens);
        } else if prompt.starts_with('[') {
            // Token ids are by far the longest: try them first, without a copy of the JSON.
            match serde_json::from_str::<Vec<u32>>(prompt) {
                Ok(tokens) => tokens,
                Err(_) => match serde_json::from_str(prompt).map_err(|_| wrong())? {
                    Prompts::Tokens(tokens) => tokens,
                    Prompts::Texts(texts) => match texts.as_slice() {
                        [text] => return self.encode(text, add_special_tokens),
                        _ => return Err(several(texts.len())),
                    },
                    Prompts::TokenLists(mut lists) => match (lists.pop(), lists.len()) {
                        (Some(tokens), 0) => tokens,
                        (_, more) => return Err(several(more + 1)),
                    },
                },
            }
        } else {
            return Err(wrong());
        };
        match tokens.iter().find(|token| **token as usize >= self.tokenizer.len()) {
            Some(token) => {
                Err(ApiError::bad_request("prompt", format!("Token id {token} is out of vocabulary")))
            }
            None => Ok(tokens),
        }
    }
}
