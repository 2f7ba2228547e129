// Products of matrices with one vector each, several in one launch: a warp for a row of a matrix, which is read once, or
// several warps for a long one.
//
// A lane holds the next kAhead pieces of 16 bytes of its row in registers and asks for another as it uses one, so that a
// multiprocessor has tens of KiB under way. The first ones are asked for before the kernel that computes the vectors has
// ended (programmatic dependent launch, from compute capability 9.0 on): the weights do not depend on it.
//
// A matrix may be of codes (heron/ops/codes.py): then a piece is 16 codes of 8 bits or 32 of 4, of one group, and its sum
// is multiplied by the group's scale. Vectors and what follows the product stay in their dtype.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <algorithm>

#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/products.cuh"

namespace {

constexpr int kWarps = 8;     // of a block
constexpr int kAhead = 8;     // pieces that a lane waits for
constexpr int kProducts = 8;  // of a launch
constexpr int kGroup = 64;    // codes that share a scale
constexpr int kRun = 8;       // codes of 4 bits in a piece that are of neighbours, in each quarter of their group
constexpr unsigned kAll = 0xffffffffu;

// y = add + factor activation(weight x)
struct Product {
    const void *x, *weight, *factor, *add;  // the last two may be null
    const uint16_t* scales;                 // bf16, of a weight of codes; else null
    const void* levels;                     // 16 int8, which codes of 4 bits stand for; null: they have 8
    void* y;
    int64_t stride;  // of the weight's rows, in elements
    int in, out, activation;
    int warps;  // of a row
    int first_block;
};

// As many for a row of `bytes` as hold it at once, if a block has them.
inline int warps_of(int64_t bytes) {
    int warps = 1;
    while (warps < kWarps && 32 * 16 * kAhead * warps < bytes) warps *= 2;
    return warps;
}
inline int blocks_of(int64_t rows, int warps) { return static_cast<int>((rows * warps + kWarps - 1) / kWarps); }

struct Products {
    Product of[kProducts];
    int n;
};

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}
#endif

// Adds the products of the numbers in two words to two sums.
template <typename T>
__device__ __forceinline__ void multiply_add(unsigned a, unsigned b, float (&sums)[2]) {
    if constexpr (sizeof(T) == 4) {
        sums[0] += __uint_as_float(a) * __uint_as_float(b);
    } else {
        T x[2], y[2];
        memcpy(x, &a, sizeof a);
        memcpy(y, &b, sizeof b);
        sums[0] += static_cast<float>(x[0]) * static_cast<float>(y[0]);
        sums[1] += static_cast<float>(x[1]) * static_cast<float>(y[1]);
    }
}

constexpr unsigned kBias = 0x80808080u;  // makes of four int8 their sums with 128

// One of four int8 with that bias. It becomes a float as the last bits of 2^23, which is subtracted again: exact, and
// faster than a conversion.
__device__ __forceinline__ float number(unsigned biased, int which) {
    return __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650u + which)) - (8388608.0f + 128.0f);
}

// Adds the products of four codes of 8 bits and the numbers in sizeof(T) words to two sums.
template <typename T>
__device__ __forceinline__ void multiply_add_codes(unsigned codes, const unsigned* words, float (&sums)[2]) {
    T x[4];
    memcpy(x, words, sizeof x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i % 2] += number(codes ^ kBias, i) * static_cast<float>(x[i]);
}

// What the four codes of 4 bits in half a word stand for, an int8 each: the last three bits of a code choose from either
// half of the levels, the first one chooses the half.
__device__ __forceinline__ unsigned looked_up(const Piece& levels, unsigned codes) {
    const unsigned in_half = codes & 0x7777u, halves = codes >> 1 & 0x4444u | 0x3210u;
    const unsigned lower = __byte_perm(levels.words[0], levels.words[1], in_half);
    const unsigned upper = __byte_perm(levels.words[2], levels.words[3], in_half);
    return __byte_perm(lower, upper, halves);
}

// The sum of the products of a piece of codes of 4 bits, with levels that have the bias, and of kRun numbers for each
// quarter of its group.
template <typename T, typename Run>
__device__ __forceinline__ float multiplied(const Piece& codes, const Piece& levels, const Run& run) {
    unsigned found[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) found[i] = looked_up(levels, codes.words[i / 2] >> 16 * (i % 2));
    float sums[2] = {};
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
        T x[kRun];
        run(quarter, x);
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[i % 2] += number(found[i], quarter) * static_cast<float>(x[i]);
    }
    return sums[0] + sums[1];
}

// kBits: of a code; 0: the weight is no codes.
template <typename T, int kBits>
__device__ __forceinline__ void compute(const Product& p, float* of_warp) {
    constexpr int kSize = static_cast<int>(sizeof(T));
    constexpr int kElement = kBits == 8 ? 1 : kBits == 4 ? 2 : kSize;        // bytes of what `stride` counts
    constexpr int kNumbers = kBits ? 128 / kBits : 16 / kSize;               // of a piece
    constexpr int kVectors = kNumbers * kSize / 16;                          // pieces of the vector for one of the weight
    constexpr int kPiecesOfRun = kRun * kSize / 16;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int row = ((static_cast<int>(blockIdx.x) - p.first_block) * kWarps + warp) / p.warps;
    const int first = warp % p.warps * 32 + lane, step = 32 * p.warps, pieces = p.in / kNumbers;
    const bool is_there = row < p.out;
    const auto* weight =
        reinterpret_cast<const Piece*>(static_cast<const char*>(p.weight) + (is_there ? row : 0) * p.stride * kElement);
    const uint16_t* scales = p.scales + (is_there ? row : 0) * (p.in / kGroup);
    Piece held[kAhead];
    unsigned scale[kAhead];
    const auto ask = [&](int j, int at) {
        if (at >= pieces) return;
        held[j] = streamed(weight + at);
        if constexpr (kBits) scale[j] = scales[at / (kGroup / kNumbers)];
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) ask(j, first + step * j);
    Piece levels{};
    if constexpr (kBits == 4) {
        levels = *static_cast<const Piece*>(p.levels);
#pragma unroll
        for (unsigned& word : levels.words) word ^= kBias;
    }
    wait_for_inputs();
    auto* x = reinterpret_cast<Piece*>(shared_memory());
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < pieces * kVectors; i += 32 * kWarps) {
        // Of those for one piece of the weight, all first ones, then all second ones: lanes read from different banks.
        int of = i / kVectors, which = i % kVectors;
        if constexpr (kBits == 4) {  // a group is two pieces, which share its quarters run by run
            const int run = i / kPiecesOfRun;
            of = run / 8 * 2 + run % 2, which = run / 2 % 4 * kPiecesOfRun + i % kPiecesOfRun;
        }
        x[which * pieces + of] = static_cast<const Piece*>(p.x)[i];
    }
    const bool writes = is_there && first == 0;
    const float factor = writes && p.factor ? static_cast<float>(static_cast<const T*>(p.factor)[row]) : 1.0f;
    const float add = writes && p.add ? static_cast<float>(static_cast<const T*>(p.add)[row]) : 0.0f;
    __syncthreads();
    float sums[2][2] = {};
    for (int begin = first; begin < pieces; begin += step * kAhead) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int at = begin + step * j;
            if (at < pieces) {
                const float by = kBits ? __uint_as_float(scale[j] << 16) : 1.0f;
                if constexpr (kBits == 4) {
                    sums[0][0] += by * multiplied<T>(held[j], levels, [&](int quarter, T(&run)[kRun]) {
                        Piece u[kPiecesOfRun];
#pragma unroll
                        for (int i = 0; i < kPiecesOfRun; ++i) u[i] = x[(quarter * kPiecesOfRun + i) * pieces + at];
                        memcpy(run, u, sizeof u);
                    });
                } else if constexpr (kBits == 8) {
                    Piece u[kVectors];
                    float of_piece[2][2] = {};
#pragma unroll
                    for (int i = 0; i < kVectors; ++i) u[i] = x[i * pieces + at];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        multiply_add_codes<T>(held[j].words[i], u[i * kVectors / 4].words + i * kVectors % 4, of_piece[i % 2]);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) sums[0][i] += by * (of_piece[0][i] + of_piece[1][i]);
                } else {
                    const Piece u = x[at];
#pragma unroll
                    for (int i = 0; i < 4; ++i) multiply_add<T>(held[j].words[i], u.words[i], sums[i % 2]);
                }
            }
            ask(j, at + step * kAhead);
        }
    }
    float sum = (sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    if (p.warps > 1) {
        if (lane == 0) of_warp[warp] = sum;
        __syncthreads();
        for (int i = 1; i < p.warps && writes; ++i) sum += of_warp[warp + i];
    }
    if (writes) static_cast<T*>(p.y)[row] = static_cast<T>(add + factor * activated(sum, p.activation));
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 24 / kWarps) matvec(const __grid_constant__ Products products) {
    __shared__ float of_warp[kWarps];
    int which = 0;
    while (which + 1 < products.n && static_cast<int>(blockIdx.x) >= products.of[which + 1].first_block) ++which;
    const Product& p = products.of[which];
    if (p.levels)
        compute<T, 4>(p, of_warp);
    else if (p.scales)
        compute<T, 8>(p, of_warp);
    else
        compute<T, 0>(p, of_warp);
}

}  // namespace

#ifdef __CUDACC__
namespace {

// Of shared memory for a vector, beside the sums of warps, without asking for it.
constexpr int kFreeBytes = 48 * 1024 - kWarps * static_cast<int>(sizeof(float));

// Shapes, dtypes and alignment as heron.ops.matvec says, and checks. Weights with scales are codes, of 4 bits with levels.
Tensors run(const Tensors& xs, const Tensors& weights, const Optionals& scales, const Optionals& levels,
            const std::vector<int64_t>& activations, const Optionals& factors, const Optionals& adds) {
    const Tensor& first = xs[0];
    const DeviceGuard guard(first.get_device_index());
    Tensors ys;
    Products products{};
    int64_t blocks = 0, longest = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        const int64_t out = weights[i].size(0), in = xs[i].size(1);
        const int warps = warps_of(weights[i].size(1) * weights[i].element_size());
        ys.push_back(empty({1, out}, first));
        products.of[products.n++] = {xs[i].const_data_ptr(),
                                     weights[i].const_data_ptr(),
                                     data_of(factors[i]),
                                     data_of(adds[i]),
                                     static_cast<const uint16_t*>(data_of(scales[i])),
                                     data_of(levels[i]),
                                     ys.back().mutable_data_ptr(),
                                     weights[i].stride(0),
                                     static_cast<int>(in),
                                     static_cast<int>(out),
                                     static_cast<int>(activations[i]),
                                     warps,
                                     static_cast<int>(blocks)};
        blocks += blocks_of(out, warps);
        longest = std::max(longest, in);
    }
    const auto kernel = first.scalar_type() == ScalarType::Float      ? matvec<float>
                        : first.scalar_type() == ScalarType::BFloat16 ? matvec<BFloat16>
                                                                      : matvec<Half>;
    const auto vector_bytes = static_cast<int>(longest * first.element_size());
    if (vector_bytes > kFreeBytes) {
        STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, vector_bytes));
    }
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(blocks), 32 * kWarps, vector_bytes,
                                current_stream(), first.get_device_index(), products));
    return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "matvec(Tensor[] xs, Tensor[] weights, Tensor?[] scales, Tensor?[] levels, int[] activations, "
        "Tensor?[] factors, Tensor?[] adds) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("matvec", TORCH_BOX(&run)); }
#endif
