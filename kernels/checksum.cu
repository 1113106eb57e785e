// XXH3-64 of contiguous blocks, the checksum that travels with them.
//
// XXH3 takes its input in stretches of 1 KiB. Within one, what the bytes add to the eight accumulators is a sum, in
// any order; between two, the accumulators are scrambled, which is a chain. So `xxh3_sums` makes the sums of all
// stretches at once, at the speed of the memory, and `xxh3_fold` walks the chain with eight threads for a block: 64
// bytes for each KiB, all blocks side by side.
//
// Blocks are at least 241 bytes (shorter input is hashed in another way), each aligned to 16.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 STRETCH = 1024;
constexpr u32 STRIPE = 64;

constexpr u64 PRIME32_1 = 0x9E3779B1ull;
constexpr u64 PRIME32_2 = 0x85EBCA77ull;
constexpr u64 PRIME32_3 = 0xC2B2AE3Dull;
constexpr u64 PRIME64_1 = 0x9E3779B185EBCA87ull;
constexpr u64 PRIME64_2 = 0xC2B2AE3D27D4EB4Full;
constexpr u64 PRIME64_3 = 0x165667B19E3779F9ull;
constexpr u64 PRIME64_4 = 0x85EBCA77C2B2AE63ull;
constexpr u64 PRIME64_5 = 0x27D4EB2F165667C5ull;

// XXH3's default secret, as little-endian words.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

// Eight bytes of the secret, from any byte on.
__device__ __forceinline__ u64 secret_at(u32 byte) {
    const u32 word = byte / 8;
    const u32 bits = byte % 8 * 8;
    return bits == 0 ? SECRET[word] : SECRET[word] >> bits | SECRET[word + 1] << (64 - bits);
}

__device__ __forceinline__ u64 keyed_product(u64 data, u64 secret) {
    const u64 keyed = data ^ secret;
    return (keyed & 0xFFFFFFFFull) * (keyed >> 32);
}

// What each stretch of 1 KiB adds to the accumulators: sums[block][stretch][8]. A warp takes a stretch, 16 bytes a
// thread and half. Grid: x covers `stretches` by warps, y the blocks. Blocks of threads are whole warps.
extern "C" __global__ void xxh3_sums(const u8* data, u64 stride, u32 stretches, ulonglong2* sums) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const u32 warps = gridDim.x * blockDim.x / 32;
    const ulonglong2* block = reinterpret_cast<const ulonglong2*>(data + blockIdx.y * stride);
    ulonglong2* out = sums + (u64)blockIdx.y * stretches * 4;

    // A thread has two neighbouring accumulators of one stripe in the first half, and of one in the second.
    const u32 stripe = lane / 4;
    const u32 pair = lane % 4 * 2;
    const u64 secret[4] = {SECRET[stripe + pair], SECRET[stripe + pair + 1], SECRET[stripe + 8 + pair],
                           SECRET[stripe + 8 + pair + 1]};
    for (u32 stretch = warp; stretch < stretches; stretch += warps) {
        const ulonglong2 a = block[(u64)stretch * 64 + lane];
        const ulonglong2 b = block[(u64)stretch * 64 + 32 + lane];
        u64 even = keyed_product(a.x, secret[0]) + a.y + keyed_product(b.x, secret[2]) + b.y;
        u64 odd = keyed_product(a.y, secret[1]) + a.x + keyed_product(b.y, secret[3]) + b.x;
#pragma unroll
        for (u32 apart = 4; apart < 32; apart *= 2) {
            even += __shfl_xor_sync(0xFFFFFFFFu, even, apart);
            odd += __shfl_xor_sync(0xFFFFFFFFu, odd, apart);
        }
        if (lane < 4) {
            out[(u64)stretch * 4 + lane] = make_ulonglong2(even, odd);
        }
    }
}

__device__ __forceinline__ u64 scramble(u64 acc, u64 secret) {
    return ((acc ^ acc >> 47) ^ secret) * PRIME32_1;
}

// Eight bytes from anywhere.
__device__ __forceinline__ u64 read_bytes(const u8* at) {
    u64 value = 0;
    for (u32 i = 0; i < 8; i++) {
        value |= (u64)at[i] << (8 * i);
    }
    return value;
}

// What a stripe adds to accumulator `i`.
__device__ __forceinline__ u64 of_stripe(const u8* stripe, u32 i, u64 secret) {
    return keyed_product(read_bytes(stripe + 8 * i), secret) + read_bytes(stripe + 8 * (i ^ 1));
}

__device__ __forceinline__ u64 fold128(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

// Sums to accumulators ahead of the chain.
constexpr u32 AHEAD = 16;

// The checksum of each block, from its sums and its last bytes. Eight threads a block; `blocks` in all. Blocks of
// threads are whole warps.
extern "C" __global__ void xxh3_fold(const u8* data, u64 stride, u64 len, u32 stretches, const u64* sums, u32 blocks,
                                     u64* checksums) {
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 i = thread % 8;
    const u32 wanted = thread / 8;
    // All threads of a warp take part in the shuffles below; those without a block repeat the last one's.
    const u32 index = wanted < blocks ? wanted : blocks - 1;
    const u8* block = data + index * stride;
    const u64* mine = sums + (u64)index * stretches * 8 + i;

    const u64 initial[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    u64 acc = 0;
#pragma unroll
    for (u32 k = 0; k < 8; k++) {
        acc = i == k ? initial[k] : acc;
    }

    const u64 key = SECRET[16 + i];
    u32 stretch = 0;
    u64 now[AHEAD];
    if (stretches >= AHEAD) {
#pragma unroll
        for (u32 k = 0; k < AHEAD; k++) {
            now[k] = mine[k * 8];
        }
        for (; stretch + AHEAD <= stretches; stretch += AHEAD) {
            u64 next[AHEAD];
            const bool more = stretch + 2 * AHEAD <= stretches;
#pragma unroll
            for (u32 k = 0; k < AHEAD; k++) {
                next[k] = more ? mine[(u64)(stretch + AHEAD + k) * 8] : 0;
            }
#pragma unroll
            for (u32 k = 0; k < AHEAD; k++) {
                acc = scramble(acc + now[k], key);
                now[k] = next[k];
            }
        }
    }
    for (; stretch < stretches; stretch++) {
        acc = scramble(acc + mine[(u64)stretch * 8], key);
    }

    // Whole stripes behind the last stretch, and the last 64 bytes once more with another part of the secret.
    const u32 rest = (u32)(len - 1 - (u64)stretches * STRETCH);
    const u8* tail = block + (u64)stretches * STRETCH;
    for (u32 stripe = 0; stripe < rest / STRIPE; stripe++) {
        acc += of_stripe(tail + stripe * STRIPE, i, SECRET[stripe + i]);
    }
    acc += of_stripe(block + len - STRIPE, i, secret_at(192 - STRIPE - 7 + 8 * i));

    const u64 keyed = acc ^ secret_at(11 + 8 * i);
    const u64 other = __shfl_xor_sync(0xFFFFFFFFu, keyed, 1);
    u64 result = fold128(keyed, other);
    result += __shfl_xor_sync(0xFFFFFFFFu, result, 2);
    result += __shfl_xor_sync(0xFFFFFFFFu, result, 4);
    result += len * PRIME64_1;
    result ^= result >> 37;
    result *= 0x165667919E3779F9ull;
    result ^= result >> 32;
    if (i == 0 && wanted < blocks) {
        checksums[wanted] = result;
    }
}
