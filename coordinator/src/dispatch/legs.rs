//! What each engine is asked.

use baton_proto::TransferId;
use baton_proto::plan::{self, Action, Held, KvTransferParams, Source, TransferPlan};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::http::RequestBody;

/// Members that the prefill leg drops: all that shapes or watches the output, which nobody reads. What shapes
/// the prompt stays.
const NOT_FOR_PREFILL: [&str; 25] = [
    "max_completion_tokens",
    "min_tokens",
    "stream_options",
    "stream_interval",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "seed",
    "response_format",
    "structured_outputs",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "thinking_token_budget",
    "repetition_detection",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "return_prompt_text",
    "vllm_xargs",
    "request_id",
];

/// The body that makes an engine compute the prompt, one token, and hold the blocks. Nothing may end it before
/// that token: an engine holds what finished by its length.
pub(super) fn prefill_body(body: &RequestBody, transfer_id: TransferId, lease_ms: u32) -> Bytes {
    let params = json(&params(transfer_id, Action::Hold { lease_ms }));
    let set = [
        ("max_tokens", "1"),
        ("stream", "false"),
        ("ignore_eos", "true"),
        ("kv_transfer_params", params.as_str()),
    ];
    body.rewrite(&NOT_FOR_PREFILL, &set)
}

/// A completion that makes an engine hold what it has cached of a prompt. Of the client's members it has those that decide
/// which blocks are found and when its turn comes, as they came.
#[derive(Serialize)]
struct SourceBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<Box<RawValue>>,
    prompt: &'a [u32],
    max_tokens: u32,
    stream: bool,
    ignore_eos: bool,
    kv_transfer_params: KvTransferParams<TransferPlan>,
}

/// The body that makes an engine hold a prompt of these tokens, whatever the client's own request is.
pub(super) fn source_body(
    body: &RequestBody,
    prompt: &[u32],
    transfer_id: TransferId,
    lease_ms: u32,
) -> Bytes {
    let source = SourceBody {
        model: body.peek("model"),
        cache_salt: body.peek("cache_salt"),
        priority: body.peek("priority"),
        prompt,
        max_tokens: 1,
        stream: false,
        ignore_eos: true,
        kv_transfer_params: params(transfer_id, Action::Hold { lease_ms }),
    };
    json(&source).into()
}

/// The client's body with the plan to pull.
pub(super) fn pull_body(body: &RequestBody, held: &Held, source: Source, deadline_ms: u32) -> Bytes {
    let action = Action::Pull { source, num_tokens: held.num_tokens, deadline_ms };
    body.rewrite(&[], &[("kv_transfer_params", json(&params(held.transfer_id, action)).as_str())])
}

fn params(transfer_id: TransferId, action: Action) -> KvTransferParams<TransferPlan> {
    KvTransferParams { baton: TransferPlan { version: plan::VERSION, transfer_id, action } }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plans and bodies are JSON")
}

/// What an engine's answer to a first leg says about the hold.
#[derive(Deserialize)]
struct FirstAnswer {
    kv_transfer_params: Option<HeldParams>,
}

#[derive(Deserialize)]
struct HeldParams {
    baton: Option<Held>,
}

/// Reads the hold from the answer, if there is one for this transfer.
pub(super) fn held(answer: &[u8], transfer_id: TransferId) -> Option<Held> {
    let answer: FirstAnswer = serde_json::from_slice(answer).ok()?;
    let held = answer.kv_transfer_params?.baton?;
    (held.transfer_id == transfer_id && held.num_tokens > 0).then_some(held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::Epoch;
    use serde_json::{Value, json};

    const ID: TransferId = TransferId::from_bytes([1; 16]);

    fn body(value: Value) -> RequestBody {
        RequestBody::parse(Bytes::from(value.to_string())).unwrap()
    }

    fn read(bytes: &Bytes) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_prefill_keeps_the_prompt_and_loses_what_shapes_the_output() {
        let out = read(&prefill_body(
            &body(json!({
                "model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [1], "cache_salt": "s",
                "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 9, "n": 1,
                "max_tokens": 7, "min_tokens": 5, "stop": ["a"], "logprobs": true, "top_logprobs": 2,
                "response_format": {"type": "json_object"}, "chat_template_kwargs": {"k": 1}, "priority": 3,
                "kv_transfer_params": null,
            })),
            ID,
            30_000,
        ));
        assert_eq!(
            out,
            json!({
                "model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [1], "cache_salt": "s",
                "chat_template_kwargs": {"k": 1}, "priority": 3,
                "max_tokens": 1, "stream": false, "ignore_eos": true,
                "kv_transfer_params": {"baton": {
                    "version": 1, "transfer_id": ID.to_string(), "action": "hold", "lease_ms": 30_000,
                }},
            })
        );
    }

    #[test]
    fn a_source_is_asked_for_the_tokens_under_the_clients_name_salt_and_priority() {
        let chat = json!({
            "model": "m", "messages": [{"role": "user", "content": "x"}], "cache_salt": "s", "priority": -3,
            "stream": true, "max_tokens": 7, "temperature": 0.5, "tools": [1], "stop": ["a"], "logprobs": true,
        });
        let hold = json!({"baton": {
            "version": 1, "transfer_id": ID.to_string(), "action": "hold", "lease_ms": 30_000,
        }});
        assert_eq!(
            read(&source_body(&body(chat), &[5, 6, 7], ID, 30_000)),
            json!({
                "model": "m", "prompt": [5, 6, 7], "cache_salt": "s", "priority": -3, "max_tokens": 1,
                "stream": false, "ignore_eos": true, "kv_transfer_params": hold,
            })
        );
        assert_eq!(
            read(&source_body(&body(json!({"model": "m", "cache_salt": null})), &[5], ID, 30_000)),
            json!({
                "model": "m", "prompt": [5], "max_tokens": 1, "stream": false, "ignore_eos": true,
                "kv_transfer_params": hold,
            })
        );
    }

    #[test]
    fn an_answer_leg_is_the_clients_own_body_with_a_plan() {
        let held = Held { transfer_id: ID, epoch: Epoch(7), num_tokens: 55 };
        let source =
            Source { engine_id: "p0".parse().unwrap(), address: "127.0.0.1:9".into(), epoch: held.epoch };
        let out = read(&pull_body(&body(json!({"prompt": "x", "anything": [1.5]})), &held, source, 500));
        assert_eq!(out["anything"], json!([1.5]));
        assert_eq!(out["kv_transfer_params"]["baton"]["action"], "pull");
        assert_eq!(out["kv_transfer_params"]["baton"]["num_tokens"], 55);
        assert_eq!(out["kv_transfer_params"]["baton"]["source"]["epoch"], 7);
    }

    #[test]
    fn only_the_hold_of_this_transfer_counts() {
        let answer = |baton: Value| json!({"choices": [], "kv_transfer_params": baton}).to_string();
        let good = json!({"baton": {"transfer_id": ID.to_string(), "epoch": 7, "num_tokens": 55}});
        assert_eq!(held(answer(good).as_bytes(), ID).unwrap().num_tokens, 55);
        let other = json!({"baton": {"transfer_id": "0".repeat(32), "epoch": 7, "num_tokens": 55}});
        for bad in [other, json!({}), Value::Null, json!({"baton": {"transfer_id": "x"}})] {
            assert_eq!(held(answer(bad).as_bytes(), ID), None);
        }
        assert_eq!(held(b"<html>", ID), None);
    }
}
