// Boxes of matrices that the copy engine brings to shared memory, and the tensor cores read there (wgmma), on compute
// capability 9.0.
#pragma once

#include <cuda.h>

namespace {

using Barrier = unsigned long long;

__device__ __forceinline__ unsigned char* stages_memory() {
    extern __shared__ unsigned char shared[];
    return shared + (1024 - static_cast<unsigned>(__cvta_generic_to_shared(shared)) % 1024) % 1024;
}

__device__ __forceinline__ unsigned shared_address(const void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The copy engine sees the barriers that this thread has made.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the barrier has been passed `round` + 1 times, of which all but the last are known.
__device__ __forceinline__ void await(Barrier* barrier, int round) {
    unsigned done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(round % 2)
            : "memory");
    }
}

// A box of `map`, from number `k` of `row` on, to `to`; zeros beyond the matrix. `barrier` counts its bytes.
__device__ __forceinline__ void bring(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Rows of 128 bytes in shared memory, as the copy engine leaves them: eight are 1024 bytes, 64 times 16 (from bit 32 on), and
// their pieces are swizzled by 128 bytes (bit 62).
__device__ __forceinline__ unsigned long long descriptor(const void* rows) {
    return (shared_address(rows) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Until all threads of the cluster are here; what they have written then can be read.
__device__ __forceinline__ void sync_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

}  // namespace
