//! From the engine's events to what the coordinator knows.

use baton_agent::agent::Agent;
use baton_proto::block_hash::{BlockHash, BlockHasher};
use baton_proto::control::v1::{self, coordinator_message::Message as Said};
use serde_json::json;

use crate::coordinator::Coordinator;
use crate::engine::{Engine, Fate, MODEL, Publisher, removed, stored, tokens_of};
use crate::fleet::{Site, metric, metric_is};

/// Baton's hashes of a chain of blocks that the engine names so.
fn chain(hashes: &[u64]) -> Vec<BlockHash> {
    let hasher = BlockHasher::new(MODEL);
    let mut blocks: Vec<BlockHash> = Vec::new();
    for hash in hashes {
        let tokens: Vec<u32> = tokens_of(*hash).map(|token| token as u32).collect();
        blocks.push(hasher.block(blocks.last().copied(), &tokens, []));
    }
    blocks
}

struct Bed {
    site: Site,
    engine: Engine,
    coordinator: Coordinator,
    agent: Agent,
}

impl Bed {
    async fn start(site: Site, engine: Engine) -> Self {
        let coordinator = Coordinator::start(&site).await;
        let agent = Agent::start(site.config("e", &engine, &coordinator.url)).await.unwrap();
        Self { site, engine, coordinator, agent }
    }

    /// With a publisher that has published block 1, which the coordinator knows.
    async fn with_one_block() -> (Self, Publisher) {
        let site = Site::new();
        let engine = Engine::start(site.path(), "e").await;
        let publisher = Publisher::start(&engine).await;
        publisher.publish(json!([stored(None, &[1])]), Fate::Sent).await;
        let bed = Self::start(site, engine).await;
        bed.coordinator.owns(&chain(&[1])).await;
        (bed, publisher)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_and_removals_reach_the_coordinator() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher
        .publish(
            json!([
                stored(Some(1), &[2, 3]),
                ["BlockStored", [4], 3, tokens_of(4).collect::<Vec<_>>(), 16, null]
            ]),
            Fate::Sent,
        )
        .await;
    bed.coordinator.owns(&chain(&[1, 2, 3, 4])).await;
    publisher.publish(json!([{"type": "Novelty"}, removed(4)]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2, 3])).await;
    metric_is(&bed.agent, "baton_agent_events_ignored_total{reason=\"unknown_event\"}", 1.0).await;
    publisher.publish(json!([{"type": "AllBlocksCleared"}]), Fate::Sent).await;
    bed.coordinator.owns(&[]).await;
    assert_eq!(metric(&bed.agent, "baton_agent_event_gaps_total{mend=\"resynced\"}").await, 0.0);
    assert_eq!(metric(&bed.agent, "baton_agent_snapshots_total").await, 1.0, "the first of the session");
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_filled_from_the_replay() {
    let (bed, publisher) = Bed::with_one_block().await;
    // Followed live from here on.
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    publisher.publish(json!([stored(Some(2), &[3])]), Fate::Lost).await;
    publisher.publish(json!([removed(3), stored(Some(2), &[4])]), Fate::Lost).await;
    publisher.publish(json!([stored(Some(4), &[5])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2, 4, 5])).await;
    metric_is(&bed.agent, "baton_agent_event_gaps_total{mend=\"replayed\"}", 1.0).await;
    assert_eq!(metric(&bed.agent, "baton_agent_event_gaps_total{mend=\"resynced\"}").await, 0.0);
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_behind_which_nothing_comes_is_noticed() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Lost).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_cannot_be_filled_forgets_all() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    publisher.publish(json!([removed(1)]), Fate::Forgotten).await;
    publisher.publish(json!([stored(None, &[7])]), Fate::Sent).await;
    // Block 1 may be gone: nobody may believe in it any more.
    bed.coordinator.owns(&chain(&[7])).await;
    metric_is(&bed.agent, "baton_agent_event_gaps_total{mend=\"resynced\"}", 1.0).await;
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_replay_every_gap_forgets_all() {
    let site = Site::new();
    let mut engine = Engine::start(site.path(), "e").await;
    engine.replay = None;
    let publisher = Publisher::start(&engine).await;
    let bed = Bed::start(site, engine).await;
    // The subscription takes its time, and what came before it is unknown.
    let mut hash = 1;
    loop {
        publisher.publish(json!([stored(None, &[hash])]), Fate::Sent).await;
        if metric(&bed.agent, "baton_agent_owned_blocks").await > 0.0 {
            break;
        }
        hash += 1;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    publisher.publish(json!([stored(None, &[9000])]), Fate::Lost).await;
    publisher.publish(json!([stored(None, &[9001])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[9001])).await;
    metric_is(&bed.agent, "baton_agent_event_gaps_total{mend=\"resynced\"}", 1.0).await;
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_cannot_be_read_forgets_all() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher.publish(json!([{"type": "BlockRemoved", "block_hashes": "all"}]), Fate::Sent).await;
    bed.coordinator.owns(&[]).await;
    publisher.publish(json!([stored(None, &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[2])).await;
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_engine_owns_what_it_says_and_no_more() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    publisher.stop().await;
    // Its numbers begin at 0 again, and run past those of its former life before anybody listens.
    let publisher = Publisher::start(&bed.engine).await;
    for hash in 10..15 {
        publisher.publish(json!([stored(None, &[hash])]), Fate::Lost).await;
    }
    let each: Vec<BlockHash> = (10..15).flat_map(|hash| chain(&[hash])).collect();
    bed.coordinator.owns(&each).await;
    publisher.publish(json!([removed(10)]), Fate::Sent).await;
    bed.coordinator.owns(&each[1..]).await;
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restarted_beside_its_engine_learns_what_it_owns() {
    let (bed, publisher) = Bed::with_one_block().await;
    publisher.publish(json!([stored(Some(1), &[2]), stored(Some(2), &[3])]), Fate::Sent).await;
    publisher.publish(json!([removed(3)]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    let before = bed.coordinator.seen().epoch;
    bed.agent.stop().await;
    let agent = Agent::start(bed.site.config("e", &bed.engine, &bed.coordinator.url)).await.unwrap();
    bed.coordinator.wait("a new epoch", |seen| (seen.epoch > before).then_some(())).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_where_the_last_one_broke_off() {
    let (mut bed, publisher) = Bed::with_one_block().await;
    bed.coordinator = bed.coordinator.restart(true).await;
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    assert_eq!(metric(&bed.agent, "baton_agent_snapshots_total").await, 1.0);
    bed.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_knows_nothing_gets_everything() {
    let (mut bed, publisher) = Bed::with_one_block().await;
    bed.coordinator = bed.coordinator.restart(false).await;
    bed.coordinator.owns(&chain(&[1])).await;
    publisher.publish(json!([stored(Some(1), &[2])]), Fate::Sent).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    let snapshots = bed.coordinator.seen().snapshots;
    bed.coordinator.tell(Said::Resync(v1::Resync { reason: "test".into() })).await;
    bed.coordinator.wait("a snapshot", |seen| (seen.snapshots > snapshots).then_some(())).await;
    bed.coordinator.owns(&chain(&[1, 2])).await;
    bed.agent.stop().await;
}
