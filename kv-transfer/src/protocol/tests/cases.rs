//! One thing that can happen each.

use std::time::Duration;

use baton_proto::wire::{ErrorCode, LayoutFingerprint, PullHeader, WireError};
use baton_proto::{BlockHash, Epoch, TransferId};

use super::pair::*;
use crate::hold::HoldEnd;
use crate::protocol::*;

#[test]
fn a_pull_brings_all_blocks_and_ends_its_hold() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 12);
    let stream = pair.pull(pair.header(id, 0, 12));
    pair.run();
    let received = pair.outcome(stream).clone().unwrap();
    assert_eq!((received.bytes, received.corrupt, received.failed.len()), (12 * BLOCK_BYTES as u64, 0, 0));
    assert_eq!(pair.transfers[stream].served, Some(Ok(())));
    assert_eq!(pair.ended[&id], HoldEnd::Finished);
    assert!(pair.now < pair.start + Duration::from_secs(1), "nobody waited for the lease");
}

#[test]
fn a_tail_alone_can_be_pulled() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 12);
    let stream = pair.pull(pair.header(id, 11, 1));
    pair.run();
    assert_eq!(pair.outcome(stream).as_ref().unwrap().bytes, BLOCK_BYTES as u64);
}

#[test]
fn what_does_not_fit_is_refused_before_any_byte_moves() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 4);
    let good = pair.header(id, 0, 4);
    let other = [9; 16];
    let cases = [
        (PullHeader { transfer_id: TransferId::from_bytes(other), ..good }, ErrorCode::UnknownTransfer),
        (PullHeader { epoch: Epoch(2), ..good }, ErrorCode::StaleEpoch),
        (PullHeader { epoch: Epoch(0), ..good }, ErrorCode::StaleEpoch),
        (PullHeader { layout: LayoutFingerprint::from_bytes(other), ..good }, ErrorCode::LayoutMismatch),
        (PullHeader { rank: 1, ranks: 2, ..good }, ErrorCode::LayoutMismatch),
        (PullHeader { ranks: 2, ..good }, ErrorCode::LayoutMismatch),
        (PullHeader { last_hash: BlockHash::from_bytes(other), ..good }, ErrorCode::ContentMismatch),
        (PullHeader { blocks: 3, ..good }, ErrorCode::ContentMismatch),
        (PullHeader { blocks: 5, ..good }, ErrorCode::Range),
        (PullHeader { first_block: 4, ..good }, ErrorCode::Range),
        (PullHeader { first_block: u32::MAX, ..good }, ErrorCode::Range),
        (PullHeader { blocks: 0, ..good }, ErrorCode::Range),
    ];
    let streams: Vec<usize> = cases.iter().map(|(header, _)| pair.pull(*header)).collect();
    pair.run();
    for (stream, (header, code)) in streams.into_iter().zip(cases) {
        assert_eq!(pair.refusal(stream), code, "{header:?}");
        let target = &pair.transfers[stream].target;
        assert!(target.blocks.lock().unwrap().iter().flatten().all(|byte| *byte == 0xee));
    }
    assert_eq!(pair.ended[&id], HoldEnd::Expired);
}

#[test]
fn a_pull_may_overtake_its_hold() {
    let mut pair = Pair::new(0, calm());
    let id = TransferId::from_bytes([1; 16]);
    let stream = pair.pull(pair.header(id, 0, 3));
    pair.start();
    while pair.now < pair.start + Duration::from_millis(100) {
        assert!(pair.step());
    }
    assert_eq!(pair.hold(1, 3), id);
    pair.run();
    assert_eq!(pair.outcome(stream).as_ref().unwrap().failed, Vec::<usize>::new());
}

#[test]
fn a_second_pull_of_the_same_rank_finds_the_hold_released() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 3);
    let first = pair.pull(pair.header(id, 0, 3));
    pair.start();
    while pair.transfers[first].outcome.is_none() {
        assert!(pair.step());
    }
    while pair.ended.is_empty() {
        assert!(pair.step());
    }
    let second = pair.pull(pair.header(id, 0, 3));
    pair.run();
    assert_eq!(pair.refusal(second), ErrorCode::Released);
}

#[test]
fn a_block_that_changed_under_its_hold_is_asked_for_again_and_then_fails_alone() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 6);
    let block = pair.holds[&id][2];
    pair.source.flip(block, 77);
    let stream = pair.pull(pair.header(id, 0, 6));
    pair.run();
    let received = pair.outcome(stream).clone().unwrap();
    assert_eq!((received.failed, received.corrupt), (vec![2], 2));
    assert_eq!(received.bytes, 7 * BLOCK_BYTES as u64);
    assert_eq!(
        pair.transfers[stream].served,
        Some(Err(WireError::new(ErrorCode::CorruptBlock, 1))),
        "the holder learns of it"
    );
    assert_eq!(pair.ended[&id], HoldEnd::Finished);
}

#[test]
fn a_block_that_was_corrupt_once_is_mended_by_asking_again() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 6);
    let block = pair.holds[&id][5];
    pair.source.flip(block, 0);
    let stream = pair.pull(pair.header(id, 0, 6));
    pair.start();
    while pair.transfers[stream].sender.as_ref().is_none_or(|sender| sender.repeated() == 0) {
        // The memory is right again before the second reading.
        if pair.transfers[stream].sender.as_ref().is_some_and(|sender| sender.begun() == 6)
            && pair.source.block(block)[0] != original(block as usize, 0)
        {
            pair.source.flip(block, 0);
        }
        assert!(pair.step());
    }
    pair.run();
    let received = pair.outcome(stream).clone().unwrap();
    assert_eq!((received.failed.len(), received.corrupt), (0, 1));
}

#[test]
fn the_lease_stops_a_pull_under_way_and_only_then_blocks_are_released() {
    let mut pair = Pair::new(0, Weather { delay: Duration::from_secs(1), ..calm() });
    let id = pair.hold(1, 60);
    pair.now += LEASE - Duration::from_secs(5);
    let stream = pair.pull(pair.header(id, 0, 60));
    pair.run();
    assert_eq!(pair.refusal(stream), ErrorCode::LeaseExpired);
    assert!(pair.transfers[stream].receiver.answered(), "it was under way");
    assert_eq!(pair.ended[&id], HoldEnd::Expired);
}

#[test]
fn the_deadline_ends_both_sides() {
    let mut pair = Pair::new(0, Weather { delay: Duration::from_millis(500), ..calm() });
    let id = pair.hold(1, 60);
    let stream = pair.pull(PullHeader { deadline_ms: 3_000, ..pair.header(id, 0, 60) });
    pair.run();
    assert!(
        matches!(pair.outcome(stream), Err(Stop::Here(error)) if error.code == ErrorCode::Deadline)
            || pair.refusal(stream) == ErrorCode::Deadline
    );
    assert_eq!(pair.ended[&id], HoldEnd::Finished, "the puller does not come back, and said so");
}

#[test]
fn a_silent_holder_counts_as_gone() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 60);
    let stream = pair.pull(pair.header(id, 0, 60));
    pair.start();
    while !pair.transfers[stream].receiver.answered() {
        assert!(pair.step());
    }
    pair.transfers[stream].sender = None;
    pair.transfers[stream].held = None;
    pair.transfers[stream].gathered = None;
    pair.cut(stream, Side::Holder, StreamEnd::Lost);
    pair.run();
    assert!(matches!(pair.outcome(stream), Err(Stop::Here(error)) if error.code == ErrorCode::Stalled));
}

#[test]
fn cancelling_gives_the_hold_up() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 60);
    let stream = pair.pull(pair.header(id, 0, 60));
    pair.start();
    while !pair.transfers[stream].receiver.answered() {
        assert!(pair.step());
    }
    pair.transfers[stream].receiver.cancel(ErrorCode::Cancelled.into());
    pair.run();
    assert_eq!(pair.outcome(stream), &Err(Stop::Here(ErrorCode::Cancelled.into())));
    assert_eq!(pair.transfers[stream].served, Some(Err(ErrorCode::Cancelled.into())));
    assert_eq!(pair.ended[&id], HoldEnd::Finished);
}

#[test]
fn a_broken_stream_leaves_the_hold_for_another_try() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 60);
    let first = pair.pull(pair.header(id, 0, 60));
    pair.start();
    while !pair.transfers[first].receiver.answered() {
        assert!(pair.step());
    }
    pair.lose(first);
    assert_eq!(pair.outcome(first), &Err(Stop::Lost));
    let second = pair.pull(pair.header(id, 0, 60));
    pair.run();
    assert!(pair.outcome(second).is_ok());
}

#[test]
fn another_life_of_the_holder_refuses_what_the_first_one_held() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 60);
    let first = pair.pull(pair.header(id, 0, 60));
    pair.start();
    while !pair.transfers[first].receiver.answered() {
        assert!(pair.step());
    }
    pair.restart_holder();
    assert_eq!(pair.outcome(first), &Err(Stop::Lost));
    let second = pair.pull(pair.header(id, 0, 60));
    pair.run();
    assert_eq!(pair.refusal(second), ErrorCode::StaleEpoch);
    assert_eq!(pair.ended[&id], HoldEnd::Dropped);
}
