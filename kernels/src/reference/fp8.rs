//! bf16 to fp8 (e4m3) for the wire and back: half the bytes, at a price. Off unless asked for.
//!
//! A *segment* is what shares a scale: one head of one layer's K or V in a block, contiguous in the common order. The
//! scale is its largest finite size over 448, the largest e4m3 value. A packed block is the codes of all segments,
//! then their scales as 32-bit little-endian floats.
//!
//! # Error
//! A value `x` of a segment whose largest size is `m` comes back within `x / 16 + m / 448 / 1024` and one rounding to
//! bf16 (`x / 256`) of what it was: three bits of mantissa for values down to `m / 28672`, and steps of `m / 229376`
//! below. Infinite values come back as `± m`, NaN as NaN.

/// The largest e4m3 value.
const LARGEST: f32 = 448.0;

/// Bytes of a packed block.
pub fn packed_bytes(segments: usize, segment: usize) -> usize {
    segments * segment + segments * 4
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7FC0;
    }
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// To the nearest e4m3 value, ties to even; larger ones become the largest.
fn to_e4m3(value: f32) -> u8 {
    let (sign, size) = ((value.to_bits() >> 24 & 0x80) as u8, value.to_bits() & 0x7FFF_FFFF);
    let code = match f32::from_bits(size) {
        size if size.is_nan() => 0x7F,
        small if small < 0.015625 => (small * 512.0).round_ties_even() as u8,
        large if large >= LARGEST => 0x7E,
        _ => (((size + 0x7_FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)) as u8,
    };
    sign | code
}

fn from_e4m3(code: u8) -> f32 {
    let size = u32::from(code & 0x7F);
    let value = match size {
        0x7F => f32::NAN,
        0..8 => size as f32 / 512.0,
        _ => f32::from_bits((size << 20) + (120 << 23)),
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// Packs a block of bf16 values, `segment` to a scale.
pub fn pack(block: &[u16], segment: usize) -> Vec<u8> {
    let mut packed = Vec::with_capacity(packed_bytes(block.len() / segment, segment));
    let mut scales = Vec::new();
    for values in block.chunks_exact(segment) {
        let sizes = values.iter().map(|bits| from_bf16(bits & 0x7FFF)).filter(|size| size.is_finite());
        let most = sizes.fold(0.0f32, f32::max);
        let scale = if most > 0.0 { most / LARGEST } else { 1.0 };
        packed.extend(values.iter().map(|bits| to_e4m3(from_bf16(*bits) / scale)));
        scales.extend(scale.to_le_bytes());
    }
    packed.extend(scales);
    packed
}

/// The reverse of [`pack`], within the error above.
pub fn unpack(packed: &[u8], segment: usize) -> Vec<u16> {
    let segments = packed.len() / (segment + 4);
    let (codes, scales) = packed.split_at(segments * segment);
    let (scales, _) = scales.as_chunks::<4>();
    let of_segment = |(codes, scale): (&[u8], &[u8; 4])| {
        let scale = f32::from_le_bytes(*scale);
        codes.iter().map(|code| to_bf16(from_e4m3(*code) * scale)).collect::<Vec<_>>()
    };
    codes.chunks_exact(segment).zip(scales).flat_map(of_segment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(to_e4m3(f32::NAN) & 0x7F, 0x7F);
        for code in (0u8..=0xFF).filter(|code| code & 0x7F != 0x7F) {
            assert_eq!(to_e4m3(from_e4m3(code)), code);
        }
        assert!(from_e4m3(0x7F).is_nan());
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
}
