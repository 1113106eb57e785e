//! Direct pulls: places are told, and the puller copies.

use std::time::Duration;

use baton_proto::wire::{ErrorCode, Frame, PullHeader, WireError};

use super::pair::*;
use crate::protocol::*;

/// The two machines of a direct pull, with nothing between them: `copy` is what the shell does with a place.
fn direct(
    pair: &mut Pair,
    header: PullHeader,
    mut copy: impl FnMut(u32, u32) -> Option<u64>,
) -> (Result<Received, Stop>, Option<Result<(), WireError>>) {
    let now = pair.now;
    let header = PullHeader { credit: u64::MAX, ..header };
    let deadline = now + Duration::from_secs(5);
    let stall = Duration::from_secs(1);
    let block_bytes = BLOCK_BYTES as u64;
    let config =
        ReceiverConfig { pull: header, block_bytes, packed_bytes: None, deadline, stall, direct: true };
    let mut receiver = Receiver::new(now, config);
    let mut sender = Sender::new(now, SenderConfig { hello: stall, max_deadline: stall * 5 });
    let mut held = None;
    let (mut result, mut served, mut gathered) = (None, None, 0);
    for _ in 0..100 {
        while let Some(action) = receiver.poll() {
            match action {
                ReceiverAction::Send(frame) => sender.handle_bytes(now, frame.as_ref().to_vec().into()),
                ReceiverAction::Copy { index, from } => receiver.handle_copied(now, copy(index, from)),
                ReceiverAction::Write { .. } => panic!("bytes in a direct pull"),
                ReceiverAction::Done(done) => result = Some(done),
            }
        }
        while let Some(action) = sender.poll() {
            match action {
                SenderAction::Open(pull) => {
                    let opened = pair.table.open(now, &pull);
                    let accepted = opened.as_ref().map(|held| held.accepted());
                    sender.handle_opened(now, accepted.map_err(|error| *error));
                    held = opened.ok();
                }
                SenderAction::Send(frame) => receiver.handle_bytes(now, frame.as_ref().to_vec().into()),
                SenderAction::Gather(index) => {
                    let held = held.as_ref().unwrap();
                    gathered = held.block(index).unwrap();
                    sender.handle_block(Ok(held.checksum(index).unwrap()));
                }
                SenderAction::Payload(range) => {
                    assert_eq!(range, 0..BLOCK_BYTES);
                    let place = Frame::Place(gathered).encode();
                    receiver.handle_bytes(now, place.as_ref().to_vec().into());
                }
                SenderAction::Finished => held.as_ref().unwrap().claim.finish(),
                SenderAction::Done(_, done) => served = Some(done),
            }
        }
    }
    (result.expect("an end"), served)
}

fn checksum_of(memory: &Memory, block: u32) -> u64 {
    xxhash_rust::xxh3::xxh3_64(&memory.block(block))
}

#[test]
fn a_direct_pull_is_told_places_and_checks_what_was_copied() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 4);
    let header = pair.header(id, 0, 4);
    let theirs = pair.source.clone();
    let mut told = Vec::new();
    // Block 2 is torn the first time.
    let (result, served) = direct(&mut pair, header, |index, from| {
        told.push(index);
        let torn = u64::from(index == 2 && told.iter().filter(|at| **at == 2).count() == 1);
        Some(checksum_of(&theirs, from) ^ torn)
    });
    let received = result.unwrap();
    assert_eq!((received.bytes, received.corrupt, received.failed.len()), (5 * BLOCK_BYTES as u64, 1, 0));
    assert_eq!((told.len(), served), (5, Some(Ok(()))));
    assert_eq!(pair.table.poll(pair.now).len(), 1, "the hold is over");
}

#[test]
fn a_direct_pull_that_fails_leaves_the_hold_for_another_way() {
    let mut pair = Pair::new(0, calm());
    let id = pair.hold(1, 4);
    let header = pair.header(id, 0, 4);
    let (result, served) = direct(&mut pair, header, |_, _| Some(1));
    assert_eq!(result, Err(Stop::Here(ErrorCode::CorruptBlock.into())));
    assert_eq!((served, pair.table.poll(pair.now).len()), (None, 0));
    // A device's copies are looked at behind the last one.
    let (result, served) = direct(&mut pair, header, |_, _| None);
    assert!(result.is_ok() && served == Some(Ok(())));
}
