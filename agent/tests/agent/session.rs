//! What else is said between agent and coordinator.

use baton_agent::agent::Agent;
use baton_proto::control::v1::{self, coordinator_message::Message as Said};
use baton_proto::plan::Source;
use serde_json::Value;

use crate::coordinator::Coordinator;
use crate::engine::{Attached, BLOCKS, Engine, transfer_id};
use crate::fleet::{NOWHERE, Site, eventually, get, metric_is};

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_hears_of_engine_connector_and_load() {
    let site = Site::new();
    let engine = Engine::start(site.path(), "e").await;
    let coordinator = Coordinator::start(&site).await;
    let agent = Agent::start(site.config("e", &engine, &coordinator.url)).await.unwrap();
    let register = coordinator.wait("a registration", |seen| seen.registers.last().cloned()).await;
    assert_eq!((&register.engine_id[..], &register.engine_url), ("e", &engine.url));
    assert_eq!(register.models, ["m"], "adapters are no models");
    assert_eq!((register.block_size, register.num_blocks), (16, BLOCKS));
    assert_eq!(register.transfer_address, agent.transfer_addr().to_string());
    assert_eq!((register.can_transfer, register.block_bytes, &register.layout[..]), (false, 0, ""));
    assert_eq!(register.role(), v1::Role::Both);

    let attached = Attached::one(&site.socket("e"), "i").await;
    let register = coordinator
        .wait("the connector", |seen| seen.registers.last().filter(|register| register.can_transfer).cloned())
        .await;
    assert_eq!((register.epoch, register.block_bytes), (attached.epoch.0, 5632));
    assert_eq!(register.wire_block_bytes, 5632, "nobody asked for packed KV");
    assert!(register.layout.contains("dtype=bf16"));

    let load = coordinator.wait("load", |seen| seen.loads.last().cloned()).await;
    assert_eq!((load.running, load.kv_usage), (3, 0.5));
    coordinator.wait("heartbeats", |seen| (seen.heartbeats > 2).then_some(())).await;
    let health: Value = serde_json::from_str(&get(&agent, "/health").await).unwrap();
    assert_eq!(
        health,
        serde_json::json!({"status": "ok", "engine": true, "connector": true, "coordinator": true})
    );

    // The engine dies: first its connectors, then its HTTP server.
    let epoch = register.epoch;
    drop(attached);
    let register = coordinator
        .wait("a new epoch", |seen| seen.registers.last().filter(|register| register.epoch > epoch).cloned())
        .await;
    assert!(!register.can_transfer);
    engine.set_up(false);
    metric_is(&agent, "baton_agent_coordinator_up", 0.0).await;
    let registers = coordinator.seen().registers.len();
    engine.set_up(true);
    coordinator.wait("the engine again", |seen| (seen.registers.len() > registers).then_some(())).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_go_on_without_a_coordinator_and_are_reported_later() {
    let site = Site::new();
    let coordinator = Coordinator::start(&site).await;
    coordinator.kill().await;
    let p = Agent::start(site.config("p", &Engine::start(site.path(), "p").await, NOWHERE)).await.unwrap();
    let d = Agent::start(site.config("d", &Engine::start(site.path(), "d").await, &coordinator.url))
        .await
        .unwrap();
    let source = Attached::one(&site.socket("p"), "p").await;
    let mut target = Attached::one(&site.socket("d"), "d").await;
    source.memory().fill(3, 77);
    source.hold(1, &[3], 16, 30_000).await;
    metric_is(&p, "baton_agent_holds", 1.0).await;
    let from = Source {
        engine_id: "p".parse().unwrap(),
        address: p.transfer_addr().to_string(),
        epoch: source.epoch,
    };
    target.pull(0, 1, from, 0, &[4], 16).await;
    assert_eq!(target.pulled(0).await, (vec![], String::new()));
    assert_eq!(source.memory().read(3), target.memory().read(4));
    let coordinator = coordinator.restart(false).await;
    let transfer = coordinator.wait("the outcome", |seen| seen.transfers.last().cloned()).await;
    assert_eq!((&transfer.transfer_id[..], transfer.state()), (&[1; 16][..], v1::TransferState::Completed));
    assert_eq!((transfer.bytes, &transfer.error[..]), (5632, ""));
    let link = coordinator.wait("the link", |seen| seen.links.last().cloned()).await;
    assert_eq!((&link.source[..], link.bytes), ("p", 5632));
    assert!(link.seconds > 0.0 && link.rtt_seconds > 0.0);
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_releases_probes_and_names_peers() {
    let site = Site::new();
    let coordinator = Coordinator::start(&site).await;
    let p = Agent::start(site.config("p", &Engine::start(site.path(), "p").await, NOWHERE)).await.unwrap();
    let e = Agent::start(site.config("e", &Engine::start(site.path(), "e").await, &coordinator.url))
        .await
        .unwrap();
    let mut engine = Attached::one(&site.socket("e"), "e").await;
    metric_is(&e, "baton_agent_coordinator_up", 1.0).await;

    engine.hold(1, &[3], 16, 30_000).await;
    engine.hold(2, &[4], 16, 30_000).await;
    metric_is(&e, "baton_agent_holds", 2.0).await;
    for wrong in [vec![], vec![1; 15]] {
        coordinator.tell(Said::ReleaseHold(v1::ReleaseHold { transfer_id: wrong.into() })).await;
    }
    let transfer = transfer_id(1).as_bytes().to_vec().into();
    coordinator.tell(Said::ReleaseHold(v1::ReleaseHold { transfer_id: transfer })).await;
    assert_eq!(engine.released(0).await, ["hold-1"]);
    metric_is(&e, "baton_agent_holds", 1.0).await;

    let address = p.transfer_addr().to_string();
    let peers = vec![v1::Peer { engine_id: "p".into(), transfer_address: address.clone() }];
    coordinator.tell(Said::Peers(v1::Peers { peers })).await;
    eventually("a warm connection", || async {
        let text = get(&e, "/metrics").await;
        text.lines().any(|line| line == "baton_agent_connections 1").then_some(())
    })
    .await;
    coordinator
        .tell(Said::ProbeLink(v1::ProbeLink { engine_id: "p".into(), transfer_address: address }))
        .await;
    let link = coordinator.wait("the link", |seen| seen.links.last().cloned()).await;
    assert_eq!(link.source, "p");
    assert!(link.bytes > 0 && link.seconds > 0.0);
    e.stop().await;
    p.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_hold_is_reported() {
    let site = Site::new();
    let coordinator = Coordinator::start(&site).await;
    let agent = Agent::start(site.config("e", &Engine::start(site.path(), "e").await, &coordinator.url))
        .await
        .unwrap();
    let engine = Attached::one(&site.socket("e"), "e").await;
    engine.hold(1, &[3], 16, 10).await;
    let transfer = coordinator.wait("the outcome", |seen| seen.transfers.last().cloned()).await;
    assert_eq!((transfer.state(), &transfer.error[..]), (v1::TransferState::Expired, "lease_expired"));
    agent.stop().await;
}
