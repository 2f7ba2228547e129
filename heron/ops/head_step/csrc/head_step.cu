// One token of every head's time mix on a GPU: a block for a head of some sequences, one after another.
//
// Eight lanes share four rows of the state, four value channels; each has every eighth run of keys, 16 bytes of a row, in
// registers, and asks for its part of the next sequence's state before it computes, so that no barrier stands between memory
// and a state's use. What is to be computed of a channel is shared out to four lanes. Sums over a head's channels are
// sums over warps, then over what the warps bring, in one order.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <algorithm>

#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

namespace {

#ifdef __CUDACC__
__device__ __forceinline__ float divide_fast(float x, float y) { return __fdividef(x, y); }

// What is read once is the first to leave the caches.
template <typename Part>
__device__ __forceinline__ Part read_once(const Part* from) {
    using Bits = std::conditional_t<sizeof(Part) == 16, uint4, std::conditional_t<sizeof(Part) == 8, uint2, unsigned>>;
    static_assert(sizeof(Part) == sizeof(Bits));
    const Bits bits = __ldcs(reinterpret_cast<const Bits*>(from));
    return *reinterpret_cast<const Part*>(&bits);
}
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
    bool settled;  // no kernel that may still run writes wkv
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

// The sum over lanes whose numbers differ in these bits.
template <int... masks>
__device__ __forceinline__ float sum_over(float x) {
    ((x += __shfl_xor_sync(kAll, x, masks)), ...);
    return x;
}

constexpr int kLanes = 8, kRows = 4;            // that share rows of the state; rows that they share
constexpr int kOfWarp = 32 / kLanes * kRows;  // channels of a warp

// What all lanes read of every channel; the first four by the kind of the thread that writes them.
enum Vector { kReceptance, kDecay, kKey, kRemovalKey, kRemovalIclr, kMixedValue, kVectors };
// What every warp brings to a sum over the head: squares of the removal key, the bonus; the mean of y, squares of distances.
enum Share { kSquare, kBonus, kMean, kSquares, kShares };

// The sums over the lanes that share rows: of the row lane / 2. A lane hands on what others sum up.
__device__ __forceinline__ float row_sum(const float (&of_rows)[kRows], int lane) {
    const bool lower = lane < 4, even = lane / 2 % 2 == 0;
    float halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        halves[i] = lower ? of_rows[i] : of_rows[2 + i];
        halves[i] += __shfl_xor_sync(kAll, lower ? of_rows[2 + i] : of_rows[i], 4);
    }
    float x = even ? halves[0] : halves[1];
    x += __shfl_xor_sync(kAll, even ? halves[1] : halves[0], 2);
    return x + __shfl_xor_sync(kAll, x, 1);
}

struct alignas(8) Two {  // of a thread's two channels
    float values[2];
};

template <typename Compute>
__device__ __forceinline__ Two of_both(const Compute& compute) {
    return {{compute(0), compute(1)}};
}

// Those of the thread of this kind for the same channels.
__device__ __forceinline__ Two of_kind(const Two& x, int kind) {
    return of_both([&](int i) { return __shfl_sync(kAll, x.values[i], kind, 4); });
}

// Threads that a multiprocessor has registers for; what is made for devices before 9.0 needs more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kThreads = 384;
#else
constexpr int kThreads = 512;
#endif
template <int size>
constexpr int kBlocks = size == 128 ? 1 : kThreads / (2 * size);

// T: of all but the states; S: of the states, rounded at random if it is not fp32.
template <typename T, typename S, int size>
__global__ void __launch_bounds__(2 * size, kBlocks<size>) head_step(const __grid_constant__ Problem p) {
    constexpr int kKeys = size / kLanes, kRun = kKeys < 16 / sizeof(S) ? kKeys : 16 / sizeof(S), kWarps = size / kOfWarp;
    using Keys = Run<S, kRun>;
    __shared__ float of_warps[kShares][kWarps];
    alignas(16) __shared__ float vectors[kVectors][size];
    const int head = static_cast<int>(blockIdx.x) % p.heads, stride = static_cast<int>(gridDim.x) / p.heads;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    // Of rows, of keys, of what a channel needs.
    const int group = thread / kLanes, lane = thread % kLanes, kind = thread % 4, pair = thread / 4;
    const int here = head * size + 2 * pair;
    const bool is_second = lane / 2 % 2 == 1;  // of the pair is the channel that this thread ends
    const auto own = [=](const Two& x) { return is_second ? x.values[1] : x.values[0]; };
    const auto write = [&](int name, Two x) { *reinterpret_cast<Two*>(&vectors[name][2 * pair]) = x; };
    const auto key = [=](int i) { return kRun * (i / kRun * kLanes + lane) + i % kRun; };
    const auto at = [&](int sequence) { return static_cast<int64_t>(sequence) * p.heads * size; };
    const auto state_of = [&](int sequence) { return (at(sequence) + head * size) * size; };
    Keys next[kRows][kKeys / kRun];
    const auto ask = [&](int sequence) {
        const S* rows = static_cast<const S*>(p.wkv) + state_of(sequence) + kRows * group * size;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; i += kRun) {
                next[row][i / kRun] = read_once(reinterpret_cast<const Keys*>(rows + row * size + key(i)));
            }
        }
    };
    const auto read = [&](const void* from, int64_t i) {
        if (from == nullptr) return Two{};
        const auto two = *reinterpret_cast<const Run<T, 2>*>(static_cast<const T*>(from) + i);
        return of_both([&](int j) { return static_cast<float>(two.values[j]); });
    };
    const auto by_kind = [&](Name a, Name b, Name c, Name d) {
        return p.of[kind == 0 ? a : kind == 1 ? b : kind == 2 ? c : d];
    };
    const void *const of_sigmoid = by_kind(kW, kIclr, kValue, kGate), *const vector = by_kind(kR, kK, kV, kVFirst);

    const int first = static_cast<int>(blockIdx.x) / p.heads;
    for (int sequence = first; sequence < p.sequences && sequence <= first + stride; sequence += stride) {
        const auto* state = reinterpret_cast<const char*>(static_cast<const S*>(p.wkv) + state_of(sequence));
        for (int i = 128 * thread; i < size * size * static_cast<int>(sizeof(S)); i += 128 * 2 * size) prefetch(state + i);
    }
    const Two added = kind == 3 ? Two{} : read(by_kind(kW0, kA0, kV0, kV0), here);
    const Two kk = read(p.of[kKK], here), ka = read(p.of[kKA], here), rk = read(p.of[kRK], here);
    const float weight = own(read(p.of[kWeight], here)), bias = own(read(p.of[kBias], here));
    if (!p.settled) wait_for_inputs();
    ask(first);
    if (p.settled) wait_for_inputs();
    Two next_of_sigmoid = read(of_sigmoid, at(first) + here), next_vector = read(vector, at(first) + here);

#pragma unroll 1
    for (int sequence = first; sequence < p.sequences; sequence += stride) {
        unsigned random = 0;
        if constexpr (sizeof(S) < 4) random = static_cast<unsigned>(p.drawn[sequence]);
        // One of three sigmoids; the fourth kind has the gate as it is.
        const Two mine = of_both([&](int i) { return sigmoid(added.values[i] + next_of_sigmoid.values[i]); });
        const Two decay_share = of_kind(mine, 0), iclr = of_kind(mine, 1), share = of_kind(mine, 2);
        const Two gate = of_kind(next_of_sigmoid, 3), r = of_kind(next_vector, 0), raw_key = of_kind(next_vector, 1);
        Two v = of_kind(next_vector, 2);
        if (p.of[kVFirst] != nullptr) {
            const Two v_first = of_kind(next_vector, 3);
            v = of_both([&](int i) { return v.values[i] + (v_first.values[i] - v.values[i]) * share.values[i]; });
        }
        const Two removal_key = of_both([&](int i) { return raw_key.values[i] * kk.values[i]; });
        const Two k = of_both([&](int i) {
            return raw_key.values[i] * (1.0f + (iclr.values[i] - 1.0f) * ka.values[i]);
        });
        const Two decay = of_both([&](int i) { return expf(-kDecayScale * decay_share.values[i]); });
        write(kind, of_both([&](int i) {
            return kind == 0 ? r.values[i] : kind == 1 ? decay.values[i] : kind == 2 ? k.values[i] : removal_key.values[i];
        }));
        if (kind == 0) write(kRemovalIclr, of_both([&](int i) { return removal_key.values[i] * iclr.values[i]; }));
        if (kind == 1) write(kMixedValue, v);
        float square_here = 0.0f, bonus_here = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            square_here += removal_key.values[i] * removal_key.values[i];
            bonus_here += r.values[i] * k.values[i] * rk.values[i];
        }
        square_here = sum_over<4, 8, 16>(square_here), bonus_here = sum_over<4, 8, 16>(bonus_here);
        if (thread % 32 == 0) of_warps[kSquare][warp] = square_here, of_warps[kBonus][warp] = bonus_here;

        float state[kRows][kKeys];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; ++i) state[row][i] = static_cast<float>(next[row][i / kRun].values[i % kRun]);
        }
        if (sequence + stride < p.sequences) {
            ask(sequence + stride);
            next_of_sigmoid = read(of_sigmoid, at(sequence + stride) + here);
            next_vector = read(vector, at(sequence + stride) + here);
        }
        __syncthreads();
        float square = 0.0f, bonus = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) square += of_warps[kSquare][i], bonus += of_warps[kBonus][i];
        float sums[kRows] = {};
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const float removal = vectors[kRemovalKey][key(i)];
#pragma unroll
            for (int row = 0; row < kRows; ++row) sums[row] += state[row][i] * removal;
        }
        const float removed_here = divide_fast(row_sum(sums, lane), fmaxf(square, kLeastSquare));
        float removed[kRows], values[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            removed[row] = __shfl_sync(kAll, removed_here, 2 * row, kLanes);
            values[row] = vectors[kMixedValue][kRows * group + row];
            sums[row] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const float r_here = vectors[kReceptance][key(i)], decay_here = vectors[kDecay][key(i)];
            const float k_here = vectors[kKey][key(i)], removal = vectors[kRemovalIclr][key(i)];
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                float& s = state[row][i];
                s = s * decay_here - removed[row] * removal + values[row] * k_here;
                sums[row] += s * r_here;
            }
        }
        if constexpr (sizeof(S) < 4) random = mixed(mixed(random) + static_cast<unsigned>(2 * head * size + thread));
        S* new_rows = static_cast<S*>(p.new_wkv) + state_of(sequence) + kRows * group * size;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; i += kRun) {
                Keys keys;
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    if constexpr (sizeof(S) < 4) {
                        random = random * 1664525u + 1013904223u;  // (Numerical Recipes) its upper half serves
                        keys.values[j] = static_cast<S>(rounded(state[row][i + j], random));
                    } else {
                        keys.values[j] = state[row][i + j];
                    }
                }
                *reinterpret_cast<Keys*>(new_rows + row * size + key(i)) = keys;
            }
        }
        const float y = row_sum(sums, lane);
        const float mean_here = sum_over<2, 4, 8, 16>(y) / kOfWarp;
        const float squares_here = sum_over<2, 4, 8, 16>((y - mean_here) * (y - mean_here));
        if (thread % 32 == 0) of_warps[kMean][warp] = mean_here, of_warps[kSquares][warp] = squares_here;
        __syncthreads();
        float mean = 0.0f, variance = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) mean += of_warps[kMean][i] / kWarps;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const float distance = of_warps[kMean][i] - mean;
            variance += (of_warps[kSquares][i] + kOfWarp * distance * distance) / size;
        }
        if (lane % 2 == 0) {
            const float normed = (y - mean) * rsqrtf(variance + p.eps) * weight + bias;
            const float out = (normed + bonus * own(v)) * own(gate);
            static_cast<T*>(p.y)[at(sequence) + here + is_second] = static_cast<T>(out);
        }
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, typename S, int size>
void start(const Problem& problem, int device) {
    const auto kernel = head_step<T, S, size>;
    constexpr int threads = 2 * size;
    int processors = 0, resident = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0));
    // As many sequences at a time as are resident, and about as many the last time as before.
    const int together = std::max(1, processors * resident / problem.heads);
    const int rounds = (problem.sequences + together - 1) / together;
    const int blocks = (problem.sequences + rounds - 1) / rounds * problem.heads;
    STD_CUDA_CHECK(
        launch_early(kernel, static_cast<unsigned>(blocks), threads, 0, current_stream(), device, problem));
}

template <typename T, typename S>
void start_size(const Problem& problem, int size, int device) {
    if (size == 16) start<T, S, 16>(problem, device);
    if (size == 32) start<T, S, 32>(problem, device);
    if (size == 64) start<T, S, 64>(problem, device);
    if (size == 128) start<T, S, 128>(problem, device);
}

void check_begin(const Tensor& x, int64_t bytes) {
    STD_TORCH_CHECK(begins_at_multiple_of(bytes, x), "head_step: states must begin at multiples of 16 bytes and all else at "
                    "multiples of two numbers, and one does not; clone() it");
}

// Shapes and dtypes as heron.ops.head_step says, and checks. inputs and weights in the order of Name; of_values are none,
// or value, v_first and v0.
Tensor run(const Tensors& inputs, const Tensors& weights, const Tensors& of_values, double eps,
           const Tensor& wkv, const Tensor& new_wkv, const Optional& drawn, bool settled) {
    const Tensor& r = inputs[0];
    const DeviceGuard guard(r.get_device_index());
    auto y = empty_like(r);
    if (r.size(0) == 0) return y;
    for (const Tensors* all : {&inputs, &weights, &of_values}) {
        for (const Tensor& each : *all) check_begin(each, 2 * r.element_size());
    }
    check_begin(wkv, 16), check_begin(new_wkv, 16);
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
    problem.eps = static_cast<float>(eps), problem.settled = settled;
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
        "Tensor? drawn, bool settled) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("head_step", TORCH_BOX(&run)); }
#endif
