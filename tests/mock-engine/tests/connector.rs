//! The connector against a small agent over a real socket: handoffs between two engines, and their faults.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::Engine;
use support::agent::{Agent, Said, listen, socket};

const PROMPT: &str = "Every block of this prompt is computed on one engine and read on another, where the next token follows from \
all of its bytes; the last block is not full. So the second engine computes one token only, and says what the first would say.";

fn hold(lease_ms: u32) -> Value {
    json!({"baton": {"version": 1, "transfer_id": "0000000000000000000000000000000a", "action": "hold", "lease_ms": lease_ms}})
}

fn pull(num_tokens: &Value) -> Value {
    json!({"baton": {
        "version": 1, "transfer_id": "0000000000000000000000000000000a", "action": "pull", "num_tokens": num_tokens,
        "deadline_ms": 10000, "source": {"engine_id": "p0", "address": "127.0.0.1:1", "epoch": 41},
    }})
}

fn body(max_tokens: u32, plan: Value) -> Value {
    json!({"prompt": PROMPT, "max_tokens": max_tokens, "kv_transfer_params": plan, "cache_salt": "s"})
}

struct Pair {
    prefill: Engine,
    decode: Engine,
    prefill_agent: Agent,
    decode_agent: Agent,
    path: std::path::PathBuf,
    listener: Option<tokio::net::UnixListener>,
    _folders: [tempfile::TempDir; 2],
}

impl Pair {
    async fn start() -> Self {
        let (folder, prefill_path, listener) = socket();
        let prefill =
            Engine::start(&["--blocks", "100", "--baton-socket", prefill_path.to_str().unwrap()]).await;
        let prefill_agent = Agent::accept(&listener, 41).await;
        let (decode_folder, path, listener) = socket();
        let decode = Engine::start(&["--blocks", "80", "--baton-socket", path.to_str().unwrap()]).await;
        let decode_agent = Agent::accept(&listener, 42).await;
        let _folders = [folder, decode_folder];
        Self { prefill, decode, prefill_agent, decode_agent, path, listener: Some(listener), _folders }
    }

    /// Prefills and holds; gives the hold, and the pull that goes with it. The connector is up a moment after its last
    /// welcome, and until then holds nothing.
    async fn hold(&mut self) -> (baton_proto::connector::Hold, Value) {
        for _ in 0..500 {
            let (status, answer) = self.prefill.post("/v1/completions", &body(1, hold(30_000))).await;
            assert_eq!(status, 200, "{answer}");
            let held = &answer["kv_transfer_params"]["baton"];
            if held.is_null() {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            assert_eq!(
                (&held["epoch"], &held["num_tokens"]),
                (&json!(41), &answer["usage"]["prompt_tokens"])
            );
            return (self.prefill_agent.hold().await, pull(&held["num_tokens"]));
        }
        panic!("the connector is not up");
    }

    async fn stop(self) {
        self.prefill.server.stop().await.unwrap();
        self.decode.server.stop().await.unwrap();
    }
}

/// What one engine alone says.
async fn alone() -> String {
    let engine = Engine::start(&["--blocks", "100"]).await;
    let text = engine.complete(body(20, Value::Null)).await;
    engine.server.stop().await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handoff_leaves_the_output_unchanged() {
    let mut pair = Pair::start().await;
    for hello in pair.prefill_agent.hellos.iter().chain(&pair.decode_agent.hellos) {
        assert_eq!((hello.model.as_str(), hello.block_size, hello.tp_size), ("m", 16, 1));
    }
    assert_eq!(pair.prefill_agent.hellos[0].instance, pair.prefill_agent.hellos[1].instance);
    assert_ne!(pair.prefill_agent.hellos[0].instance, pair.decode_agent.hellos[0].instance);
    assert_eq!((pair.prefill_agent.hellos[0].num_blocks, pair.decode_agent.hellos[0].num_blocks), (100, 80));

    let (hold, plan) = pair.hold().await;
    let tokens = hold.content.token_ids().unwrap().len();
    assert_eq!(hold.block_ids.len(), tokens.div_ceil(16));
    assert_ne!(tokens % 16, 0);
    assert_eq!((hold.lease_ms, hold.content.keys.salt.as_deref()), (30_000, Some("s")));
    let held = pair.prefill.metric("kv_cache_usage_perc").await * 99.0;
    assert_eq!(held.round() as usize, hold.block_ids.len());

    let streamed = {
        let mut body = body(20, plan);
        body["stream"] = true.into();
        body
    };
    let (events, ()) = tokio::join!(pair.decode.events("/v1/completions", &streamed), async {
        let pull = pair.decode_agent.pull().await;
        assert_eq!((pull.first_block, pull.block_ids.len()), (0, hold.block_ids.len()));
        assert_eq!(
            (pull.source.engine_id.as_str(), pull.source.epoch.0, pull.deadline_ms),
            ("p0", 41, 10_000)
        );
        assert_eq!(pair.decode.metric("num_requests_waiting").await, 1.0);
        pair.decode_agent.copy(&pair.prefill_agent.memory, &hold, &pull);
        pair.decode_agent.done(&pull.request_id, vec![], "").await;
    });
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, alone().await);
    assert_eq!(pair.decode.metric("external_prefix_cache_hits_total").await, tokens as f64);
    let (_, metrics) = pair.decode.get("/metrics").await;
    assert!(metrics.contains("source=\"local_compute\"} 0.0"));

    pair.prefill_agent.release(&hold.request_id).await;
    pair.prefill.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.decode.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pulled_beginning_leaves_the_output_unchanged_and_the_rest_to_compute() {
    let mut pair = Pair::start().await;
    let (hold, _) = pair.hold().await;
    let tokens = hold.content.token_ids().unwrap().len();
    let pulled = tokens / 16 * 16 - 32;
    let (text, ()) = tokio::join!(pair.decode.complete(body(20, pull(&json!(pulled)))), async {
        let pull = pair.decode_agent.pull().await;
        assert_eq!((pull.first_block, pull.block_ids.len()), (0, pulled / 16));
        assert_eq!(pull.content.token_ids().unwrap().len(), pulled);
        pair.decode_agent.copy(&pair.prefill_agent.memory, &hold, &pull);
        pair.decode_agent.done(&pull.request_id, vec![], "").await;
    });
    assert_eq!(text, alone().await);
    assert_eq!(pair.decode.metric("external_prefix_cache_hits_total").await, pulled as f64);
    let (_, metrics) = pair.decode.get("/metrics").await;
    let computed = format!("source=\"local_compute\"}} {:.1}", (tokens - pulled) as f64);
    assert!(metrics.contains(&computed), "{metrics}");
    pair.prefill_agent.release(&hold.request_id).await;
    pair.prefill.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.decode.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_byte_changes_the_output_unless_it_is_found() {
    let mut pair = Pair::start().await;
    let right = alone().await;
    for (found, byte) in [(false, 0), (true, 0), (false, 77)] {
        let (hold, plan) = pair.hold().await;
        let (text, ()) = tokio::join!(pair.decode.complete(body(20, plan)), async {
            let pull = pair.decode_agent.pull().await;
            pair.decode_agent.copy(&pair.prefill_agent.memory, &hold, &pull);
            let block = pull.block_ids[1];
            let mut pieces = pair.decode_agent.memory.read(block);
            pieces[3][byte] ^= 0x80;
            pair.decode_agent.memory.write(block, &pieces);
            match found {
                true => pair.decode_agent.done(&pull.request_id, vec![block], "corrupt block").await,
                false => pair.decode_agent.done(&pull.request_id, vec![], "").await,
            }
        });
        assert_eq!(text == right, found);
        pair.prefill_agent.release(&hold.request_id).await;
        assert_eq!(pair.decode.post("/reset_prefix_cache", &json!({})).await.1, json!({"success": true}));
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_agent_costs_time_and_no_request() {
    let mut pair = Pair::start().await;
    let (_hold, plan) = pair.hold().await;
    let request = body(20, plan.clone());
    let (text, listener) = tokio::join!(pair.decode.complete(request), async {
        pair.decode_agent.pull().await;
        // A killed agent: its socket and its connections are gone.
        drop(pair.listener.take());
        drop(pair.decode_agent);
        listen(&pair.path)
    });
    let right = alone().await;
    assert_eq!(text, right);
    // The next agent finds the engine, which follows plans again.
    let mut agent = Agent::accept(&listener, 43).await;
    loop {
        pair.decode.post("/reset_prefix_cache", &json!({})).await;
        let text = pair.decode.complete(body(20, plan.clone()));
        tokio::pin!(text);
        tokio::select! {
            // It has not read the agent's welcome yet, and computes.
            text = &mut text => assert_eq!(text, right),
            pull = agent.pull() => {
                agent.done(&pull.request_id, pull.block_ids, "unknown transfer").await;
                assert_eq!(text.await, right);
                break;
            }
        }
    }
    pair.decode.wait_for("kv_cache_usage_perc", 0.0).await;

    // Holds are released with the agent that knew them.
    assert!(pair.prefill.metric("kv_cache_usage_perc").await > 0.0);
    drop(pair.prefill_agent);
    pair.prefill.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.prefill.server.stop().await.unwrap();
    pair.decode.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_stay_until_the_agent_has_closed_the_workers_connection() {
    let mut pair = Pair::start().await;
    let (hold, _) = pair.hold().await;
    pair.prefill_agent.hang_up_on_scheduler();
    // The engine ends both connections, but a copy may still be in flight.
    assert!(matches!(pair.prefill_agent.next().await, Said::Lost));
    assert!(matches!(pair.prefill_agent.next().await, Said::Lost));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let used = (pair.prefill.metric("kv_cache_usage_perc").await * 99.0).round() as usize;
    assert_eq!(used, hold.block_ids.len());
    drop(pair.prefill_agent);
    pair.prefill.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.prefill.server.stop().await.unwrap();
    pair.decode.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_pull_is_cancelled_and_keeps_its_blocks_until_done() {
    let mut pair = Pair::start().await;
    let (hold, plan) = pair.hold().await;
    let request = body(20, plan).to_string();
    let pull = tokio::select! {
        _ = pair.decode.send("POST", "/v1/completions", &request) => panic!("answered before its pull"),
        pull = pair.decode_agent.pull() => pull,
    };
    let Said::Cancel(cancelled) = pair.decode_agent.next().await else { panic!("no cancel") };
    assert_eq!(cancelled, pull.request_id);
    pair.decode.wait_for("num_requests_waiting", 0.0).await;
    let used = (pair.decode.metric("kv_cache_usage_perc").await * 79.0).round() as usize;
    assert_eq!(used, hold.block_ids.len());
    pair.decode_agent.done(&pull.request_id, pull.block_ids, "cancelled").await;
    pair.decode.wait_for("kv_cache_usage_perc", 0.0).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_that_do_not_fit_are_computed() {
    let mut pair = Pair::start().await;
    let right = alone().await;
    let (_hold, plan) = pair.hold().await;
    let mut other_version = plan.clone();
    other_version["baton"]["version"] = json!(99);
    let mut other_length = plan.clone();
    other_length["baton"]["num_tokens"] = json!(7);
    for plan in [
        other_version,
        other_length,
        json!({"baton": {"action": "dance"}}),
        json!({"do_remote_prefill": true}),
    ] {
        assert_eq!(pair.decode.complete(body(20, plan.clone())).await, right, "{plan}");
    }
    assert_eq!(pair.decode.metric("external_prefix_cache_hits_total").await, 0.0);
    pair.stop().await;
}
