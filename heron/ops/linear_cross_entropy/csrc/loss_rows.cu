// Cross entropy of rows of logits on a GPU, which their gradients then replace: one block for one row, read twice.
//
// The first pass finds the largest logit and, with it as the zero of the exponent, the sum of the exponentials: each
// thread for its own elements, rescaling when it meets a larger one, then the block. The second pass finds the row in
// the L2 cache (132 x 2 rows of 65536 bf16 are 35 MB) and writes the gradient, so that a row crosses the memory bus once
// in each direction. That takes as long as some 14 instructions for each logit: what is rare, a larger logit and the two
// that are not like the others, is looked at once for eight.

#include "../../csrc/operator.h"

namespace {

constexpr int kThreads = 1024;
constexpr float kLog2E = 1.4426950408889634f;

// The largest of some logits, the lowest index where it is, and the sum of 2^(log2(e) (x - largest)).
struct Summary {
    float largest, sum;
    int where;
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^(log2(e) (x - zero)) for logits of type T.
template <typename T>
class Exponential {
  public:
    __device__ __forceinline__ explicit Exponential(float zero) : zero_(kInOne ? zero * kLog2E : zero) {}
    __device__ __forceinline__ float of(float x) const {
        return exp2_fast(kInOne ? fmaf(x, kLog2E, -zero_) : (x - zero_) * kLog2E);
    }

  private:
    static constexpr bool kInOne = sizeof(T) < 4;  // one operation; the rounding of zero_ is far below that of x
    float zero_;
};

__device__ __forceinline__ Summary merge(const Summary& a, const Summary& b) {
    const bool take_b = b.largest > a.largest || (b.largest == a.largest && b.where < a.where);
    const Exponential<float> exponential(take_b ? b.largest : a.largest);
    return {take_b ? b.largest : a.largest, a.sum * exponential.of(a.largest) + b.sum * exponential.of(b.largest),
            take_b ? b.where : a.where};
}

__device__ __forceinline__ Summary of_warp(Summary mine) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.largest, mask),
                            __shfl_xor_sync(0xffffffffu, mine.sum, mask), __shfl_xor_sync(0xffffffffu, mine.where, mask)});
    }
    return mine;
}

__device__ __forceinline__ Summary of_block(const Summary& mine) {
    static_assert(kThreads == 32 * 32, "a lane for each warp");
    __shared__ Summary of_warps[32];
    const Summary together = of_warp(mine);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = together;
    __syncthreads();
    return of_warp(of_warps[threadIdx.x % 32]);
}

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    T values[width];
};

// logits: (rows, V), V a multiple of `width`. losses: (rows,), 0 where the target is -100. With `with_gradient`, logits
// become counted (softmax - [target] + l2wrap largest [the largest]).
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
loss_rows(T* __restrict__ logits, const int64_t* __restrict__ targets, int vocab, float l2wrap, bool with_gradient,
          float* __restrict__ losses) {
    T* row = logits + static_cast<int64_t>(blockIdx.x) * vocab;
    auto* packs = reinterpret_cast<Pack<T, width>*>(row);
    const int n_packs = vocab / width;
    const bool counted = targets[blockIdx.x] != -100;
    CUDA_KERNEL_ASSERT(!counted || (targets[blockIdx.x] >= 0 && targets[blockIdx.x] < vocab));
    const int target = static_cast<int>(targets[blockIdx.x]);

    Summary mine{-1.0e38f, 0.0f, vocab};  // finite, so that -inf - largest is -inf
    Exponential<T> exponential(mine.largest);
#pragma unroll 4
    for (int i = threadIdx.x; i < n_packs; i += kThreads) {
        const Pack<T, width> pack = packs[i];
        float x[width], largest = mine.largest;
#pragma unroll
        for (int j = 0; j < width; ++j) {
            x[j] = static_cast<float>(pack.values[j]);
            largest = fmaxf(largest, x[j]);
        }
        if (largest > mine.largest) {
            exponential = Exponential<T>(largest);
            mine = {largest, mine.sum * exponential.of(mine.largest), i * width};
        }
#pragma unroll
        for (int j = 0; j < width; ++j) mine.sum += exponential.of(x[j]);
    }
    if (mine.where < vocab) {
        while (static_cast<float>(row[mine.where]) < mine.largest) ++mine.where;
    }
    const float at_target = counted ? static_cast<float>(row[target]) : 0.0f;
    const Summary all = of_block(mine);  // after it nobody reads what others write below
    if (threadIdx.x == 0) losses[blockIdx.x] = counted ? all.largest - at_target + logf(all.sum) : 0.0f;
    if (!with_gradient) return;

    const float scale = 1.0f / all.sum, pull = l2wrap * all.largest;
    const int of_target = target / width, of_largest = all.where / width;
    exponential = Exponential<T>(all.largest);
#pragma unroll 4
    for (int i = threadIdx.x; i < n_packs; i += kThreads) {
        Pack<T, width> pack{};
        if (counted) {
            pack = packs[i];
            float d[width];
#pragma unroll
            for (int j = 0; j < width; ++j) d[j] = scale * exponential.of(static_cast<float>(pack.values[j]));
            if (i == of_target || i == of_largest) {
#pragma unroll
                for (int j = 0; j < width; ++j) {
                    if (i * width + j == target) d[j] -= 1.0f;
                    if (i * width + j == all.where) d[j] += pull;
                }
            }
#pragma unroll
            for (int j = 0; j < width; ++j) pack.values[j] = static_cast<T>(d[j]);
        }
        packs[i] = pack;
    }
}

// out = scale x, of n numbers; a block takes kThreads packs.
template <typename To, typename From, int width>
__global__ void __launch_bounds__(kThreads)
scaled(To* __restrict__ out, const From* __restrict__ x, const float* __restrict__ scale, int64_t n) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width;
    if (i >= n) return;
    const auto from = *reinterpret_cast<const Pack<From, width>*>(x + i);
    Pack<To, width> to;
#pragma unroll
    for (int j = 0; j < width; ++j) to.values[j] = static_cast<To>(static_cast<float>(from.values[j]) * *scale);
    *reinterpret_cast<Pack<To, width>*>(out + i) = to;
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

// x: fp32, bf16 or fp16, contiguous. scale: a number in fp32. like: of the dtype of what is returned, of the shape of x.
Tensor run_scaled(const Tensor& x, const Tensor& scale, const Tensor& like) {
    const DeviceGuard guard(x.get_device_index());
    auto out = empty(x.sizes(), like);
    const int64_t n = x.numel();
    if (n == 0) return out;
    with_dtype<float, BFloat16, Half>(x, "scaled", [&](auto from) {
        with_dtype<float, BFloat16, Half>(like, "scaled", [&](auto to) {
            using From = decltype(from);
            using To = decltype(to);
            const auto launch = [&](auto kernel, int width) {
                const int64_t packs = (n + width - 1) / width;
                kernel<<<static_cast<unsigned>((packs + kThreads - 1) / kThreads), kThreads, 0, current_stream()>>>(
                    out.mutable_data_ptr<To>(), x.const_data_ptr<From>(), scale.const_data_ptr<float>(), n);
                STD_CUDA_KERNEL_LAUNCH_CHECK();
            };
            constexpr int width = 8;
            const bool whole = n % width == 0 && begins_at_multiple_of(width * sizeof(From), x);
            whole ? launch(scaled<To, From, width>, width) : launch(scaled<To, From, 1>, 1);
        });
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("loss_rows_(Tensor(a!) logits, Tensor targets, float l2wrap, bool with_gradient) -> Tensor");
    library.def("scaled(Tensor x, Tensor scale, Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("loss_rows_", TORCH_BOX(&run));
    library.impl("scaled", TORCH_BOX(&run_scaled));
}
