// One token of every head's time mix on a GPU: a block for a head of some sequences, one after another.
//
// Four lanes share two rows of the state, two value channels; each has every fourth run of keys, 16 bytes of a row, in
// registers. A thread copies its own part of the next sequence's state to shared memory while it computes, so that no
// barrier stands between memory and a state's use. What is to be computed of a channel is shared out to its lanes, too.
// Sums over a head's channels are sums over warps, then over what the warps bring, in one order.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <algorithm>

#include "../../csrc/copies.cuh"
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

namespace {

#ifdef __CUDACC__
__device__ __forceinline__ float divide_fast(float x, float y) { return __fdividef(x, y); }
#endif

constexpr unsigned kAll = 0xffffffffu;
constexpr float kDecayScale = 0.60653065971263342f;  // e^-0.5
constexpr float kLeastSquare = 1e-24f;  // of the removal key

// Of a channel each: (sequences, C), and from kW0 on (C,). kValue, kVFirst and kV0 may be null, all three.
enum Name { kR, kW, kK, kV, kIclr, kGate, kValue, kVFirst, kW0, kA0, kKK, kKA, kRK, kWeight, kBias, kV0, kNames };

struct Problem {
    const void* of[kNames];
    void* y;
    const void* wkv;       // (sequences, H, N, N)
    void* new_wkv;         // as wkv, or wkv itself
    const int64_t* drawn;  // (sequences,), for states that are rounded at random
    int sequences, heads;
    float eps;
};

template <typename T, int width>
struct alignas(sizeof(T) * width) Run {
    T values[width];
};

// 32 bits at random for every x; two rounds of multiplying and shifting mix them (Wellons, "lowbias32").
__device__ __forceinline__ unsigned mixed(unsigned x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// One of the two neighbours of x in bf16, the nearer the likelier; what is random are the upper 16 bits.
__device__ __forceinline__ float rounded(float x, unsigned random) {
    const float neighbour = __uint_as_float((__float_as_uint(x) + (random >> 16)) & 0xffff0000u);
    return x == x ? neighbour : x;
}

__device__ __forceinline__ float sigmoid(float x) { return divide_fast(1.0f, 1.0f + expf(-x)); }

// The sum over the channels of a warp, of lanes that have the same x.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(kAll, x, mask);
    return x;
}

// The sum over the lanes of a channel.
__device__ __forceinline__ float lane_sum(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

struct alignas(8) Two {  // of a thread's two channels
    float values[2];
};

template <typename Compute>
__device__ __forceinline__ Two of_both(const Compute& compute) {
    return {{compute(0), compute(1)}};
}

// Those of the lane `from` of the same channels.
__device__ __forceinline__ Two of_lane(const Two& x, int from) {
    return of_both([&](int i) { return __shfl_sync(kAll, x.values[i], from, 4); });
}

template <typename S, int size>
constexpr int kStateBytes = size * size * static_cast<int>(sizeof(S));  // of a head
template <typename S, int size>
constexpr int kStages = kStateBytes<S, size> > 16384 ? 1 : kStateBytes<S, size> > 8192 ? 2 : 4;  // that a block waits for
template <typename S, int size>
constexpr int kSharedBytes = kStages<S, size> * kStateBytes<S, size>;
template <int size>
constexpr int kBlocks = size == 128 ? 1 : 256 / size;  // that a multiprocessor has registers for

// T: of all but the states; S: of the states, rounded at random if it is not fp32.
template <typename T, typename S, int size>
__global__ void __launch_bounds__(2 * size, kBlocks<size>) head_step(const __grid_constant__ Problem p) {
    constexpr int kKeys = size / 4, kRun = kKeys < 16 / sizeof(S) ? kKeys : 16 / sizeof(S), kWarps = size / 16;
    constexpr int kAhead = kStages<S, size>;
    using Keys = Run<S, kRun>;
    __shared__ float of_warps[4][kWarps];  // squares of the removal key, bonus; mean of y, squares of distances from it
    // r, decay, k, removal key before it is normed, the same times iclr
    alignas(16) __shared__ float vectors[5][size];
    auto* const copied = reinterpret_cast<Keys*>(shared_memory()) + threadIdx.x;
    const int head = static_cast<int>(blockIdx.x) % p.heads, stride = static_cast<int>(gridDim.x) / p.heads;
    const int pair = static_cast<int>(threadIdx.x / 4), lane = static_cast<int>(threadIdx.x % 4);
    const int warp = static_cast<int>(threadIdx.x / 32), here = head * size + 2 * pair;
    const auto write = [&](int name, Two x) { *reinterpret_cast<Two*>(&vectors[name][2 * pair]) = x; };
    const auto key = [=](int i) { return kRun * (i / kRun * 4 + lane) + i % kRun; };
    const auto at = [&](int sequence) { return static_cast<int64_t>(sequence) * p.heads * size + here; };
    const auto place = [&](int stage, int row, int i) {
        return copied + ((stage * 2 + row) * kKeys + i) / kRun * 2 * size;
    };
    const auto copy = [&](int sequence, int stage) {
        if (sequence < p.sequences) {
            const S* rows = static_cast<const S*>(p.wkv) + at(sequence) * size;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
#pragma unroll
                for (int i = 0; i < kKeys; i += kRun) {
                    begin_copy_of<sizeof(Keys)>(place(stage, row, i), rows + row * size + key(i), true);
                }
            }
        }
        end_of_copies();
    };
    const auto read = [&](const void* from, int64_t i) {
        if (from == nullptr) return Two{};
        const auto two = *reinterpret_cast<const Run<T, 2>*>(static_cast<const T*>(from) + i);
        return of_both([&](int j) { return static_cast<float>(two.values[j]); });
    };
    const auto by_lane = [&](Name a, Name b, Name c, Name d) {
        return p.of[lane == 0 ? a : lane == 1 ? b : lane == 2 ? c : d];
    };
    const void *const of_sigmoid = by_lane(kW, kIclr, kValue, kGate), *const vector = by_lane(kR, kK, kV, kVFirst);

    const int first = static_cast<int>(blockIdx.x) / p.heads;
    for (int i = 0; i < kAhead && first + i * stride < p.sequences; ++i) {
        const S* rows = static_cast<const S*>(p.wkv) + at(first + i * stride) * size;
#pragma unroll
        for (int j = 0; j < kKeys; j += kRun) prefetch(rows + key(j)), prefetch(rows + size + key(j));
    }
    const Two added = lane == 3 ? Two{} : read(by_lane(kW0, kA0, kV0, kV0), here);
    const Two kk = read(p.of[kKK], here), ka = read(p.of[kKA], here), rk = read(p.of[kRK], here);
    const Two weight = read(p.of[kWeight], here), bias = read(p.of[kBias], here);
    wait_for_inputs();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy(first + i * stride, i);
    Two next_of_sigmoid = read(of_sigmoid, at(first)), next_vector = read(vector, at(first));

#pragma unroll 1
    for (int sequence = first, stage = 0; sequence < p.sequences; sequence += stride, stage = (stage + 1) % kAhead) {
        unsigned random = 0;
        if constexpr (sizeof(S) < 4) random = static_cast<unsigned>(p.drawn[sequence]);
        // One of three sigmoids; the fourth lane has the gate as it is.
        const Two mine = of_both([&](int i) { return sigmoid(added.values[i] + next_of_sigmoid.values[i]); });
        const Two decay_share = of_lane(mine, 0), iclr = of_lane(mine, 1), share = of_lane(mine, 2);
        const Two gate = of_lane(next_of_sigmoid, 3), r = of_lane(next_vector, 0), raw_key = of_lane(next_vector, 1);
        Two v = of_lane(next_vector, 2);
        if (p.of[kVFirst] != nullptr) {
            const Two v_first = of_lane(next_vector, 3);
            v = of_both([&](int i) { return v.values[i] + (v_first.values[i] - v.values[i]) * share.values[i]; });
        }
        if (sequence + stride < p.sequences) {
            next_of_sigmoid = read(of_sigmoid, at(sequence + stride)), next_vector = read(vector, at(sequence + stride));
        }
        const Two removal_key = of_both([&](int i) { return raw_key.values[i] * kk.values[i]; });
        const Two k = of_both([&](int i) {
            return raw_key.values[i] * (1.0f + (iclr.values[i] - 1.0f) * ka.values[i]);
        });
        const Two decay = of_both([&](int i) { return expf(-kDecayScale * decay_share.values[i]); });
        write(lane, of_both([&](int i) {
            return lane == 0 ? r.values[i] : lane == 1 ? decay.values[i] : lane == 2 ? k.values[i] : removal_key.values[i];
        }));
        if (lane == 0) write(4, of_both([&](int i) { return removal_key.values[i] * iclr.values[i]; }));
        float square_here = 0.0f, bonus_here = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            square_here += removal_key.values[i] * removal_key.values[i];
            bonus_here += r.values[i] * k.values[i] * rk.values[i];
        }
        square_here = warp_sum(square_here), bonus_here = warp_sum(bonus_here);
        if (threadIdx.x % 32 == 0) of_warps[0][warp] = square_here, of_warps[1][warp] = bonus_here;
        __syncthreads();
        float square = 0.0f, bonus = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) square += of_warps[0][i], bonus += of_warps[1][i];

        copies_arrived<kAhead - 1>();
        float state[2][kKeys];
        Two removed{}, y{};
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; i += kRun) {
                const Keys keys = *place(stage, row, i);
#pragma unroll
                for (int j = 0; j < kRun; ++j) state[row][i + j] = static_cast<float>(keys.values[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            removed.values[0] += state[0][i] * vectors[3][key(i)], removed.values[1] += state[1][i] * vectors[3][key(i)];
        }
        removed = of_both([&](int i) { return divide_fast(lane_sum(removed.values[i]), fmaxf(square, kLeastSquare)); });
        copy(sequence + kAhead * stride, stage);  // to where the state was that is in registers now
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const float r_here = vectors[0][key(i)], decay_here = vectors[1][key(i)], k_here = vectors[2][key(i)], removal = vectors[4][key(i)];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float& s = state[row][i];
                s = s * decay_here - removed.values[row] * removal + v.values[row] * k_here;
                y.values[row] += s * r_here;
            }
        }
        if constexpr (sizeof(S) < 4) random = mixed(mixed(random) + static_cast<unsigned>(2 * here + lane));
        S* new_rows = static_cast<S*>(p.new_wkv) + at(sequence) * size;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; i += kRun) {
                Keys keys;
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    if constexpr (sizeof(S) < 4) {
                        random = random * 1664525u + 1013904223u;  // a good sequence's upper half, from a hashed begin
                        keys.values[j] = static_cast<S>(rounded(state[row][i + j], random));
                    } else {
                        keys.values[j] = state[row][i + j];
                    }
                }
                *reinterpret_cast<Keys*>(new_rows + row * size + key(i)) = keys;
            }
        }
        y = of_both([&](int i) { return lane_sum(y.values[i]); });
        const float mean_here = warp_sum(y.values[0] + y.values[1]) / 16;
        const Two away = of_both([&](int i) { return y.values[i] - mean_here; });
        const float squares_here = warp_sum(away.values[0] * away.values[0] + away.values[1] * away.values[1]);
        if (threadIdx.x % 32 == 0) of_warps[2][warp] = mean_here, of_warps[3][warp] = squares_here;
        __syncthreads();
        float mean = 0.0f, variance = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) mean += of_warps[2][i] / kWarps;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const float distance = of_warps[2][i] - mean;
            variance += (of_warps[3][i] + 16 * distance * distance) / size;
        }
        const float scale = rsqrtf(variance + p.eps);
        if (lane == 0) {
            Run<T, 2> out;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float normed = (y.values[i] - mean) * scale * weight.values[i] + bias.values[i];
                out.values[i] = static_cast<T>((normed + bonus * v.values[i]) * gate.values[i]);
            }
            *reinterpret_cast<Run<T, 2>*>(static_cast<T*>(p.y) + at(sequence)) = out;
        }
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, typename S, int size>
void start(const Problem& problem, int device) {
    const auto kernel = head_step<T, S, size>;
    constexpr int threads = 2 * size, bytes = kSharedBytes<S, size>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    int processors = 0, resident = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes));
    // As many sequences at a time as are resident, and about as many the last time as before.
    const int together = std::max(1, processors * resident / problem.heads);
    const int rounds = (problem.sequences + together - 1) / together;
    const int blocks = (problem.sequences + rounds - 1) / rounds * problem.heads;
    STD_CUDA_CHECK(
        launch_early(kernel, static_cast<unsigned>(blocks), threads, bytes, current_stream(), device, problem));
}

template <typename T, typename S>
void start_size(const Problem& problem, int size, int device) {
    if (size == 16) start<T, S, 16>(problem, device);
    if (size == 32) start<T, S, 32>(problem, device);
    if (size == 64) start<T, S, 64>(problem, device);
    if (size == 128) start<T, S, 128>(problem, device);
}

// Shapes and dtypes as heron.ops.head_step says, and checks. inputs and weights in the order of Name; of_values are none,
// or value, v_first and v0.
Tensor run(const Tensors& inputs, const Tensors& weights, const Tensors& of_values, double eps,
           const Tensor& wkv, const Tensor& new_wkv, const Optional& drawn) {
    const Tensor& r = inputs[0];
    const DeviceGuard guard(r.get_device_index());
    auto y = empty_like(r);
    Problem problem{};
    for (int i = 0; i <= kGate; ++i) problem.of[i] = inputs[i].const_data_ptr();
    for (int i = kW0; i < kV0; ++i) problem.of[i] = weights[i - kW0].const_data_ptr();
    if (!of_values.empty()) {
        problem.of[kValue] = of_values[0].const_data_ptr();
        problem.of[kVFirst] = of_values[1].const_data_ptr();
        problem.of[kV0] = of_values[2].const_data_ptr();
    }
    problem.y = y.mutable_data_ptr();
    problem.wkv = wkv.const_data_ptr();
    problem.new_wkv = new_wkv.mutable_data_ptr();
    if (drawn.has_value()) problem.drawn = drawn->const_data_ptr<int64_t>();
    problem.sequences = static_cast<int>(r.size(0)), problem.heads = static_cast<int>(wkv.size(1));
    problem.eps = static_cast<float>(eps);
    const bool in_fp32 = wkv.scalar_type() == ScalarType::Float;
    const auto with_states = [=](auto in_fp32_form, auto in_bf16_form) { return in_fp32 ? in_fp32_form : in_bf16_form; };
    const auto start = r.scalar_type() == ScalarType::Float
                           ? with_states(start_size<float, float>, start_size<float, BFloat16>)
                       : r.scalar_type() == ScalarType::BFloat16
                           ? with_states(start_size<BFloat16, float>, start_size<BFloat16, BFloat16>)
                           : with_states(start_size<Half, float>, start_size<Half, BFloat16>);
    start(problem, static_cast<int>(wkv.size(3)), r.get_device_index());
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "head_step(Tensor[] inputs, Tensor[] weights, Tensor[] of_values, float eps, Tensor wkv, Tensor(a!) new_wkv, "
        "Tensor? drawn) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("head_step", TORCH_BOX(&run)); }
#endif
