//! Checksums, against the library that the wire protocol uses.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::{Backend, on_both};

on_both!(are_xxh3_at_every_boundary, are_xxh3_of_any_bytes, are_xxh3_of_large_blocks);

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9E37_79B9).wrapping_add(seed) >> 7) as u8).collect()
}

fn compare(backend: &impl Backend, len: usize, blocks: usize, seed: u64) {
    let stride = len.next_multiple_of(16) + 16;
    let data = bytes(stride * blocks, seed);
    let expected: Vec<u64> = data.chunks(stride).map(|block| xxh3_64(&block[..len])).collect();
    assert_eq!(backend.checksums(&data, len, stride), expected, "blocks of {len} bytes");
}

fn are_xxh3_at_every_boundary(backend: &impl Backend) {
    for around in [241, 256, 320, 1024, 1088, 2048, 3072] {
        for len in around - 3..=around + 3 {
            compare(backend, len.max(241), 2, len as u64);
        }
    }
    compare(backend, 64, 0, 0);
}

fn are_xxh3_of_any_bytes(backend: &impl Backend) {
    let mut runner =
        TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() });
    let outcome = runner.run(&(241usize..20_000, 1usize..6, any::<u64>()), |(len, blocks, seed)| {
        compare(backend, len, blocks, seed);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// SmolLM2's blocks, and one rank's of a 70B model.
fn are_xxh3_of_large_blocks(backend: &impl Backend) {
    compare(backend, 60 * 12 * 1024, 3, 1);
    compare(backend, 640 * 1024, 37, 2);
}
