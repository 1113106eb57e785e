// bf16 to fp8 (e4m3) for the wire and back, with one scale for each segment.
//
// A segment is a run of values that share a scale: one head of one layer in a block. What is packed is a run of segments,
// as a head has them: the codes of all of them, then their scales (32-bit floats). src/reference/fp8.rs does the same, to
// the bit, and says how far the result may be off.
//
// Grid: x the segments of a run, y the runs. Blocks of threads are whole warps, at most 32 of them.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr float LARGEST = 448.0f;
// 2^-100: below it a segment counts as zeros.
constexpr float SMALLEST = 7.888609052210118e-31f;

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// To the nearest bf16, ties to even.
__device__ __forceinline__ u16 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return 0x7FC0;
    }
    return (u16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// To the nearest e4m3 value, ties to even; larger ones become the largest. sm_80 has no instruction for it.
__device__ __forceinline__ u8 to_e4m3(float value) {
    const u32 bits = __float_as_uint(value);
    const u32 sign = bits >> 24 & 0x80;
    const u32 size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) {
        return 0x7F;
    }
    u32 code;
    if (size < 0x3C800000u) {
        // Below 2^-6 codes count steps of 2^-9.
        code = (u32)__float2int_rn(__fmul_rn(__uint_as_float(size), 512.0f));
    } else if (size >= 0x43E00000u) {
        code = 0x7E;
    } else {
        code = ((size + 0x7FFFFu + (size >> 20 & 1)) >> 20) - (120u << 3);
    }
    return (u8)(sign | code);
}

__device__ __forceinline__ float from_e4m3(u8 code) {
    const u32 sign = (u32)(code & 0x80) << 24;
    const u32 size = code & 0x7F;
    if (size == 0x7F) {
        return __uint_as_float(sign | 0x7FC00000u);
    }
    const float value =
        size < 8 ? __fmul_rn((float)size, 0.001953125f) : __uint_as_float((size << 20) + (120u << 23));
    return __uint_as_float(__float_as_uint(value) | sign);
}

// Infinite values and NaNs take no part in the choice of a scale.
__device__ __forceinline__ float finite_size(u16 bits) {
    const u32 size = bits & 0x7FFF;
    return size < 0x7F80 ? from_bf16((u16)size) : 0.0f;
}

extern "C" __global__ void fp8_pack(const u8* blocks, u64 stride, u32 segment, u8* packed, u64 packed_stride) {
    __shared__ float largest[32];
    const u32 segments = gridDim.x;
    const u16* values = reinterpret_cast<const u16*>(blocks + blockIdx.y * stride) + (u64)blockIdx.x * segment;
    u8* out = packed + blockIdx.y * packed_stride;

    float most = 0.0f;
    for (u32 at = threadIdx.x; at < segment; at += blockDim.x) {
        most = fmaxf(most, finite_size(values[at]));
    }
    for (u32 apart = 16; apart > 0; apart /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
    }
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = most;
    }
    __syncthreads();
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) {
        most = fmaxf(most, largest[warp]);
    }

    const float scale = most >= SMALLEST ? __fdiv_rn(most, LARGEST) : 1.0f;
    for (u32 at = threadIdx.x; at < segment; at += blockDim.x) {
        out[(u64)blockIdx.x * segment + at] = to_e4m3(__fdiv_rn(from_bf16(values[at]), scale));
    }
    if (threadIdx.x < 4) {
        // Codes of any number may come before it: a scale need not be aligned.
        out[(u64)segments * segment + blockIdx.x * 4 + threadIdx.x] =
            (u8)(__float_as_uint(scale) >> (8 * threadIdx.x));
    }
}

extern "C" __global__ void fp8_unpack(const u8* packed, u64 packed_stride, u32 segment, u8* blocks, u64 stride) {
    const u32 segments = gridDim.x;
    const u8* in = packed + blockIdx.y * packed_stride;
    u16* values = reinterpret_cast<u16*>(blocks + blockIdx.y * stride) + (u64)blockIdx.x * segment;
    const u8* bytes = in + (u64)segments * segment + blockIdx.x * 4;
    const float scale = __uint_as_float(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (u32)bytes[3] << 24);
    for (u32 at = threadIdx.x; at < segment; at += blockDim.x) {
        values[at] = to_bf16(__fmul_rn(from_e4m3(in[(u64)blockIdx.x * segment + at]), scale));
    }
}
