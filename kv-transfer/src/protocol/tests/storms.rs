//! Everything at once, and peers that send anything.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use baton_proto::TransferId;
use baton_proto::wire::{Accepted, BlockForm, BlockHeader, ErrorCode, Frame, PullHeader, WireDtype};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::pair::*;
use crate::protocol::*;

/// Pulls of all sizes in all weathers, with things going wrong at random.
fn storm(seed: u64) {
    let mut dice = StdRng::seed_from_u64(seed);
    let mut pair = Pair::new(seed, weather(&mut dice));
    let pulls = dice.random_range(1..8u8);
    for number in 1..=pulls {
        let blocks = dice.random_range(1..40);
        let id = pair.hold(number, blocks);
        let first = dice.random_range(0..blocks);
        let mut header = pair.header(id, first, blocks - first);
        header.credit = dice.random_range(1..3_000);
        header.deadline_ms = dice.random_range(100..15_000);
        if dice.random_bool(0.4) {
            (header.content, header.dtype) = (layout().content(), WireDtype::Fp8);
        }
        pair.pull(header);
    }
    let mut trouble = BTreeSet::new();
    for _ in 0..dice.random_range(0..6) {
        trouble.insert(dice.random_range(1..400));
    }
    pair.start();
    for step in 0.. {
        if !pair.step() {
            break;
        }
        if !trouble.remove(&step) {
            continue;
        }
        let stream = dice.random_range(0..pair.transfers.len());
        match dice.random_range(0..7) {
            0 => pair.source.flip(dice.random_range(0..pair.next_block), dice.random_range(0..BLOCK_BYTES)),
            1 => pair.cut(stream, Side::Puller, StreamEnd::Finished),
            2 => pair.cut(stream, Side::Holder, StreamEnd::Reset(0)),
            3 => pair.lose(stream),
            4 => {
                let id = pair.transfers[stream].id;
                pair.table.release(id);
            }
            5 => {
                pair.transfers[stream].receiver.cancel(ErrorCode::Cancelled.into());
                pair.act(stream);
            }
            _ => pair.restart_holder(),
        }
    }
    pair.run();
}

#[test]
fn no_weather_brings_a_wrong_byte_or_a_pull_without_end() {
    for seed in 0..400 {
        storm(seed);
    }
}

/// To look at one run of the above: put its seed here.
#[test]
fn replay_one_seed() {
    storm(0);
}

#[test]
fn whatever_a_puller_sends_the_holder_neither_panics_nor_sends_unasked() {
    for seed in 0..300 {
        eprintln!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let mut sender = Sender::new(now, sender_config());
        let accepted = Accepted { block_bytes: BLOCK_BYTES as u64, form: BlockForm::AsItLies };
        let mut allowed = 0u64;
        let mut sent = 0u64;
        for _ in 0..rng.random_range(1..60) {
            let frame = match rng.random_range(0..6) {
                0 => Frame::Pull(PullHeader {
                    credit: rng.random_range(0..500),
                    ..Pair::new(0, calm()).header(TransferId::from_bytes([1; 16]), 0, rng.random_range(0..4))
                }),
                1 => Frame::Credit(rng.random_range(0..2_000)),
                2 => Frame::Again(rng.random_range(0..5)),
                3 => Frame::Accepted(Accepted { block_bytes: 1, form: BlockForm::AsItLies }),
                4 if rng.random_bool(0.1) => Frame::Finish(None),
                _ => Frame::Credit(u64::from(rng.random::<u16>())),
            };
            match frame {
                Frame::Pull(pull) if sender.pull().is_none() => allowed = pull.credit,
                Frame::Credit(granted) if sender.pull().is_some() => allowed = allowed.max(granted),
                _ => {}
            }
            let mut bytes = frame.encode().as_ref().to_vec();
            if rng.random_bool(0.05) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] ^= 1 << rng.random_range(0..8);
                allowed = u64::MAX;
            }
            sender.handle_bytes(now, bytes.into());
            while let Some(action) = sender.poll() {
                match action {
                    SenderAction::Open(_) => sender.handle_opened(now, Ok(accepted)),
                    SenderAction::Gather(_) => sender.handle_block(Ok(0)),
                    SenderAction::Payload(range) => {
                        sent += range.len() as u64;
                        assert!(sent <= allowed, "{sent} of {allowed} bytes");
                    }
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn whatever_a_holder_sends_the_puller_neither_panics_nor_writes_outside() {
    for seed in 0..300 {
        eprintln!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let (blocks, direct) = (rng.random_range(1..4), rng.random_bool(0.5));
        let packed_bytes = rng.random_bool(0.5).then(packed_bytes);
        let pull = Pair::new(0, calm()).header(TransferId::from_bytes([1; 16]), 0, blocks);
        let mut receiver = Receiver::new(
            now,
            ReceiverConfig {
                pull,
                block_bytes: BLOCK_BYTES as u64,
                packed_bytes,
                deadline: now + Duration::from_secs(1),
                stall: Duration::from_secs(1),
                direct,
            },
        );
        for _ in 0..rng.random_range(1..30) {
            let mut bytes = match rng.random_range(0..5) {
                0 => {
                    let (form, bytes) = match rng.random_range(0..10) {
                        0 => (BlockForm::Common, BLOCK_BYTES as u64),
                        1..4 => (BlockForm::Packed, super::pair::packed_bytes()),
                        _ => (BlockForm::AsItLies, BLOCK_BYTES as u64),
                    };
                    let block_bytes = bytes + u64::from(rng.random_bool(0.1));
                    Frame::Accepted(Accepted { block_bytes, form }).encode().as_ref().to_vec()
                }
                1 | 2 => {
                    let header = BlockHeader { index: rng.random_range(0..5), checksum: rng.random() };
                    let mut bytes = Frame::Block(header).encode().as_ref().to_vec();
                    match direct {
                        true => bytes.extend_from_slice(Frame::Place(rng.random()).encode().as_ref()),
                        false => bytes.extend(std::iter::repeat_n(7, BLOCK_BYTES)),
                    }
                    bytes
                }
                3 => vec![rng.random(); rng.random_range(1..400)],
                _ => Frame::Refused(ErrorCode::Busy.into()).encode().as_ref().to_vec(),
            };
            bytes.truncate(rng.random_range(1..=bytes.len().max(2)));
            receiver.handle_bytes(now, bytes.into());
            while let Some(action) = receiver.poll() {
                match action {
                    ReceiverAction::Write { index, offset, bytes } => {
                        let most = match receiver.form() {
                            BlockForm::Packed => packed_bytes.expect("what was asked for") as usize,
                            _ => BLOCK_BYTES,
                        };
                        assert!(!direct && index < blocks && offset + bytes.len() <= most);
                    }
                    ReceiverAction::Copy { index, .. } => {
                        assert!(direct && index < blocks);
                        receiver.handle_copied(now, rng.random_bool(0.5).then(|| rng.random()));
                    }
                    _ => {}
                }
            }
        }
    }
}
