// What the hardware does for token_step.cu.
#pragma once

namespace {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared[];
    return shared;
}

__device__ __forceinline__ void put(Tagged* to, unsigned bits, unsigned tag) {
    const auto both = static_cast<unsigned long long>(tag) << 32 | bits;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(both) : "memory");
}
__device__ __forceinline__ void look_at_two(const Tagged* from, Tagged& a, Tagged& b) {
    unsigned long long first, second;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from) : "memory");
    a = {static_cast<unsigned>(first), static_cast<unsigned>(first >> 32)};
    b = {static_cast<unsigned>(second), static_cast<unsigned>(second >> 32)};
}

// Copy to shared memory in the background what is read once: it is the first to leave the L2 cache.
__device__ __forceinline__ void bring(void* to, const void* from, int bytes, Barrier* barrier) {
    unsigned long long once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(once)
        : "memory");
}

// NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
// 1 / x, off by one in the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Barriers of the threads that multiply, and of those of a head.
__device__ __forceinline__ void sync_multiplying() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiply) : "memory"); }
__device__ __forceinline__ void sync_head() { asm volatile("bar.sync 2, %0;" ::"n"(2 * kHead) : "memory"); }

// c += a b: 16 x 8 in fp32, from 16 x 16 and 16 x 8. Lane 4 g + t has a0 and a2 of a's row g, a1 and a3 of its row
// g + 8, all of b's column g, and of c's rows g and g + 8 columns 2 t and 2 t + 1.
template <typename T>
__device__ __forceinline__ void multiply_floats(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                unsigned b0, unsigned b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}
// c += a b of bytes: 16 x 8 from 16 x 32 and 32 x 8, by lanes as above.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                               unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The warps that multiply take registers over from the others; together they have 168 for each thread.
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 208;"); }
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 88;"); }

// The last block to come here ends the step.
__device__ __forceinline__ void end_step(unsigned* counters) {
    if (threadIdx.x == 0 && atomicAdd(counters + 1, 1u) == gridDim.x - 1) ++counters[0], counters[1] = 0;
}

}  // namespace
