//! Packing to fp8: the error that is stated, and the same bits on both backends.

use baton_kernels::reference::fp8;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::backend::{Backend, on_both, pack, unpack};

on_both!(values_come_back_within_the_stated_error, every_value_is_packed_as_the_reference_does);

fn float(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn values_come_back_within_the_stated_error(backend: &impl Backend) {
    let mut runner =
        TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() });
    // Sizes as they occur in a KV cache, with outliers: 2^-20 to 2^12, either sign, and zero.
    let value = prop_oneof![
        9 => (107u16..140, any::<bool>(), 0u16..128)
            .prop_map(|(exponent, sign, mantissa)| u16::from(sign) << 15 | exponent << 7 | mantissa),
        1 => Just(0u16),
    ];
    let blocks = (1usize..4, 1usize..5, 1usize..70).prop_flat_map(move |(blocks, segments, segment)| {
        let values = proptest::collection::vec(value.clone(), blocks * segments * segment);
        (values, Just(segments * segment), Just(segment))
    });
    let outcome = runner.run(&blocks, |(values, len, segment)| {
        let packed = backend.pack(&values, len, segment);
        prop_assert!(packed.iter().all(|block| block.len() == fp8::packed_bytes(len / segment, segment)));
        let back = backend.unpack(&packed, segment);
        for (before, after) in values.chunks(segment).zip(back.chunks(segment)) {
            let most = before.iter().map(|bits| float(*bits).abs()).fold(0.0, f32::max);
            for (x, y) in before.iter().map(|bits| float(*bits)).zip(after.iter().map(|bits| float(*bits))) {
                let error = x.abs() / 16.0 + most / 448.0 / 1024.0;
                let allowed = error + (x.abs() + error) / 256.0;
                prop_assert!((x - y).abs() <= allowed, "{x} came back as {y}; largest {most}");
            }
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

fn every_value_is_packed_as_the_reference_does(backend: &impl Backend) {
    // All bf16 values, NaN and infinities among them, in segments of neighbours.
    let values: Vec<u16> = (0..=u16::MAX).collect();
    for segment in [64, 4096] {
        let packed = backend.pack(&values, 8192, segment);
        let expected: Vec<_> = values.chunks(8192).map(|block| pack(block, segment)).collect();
        assert!(packed == expected, "segments of {segment}");
        let unpacked: Vec<u16> = expected.iter().flat_map(|block| unpack(block, segment)).collect();
        assert!(backend.unpack(&packed, segment) == unpacked);
        for (x, y) in values.iter().zip(&unpacked) {
            assert_eq!(float(*x).is_nan(), float(*y).is_nan());
        }
    }
}
