// Layer norm and token shift on a GPU: a block for a token. A thread reads 16 bytes at a time. What it needs of the first
// 2048 channels (1024 in fp32) it holds in registers, weights since before its inputs were there; channels beyond them it
// reads three times, from the L1 cache.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMixes = 6;  // that a thread holds
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
    const void *x, *weight, *bias, *mixes, *last;  // (n, C), (C,), (C,), (m, C), (n, C)
    void *new_last, *mixed;                        // (n, C), which may be last, and (m, n, C)
    int n, m, channels;
    float eps;
};

template <typename T, int width>
struct alignas(sizeof(T) * width) Several {
    T values[width];
};

// The sum over the block; `room` is for this sum alone.
__device__ __forceinline__ float block_sum(float x, float (&room)[kWarps]) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += room[i];
    return x;
}

// Channels are a multiple of `width`, which a thread reads at once.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads) norm_mix(const __grid_constant__ Problem p) {
    using Part = Several<T, width>;
    __shared__ float rooms[2][kWarps];
    const int parts = p.channels / width;
    const auto* x = static_cast<const Part*>(p.x) + static_cast<int64_t>(blockIdx.x) * parts;
    const auto* last = static_cast<const Part*>(p.last) + static_cast<int64_t>(blockIdx.x) * parts;
    auto* new_last = static_cast<Part*>(p.new_last) + static_cast<int64_t>(blockIdx.x) * parts;
    const auto* weights = static_cast<const Part*>(p.weight);
    const auto* biases = static_cast<const Part*>(p.bias);
    const auto* mixes = static_cast<const Part*>(p.mixes);
    const int first = static_cast<int>(threadIdx.x);
    const bool is_there = first < parts;
    const auto value = [](const Part& part, int j) { return static_cast<float>(part.values[j]); };
    Part here{}, before{}, weight{}, bias{}, mix[kMixes] = {};
    if (is_there) {
        weight = weights[first], bias = biases[first];
#pragma unroll
        for (int k = 0; k < kMixes; ++k) {
            if (k < p.m) mix[k] = mixes[k * parts + first];
        }
    }
    wait_for_inputs();
    if (is_there) here = x[first], before = last[first];
    const auto summed = [&](const Part& part) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < width; ++j) sum += value(part, j);
        return sum;
    };
    float sum = summed(here);
    for (int i = first + kThreads; i < parts; i += kThreads) sum += summed(x[i]);
    const float mean = block_sum(sum, rooms[0]) / p.channels;
    const auto squared = [&](const Part& part) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < width; ++j) sum += (value(part, j) - mean) * (value(part, j) - mean);
        return sum;
    };
    float squares = is_there ? squared(here) : 0.0f;
    for (int i = first + kThreads; i < parts; i += kThreads) squares += squared(x[i]);
    const float scale = 1.0f / sqrtf(block_sum(squares, rooms[1]) / p.channels + p.eps);
    const auto normed = [&](const Part& part, const Part& times, const Part& plus) {
        Part now;
#pragma unroll
        for (int j = 0; j < width; ++j) {
            now.values[j] = static_cast<T>((value(part, j) - mean) * scale * value(times, j) + value(plus, j));
        }
        return now;
    };
    const auto write_mix = [&](int k, int i, const Part& now, const Part& past, const Part& by) {
        Part out;
#pragma unroll
        for (int j = 0; j < width; ++j) {
            out.values[j] = static_cast<T>(value(now, j) + (value(past, j) - value(now, j)) * value(by, j));
        }
        static_cast<Part*>(p.mixed)[(static_cast<int64_t>(k) * p.n + blockIdx.x) * parts + i] = out;
    };
    if (is_there) {
        const Part now = normed(here, weight, bias);
#pragma unroll
        for (int k = 0; k < kMixes; ++k) {
            if (k < p.m) write_mix(k, first, now, before, mix[k]);
        }
        for (int k = kMixes; k < p.m; ++k) write_mix(k, first, now, before, mixes[k * parts + first]);
        new_last[first] = now;
    }
    for (int i = first + kThreads; i < parts; i += kThreads) {
        const Part now = normed(x[i], weights[i], biases[i]), past = last[i];
#pragma unroll 6
        for (int k = 0; k < p.m; ++k) write_mix(k, i, now, past, mixes[k * parts + i]);
        new_last[i] = now;
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

// Shapes and dtypes as heron.ops.norm_mix says, and checks.
Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& mixes,
           const Tensor& last, const Tensor& new_last) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t n = x.size(0), channels = x.size(1), m = mixes.size(0);
    auto mixed = empty({m, n, channels}, x);
    if (n == 0) return mixed;
    const Problem problem{x.const_data_ptr(),
                          weight.const_data_ptr(),
                          bias.const_data_ptr(),
                          mixes.const_data_ptr(),
                          last.const_data_ptr(),
                          new_last.mutable_data_ptr(),
                          mixed.mutable_data_ptr(),
                          static_cast<int>(n),
                          static_cast<int>(m),
                          static_cast<int>(channels),
                          static_cast<float>(eps)};
    // By 16 bytes, where all rows begin at multiples of them; else by two numbers.
    bool in_16_bytes = channels * x.element_size() % 16 == 0;
    for (const Tensor* each : {&x, &weight, &bias, &mixes, &last, &new_last}) {
        STD_TORCH_CHECK(begins_at_multiple_of(2 * x.element_size(), *each), "norm_mix: tensors must begin at multiples of ",
                        2 * x.element_size(), " bytes, and one does not; clone() it");
        in_16_bytes &= begins_at_multiple_of(16, *each);
    }
    const auto chosen = [=](auto wide, auto narrow) { return in_16_bytes ? wide : narrow; };
    const auto kernel = x.scalar_type() == ScalarType::Float      ? chosen(norm_mix<float, 4>, norm_mix<float, 2>)
                        : x.scalar_type() == ScalarType::BFloat16 ? chosen(norm_mix<BFloat16, 8>, norm_mix<BFloat16, 2>)
                                                                  : chosen(norm_mix<Half, 8>, norm_mix<Half, 2>);
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(n), kThreads, 0, current_stream(),
                                x.get_device_index(), problem));
    return mixed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "norm_mix(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor last, Tensor(a!) new_last) -> "
        "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("norm_mix", TORCH_BOX(&run)); }
#endif
