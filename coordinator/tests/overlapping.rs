//! Handoffs whose answer is asked for while the prompt is computed.

mod support;

use baton_proto::control::v1::{self, agent_message::Message as Said};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use self::support::{Agent, Behaviour, Engine, Fleet, completion, eventually, register};

/// An engine that computes prompts in chunks, and one that answers, with a handoff whose prefill is under way.
struct Handoff {
    fleet: Fleet,
    prefill: (Engine, Agent),
    decode: (Engine, Agent),
    response: JoinHandle<reqwest::Response>,
    transfer_id: String,
}

impl Handoff {
    async fn begin(prefill_does: Behaviour, decode_does: Behaviour) -> Self {
        let fleet = Fleet::start("").await;
        let engine = Engine::start().await;
        let chunked = v1::Register { chunk_tokens: 64, ..register("e0", &engine.url()) };
        let mut prefill = (engine, Agent::connect(&fleet, chunked).await);
        let decode = fleet.engine("e1").await;
        // Until a prefill was measured none is predicted.
        let mut other = completion();
        other["prompt"] = json!("another one ".repeat(100));
        let first = fleet.complete("disaggregated", &other).await;
        assert_eq!(header(&first, "x-baton-prefill"), "e0");
        prefill.1.released().await;
        assert_eq!(fleet.metric("baton_handoffs_overlapped_total").await, 0.0);
        prefill.0.behave(prefill_does);
        decode.0.behave(decode_does);
        let mut body = completion();
        body["stream"] = json!(true);
        let request = fleet.http.post(fleet.url("/v1/completions")).header("x-baton-policy", "disaggregated");
        let request = request.json(&body);
        let response = tokio::spawn(async move { request.send().await.unwrap() });
        prefill.0.until_requests(2).await;
        let plan = &prefill.0.last()["kv_transfer_params"]["baton"];
        let transfer_id = plan["transfer_id"].as_str().unwrap().to_owned();
        Self { fleet, prefill, decode, response, transfer_id }
    }

    /// The prefill engine's agent says that it holds the prompt as it is computed.
    async fn taken(&self) {
        let id = (0..16).map(|i| u8::from_str_radix(&self.transfer_id[2 * i..2 * i + 2], 16).unwrap());
        let transfer_id = id.collect::<Vec<_>>().into();
        self.prefill.1.say(Said::HoldTaken(v1::HoldTaken { transfer_id, epoch: 1, num_tokens: 201 })).await;
    }
}

fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn the_answer_is_asked_for_while_the_prompt_is_computed() {
    let handoff = Handoff::begin(Behaviour::Step, Behaviour::Step).await;
    handoff.taken().await;
    handoff.decode.0.until_requests(2).await;
    let plan: Value = handoff.decode.0.last()["kv_transfer_params"]["baton"].clone();
    assert_eq!((&plan["action"], &plan["num_tokens"]), (&json!("pull"), &json!(201)));
    assert_eq!(plan["transfer_id"], handoff.transfer_id);
    assert_eq!(plan["source"], json!({"engine_id": "e0", "address": "e0.example:7420", "epoch": 1}));
    let longer = plan["deadline_ms"].as_u64().unwrap();
    assert!(longer >= 10_000, "{longer} ms, and what the prefill takes");
    // Both end.
    handoff.prefill.0.step(1);
    handoff.decode.0.step(9);
    let response = handoff.response.await.unwrap();
    assert_eq!(header(&response, "x-baton-mode"), "disaggregated");
    assert_eq!(header(&response, "x-baton-transfer-id"), handoff.transfer_id);
    assert!(response.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    assert_eq!(handoff.fleet.metric("baton_handoffs_overlapped_total").await, 1.0);
    let counted = "baton_requests_total{mode=\"disaggregated\",outcome=\"ok\"}";
    handoff.fleet.until_metric(counted, 2.0).await;
    let mut prefill = handoff.prefill;
    assert_eq!(prefill.1.released().await.to_string(), handoff.transfer_id);
}

#[tokio::test]
async fn an_answer_that_outruns_the_prefills_own_is_whole() {
    let handoff = Handoff::begin(Behaviour::Step, Behaviour::Serve).await;
    handoff.taken().await;
    let response = handoff.response.await.unwrap();
    assert_eq!(header(&response, "x-baton-mode"), "disaggregated");
    assert!(response.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    // Nobody reads its one token.
    eventually("the prefill leg's end", async || handoff.prefill.0.aborted() == 1).await;
}

#[tokio::test]
async fn a_prefill_that_fails_under_way_gives_its_hold_up() {
    let handoff = Handoff::begin(Behaviour::StepToFail, Behaviour::Step).await;
    handoff.taken().await;
    handoff.decode.0.until_requests(2).await;
    handoff.prefill.0.step(1);
    let mut agent = handoff.prefill.1;
    // The pull ends with the hold, and the engine that answers computes.
    assert_eq!(agent.released().await.to_string(), handoff.transfer_id);
    handoff.decode.0.step(9);
    let response = handoff.response.await.unwrap();
    assert_eq!(
        (header(&response, "x-baton-mode"), header(&response, "x-baton-prefill")),
        ("colocated".into(), "e1".into())
    );
    assert!(response.text().await.unwrap().ends_with("data: [DONE]\n\n"));
    assert_eq!(handoff.decode.0.bodies().len(), 2, "it is asked once");
    handoff.fleet.until_metric("baton_handoff_fallbacks_total{reason=\"prefill_refused\"}", 1.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_both_legs() {
    let handoff = Handoff::begin(Behaviour::Step, Behaviour::Step).await;
    handoff.taken().await;
    handoff.decode.0.until_requests(2).await;
    handoff.response.abort();
    let mut agent = handoff.prefill.1;
    assert_eq!(agent.released().await.to_string(), handoff.transfer_id);
    eventually("the legs' end", async || handoff.prefill.0.aborted() == 1 && handoff.decode.0.aborted() == 1)
        .await;
}

#[tokio::test]
async fn words_about_other_holds_change_nothing() {
    let mut handoff = Handoff::begin(Behaviour::Step, Behaviour::Serve).await;
    let id = std::mem::replace(&mut handoff.transfer_id, "00".repeat(16));
    handoff.taken().await;
    handoff.prefill.0.step(1);
    let response = handoff.response.await.unwrap();
    assert_eq!(header(&response, "x-baton-transfer-id"), id);
    assert_eq!(response.status(), 200);
    // A number that is none ends the session, with the field.
    let taken = v1::HoldTaken { transfer_id: vec![1].into(), epoch: 1, num_tokens: 201 };
    handoff.prefill.1.say(Said::HoldTaken(taken)).await;
    let status = handoff.prefill.1.ended().await;
    assert_eq!(status.message(), "hold_taken.transfer_id: send 16 bytes");
}
