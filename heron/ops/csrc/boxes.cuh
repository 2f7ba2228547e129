// Boxes of matrices that the copy engine brings, and products of them by warpgroups, on compute capability 9.0.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "barriers.cuh"

namespace {

constexpr int kBoxBytes = 128;  // of a row of a box, the width of the swizzle

// A multiple of 1024, where the swizzle begins.
__device__ __forceinline__ unsigned char* memory_of_boxes() {
    extern __shared__ unsigned char shared[];
    return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

// A box of `map` to `to`, from `column` of `row` on; zeros beyond the matrix. `barrier` counts its bytes.
__device__ __forceinline__ void bring(void* to, const CUtensorMap& map, int column, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Rows of 128 bytes in shared memory, as the copy engine leaves them: eight are 1024 bytes, 64 times 16 (from bit 32
// on), and their pieces are swizzled by 128 bytes (bit 62).
__device__ __forceinline__ unsigned long long descriptor(const void* rows) {
    return (shared_address(rows) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_multiplying() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until what this warpgroup multiplies is there, but the latest `but` groups.
template <int but>
__device__ __forceinline__ void multiplied() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(but) : "memory");
}

// Describe a matrix of 16-bit numbers whose rows begin `stride` numbers apart, to be read or written in boxes of
// `box_rows` rows of 128 bytes. What came of it: 0 is success, -1 that the driver is too old.
inline int describe(CUtensorMap& map, const void* first, bool in_half, int64_t rows, int64_t columns, int64_t stride,
                    int box_rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    if (encode == nullptr) return -1;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
    const cuuint32_t box[] = {kBoxBytes / 2, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    return encode(&map, in_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                  const_cast<void*>(first), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace
