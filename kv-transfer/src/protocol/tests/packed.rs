//! Blocks that travel as fp8.

use std::time::{Duration, Instant};

use baton_proto::TransferId;
use baton_proto::wire::{Accepted, BlockForm, ErrorCode, Frame, PullHeader, WireDtype, WireError};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::pair::*;
use crate::protocol::*;

fn asking(header: PullHeader) -> PullHeader {
    PullHeader { content: layout().content(), dtype: WireDtype::Fp8, ..header }
}

#[test]
fn half_the_bytes_travel_in_any_weather() {
    for seed in 0..100 {
        let weather = weather(&mut StdRng::seed_from_u64(seed));
        let mut pair = Pair::new(seed, weather);
        let id = pair.hold(1, 30);
        let stream = pair.pull(asking(pair.header(id, 2, 28)));
        pair.run();
        // What the bytes are, the pair has looked at.
        assert_eq!(pair.transfers[stream].receiver.form(), BlockForm::Packed);
        let received = pair.outcome(stream).clone().unwrap();
        let travelled = BLOCK_BYTES as u64 / 2 + 4 * 4;
        assert_eq!((received.bytes, received.corrupt), (28 * travelled, 0));
    }
}

#[test]
fn a_block_that_changed_under_its_hold_fails_alone() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 6);
    let block = pair.holds[&id][2];
    pair.source.flip(block, 77);
    let stream = pair.pull(asking(pair.header(id, 0, 6)));
    pair.run();
    let received = pair.outcome(stream).clone().unwrap();
    assert_eq!((received.failed, received.corrupt), (vec![2], 2));
    assert_eq!(pair.transfers[stream].served, Some(Err(WireError::new(ErrorCode::CorruptBlock, 1))));
}

#[test]
fn what_is_not_asked_for_comes_as_it_lies_bit_by_bit() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 6);
    let stream = pair.pull(PullHeader { dtype: WireDtype::AsStored, ..asking(pair.header(id, 0, 6)) });
    pair.run();
    assert_eq!(pair.transfers[stream].receiver.form(), BlockForm::AsItLies);
    assert_eq!(pair.outcome(stream).as_ref().unwrap().bytes, 6 * BLOCK_BYTES as u64);
}

#[test]
fn heads_of_other_content_come_as_they_lie_where_they_can() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 6);
    // Equal layouts whose heads one side cannot tell apart: exact bytes are never wrong.
    let stream = pair.pull(PullHeader { content: None, ..asking(pair.header(id, 0, 6)) });
    pair.run();
    assert_eq!(pair.transfers[stream].receiver.form(), BlockForm::AsItLies);
    assert!(pair.outcome(stream).is_ok());
}

#[test]
fn a_form_or_length_that_was_not_asked_for_ends_the_pull() {
    let answer = |dtype: WireDtype, form, block_bytes| {
        let now = Instant::now();
        let pull = Pair::new(0, calm()).header(TransferId::from_bytes([1; 16]), 0, 2);
        let config = ReceiverConfig {
            pull: PullHeader { dtype, ..asking(pull) },
            block_bytes: BLOCK_BYTES as u64,
            packed_bytes: (dtype == WireDtype::Fp8).then(packed_bytes),
            deadline: now + Duration::from_secs(1),
            stall: Duration::from_secs(1),
            direct: false,
        };
        let mut receiver = Receiver::new(now, config);
        let accepted = Frame::Accepted(Accepted { block_bytes, form }).encode();
        receiver.handle_bytes(now, accepted.as_ref().to_vec().into());
        std::iter::from_fn(|| receiver.poll()).find_map(|action| match action {
            ReceiverAction::Done(result) => Some(result.unwrap_err()),
            _ => None,
        })
    };
    let (whole, packed) = (BLOCK_BYTES as u64, packed_bytes());
    let protocol = Some(Stop::Here(ErrorCode::Protocol.into()));
    let mismatch = |bytes| Some(Stop::Here(WireError::new(ErrorCode::LayoutMismatch, bytes)));
    assert_eq!(answer(WireDtype::Fp8, BlockForm::Packed, packed), None);
    assert_eq!(answer(WireDtype::Fp8, BlockForm::AsItLies, whole), None);
    assert_eq!(answer(WireDtype::Fp8, BlockForm::Packed, whole), mismatch(whole));
    assert_eq!(answer(WireDtype::Fp8, BlockForm::AsItLies, packed), mismatch(packed));
    assert_eq!(answer(WireDtype::Fp8, BlockForm::Packed, u64::MAX), mismatch(u64::MAX));
    assert_eq!(answer(WireDtype::AsStored, BlockForm::Packed, packed), protocol);
}
