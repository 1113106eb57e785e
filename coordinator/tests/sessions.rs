//! Agents' sessions over real gRPC and mutual TLS.

mod support;

use std::time::Duration;

use baton_proto::BlockHash;
use baton_proto::control::v1;
use baton_proto::control::v1::agent_message::Message as Said;
use baton_proto::control::v1::coordinator_message::Message as Answer;
use tonic::Code;

use self::support::{Agent, Engine, Fleet, eventually, register};

const URL: &str = "http://127.0.0.1:1";

fn hashes(range: std::ops::Range<u8>) -> Vec<BlockHash> {
    range.map(|i| BlockHash::from_bytes([i; 16])).collect()
}

#[tokio::test]
async fn a_session_belongs_to_the_engine_of_its_certificate() {
    let fleet = Fleet::start("").await;
    let refused =
        async |name: &str, first: Said| Agent::try_connect(&fleet, name, first).await.err().unwrap();
    let status = refused("e1", Said::Register(register("e0", URL))).await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("e0"), "{status}");
    let status = refused("e0", Said::Heartbeat(v1::Heartbeat {})).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    let wrong = v1::Register { block_size: 0, ..register("e0", URL) };
    let status = refused("e0", Said::Register(wrong)).await;
    assert!(status.code() == Code::InvalidArgument && status.message().starts_with("block_size"), "{status}");
    let plain = v1::Register { engine_url: "http://gpu-7:8000".into(), ..register("e0", URL) };
    let status = refused("e0", Said::Register(plain)).await;
    assert!(status.message().contains("https"), "{status}");
    let agent = Agent::connect(&fleet, register("e0", URL)).await;
    assert_eq!((agent.registered.lease_ms, agent.registered.next_event_seq), (5000, 0));
}

#[tokio::test]
async fn nothing_is_said_without_a_certificate() {
    let fleet = Fleet::start("").await;
    let tls = tonic::transport::ClientTlsConfig::new()
        .domain_name("coordinator")
        .ca_certificate(tonic::transport::Certificate::from_pem(fleet.certificates.ca()));
    let address = format!("https://{}", fleet.server.control_address);
    let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap().tls_config(tls).unwrap();
    // TLS 1.3 lets a client finish before the server refuses it: then the first call fails.
    let asked = async {
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = v1::control_client::ControlClient::new(channel);
        client.fleet(v1::FleetRequest {}).await.map_err(|status| status.to_string())
    };
    assert!(asked.await.is_err());
}

#[tokio::test]
async fn batches_are_acknowledged_and_gaps_mended() {
    let fleet = Fleet::start("").await;
    let mut agent = Agent::connect(&fleet, register("e0", URL)).await;
    agent.events(1, 1, true, &hashes(0..10)).await;
    assert_eq!(agent.ack().await, 1);
    agent.events(1, 2, false, &hashes(10..12)).await;
    assert_eq!(agent.ack().await, 2);
    agent.events(1, 1, true, &[]).await;
    assert_eq!(agent.ack().await, 2, "seen before");
    agent.events(1, 4, false, &hashes(20..21)).await;
    agent.resync().await;
    agent.events(1, 5, true, &hashes(0..3)).await;
    assert_eq!(agent.ack().await, 5);
    assert_eq!(fleet.metric("baton_index_blocks").await, 3.0);
    assert_eq!(fleet.metric("baton_event_batches_total{result=\"gap\"}").await, 1.0);
    agent.events(9, 6, false, &[]).await;
    assert_eq!(agent.ended().await.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn torn_hashes_end_the_session() {
    let fleet = Fleet::start("").await;
    let agent = Agent::connect(&fleet, register("e0", URL)).await;
    let stored = v1::BlocksStored { hashes: vec![0; 17].into(), tier: 1, ..Default::default() };
    let event = v1::KvEvent { event: Some(v1::kv_event::Event::Stored(stored)) };
    agent.say(Said::Events(v1::EventBatch { epoch: 1, seq: 1, events: vec![event] })).await;
    assert_eq!(agent.ended().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_restarted_engine_starts_over_and_its_old_life_is_refused() {
    let fleet = Fleet::start("").await;
    let mut agent = Agent::connect(&fleet, register("e0", URL)).await;
    agent.events(1, 1, true, &hashes(0..10)).await;
    agent.ack().await;
    agent.say(Said::Register(v1::Register { epoch: 2, ..register("e0", URL) })).await;
    let next = agent
        .next(|answer| match answer {
            v1::coordinator_message::Message::Registered(registered) => Some(registered.next_event_seq),
            _ => None,
        })
        .await;
    assert_eq!(next, 0);
    assert_eq!(fleet.metric("baton_index_blocks").await, 0.0);
    let status = Agent::try_connect(&fleet, "e0", Said::Register(register("e0", URL))).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("epoch 2"), "{status}");
}

#[tokio::test]
async fn a_second_session_takes_over() {
    let fleet = Fleet::start("").await;
    let first = Agent::connect(&fleet, register("e0", URL)).await;
    let mut second = Agent::connect(&fleet, register("e0", URL)).await;
    assert_eq!(first.ended().await.code(), Code::Aborted);
    second.events(1, 1, true, &hashes(0..1)).await;
    assert_eq!(second.ack().await, 1);
}

#[tokio::test]
async fn a_silent_agents_engine_is_not_placed_and_later_forgotten() {
    let fleet = Fleet::start("lease_ms = 300\nforget_after_ms = 600").await;
    let mut agent = Agent::connect(&fleet, register("e0", URL)).await;
    agent.events(1, 1, true, &hashes(0..10)).await;
    agent.ack().await;
    fleet.until_metric("baton_engines{state=\"healthy\"}", 1.0).await;
    fleet.until_metric("baton_engines{state=\"unhealthy\"}", 1.0).await;
    assert_eq!(agent.ended().await.code(), Code::Aborted);
    fleet.until_metric("baton_engines{state=\"unhealthy\"}", 0.0).await;
    fleet.until_metric("baton_index_blocks", 0.0).await;
}

#[tokio::test]
async fn agents_are_told_whom_they_can_pull_from() {
    let fleet = Fleet::start("").await;
    let mut a0 = Agent::connect(&fleet, register("e0", URL)).await;
    assert_eq!(a0.peers().await, [""; 0]);
    let other = v1::Register { layout: "other".into(), ..register("e1", URL) };
    let mut a1 = Agent::connect(&fleet, other).await;
    assert_eq!(a1.peers().await, [""; 0]);
    let a2 = Agent::connect(&fleet, register("e2", URL)).await;
    assert_eq!(a0.peers().await, ["e2"], "layouts must be equal");
    drop(a2);
    assert_eq!(a0.peers().await, [""; 0]);
}

#[tokio::test]
async fn links_that_nothing_crosses_are_measured() {
    let fleet = Fleet::start("").await;
    let mut a0 = Agent::connect(&fleet, register("e0", URL)).await;
    let other = v1::Register { layout: "other".into(), ..register("e1", URL) };
    let mut a1 = Agent::connect(&fleet, other).await;
    let mut a2 = Agent::connect(&fleet, register("e2", URL)).await;
    assert_eq!(a2.asked_to_probe().await, ("e0".into(), "e0.example:7420".into()));
    assert_eq!(a0.asked_to_probe().await, ("e2".into(), "e2.example:7420".into()));
    let (bytes, seconds, rtt_seconds) = (1 << 20, 0.5, 0.001);
    a0.say(Said::Link(v1::LinkSample { source: "e2".into(), bytes, seconds, rtt_seconds, given_up: false }))
        .await;
    let slot = |id: &str| fleet.server.coordinator.registry.get(&id.parse().unwrap()).unwrap().slot;
    eventually("the placement counts on what was measured", async || {
        let coordinator = &fleet.server.coordinator;
        let link = coordinator.fleet(coordinator.config.policy.0).links().get(slot("e2"), slot("e0"));
        link.measured && (link.bytes_per_second - bytes as f64 / 0.498).abs() < 1.0
    })
    .await;
    // One that was given up says how much less it carries, and that it is to be measured again, long before its turn would come.
    let given_up = v1::LinkSample { source: "e2".into(), seconds: 3.0, given_up: true, ..Default::default() };
    a0.say(Said::Link(given_up)).await;
    assert_eq!(a0.asked_to_probe().await.0, "e2");
    let coordinator = &fleet.server.coordinator;
    let link = coordinator.fleet(coordinator.config.policy.0).links().get(slot("e2"), slot("e0"));
    assert!(link.bytes_per_second < 1.0, "{link:?}");
    // What it was told arrives in order, so by now a probe would have.
    a1.events(1, 1, true, &[]).await;
    a1.ack().await;
    assert!(!a1.has_seen(|answer| matches!(answer, Answer::ProbeLink(_))), "nobody has its layout");
}

#[tokio::test]
async fn operators_see_the_fleet_and_ask_for_routes() {
    let fleet = Fleet::start("").await;
    let mut a0 = Agent::connect(&fleet, register("e0", URL)).await;
    a0.events(1, 1, true, &hashes(0..10)).await;
    a0.ack().await;
    a0.say(Said::Load(v1::EngineLoad { running: 3, ..Default::default() })).await;
    let mut client = support::client(&fleet, "operator").await.unwrap();
    eventually("the load is shown", async || {
        let reply = client.fleet(v1::FleetRequest {}).await.unwrap().into_inner();
        let engine = &reply.engines[0];
        engine.healthy && engine.owned_blocks == 10 && engine.load.as_ref().unwrap().running == 3
    })
    .await;
    let request = v1::RouteRequest { model: "m".into(), token_ids: (0..50).collect(), ..Default::default() };
    let reply = client.route(request).await.unwrap().into_inner();
    assert_eq!((reply.options.len(), reply.options[0].mode.as_str()), (1, "colocated"));
    assert!(reply.options[0].total_seconds > 0.0);
    let unknown = v1::RouteRequest { model: "x".into(), ..Default::default() };
    assert_eq!(client.route(unknown).await.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_restarted_coordinator_knows_engines_and_blocks() {
    let fleet = Fleet::start("").await;
    let engine = Engine::start().await;
    let mut agent = Agent::connect(&fleet, register("e0", &engine.url())).await;
    agent.events(1, 1, true, &hashes(0..100)).await;
    agent.events(1, 2, false, &hashes(100..120)).await;
    assert_eq!((agent.ack().await, agent.ack().await), (1, 2));

    let fleet = fleet.restart().await;
    assert_eq!(fleet.metric("baton_index_blocks").await, 120.0);
    assert_eq!(fleet.metric("baton_engines{state=\"unhealthy\"}").await, 1.0);
    let again = v1::Register { last_event_seq: 3, ..register("e0", &engine.url()) };
    let mut agent = Agent::connect(&fleet, again).await;
    assert_eq!(agent.registered.next_event_seq, 3, "no snapshot is needed");
    agent.events(1, 3, false, &hashes(120..121)).await;
    assert_eq!(agent.ack().await, 3);
    assert_eq!(fleet.metric("baton_index_blocks").await, 121.0);
}

#[tokio::test]
async fn stopping_ends_sessions_and_is_quick() {
    let fleet = Fleet::start("").await;
    let agent = Agent::connect(&fleet, register("e0", URL)).await;
    let stopped = tokio::time::timeout(Duration::from_secs(15), fleet.server.stop());
    let (stopped, status) = tokio::join!(stopped, agent.ended());
    stopped.expect("it stops");
    assert!(
        matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Ok),
        "{status}"
    );
}
