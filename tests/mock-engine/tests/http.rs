//! The engine over HTTP, as a client of vLLM sees it.

mod support;

use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::Engine;

const PROMPT: &str =
    "The server could not find the message that the network had sent before the request was over.";

fn texts(events: &[Value]) -> String {
    let text = |event: &Value| {
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
        text.unwrap_or_default().to_owned()
    };
    events.iter().map(text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_are_the_same_whole_streamed_and_from_the_cache() {
    let engine = Engine::start(&["--blocks", "200"]).await;
    let body = json!({"model": "m", "prompt": PROMPT, "max_tokens": 20, "return_token_ids": true});
    let (status, whole) = engine.post("/v1/completions", &body).await;
    assert_eq!(status, 200);
    let choice = &whole["choices"][0];
    assert_eq!(whole["object"], "text_completion");
    assert!(whole["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &Value::Null));
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 20);
    let prompt_len = choice["prompt_token_ids"].as_array().unwrap().len();
    assert_eq!(whole["usage"]["prompt_tokens"], prompt_len);
    assert_eq!(whole["usage"]["completion_tokens"], 20);
    assert_eq!(whole["kv_transfer_params"], Value::Null);

    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = engine.events("/v1/completions", &streamed).await;
    assert_eq!(events.last().unwrap(), "[DONE]");
    let usage = &events[events.len() - 2];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(
        usage["usage"],
        json!({"prompt_tokens": prompt_len, "total_tokens": prompt_len + 20, "completion_tokens": 20})
    );
    let pieces = &events[..events.len() - 2];
    assert_eq!(texts(pieces), choice["text"].as_str().unwrap());
    assert_eq!(pieces[0]["choices"][0]["prompt_token_ids"], choice["prompt_token_ids"]);
    let ids: Vec<&Value> =
        pieces.iter().flat_map(|event| event["choices"][0]["token_ids"].as_array().unwrap()).collect();
    assert_eq!(ids, choice["token_ids"].as_array().unwrap().iter().collect::<Vec<_>>());
    assert!(pieces.iter().all(|event| event.get("usage").is_none()));
    let (last, before) = pieces.split_last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));

    let by_tokens = json!({"prompt": choice["prompt_token_ids"], "max_tokens": 20});
    assert_eq!(engine.complete(by_tokens).await, choice["text"].as_str().unwrap());
    assert!(engine.metric("prefix_cache_hits_total").await > 0.0);
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_begin_with_the_role_and_stream_what_they_answer_whole() {
    let engine = Engine::start(&["--blocks", "200"]).await;
    let body = json!({"messages": [{"role": "user", "content": "Hello?"}], "max_completion_tokens": 9, "max_tokens": 3});
    let (status, whole) = engine.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200);
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["usage"]["completion_tokens"], 9);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = engine.events("/v1/chat/completions", &streamed).await;
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["usage"]["completion_tokens"], 0);
    assert_eq!(texts(&events), whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(events[events.len() - 2]["usage"]["completion_tokens"], 9);

    // Without a limit, the model's own default ends the answer.
    let (_, answer) = engine.post("/v1/chat/completions", &json!({"messages": body["messages"]})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 128);
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_tokens_and_the_end_of_sequence_end_outputs() {
    let engine = Engine::start(&["--blocks", "200", "--eos-one-in", "10"]).await;
    let body = |more: Value| {
        let mut body =
            json!({"prompt": PROMPT, "max_tokens": 60, "return_token_ids": true, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let choice =
        async |more: Value| engine.post("/v1/completions", &body(more)).await.1["choices"][0].clone();
    let all = choice(json!({})).await;
    let text = all["text"].as_str().unwrap();
    let tokens = all["token_ids"].as_array().unwrap();
    assert_eq!(tokens.len(), 60);

    let middle: String = text.chars().skip(40).take(5).collect();
    let at = text.find(&middle).unwrap();
    let stopped = choice(json!({"stop": ["no such text", middle]})).await;
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!(middle)));
    assert_eq!(stopped["text"], text[..at]);
    let kept = choice(json!({"stop": middle, "include_stop_str_in_output": true})).await;
    assert_eq!(kept["text"], text[..at + middle.len()]);
    let mut streamed = body(json!({"stop": middle, "stream": true}));
    let events = engine.events("/v1/completions", &streamed).await;
    assert_eq!(texts(&events), text[..at]);
    streamed["stop"] = json!("no such text");
    assert_eq!(texts(&engine.events("/v1/completions", &streamed).await), text);

    let stopped = choice(json!({"stop_token_ids": [tokens[7]]})).await;
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &tokens[7]));
    let count = stopped["token_ids"].as_array().unwrap().len();
    assert!(count <= 8);
    let later = choice(json!({"stop_token_ids": [tokens[7]], "min_tokens": 12})).await;
    assert!(later["token_ids"].as_array().unwrap().len() >= 12);

    let eos = choice(json!({"ignore_eos": false})).await;
    assert_eq!((&eos["finish_reason"], &eos["stop_reason"]), (&json!("stop"), &Value::Null));
    let count = eos["token_ids"].as_array().unwrap().len();
    assert!(count < 60);
    assert!(text.starts_with(eos["text"].as_str().unwrap()));
    let eos = choice(json!({"ignore_eos": false, "min_tokens": count + 5})).await;
    assert!(eos["token_ids"].as_array().unwrap().len() >= count + 5);
    engine.wait_for("num_requests_running", 0.0).await;
    engine.wait_for("kv_cache_usage_perc", 0.0).await;
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_by_name() {
    let engine = Engine::start(&["--blocks", "100"]).await;
    let post = async |path: &str, body: Value| {
        let (status, answer) = engine.post(path, &body).await;
        let error = &answer["error"];
        assert_eq!(error["code"], status);
        assert!(error["message"].is_string() && error["type"].is_string(), "{answer}");
        (status, error["param"].as_str().unwrap_or_default().to_owned())
    };
    for (body, status, param) in [
        (json!({"model": "other", "prompt": "x"}), 404, "model"),
        (json!({}), 400, "prompt"),
        (json!({"prompt": ""}), 400, "prompt"),
        (json!({"prompt": []}), 400, "prompt"),
        (json!({"prompt": 5}), 400, "prompt"),
        (json!({"prompt": [1, -2]}), 400, "prompt"),
        (json!({"prompt": [4_000_000_000u32]}), 400, "prompt"),
        (json!({"prompt": ["a", "b"]}), 400, "prompt"),
        (json!({"prompt": [[1], [2]]}), 400, "prompt"),
        (json!({"prompt": "x", "n": 2}), 400, "n"),
        (json!({"prompt": "x", "logprobs": 0}), 400, "logprobs"),
        (json!({"prompt": "x", "prompt_logprobs": 0}), 400, "prompt_logprobs"),
        (json!({"prompt": "x", "max_tokens": 0}), 400, "max_tokens"),
        (json!({"prompt": "x", "max_tokens": "many"}), 400, "max_tokens"),
        (json!({"prompt": "x", "max_tokens": 1_000_000}), 400, "max_tokens"),
        (json!({"prompt": "x", "min_tokens": 17}), 400, "min_tokens"),
        (json!({"prompt": vec![5; 1585]}), 400, "input_tokens"),
        (json!({"prompt": vec![5; 1584]}), 400, "max_tokens"),
        (json!({"prompt": "x", "stop": [""]}), 400, "stop"),
        (json!({"prompt": "x", "stop": 5}), 400, "stop"),
        (json!({"prompt": "x", "cache_salt": ""}), 400, "cache_salt"),
        (json!({"prompt": "x", "cache_salt": "a/b"}), 400, "cache_salt"),
        (json!({"prompt": "x", "stream_options": {"include_usage": true}}), 400, "stream_options"),
        (json!({"prompt": "x", "response_format": {"type": "json_object"}}), 400, "response_format"),
        (json!({"prompt": "x", "echo": true}), 400, "echo"),
    ] {
        assert_eq!(post("/v1/completions", body.clone()).await, (status, param.to_owned()), "{body}");
    }
    let hello = json!([{"role": "user", "content": "x"}]);
    for (body, param) in [
        (json!({}), "messages"),
        (json!({"messages": [{"content": "x"}]}), "messages"),
        (json!({"messages": [{"role": "poet", "content": "x"}]}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "messages",
        ),
        (json!({"messages": hello, "logprobs": true}), "logprobs"),
        (json!({"messages": hello, "top_logprobs": 2}), "top_logprobs"),
        (json!({"messages": hello, "tool_choice": "required"}), "tool_choice"),
    ] {
        assert_eq!(post("/v1/chat/completions", body.clone()).await, (400, param.to_owned()), "{body}");
    }
    // What asks for nothing is accepted.
    let nothing = json!({
        "prompt": "x", "n": 1, "logprobs": null, "echo": false, "suffix": null, "logit_bias": {}, "bad_words": [],
        "temperature": 0.7, "top_p": 0.9, "seed": 3, "response_format": {"type": "text"}, "stop": null, "unknown": 1,
        "stream_options": null, "kv_transfer_params": {"other": true}, "max_tokens": null,
    });
    assert_eq!(engine.post("/v1/completions", &nothing).await.0, 200);
    assert_eq!(engine.send("POST", "/v1/completions", "{").await.status(), 400);
    assert_eq!(engine.get("/nowhere").await.0, 404);
    assert_eq!(engine.get("/v1/completions").await.0, 405);
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_its_blocks() {
    let engine = Engine::start(&["--blocks", "100", "--decode-ms", "20,0,0"]).await;
    let body = json!({"prompt": PROMPT, "max_tokens": 1000, "stream": true});
    let response = engine.send("POST", "/v1/completions", &body.to_string()).await;
    let mut stream = response.into_body();
    stream.frame().await.unwrap().unwrap();
    assert_eq!(engine.metric("num_requests_running").await, 1.0);
    assert!(engine.metric("kv_cache_usage_perc").await > 0.0);
    drop(stream);
    engine.wait_for("kv_cache_usage_perc", 0.0).await;

    // So does one that does not wait for its whole answer.
    let body = json!({"prompt": PROMPT, "max_tokens": 1000}).to_string();
    let waiting =
        tokio::time::timeout(Duration::from_millis(200), engine.send("POST", "/v1/completions", &body));
    assert!(waiting.await.is_err());
    engine.wait_for("kv_cache_usage_perc", 0.0).await;
    engine.wait_for("num_requests_running", 0.0).await;
    let (_, text) = engine.get("/metrics").await;
    assert!(text.contains("finished_reason=\"abort\"} 2.0"), "{text}");
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn salts_and_adapters_keep_caches_apart() {
    let engine = Engine::start(&["--blocks", "200", "--lora", "ada", "--enable-prompt-tokens-details"]).await;
    let cached = async |more: Value| {
        let mut body = json!({"prompt": PROMPT, "max_tokens": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = engine.post("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    for more in [json!({}), json!({"cache_salt": "a"}), json!({"cache_salt": "b"}), json!({"model": "ada"})] {
        assert_eq!(cached(more.clone()).await, 0, "{more}");
        assert_eq!(cached(more.clone()).await, 16, "{more}");
    }
    let (_, models) = engine.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"][0]["id"], "m");
    assert_eq!(models["data"][0]["max_model_len"], 199 * 16);
    assert_eq!((&models["data"][1]["id"], &models["data"][1]["parent"]), (&json!("ada"), &json!("m")));
    let (_, reset) = engine.post("/reset_prefix_cache", &json!({})).await;
    assert_eq!(reset, json!({"success": true}));
    assert_eq!(cached(json!({})).await, 0);
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_can_be_asked_for() {
    let engine = Engine::start(&["--blocks", "100"]).await;
    let text = "Grüße, 世界! <|im_end|>\n\tdef f(x):";
    let (_, answer) = engine.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).await;
    assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
    assert_eq!(answer["count"], answer["token_strs"].as_array().unwrap().len());
    assert_eq!(answer["max_model_len"], 1584);
    let (_, back) = engine.post("/detokenize", &json!({"tokens": answer["tokens"]})).await;
    assert_eq!(back, json!({"prompt": text}));

    let messages =
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    let (_, chat) = engine.post("/tokenize", &json!({"messages": messages})).await;
    let body = json!({"messages": messages, "max_tokens": 1, "return_token_ids": true});
    let (_, answer) = engine.post("/v1/chat/completions", &body).await;
    assert_eq!(answer["prompt_token_ids"], chat["tokens"]);
    let (_, prompt) = engine.post("/detokenize", &json!({"tokens": chat["tokens"]})).await;
    assert!(
        prompt["prompt"]
            .as_str()
            .unwrap()
            .contains("<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n")
    );
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_agree_and_their_answers_follow_from_every_byte() {
    let small = ["--blocks", "100", "--kv-layers", "2", "--kv-heads", "1", "--kv-head-bytes", "8"];
    let one = Engine::start(&small).await;
    let mut other = small.to_vec();
    other.extend(["--max-num-batched-tokens", "7"]);
    let other = Engine::start(&other).await;
    let body = json!({"prompt": PROMPT, "max_tokens": 12});
    let right = one.complete(body.clone()).await;
    assert_eq!(other.complete(body.clone()).await, right);
    // The cached block, wherever it lies: with any byte of it wrong, the answer is another.
    let fd = &one.server.storages()[1];
    let mut bytes = vec![0; 100 * 2 * 16 * 8];
    rustix::io::pread(fd, &mut bytes[..], 0).unwrap();
    let first_written = bytes.iter().position(|byte| *byte != 0).unwrap();
    for at in [first_written, first_written + 100, first_written + 255] {
        let byte = bytes[at];
        rustix::io::pwrite(fd, &[byte ^ 1], at as u64).unwrap();
        assert_ne!(one.complete(body.clone()).await, right, "byte {at}");
        rustix::io::pwrite(fd, &[byte], at as u64).unwrap();
        assert_eq!(one.complete(body.clone()).await, right);
    }
    for engine in [one, other] {
        engine.server.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_configurations_name_the_option() {
    use baton_mock_engine::server::{ServeConfig, Server};
    use clap::Parser;
    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        serve: ServeConfig,
    }
    let start = async |options: &[&str]| {
        let model = support::model().to_str().unwrap();
        let fixed = ["engine", "--model", model, "--served-model-name", "m", "--port", "0"];
        let arguments = match Arguments::try_parse_from(fixed.iter().chain(options)) {
            Ok(arguments) => arguments,
            Err(error) => return error.to_string(),
        };
        format!("{:#}", Server::start(arguments.serve).await.map(drop).unwrap_err())
    };
    for (options, name) in [
        (&["--blocks", "10", "--max-model-len", "289"][..], "--max-model-len"),
        (&["--kv-heads", "1", "--kv-head-bytes", "4"], "--kv-head-bytes"),
        (&["--max-num-seqs", "0"], "--max-num-seqs"),
        (&["--prefill-ms", "1,2"], "--prefill-ms"),
        (&["--kv-events-endpoint", "tcp://192.0.2.1:5557"], "--kv-events-endpoint"),
        (&["--kv-replay-endpoint", "tcp://127.0.0.1:0"], "--kv-events-endpoint"),
    ] {
        let error = start(options).await;
        assert!(error.contains(name), "{options:?}: {error}");
    }
}
