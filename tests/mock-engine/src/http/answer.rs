//! From a request's outputs to its answer, whole or as a stream of server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use baton_proto::plan::{Held, KvTransferParams};
use serde::Serialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::params::Params;
use super::{App, stopped, unix_seconds};
use crate::detokenize::Detokenizer;
use crate::engine::{Generation, SubmitError};
use crate::request::{FinishReason, NewRequest, Output, PrefillStats};

/// Which of the two APIs answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Completions,
    Chat,
}

/// A request on its way to its answer.
pub(super) struct Answering {
    app: Arc<App>,
    api: Api,
    id: String,
    created: u64,
    prompt: Vec<u32>,
    params: Params,
    generation: Generation,
    detokenizer: Detokenizer,
    prefill: PrefillStats,
    finish: Option<Finish>,
}

/// The end of an output, as the client is told.
struct Finish {
    reason: &'static str,
    stop: Option<Value>,
    held: Option<Held>,
}

/// Text and tokens since the last piece.
struct Piece {
    text: String,
    tokens: Vec<u32>,
}

impl Answering {
    /// Hands the request to the engine.
    pub(super) fn start(
        app: Arc<App>,
        api: Api,
        arrived: Instant,
        id: String,
        prompt: Vec<u32>,
        mut params: Params,
    ) -> Result<Self, ApiError> {
        let prefix = match api {
            Api::Completions => "cmpl",
            Api::Chat => "chatcmpl",
        };
        let id = format!("{prefix}-{id}");
        // The client's id need not be unique; the engine's must be.
        let engine_id = format!("{id}-0-{}", &app.ids.next()[..8]);
        let generation = app.engine.submit(arrived, |key| NewRequest {
            key,
            id: format!("{engine_id}{key:x}"),
            prompt: prompt.clone(),
            keys: std::mem::take(&mut params.keys),
            stops: params.stops.clone(),
            plan: params.plan.take(),
        });
        let generation = generation.map_err(|error| match error {
            SubmitError::Full => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", error.to_string())
            }
            SubmitError::Stopped => stopped(),
        })?;
        let detokenizer = Detokenizer::new(params.text.clone());
        let created = unix_seconds();
        let prefill = PrefillStats::default();
        Ok(Self { app, api, id, created, prompt, params, generation, detokenizer, prefill, finish: None })
    }

    /// Waits for the answer, in the form that the client asked for.
    pub(super) async fn respond(mut self) -> Result<Response, ApiError> {
        if self.params.stream {
            return Ok(self.stream());
        }
        let mut all = Piece { text: String::new(), tokens: Vec::new() };
        while self.finish.is_none() {
            let piece = self.next().await.ok_or_else(stopped)?;
            all.text.push_str(&piece.text);
            all.tokens.extend(piece.tokens);
        }
        Ok(Json(self.whole(all)).into_response())
    }

    /// The next piece: all outputs that are there, at least one. `None` when the engine has stopped.
    async fn next(&mut self) -> Option<Piece> {
        let mut tokens = Vec::new();
        let first = self.generation.next().await?;
        self.take(first, &mut tokens);
        while self.finish.is_none()
            && let Some(output) = self.generation.ready()
        {
            self.take(output, &mut tokens);
        }
        let text = self.detokenizer.delta(self.finish.is_some()).to_owned();
        Some(Piece { text, tokens })
    }

    fn take(&mut self, output: Output, tokens: &mut Vec<u32>) {
        tokens.push(output.token);
        if let Some(prefill) = output.prefill {
            self.prefill = prefill;
        }
        let stopped = output.finish.as_ref().is_some_and(|finish| finish.reason == FinishReason::Stop);
        let stop_string = self.detokenizer.push(&self.app.tokenizer, output.token, stopped);
        self.finish = match (stop_string, output.finish) {
            (Some(stop), None) => Some(Finish { reason: "stop", stop: Some(stop.into()), held: None }),
            (stop, Some(finish)) => Some(Finish {
                reason: match finish.reason {
                    FinishReason::Length if stop.is_none() => "length",
                    _ => "stop",
                },
                stop: stop.map(Value::from).or(finish.stop_token.map(Value::from)),
                held: finish.held,
            }),
            (None, None) => None,
        };
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.prompt.len(), self.detokenizer.tokens());
        let details = self.app.config.prompt_tokens_details.then(|| {
            let cached = self.prefill.local + self.prefill.external;
            json!({"cached_tokens": cached, "created_cache_tokens": null, "multimodal_tokens": null})
        });
        json!({
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": details,
            "completion_tokens_details": null,
        })
    }

    fn whole(&mut self, all: Piece) -> Value {
        let finish = self.finish.take().expect("the output has ended");
        let usage = self.usage();
        let held = finish.held.map(|baton| json!(KvTransferParams { baton }));
        let ids = self.params.return_token_ids;
        let (prompt_ids, token_ids) = (ids.then_some(&self.prompt), ids.then_some(&all.tokens));
        match self.api {
            Api::Completions => json!({
                "id": self.id, "object": "text_completion", "created": self.created, "model": self.params.model,
                "choices": [{
                    "index": 0, "text": all.text, "logprobs": null, "finish_reason": finish.reason,
                    "stop_reason": finish.stop, "token_ids": token_ids, "prompt_logprobs": null,
                    "prompt_token_ids": prompt_ids, "routed_experts": null,
                }],
                "service_tier": null, "system_fingerprint": null, "usage": usage, "kv_transfer_params": held,
                "ec_transfer_params": null, "metrics": null,
            }),
            Api::Chat => json!({
                "id": self.id, "object": "chat.completion", "created": self.created, "model": self.params.model,
                "choices": [{
                    "index": 0,
                    "message": {
                        "role": "assistant", "content": all.text, "refusal": null, "annotations": null, "audio": null,
                        "function_call": null, "reasoning": null,
                    },
                    "logprobs": null, "finish_reason": finish.reason, "stop_reason": finish.stop,
                    "token_ids": token_ids, "routed_experts": null,
                }],
                "service_tier": null, "system_fingerprint": null, "usage": usage, "prompt_logprobs": null,
                "prompt_token_ids": prompt_ids, "prompt_text": null, "kv_transfer_params": held,
                "ec_transfer_params": null, "metrics": null,
            }),
        }
    }

    /// The answer as events. Dropping the response, as a client's disconnect does, aborts the request.
    fn stream(self) -> Response {
        let events =
            futures::stream::unfold((self, Next::Piece { first: true }), |(mut answering, next)| async {
                let (event, next) = answering.event(next).await?;
                Some((Ok::<_, Infallible>(event), (answering, next)))
            });
        let content_type = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")];
        (content_type, Body::from_stream(events)).into_response()
    }

    async fn event(&mut self, next: Next) -> Option<(Bytes, Next)> {
        let mut event = String::with_capacity(512);
        let next = match next {
            Next::End => return None,
            Next::Piece { first } => match self.next().await {
                None => {
                    data(&mut event, &stopped().body());
                    event.push_str("data: [DONE]\n\n");
                    Next::End
                }
                Some(piece) => {
                    if first && self.api == Api::Chat {
                        self.role(&mut event);
                    }
                    self.piece(first, &piece, &mut event);
                    if self.finish.is_some() {
                        self.end(&mut event);
                        Next::End
                    } else {
                        Next::Piece { first: false }
                    }
                }
            },
        };
        Some((event.into(), next))
    }

    /// The chat's first event, which names the role.
    fn role(&self, into: &mut String) {
        let prompt = self.params.return_token_ids.then_some(&self.prompt);
        let choice = json!({
            "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null,
        });
        let mut chunk = self.chunk(json!([choice]));
        if self.params.continuous_usage {
            let prompt = self.prompt.len();
            chunk["usage"] = json!({"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0});
        }
        chunk["prompt_token_ids"] = json!(prompt);
        chunk["prompt_text"] = Value::Null;
        data(into, &chunk);
    }

    fn piece(&self, first: bool, piece: &Piece, into: &mut String) {
        #[derive(Serialize)]
        struct Delta<'a> {
            content: &'a str,
        }
        #[derive(Serialize)]
        struct Choice<'a> {
            index: u32,
            #[serde(skip_serializing_if = "Option::is_none")]
            text: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            delta: Option<Delta<'a>>,
            logprobs: Option<()>,
            finish_reason: Option<&'static str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            stop_reason: Option<&'a Option<Value>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            prompt_token_ids: Option<Option<&'a Vec<u32>>>,
            token_ids: Option<&'a Vec<u32>>,
        }
        #[derive(Serialize)]
        struct Chunk<'a> {
            id: &'a str,
            object: &'static str,
            created: u64,
            model: &'a str,
            choices: [Choice<'a>; 1],
            #[serde(skip_serializing_if = "Option::is_none")]
            usage: Option<Value>,
        }
        let completions = self.api == Api::Completions;
        let ids = self.params.return_token_ids;
        let stop = self.finish.as_ref().map(|finish| &finish.stop);
        let chunk = Chunk {
            id: &self.id,
            object: self.object(),
            created: self.created,
            model: &self.params.model,
            choices: [Choice {
                index: 0,
                text: completions.then_some(&piece.text),
                delta: (!completions).then_some(Delta { content: &piece.text }),
                logprobs: None,
                finish_reason: self.finish.as_ref().map(|finish| finish.reason),
                // A chat's chunks name it only at the end.
                stop_reason: if completions { stop.or(Some(&None)) } else { stop },
                prompt_token_ids: completions.then_some((ids && first).then_some(&self.prompt)),
                token_ids: ids.then_some(&piece.tokens),
            }],
            usage: self.params.continuous_usage.then(|| {
                let (prompt, completion) = (self.prompt.len(), self.detokenizer.tokens());
                json!({
                    "prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion,
                })
            }),
        };
        data(into, &chunk);
    }

    fn end(&self, into: &mut String) {
        if self.params.include_usage {
            let mut usage = self.usage();
            if let Some(usage) = usage.as_object_mut() {
                usage.retain(|_, value| !value.is_null());
            }
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage;
            data(into, &chunk);
        }
        into.push_str("data: [DONE]\n\n");
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id, "object": self.object(), "created": self.created, "model": self.params.model,
            "choices": choices,
        })
    }

    fn object(&self) -> &'static str {
        match self.api {
            Api::Completions => "text_completion",
            Api::Chat => "chat.completion.chunk",
        }
    }
}

enum Next {
    Piece { first: bool },
    End,
}

fn data(into: &mut String, value: &impl Serialize) {
    into.push_str("data: ");
    into.push_str(&serde_json::to_string(value).expect("a chunk has a JSON form"));
    into.push_str("\n\n");
}
