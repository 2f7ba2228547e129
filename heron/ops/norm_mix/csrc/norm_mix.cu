// Layer norm and token shift on a GPU: a block for a token. What a thread needs of the first 2048 channels it holds in
// registers, weights since before its inputs were there; channels beyond them it reads three times, from the L1 cache.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == 32, "a warp sums what the warps bring, one a lane");
constexpr int kMixes = 6;  // that a thread holds
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
    const void *x, *weight, *bias, *mixes;  // (n, C), (C,), (C,), (m, C)
    void *last, *mixed;                     // (n, C), changed in place, and (m, n, C)
    int n, m, channels;
    float eps;
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T values[2];
};

// The sum over the block; `room` is for this sum alone.
__device__ __forceinline__ float block_sum(float x, float (&room)[kWarps]) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[threadIdx.x % 32];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
    return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) norm_mix(const __grid_constant__ Problem p) {
    __shared__ float rooms[2][kWarps];
    const int pairs = p.channels / 2;
    const auto* x = static_cast<const Pair<T>*>(p.x) + static_cast<int64_t>(blockIdx.x) * pairs;
    auto* last = static_cast<Pair<T>*>(p.last) + static_cast<int64_t>(blockIdx.x) * pairs;
    const auto* weights = static_cast<const Pair<T>*>(p.weight);
    const auto* biases = static_cast<const Pair<T>*>(p.bias);
    const auto* mixes = static_cast<const Pair<T>*>(p.mixes);
    const int first = static_cast<int>(threadIdx.x);
    const bool is_there = first < pairs;
    const auto value = [](const Pair<T>& pair, int j) { return static_cast<float>(pair.values[j]); };
    Pair<T> here{}, before{}, weight{}, bias{}, mix[kMixes] = {};
    if (is_there) {
        weight = weights[first], bias = biases[first];
#pragma unroll
        for (int k = 0; k < kMixes; ++k) {
            if (k < p.m) mix[k] = mixes[k * pairs + first];
        }
    }
    wait_for_inputs();
    if (is_there) here = x[first], before = last[first];
    float sum = value(here, 0) + value(here, 1);
    for (int i = first + kThreads; i < pairs; i += kThreads) {
        const Pair<T> other = x[i];
        sum += value(other, 0) + value(other, 1);
    }
    const float mean = block_sum(sum, rooms[0]) / p.channels;
    const auto square = [&](const Pair<T>& pair) {
        const float a = value(pair, 0) - mean, b = value(pair, 1) - mean;
        return a * a + b * b;
    };
    float squares = is_there ? square(here) : 0.0f;
    for (int i = first + kThreads; i < pairs; i += kThreads) squares += square(x[i]);
    const float scale = 1.0f / sqrtf(block_sum(squares, rooms[1]) / p.channels + p.eps);
    const auto normed = [&](const Pair<T>& pair, const Pair<T>& times, const Pair<T>& plus) {
        Pair<T> now;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            now.values[j] = static_cast<T>((value(pair, j) - mean) * scale * value(times, j) + value(plus, j));
        }
        return now;
    };
    const auto write_mix = [&](int k, int i, const Pair<T>& now, const Pair<T>& past, const Pair<T>& by) {
        Pair<T> out;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            out.values[j] = static_cast<T>(value(now, j) + (value(past, j) - value(now, j)) * value(by, j));
        }
        static_cast<Pair<T>*>(p.mixed)[(static_cast<int64_t>(k) * p.n + blockIdx.x) * pairs + i] = out;
    };
    if (is_there) {
        const Pair<T> now = normed(here, weight, bias);
#pragma unroll
        for (int k = 0; k < kMixes; ++k) {
            if (k < p.m) write_mix(k, first, now, before, mix[k]);
        }
        for (int k = kMixes; k < p.m; ++k) write_mix(k, first, now, before, mixes[k * pairs + first]);
        last[first] = now;
    }
    for (int i = first + kThreads; i < pairs; i += kThreads) {
        const Pair<T> now = normed(x[i], weights[i], biases[i]), past = last[i];
#pragma unroll 6
        for (int k = 0; k < p.m; ++k) write_mix(k, i, now, past, mixes[k * pairs + i]);
        last[i] = now;
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

// Shapes and dtypes as heron.ops.norm_mix says, and checks.
Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& mixes,
           const Tensor& last) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t n = x.size(0), channels = x.size(1), m = mixes.size(0);
    auto mixed = empty({m, n, channels}, x);
    const Problem problem{x.const_data_ptr(),
                          weight.const_data_ptr(),
                          bias.const_data_ptr(),
                          mixes.const_data_ptr(),
                          last.mutable_data_ptr(),
                          mixed.mutable_data_ptr(),
                          static_cast<int>(n),
                          static_cast<int>(m),
                          static_cast<int>(channels),
                          static_cast<float>(eps)};
    const auto kernel = x.scalar_type() == ScalarType::Float      ? norm_mix<float>
                        : x.scalar_type() == ScalarType::BFloat16 ? norm_mix<BFloat16>
                                                                  : norm_mix<Half>;
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(n), kThreads, 0, current_stream(),
                                x.get_device_index(), problem));
    return mixed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "norm_mix(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor(a!) last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("norm_mix", TORCH_BOX(&run)); }
#endif
