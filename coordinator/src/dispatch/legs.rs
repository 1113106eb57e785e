//! What each engine is asked.

use baton_proto::TransferId;
use baton_proto::plan::{self, Action, Held, KvTransferParams, Source, TransferPlan};
use bytes::Bytes;

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
    let params = params(transfer_id, Action::Hold { lease_ms });
    let set = [
        ("max_tokens", "1"),
        ("stream", "false"),
        ("ignore_eos", "true"),
        ("kv_transfer_params", params.as_str()),
    ];
    body.rewrite(&NOT_FOR_PREFILL, &set)
}

/// The client's body with the plan to pull.
pub(super) fn decode_body(body: &RequestBody, held: &Held, source: Source, deadline_ms: u32) -> Bytes {
    let action = Action::Pull { source, num_tokens: held.num_tokens, deadline_ms };
    let params = params(held.transfer_id, action);
    body.rewrite(&[], &[("kv_transfer_params", params.as_str())])
}

fn params(transfer_id: TransferId, action: Action) -> String {
    let plan = TransferPlan { version: plan::VERSION, transfer_id, action };
    serde_json::to_string(&KvTransferParams { baton: plan }).expect("a plan is JSON")
}

/// What a prefill engine's answer says about the hold.
#[derive(serde::Deserialize)]
struct PrefillAnswer {
    kv_transfer_params: Option<HeldParams>,
}

#[derive(serde::Deserialize)]
struct HeldParams {
    baton: Option<Held>,
}

/// Reads the hold from the answer, if there is one for this transfer.
pub(super) fn held(answer: &[u8], transfer_id: TransferId) -> Option<Held> {
    let answer: PrefillAnswer = serde_json::from_slice(answer).ok()?;
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
    fn a_decode_is_the_clients_own_body_with_a_plan() {
        let held = Held { transfer_id: ID, epoch: Epoch(7), num_tokens: 55 };
        let source =
            Source { engine_id: "p0".parse().unwrap(), address: "127.0.0.1:9".into(), epoch: held.epoch };
        let out = read(&decode_body(&body(json!({"prompt": "x", "anything": [1.5]})), &held, source, 500));
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
