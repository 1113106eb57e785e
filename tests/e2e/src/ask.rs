//! One generation request, in any of its four forms, and what came back.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use baton_fleet::Client;
use http::HeaderMap;
use serde_json::{Value, json};

/// A greedy request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// `/v1/chat/completions` instead of `/v1/completions`.
    pub chat: bool,
    /// Answer as events.
    pub stream: bool,
    /// The JSON body, less `stream`.
    pub body: Value,
}

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Headers.
    pub headers: HeaderMap,
    /// Generated text.
    pub text: String,
    /// Generated token ids.
    pub tokens: Vec<u64>,
    /// Why generation ended.
    pub finish_reason: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// From the request to the first token (streaming), else to the whole answer.
    pub ttft: Duration,
}

impl Answer {
    /// Whether this is the same generation: the same tokens, text and ending.
    pub fn same(&self, other: &Answer) -> bool {
        self.tokens == other.tokens && self.text == other.text && self.finish_reason == other.finish_reason
    }

    /// A header's text; empty where it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Where it parts from another.
    pub fn difference(&self, other: &Answer) -> String {
        let at = self.tokens.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
        format!(
            "differ from token {at} on: {:?} and {:?} (of {} and {})",
            self.tokens.get(at),
            other.tokens.get(at),
            self.tokens.len(),
            other.tokens.len()
        )
    }
}

impl Ask {
    /// A completion of `prompt`, which is text or token ids: `max_tokens` tokens, whatever they are.
    pub fn completion(model: &str, prompt: impl Into<Value>, max_tokens: u32) -> Self {
        let mut body = greedy(model, max_tokens);
        body["prompt"] = prompt.into();
        Self { chat: false, stream: false, body }
    }

    /// A chat over `messages`.
    pub fn chat(model: &str, messages: Value, max_tokens: u32) -> Self {
        let mut body = greedy(model, max_tokens);
        body["messages"] = messages;
        Self { chat: true, stream: false, body }
    }

    /// The same, streamed.
    pub fn streamed(self) -> Self {
        Self { stream: true, ..self }
    }

    /// The same with one more field in its body.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.body[key] = value.into();
        self
    }

    /// The path it goes to.
    pub fn path(&self) -> &'static str {
        if self.chat { "/v1/chat/completions" } else { "/v1/completions" }
    }

    /// The body as it is sent.
    pub fn wire_body(&self) -> Value {
        let mut body = self.body.clone();
        body["stream"] = self.stream.into();
        if self.stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        body
    }

    /// Sends it and reads the whole answer.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection, as a client does that goes away.
    pub async fn send(&self, server: &Client, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let answer = match self.stream {
            true => self.read_events(server, headers).await?,
            false => self.read_whole(server, headers).await?,
        };
        ensure!(
            !answer.tokens.is_empty(),
            "{}{}: the answer has no choices[0].token_ids, which return_token_ids asks for",
            server.base(),
            self.path()
        );
        Ok(answer)
    }

    async fn read_whole(&self, server: &Client, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let reply = server.post(self.path(), &self.wire_body(), headers).await?.ok()?;
        let value = reply.json()?;
        let choice = &value["choices"][0];
        let text = if self.chat { &choice["message"]["content"] } else { &choice["text"] };
        Ok(Answer {
            text: text.as_str().unwrap_or_default().to_owned(),
            tokens: token_ids(choice).collect::<anyhow::Result<_>>()?,
            finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
            prompt_tokens: value["usage"]["prompt_tokens"].as_u64().unwrap_or_default(),
            ttft: reply.elapsed,
            headers: reply.headers,
        })
    }

    async fn read_events(&self, server: &Client, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let mut stream = server.open_stream(self.path(), &self.wire_body(), headers).await?;
        let mut answer = Answer {
            headers: stream.headers.clone(),
            text: String::new(),
            tokens: Vec::new(),
            finish_reason: String::new(),
            prompt_tokens: 0,
            ttft: Duration::ZERO,
        };
        while let Some(event) = stream.next().await? {
            ensure!(event.data["error"].is_null(), "error within the stream: {}", event.data);
            if let Some(tokens) = event.data["usage"]["prompt_tokens"].as_u64() {
                answer.prompt_tokens = tokens;
            }
            let Some(choice) = event.data["choices"].get(0) else { continue };
            for id in token_ids(choice) {
                answer.tokens.push(id?);
            }
            let text = if self.chat { &choice["delta"]["content"] } else { &choice["text"] };
            answer.text.push_str(text.as_str().unwrap_or_default());
            if let Some(reason) = choice["finish_reason"].as_str() {
                answer.finish_reason = reason.to_owned();
            }
            if answer.ttft.is_zero() && !answer.tokens.is_empty() {
                answer.ttft = event.at;
            }
        }
        ensure!(stream.done(), "the stream ended without [DONE]");
        Ok(answer)
    }
}

fn greedy(model: &str, max_tokens: u32) -> Value {
    json!({
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    })
}

fn token_ids(choice: &Value) -> impl Iterator<Item = anyhow::Result<u64>> + '_ {
    let ids = choice["token_ids"].as_array().into_iter().flatten();
    ids.map(|id| id.as_u64().context("a token id is no number"))
}
