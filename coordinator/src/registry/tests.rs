use super::testing::register;
use super::*;

fn registry() -> Registry {
    Registry::new(2, crate::testing::client_tls())
}

fn take(registry: &Registry, message: v1::Register, now: Instant) -> Result<Registered, RegisterError> {
    let (commands, _) = mpsc::channel(4);
    registry.register(Registration::check(message).unwrap(), commands, now)
}

const LEASE: Duration = Duration::from_secs(5);
const FORGET: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_new_epoch_starts_over_and_an_old_one_is_refused() {
    let (registry, now) = (registry(), Instant::now());
    let first = take(&registry, register("e0", 5), now).unwrap();
    assert_eq!((first.next_event_seq, first.emptied), (0, true));
    assert_eq!(first.entry.order(1, true), BatchOrder::Next);
    first.entry.applied(1);

    let again = v1::Register { last_event_seq: 3, ..register("e0", 5) };
    let again = take(&registry, again, now).unwrap();
    assert_eq!((again.next_event_seq, again.emptied), (2, false));
    assert!(Arc::ptr_eq(&first.entry, &again.entry));

    let gone = again.entry.gone();
    let restarted = take(&registry, register("e0", 6), now).unwrap();
    assert_eq!((restarted.next_event_seq, restarted.emptied), (0, true));
    assert!(gone.is_cancelled() && !restarted.entry.gone().is_cancelled());
    let old = take(&registry, register("e0", 5), now).unwrap_err();
    assert!(matches!(old, RegisterError::OldEpoch { known: Epoch(6), given: Epoch(5), .. }));
}

#[tokio::test]
async fn an_agent_that_lost_count_starts_over() {
    let (registry, now) = (registry(), Instant::now());
    let entry = take(&registry, register("e0", 5), now).unwrap().entry;
    entry.applied(10);
    let behind = v1::Register { last_event_seq: 4, ..register("e0", 5) };
    let registered = take(&registry, behind, now).unwrap();
    assert_eq!((registered.next_event_seq, registered.emptied), (0, true));
}

#[tokio::test]
async fn an_agent_that_learnt_of_cache_groups_starts_over() {
    let (registry, now) = (registry(), Instant::now());
    let entry = take(&registry, register("e0", 5), now).unwrap().entry;
    entry.applied(10);
    let group = v1::CacheGroup { attention: v1::Attention::State.into(), window: 0, block_size: 16 };
    let hybrid = v1::Register { groups: vec![group], last_event_seq: 12, ..register("e0", 5) };
    let registered = take(&registry, hybrid.clone(), now).unwrap();
    assert_eq!((registered.next_event_seq, registered.emptied), (0, true));
    entry.applied(12);
    let again = take(&registry, hybrid, now).unwrap();
    assert_eq!((again.next_event_seq, again.emptied), (13, false));
}

#[tokio::test]
async fn a_gap_is_asked_for_once_and_mended_by_a_whole_batch() {
    let (registry, now) = (registry(), Instant::now());
    let entry = take(&registry, register("e0", 1), now).unwrap().entry;
    assert_eq!(entry.order(2, false), BatchOrder::Gap { ask: true });
    assert_eq!(entry.order(1, true), BatchOrder::Next);
    entry.applied(1);
    assert_eq!(entry.order(1, false), BatchOrder::Seen(1));
    assert_eq!(entry.order(3, false), BatchOrder::Gap { ask: true });
    assert_eq!(entry.order(4, false), BatchOrder::Gap { ask: false });
    assert_eq!(entry.order(2, false), BatchOrder::Gap { ask: false }, "a resync is under way");
    assert_eq!(entry.order(5, true), BatchOrder::Next);
    entry.applied(5);
    assert_eq!(entry.order(6, false), BatchOrder::Next);
}

#[tokio::test]
async fn a_lapsed_lease_ends_health_and_later_the_registration() {
    let (registry, now) = (registry(), Instant::now());
    let entry = take(&registry, register("e0", 1), now).unwrap().entry;
    assert!(registry.expire(now + LEASE, LEASE, FORGET).is_empty());
    let lapses = registry.expire(now + LEASE * 2, LEASE, FORGET);
    assert!(matches!(lapses[..], [Lapse::Unhealthy(_)]));
    assert!(entry.gone().is_cancelled() && !entry.snapshot(now).healthy);
    assert!(registry.expire(now + LEASE * 2, LEASE, FORGET).is_empty());
    let lapses = registry.expire(now + LEASE * 2 + FORGET, LEASE, FORGET);
    assert!(matches!(lapses[..], [Lapse::Forgotten(_)]));
    assert!(registry.get(&entry.id).is_none());
}

#[tokio::test]
async fn the_fleet_has_a_cap_and_slots_come_back() {
    let (registry, now) = (registry(), Instant::now());
    let first = take(&registry, register("e0", 1), now).unwrap().entry;
    take(&registry, register("e1", 1), now).unwrap();
    assert_eq!(take(&registry, register("e2", 1), now).unwrap_err(), RegisterError::Full(2));
    registry.expire(now + LEASE * 2 + FORGET, LEASE, FORGET);
    registry.free(first.slot);
    assert_eq!(take(&registry, register("e2", 1), now).unwrap().entry.slot, first.slot);
}

#[tokio::test]
async fn a_lost_session_ends_transfers_but_not_service() {
    let (registry, now) = (registry(), Instant::now());
    let peers = registry.peers();
    let old = take(&registry, register("e0", 1), now).unwrap();
    assert_eq!(peers.borrow().len(), 1);
    let new = take(&registry, register("e0", 1), now).unwrap();
    registry.disconnected(&old.entry, old.session);
    assert!(new.entry.snapshot(now).can_transfer, "a superseded session's end means nothing");
    registry.disconnected(&new.entry, new.session);
    let engine = new.entry.snapshot(now);
    assert!(engine.healthy && !engine.can_transfer);
    assert!(peers.borrow().is_empty());
}

#[tokio::test]
async fn others_requests_are_told_from_ours() {
    let (registry, now) = (registry(), Instant::now());
    let entry = take(&registry, register("e0", 1), now).unwrap().entry;
    let (_prefill, mut decode) = (entry.load.reserve_prefill(10, 0.1), entry.load.reserve_decode(10));
    decode.sent();
    let _coming = entry.load.reserve_decode(100);
    entry.report(v1::EngineLoad { running: 5, waiting: 3, kv_usage: 0.5, ..Default::default() });
    let engine = entry.snapshot(now);
    assert_eq!((engine.foreign_running, engine.foreign_waiting), (3, 2));
    let tokens = engine.info.kv_tokens().unwrap();
    assert_eq!(engine.kv_beyond, tokens / 2.0 - 10.0);
    entry.report(v1::EngineLoad { kv_usage: f64::NAN, ..Default::default() });
    assert_eq!(entry.snapshot(now).kv_beyond, -10.0);
}
