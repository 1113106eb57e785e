//! What surrounds a decision: sessions, SLOs, waiting for room, expectations, and the record of decisions.

mod support;

use std::time::{Duration, Instant};

use baton_coordinator_core::record::{Record, replay};
use serde_json::{Value, json};
use support::{Behaviour, Fleet, completion, eventually};

fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

fn prompt(text: &str) -> Value {
    json!({ "model": "m", "prompt": text.repeat(40), "max_tokens": 4 })
}

/// Posts a completion with these headers.
async fn ask(fleet: &Fleet, headers: &[(&str, &str)], body: &Value) -> reqwest::Response {
    let mut request = fleet.http.post(fleet.url("/v1/completions")).json(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

#[tokio::test]
async fn a_session_stays_where_it_was_until_that_engine_fails() {
    let fleet = Fleet::start("").await;
    let mut engines = Vec::new();
    for id in ["e0", "e1", "e2"] {
        engines.push((id, fleet.engine(id).await));
    }
    let sticky = ("x-baton-policy", "session_sticky");
    for n in 0..8 {
        let session = format!("conversation {n}");
        let first = ask(&fleet, &[sticky, ("x-session-id", &session)], &prompt("one ")).await;
        let home = header(&first, "x-baton-decode");
        for text in ["two ", "three "] {
            // By body as well as by header.
            let mut body = prompt(text);
            body["prompt_cache_key"] = json!(session);
            assert_eq!(header(&ask(&fleet, &[sticky], &body).await, "x-baton-decode"), home);
        }
        let engine = &engines.iter().find(|(id, _)| *id == home).unwrap().1.0;
        engine.behave(Behaviour::Status(500));
        let moved = ask(&fleet, &[sticky, ("x-session-id", &session)], &prompt("four ")).await;
        let other = header(&moved, "x-baton-decode");
        assert_eq!(moved.status(), 200);
        assert_ne!(other, home);
        engine.behave(Behaviour::Serve);
        let stays = ask(&fleet, &[sticky, ("x-session-id", &session)], &prompt("five ")).await;
        assert_eq!(header(&stays, "x-baton-decode"), other);
    }
}

#[tokio::test]
async fn who_finds_no_room_waits_and_is_then_served_or_told_when_to_come_back() {
    let fleet = Fleet::start("max_engine_requests = 1\nlongest_wait_ms = 600").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Hang);
    let request = fleet.http.post(fleet.url("/v1/completions")).json(&completion()).send();
    let first = tokio::spawn(request);
    engine.until_requests(1).await;

    let began = Instant::now();
    let refused = ask(&fleet, &[], &completion()).await;
    assert_eq!(refused.status(), 429);
    assert!(began.elapsed() >= Duration::from_millis(590));
    assert!(header(&refused, "retry-after").parse::<u64>().unwrap() >= 1);
    let error = refused.json::<Value>().await.unwrap();
    assert_eq!(error["error"]["type"], "TooManyRequestsError");
    fleet.until_metric("baton_requests_total{mode=\"none\",outcome=\"no_room\"}", 1.0).await;
    assert_eq!(fleet.metric("baton_waited_total").await, 1.0);

    let waits = tokio::spawn(fleet.http.post(fleet.url("/v1/completions")).json(&completion()).send());
    eventually("it waits", async || fleet.server.coordinator.waiting.len() == 1).await;
    assert_eq!(engine.bodies().len(), 1, "it is not with the engine yet");
    engine.behave(Behaviour::Serve);
    first.abort();
    assert_eq!(waits.await.unwrap().unwrap().status(), 200);
    assert!(fleet.server.coordinator.waiting.is_empty());
}

#[tokio::test]
async fn the_more_urgent_is_served_first_and_who_leaves_frees_its_place() {
    let fleet = Fleet::start("max_engine_requests = 1").await;
    let (engine, _agent) = fleet.engine("e0").await;
    engine.behave(Behaviour::Hang);
    let send = |name: &str, priority: i64| {
        let mut body = completion();
        body["user"] = json!(name);
        body["priority"] = json!(priority);
        tokio::spawn(fleet.http.post(fleet.url("/v1/completions")).json(&body).send())
    };
    let first = send("first", 0);
    engine.until_requests(1).await;
    let waiting = async |n| {
        eventually("they wait", async || fleet.server.coordinator.waiting.len() == n).await;
    };
    let gone = send("gone", -5);
    waiting(1).await;
    let patient = send("patient", 3);
    waiting(2).await;
    let urgent = send("urgent", -1);
    waiting(3).await;
    gone.abort();
    waiting(2).await;
    engine.behave(Behaviour::Serve);
    first.abort();
    for request in [urgent, patient] {
        assert_eq!(request.await.unwrap().unwrap().status(), 200);
    }
    let served: Vec<Value> = engine
        .bodies()
        .iter()
        .map(|body| serde_json::from_slice::<Value>(body).unwrap()["user"].clone())
        .collect();
    assert_eq!(served, ["first", "urgent", "patient"]);
}

#[tokio::test]
async fn slos_are_read_and_what_no_idle_engine_could_do_is_done_as_well_as_possible() {
    let fleet = Fleet::start("").await;
    let (_engine, _agent) = fleet.engine("e0").await;
    let served =
        ask(&fleet, &[("x-baton-ttft-ms", "0.001"), ("x-baton-itl-ms", "0.001")], &completion()).await;
    assert_eq!(served.status(), 200);
    for (name, value) in [("x-baton-ttft-ms", "soon"), ("x-baton-itl-ms", "-1"), ("x-baton-ttft-ms", "inf")] {
        let refused = ask(&fleet, &[(name, value)], &completion()).await;
        assert_eq!(refused.status(), 400);
        assert_eq!(refused.json::<Value>().await.unwrap()["error"]["param"], name);
    }
}

#[tokio::test]
async fn a_prompt_is_expected_where_it_was_sent() {
    let fleet = Fleet::start("").await;
    let mut engines = Vec::new();
    for id in ["e0", "e1", "e2", "e3"] {
        engines.push(fleet.engine(id).await);
    }
    // No event ever comes, and what is idle costs the same: but for the expectation each text would have its own home.
    let first = ask(&fleet, &[], &prompt("shared ")).await;
    let home = header(&first, "x-baton-decode");
    assert_eq!(header(&first, "x-baton-hit-tokens"), "0");
    for tail in ["a", "b", "c", "d", "e"] {
        let mut body = prompt("shared ");
        body["prompt"] = json!(format!("{}{}", body["prompt"].as_str().unwrap(), tail.repeat(50)));
        let response = ask(&fleet, &[], &body).await;
        assert_eq!(header(&response, "x-baton-decode"), home);
        assert!(header(&response, "x-baton-hit-tokens").parse::<u64>().unwrap() > 16);
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    eventually("it is not expected for ever", async || fleet.server.coordinator.index.expected() == 0).await;
}

#[tokio::test]
async fn decisions_that_were_made_replay_to_the_bit() {
    let fleet = Fleet::start("recent_decisions = 5").await;
    let (_e0, _a0) = fleet.engine("e0").await;
    let (_e1, _a1) = fleet.engine("e1").await;
    for policy in ["adaptive", "disaggregated", "random", "round_robin", "consistent_hash", "power_of_two"] {
        fleet.complete(policy, &completion()).await;
    }
    // Only asked for: not kept.
    fleet.post("/v1/route", "threshold", &completion()).await;
    let dump = async |query: &str| {
        let url = fleet.url(&format!("/v1/route/recent{query}"));
        let text = fleet.http.get(url).send().await.unwrap().text().await.unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let lines = dump("").await;
    assert_eq!(lines.len(), 5);
    let mut policies = Vec::new();
    for line in &lines {
        let mut record = Record::parse(line).unwrap();
        replay(&record).unwrap();
        policies.push(record.inputs.policy.clone());
        let outcome = record.outcome.as_mut().unwrap();
        outcome.seconds = f64::from_bits(outcome.seconds.to_bits() + 1);
        assert!(replay(&record).unwrap_err().to_string().starts_with("outcome.seconds"));
    }
    assert_eq!(policies, ["disaggregated", "random", "round_robin", "consistent_hash", "power_of_two"]);
    assert_eq!(dump("?last=2").await, lines[3..]);
}

#[tokio::test]
async fn what_was_predicted_is_measured_term_by_term() {
    let fleet = Fleet::start("").await;
    let (_e0, _a0) = fleet.engine("e0").await;
    let (_e1, _a1) = fleet.engine("e1").await;
    let mut body = completion();
    body["stream"] = json!(true);
    for policy in ["colocated", "disaggregated"] {
        let response = fleet.complete(policy, &body).await;
        response.bytes().await.unwrap();
    }
    for term in ["prefill", "first_step", "decode"] {
        let name = format!("baton_prediction_seconds{{term=\"{term}\",of=\"absolute_error\"}}");
        eventually(&name, async || fleet.metric(&name).await > 0.0).await;
    }
}
