//! Pulls of cached prefixes: the leg that makes the source hold, the answer leg behind it, and what becomes of a request
//! whose first leg fails.

mod support;

use std::sync::Arc;

use baton_coordinator_core::load::{DecodeReservation, EngineLoad, Reserved};
use baton_coordinator_core::record::{Record, replay};
use baton_proto::ContentKeys;
use baton_proto::block_hash::BlockHasher;
use serde_json::{Value, json};

use self::support::{Agent, Behaviour, Engine, Fleet, eventually, register};

/// Tokens of the prompts, and those that the source holds.
const TOKENS: u32 = 4000;
const HELD: usize = 3840;

fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// Two engines. The first holds prefixes and is busy decoding, so that the second had better pull them.
struct Pair {
    fleet: Fleet,
    e0: Engine,
    a0: Agent,
    e1: Engine,
    _a1: Agent,
    seq: u64,
    busy: Vec<DecodeReservation>,
}

impl Pair {
    async fn start(limits: &str) -> Self {
        let fleet = Fleet::start(limits).await;
        let e0 = Engine::start().await;
        let a0 = Agent::connect(&fleet, register("e0", &e0.url())).await;
        let (e1, _a1) = fleet.engine("e1").await;
        let mut pair = Self { fleet, e0, a0, e1, _a1, seq: 0, busy: Vec::new() };
        let load = pair.load("e0");
        pair.busy.extend((0..50).map(|_| load.reserve_decode(1000)));
        pair
    }

    fn load(&self, id: &str) -> Arc<EngineLoad> {
        self.fleet.server.coordinator.registry.get(&id.parse().unwrap()).unwrap().load.clone()
    }

    /// The source has these tokens cached, whole blocks of them, under this salt.
    async fn cache(&mut self, tokens: &[u32], salt: &str) {
        let keys = ContentKeys { salt: Some(salt.to_owned()), ..ContentKeys::default() };
        let hashes = BlockHasher::new("m").chain(tokens, 16, &keys);
        self.seq += 1;
        self.a0.events(1, self.seq, self.seq == 1, &hashes).await;
        assert_eq!(self.a0.ack().await, self.seq);
    }

    /// A request whose prefix the source has cached; each salt has its own.
    async fn request(&mut self, salt: &str) -> Value {
        let tokens: Vec<u32> = (0..TOKENS).collect();
        self.cache(&tokens[..HELD], salt).await;
        json!({ "model": "m", "prompt": tokens, "max_tokens": 4, "cache_salt": salt })
    }

    /// Nothing is reserved any more but what the test itself has reserved.
    async fn ends_idle(mut self) {
        self.busy.clear();
        let loads = ["e0", "e1"].map(|id| self.load(id));
        let idle = || loads.iter().all(|load| load.reserved() == Reserved::default());
        eventually("nothing stays reserved", async || idle()).await;
    }
}

#[tokio::test]
async fn a_pull_holds_the_prefix_at_its_source_and_computes_the_rest() {
    let mut pair = Pair::start("").await;
    let mut body = pair.request("tenant").await;
    for (member, value) in [
        ("stream", json!(true)),
        ("temperature", json!(0.5)),
        ("stop", json!(["x"])),
        ("priority", json!(-2)),
    ] {
        body[member] = value;
    }
    let response = pair.fleet.complete("adaptive", &body).await;
    assert_eq!(response.status(), 200);
    let names = ["mode", "source", "prefill", "decode", "hit-tokens"];
    assert_eq!(
        names.map(|name| header(&response, &format!("x-baton-{name}"))),
        ["pull", "e0", "e1", "e1", "3840"]
    );
    let explained: Value = serde_json::from_str(&header(&response, "x-baton-explain")).unwrap();
    let option = &explained["options"][0];
    assert_eq!((&option["mode"], &option["source"]), (&json!("pull"), &json!("e0")));
    for term in ["hold", "transfer", "prefill"] {
        assert!(option["terms_ms"][term].as_f64().unwrap() > 0.0, "{option}");
    }
    let transfer = header(&response, "x-baton-transfer-id");
    assert!(response.text().await.unwrap().ends_with("data: [DONE]\n\n"));

    assert_eq!(pair.e0.last_path(), "/v1/completions");
    assert_eq!(
        pair.e0.last(),
        json!({
            "model": "m", "cache_salt": "tenant", "priority": -2, "max_tokens": 1, "stream": false, "ignore_eos": true,
            "prompt": (0..=HELD).collect::<Vec<_>>(),
            "kv_transfer_params": {"baton": {
                "version": 1, "transfer_id": transfer, "action": "hold", "lease_ms": 30_000,
            }},
        })
    );
    let mut answer = pair.e1.last();
    let plan = answer.as_object_mut().unwrap().remove("kv_transfer_params").unwrap();
    assert_eq!(answer, body, "the client's own body");
    assert_eq!(
        plan["baton"],
        json!({
            "version": 1, "transfer_id": transfer, "action": "pull", "num_tokens": HELD, "deadline_ms": 10_000,
            "source": {"engine_id": "e0", "address": "e0.example:7420", "epoch": 1},
        })
    );
    assert_eq!(
        pair.a0.released().await.to_string(),
        transfer,
        "by the first byte the hold has done its work"
    );

    let fleet = &pair.fleet;
    fleet.until_metric("baton_requests_total{mode=\"pull\",outcome=\"ok\"}", 1.0).await;
    assert_eq!(fleet.metric("baton_ttft_seconds_count{mode=\"pull\"}").await, 1.0);
    for term in ["hold", "prefill"] {
        let name = format!("baton_prediction_seconds{{term=\"{term}\",of=\"absolute_error\"}}");
        assert!(fleet.metric(&name).await > 0.0, "{name}");
    }
    let dump =
        fleet.http.get(fleet.url("/v1/route/recent?last=1")).send().await.unwrap().text().await.unwrap();
    let record = Record::parse(dump.trim()).unwrap();
    assert_eq!(record.outcome.as_ref().unwrap().plan.mode(), "pull");
    replay(&record).unwrap();
    pair.ends_idle().await;
}

#[tokio::test]
async fn a_chats_prefix_is_held_by_its_tokens() {
    let mut pair = Pair::start("").await;
    let words = "the quick brown fox jumps over the lazy dog ".repeat(400);
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": words}], "max_tokens": 4, "cache_salt": "s",
    });
    let tokenised = pair.fleet.post("/tokenize", "adaptive", &body).await.json::<Value>().await.unwrap();
    let tokens: Vec<u32> = serde_json::from_value(tokenised["tokens"].clone()).unwrap();
    assert!(tokens.len() > 3000, "{}", tokens.len());
    let held = tokens.len() / 16 * 16 - 64;
    pair.cache(&tokens[..held], "s").await;
    let response = pair.fleet.post("/v1/chat/completions", "adaptive", &body).await;
    assert_eq!(
        (header(&response, "x-baton-mode"), header(&response, "x-baton-source")),
        ("pull".into(), "e0".into())
    );
    assert_eq!(
        (pair.e0.last_path(), pair.e1.last_path()),
        ("/v1/completions".into(), "/v1/chat/completions".into())
    );
    assert_eq!(pair.e0.last()["prompt"], json!(tokens[..=held]));
    assert_eq!(pair.e1.last()["kv_transfer_params"]["baton"]["num_tokens"], held);
    assert_eq!(pair.e1.last()["messages"], body["messages"]);
}

#[tokio::test]
async fn a_source_leg_that_fails_costs_the_plan_only() {
    let mut pair = Pair::start("pull_deadline_ms = 300").await;
    for (behaviour, reason) in [
        (Behaviour::NeverHold, "no_hold"),
        (Behaviour::Status(500), "source_refused"),
        (Behaviour::Status(400), "source_refused"),
        (Behaviour::BreakOff, "source_broke_off"),
        (Behaviour::Hang, "source_late"),
    ] {
        let name = format!("baton_handoff_fallbacks_total{{reason=\"{reason}\"}}");
        let before = pair.fleet.metric(&name).await;
        // One that was served is expected where it went, and so nothing to pull any more.
        let body = pair.request(&format!("{behaviour:?}")).await;
        pair.e0.behave(behaviour);
        let asked = pair.e0.bodies().len();
        let response = pair.fleet.complete("adaptive", &body).await;
        assert_eq!(response.status(), 200, "{behaviour:?}");
        assert_eq!(pair.e0.bodies().len(), asked + 1, "{behaviour:?}");
        assert_eq!(
            (header(&response, "x-baton-mode"), header(&response, "x-baton-source")),
            ("colocated".into(), String::new())
        );
        assert_eq!(
            (header(&response, "x-baton-prefill"), header(&response, "x-baton-decode")),
            ("e1".into(), "e1".into())
        );
        assert_eq!(pair.e1.last(), body, "the client's own body");
        assert_eq!(pair.fleet.metric(&name).await, before + 1.0, "{behaviour:?}");
        let hold = pair.e0.last()["kv_transfer_params"]["baton"]["transfer_id"].clone();
        assert_eq!(pair.a0.released().await.to_string(), hold, "there might be one");
    }
    pair.ends_idle().await;
}

#[tokio::test]
async fn a_source_that_cannot_be_reached_costs_the_plan_only() {
    let mut pair = Pair::start("").await;
    let mut moved = register("e0", "http://127.0.0.1:1");
    moved.last_event_seq = pair.seq;
    pair.a0 = Agent::connect(&pair.fleet, moved).await;
    let body = pair.request("s").await;
    let response = pair.fleet.complete("adaptive", &body).await;
    assert_eq!((response.status().as_u16(), header(&response, "x-baton-decode")), (200, "e1".into()));
    assert_eq!(pair.fleet.metric("baton_handoff_fallbacks_total{reason=\"source_unreachable\"}").await, 1.0);
    pair.ends_idle().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_source_leg_and_its_hold() {
    let mut pair = Pair::start("").await;
    let body = pair.request("s").await;
    pair.e0.behave(Behaviour::Hang);
    let request = pair.fleet.http.post(pair.fleet.url("/v1/completions")).json(&body);
    let request = tokio::spawn(request.send());
    pair.e0.until_requests(1).await;
    request.abort();
    let transfer = pair.a0.released().await;
    assert_eq!(pair.e0.last()["kv_transfer_params"]["baton"]["transfer_id"], transfer.to_string());
    let e0 = pair.e0.clone();
    eventually("the engine's request is dropped", async || e0.aborted() == 1).await;
    assert!(pair.e1.bodies().is_empty());
    pair.ends_idle().await;
}

#[tokio::test]
async fn an_answer_leg_that_fails_goes_elsewhere_and_releases_the_hold() {
    let mut pair = Pair::start("").await;
    let body = pair.request("s").await;
    pair.e1.behave(Behaviour::Status(500));
    let response = pair.fleet.complete("adaptive", &body).await;
    assert_eq!((response.status().as_u16(), header(&response, "x-baton-mode")), (200, "colocated".into()));
    assert_eq!(header(&response, "x-baton-decode"), "e0");
    assert_eq!(pair.e0.last(), body);
    let plan = &serde_json::from_slice::<Value>(&pair.e1.bodies()[0]).unwrap()["kv_transfer_params"]["baton"];
    assert_eq!(pair.a0.released().await.to_string(), plan["transfer_id"]);
    pair.ends_idle().await;
}

#[tokio::test]
async fn a_request_that_must_stay_whole_pulls_nothing() {
    let mut pair = Pair::start("").await;
    for (member, value, why) in [
        ("n", json!(2), "several sequences"),
        ("echo", json!(true), "echo"),
        ("prompt_logprobs", json!(0), "prompt_logprobs"),
    ] {
        let mut body = pair.request(why).await;
        body[member] = value;
        let response = pair.fleet.complete("adaptive", &body).await;
        assert_eq!(header(&response, "x-baton-mode"), "colocated");
        let explained: Value = serde_json::from_str(&header(&response, "x-baton-explain")).unwrap();
        assert_eq!(explained["not_splittable"], why);
        assert!(explained["options"].as_array().unwrap().iter().all(|option| option["mode"] != "pull"));
    }
    assert_eq!(pair.e0.bodies().len() + pair.e1.bodies().len(), 3, "one leg each");
}
