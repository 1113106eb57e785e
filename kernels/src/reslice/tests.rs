use std::collections::BTreeMap;

use baton_proto::connector::{Heads, Piece};
use proptest::prelude::*;

use super::*;

/// One layer of `[token][head][byte]`, 2 tokens, 3 heads of 4 bytes, and behind it one of `[head][token][byte]`.
fn two_layers() -> Layout {
    let span = |start, head_stride, token_stride| HeadSpan {
        start,
        head_stride,
        dims: vec![(2, token_stride)],
        len: 4,
    };
    Layout {
        facts: BTreeMap::from([("dtype".to_owned(), "uint8".to_owned())]),
        order: BTreeMap::new(),
        pieces: vec![
            Piece { storage: 0, offset: 0, stride: 24, len: 24 },
            Piece { storage: 1, offset: 0, stride: 24, len: 24 },
        ],
        heads: Some(Heads { total: 6, count: 3, spans: vec![span(0, 4, 12), span(24, 8, 4)] }),
    }
}

#[test]
fn heads_come_one_after_another_with_all_layers_and_tokens() {
    let map = HeadMap::of(&two_layers(), 2).unwrap().unwrap();
    assert_eq!((map.total(), map.count(), map.head_bytes), (6, 3, 16));
    assert_eq!(map.block_bytes(WireDtype::AsStored), Ok(48));
    assert_eq!(map.rows.len(), 3, "tokens that adjoin are one row");
    // Byte = its place in the block.
    let block: Vec<u8> = (0..48).collect();
    let mut common = Vec::new();
    map.gather(&[Bytes::copy_from_slice(&block)], 1..2, &mut common);
    assert_eq!(common, [4, 5, 6, 7, 16, 17, 18, 19, 32, 33, 34, 35, 36, 37, 38, 39]);
    common.clear();
    map.gather(&[Bytes::copy_from_slice(&block)], 0..3, &mut common);
    let mut back = vec![0; 48];
    map.scatter(&common, &mut back);
    assert_eq!(back, block);
}

#[test]
fn heads_that_are_not_the_block_are_refused() {
    let of = |change: fn(&mut Heads), ranks| {
        let mut layout = two_layers();
        change(layout.heads.as_mut().unwrap());
        HeadMap::of(&layout, ranks).unwrap_err()
    };
    let cover = HeadsError::Cover(48);
    assert_eq!(of(|heads| heads.spans[0].len = 5, 2), cover);
    assert_eq!(of(|heads| heads.spans[0].len = 0, 2), cover);
    assert_eq!(of(|heads| heads.spans[1].start = 25, 2), cover);
    assert_eq!(of(|heads| heads.spans[1].head_stride = 0, 2), cover);
    assert_eq!(of(|heads| heads.spans[1].dims = vec![(2, u32::MAX)], 2), cover);
    assert_eq!(of(|heads| heads.spans.truncate(1), 2), cover);
    assert_eq!(of(|heads| heads.spans.clear(), 2), cover);
    assert_eq!(of(|heads| heads.spans[0].dims = vec![(0, 1)], 2), cover);
    assert_eq!(of(|heads| heads.spans[0].dims = vec![(u32::MAX, 1), (0, 1)], 2), cover);
    assert_eq!(of(|heads| heads.spans[0].dims = vec![(u32::MAX, 1); 3], 2), HeadsError::Size);
    assert_eq!(of(|heads| heads.spans[0].dims = vec![(MAX_ROWS as u32, 1)], 2), HeadsError::Size);
    assert_eq!(of(|heads| heads.total = u32::MAX, 2), HeadsError::Size);
    assert_eq!(of(|_| {}, 1), HeadsError::Count { count: 3, total: 6, ranks: 1 });
    assert_eq!(of(|heads| heads.total = 7, 2), HeadsError::Uneven(Uneven { heads: 7, ranks: 2 }));
    assert_eq!(of(|heads| heads.total = 0, 2), HeadsError::Uneven(Uneven { heads: 0, ranks: 2 }));
    assert!(HeadMap::of(&Layout { heads: None, ..two_layers() }, 2).unwrap().is_none());
}

#[test]
fn the_content_is_named_alike_whatever_the_ranks_and_the_order() {
    let content = |layout: &Layout, ranks| BlockLayout::of(layout, ranks).unwrap().content().unwrap();
    let one = two_layers();
    // Of twice as many ranks, or head by head, a head has as many bytes.
    let mut other = two_layers();
    other.order.insert("inner".into(), "hnd".into());
    other.pieces.iter_mut().for_each(|piece| (piece.stride, piece.len) = (16, 16));
    let heads = other.heads.as_mut().unwrap();
    heads.count = 2;
    heads.spans[0].dims = vec![(2, 8)];
    heads.spans[1].start = 16;
    assert_eq!(content(&one, 2), content(&other, 3));
    assert_ne!(LayoutFingerprint::of(&one), LayoutFingerprint::of(&other));
    other.facts.insert("dtype".into(), "int8".into());
    assert_ne!(content(&one, 2), content(&other, 3));
}

#[test]
fn a_block_comes_whole_and_in_order_or_not_at_all() {
    let memory = memory();
    let map = Arc::new(HeadMap::of(&two_layers(), 2).unwrap().unwrap());
    let mut filling = Filling::new(memory.clone(), map.clone(), WireDtype::AsStored).unwrap();
    let common: Vec<u8> = (0..48).collect();
    let is = |block| memory.clone().read(block, Arc::new(())).unwrap().concat();
    filling.write(1, 0, &common[..20]).unwrap();
    assert!(matches!(
        filling.write(1, 21, &[0]),
        Err(MemoryError::Order { block: 1, offset: 21, filled: 20 })
    ));
    assert!(matches!(filling.write(2, 20, &[0]), Err(MemoryError::Order { block: 2, .. })));
    assert!(matches!(filling.write(1, 20, &[0; 29]), Err(MemoryError::Range { offset: 20, len: 29, .. })));
    assert_eq!(is(1), [0; 48], "nothing was written of a part");
    // It begins anew, in pieces of any length.
    for (i, bytes) in common.chunks(7).enumerate() {
        filling.write(1, i * 7, bytes).unwrap();
    }
    let whole = Sliced::whole(memory.clone(), map, WireDtype::AsStored).unwrap();
    assert_eq!(whole.clone().read(1, Arc::new(())).unwrap().concat(), common);
    assert_ne!(is(1), common);
    assert!(matches!(whole.write(1, 0, &[0]), Err(MemoryError::ReadOnly)));
    assert!(whole.share().is_none());
}

/// The same as bf16 values.
fn of_bf16() -> Layout {
    Layout { facts: BTreeMap::from([("dtype".to_owned(), "bfloat16".to_owned())]), ..two_layers() }
}

#[test]
fn packed_heads_are_codes_and_a_scale_for_each_layer() {
    let map = Arc::new(HeadMap::of(&of_bf16(), 2).unwrap().unwrap());
    // Of each of three heads two layers with four values.
    assert_eq!(map.block_bytes(WireDtype::Fp8), Ok(3 * 2 * (4 + 4)));
    let memory = memory();
    let one = |exponent: u16| (exponent << 7).to_le_bytes();
    let block: Vec<u8> = (0..24).flat_map(|i| one(120 + i % 3)).collect();
    memory.write(2, 0, &block).unwrap();
    let view = Sliced::whole(memory.clone(), map.clone(), WireDtype::Fp8).unwrap();
    let packed = view.clone().read(2, Arc::new(())).unwrap().concat();
    assert_eq!((packed.len(), view.block_bytes()), (48, 48));
    // Head 1 lies in values 2 and 3 of each token in the first layer: 1/32 and 2^-7, and so again.
    let scale = 0.03125f32 / 448.0;
    assert_eq!(packed[16..20], [0x7E, 0x6E, 0x7E, 0x6E]);
    assert_eq!(packed[24..28], scale.to_le_bytes());
    let mut filling = Filling::new(memory.clone(), map, WireDtype::Fp8).unwrap();
    packed.chunks(5).enumerate().for_each(|(i, bytes)| filling.write(0, i * 5, bytes).unwrap());
    assert_eq!(memory.clone().read(0, Arc::new(())).unwrap().concat(), block, "powers of two lose nothing");
    // A scale that nobody makes: one error, and the memory is as it was.
    let mut bad = packed.clone();
    bad[44..].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = filling.write(0, 0, &bad).unwrap_err();
    assert!(error.to_string().starts_with("block 0 is packed wrongly: segment 1 has the scale"), "{error}");
    assert_eq!(memory.clone().read(0, Arc::new(())).unwrap().concat(), block);
    filling.write(1, 0, &packed).unwrap();
    assert_eq!(memory.read(1, Arc::new(())).unwrap().concat(), block);
}

#[test]
fn the_plan_of_kernels_puts_heads_in_the_same_order() {
    // A third dimension, as where an attention kernel has smaller blocks than the engine.
    let mut split = of_bf16();
    let heads = split.heads.as_mut().unwrap();
    heads.spans[0] = HeadSpan { start: 0, head_stride: 8, dims: vec![(2, 4), (1, 1), (2, 2)], len: 2 };
    heads.spans[1].dims = vec![];
    heads.spans[1].len = 8;
    for layout in [two_layers(), split] {
        let map = HeadMap::of(&layout, 2).unwrap().unwrap();
        let block: Vec<u8> = (0..48).collect();
        let (mut common, mut staged) = (Vec::new(), vec![0; 48]);
        map.gather(&[Bytes::copy_from_slice(&block)], 0..3, &mut common);
        crate::reference::gather(&map.plan().unwrap(), &[&block], &[0], &mut staged, 48);
        assert_eq!(staged, common);
    }
}

#[test]
fn what_cannot_be_packed_says_why() {
    let packed = |layout: &Layout| BlockLayout::of(layout, 2).unwrap().packed_bytes();
    assert_eq!(packed(&of_bf16()), Ok(48));
    assert_eq!(packed(&two_layers()), Err(Unpackable::Dtype("uint8".into())));
    assert_eq!(packed(&Layout { heads: None, ..of_bf16() }), Err(Unpackable::Heads));
    let mut uneven = of_bf16();
    uneven.pieces[1].len = 12;
    let heads = uneven.heads.as_mut().unwrap();
    heads.spans[1] = HeadSpan { start: 24, head_stride: 4, dims: vec![], len: 4 };
    assert_eq!(packed(&uneven), Err(Unpackable::Layers(8, 4)));
}

fn memory() -> Arc<dyn BlockMemory> {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let storage = || {
        let fd = memfd_create("kv", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 96).unwrap();
        (fd, 96)
    };
    crate::EngineMemory::new(vec![storage(), storage()], &two_layers(), 4).unwrap()
}

proptest! {
    /// Pieces of any lengths read as one run of bytes.
    #[test]
    fn rows_may_reach_over_pieces(
        lens in proptest::collection::vec(1usize..9, 1..8),
        reads in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..8),
    ) {
        let total: usize = lens.iter().sum();
        let bytes: Vec<u8> = (0..total).map(|i| i as u8).collect();
        let mut rest = Bytes::copy_from_slice(&bytes);
        let pieces: Vec<Bytes> = lens.iter().map(|len| rest.split_to(*len)).collect();
        let mut source = Pieces::new(&pieces);
        for (at, len) in reads {
            let at = at.index(total);
            let len = len.index(total - at + 1);
            let mut into = Vec::new();
            source.copy(at, len, &mut into);
            prop_assert_eq!(&into, &bytes[at..at + len]);
        }
    }
}
