//! Endpoints over loopback: real sockets, mutual TLS, mapped memory.

mod support;

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_kernels::BlockMemory;
use baton_kv_transfer::checksum;
use baton_kv_transfer::{Endpoint, HoldEnd, Limits, Peer, PullError, checksum::digest};
use baton_proto::wire::{ErrorCode, WireError};
use support::two::{LEASE, Two};
use support::{Authority, Shape, TableSource, fill, hash, id, read, request};

const SHAPE: Shape = Shape { pieces: 6, piece_bytes: 4096, blocks: 64 };

fn two(limits: Limits) -> Two {
    let limits = Limits { direct: false, ..limits };
    Two::new(SHAPE, limits.clone(), limits)
}

#[tokio::test]
async fn blocks_arrive_where_they_should_and_the_hold_ends() {
    let two = two(Limits::default());
    two.hold(1, vec![40, 3, 17, 8]);
    let pull = two.puller.pull(two.request(1, 1, 3), two.ours.clone(), vec![5, 60, 1]);
    let report = pull.await.unwrap();
    assert_eq!((report.bytes, report.failed.len(), report.corrupt), (3 * SHAPE.block_bytes() as u64, 0, 0));
    for (from, to) in [(3, 5), (17, 60), (8, 1)] {
        assert!(read(&two.ours, to) == read(&two.theirs, from), "block {from} at {to}");
    }
    assert!(read(&two.ours, 0).iter().all(|byte| *byte == 0), "nothing else was written");

    let released = two.source.released().await;
    assert_eq!((released.transfer_id, released.end), (id(1), HoldEnd::Finished));
    let sent = two.source.report().await;
    assert_eq!(sent.result, Ok(()));
    assert_eq!(sent.checksums, report.checksums);
    // What arrived in memory is what left it, by reading both back.
    let memory: Arc<dyn BlockMemory> = two.ours.clone();
    let guard: baton_kernels::Guard = Arc::new(());
    let back: Vec<u64> =
        [5, 60, 1].iter().map(|block| checksum::of_block(&memory, *block, &guard).unwrap()).collect();
    assert_eq!(digest(&back), digest(&sent.checksums));
    let (stats, theirs) = (two.puller.stats(), two.holder.stats());
    assert_eq!((stats.received_bytes, theirs.sent_bytes), (report.bytes, report.bytes));
}

#[tokio::test]
async fn many_pulls_share_a_connection() {
    let two = two(Limits { max_pulls: 4, ..Limits::default() });
    let pulls: Vec<_> = (0..16u8)
        .map(|number| {
            let blocks: Vec<u32> = (0..4).map(|i| u32::from(number) * 4 + i).collect();
            two.hold(number, blocks.clone());
            two.puller.pull(two.request(number, 0, 4), two.ours.clone(), blocks)
        })
        .collect();
    for pull in pulls {
        assert!(pull.await.unwrap().failed.is_empty());
    }
    for block in 0..64 {
        assert!(read(&two.ours, block) == read(&two.theirs, block));
    }
    assert_eq!(two.puller.stats().connections, 1);
}

#[tokio::test]
async fn refusals_carry_their_code() {
    let two = two(Limits::default());
    two.hold(1, vec![0, 1]);
    let good = two.request(1, 0, 2);
    let mut stale = good.clone();
    stale.epoch.0 = 9;
    let mut other = good.clone();
    other.last_hash = hash(7);
    for (request, error) in [
        (two.request(2, 0, 2), WireError::from(ErrorCode::UnknownTransfer)),
        (stale, WireError::new(ErrorCode::StaleEpoch, 1)),
        (other, WireError::new(ErrorCode::ContentMismatch, 2)),
        (two.request(1, 1, 2), WireError::new(ErrorCode::Range, 2)),
    ] {
        let blocks = vec![0, 1];
        let result = two.puller.pull(request, two.ours.clone(), blocks).await;
        assert_eq!(result, Err(PullError::Refused(error)));
    }
    assert!(two.puller.pull(good, two.ours.clone(), vec![0, 1]).await.is_ok(), "the hold is still there");
}

#[tokio::test]
async fn blocks_of_another_size_are_not_written() {
    let two = two(Limits::default());
    two.hold(1, vec![0, 1]);
    let larger = Shape { piece_bytes: 8192, ..SHAPE }.memory();
    let result = two.puller.pull(two.request(1, 0, 2), larger, vec![0, 1]).await;
    let error = WireError::new(ErrorCode::LayoutMismatch, SHAPE.block_bytes() as u64);
    assert_eq!(result, Err(PullError::Stopped(error)));
}

#[tokio::test]
async fn callers_mistakes_are_told_before_anything_is_asked() {
    let two = two(Limits::default());
    for blocks in [vec![1, 64], vec![2, 2]] {
        let result = two.puller.pull(two.request(1, 0, 2), two.ours.clone(), blocks).await;
        assert!(matches!(result, Err(PullError::Memory(_))), "{result:?}");
    }
    assert_eq!(two.puller.stats().connections, 0);
}

#[tokio::test]
async fn memory_that_changed_under_its_hold_fails_its_blocks_only() {
    let two = two(Limits::default());
    two.hold(1, vec![0, 1, 2]);
    two.theirs.write(1, 9000, b"not what was held").unwrap();
    let report = two.puller.pull(two.request(1, 0, 3), two.ours.clone(), vec![0, 1, 2]).await.unwrap();
    assert_eq!((report.failed, report.corrupt), (vec![1], 2));
    assert_eq!(two.source.report().await.result, Err(WireError::new(ErrorCode::CorruptBlock, 1)));
    assert_eq!(two.puller.stats().corrupt_blocks, 2);
}

#[tokio::test]
async fn a_pull_waits_for_checksums_and_the_hold_for_the_pull() {
    let two = two(Limits::default());
    let memory: Arc<dyn BlockMemory> = two.theirs.clone();
    let (checksums, guard) = two.hold_unchecked(1, vec![7, 8]);
    let pull = two.puller.pull(two.request(1, 0, 2), two.ours.clone(), vec![0, 1]);
    let making = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(50));
        checksums.make(&memory, 0, &[7, 8], &guard).unwrap();
    });
    assert!(pull.await.unwrap().failed.is_empty());
    making.await.unwrap();
    two.source.released().await;
}

#[tokio::test]
async fn a_release_stops_the_pull_under_way() {
    let two = two(Limits::default());
    // Without its checksums the pull gets no further than the acceptance.
    drop(two.hold_unchecked(1, vec![7]));
    let pull = two.puller.pull(two.request(1, 0, 1), two.ours.clone(), vec![0]);
    let release = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(two.source.table.lock().unwrap().release(id(1)));
        two.source.released().await
    };
    let (result, released) = tokio::join!(pull, release);
    assert_eq!(result, Err(PullError::Refused(ErrorCode::Released.into())));
    assert_eq!(released.end, HoldEnd::Released);
}

#[tokio::test]
async fn cancelled_and_dropped_pulls_write_nothing_more_and_give_the_hold_up() {
    let two = two(Limits::default());
    two.end_pulls_early(Duration::from_micros(150)).await;
    let blocks: Vec<u32> = (0..64).collect();
    // A pull that was cancelled before its holder heard of it leaves the hold to its lease; one that ran ends it.
    two.hold(20, blocks.clone());
    two.puller.pull(two.request(20, 0, 64), two.ours.clone(), blocks.clone()).await.unwrap();
    while two.source.released().await.transfer_id != id(20) {}
}

#[tokio::test]
async fn the_deadline_counts_while_waiting_for_a_turn() {
    let two = two(Limits { max_pulls: 0, ..Limits::default() });
    let mut request = two.request(1, 0, 1);
    request.deadline = Duration::from_millis(30);
    let result = two.puller.pull(request, two.ours.clone(), vec![0]).await;
    assert_eq!(result, Err(PullError::Stopped(ErrorCode::Deadline.into())));
}

#[tokio::test]
async fn too_many_pulls_are_refused_as_busy() {
    let two = two(Limits { max_served: 0, ..Limits::default() });
    two.hold(1, vec![0]);
    let result = two.puller.pull(two.request(1, 0, 1), two.ours.clone(), vec![0]).await;
    assert_eq!(result, Err(PullError::Refused(ErrorCode::Busy.into())));
}

#[tokio::test]
async fn a_restarted_holder_is_found_again_without_waiting_for_a_timeout() {
    let authority = Authority::new();
    let identity = authority.issue("holder");
    let puller = support::endpoint(authority.issue("puller"), TableSource::new(1), Limits::default());
    let (theirs, ours) = (SHAPE.memory(), SHAPE.memory());
    fill(&theirs, 0..64, 5);
    let first_life = support::endpoint(identity.clone(), TableSource::new(1), Limits::default());
    let address = first_life.local_addr();
    let peer = support::peer("holder", &first_life);
    puller.warm(&peer).await.unwrap();
    // A process that dies says no farewell: a relay that goes silent stands for it. Here the same address gets
    // another endpoint, which knows nothing of the old connection.
    drop(first_life);
    let source = TableSource::new(2);
    let config = baton_kv_transfer::EndpointConfig { listen: address, identity, limits: Limits::default() };
    let second_life = loop {
        match Endpoint::bind(config.clone(), source.clone()) {
            Ok(endpoint) => break endpoint,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    source.hold(id(1), &theirs, SHAPE, vec![0, 1], LEASE);
    let stale = request(peer.clone(), id(1), 1, SHAPE, 0, 2);
    let result = puller.pull(stale, ours.clone(), vec![0, 1]).await;
    assert_eq!(result, Err(PullError::Refused(WireError::new(ErrorCode::StaleEpoch, 2))));
    let fresh = request(peer, id(1), 2, SHAPE, 0, 2);
    assert!(puller.pull(fresh, ours, vec![0, 1]).await.is_ok());
    drop(second_life);
}

#[tokio::test]
async fn only_certificates_of_the_fleet_and_only_the_right_name() {
    let two = two(Limits::default());
    two.hold(1, vec![0]);
    let mut request = two.request(1, 0, 1);
    request.peer.engine_id = "another".parse().unwrap();
    let result = two.puller.pull(request, two.ours.clone(), vec![0]).await;
    assert!(
        matches!(&result, Err(PullError::Unreachable { reason, .. }) if reason.contains("certificate")),
        "{result:?}"
    );

    let stranger =
        support::endpoint(Authority::new().issue("puller"), TableSource::new(1), Limits::default());
    let result = stranger.pull(two.request(1, 0, 1), two.ours.clone(), vec![0]).await;
    assert!(matches!(result, Err(PullError::Unreachable { .. })), "{result:?}");

    let renewed = support::endpoint(two.authority.issue("puller"), TableSource::new(1), Limits::default());
    assert!(renewed.pull(two.request(1, 0, 1), two.ours.clone(), vec![0]).await.is_ok());
}

#[tokio::test]
async fn warming_up_finds_the_mtu_and_probes_are_bounded() {
    let two = two(Limits::default());
    let path = two.puller.warm(&two.peer()).await.unwrap();
    assert!(path.mtu > 60_000, "{path:?}");
    let probe = two.puller.probe(&two.peer(), u32::MAX).await.unwrap();
    assert!(probe.bytes <= 1 << 20 && probe.rtt > Duration::ZERO, "{probe:?}");
    assert_eq!(two.puller.probe(&two.peer(), 0).await.unwrap().bytes, 0);
}

/// Passes datagrams on between one client and one server; drops, repeats, swaps and damages some of them.
fn relay(server: std::net::SocketAddr, stop: Arc<AtomicBool>) -> std::net::SocketAddr {
    let front = UdpSocket::bind("127.0.0.1:0").unwrap();
    let back = UdpSocket::bind("127.0.0.1:0").unwrap();
    back.connect(server).unwrap();
    let address = front.local_addr().unwrap();
    let client = Arc::new(std::sync::Mutex::new(None));
    for forward in [true, false] {
        let (from, to) = if forward { (&front, &back) } else { (&back, &front) };
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let (client, stop) = (client.clone(), stop.clone());
        from.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            let mut kept: Option<Vec<u8>> = None;
            let mut state = 12_345u64 + u64::from(forward);
            while !stop.load(Ordering::Relaxed) {
                let Ok((len, sender)) = from.recv_from(&mut buffer) else { continue };
                if forward {
                    *client.lock().unwrap() = Some(sender);
                }
                let pass = |bytes: &[u8]| {
                    let _ = match *client.lock().unwrap() {
                        Some(client) if !forward => to.send_to(bytes, client),
                        _ => to.send(bytes),
                    };
                };
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                match (state >> 33) % 40 {
                    0 => {}
                    1 => {
                        buffer[len / 2] ^= 4;
                        pass(&buffer[..len]);
                    }
                    2 => kept = Some(buffer[..len].to_vec()),
                    3 => {
                        pass(&buffer[..len]);
                        pass(&buffer[..len]);
                    }
                    _ => {
                        pass(&buffer[..len]);
                        if let Some(late) = kept.take() {
                            pass(&late);
                        }
                    }
                }
            }
        });
    }
    address
}

#[tokio::test]
async fn a_network_that_loses_repeats_swaps_and_damages_packets_only_costs_time() {
    let two = two(Limits { stall: Duration::from_secs(10), ..Limits::default() });
    let stop = Arc::new(AtomicBool::new(false));
    let peer = Peer {
        engine_id: "holder".parse().unwrap(),
        address: relay(two.holder.local_addr(), stop.clone()).to_string(),
    };
    let blocks: Vec<u32> = (0..64).collect();
    for number in 0..4 {
        two.hold(number, blocks.clone());
        let request = request(peer.clone(), id(number), 1, SHAPE, 0, 64);
        let report = two.puller.pull(request, two.ours.clone(), blocks.clone()).await.unwrap();
        assert_eq!((report.failed.len(), report.corrupt), (0, 0));
    }
    stop.store(true, Ordering::Relaxed);
    for block in blocks {
        assert!(read(&two.ours, block) == read(&two.theirs, block));
    }
}

#[tokio::test]
async fn a_holder_that_falls_silent_ends_the_pull() {
    let two = two(Limits { stall: Duration::from_millis(300), ..Limits::default() });
    let stop = Arc::new(AtomicBool::new(false));
    let peer = Peer {
        engine_id: "holder".parse().unwrap(),
        address: relay(two.holder.local_addr(), stop.clone()).to_string(),
    };
    two.puller.warm(&peer).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    // The relay looks up every 50 ms, and may pass one more packet on before it does.
    tokio::time::sleep(Duration::from_millis(200)).await;
    two.hold(1, vec![0]);
    let request = request(peer, id(1), 1, SHAPE, 0, 1);
    let result = two.puller.pull(request, two.ours.clone(), vec![0]).await;
    // The first connection is given up for another one, which does not come about.
    assert!(matches!(result, Err(PullError::Unreachable { .. })), "{result:?}");
}
