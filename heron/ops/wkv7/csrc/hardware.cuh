// Every instruction and built-in of the GPU that the kernels use beyond plain C++. tests/ops/emulator/hardware.h has the
// same names for a CPU, so that the kernels' logic runs and is tested without a device.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) { return __float2half_rn(x); }

// Two bf16 in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float low_half(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_half(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit values; lane l gives the row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(row)) : "memory");
}
// The transpose of an 8 x 8 matrix of 16-bit values that a warp holds as a fragment.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}
// The inverses.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&d)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(shared_address(row)), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t to = __shfl_sync(0xffffffffu, shared_address(row), 8 * i + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(to), "r"(d[i]) : "memory");
  }
#endif
}
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&d)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(shared_address(row)), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
#else
  const uint32_t transposed[4] = {transpose_matrix(d[0]), transpose_matrix(d[1]), transpose_matrix(d[2]), transpose_matrix(d[3])};
  store_matrices(row, transposed);
#endif
}
// c += a b: 16 x 8 in fp32, from 16 x 16 and 16 x 8 in bf16.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same 8 deep.
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HERON_WARPGROUPS  // four warps in a row, the first a multiple of four, multiply together

// What a warpgroup reads of `tile`, which has rows of 128 bytes whose 16-byte pieces are permuted by the row: the low half of
// its descriptor, in which a step of 16 bytes counts 1. The high half says that eight rows, 1,024 bytes, lie behind one another.
__device__ __forceinline__ uint32_t matrix_descriptor(const void* tile) { return shared_address(tile) >> 4 | 1 << 16; }
// c += a b for 64 rows, of which each warp has 16, in the registers that multiply_add has them in: 16 x 16 of a in
// registers, 32 or 64 columns of b in shared memory, stored by columns or by depth; not `adds`: c = a b.
// Between start_products and commit_products.
template <bool by_depth, bool adds>
__device__ __forceinline__ void multiply_add_32(float (*c)[4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .pred add;\n .reg .b64 b;\n setp.ne.b32 add, %22, 0;\n mov.b64 b, {%20, 0x40000040};\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, b, add, 1, 1, %21;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(by_depth), "n"(adds));
}
template <bool by_depth, bool adds>
__device__ __forceinline__ void multiply_add_64(float (*c)[4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .pred add;\n .reg .b64 b;\n setp.ne.b32 add, %38, 0;\n mov.b64 b, {%36, 0x40000040};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, b, add, 1, 1, %37;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(by_depth), "n"(adds));
}
__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#endif
// Until what this warpgroup multiplies is there.
__device__ __forceinline__ void wait_for_products() {
#ifdef HERON_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}
// What this thread has written to shared memory, or has seen copied to it, is there for warpgroups behind the next barrier.
__device__ __forceinline__ void show_to_warpgroups() {
#ifdef HERON_WARPGROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// 16 bytes.
struct alignas(16) Piece { uint32_t words[4]; };

// Store if `wanted`, without a branch, to global memory that the kernel does not read.
__device__ __forceinline__ void store_if(bool wanted, void* to, uint32_t word) {
  asm volatile("{.reg .pred wanted;\n setp.ne.b32 wanted, %0, 0;\n @wanted st.global.b32 [%1], %2;}"
               :: "r"(int(wanted)), "l"(to), "r"(word));
}
__device__ __forceinline__ void store_if(bool wanted, void* to, const Piece& piece) {
  asm volatile("{.reg .pred wanted;\n setp.ne.b32 wanted, %0, 0;\n @wanted st.global.v4.b32 [%1], {%2, %3, %4, %5};}"
               :: "r"(int(wanted)), "l"(to), "r"(piece.words[0]), "r"(piece.words[1]), "r"(piece.words[2]), "r"(piece.words[3]));
}

// 16 bytes from global to shared memory in the background; zeros where not `valid`, whatever the address.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's latest groups are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HERON_TILE_COPIES  // one thread copies whole tiles, and Arrivals tells when they are there
#endif
// A bf16 tensor (rows, tokens, heads, size), to copy 64 columns of 32 tokens of a head from: they come as rows of 128 bytes whose
// 16-byte pieces are permuted by the row.
using TileMap = CUtensorMap;
// Bytes on their way to shared memory.
using Arrivals = uint64_t;

__device__ __forceinline__ void init_arrivals(Arrivals& arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;\n fence.proxy.async.shared::cta;" :: "r"(shared_address(&arrivals)) : "memory");
}
// Of a turn that ends when they are there; ask for them behind it.
__device__ __forceinline__ void expect_bytes(Arrivals& arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(&arrivals)), "r"(bytes) : "memory");
}
// Until the turn is over; `odd` says whether an even number of turns has gone before.
__device__ __forceinline__ void wait_for_bytes(Arrivals& arrivals, bool odd) {
  uint32_t over = 0;
  while (!over) {
    asm volatile("{.reg .pred over;\n mbarrier.try_wait.parity.shared.b64 over, [%1], %2;\n selp.u32 %0, 1, 0, over;}"
                 : "=r"(over) : "r"(shared_address(&arrivals)), "r"(uint32_t(odd)) : "memory");
  }
}
// Tokens that the tensor does not have come as zeros.
__device__ __forceinline__ void copy_tile(void* to, const TileMap& map, int row, int token, int head, int column,
                                          Arrivals& arrivals) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
               :: "r"(shared_address(to)), "l"(&map), "r"(column), "r"(head), "r"(token), "r"(row), "r"(shared_address(&arrivals))
               : "memory");
}
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, Arrivals& arrivals) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&arrivals)) : "memory");
}

__device__ __forceinline__ uint32_t exchange(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
__device__ __forceinline__ float exchange(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The value of lane 0, which the compiler then knows to be one for the whole warp.
__device__ __forceinline__ int of_first_lane(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// 0, as a value that the compiler can't know. Addresses that depend on it are computed where they are used, not kept in
// registers through a whole loop.
__device__ __forceinline__ int unknown_zero() {
  int zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

// Whether kernels copy tiles on the current device. Then describe works in this thread, which may be one of autograd's that has
// no context yet: setting the device gives it one.
inline bool copies_tiles() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9 &&
         cudaSetDevice(device) == cudaSuccess;
}
// Describe the tensor at `first`, with steps in elements; null, or the error in words.
inline const char* describe(TileMap& map, const void* first, int64_t rows, int64_t tokens, int64_t heads, int size,
                            int64_t row_step, int64_t token_step, int64_t head_step) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12";
  const cuuint64_t sizes[4] = {cuuint64_t(size), cuuint64_t(heads), cuuint64_t(tokens), cuuint64_t(rows)};
  const cuuint64_t steps[3] = {cuuint64_t(head_step * 2), cuuint64_t(token_step * 2), cuuint64_t(row_step * 2)};
  const cuuint32_t tile[4] = {64, 1, 32, 1}, dense[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(first), sizes, steps, tile, dense,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  static thread_local char error[64];
  snprintf(error, sizeof error, "cuTensorMapEncodeTiled: error %d of the driver", int(result));
  return result == CUDA_SUCCESS ? nullptr : error;
}

// Queue `kernel` on `stream`; null, or the error in words.
template <typename... Arguments>
const char* launch(void (*kernel)(Arguments...), dim3 grid, int threads, int shared_bytes, void* stream,
                   Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  // As many blocks on a multiprocessor as its shared memory can hold; a kernel that needs little of it keeps the cache.
  if (error == cudaSuccess && shared_bytes > 8 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
