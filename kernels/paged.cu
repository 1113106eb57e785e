// Gather and scatter: KV blocks as they lie in an engine's cache, to and from contiguous staging buffers.
//
// A block's bytes are the bytes of its spans end to end. A span is two nested strides over rows of contiguous bytes:
// one row where a layer's share of a block lies in one run, rows by (head, token) where heads of other parallelism or
// order are asked for. `DeviceSpan` in src/cuda/launch.rs is the same struct, and `Blocks` there too.
//
// Grid: x covers a span's bytes, y the spans, z the blocks. Every element is read once and written once, so source and
// target may not overlap, and no order between threads matters.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Span {
    u64 base;          // address of the first row of block 0
    u64 block_stride;  // from one block to the next
    u64 outer_stride;
    u64 inner_stride;
    u64 start;         // where the span begins within a staged block
    u32 outer;         // rows are outer * inner
    u32 inner;
    u32 row;           // bytes, a multiple of the element's
    u32 reserved;
};

// Block ids of one launch, passed by value: no copy of them has to be waited for.
struct Blocks {
    u32 ids[64];
};

// Elements that each thread has in flight.
constexpr u32 IN_FLIGHT = 4;

template <typename Element>
__device__ __forceinline__ u64 offset_in_span(const Span& span, u32 at, u32 row_elements) {
    if (span.outer == 1 && span.inner == 1) {
        return (u64)at * sizeof(Element);
    }
    const u32 row = at / row_elements;
    const u32 column = at - row * row_elements;
    const u32 outer = row / span.inner;
    const u32 inner = row - outer * span.inner;
    return outer * span.outer_stride + inner * span.inner_stride + (u64)column * sizeof(Element);
}

template <typename Element, bool TO_STAGING>
__device__ __forceinline__ void move(const Span* spans, const Blocks& blocks, u8* staging, u64 staging_stride) {
    const Span span = spans[blockIdx.y];
    const u32 row_elements = span.row / sizeof(Element);
    const u32 elements = span.outer * span.inner * row_elements;
    const u32 first = blockIdx.x * blockDim.x * IN_FLIGHT + threadIdx.x;
    if (first >= elements) {
        return;
    }
    u8* const paged = reinterpret_cast<u8*>(span.base) + blocks.ids[blockIdx.z] * span.block_stride;
    u8* const staged = staging + blockIdx.z * staging_stride + span.start;

    Element held[IN_FLIGHT];
    u64 offsets[IN_FLIGHT];
#pragma unroll
    for (u32 k = 0; k < IN_FLIGHT; k++) {
        const u32 at = first + k * blockDim.x;
        if (at < elements) {
            offsets[k] = offset_in_span<Element>(span, at, row_elements);
            const Element* source = TO_STAGING ? reinterpret_cast<const Element*>(paged + offsets[k])
                                               : reinterpret_cast<const Element*>(staged) + at;
            // Nobody reads it again: it should not displace what the engine has in the cache.
            held[k] = __ldcs(source);
        }
    }
#pragma unroll
    for (u32 k = 0; k < IN_FLIGHT; k++) {
        const u32 at = first + k * blockDim.x;
        if (at < elements) {
            if (TO_STAGING) {
                reinterpret_cast<Element*>(staged)[at] = held[k];
            } else {
                __stcs(reinterpret_cast<Element*>(paged + offsets[k]), held[k]);
            }
        }
    }
}

#define KERNELS(WIDTH, ELEMENT)                                                                                    \
    extern "C" __global__ void gather_##WIDTH(const Span* spans, const __grid_constant__ Blocks blocks,            \
                                              u8* staging, u64 stride) {                                           \
        move<ELEMENT, true>(spans, blocks, staging, stride);                                                       \
    }                                                                                                              \
    extern "C" __global__ void scatter_##WIDTH(const Span* spans, const __grid_constant__ Blocks blocks,           \
                                               u8* staging, u64 stride) {                                          \
        move<ELEMENT, false>(spans, blocks, staging, stride);                                                      \
    }

// By the bytes of one access. All of vLLM's layouts take 16; the others are for what is not aligned to it.
KERNELS(16, uint4)
KERNELS(4, u32)
KERNELS(1, u8)
