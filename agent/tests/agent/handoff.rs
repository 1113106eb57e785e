//! Two agents hand blocks across, and what can go wrong.

use baton_agent::agent::Agent;
use baton_agent::config::Config;
use baton_proto::Epoch;
use baton_proto::connector::{ToAgent, ToConnector};
use baton_proto::plan::Source;
use baton_proto::wire::WireDtype;

use crate::engine::{Attached, Engine, HEAD};
use crate::fleet::{NOWHERE, Site, eventually, metric, metric_is};

const LEASE: u32 = 30_000;

/// An agent and its engine's connectors.
struct Side {
    id: &'static str,
    config: Config,
    agent: Agent,
    engine: Attached,
}

impl Side {
    async fn start(site: &Site, id: &'static str, tp_size: u32, dtype: &str, scale: u32) -> Self {
        Self::pulling_as(WireDtype::AsStored, site, id, tp_size, dtype, scale).await
    }

    async fn pulling_as(
        wire_dtype: WireDtype,
        site: &Site,
        id: &'static str,
        tp_size: u32,
        dtype: &str,
        scale: u32,
    ) -> Self {
        let mut config = site.config(id, &Engine::start(site.path(), id).await, NOWHERE);
        config.transfer.wire_dtype = wire_dtype;
        let agent = Agent::start(config.clone()).await.unwrap();
        let engine = Attached::new(&site.socket(id), id, tp_size, dtype, scale).await;
        Self { id, config, agent, engine }
    }

    fn source(&self) -> Source {
        Source {
            engine_id: self.id.parse().unwrap(),
            address: self.agent.transfer_addr().to_string(),
            epoch: self.engine.epoch,
        }
    }

    /// Fills blocks and holds them.
    async fn hold(&self, transfer: u8, block_ids: &[u32], tokens: u32, lease_ms: u32) {
        for (rank, (_, memory)) in self.engine.workers.iter().enumerate() {
            for (i, block) in block_ids.iter().enumerate() {
                memory.fill(*block, u64::from(transfer) << 32 | (rank as u64) << 16 | i as u64);
            }
        }
        self.engine.hold(transfer, block_ids, tokens, lease_ms).await;
        metric_is(&self.agent, "baton_agent_holds", 1.0).await;
    }

    /// Waits until the checksums of so many holds are made.
    async fn checksums_made(&self, holds: u32) {
        metric_is(&self.agent, "baton_agent_hold_checksum_seconds_count", holds.into()).await;
    }
}

async fn pair(site: &Site) -> (Side, Side) {
    (Side::start(site, "p", 1, "bf16", 1).await, Side::start(site, "d", 1, "bf16", 1).await)
}

/// A failed pull: none of its blocks may be used, and the metrics tell why.
async fn assert_failed(d: &mut Side, blocks: &[u32], error: &str) {
    let (failed, words) = d.engine.pulled(0).await;
    assert_eq!(failed, blocks, "{words}");
    let sample = format!("baton_agent_pulls_total{{result=\"failed\",error=\"{error}\"}}");
    assert_eq!(metric(&d.agent, &sample).await, 1.0, "{sample}: {words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_arrive_as_they_left_and_are_released() {
    let site = Site::new();
    let (mut p, mut d) = pair(&site).await;
    let (from, to) = ([3, 60, 1, 7], [10, 2, 33, 0]);
    p.hold(1, &from, 50, LEASE).await;
    d.engine.pull(0, 1, p.source(), 0, &to, 50).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    for (from, to) in from.iter().zip(to) {
        assert_eq!(p.engine.memory().read(*from), d.engine.memory().read(to));
    }
    assert_eq!(p.engine.released(0).await, ["hold-1"]);
    metric_is(&p.agent, "baton_agent_holds", 0.0).await;
    assert_eq!(metric(&p.agent, "baton_agent_holds_total{result=\"released\"}").await, 1.0);
    let bytes = 4.0 * 5632.0;
    assert_eq!(metric(&d.agent, "baton_agent_received_bytes_total").await, bytes);
    assert_eq!(metric(&p.agent, "baton_agent_sent_bytes_total").await, bytes);
    // Both engines are on this host.
    assert_eq!(metric(&d.agent, "baton_agent_direct_bytes_total").await, bytes);
    assert_eq!(metric(&d.agent, "baton_agent_pulls_total{result=\"completed\",error=\"\"}").await, 1.0);
    // Once is once.
    d.engine.pull(0, 1, p.source(), 0, &to, 50).await;
    assert_failed(&mut d, &to, "released").await;
    p.agent.stop().await;
    d.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_missing_tail_travels() {
    let site = Site::new();
    let (p, mut d) = pair(&site).await;
    p.hold(1, &[3, 60, 1, 7], 64, LEASE).await;
    d.engine.pull(0, 1, p.source(), 3, &[20], 64).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    assert_eq!(p.engine.memory().read(7), d.engine.memory().read(20));
    assert_eq!(metric(&d.agent, "baton_agent_received_bytes_total").await, 5632.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_leave_while_the_prompt_is_computed() {
    let site = Site::new();
    let mut p = Side::start(&site, "p", 2, "bf16", 1).await;
    let mut d = Side::start(&site, "d", 2, "bf16", 1).await;
    p.hold(1, &[], 50, LEASE).await;
    for rank in 0..2 {
        d.engine.pull(rank, 1, p.source(), 0, &[10, 2, 33, 0], 50).await;
    }
    let compute = |rank: usize, blocks: std::ops::Range<usize>| {
        let (p, from) = (&p, [3, 60, 1, 7]);
        async move {
            for block in &from[blocks.clone()] {
                p.engine.workers[rank].1.fill(*block, u64::from(*block) << 8 | rank as u64);
            }
            p.engine.computed(rank, 1, blocks.start as u32, &from[blocks]).await;
        }
    };
    compute(0, 0..2).await;
    compute(1, 0..2).await;
    compute(1, 2..4).await;
    assert_eq!(d.engine.pulled(1).await, (vec![], String::new()), "rank 1 waits for nobody");
    compute(0, 2..4).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    for rank in 0..2 {
        for (from, to) in [3, 60, 1, 7].into_iter().zip([10, 2, 33, 0]) {
            assert_eq!(p.engine.workers[rank].1.read(from), d.engine.workers[rank].1.read(to));
        }
        assert_eq!(p.engine.released(rank).await, ["hold-1"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rank_pulls_its_own_part() {
    let site = Site::new();
    let mut p = Side::start(&site, "p", 2, "bf16", 1).await;
    let mut d = Side::start(&site, "d", 2, "bf16", 1).await;
    p.hold(1, &[5, 6], 32, LEASE).await;
    d.engine.pull(0, 1, p.source(), 0, &[8, 9], 32).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    assert_eq!(metric(&p.agent, "baton_agent_holds").await, 1.0, "rank 1 has not pulled");
    d.engine.pull(1, 1, p.source(), 0, &[8, 9], 32).await;
    assert_eq!(d.engine.pulled(1).await, (vec![], String::new()));
    for rank in 0..2 {
        assert_eq!(p.engine.workers[rank].1.read(6), d.engine.workers[rank].1.read(9));
        assert_eq!(p.engine.released(rank).await, ["hold-1"]);
    }
    assert_ne!(d.engine.workers[0].1.read(8), d.engine.workers[1].1.read(8));
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_of_other_tensor_parallelism_exchange_heads() {
    let site = Site::new();
    let mut two = Side::start(&site, "p", 2, "bf16", 1).await;
    let mut one = Side::start(&site, "d", 1, "bf16", 2).await;
    let heads = |side: &Side, block| -> Vec<u8> {
        side.engine.workers.iter().flat_map(|(_, memory)| memory.read(block)).collect()
    };
    // Two ranks to one: the one pull takes a head of each.
    two.hold(1, &[5, 6], 32, LEASE).await;
    one.engine.pull(0, 1, two.source(), 0, &[8, 9], 32).await;
    assert_eq!(one.engine.pulled(0).await, (vec![], String::new()));
    assert!(heads(&two, 5) == heads(&one, 8) && heads(&two, 6) == heads(&one, 9));
    for rank in 0..2 {
        assert_eq!(two.engine.released(rank).await, ["hold-1"]);
    }
    // And back: the hold stays until both ranks have their heads.
    one.hold(2, &[3, 4], 32, LEASE).await;
    two.engine.pull(1, 2, one.source(), 0, &[20, 21], 32).await;
    assert_eq!(two.engine.pulled(1).await, (vec![], String::new()));
    assert_eq!(metric(&one.agent, "baton_agent_holds").await, 1.0, "rank 0 has not pulled");
    two.engine.pull(0, 2, one.source(), 0, &[20, 21], 32).await;
    assert_eq!(two.engine.pulled(0).await, (vec![], String::new()));
    assert!(heads(&one, 3) == heads(&two, 20) && heads(&one, 4) == heads(&two, 21));
    assert_eq!(one.engine.released(0).await, ["hold-2"]);
    for side in [&one, &two] {
        let bytes = 2.0 * 2.0 * f64::from(HEAD);
        assert_eq!(metric(&side.agent, "baton_agent_received_bytes_total").await, bytes);
        assert_eq!(metric(&side.agent, "baton_agent_direct_bytes_total").await, 0.0, "they are put together");
    }
}

/// Values of bf16.
fn values(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let value = |pair: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
    bytes.as_chunks::<2>().0.iter().map(value)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_whose_operator_asks_for_it_gets_half_the_bytes() {
    let site = Site::new();
    let mut two = Side::start(&site, "p", 2, "bfloat16", 1).await;
    let mut one = Side::pulling_as(WireDtype::Fp8, &site, "d", 1, "bfloat16", 2).await;
    let heads = |side: &Side, block| -> Vec<u8> {
        side.engine.workers.iter().flat_map(|(_, memory)| memory.read(block)).collect()
    };
    two.hold(1, &[5, 6], 32, LEASE).await;
    one.engine.pull(0, 1, two.source(), 0, &[8, 9], 32).await;
    assert_eq!(one.engine.pulled(0).await, (vec![], String::new()));
    let travelled = 2.0 * 2.0 * f64::from(HEAD / 2 + 4);
    assert_eq!(metric(&one.agent, "baton_agent_received_bytes_total").await, travelled);
    assert_eq!(metric(&one.agent, "baton_agent_packed_bytes_total").await, travelled);
    assert_eq!(metric(&two.agent, "baton_agent_sent_bytes_total").await, travelled);
    for (from, to) in [(5, 8), (6, 9)] {
        let (before, after) = (heads(&two, from), heads(&one, to));
        assert_ne!(before, after, "nothing was packed");
        // The largest value is below 2.
        let near = |(x, y): (f32, f32)| {
            let error = x.abs() / 16.0 + 2.0 / 448.0 / 1024.0;
            (x - y).abs() <= error + (x.abs() + error) / 256.0
        };
        assert!(values(&before).zip(values(&after)).all(near), "not within the stated error");
    }
    assert_eq!(two.engine.released(0).await, ["hold-1"]);
    // The other way nobody has asked for it: every bit of what is there arrives.
    one.hold(2, &[3], 16, LEASE).await;
    for rank in 0..2 {
        two.engine.pull(rank, 2, one.source(), 0, &[20], 16).await;
        let done = loop {
            match two.engine.workers[rank].0.next().await {
                Some(ToConnector::PullDone { error, .. }) => break error,
                Some(ToConnector::Released { .. }) => {}
                other => panic!("{other:?} instead of the end of a pull"),
            }
        };
        assert_eq!(done, "");
    }
    assert!(heads(&one, 3) == heads(&two, 20));
    assert_eq!(metric(&two.agent, "baton_agent_packed_bytes_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn within_a_host_every_bit_is_copied_whatever_is_asked_for() {
    let site = Site::new();
    let p = Side::start(&site, "p", 1, "bfloat16", 1).await;
    let mut d = Side::pulling_as(WireDtype::Fp8, &site, "d", 1, "bfloat16", 1).await;
    p.hold(1, &[3, 60], 32, LEASE).await;
    d.engine.pull(0, 1, p.source(), 0, &[10, 2], 32).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    assert!(p.engine.memory().read(3) == d.engine.memory().read(10));
    assert!(p.engine.memory().read(60) == d.engine.memory().read(2));
    assert_eq!(metric(&d.agent, "baton_agent_direct_bytes_total").await, 2.0 * f64::from(HEAD));
    assert_eq!(metric(&d.agent, "baton_agent_packed_bytes_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_overtakes_the_checksums_waits_for_them() {
    let site = Site::new();
    let p = Side::start(&site, "p", 1, "bf16", 128).await;
    let mut d = Side::start(&site, "d", 1, "bf16", 128).await;
    let blocks: Vec<u32> = (0..60).collect();
    for block in &blocks {
        p.engine.memory().fill(*block, u64::from(*block));
    }
    p.engine.hold(1, &blocks, 960, LEASE).await;
    // In one breath, as far as the sockets allow. The hold itself must be there first: it is on the same host.
    metric_is(&p.agent, "baton_agent_holds", 1.0).await;
    d.engine.pull(0, 1, p.source(), 0, &blocks, 960).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
    for block in blocks {
        assert!(p.engine.memory().read(block) == d.engine.memory().read(block), "block {block}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_changed_after_the_hold_fails_its_block() {
    let site = Site::new();
    let (p, mut d) = pair(&site).await;
    p.hold(1, &[3, 4, 5], 48, LEASE).await;
    p.checksums_made(1).await;
    p.engine.memory().flip(4);
    d.engine.pull(0, 1, p.source(), 0, &[10, 11, 12], 48).await;
    assert_failed(&mut d, &[11], "corrupt_block").await;
    assert_eq!(metric(&d.agent, "baton_agent_corrupt_blocks_total").await, 2.0, "it is asked for twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_hold_is_given_back_and_pulled_by_nobody() {
    let site = Site::new();
    let (mut p, mut d) = pair(&site).await;
    p.hold(1, &[3], 16, 50).await;
    assert_eq!(p.engine.released(0).await, ["hold-1"]);
    assert_eq!(metric(&p.agent, "baton_agent_holds_total{result=\"expired\"}").await, 1.0);
    d.engine.pull(0, 1, p.source(), 0, &[10], 16).await;
    assert_failed(&mut d, &[10], "lease_expired").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_layouts_and_other_content_are_refused_before_any_byte_moves() {
    let site = Site::new();
    let p = Side::start(&site, "p", 1, "bf16", 1).await;
    let mut other = Side::start(&site, "o", 1, "f16", 1).await;
    let mut d = Side::start(&site, "d", 1, "bf16", 1).await;
    p.hold(1, &[3, 4], 32, LEASE).await;
    other.engine.pull(0, 1, p.source(), 0, &[10, 11], 32).await;
    assert_failed(&mut other, &[10, 11], "layout_mismatch").await;
    d.engine.pull(0, 1, p.source(), 0, &[10, 11], 31).await;
    assert_failed(&mut d, &[10, 11], "content_mismatch").await;
    d.engine.pull(0, 1, p.source(), 0, &[10, 11, 12], 33).await;
    assert_failed(&mut d, &[10, 11, 12], "range").await;
    d.engine.pull(0, 2, p.source(), 0, &[10, 11], 32).await;
    assert_failed(&mut d, &[10, 11], "unknown_transfer").await;
    for agent in [&d.agent, &other.agent] {
        assert_eq!(metric(agent, "baton_agent_received_bytes_total").await, 0.0);
    }
    // None of that has cost the hold.
    d.engine.pull(0, 1, p.source(), 0, &[10, 11], 32).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_honours_no_hold_of_its_former_life() {
    let site = Site::new();
    let (mut p, mut d) = pair(&site).await;
    p.hold(1, &[3], 16, LEASE).await;
    let before = p.source();
    p.agent.stop().await;
    // The closed connections tell the connectors that the blocks are theirs again.
    p.engine.scheduler.closed().await;
    p.engine.workers[0].0.closed().await;
    let mut config = p.config.clone();
    config.transfer.listen = before.address.parse().unwrap();
    p.agent = Agent::start(config).await.unwrap();
    p.engine = Attached::one(&site.socket("p"), "p").await;
    assert!(p.engine.epoch > before.epoch);
    d.engine.pull(0, 1, before, 0, &[10], 16).await;
    assert_failed(&mut d, &[10], "stale_epoch").await;
    // And everything works again.
    p.hold(2, &[3], 16, LEASE).await;
    d.engine.pull(0, 2, p.source(), 0, &[10], 16).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_engine_begins_a_new_epoch() {
    let site = Site::new();
    let (mut p, mut d) = pair(&site).await;
    p.hold(1, &[3], 16, LEASE).await;
    let before = p.source();
    // The process dies: all its sockets close.
    drop(p.engine);
    p.engine = Attached::one(&site.socket("p"), "p-again").await;
    assert!(p.engine.epoch > before.epoch);
    eventually("the epoch metric", || async {
        (metric(&p.agent, "baton_agent_epoch").await == p.engine.epoch.0 as f64).then_some(())
    })
    .await;
    assert_eq!(metric(&p.agent, "baton_agent_holds_total{result=\"dropped\"}").await, 1.0);
    d.engine.pull(0, 1, before, 0, &[10], 16).await;
    assert_failed(&mut d, &[10], "stale_epoch").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_one_worker_ends_the_epoch_for_all() {
    let site = Site::new();
    let mut p = Side::start(&site, "p", 2, "bf16", 1).await;
    p.hold(1, &[3], 16, LEASE).await;
    let (worker, _memory) = p.engine.workers.remove(1);
    worker.hang_up();
    p.engine.scheduler.closed().await;
    p.engine.workers[0].0.closed().await;
    metric_is(&p.agent, "baton_agent_connector_up", 0.0).await;
    let again = Attached::new(&site.socket("p"), "p", 2, "bf16", 1).await;
    assert!(again.epoch > p.engine.epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_gone_fails_the_pull_and_nothing_else() {
    let site = Site::new();
    let (p, mut d) = pair(&site).await;
    let gone = p.source();
    p.agent.stop().await;
    let pull = d.engine.pull(0, 1, gone, 0, &[10], 16);
    pull.await;
    d.engine.scheduler.say(&ToAgent::Cancel { request_id: "pull-1".into() }).await;
    let (failed, words) = d.engine.pulled(0).await;
    assert_eq!(failed, [10], "{words}");
    let q = Side::start(&site, "q", 1, "bf16", 1).await;
    q.hold(2, &[3], 16, LEASE).await;
    d.engine.pull(0, 2, q.source(), 0, &[10], 16).await;
    assert_eq!(d.engine.pulled(0).await, (vec![], String::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_must_be_who_the_plan_says() {
    let site = Site::new();
    let (p, mut d) = pair(&site).await;
    p.hold(1, &[3], 16, LEASE).await;
    let disguised = Source { engine_id: "x".parse().unwrap(), ..p.source() };
    d.engine.pull(0, 1, disguised, 0, &[10], 16).await;
    assert_failed(&mut d, &[10], "unreachable").await;
    let other_epoch = Source { epoch: Epoch(p.engine.epoch.0 + 1), ..p.source() };
    d.engine.pull(0, 1, other_epoch, 0, &[10], 16).await;
    assert_failed(&mut d, &[10], "stale_epoch").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_agent_ends_its_pulls_first() {
    let site = Site::new();
    let p = Side::start(&site, "p", 1, "bf16", 1).await;
    let mut d = Side::start(&site, "d", 1, "bf16", 1).await;
    // Nobody answers at this address, so the pull is under way until it is cancelled.
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let source = Source { address: silent.local_addr().unwrap().to_string(), ..p.source() };
    d.engine.pull(0, 1, source, 0, &[10], 16).await;
    let mut first = [0; 2048];
    silent.recv(&mut first).await.unwrap();
    d.agent.stop().await;
    let last = d.engine.workers[0].0.next().await;
    assert!(
        matches!(&last, Some(ToConnector::PullDone { failed_blocks, .. }) if *failed_blocks == [10]),
        "{last:?}"
    );
    d.engine.workers[0].0.closed().await;
}
