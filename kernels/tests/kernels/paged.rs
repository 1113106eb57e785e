//! Gather, scatter and re-slicing, against the plain definition of where each value of a cache lies.

use baton_kernels::{CacheShape, Halves, Order, Plan, shares};
use baton_proto::connector::{Layout, Piece};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::backend::{Backend, POISON, on_both};

on_both!(
    blocks_come_in_the_common_order,
    what_was_gathered_scatters_back_and_touches_nothing_else,
    any_parallelism_and_order_gets_the_same_values,
    layouts_of_any_alignment_are_copied,
    many_blocks_in_any_order
);

/// Bytes that differ from place to place.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

fn storages(shape: &CacheShape, seed: u64) -> Vec<Vec<u8>> {
    (0..shape.layers)
        .map(|layer| noise(shape.storage_bytes() as usize, seed ^ u64::from(layer) << 32))
        .collect()
}

/// Where the values of a head begin in a layer's storage, by vLLM's shapes.
fn place(shape: &CacheShape, block: u32, half: u32, head: u32, token: u32) -> usize {
    let index = |dims: &[(u32, u32)]| dims.iter().fold(0, |at, (i, size)| at * *size as usize + *i as usize);
    let halves = (half, if shape.halves == Halves::Latent { 1 } else { 2 });
    let (block, head, token) = ((block, shape.num_blocks), (head, shape.heads), (token, shape.tokens));
    let [outer, inner] = match shape.halves {
        Halves::Apart => [halves, block],
        Halves::Together | Halves::Latent => [block, halves],
    };
    let [slow, fast] = match shape.order {
        Order::Nhd => [token, head],
        Order::Hnd => [head, token],
    };
    index(&[outer, inner, slow, fast]) * shape.head_bytes as usize
}

/// A block of some heads in the common order, value by value.
fn expected(shape: &CacheShape, storages: &[Vec<u8>], block: u32, heads: std::ops::Range<u32>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let halves = if shape.halves == Halves::Latent { 1 } else { 2 };
    for storage in storages {
        for half in 0..halves {
            for head in heads.clone() {
                for token in 0..shape.tokens {
                    let at = place(shape, block, half, head, token);
                    bytes.extend(&storage[at..at + shape.head_bytes as usize]);
                }
            }
        }
    }
    bytes
}

fn halves() -> impl Strategy<Value = Halves> {
    prop_oneof![Just(Halves::Apart), Just(Halves::Together), Just(Halves::Latent)]
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![Just(Order::Nhd), Just(Order::Hnd)]
}

/// Head sizes of bf16 and fp8, of MLA's latent vectors, and some that are not aligned.
fn head_bytes() -> impl Strategy<Value = u32> {
    prop_oneof![Just(16u32), Just(64), Just(128), Just(256), Just(656), Just(1152), 1u32..40]
}

prop_compose! {
    fn shapes()(
        layers in 1u32..4,
        tokens in prop_oneof![Just(16u32), 1u32..9],
        heads in 1u32..5,
        head_bytes in head_bytes(),
        halves in halves(),
        order in order(),
        num_blocks in 1u32..5,
    ) -> CacheShape {
        let heads = if halves == Halves::Latent { 1 } else { heads };
        CacheShape { layers, tokens, heads, head_bytes, halves, order, num_blocks }
    }
}

fn check<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let mut runner =
        TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() });
    if let Err(error) = runner.run(&strategy, test) {
        panic!("{error}");
    }
}

/// Heads `first..last` of a shape, from two numbers.
fn some_heads(shape: &CacheShape, a: u32, b: u32) -> std::ops::Range<u32> {
    let (a, b) = (a % shape.heads, b % shape.heads);
    a.min(b)..a.max(b) + 1
}

fn blocks_come_in_the_common_order(backend: &impl Backend) {
    check((shapes(), any::<(u32, u32)>(), 0usize..40), |(shape, (a, b), pad)| {
        let heads = some_heads(&shape, a, b);
        let plan = shape.plan(heads.clone()).unwrap();
        let storages = storages(&shape, 1);
        let blocks: Vec<u32> = (0..shape.num_blocks).rev().collect();
        let stride = (plan.block_bytes() + pad).next_multiple_of(16);
        let staging = backend.gather(&plan, &storages, &blocks, stride);
        for (gathered, block) in staging.chunks(stride).zip(blocks) {
            let (bytes, behind) = gathered.split_at(plan.block_bytes());
            prop_assert_eq!(bytes, expected(&shape, &storages, block, heads.clone()));
            prop_assert!(behind.iter().all(|byte| *byte == POISON), "wrote behind the block");
        }
        Ok(())
    });
}

fn what_was_gathered_scatters_back_and_touches_nothing_else(backend: &impl Backend) {
    check((shapes(), any::<(u32, u32)>()), |(shape, (a, b))| {
        let heads = some_heads(&shape, a, b);
        let plan = shape.plan(heads.clone()).unwrap();
        let (from, to) = (storages(&shape, 1), storages(&shape, 2));
        let stride = plan.block_bytes().next_multiple_of(16);
        // Every second block moves.
        let blocks: Vec<u32> = (0..shape.num_blocks).step_by(2).collect();
        let staging = backend.gather(&plan, &from, &blocks, stride);
        let after = backend.scatter(&plan, &to, &blocks, &staging, stride);
        for block in 0..shape.num_blocks {
            for head in 0..shape.heads {
                let moved = block % 2 == 0 && heads.contains(&head);
                let origin = if moved { &from } else { &to };
                let is = expected(&shape, &after, block, head..head + 1);
                prop_assert_eq!(is, expected(&shape, origin, block, head..head + 1));
            }
        }
        Ok(())
    });
}

fn any_parallelism_and_order_gets_the_same_values(backend: &impl Backend) {
    let tp = || prop_oneof![Just(1u32), Just(2), Just(4), Just(8)];
    let sides = (halves(), order(), tp(), halves(), order(), tp());
    let model = (
        1u32..3,
        prop_oneof![Just(1u32), Just(2), Just(4), Just(8)],
        prop_oneof![Just(128u32), Just(256), Just(20)],
    );
    check(
        (sides, model),
        |((halves_a, order_a, tp_a, halves_b, order_b, tp_b), (layers, heads, head_bytes))| {
            // An engine with a latent cache hands over to another such.
            let latent = halves_a == Halves::Latent || halves_b == Halves::Latent;
            let heads = if latent { 1 } else { heads };
            let shape = |halves, order, tp: u32, num_blocks| CacheShape {
                layers,
                tokens: 4,
                heads: (heads / tp).max(1),
                head_bytes,
                halves: if latent { Halves::Latent } else { halves },
                order,
                num_blocks,
            };
            let (a, b) = (shape(halves_a, order_a, tp_a, 3), shape(halves_b, order_b, tp_b, 4));
            // The whole model's cache on one rank, from which each rank of the holder has its heads.
            let whole = CacheShape { heads, ..shape(Halves::Together, Order::Nhd, 1, 3) };
            let model = storages(&whole, 7);
            let mut ranks_a = vec![storages(&a, 8); tp_a as usize];
            for share in shares(heads, 1, tp_a).unwrap() {
                let from = whole.plan(share.from_heads).unwrap();
                let to = a.plan(share.to_heads).unwrap();
                prop_assert_eq!(from.block_bytes(), to.block_bytes());
                let stride = from.block_bytes().next_multiple_of(16);
                let staging = backend.gather(&from, &model, &[0, 1, 2], stride);
                let rank = &mut ranks_a[share.to_rank as usize];
                *rank = backend.scatter(&to, rank, &[2, 0, 1], &staging, stride);
            }
            let mut ranks_b = vec![storages(&b, 9); tp_b as usize];
            for share in shares(heads, tp_a, tp_b).unwrap() {
                let from = a.plan(share.from_heads).unwrap();
                let to = b.plan(share.to_heads).unwrap();
                let stride = from.block_bytes().next_multiple_of(16);
                let staging = backend.gather(&from, &ranks_a[share.from_rank as usize], &[2, 0, 1], stride);
                let rank = &mut ranks_b[share.to_rank as usize];
                *rank = backend.scatter(&to, rank, &[3, 1, 0], &staging, stride);
            }
            for share in shares(heads, tp_b, 1).unwrap() {
                for (block, at) in [(0, 3), (1, 1), (2, 0)] {
                    let is = expected(&b, &ranks_b[share.from_rank as usize], at, share.from_heads.clone());
                    prop_assert_eq!(is, expected(&whole, &model, block, share.to_heads.clone()));
                }
            }
            Ok(())
        },
    );
}

fn layouts_of_any_alignment_are_copied(backend: &impl Backend) {
    let lens = proptest::collection::vec((1u32..80, 0u64..9), 1..6);
    check((lens, prop_oneof![Just(1u32), Just(4), Just(16)], 1u32..6), |(lens, unit, num_blocks)| {
        // Piece i of all blocks, gaps included, in storage i % 2, one after another.
        let mut ends = [0u64; 2];
        let mut pieces = Vec::new();
        for (i, (len, gap)) in lens.iter().enumerate() {
            let (storage, len) = (i % 2, len * unit);
            let stride = u64::from(len) + gap * u64::from(unit);
            pieces.push(Piece { storage: storage as u32, offset: ends[storage], stride, len });
            ends[storage] += u64::from(num_blocks) * stride;
        }
        let lens: Vec<u64> = ends.into_iter().take(lens.len().min(2)).collect();
        let layout = Layout { pieces, ..Layout::default() };
        let plan = Plan::of_layout(&layout, &lens, u64::from(num_blocks)).unwrap();
        prop_assert!(plan.width() >= unit);
        let storages: Vec<_> = lens.iter().map(|len| noise(*len as usize, *len)).collect();
        let stride = plan.block_bytes().next_multiple_of(16);
        let blocks: Vec<u32> = (0..num_blocks).collect();
        let staging = backend.gather(&plan, &storages, &blocks, stride);
        for block in 0..num_blocks {
            let piece = |piece: &Piece| {
                let at = (piece.offset + u64::from(block) * piece.stride) as usize;
                storages[piece.storage as usize][at..at + piece.len as usize].to_vec()
            };
            let bytes: Vec<u8> = layout.pieces.iter().flat_map(piece).collect();
            prop_assert_eq!(&staging[block as usize * stride..][..bytes.len()], bytes);
        }
        let blank: Vec<_> = storages.iter().map(|storage| vec![0; storage.len()]).collect();
        let copied = backend.scatter(&plan, &blank, &blocks, &staging, stride);
        prop_assert_eq!(backend.gather(&plan, &copied, &blocks, stride), staging);
        Ok(())
    });
}

/// More than fit one launch.
fn many_blocks_in_any_order(backend: &impl Backend) {
    let shape = CacheShape {
        layers: 3,
        tokens: 16,
        heads: 2,
        head_bytes: 128,
        halves: Halves::Apart,
        order: Order::Nhd,
        num_blocks: 200,
    };
    let plan = shape.plan(0..2).unwrap();
    let storages = storages(&shape, 5);
    let blocks: Vec<u32> = (0..150).map(|i| i * 37 % 200).collect();
    let stride = plan.block_bytes();
    let staging = backend.gather(&plan, &storages, &blocks, stride);
    for (gathered, block) in staging.chunks(stride).zip(&blocks) {
        assert_eq!(gathered, expected(&shape, &storages, *block, 0..2));
    }
    let scattered = backend.scatter(&plan, &storages, &blocks, &staging, stride);
    assert!(scattered == storages);
}
