//! Requests through the coordinator, against engines that behave as a test wants.

mod support;

use std::time::Duration;

use baton_proto::ContentKeys;
use baton_proto::block_hash::BlockHasher;
use baton_proto::control::v1::{self, agent_message::Message as Said};
use futures::StreamExt;
use serde_json::{Value, json};

use self::support::{Agent, Behaviour, Engine, Fleet, completion, eventually, register};

fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn a_colocated_request_passes_byte_for_byte_both_ways() {
    let fleet = Fleet::start("").await;
    let (engine, _agent) = fleet.engine("e0").await;
    let body =
        "{ \"model\": \"m\",\"prompt\":\"x \\u00e9\", \"extra\" : {\"deep\":[1.50, 1e3]} ,\"stream\":false}";
    let response = fleet
        .http
        .post(fleet.url("/v1/completions"))
        .header("authorization", "Bearer k")
        .header("cookie", "secret")
        .body(body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(header(&response, "content-type"), "application/json");
    assert_eq!(header(&response, "x-baton-mode"), "colocated");
    assert_eq!(
        (header(&response, "x-baton-prefill"), header(&response, "x-baton-decode")),
        ("e0".into(), "e0".into())
    );
    assert_eq!(header(&response, "x-baton-transfer-id"), "");
    assert_eq!(header(&response, "x-baton-explain"), "");
    assert_eq!(response.json::<Value>().await.unwrap()["usage"]["prompt_tokens"], 7);
    assert_eq!(engine.bodies(), [body.as_bytes()]);
    assert_eq!(engine.last_headers()["authorization"], "Bearer k");
    assert!(!engine.last_headers().contains_key("cookie"));
    fleet.until_metric("baton_requests_total{mode=\"colocated\",outcome=\"ok\"}", 1.0).await;
}

#[tokio::test]
async fn a_stream_goes_on_event_by_event() {
    let fleet = Fleet::start("").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Step);
    engine.step(1);
    let mut body = completion();
    body["stream"] = json!(true);
    let response = fleet.complete("colocated", &body).await;
    assert_eq!(header(&response, "x-request-id"), "r-1");
    let mut stream = response.bytes_stream();
    for event in ["t0", "t1", "t2", "t3", "[DONE]"] {
        let chunk = stream.next().await.unwrap().unwrap();
        let text = std::str::from_utf8(&chunk).unwrap();
        assert!(text.starts_with("data: ") && text.contains(event) && text.ends_with("\n\n"), "{text}");
        engine.step(1);
    }
    assert!(stream.next().await.is_none());
    assert_eq!(fleet.metric("baton_ttft_seconds_count{mode=\"colocated\"}").await, 1.0);
    let coordinator = &fleet.server.coordinator;
    let seen = coordinator.fleet(coordinator.config.policy.0).engines()[0].answer_tokens;
    assert_eq!(seen, Some(4.0), "the last event is no token");
}

#[tokio::test]
async fn a_handoff_holds_on_one_engine_and_pulls_on_the_other() {
    let fleet = Fleet::start("").await;
    let (e0, mut a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    let mut body = completion();
    body["stream"] = json!(true);
    body["temperature"] = json!(0.5);
    let response = fleet.complete("disaggregated", &body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(header(&response, "x-baton-mode"), "disaggregated");
    assert_eq!(
        (header(&response, "x-baton-prefill"), header(&response, "x-baton-decode")),
        ("e0".into(), "e1".into())
    );
    let transfer = header(&response, "x-baton-transfer-id");
    assert!(response.text().await.unwrap().ends_with("data: [DONE]\n\n"));

    let hold = e0.last();
    assert_eq!((&hold["max_tokens"], &hold["stream"]), (&json!(1), &json!(false)));
    assert_eq!(hold["kv_transfer_params"]["baton"]["action"], "hold");
    assert_eq!(hold["kv_transfer_params"]["baton"]["transfer_id"], transfer);
    let pull = e1.last();
    assert_eq!(
        (&pull["max_tokens"], &pull["stream"], &pull["temperature"]),
        (&json!(4), &json!(true), &json!(0.5))
    );
    let plan = &pull["kv_transfer_params"]["baton"];
    assert_eq!((&plan["action"], &plan["num_tokens"]), (&json!("pull"), &json!(201)));
    assert_eq!(plan["source"], json!({"engine_id": "e0", "address": "e0.example:7420", "epoch": 1}));
    assert_eq!(a0.released().await.to_string(), transfer, "by the first byte the hold has done its work");
    fleet.until_metric("baton_requests_total{mode=\"disaggregated\",outcome=\"ok\"}", 1.0).await;
}

#[tokio::test]
async fn a_prefill_leg_that_fails_costs_the_plan_only() {
    let fleet = Fleet::start("").await;
    let (e0, _a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    for (behaviour, reason) in [
        (Behaviour::NeverHold, "no_hold"),
        (Behaviour::Status(500), "prefill_refused"),
        (Behaviour::Status(400), "prefill_refused"),
        (Behaviour::BreakOff, "prefill_broke_off"),
    ] {
        let before = fleet.metric(&format!("baton_handoff_fallbacks_total{{reason=\"{reason}\"}}")).await;
        e0.behave(behaviour);
        let response = fleet.complete("disaggregated", &completion()).await;
        assert_eq!(response.status(), 200, "{behaviour:?}");
        assert_eq!(header(&response, "x-baton-mode"), "colocated");
        assert_eq!(header(&response, "x-baton-prefill"), "e1");
        assert_eq!(e1.last(), completion(), "the client's own body");
        let name = format!("baton_handoff_fallbacks_total{{reason=\"{reason}\"}}");
        assert_eq!(fleet.metric(&name).await, before + 1.0, "{behaviour:?}");
    }
}

#[tokio::test]
async fn an_unreachable_prefill_engine_costs_the_plan_only() {
    let fleet = Fleet::start("").await;
    let _a0 = Agent::connect(&fleet, register("e0", "http://127.0.0.1:1")).await;
    let (_e1, _a1) = fleet.engine("e1").await;
    let response = fleet.complete("disaggregated", &completion()).await;
    assert_eq!((response.status().as_u16(), header(&response, "x-baton-decode")), (200, "e1".into()));
    assert_eq!(fleet.metric("baton_handoff_fallbacks_total{reason=\"prefill_unreachable\"}").await, 1.0);
}

#[tokio::test]
async fn an_engine_that_fails_before_the_first_byte_is_left_out() {
    let mut body = completion();
    body["stream"] = json!(true);
    for behaviour in [Behaviour::Status(500), Behaviour::Status(503), Behaviour::BreakOff] {
        // A new fleet each time: one that has served knows its engines' speeds, and may place otherwise.
        let fleet = Fleet::start("").await;
        let (e0, _a0) = fleet.engine("e0").await;
        let (_e1, _a1) = fleet.engine("e1").await;
        e0.behave(behaviour);
        let response = fleet.complete("colocated", &body).await;
        assert_eq!((response.status().as_u16(), header(&response, "x-baton-decode")), (200, "e1".into()));
        assert_eq!(fleet.metric("baton_retries_total").await, 1.0, "{behaviour:?}");
    }
}

#[tokio::test]
async fn a_decode_engine_that_fails_is_replaced_and_the_hold_released() {
    let fleet = Fleet::start("").await;
    let (e0, mut a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    e1.behave(Behaviour::Status(500));
    let response = fleet.complete("disaggregated", &completion()).await;
    assert_eq!((response.status().as_u16(), header(&response, "x-baton-mode")), (200, "colocated".into()));
    assert_eq!(header(&response, "x-baton-decode"), "e0");
    assert_eq!(e0.last(), completion());
    let plan = &serde_json::from_slice::<Value>(&e1.bodies()[0]).unwrap()["kv_transfer_params"]["baton"];
    assert_eq!(a0.released().await.to_string(), plan["transfer_id"]);
}

#[tokio::test]
async fn when_every_engine_fails_the_client_is_told() {
    let fleet = Fleet::start("").await;
    let (e0, _a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    e0.behave(Behaviour::Status(500));
    e1.behave(Behaviour::Status(502));
    let response = fleet.complete("adaptive", &completion()).await;
    assert_eq!(response.status(), 503);
    let error = response.json::<Value>().await.unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("e0 failed, e1 failed"), "{error}");
    fleet.until_metric("baton_requests_total{mode=\"colocated\",outcome=\"failed\"}", 1.0).await;
}

#[tokio::test]
async fn an_engines_refusal_passes_with_its_body() {
    let fleet = Fleet::start("").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Status(422));
    let response = fleet.complete("adaptive", &completion()).await;
    assert_eq!(response.status(), 422);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["message"], "no");
    fleet.until_metric("baton_requests_total{mode=\"colocated\",outcome=\"engine_refused\"}", 1.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_prefill_and_its_hold() {
    let fleet = Fleet::start("").await;
    let (e0, mut a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    e0.behave(Behaviour::Hang);
    let request = fleet.http.post(fleet.url("/v1/completions")).header("x-baton-policy", "disaggregated");
    let request = tokio::spawn(request.json(&completion()).send());
    e0.until_requests(1).await;
    request.abort();
    let transfer = a0.released().await;
    assert_eq!(e0.last()["kv_transfer_params"]["baton"]["transfer_id"], transfer.to_string());
    eventually("the engine's request is dropped", async || e0.aborted() == 1).await;
    assert!(e1.bodies().is_empty());
    fleet.until_metric("baton_requests_total{mode=\"colocated\",outcome=\"cancelled\"}", 1.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_a_stream() {
    let fleet = Fleet::start("").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Step);
    engine.step(2);
    let mut body = completion();
    body["stream"] = json!(true);
    let mut stream = fleet.complete("colocated", &body).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    eventually("the engine's request is dropped", async || engine.aborted() == 1).await;
    fleet.until_metric("baton_requests_total{mode=\"colocated\",outcome=\"cancelled\"}", 1.0).await;
    let entry = fleet.server.coordinator.registry.entries().remove(0);
    assert_eq!(entry.load.reserved(), Default::default(), "nothing stays reserved");
}

#[tokio::test]
async fn an_engine_whose_lease_lapses_is_given_up_in_the_middle() {
    let fleet = Fleet::start("lease_ms = 400").await;
    let (e0, a0) = fleet.engine("e0").await;
    let (_e1, a1) = fleet.engine("e1").await;
    e0.behave(Behaviour::Hang);
    let beating = async {
        loop {
            a1.say(Said::Heartbeat(Default::default())).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let body = completion();
    let response = tokio::select! {
        response = fleet.complete("colocated", &body) => response,
        () = beating => unreachable!(),
    };
    assert_eq!((response.status().as_u16(), header(&response, "x-baton-decode")), (200, "e1".into()));
    drop(a0);
}

#[tokio::test]
async fn errors_have_openais_shape() {
    let fleet = Fleet::start("max_body_bytes = 2000").await;
    let (_engine, _agent) = fleet.engine("e0").await;
    let post = |path: &str, body: String| fleet.http.post(fleet.url(path)).body(body).send();
    let named = |model: &str| json!({ "model": model, "prompt": "x" }).to_string();
    let plan =
        json!({ "model": "m", "prompt": "x", "kv_transfer_params": {"do_remote_decode": true} }).to_string();
    for (path, body, status, param) in [
        ("/v1/completions", "{".to_owned(), 400, Value::Null),
        ("/v1/completions", "[1]".to_owned(), 400, Value::Null),
        ("/v1/chat/completions", "{}".to_owned(), 400, json!("model")),
        ("/v1/completions", json!({"model": 5}).to_string(), 400, json!("model")),
        ("/v1/completions", named("other"), 404, json!("model")),
        ("/v1/completions", named(&"x".repeat(3000)), 413, Value::Null),
        ("/v1/completions", plan, 400, json!("kv_transfer_params")),
        ("/v1/embeddings", named("m"), 404, Value::Null),
        ("/health", named("m"), 405, Value::Null),
        ("/tokenize", "{".to_owned(), 400, Value::Null),
    ] {
        let response = post(path, body.clone()).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{path} {body}");
        let error = response.json::<Value>().await.unwrap();
        assert_eq!(error["error"]["code"], status, "{error}");
        assert_eq!(error["error"]["param"], param, "{error}");
        assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string());
    }
    let response = fleet.http.post(fleet.url("/v1/completions")).header("x-baton-policy", "clever");
    assert_eq!(response.body(named("m")).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn what_cannot_be_split_stays_whole() {
    let fleet = Fleet::start("").await;
    let (_e0, _a0) = fleet.engine("e0").await;
    let (_e1, _a1) = fleet.engine("e1").await;
    let chat = |extra: Value| {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x ".repeat(100)}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    let text = |extra: Value| {
        let mut body = completion();
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ("/v1/completions", body)
    };
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]);
    for ((path, body), why) in [
        (text(json!({"prompt": ["a", "b"]})), "batch"),
        (text(json!({"prompt": [[1, 2], [3]]})), "batch"),
        (text(json!({"echo": true})), "echo"),
        (text(json!({"prompt_logprobs": 0})), "prompt_logprobs"),
        (text(json!({"n": 2})), "several sequences"),
        (text(json!({"use_beam_search": true})), "beam search"),
        (text(json!({"truncate_prompt_tokens": 5})), "truncation"),
        (text(json!({"prompt_embeds": "AAAA"})), "prompt_embeds"),
        (text(json!({"max_tokens": 0})), "no output"),
        (chat(json!({"messages": image})), "multimodal"),
        (chat(json!({"chat_template": "x"})), "request_template"),
        (chat(json!({"messages": "x"})), "malformed"),
    ] {
        let response = fleet.post(path, "disaggregated", &body).await;
        assert_eq!(header(&response, "x-baton-mode"), "colocated", "{why}");
        let explained: Value = serde_json::from_str(&header(&response, "x-baton-explain")).unwrap();
        assert_eq!(explained["not_splittable"], why);
    }
    for (path, body) in [
        text(json!({})),
        text(json!({"prompt": [5, 6, 7, 8]})),
        text(json!({"n": 1, "echo": false, "kv_transfer_params": null})),
        chat(json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
    ] {
        let response = fleet.post(path, "disaggregated", &body).await;
        assert_eq!(header(&response, "x-baton-mode"), "disaggregated", "{body}");
    }
    assert_eq!(fleet.metric("baton_untokenised_total{reason=\"batch\"}").await, 2.0);
}

#[tokio::test]
async fn a_prefix_is_found_where_its_events_say_and_under_its_salt() {
    let fleet = Fleet::start("").await;
    let (_e0, mut a0) = fleet.engine("e0").await;
    let (_e1, mut a1) = fleet.engine("e1").await;
    let body = json!({"model": "m", "prompt": (0..100u32).collect::<Vec<_>>(), "max_tokens": 4});
    let tokens: Vec<u32> = (0..100).collect();
    let keys = |salt: Option<&str>| ContentKeys { salt: salt.map(str::to_owned), ..ContentKeys::default() };
    let hasher = BlockHasher::new("m");
    let plain = hasher.chain(&tokens[..96], 16, &keys(None));
    let salted = hasher.chain(&tokens[..96], 16, &keys(Some("tenant")));
    a0.events(1, 1, true, &salted).await;
    a1.events(1, 1, true, &plain[..4]).await;
    assert_eq!((a0.ack().await, a1.ack().await), (1, 1));

    let response = fleet.complete("adaptive", &body).await;
    assert_eq!(
        (header(&response, "x-baton-decode"), header(&response, "x-baton-hit-tokens")),
        ("e1".into(), "64".into())
    );
    let mut salted = body.clone();
    salted["cache_salt"] = json!("tenant");
    let response = fleet.complete("adaptive", &salted).await;
    assert_eq!(
        (header(&response, "x-baton-decode"), header(&response, "x-baton-hit-tokens")),
        ("e0".into(), "96".into())
    );
    assert_eq!(fleet.metric("baton_index_blocks").await, 10.0);
}

#[tokio::test]
async fn an_adapter_is_served_where_it_is_loaded_and_finds_its_own_prefix() {
    let fleet = Fleet::start("").await;
    let (_e0, _a0) = fleet.engine("e0").await;
    let engine = Engine::start().await;
    let loaded = v1::Register { adapters: vec!["sql".into()], ..register("e1", &engine.url()) };
    let mut a1 = Agent::connect(&fleet, loaded).await;
    let tokens: Vec<u32> = (0..100).collect();
    let of = |lora: Option<&str>| ContentKeys { lora: lora.map(str::to_owned), ..ContentKeys::default() };
    let hasher = BlockHasher::new("m");
    let own = hasher.chain(&tokens[..80], 16, &of(Some("sql")));
    a1.events(1, 1, true, &[own, hasher.chain(&tokens[..32], 16, &of(None))].concat()).await;
    assert_eq!(a1.ack().await, 1);

    let ask = async |model: &str| {
        let body = json!({"model": model, "prompt": tokens, "max_tokens": 4});
        let response = fleet.complete("longest_prefix", &body).await;
        (response.status(), header(&response, "x-baton-decode"), header(&response, "x-baton-hit-tokens"))
    };
    assert_eq!(ask("sql").await, (http::StatusCode::OK, "e1".into(), "80".into()));
    assert_eq!(ask("m").await, (http::StatusCode::OK, "e1".into(), "32".into()));
    assert_eq!(ask("other").await.0, http::StatusCode::NOT_FOUND);
    assert_eq!(engine.bodies().len(), 2);
    let models: Value = fleet.http.get(fleet.url("/v1/models")).send().await.unwrap().json().await.unwrap();
    let listed = |at: usize| (models["data"][at]["id"].clone(), models["data"][at]["parent"].clone());
    assert_eq!([listed(0), listed(1)], [(json!("m"), json!(null)), (json!("sql"), json!("m"))]);
}

#[tokio::test]
async fn a_dry_run_shows_the_options_and_asks_no_engine() {
    let fleet = Fleet::start("").await;
    let (e0, _a0) = fleet.engine("e0").await;
    let (e1, _a1) = fleet.engine("e1").await;
    let route = fleet.post("/v1/route", "disaggregated", &completion()).await.json::<Value>().await.unwrap();
    assert_eq!(route["policy"], "disaggregated");
    assert_eq!(route["options"].as_array().unwrap().len(), 4);
    assert_eq!(route["options"][0]["mode"], "disaggregated");
    assert!(route["options"][0]["terms_ms"]["transfer"].as_f64().unwrap() > 0.0);
    assert_eq!(route["options"][2]["why_not"], "the policy splits every request it can");
    assert!(e0.bodies().is_empty() && e1.bodies().is_empty());
}

#[tokio::test]
async fn engines_beyond_loopback_are_spoken_to_over_mutual_tls() {
    let fleet = Fleet::start("").await;
    let engine = Engine::start_tls(&fleet.certificates, "e0").await;
    let _agent = Agent::connect(&fleet, register("e0", &engine.url())).await;
    assert_eq!(fleet.complete("adaptive", &completion()).await.status(), 200);

    let impostor = Engine::start_tls(&fleet.certificates, "e7").await;
    let _other = Agent::connect(&fleet, register("e1", &impostor.url())).await;
    let mut only = completion();
    only["model"] = json!("m");
    let (e0, e1) = ("e0".parse().unwrap(), "e1".parse().unwrap());
    assert!(fleet.server.coordinator.registry.get(&e0).is_some());
    let error = fleet
        .server
        .coordinator
        .registry
        .get(&e1)
        .unwrap()
        .upstream()
        .post("/v1/completions", &Default::default(), only.to_string().into())
        .await;
    assert!(error.is_err(), "the certificate carries another engine's name");
    assert!(impostor.bodies().is_empty());
}

#[tokio::test]
async fn health_models_and_tokens_are_told() {
    let fleet = Fleet::start("").await;
    let get = |path: &str| fleet.http.get(fleet.url(path)).send();
    assert_eq!(get("/health").await.unwrap().status(), 200);
    let response = get("/ready").await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(header(&response, "retry-after"), "1");
    let response = fleet.complete("adaptive", &completion()).await;
    assert_eq!(response.status(), 503);
    let (_engine, _agent) = fleet.engine("e0").await;
    assert_eq!(get("/ready").await.unwrap().status(), 200);

    let models = get("/v1/models").await.unwrap().json::<Value>().await.unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("m"), &json!(4096)));
    let body = json!({"prompt": "fox <|end|>", "return_token_strs": true});
    let tokens = fleet.post("/tokenize", "adaptive", &body).await.json::<Value>().await.unwrap();
    assert_eq!(tokens["count"].as_u64().unwrap() as usize, tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["token_strs"].as_array().unwrap().last().unwrap(), "<|end|>");
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template": "x"});
    assert_eq!(fleet.post("/tokenize", "adaptive", &body).await.status(), 400);
}

#[tokio::test]
async fn an_engine_that_makes_other_tokens_is_told_of() {
    let fleet = Fleet::start("").await;
    let engine = Engine::start().await;
    engine.tokenize_as(&[1, 2, 3]);
    let _agent = Agent::connect(&fleet, register("e0", &engine.url())).await;
    fleet.until_metric("baton_token_mismatches_total", 2.0).await;
    assert_eq!(fleet.complete("adaptive", &completion()).await.status(), 200);
}

#[tokio::test]
async fn requests_in_flight_are_bounded() {
    let fleet = Fleet::start("max_requests = 1").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Step);
    engine.step(1);
    let mut body = completion();
    body["stream"] = json!(true);
    let first = fleet.complete("colocated", &body).await;
    let second = fleet.complete("colocated", &body).await;
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 503));
    assert_eq!(header(&second, "retry-after"), "1");
    engine.step(10);
    assert!(first.text().await.unwrap().ends_with("[DONE]\n\n"));
    eventually("there is room again", async || fleet.complete("colocated", &body).await.status() == 200)
        .await;
}
