//! One request: its body, and what a client sees of the answer.

use std::time::Duration;

use baton_fleet::http::HttpError;
use serde::Serialize;

use super::endpoint::Endpoint;

/// A request, written out.
#[derive(Debug)]
pub(super) struct Prepared {
    path: &'static str,
    body: String,
}

/// A message of a chat.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Said {
    pub(super) role: String,
    pub(super) content: String,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Input<'a> {
    Tokens {
        prompt: &'a [u32],
        /// Whether the ids of the answer are wanted, because the next prompt goes on from it.
        answer_ids: bool,
    },
    Chat(&'a [Said]),
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<&'a [Said]>,
    max_tokens: u32,
    temperature: u32,
    stream: bool,
    stream_options: StreamOptions,
    /// The answer is as long as the trace's.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    return_token_ids: bool,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl Prepared {
    pub(super) fn new(endpoint: &Endpoint, input: Input<'_>, output_tokens: u32) -> Self {
        let (path, prompt, messages, answer_ids) = match input {
            Input::Tokens { prompt, answer_ids } => ("/v1/completions", Some(prompt), None, answer_ids),
            Input::Chat(messages) => ("/v1/chat/completions", None, Some(messages), false),
        };
        let body = Body {
            model: &endpoint.model,
            prompt,
            messages,
            max_tokens: output_tokens,
            temperature: 0,
            stream: true,
            stream_options: StreamOptions { include_usage: true },
            ignore_eos: !endpoint.plain,
            return_token_ids: answer_ids && !endpoint.plain,
        };
        Self { path, body: serde_json::to_string(&body).expect("numbers and strings are JSON") }
    }
}

/// An answer as a client saw it; times count from when the request was sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub(super) first: Duration,
    pub(super) last: Duration,
    /// Times between chunks with tokens.
    pub(super) gaps: Vec<Duration>,
    pub(super) text: String,
    /// The answer's token ids, where the server tells them.
    pub(super) ids: Vec<u32>,
    /// By the server's account, else one for each chunk.
    pub(super) output_tokens: u64,
    /// By the server's account.
    pub(super) prompt_tokens: Option<u64>,
    pub(super) cached_tokens: Option<u64>,
}

/// A request without a whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// What failures are counted by.
    pub(super) kind: String,
    pub(super) detail: String,
}

impl Failure {
    pub(super) fn new(kind: &str, detail: impl Into<String>) -> Self {
        Self { kind: kind.to_owned(), detail: detail.into() }
    }
}

impl From<HttpError> for Failure {
    fn from(error: HttpError) -> Self {
        let kind = match &error {
            HttpError::Url(_) | HttpError::Transport { .. } => "transport".to_owned(),
            HttpError::Deadline { .. } => "deadline".to_owned(),
            HttpError::Status { status, .. } => format!("http_{}", status.as_u16()),
            HttpError::Json { .. } => "not_json".to_owned(),
        };
        Self { kind, detail: error.to_string() }
    }
}

/// Sends a request and reads its answer to the end. A coordinator keeps the requests of a named session together. A dropped future closes
/// the connection.
pub(super) async fn ask(
    endpoint: &Endpoint,
    request: Prepared,
    session: Option<&str>,
) -> Result<Answer, Failure> {
    let mut headers = endpoint.header_pairs();
    headers.extend(session.map(|name| ("x-session-id", name)));
    let mut stream = endpoint.client.open_stream_of(request.path, request.body, &headers).await?;
    let mut answer = Answer::default();
    let (mut chunks, mut told, mut finished) = (0, None, false);
    while let Some(event) = stream.next().await? {
        if let Some(error) = event.error() {
            return Err(Failure::new("error_in_stream", error.to_string()));
        }
        if event.is_token() {
            if chunks == 0 {
                answer.first = event.at;
            } else {
                answer.gaps.push(event.at.saturating_sub(answer.last));
            }
            answer.last = event.at;
            chunks += 1;
            answer.text.push_str(event.text().unwrap_or_default());
            let ids = event.data["choices"][0]["token_ids"].as_array().into_iter().flatten();
            answer.ids.extend(ids.filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        }
        finished |= event.finish_reason().is_some();
        if let Some(usage) = event.usage() {
            told = usage["completion_tokens"].as_u64().or(told);
            answer.prompt_tokens = usage["prompt_tokens"].as_u64().or(answer.prompt_tokens);
            let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
            answer.cached_tokens = cached.or(answer.cached_tokens);
        }
    }
    if chunks == 0 || !finished || !stream.done() {
        return Err(Failure::new("ended_early", format!("the stream ended early, after {chunks} tokens")));
    }
    answer.output_tokens = told.unwrap_or(chunks).max(1);
    Ok(answer)
}
