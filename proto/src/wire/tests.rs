use std::collections::BTreeMap;

use super::*;
use crate::connector::Piece;

fn pull() -> PullHeader {
    PullHeader {
        transfer_id: TransferId::from_bytes([0xa1; 16]),
        epoch: Epoch(0x0102_0304_0506_0708),
        layout: LayoutFingerprint::from_bytes([0xb2; 16]),
        content: Some(LayoutFingerprint::from_bytes([0xd4; 16])),
        dtype: WireDtype::AsStored,
        last_hash: BlockHash::from_bytes([0xc3; 16]),
        first_block: 9,
        blocks: 10,
        rank: 11,
        ranks: 14,
        deadline_ms: 12,
        credit: 13,
    }
}

fn every_kind() -> Vec<Frame> {
    let mut frames = vec![
        Frame::Pull(pull()),
        Frame::Pull(PullHeader { content: None, ..pull() }),
        Frame::Pull(PullHeader { dtype: WireDtype::Fp8, ..pull() }),
        Frame::Accepted(Accepted { block_bytes: 1 << 40, form: BlockForm::AsItLies }),
        Frame::Accepted(Accepted { block_bytes: 1 << 20, form: BlockForm::Common }),
        Frame::Accepted(Accepted { block_bytes: 1 << 19, form: BlockForm::Packed }),
        Frame::Block(BlockHeader { index: 7, checksum: u64::MAX }),
        Frame::Credit(u64::MAX - 1),
        Frame::Again(3),
        Frame::Finish(None),
        Frame::Probe(Probe { bytes: 5 }),
        Frame::ProbeReply(ProbeReply { bytes: 6, mtu: 65_507 }),
        Frame::Near(Near { port: 7420 }),
        Frame::NearReply(NearReply { name: [2; 16], token: [3; 16] }),
        Frame::Direct(Direct { token: [4; 16], purpose: Purpose::Copy }),
        Frame::Direct(Direct { token: [5; 16], purpose: Purpose::Map }),
        Frame::Memory(1 << 20),
        Frame::Place(u32::MAX),
        Frame::Later(9),
    ];
    for code in ErrorCode::ALL {
        frames.push(Frame::Refused(WireError::new(code, 77)));
        frames.push(Frame::Finish(Some(WireError::new(code, 78))));
    }
    frames
}

#[test]
fn every_frame_survives_and_no_prefix_of_it_is_a_frame() {
    for frame in every_kind() {
        let encoded = frame.encode();
        let bytes = encoded.as_ref();
        let mut more = bytes.to_vec();
        more.extend_from_slice(b"payload");
        assert_eq!(Frame::decode(&more), Ok(Some((frame, bytes.len()))));
        for cut in 0..bytes.len() {
            assert_eq!(Frame::decode(&bytes[..cut]), Ok(None), "{frame:?} cut at {cut}");
        }
    }
}

#[test]
fn the_largest_frame_is_as_large_as_stated() {
    let largest = every_kind().iter().map(|frame| frame.encode().as_ref().len()).max();
    assert_eq!(largest, Some(MAX_FRAME));
}

/// What version 4 looks like on the wire. A change here is a new version.
#[test]
fn version_4_to_the_byte() {
    let mut expected = b"BK\x04\x01\x68\x00\x00\x00".to_vec();
    expected.extend([0xa1; 16]);
    expected.extend([0xb2; 16]);
    expected.extend([0xd4; 16]);
    expected.extend([0xc3; 16]);
    expected.extend([8, 7, 6, 5, 4, 3, 2, 1]);
    expected.extend(13u64.to_le_bytes());
    for number in [9u32, 10, 11, 14, 12, 0] {
        expected.extend(number.to_le_bytes());
    }
    assert_eq!(Frame::Pull(pull()).encode().as_ref(), expected);
    *expected.last_chunk_mut().unwrap() = 1u32.to_le_bytes();
    assert_eq!(Frame::Pull(PullHeader { dtype: WireDtype::Fp8, ..pull() }).encode().as_ref(), expected);

    let block = Frame::Block(BlockHeader { index: 0x0a0b, checksum: 0x11 }).encode();
    assert_eq!(block.as_ref(), b"BK\x04\x04\x10\0\0\0\x11\0\0\0\0\0\0\0\x0b\x0a\0\0\0\0\0\0");
    let accepted = Frame::Accepted(Accepted { block_bytes: 0x22, form: BlockForm::Common }).encode();
    assert_eq!(accepted.as_ref(), b"BK\x04\x02\x10\0\0\0\x22\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
    let packed = Frame::Accepted(Accepted { block_bytes: 0x11, form: BlockForm::Packed }).encode();
    assert_eq!(packed.as_ref(), b"BK\x04\x02\x10\0\0\0\x11\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    let refused = Frame::Refused(WireError::new(ErrorCode::StaleEpoch, 6)).encode();
    assert_eq!(refused.as_ref(), b"BK\x04\x03\x10\0\0\0\x06\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0");
    assert_eq!(Frame::Again(2).encode().as_ref(), b"BK\x04\x06\x04\0\0\0\x02\0\0\0");
    assert_eq!(Frame::Later(2).encode().as_ref(), b"BK\x04\x0f\x04\0\0\0\x02\0\0\0");
}

#[test]
fn names_and_numbers_of_errors_are_each_their_own() {
    let mut names: Vec<_> = ErrorCode::ALL.iter().map(|code| code.name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ErrorCode::ALL.len());
    for (i, code) in ErrorCode::ALL.into_iter().enumerate() {
        assert_eq!((code as u16, ErrorCode::from_number(i as u16 + 1)), (i as u16 + 1, Some(code)));
    }
    assert_eq!(ErrorCode::from_number(0), None);
}

#[test]
fn broken_frames_are_refused() {
    let good = Frame::Finish(None).encode();
    let with = |at: usize, value: u8| {
        let mut bytes = good.as_ref().to_vec();
        bytes[at] = value;
        Frame::decode(&bytes)
    };
    assert_eq!(with(0, b'X'), Err(FrameError::Magic));
    assert_eq!(with(2, 2), Err(FrameError::Version(2)));
    assert_eq!(with(3, 0), Err(FrameError::Kind(0)));
    assert_eq!(with(4, 15), Err(FrameError::Length { kind: FINISH, len: 15 }));
    assert_eq!(with(7, 1), Err(FrameError::Magic));
    assert_eq!(with(PREFIX + 10, 1), Err(FrameError::Body(FINISH)));
    let mut refused_for_nothing = good.as_ref().to_vec();
    refused_for_nothing[3] = REFUSED;
    assert_eq!(Frame::decode(&refused_for_nothing), Err(FrameError::Body(REFUSED)));
    assert_eq!(
        with(PREFIX + 9, 1),
        Ok(Some((Frame::Finish(Some(WireError::new(ErrorCode::Internal, 256))), 24)))
    );
}

#[test]
fn pulls_of_ranks_that_cannot_be_are_no_frames() {
    for (rank, ranks, good) in [(0, 1, true), (63, 64, true), (0, 0, false), (2, 2, false), (0, 65, false)] {
        let pull = PullHeader { rank, ranks, ..pull() };
        let decoded = Frame::decode(Frame::Pull(pull).encode().as_ref()).map(|frame| frame.is_some());
        assert_eq!(decoded, if good { Ok(true) } else { Err(FrameError::Body(PULL)) }, "{rank} of {ranks}");
    }
    let with = |frame: Frame, at: usize| {
        let mut bytes = frame.encode().as_ref().to_vec();
        bytes[at] = 3;
        Frame::decode(&bytes)
    };
    assert_eq!(
        with(Frame::Pull(pull()), PREFIX + 100),
        Err(FrameError::Body(PULL)),
        "a type that does not exist"
    );
    let accepted = Frame::Accepted(Accepted { block_bytes: 1, form: BlockForm::AsItLies });
    assert_eq!(with(accepted, PREFIX + 8), Err(FrameError::Body(ACCEPTED)), "a form that does not exist");
    assert_eq!(with(accepted, PREFIX + 12), Err(FrameError::Body(ACCEPTED)));
}

#[test]
fn the_fingerprint_covers_facts_and_piece_lengths_but_not_places() {
    let layout = |dtype: &str, inner: &str, lens: &[u32], offset: u64| Layout {
        facts: BTreeMap::from([("dtype".to_owned(), dtype.to_owned())]),
        order: BTreeMap::from([("inner".to_owned(), inner.to_owned())]),
        pieces: lens.iter().map(|len| Piece { storage: 0, offset, stride: 1 << 20, len: *len }).collect(),
        heads: None,
    };
    let one = LayoutFingerprint::of(&layout("bf16", "nhd", &[8, 8], 0));
    assert_eq!(one, LayoutFingerprint::of(&layout("bf16", "nhd", &[8, 8], 4096)));
    assert_ne!(one, LayoutFingerprint::of(&layout("f16", "nhd", &[8, 8], 0)));
    assert_ne!(one, LayoutFingerprint::of(&layout("bf16", "hnd", &[8, 8], 0)));
    assert_ne!(one, LayoutFingerprint::of(&layout("bf16", "nhd", &[16], 0)));
}

#[test]
fn the_fingerprint_of_the_content_covers_facts_and_heads() {
    let of = |dtype: &str, heads, head_bytes| {
        let facts = BTreeMap::from([("dtype".to_owned(), dtype.to_owned())]);
        LayoutFingerprint::of_content(&facts, heads, head_bytes)
    };
    let one = of("bf16", 8, 256);
    assert_eq!(one, of("bf16", 8, 256));
    for other in [of("f16", 8, 256), of("bf16", 4, 256), of("bf16", 8, 128)] {
        assert_ne!(one, other);
    }
}
