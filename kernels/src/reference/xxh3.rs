//! XXH3-64 in the two steps in which the device makes it: sums over stretches of 1 KiB, side by side, and a chain
//! over the sums. See `checksum.cu`.

/// Bytes between two scramblings.
const STRETCH: usize = 1024;
const STRIPE: usize = 64;

/// Shortest input that is hashed in this way, in bytes.
pub const SHORTEST: usize = 241;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

/// XXH3's default secret, as little-endian words.
const SECRET: [u64; 24] = [
    0xbe4b_a423_396c_feb8,
    0x1cad_21f7_2c81_017c,
    0xdb97_9083_e96d_d4de,
    0x1f67_b3b7_a4a4_4072,
    0x78e5_c0cc_4ee6_79cb,
    0x2172_ffcc_7dd0_5a82,
    0x8e24_43f7_7446_08b8,
    0x4c26_3a81_e690_35e0,
    0xcb00_c391_bb52_283c,
    0xa32e_531b_8b65_d088,
    0x4ef9_0da2_9748_6471,
    0xd8ac_dea9_46ef_1938,
    0x3f34_9ce3_3f76_faa8,
    0x1d4f_0bc7_c7bb_dcf9,
    0x3159_b4cd_4be0_518a,
    0x6473_78d9_c97e_9fc8,
    0xc3eb_d334_83ac_c5ea,
    0xeb63_13fa_ffa0_81c5,
    0x49da_f0b7_51dd_0d17,
    0x9e68_d429_2655_16d3,
    0xfca1_477d_58be_162b,
    0xce31_d07a_d1b8_f88f,
    0x2804_1695_8f3a_cb45,
    0x7e40_4bbb_cafb_d7af,
];

/// Eight bytes of the secret, from any byte on.
fn secret_at(byte: usize) -> u64 {
    let (word, bits) = (byte / 8, byte % 8 * 8);
    if bits == 0 { SECRET[word] } else { SECRET[word] >> bits | SECRET[word + 1] << (64 - bits) }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[8 * index..8 * index + 8].try_into().expect("eight bytes"))
}

/// Adds a stripe to the accumulators.
fn add_stripe(acc: &mut [u64; 8], stripe: &[u8], secret: impl Fn(usize) -> u64) {
    for i in 0..8 {
        let data = word(stripe, i);
        let keyed = data ^ secret(i);
        acc[i] = acc[i].wrapping_add((keyed & 0xFFFF_FFFF).wrapping_mul(keyed >> 32));
        acc[i ^ 1] = acc[i ^ 1].wrapping_add(data);
    }
}

/// How many stretches the chain takes of a block of `len` bytes.
pub fn stretches(len: usize) -> usize {
    (len - 1) / STRETCH
}

/// What each stretch adds to the accumulators.
pub fn sums(block: &[u8]) -> Vec<[u64; 8]> {
    let of_stretch = |stretch: &[u8]| {
        let mut sum = [0; 8];
        for (n, stripe) in stretch.chunks_exact(STRIPE).enumerate() {
            add_stripe(&mut sum, stripe, |i| SECRET[n + i]);
        }
        sum
    };
    block.chunks_exact(STRETCH).take(stretches(block.len())).map(of_stretch).collect()
}

/// The checksum, from the sums and the block's last bytes.
pub fn fold(block: &[u8], sums: &[[u64; 8]]) -> u64 {
    let mut acc = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
    for sum in sums {
        for i in 0..8 {
            let value = acc[i].wrapping_add(sum[i]);
            acc[i] = ((value ^ value >> 47) ^ SECRET[16 + i]).wrapping_mul(PRIME32_1);
        }
    }
    let len = block.len();
    let tail = &block[sums.len() * STRETCH..len - 1];
    for (n, stripe) in tail.chunks_exact(STRIPE).enumerate() {
        add_stripe(&mut acc, stripe, |i| SECRET[n + i]);
    }
    add_stripe(&mut acc, &block[len - STRIPE..], |i| secret_at(192 - STRIPE - 7 + 8 * i));

    let mut result = (len as u64).wrapping_mul(PRIME64_1);
    for i in (0..8).step_by(2) {
        let keyed = |i: usize| u128::from(acc[i] ^ secret_at(11 + 8 * i));
        let product = keyed(i) * keyed(i + 1);
        result = result.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    result ^= result >> 37;
    result = result.wrapping_mul(0x1656_6791_9E37_79F9);
    result ^ result >> 32
}

/// The checksum of a block of at least [`SHORTEST`] bytes.
pub fn checksum(block: &[u8]) -> u64 {
    assert!(block.len() >= SHORTEST, "{} bytes are hashed in another way", block.len());
    fold(block, &sums(block))
}
