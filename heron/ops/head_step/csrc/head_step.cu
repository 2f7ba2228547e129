// One token of every head's time mix on a GPU: a block for a head of some sequences, one after another.
//
// A thread asks for its part of the next sequence's state before it computes, so that no barrier stands between memory
// and a state's use. What a head computes is in ../../csrc/head.cuh.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <algorithm>

#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/head.cuh"

namespace {

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
    constexpr int kKeys = Head<size>::kKeys, kRun = kKeys < 16 / sizeof(S) ? kKeys : 16 / sizeof(S);
    using Keys = Run<S, kRun>;
    __shared__ HeadRoom<size> room;
    Head<size> mine(room);
    const int head = static_cast<int>(blockIdx.x) % p.heads, stride = static_cast<int>(gridDim.x) / p.heads;
    const int thread = mine.thread, lane = mine.lane, here = head * size + 2 * mine.pair;
    const auto key = [=](int i) { return kRun * (i / kRun * kLanes + lane) + i % kRun; };
    const auto at = [&](int sequence) { return static_cast<int64_t>(sequence) * p.heads * size; };
    const auto state_of = [&](int sequence) { return (at(sequence) + head * size) * size; };
    Keys next[kStateRows][kKeys / kRun];
    const auto ask = [&](int sequence) {
        const S* rows = static_cast<const S*>(p.wkv) + state_of(sequence) + kStateRows * mine.group * size;
#pragma unroll
        for (int row = 0; row < kStateRows; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; i += kRun) {
                next[row][i / kRun] = read_once(reinterpret_cast<const Keys*>(rows + row * size + key(i)));
            }
        }
    };
    const auto read = two_at<T>;
    const void* const of_sigmoid = p.of[mine.by_kind(kW, kIclr, kValue, kGate)];
    const void* const vector = p.of[mine.by_kind(kR, kK, kV, kVFirst)];

    const int first = static_cast<int>(blockIdx.x) / p.heads;
    for (int sequence = first; sequence < p.sequences && sequence <= first + stride; sequence += stride) {
        const auto* state = reinterpret_cast<const char*>(static_cast<const S*>(p.wkv) + state_of(sequence));
        for (int i = 128 * thread; i < size * size * static_cast<int>(sizeof(S)); i += 128 * 2 * size) prefetch(state + i);
    }
    const Two added = mine.kind == 3 ? Two{} : read(p.of[mine.by_kind(kW0, kA0, kV0, kV0)], here);
    const Two kk = read(p.of[kKK], here), ka = read(p.of[kKA], here), rk = read(p.of[kRK], here);
    const float weight = mine.own(read(p.of[kWeight], here)), bias = mine.own(read(p.of[kBias], here));
    if (!p.settled) wait_for_inputs();
    ask(first);
    if (p.settled) wait_for_inputs();
    Two next_of_sigmoid = read(of_sigmoid, at(first) + here), next_vector = read(vector, at(first) + here);

#pragma unroll 1
    for (int sequence = first; sequence < p.sequences; sequence += stride) {
        unsigned random = 0;
        if constexpr (sizeof(S) < 4) random = static_cast<unsigned>(p.drawn[sequence]);
        mine.mix(added, next_of_sigmoid, next_vector, p.of[kVFirst] != nullptr, kk, ka, rk);
        float state[kStateRows][kKeys];
#pragma unroll
        for (int row = 0; row < kStateRows; ++row) {
#pragma unroll
            for (int i = 0; i < kKeys; ++i) state[row][i] = static_cast<float>(next[row][i / kRun].values[i % kRun]);
        }
        if (sequence + stride < p.sequences) {
            ask(sequence + stride);
            next_of_sigmoid = read(of_sigmoid, at(sequence + stride) + here);
            next_vector = read(vector, at(sequence + stride) + here);
        }
        __syncthreads();
        const float y = mine.move_on(state, key);
        if constexpr (sizeof(S) < 4) random = mixed(mixed(random) + static_cast<unsigned>(2 * head * size + thread));
        S* new_rows = static_cast<S*>(p.new_wkv) + state_of(sequence) + kStateRows * mine.group * size;
#pragma unroll
        for (int row = 0; row < kStateRows; ++row) {
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
        mine.share_norm(y);
        __syncthreads();
        const float out = mine.ended(y, weight, bias, p.eps);
        if (lane % 2 == 0) {
            static_cast<T*>(p.y)[at(sequence) + here + mine.is_second] = static_cast<T>(out);
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
