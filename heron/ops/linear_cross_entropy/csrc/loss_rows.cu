// Cross entropy of rows of logits on a GPU, which their gradients then replace: one block for one row, read twice.
//
// The first pass finds the largest logit and, with it as the zero of the exponent, the sum of the exponentials: each
// thread for its own elements, rescaling when it meets a larger one, then the block. The second pass finds the row in
// the L2 cache (132 x 2 rows of 65536 bf16 are 35 MB) and writes the gradient, so that a row crosses the memory bus once
// in each direction.

#include "../../csrc/operator.h"

namespace {

constexpr int kThreads = 1024;
constexpr float kLog2E = 1.4426950408889634f;

// The largest of some logits, the lowest index where it is, and the sum of 2^(log2(e) (x - largest)).
struct Summary {
    float largest, sum;
    int where;
};

__device__ __forceinline__ float scaled_exp(float x, float largest) { return exp2f((x - largest) * kLog2E); }

__device__ __forceinline__ Summary merge(const Summary& a, const Summary& b) {
    const bool take_b = b.largest > a.largest || (b.largest == a.largest && b.where < a.where);
    const float largest = take_b ? b.largest : a.largest;
    return {largest, a.sum * scaled_exp(a.largest, largest) + b.sum * scaled_exp(b.largest, largest),
            take_b ? b.where : a.where};
}

__device__ __forceinline__ Summary of_block(Summary mine) {
    __shared__ Summary of_warp[kThreads / 32];
    __shared__ Summary of_all;
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.largest, mask),
                            __shfl_xor_sync(0xffffffffu, mine.sum, mask), __shfl_xor_sync(0xffffffffu, mine.where, mask)});
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kThreads / 32; ++warp) mine = merge(mine, of_warp[warp]);
        of_all = mine;
    }
    __syncthreads();
    return of_all;
}

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    T values[width];
};

// logits: (rows, V), V a multiple of `width`. losses: (rows,), 0 where the target is -100. With `with_gradient`, logits
// become counted (softmax - [target] + l2wrap largest [the largest]).
template <typename T, int width>
__global__ void __launch_bounds__(kThreads)
loss_rows(T* __restrict__ logits, const int64_t* __restrict__ targets, int vocab, float l2wrap, bool with_gradient,
          float* __restrict__ losses) {
    T* row = logits + static_cast<int64_t>(blockIdx.x) * vocab;
    auto* packs = reinterpret_cast<Pack<T, width>*>(row);
    const int n_packs = vocab / width;
    const int64_t target = targets[blockIdx.x];
    const bool counted = target != -100;
    CUDA_KERNEL_ASSERT(!counted || (target >= 0 && target < vocab));

    Summary mine{-3.4028234663852886e38f, 0.0f, vocab};  // finite, so that -inf - largest is -inf
    for (int i = threadIdx.x; i < n_packs; i += kThreads) {
        const Pack<T, width> pack = packs[i];
        float x[width], largest = mine.largest;
#pragma unroll
        for (int j = 0; j < width; ++j) {
            x[j] = static_cast<float>(pack.values[j]);
            if (x[j] > largest) {
                largest = x[j];
                mine.where = i * width + j;
            }
        }
        mine.sum *= scaled_exp(mine.largest, largest);
        mine.largest = largest;
#pragma unroll
        for (int j = 0; j < width; ++j) mine.sum += scaled_exp(x[j], largest);
    }
    const float at_target = counted ? static_cast<float>(row[target]) : 0.0f;
    const Summary all = of_block(mine);  // after it nobody reads what others write below
    if (threadIdx.x == 0) losses[blockIdx.x] = counted ? all.largest - at_target + logf(all.sum) : 0.0f;
    if (!with_gradient) return;

    const float scale = counted ? 1.0f / all.sum : 0.0f, pull = counted ? l2wrap * all.largest : 0.0f;
    for (int i = threadIdx.x; i < n_packs; i += kThreads) {
        Pack<T, width> pack = packs[i];
#pragma unroll
        for (int j = 0; j < width; ++j) {
            const int n = i * width + j;
            float d = counted ? scale * scaled_exp(static_cast<float>(pack.values[j]), all.largest) : 0.0f;
            if (n == target) d -= 1.0f;
            if (n == all.where) d += pull;
            pack.values[j] = static_cast<T>(d);
        }
        packs[i] = pack;
    }
}

// logits: (rows, V) fp32, bf16 or fp16, contiguous. targets: (rows,) int64. Returns the losses, (rows,) fp32.
Tensor run(const Tensor& logits, const Tensor& targets, double l2wrap, bool with_gradient) {
    const DeviceGuard guard(logits.get_device_index());
    const auto stream = current_stream();
    const int vocab = static_cast<int>(logits.size(1));
    auto losses = empty({logits.size(0)}, logits, ScalarType::Float);
    if (losses.numel() == 0) return losses;
    const auto launch = [&](auto kernel, auto* data) {
        kernel<<<static_cast<unsigned>(logits.size(0)), kThreads, 0, stream>>>(
            data, targets.const_data_ptr<int64_t>(), vocab, static_cast<float>(l2wrap), with_gradient,
            losses.mutable_data_ptr<float>());
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    with_dtype<float, BFloat16, Half>(logits, "loss_rows", [&](auto zero) {
        using T = decltype(zero);
        constexpr int width = 16 / sizeof(T);
        auto* data = logits.mutable_data_ptr<T>();
        const bool whole = vocab % width == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
        if (whole)
            launch(loss_rows<T, width>, data);
        else
            launch(loss_rows<T, 1>, data);
    });
    return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("loss_rows_(Tensor(a!) logits, Tensor targets, float l2wrap, bool with_gradient) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("loss_rows_", TORCH_BOX(&run)); }
