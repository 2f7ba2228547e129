// One token of every head's time mix on a GPU: a block for a head, all of it in registers and shared memory.
//
// Four lanes share a row of the state, one value channel; each has every fourth run of keys, 16 bytes. Sums over a head's
// channels are sums over warps, then over what the warps bring, in one order.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr float kDecayScale = 0.60653065971263342f;  // e^-0.5
constexpr float kLeastNorm = 1e-12f;

// Of a channel each: (sequences, C), and from kW0 on (C,). kValue, kVFirst and kV0 may be null, all three.
enum Name { kR, kW, kK, kV, kIclr, kGate, kValue, kVFirst, kW0, kA0, kKK, kKA, kRK, kWeight, kBias, kV0, kNames };

struct Problem {
    const void* of[kNames];
    void* y;
    const void* wkv;       // (sequences, H, N, N)
    void* new_wkv;         // as wkv, or wkv itself
    const int64_t* drawn;  // (sequences,), for states that are rounded at random
    int heads;
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

// One of the two neighbours of x in bf16, the nearer the likelier; what is random are 16 bits.
__device__ __forceinline__ float rounded(float x, unsigned random) {
    const unsigned bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + (random & 0xffffu)) & 0xffff0000u);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The sum over the channels of a head, whose four lanes have the same x; `room` is for this sum alone.
template <int size>
__device__ __forceinline__ float head_sum(float x, float (&room)[size / 8]) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(kAll, x, mask);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < size / 8; ++i) sum += room[i];
    return sum;
}

// T: of all but the states; S: of the states, rounded at random if it is not fp32.
template <typename T, typename S, int size>
__global__ void __launch_bounds__(4 * size) head_step(const __grid_constant__ Problem p) {
    constexpr int kKeys = size / 4, kRun = kKeys < 16 / sizeof(S) ? kKeys : 16 / sizeof(S);
    __shared__ float rooms[4][size / 8];
    __shared__ float vectors[5][size];  // r, decay, k, removal key before it is normed, the same times iclr
    const int head = static_cast<int>(blockIdx.x) % p.heads;
    const int channel = static_cast<int>(threadIdx.x / 4), lane = static_cast<int>(threadIdx.x % 4);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * size + channel;  // of (sequences, C)
    const auto key = [=](int i) { return kRun * (i / kRun * 4 + lane) + i % kRun; };
    const auto read = [&](Name name) {
        return static_cast<float>(static_cast<const T*>(p.of[name])[name < kW0 ? at : head * size + channel]);
    };
    const S* row = static_cast<const S*>(p.wkv) + at * size;
    S* new_row = static_cast<S*>(p.new_wkv) + at * size;
#pragma unroll
    for (int i = 0; i < kKeys; i += kRun) prefetch(row + key(i));
    const float w0 = read(kW0), a0 = read(kA0), kk = read(kKK), ka = read(kKA), rk = read(kRK);
    const float weight = read(kWeight), bias = read(kBias), v0 = p.of[kV0] != nullptr ? read(kV0) : 0.0f;
    wait_for_inputs();
    float state[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; i += kRun) {
        const auto run = *reinterpret_cast<const Run<S, kRun>*>(row + key(i));
#pragma unroll
        for (int j = 0; j < kRun; ++j) state[i + j] = static_cast<float>(run.values[j]);
    }
    const float r = read(kR), raw_key = read(kK), iclr = sigmoid(a0 + read(kIclr)), gate = read(kGate);
    float v = read(kV);
    if (p.of[kVFirst] != nullptr) v += (read(kVFirst) - v) * sigmoid(v0 + read(kValue));
    const float removal_key = raw_key * kk, k = raw_key * (1.0f + (iclr - 1.0f) * ka);
    const float bonus_part = r * k * rk;
    if (lane == 0) {
        vectors[0][channel] = r;
        vectors[1][channel] = expf(-kDecayScale * sigmoid(w0 + read(kW)));
        vectors[2][channel] = k;
        vectors[3][channel] = removal_key;
        vectors[4][channel] = removal_key * iclr;
    }
    const float norm = fmaxf(sqrtf(head_sum<size>(removal_key * removal_key, rooms[0])), kLeastNorm);
    const float bonus = head_sum<size>(bonus_part, rooms[1]);

    float removed = 0.0f, y = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) removed += state[i] * vectors[3][key(i)];
    removed += __shfl_xor_sync(kAll, removed, 1);
    removed += __shfl_xor_sync(kAll, removed, 2);
    removed /= norm * norm;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
        float& s = state[i];
        s = s * vectors[1][key(i)] - removed * vectors[4][key(i)] + v * vectors[2][key(i)];
        y += s * vectors[0][key(i)];
    }
    unsigned random = 0;
    if constexpr (sizeof(S) < 4) {
        const auto drawn = static_cast<unsigned>(p.drawn[blockIdx.x / p.heads]);
        random = mixed(mixed(drawn) + static_cast<unsigned>(4 * (head * size + channel) + lane));
    }
#pragma unroll
    for (int i = 0; i < kKeys; i += kRun) {
        Run<S, kRun> run;
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            if constexpr (sizeof(S) < 4) {
                if ((i + j) % 2 == 0) random = mixed(random + 0x9e3779b9u);
                run.values[j] = static_cast<S>(rounded(state[i + j], (i + j) % 2 == 0 ? random : random >> 16));
            } else {
                run.values[j] = state[i + j];
            }
        }
        *reinterpret_cast<Run<S, kRun>*>(new_row + key(i)) = run;
    }
    y += __shfl_xor_sync(kAll, y, 1);
    y += __shfl_xor_sync(kAll, y, 2);
    const float distance = y - head_sum<size>(y, rooms[2]) / size;
    const float variance = head_sum<size>(distance * distance, rooms[3]) / size;
    y = distance / sqrtf(variance + p.eps) * weight + bias + bonus * v;
    if (lane == 0) static_cast<T*>(p.y)[at] = static_cast<T>(y * gate);
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, typename S, int size>
void start(const Problem& problem, int64_t sequences, int device) {
    STD_CUDA_CHECK(launch_early(head_step<T, S, size>, static_cast<unsigned>(sequences * problem.heads), 4 * size, 0,
                                current_stream(), device, problem));
}

template <typename T, typename S>
void start_size(const Problem& problem, int64_t sequences, int size, int device) {
    if (size == 16) start<T, S, 16>(problem, sequences, device);
    if (size == 32) start<T, S, 32>(problem, sequences, device);
    if (size == 64) start<T, S, 64>(problem, sequences, device);
    if (size == 128) start<T, S, 128>(problem, sequences, device);
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
    problem.heads = static_cast<int>(wkv.size(1));
    problem.eps = static_cast<float>(eps);
    const bool in_fp32 = wkv.scalar_type() == ScalarType::Float;
    const auto with_states = [=](auto in_fp32_form, auto in_bf16_form) { return in_fp32 ? in_fp32_form : in_bf16_form; };
    const auto start = r.scalar_type() == ScalarType::Float
                           ? with_states(start_size<float, float>, start_size<float, BFloat16>)
                       : r.scalar_type() == ScalarType::BFloat16
                           ? with_states(start_size<BFloat16, float>, start_size<BFloat16, BFloat16>)
                           : with_states(start_size<Half, float>, start_size<Half, BFloat16>);
    start(problem, r.size(0), static_cast<int>(wkv.size(3)), r.get_device_index());
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
