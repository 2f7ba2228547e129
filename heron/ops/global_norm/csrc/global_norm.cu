// The norm of many tensors on a GPU, and what it says about a training step. A block sums the squares of a chunk of one
// tensor, in an order that depends on nothing else; then one block adds up the sums of all chunks.

#ifdef __CUDACC__  // the tests also compile the kernels for a CPU
#include "../../csrc/operator.h"
#endif

#include "../../csrc/chunks.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kTensors = 1024;  // of one launch: what it is told about them must fit in 32,764 bytes
constexpr int kThreads = 256;
constexpr int kWidth = 8, kAhead = 4;  // values in a piece; pieces that a thread reads before it squares the first
constexpr int kChunk = 16384;          // values: few enough for the last blocks to end almost together
constexpr int kLast = 1024;            // threads of the block that adds up

struct Summed {
    const void* values;
    int64_t size;
    bool in_half;  // bf16, else fp32
};
using Table = Chunked<Summed, kTensors>;
static_assert(sizeof(Table) + sizeof(double*) <= 32764);

template <typename T>
struct alignas(16) Pack {
    T values[16 / sizeof(T)];
};

// Piece `at` of `size` values from `values` on; zeros behind the last one.
template <typename T, bool whole>
__device__ __forceinline__ void read(const T* values, int at, int size, T (&piece)[kWidth]) {
    constexpr int per_pack = 16 / sizeof(T);
    if constexpr (whole) {
#pragma unroll
        for (int i = 0; i < kWidth; i += per_pack) {
            const auto pack = *reinterpret_cast<const Pack<T>*>(values + at * kWidth + i);
#pragma unroll
            for (int j = 0; j < per_pack; ++j) piece[i + j] = pack.values[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) piece[i] = at * kWidth + i < size ? values[at * kWidth + i] : static_cast<T>(0.0f);
    }
}

// A thread's part of the sum of the squares of `size` values.
template <typename T, bool whole>
__device__ __forceinline__ float part_of_sum(const T* values, int size) {
    const int pieces = (size + kWidth - 1) / kWidth;
    float sum = 0;
    for (int first = threadIdx.x; first < pieces; first += kAhead * kThreads) {
        T piece[kAhead][kWidth];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * kThreads < pieces) read<T, whole>(values, first + i * kThreads, size, piece[i]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * kThreads >= pieces) break;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const float value = static_cast<float>(piece[i][j]);
                sum = __fmaf_rn(value, value, sum);
            }
        }
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ float part_of_chunk(const void* tensor, int64_t begin, int size) {
    const T* values = static_cast<const T*>(tensor) + begin;
    const bool whole = size % kWidth == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
    return whole ? part_of_sum<T, true>(values, size) : part_of_sum<T, false>(values, size);
}

// The sum over the threads of a block, for its first thread.
template <int threads>
__device__ __forceinline__ double sum_of_block(double sum) {
    __shared__ double of_warp[threads / 32];
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < threads / 32; ++i) sum += of_warp[i];
    }
    return sum;
}

__global__ void __launch_bounds__(kThreads, 4) sum_chunks(const __grid_constant__ Table table, double* sums) {
    const int block = static_cast<int>(blockIdx.x);
    const int t = table.of_block(block);
    const Summed& tensor = table.tensor[t];
    const int64_t begin = static_cast<int64_t>(block - table.first_chunk[t]) * kChunk;
    const int size = static_cast<int>(tensor.size - begin < kChunk ? tensor.size - begin : kChunk);
    const float part = tensor.in_half ? part_of_chunk<BFloat16>(tensor.values, begin, size)
                                      : part_of_chunk<float>(tensor.values, begin, size);
    const double sum = sum_of_block<kThreads>(part);
    if (threadIdx.x == 0) sums[block] = sum;
}

__global__ void __launch_bounds__(kLast) root_of_sums(const double* sums, int n, float* norm) {
    double sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kLast) sum += sums[i];
    sum = sum_of_block<kLast>(sum);
    if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

// Whether the step is bad, 1 or 0, and what its gradients are divided by.
__global__ void judge(const float* loss, const float* norm, double limit, double clip, float* verdict) {
    const float difference = *loss - *loss + (*norm - *norm);  // 0 of finite numbers, else NaN
    verdict[0] = difference == 0 && *loss <= static_cast<float>(limit) ? 0.0f : 1.0f;
    const float divisor = __fdiv_rn(__fadd_rn(*norm, 1e-6f), static_cast<float>(clip));
    verdict[1] = clip > 0 && !(divisor < 1) ? divisor : 1.0f;
}

int chunks_of(const std::vector<Summed>& tensors) {
    int64_t chunks = 0;
    for (const Summed& tensor : tensors) chunks += (tensor.size + kChunk - 1) / kChunk;
    return static_cast<int>(chunks);
}

}  // namespace

#ifdef __CUDACC__
namespace {

Tensor global_norm(const Tensors& tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "global_norm: no tensors");
    const Tensor& first = tensors[0];
    std::vector<Summed> all;
    all.reserve(tensors.size());
    for (const Tensor& tensor : tensors) {
        const ScalarType dtype = tensor.scalar_type();
        STD_TORCH_CHECK(on_one_device(tensor, first) && tensor.is_contiguous(),
                        "global_norm: tensors must be contiguous, on one device");
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "global_norm: no kernel for ",
                        torch::headeronly::toString(dtype));
        all.push_back({tensor.const_data_ptr(), tensor.numel(), dtype == ScalarType::BFloat16});
    }
    const DeviceGuard guard(first.get_device_index());
    const auto stream = current_stream();
    const int n = chunks_of(all);
    const Tensor sums = empty({std::max(n, 1)}, first, ScalarType::Double), norm = empty({}, first, ScalarType::Float);
    auto* of_chunks = sums.mutable_data_ptr<double>();
    for_tables<Table>(all, kChunk, [&](const Table& table, int chunks, int before) {
        if (chunks == 0) return;
        sum_chunks<<<chunks, kThreads, 0, stream>>>(table, of_chunks + before);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    root_of_sums<<<1, kLast, 0, stream>>>(of_chunks, n, norm.mutable_data_ptr<float>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return norm;
}

Tensor verdict(const Tensor& loss, const Tensor& norm, double limit, double clip) {
    STD_TORCH_CHECK(on_one_device(loss, norm) && loss.numel() == 1 && norm.numel() == 1,
                    "verdict: loss and norm must be scalars on one device");
    const DeviceGuard guard(loss.get_device_index());
    const Tensor out = empty({2}, loss);
    judge<<<1, 1, 0, current_stream()>>>(loss.const_data_ptr<float>(), norm.const_data_ptr<float>(), limit, clip,
                                         out.mutable_data_ptr<float>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("global_norm(Tensor[] tensors) -> Tensor");
    library.def("verdict(Tensor loss, Tensor norm, float limit, float clip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("global_norm", TORCH_BOX(&global_norm));
    library.impl("verdict", TORCH_BOX(&verdict));
}
#endif
