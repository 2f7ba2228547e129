// What products of numbers in e4m3 take: rows of bf16 numbers, rounded, and the transposes of such.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

#ifdef __CUDACC__
// Two numbers of bf16, times `factor`, in e4m3.
__device__ __forceinline__ uint32_t rounded(uint32_t two, float factor) {
    const float2 product{__uint_as_float(two << 16) * factor, __uint_as_float(two & 0xffff0000u) * factor};
    return __nv_cvt_float2_to_fp8x2(product, __NV_SATFINITE, __NV_E4M3);
}

// Four numbers of e4m3 times a power of two up to 1. What that makes smaller than fp16 reaches is 0 in e4m3, too.
__device__ __forceinline__ uint32_t multiplied(uint32_t four, float factor) {
    uint32_t out = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __half2 two(__nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(four >> 16 * i), __NV_E4M3));
        const __half2 product = __hmul2(two, __float2half2_rn(factor));
        out |= static_cast<uint32_t>(__nv_cvt_halfraw2_to_fp8x2(product, __NV_SATFINITE, __NV_E4M3)) << 16 * i;
    }
    return out;
}
#endif

// Rows, each by a warp that holds it.

constexpr int kHeld = 8;  // pieces of 16 bytes of a lane: 2048 numbers of a row

struct alignas(16) Sixteen {
    uint32_t words[4];
};

struct alignas(8) Eight {
    uint32_t words[2];
};

struct Rows {
    const Sixteen* x;  // (n, 8 pieces)
    Eight* out;
    float* scales;  // (n,)
    int64_t n;
    int pieces;  // of a row, up to 32 kHeld
    float smallest;
};

__global__ void __launch_bounds__(kThreads) round_rows(const __grid_constant__ Rows p) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= p.n) return;
    Sixteen held[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (i * 32 + lane < p.pieces) held[i] = p.x[row * p.pieces + i * 32 + lane];
    }
    uint32_t most = 0;  // bits of numbers without sign are in the order of the numbers, NaN behind them
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) most = __vmaxu2(most, held[i].words[j] & 0x7fff7fffu);
    }
    most = __reduce_max_sync(0xffffffffu, most >> 16 > (most & 0xffffu) ? most >> 16 : most & 0xffffu);
    const float largest = __uint_as_float(most << 16);
    const float power = (largest < p.smallest ? p.smallest : largest) * (8.0f / 7.0f);
    const float scale = __uint_as_float(__float_as_uint(power) & 0x7f800000u) / 256.0f, inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (i * 32 + lane < p.pieces) {
            const uint32_t* four = held[i].words;
            p.out[row * p.pieces + i * 32 + lane] =
                Eight{{rounded(four[0], inverse) | rounded(four[1], inverse) << 16,
                      rounded(four[2], inverse) | rounded(four[3], inverse) << 16}};
        }
    }
    if (lane == 0) p.scales[row] = scale;
}

// The transpose, rows multiplied on the way. A block turns 128 x 128 numbers: a thread takes 4 columns of 16 rows into
// registers and leaves each as 16 bytes in shared memory.

constexpr int kRows = 16;               // of a thread
constexpr int kTile = kWarps * kRows;   // rows of a block, and columns
constexpr int kPieces = kTile / kRows;  // of a column

struct Turn {
    const uint8_t* x;      // (n, m); both multiples of 16
    const float* factors;  // (n,); null: 1
    uint8_t* out;          // (m, n)
    int64_t n, m;
};

__global__ void __launch_bounds__(kThreads) turn(const __grid_constant__ Turn p) {
    __shared__ Sixteen columns[kTile * kPieces];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
    const int64_t row = first_row + warp * kRows, column = first_column + lane * 4;
    if (row < p.n && column < p.m) {
        uint32_t rows[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) rows[i] = *reinterpret_cast<const uint32_t*>(p.x + (row + i) * p.m + column);
        if (p.factors != nullptr) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) rows[i] = multiplied(rows[i], p.factors[row + i]);
        }
        Sixteen mine[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // four rows of four bytes become four columns of four
            const uint32_t* four = rows + 4 * i;
            const uint32_t low = __byte_perm(four[0], four[1], 0x5140), lower = __byte_perm(four[2], four[3], 0x5140);
            const uint32_t high = __byte_perm(four[0], four[1], 0x7362), higher = __byte_perm(four[2], four[3], 0x7362);
            mine[0].words[i] = __byte_perm(low, lower, 0x5410);
            mine[1].words[i] = __byte_perm(low, lower, 0x7632);
            mine[2].words[i] = __byte_perm(high, higher, 0x5410);
            mine[3].words[i] = __byte_perm(high, higher, 0x7632);
        }
        // Of 8 lanes, which write at a time, each writes to other banks.
#pragma unroll
        for (int j = 0; j < 4; ++j) columns[(lane * 4 + j) * kPieces + (warp ^ lane % 8)] = mine[j];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile * kPieces / kThreads; ++i) {
        const int index = i * kThreads + thread, mine = index / kPieces, piece = index % kPieces;
        const int64_t to = first_column + mine, from = first_row + piece * kRows;
        if (to < p.m && from < p.n) {
            *reinterpret_cast<Sixteen*>(p.out + to * p.n + from) = columns[mine * kPieces + (piece ^ mine / 4 % 8)];
        }
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

// Sizes and dtypes as heron.ops.fp8_linear makes them.

std::tuple<Tensor, Tensor> run_rows(const Tensor& x, double smallest) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t n = x.size(0), m = x.size(1);
    auto out = empty({n, m}, x, ScalarType::Float8_e4m3fn), scales = empty({n, 1}, x, ScalarType::Float);
    const Rows rows{static_cast<const Sixteen*>(x.const_data_ptr()), static_cast<Eight*>(out.mutable_data_ptr()),
                    static_cast<float*>(scales.mutable_data_ptr()), n, static_cast<int>(m / 8),
                    static_cast<float>(smallest)};
    round_rows<<<static_cast<unsigned>((n + kWarps - 1) / kWarps), kThreads, 0, current_stream()>>>(rows);
    STD_CUDA_CHECK(cudaGetLastError());
    return {out, scales};
}

Tensor run_turn(const Tensor& x, const Optional& factors) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t n = x.size(0), m = x.size(1);
    auto out = empty({m, n}, x);
    const Turn problem{static_cast<const uint8_t*>(x.const_data_ptr()),
                       factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr,
                       static_cast<uint8_t*>(out.mutable_data_ptr()), n, m};
    const auto blocks = [](int64_t size) { return static_cast<unsigned>((size + kTile - 1) / kTile); };
    turn<<<dim3(blocks(m), blocks(n)), kThreads, 0, current_stream()>>>(problem);
    STD_CUDA_CHECK(cudaGetLastError());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("fp8_rows", TORCH_BOX(&run_rows));
    library.impl("fp8_turned", TORCH_BOX(&run_turn));
}
#endif
