//! bf16 to fp8 (e4m3) for the wire and back: half the bytes, at a price. Off unless asked for.
//!
//! A *segment* is what shares a scale: one head of one layer in a block, K and V, contiguous in the common order (see
//! [`crate::HeadMap`]). The scale is its largest finite size over 448, the largest e4m3 value. What is packed at once is a
//! run of segments, as a head has them: the codes of all of them, then their scales as 32-bit little-endian floats.
//!
//! # Error
//! A value `x` of a segment whose largest size is `m` comes back within `x / 16 + m / 448 / 1024` and one rounding to
//! bf16 (`x / 256`) of what it was: three bits of mantissa for values down to `m / 28672`, and steps of `m / 229376`
//! below. So V loses nothing by sharing a scale with K while it is no more than some thousand times smaller. Infinite values
//! come back as `± m`, NaN as NaN, and a segment whose `m` is below 2^-100 as zeros.
//!
//! # Once is enough
//! Packing what was unpacked gives the same bytes, whatever they were packed from. So blocks that are handed on from engine
//! to engine lose no more than on the first way, and what lies in a memory can be checked against what arrived.

/// The largest e4m3 value.
const LARGEST: f32 = 448.0;
/// The scale of the largest bf16 value: no larger one is ever made.
const LARGEST_SCALE: f32 = f32::from_bits(0x7F7F_0000) / LARGEST;
/// Below it a segment counts as zeros: its smallest codes would be values that bf16 has few bits for.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);
/// Code of NaN.
const NAN: u8 = 0x7F;
/// Bytes of a scale.
const SCALE: usize = 4;

/// A packed segment whose scale no packing makes: not a number, not above zero, or too large.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("segment {segment} has the scale {scale:e}")]
pub struct BadScale {
    /// Index of the segment.
    pub segment: usize,
    /// Its scale.
    pub scale: f32,
}

/// Bytes of so many packed segments of `segment` values each.
pub const fn packed_bytes(segments: usize, segment: usize) -> usize {
    segments * (segment + SCALE)
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To the nearest bf16, ties to even. Not for NaN.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// To the nearest e4m3 value, ties to even; larger ones become the largest. Without branches, so that a compiler makes
/// vectors of it.
#[inline(always)]
fn to_e4m3(value: f32) -> u8 {
    // Below 2^-6 codes count steps of 2^-9, as the last bits of numbers from 2^14 on do.
    const STEPS: f32 = 16384.0;
    let (sign, size) = (value.to_bits() >> 24 & 0x80, value.to_bits() & 0x7FFF_FFFF);
    let small = (f32::from_bits(size) + STEPS).to_bits().wrapping_sub(STEPS.to_bits());
    let normal = ((size + 0x7_FFFF + (size >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if size < 0x3C80_0000 { small } else { normal };
    let code = if size >= LARGEST.to_bits() { 0x7E } else { code };
    (if size > 0x7F80_0000 { u32::from(NAN) } else { sign | code }) as u8
}

fn from_e4m3(code: u8) -> f32 {
    let size = u32::from(code & 0x7F);
    let value = match code & 0x7F {
        NAN => f32::NAN,
        0..8 => size as f32 / 512.0,
        _ => f32::from_bits((size << 20) + (120 << 23)),
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// Packs bf16 values (little-endian), `segment` to a scale, and appends the result. Panics where they are no whole number
/// of segments.
pub fn pack(values: &[u8], segment: usize, packed: &mut Vec<u8>) {
    let (values, rest) = values.as_chunks::<2>();
    assert!(rest.is_empty() && values.len().is_multiple_of(segment), "segments of {segment} values");
    let start = packed.len();
    packed.resize(start + packed_bytes(values.len() / segment, segment), 0);
    let (codes, scales) = packed[start..].split_at_mut(values.len());
    let (scales, _) = scales.as_chunks_mut::<SCALE>();
    for ((values, codes), scale) in
        values.chunks_exact(segment).zip(codes.chunks_exact_mut(segment)).zip(scales)
    {
        *scale = pack_segment(values, codes).to_le_bytes();
    }
}

/// Makes the codes of one segment, and its scale.
fn pack_segment(values: &[[u8; 2]], codes: &mut [u8]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { pack_segment_avx2(values, codes) };
    }
    pack_segment_plainly(values, codes)
}

/// The same, for vectors twice as wide.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn pack_segment_avx2(values: &[[u8; 2]], codes: &mut [u8]) -> f32 {
    pack_segment_plainly(values, codes)
}

#[inline(always)]
fn pack_segment_plainly(values: &[[u8; 2]], codes: &mut [u8]) -> f32 {
    // Sizes are in the order of their bits.
    let size = |value: &[u8; 2]| (u16::from_le_bytes(*value) & 0x7FFF) as i16;
    let finite = |size: i16| if size < 0x7F80 { size } else { 0 };
    let most = from_bf16(values.iter().map(|value| finite(size(value))).fold(0, i16::max) as u16);
    let scale = if most >= SMALLEST { most / LARGEST } else { 1.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = to_e4m3(from_bf16(u16::from_le_bytes(*value)) / scale);
    }
    scale
}

/// Finds a scale that no packing makes. What comes from elsewhere is looked at so before it is unpacked: any scale makes
/// numbers of codes, and not every one of them those that were packed. Panics where these are no segments.
pub fn check(packed: &[u8], segment: usize) -> Result<(), BadScale> {
    let segments = packed.len() / packed_bytes(1, segment);
    assert!(packed.len() == packed_bytes(segments, segment), "segments of {segment} values");
    let made = |scale: f32| scale > 0.0 && scale <= LARGEST_SCALE;
    match scales(&packed[segments * segment..]).enumerate().find(|(_, scale)| !made(*scale)) {
        Some((segment, scale)) => Err(BadScale { segment, scale }),
        None => Ok(()),
    }
}

fn scales(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<SCALE>().0.iter().map(|scale| f32::from_le_bytes(*scale))
}

/// The reverse of [`pack`], within the error above. Panics where the lengths are not those of the same segments.
pub fn unpack(packed: &[u8], segment: usize, values: &mut [u8]) {
    let segments = values.len() / 2 / segment;
    assert!(
        values.len() == segments * segment * 2 && packed.len() == packed_bytes(segments, segment),
        "{} bytes for {} of values in segments of {segment}",
        packed.len(),
        values.len()
    );
    let (codes, scale_bytes) = packed.split_at(segments * segment);
    let (values, _) = values.as_chunks_mut::<2>();
    let segments = codes.chunks_exact(segment).zip(values.chunks_exact_mut(segment));
    for ((codes, values), scale) in segments.zip(scales(scale_bytes)) {
        let of_code = values_of_codes(scale);
        for (value, code) in values.iter_mut().zip(codes) {
            *value = of_code[usize::from(*code)];
        }
    }
}

/// What each code stands for in a segment of this scale.
fn values_of_codes(scale: f32) -> [[u8; 2]; 256] {
    std::array::from_fn(|code| {
        let code = code as u8;
        let value = if code & 0x7F == NAN { 0x7FC0 } else { to_bf16(from_e4m3(code) * scale) };
        value.to_le_bytes()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: impl IntoIterator<Item = u16>) -> Vec<u8> {
        values.into_iter().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn codes_are_e4m3s() {
        for (value, code) in [
            (0.0, 0x00),
            (1.0, 0x38),
            (-1.0, 0xB8),
            (448.0, 0x7E),
            (1e9, 0x7E),
            (f32::NEG_INFINITY, 0xFE),
            (0.015625, 0x08),
            (0.001953125, 0x01),
            // Half a step: to even.
            (0.0009765625, 0x00),
            (0.0029296875, 0x02),
            (1.0625, 0x38),
            (1.1875, 0x3A),
        ] {
            assert_eq!(to_e4m3(value), code, "{value}");
        }
        assert_eq!((to_e4m3(f32::NAN), to_e4m3(-f32::NAN)), (NAN, NAN));
        for code in (0u8..=0xFF).filter(|code| code & 0x7F != NAN) {
            assert_eq!(to_e4m3(from_e4m3(code)), code);
        }
        assert!(from_e4m3(NAN).is_nan());
    }

    #[test]
    fn every_bf16_value_survives_the_way_through_f32() {
        for bits in 0..=u16::MAX {
            if !from_bf16(bits).is_nan() {
                assert_eq!(to_bf16(from_bf16(bits)), bits);
            }
        }
        // Ties to even.
        assert_eq!(to_bf16(f32::from_bits(0x3F80_8000)), 0x3F80);
        assert_eq!(to_bf16(f32::from_bits(0x3F81_8000)), 0x3F82);
    }

    #[test]
    fn all_ways_to_pack_a_segment_make_the_same_bits() {
        let values: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).collect();
        for segment in values.chunks(1009) {
            let (mut one, mut other) = (vec![0; segment.len()], vec![0; segment.len()]);
            let scales = (pack_segment(segment, &mut one), pack_segment_plainly(segment, &mut other));
            assert_eq!(scales.0.to_bits(), scales.1.to_bits());
            assert!(one == other);
        }
    }

    #[test]
    fn what_was_unpacked_packs_to_the_same_bytes() {
        // All bf16 values in segments of many sizes; each with a largest one from the smallest to the largest there is.
        for segment in [1, 2, 7, 128, 4096] {
            for most in (0u16..0x7F80).step_by(if segment > 100 { 613 } else { 7 }) {
                let spread = (0..segment as u32 * 2).map(|i| {
                    let sign = (i as u16 & 1) << 15;
                    sign | (most as u32 * (i % segment as u32) / segment as u32) as u16
                });
                let mut values: Vec<u16> = spread.collect();
                values[0] = most;
                there_and_back(&bytes(values), segment);
            }
        }
        there_and_back(&bytes(0..=u16::MAX), 64);
        there_and_back(&bytes([0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x8000, 0x0000]), 6);
        there_and_back(&bytes([0x7F80, 0x7F7F, 0xFF80, 0x0001]), 4);
    }

    fn there_and_back(values: &[u8], segment: usize) {
        let (mut packed, mut again, mut back) = (Vec::new(), Vec::new(), vec![0; values.len()]);
        pack(values, segment, &mut packed);
        check(&packed, segment).unwrap();
        unpack(&packed, segment, &mut back);
        pack(&back, segment, &mut again);
        assert!(packed == again, "segments of {segment}: {:x?}", &values[..8.min(values.len())]);
    }

    #[test]
    fn scales_that_nobody_makes_are_found() {
        let mut packed = Vec::new();
        pack(&bytes([0x3F80; 12]), 4, &mut packed);
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, LARGEST_SCALE * 1.001] {
            let mut bad = packed.clone();
            bad[12 + 2 * SCALE..].copy_from_slice(&scale.to_le_bytes());
            let found = check(&bad, 4).unwrap_err();
            assert_eq!((found.segment, found.scale.to_bits()), (2, scale.to_bits()));
        }
        let mut largest = Vec::new();
        pack(&bytes([0x7F7F]), 1, &mut largest);
        check(&largest, 1).unwrap();
        let mut values = [0; 2];
        unpack(&largest, 1, &mut values);
        assert_eq!(values, 0x7F7Fu16.to_le_bytes());
    }
}
