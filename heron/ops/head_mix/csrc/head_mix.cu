// What stands between the projections of a time mix and its output matrix, but for WKV7, on a GPU: a kernel before WKV7
// and one after it, and the two of the backward in the other order. Every activation crosses the memory bus once.
//
// A block marches over a strip of consecutive tokens, a thread has the same channels in all of them. What it
// needs of a token it copies to shared memory some tokens ahead, for itself alone. A head's threads are in one warp, so
// sums over a head are shuffles and no barrier is needed. Sums over tokens (gradients of the weights) stay in registers
// until the strip ends; a second kernel adds up the strips, in one order.

#ifdef __CUDACC__  // the tests also compile the kernels for a CPU
#include <cuda_bf16.h>

#include <algorithm>

#include "../../csrc/operator.h"
#endif

#include "../../csrc/strips.cuh"

namespace {

constexpr int kThreads = 128;         // of a block, at most
constexpr int kAhead = 2;             // tokens; a power of two
constexpr float kLeastNorm = 1e-12f;  // of a removal key

// The tensors of each kernel in order: inputs and outputs (B, T, C), weights (C,), sums (C,). Those behind the colon of
// each list are for layers that mix v_first in.
namespace before {  // w, k, iclr : v, value, v_first -> w, k, a, b : v
enum Input { kW, kK, kIclr, kV, kValue, kVFirst, kInputs };
enum Weight { kW0, kA0, kKK, kKA, kV0, kWeights };
enum Output { kNewW, kNewK, kA, kB, kNewV, kOutputs };
}  // namespace before
namespace after {  // y, r, k, v, gate -> out; k and v as WKV7 took them
enum Input { kY, kR, kK, kV, kGate, kInputs };
enum Weight { kRK, kNormWeight, kNormBias, kWeights };
enum Output { kOut, kOutputs };
}  // namespace after
namespace after_backward {  // as after, d_out -> d_y, d_gate; what a head's sums give is kept in of_heads
enum Input { kY, kR, kK, kV, kGate, kDOut, kInputs };
enum Weight { kRK, kNormWeight, kNormBias, kWeights };
enum Output { kDY, kDGate, kOutputs };
enum Sum { kDRK, kDNormWeight, kDNormBias, kSums };
}  // namespace after_backward
// d_w, d_r, d_k, d_v, d_a, d_b are those of WKV7; its d_w is that of w, too.
namespace before_backward {
enum Input { kK, kIclr, kR, kDW, kDR, kDK, kDV, kDA, kDB, kDOut, kGate, kV, kValue, kVFirst, kInputs };
enum Weight { kA0, kKK, kKA, kRK, kV0, kWeights };
enum Output { kNewDR, kNewDK, kDIclr, kNewDV, kDValue, kDVFirst, kOutputs };
enum Sum { kDW0, kDA0, kDKK, kDKA, kDV0, kSums };
}  // namespace before_backward

constexpr int kMostInputs = before_backward::kInputs, kMostWeights = before_backward::kWeights,
              kMostOutputs = before_backward::kOutputs;

template <typename T>
struct Problem {
    const T* in[kMostInputs];
    const T* weights[kMostWeights];
    T* out[kMostOutputs];
    float2* of_heads;  // (rows, H): the sum of r k r_k, and its gradient
    float* of_strip;   // (strips, sums, C); null: no sums are wanted
    int rows, channels, head_size, strip;  // rows: tokens of all sequences
    float per_channel;                     // 1 / head_size
    float eps;
};

template <typename T>
constexpr int kWidth = 16 / sizeof(T);
constexpr int kNarrow = 4;  // of the kernel that keeps most in registers

// Blocks of a strip, each with some of the channels, and what a block takes.
struct Blocks {
    int columns, threads, bytes;
};

Blocks blocks_of(int channels, int width, int inputs, int bytes_each) {
    const int of_row = channels / width, columns = (of_row + kThreads - 1) / kThreads;
    const int threads = (of_row + 32 * columns - 1) / (32 * columns) * 32;
    return {columns, threads, kAhead * inputs * width * bytes_each * threads};
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// Sums over the channels of a head, which all of its `lanes` get.
template <int n>
__device__ __forceinline__ void head_sum(float (&values)[n], int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], mask);
}

// The thread's way through a strip: its channels in the tokens from `first` to `end`.
template <typename T, int width, int n_inputs>
class Strip {
  public:
    const bool mine;  // there are such channels
    const int first, end, lanes;

    __device__ __forceinline__ Strip(const Problem<T>& p)
        : mine(column() < p.channels),
          first(blockIdx.x * p.strip),
          end(min(first + p.strip, p.rows)),
          lanes(p.head_size / width),
          p_(p),
          heads_(p.channels / p.head_size),
          head_((mine ? column() : 0) / p.head_size),
          room_(reinterpret_cast<Pack<T, width>*>(shared_memory()) + threadIdx.x) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) begin(first + i);
    }

    __device__ __forceinline__ Pack<T, width> weight(int which) const {
        return load<T, width>(p_.weights[which] + column(), mine);
    }

    // Until the inputs of the next token are there.
    __device__ __forceinline__ void arrive() const { copies_arrived<kAhead - 1>(); }

    __device__ __forceinline__ void get(int input, int row, float (&values)[width]) const {
        place(row)[input * blockDim.x].get(values);
    }

    // No more is read of `row`.
    __device__ __forceinline__ void leave(int row) const { begin(row + kAhead); }

    __device__ __forceinline__ void put(int output, int row, const float (&values)[width]) const {
        if (mine) store(p_.out[output] + offset(row), values);
    }

    // The place of the head's numbers in of_heads.
    __device__ __forceinline__ float2* of_head(int row) const {
        return p_.of_heads + static_cast<int64_t>(row) * heads_ + head_;
    }

    __device__ __forceinline__ void put_sum(int which, int sums, const float (&values)[width]) const {
        const int64_t at = (static_cast<int64_t>(blockIdx.x) * sums + which) * p_.channels + column();
        if (mine && p_.of_strip) store(p_.of_strip + at, values);
    }

  private:
    __device__ __forceinline__ static int column() { return (blockIdx.y * blockDim.x + threadIdx.x) * width; }

    __device__ __forceinline__ int64_t offset(int row) const {
        return static_cast<int64_t>(row) * p_.channels + (mine ? column() : 0);
    }

    __device__ __forceinline__ Pack<T, width>* place(int row) const {
        return room_ + (row & (kAhead - 1)) * n_inputs * blockDim.x;
    }

    __device__ __forceinline__ void begin(int row) const {
        if (row < end) {
#pragma unroll
            for (int i = 0; i < n_inputs; ++i) begin_copy(place(row) + i * blockDim.x, p_.in[i] + offset(row), mine);
        }
        end_of_copies();
    }

    const Problem<T>& p_;
    const int heads_, head_;
    Pack<T, width>* const room_;  // [row % kAhead][input][thread]
};

template <typename T, bool mixes>
__global__ void __launch_bounds__(kThreads, 6) run_before(const __grid_constant__ Problem<T> p) {
    using namespace before;
    constexpr int width = kWidth<T>;
    const Strip<T, width, mixes ? kInputs : kV> strip(p);
    const auto w0s = strip.weight(kW0), a0s = strip.weight(kA0), k_ks = strip.weight(kKK), k_as = strip.weight(kKA);
    const auto v0s = strip.weight(mixes ? kV0 : kW0);

    for (int row = strip.first; row < strip.end; ++row) {
        strip.arrive();
        float k[width], iclr[width], removal_key[width], out[width], weight[width], square[1] = {};
        strip.get(kK, row, k), strip.get(kIclr, row, iclr);
        a0s.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) iclr[i] = sigmoid(weight[i] + iclr[i]);
        k_ks.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            removal_key[i] = k[i] * weight[i];
            square[0] += removal_key[i] * removal_key[i];
        }
        head_sum(square, strip.lanes);
        k_as.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) out[i] = k[i] * (1.0f + (iclr[i] - 1.0f) * weight[i]);
        strip.put(kNewK, row, out);
        const float scale = 1.0f / fmaxf(sqrtf(square[0]), kLeastNorm);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            out[i] = -removal_key[i] * scale;
            iclr[i] *= -out[i];
        }
        strip.put(kA, row, out);
        strip.put(kB, row, iclr);
        strip.get(kW, row, out);
        w0s.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) out[i] += weight[i];
        strip.put(kNewW, row, out);
        if constexpr (mixes) {
            float first[width], mix[width];
            strip.get(kV, row, out), strip.get(kVFirst, row, first), strip.get(kValue, row, mix);
            v0s.get(weight);
#pragma unroll
            for (int i = 0; i < width; ++i) out[i] += (first[i] - out[i]) * sigmoid(weight[i] + mix[i]);
            strip.put(kNewV, row, out);
        }
        strip.leave(row);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 6) run_after(const __grid_constant__ Problem<T> p) {
    using namespace after;
    constexpr int width = kWidth<T>;
    const Strip<T, width, kInputs> strip(p);
    const auto r_ks = strip.weight(kRK), norm_weights = strip.weight(kNormWeight), biases = strip.weight(kNormBias);

    for (int row = strip.first; row < strip.end; ++row) {
        strip.arrive();
        float y[width], r[width], k[width], weight[width], sums[2] = {}, square[1] = {};
        strip.get(kY, row, y), strip.get(kR, row, r), strip.get(kK, row, k);
        r_ks.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            sums[0] += y[i];
            sums[1] += r[i] * k[i] * weight[i];
        }
        head_sum(sums, strip.lanes);
        const float mean = sums[0] * p.per_channel, bonus = sums[1];
#pragma unroll
        for (int i = 0; i < width; ++i) {
            y[i] -= mean;
            square[0] += y[i] * y[i];
        }
        head_sum(square, strip.lanes);
        const float scale = rsqrtf(square[0] * p.per_channel + p.eps);
        float bias[width], v[width], gate[width];
        norm_weights.get(weight), biases.get(bias), strip.get(kV, row, v), strip.get(kGate, row, gate);
#pragma unroll
        for (int i = 0; i < width; ++i) y[i] = (y[i] * scale * weight[i] + bias[i] + bonus * v[i]) * gate[i];
        strip.put(kOut, row, y);
        strip.leave(row);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) run_after_backward(const __grid_constant__ Problem<T> p) {
    using namespace after_backward;
    constexpr int width = kWidth<T>;
    const Strip<T, width, kInputs> strip(p);
    const auto r_ks = strip.weight(kRK), norm_weights = strip.weight(kNormWeight), biases = strip.weight(kNormBias);
    float of_r_k[width] = {}, of_weight[width] = {}, of_bias[width] = {};

    for (int row = strip.first; row < strip.end; ++row) {
        strip.arrive();
        float y[width], d[width], left[width], right[width], weight[width];
        float sums[3] = {};  // of y, r k r_k, and the gradient of that
        strip.get(kY, row, y), strip.get(kR, row, left), strip.get(kK, row, right);
        r_ks.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            sums[0] += y[i];
            sums[1] += left[i] * right[i] * weight[i];
        }
        strip.get(kDOut, row, d), strip.get(kGate, row, left), strip.get(kV, row, right);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            d[i] *= left[i];
            sums[2] += d[i] * right[i];
        }
        head_sum(sums, strip.lanes);
        const float mean = sums[0] * p.per_channel, bonus = sums[1], d_bonus = sums[2];
        if (strip.mine && threadIdx.x % strip.lanes == 0) *strip.of_head(row) = {bonus, d_bonus};

        float moments[3] = {};  // of the square of y, of the gradient of what is normed, of its product with y
        norm_weights.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            y[i] -= mean;
            moments[0] += y[i] * y[i];
            moments[1] += d[i] * weight[i];
            moments[2] += d[i] * weight[i] * y[i];
        }
        head_sum(moments, strip.lanes);
        const float scale = rsqrtf(moments[0] * p.per_channel + p.eps);
        const float d_mean = moments[1] * p.per_channel, slope = moments[2] * scale * p.per_channel;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            y[i] *= scale;
            of_weight[i] += d[i] * y[i];
            of_bias[i] += d[i];
            d[i] = (d[i] * weight[i] - d_mean - y[i] * slope) * scale;
        }
        strip.put(kDY, row, d);
        biases.get(left), strip.get(kDOut, row, d);
#pragma unroll
        for (int i = 0; i < width; ++i) d[i] *= y[i] * weight[i] + left[i] + bonus * right[i];
        strip.put(kDGate, row, d);
        strip.get(kR, row, left), strip.get(kK, row, right);
#pragma unroll
        for (int i = 0; i < width; ++i) of_r_k[i] += d_bonus * left[i] * right[i];
        strip.leave(row);
    }
    strip.put_sum(kDRK, kSums, of_r_k);
    strip.put_sum(kDNormWeight, kSums, of_weight);
    strip.put_sum(kDNormBias, kSums, of_bias);
}

template <typename T, bool mixes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 5)
    run_before_backward(const __grid_constant__ Problem<T> p) {
    using namespace before_backward;
    constexpr int width = kNarrow, sums = mixes ? kSums : kDV0;
    const Strip<T, width, mixes ? kInputs : kV> strip(p);
    const auto a0s = strip.weight(kA0), k_ks = strip.weight(kKK), k_as = strip.weight(kKA), r_ks = strip.weight(kRK);
    const auto v0s = strip.weight(mixes ? kV0 : kA0);
    float of_w0[width] = {}, of_a0[width] = {}, of_k_k[width] = {}, of_k_a[width] = {}, of_v0[width] = {};

    float2 next_of_head = *strip.of_head(strip.first);
    for (int row = strip.first; row < strip.end; ++row) {
        const float2 of_head = next_of_head;
        if (row + 1 < strip.end) next_of_head = *strip.of_head(row + 1);
        const float bonus = of_head.x, d_bonus = of_head.y;
        strip.arrive();
        float k[width], iclr[width], removal_key[width], d_b[width], d_removal_key[width], weight[width];
        float head[2] = {};  // the square of the removal key, its product with its gradient
        strip.get(kIclr, row, iclr), a0s.get(weight);
#pragma unroll
        for (int i = 0; i < width; ++i) iclr[i] = sigmoid(weight[i] + iclr[i]);
        strip.get(kK, row, k), k_ks.get(weight), strip.get(kDA, row, d_removal_key), strip.get(kDB, row, d_b);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            removal_key[i] = k[i] * weight[i];
            d_removal_key[i] = d_b[i] * iclr[i] - d_removal_key[i];
            head[0] += removal_key[i] * removal_key[i];
            head[1] += removal_key[i] * d_removal_key[i];
        }
        head_sum(head, strip.lanes);
        const float norm = sqrtf(head[0]), scale = 1.0f / fmaxf(norm, kLeastNorm);
        const float along = norm < kLeastNorm ? 0.0f : head[1] * scale;

        float d_k[width], out[width], slope[width], r_k[width];
        k_as.get(slope), r_ks.get(r_k);
        strip.get(kDR, row, out);
#pragma unroll
        for (int i = 0; i < width; ++i) out[i] += d_bonus * r_k[i] * k[i] * (1.0f + (iclr[i] - 1.0f) * slope[i]);
        strip.put(kNewDR, row, out);
        strip.get(kR, row, d_k), strip.get(kDK, row, out);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            d_k[i] = out[i] + d_bonus * r_k[i] * d_k[i];  // of k as WKV7 took it
            removal_key[i] *= scale;
            d_removal_key[i] = (d_removal_key[i] - removal_key[i] * along) * scale;  // before its norm was taken out
            const float d_iclr = d_b[i] * removal_key[i] + d_k[i] * k[i] * slope[i];
            out[i] = d_iclr * iclr[i] * (1.0f - iclr[i]);
            of_a0[i] += out[i];
            of_k_k[i] += d_removal_key[i] * k[i];
            of_k_a[i] += d_k[i] * k[i] * (iclr[i] - 1.0f);
            d_k[i] = d_k[i] * (1.0f + (iclr[i] - 1.0f) * slope[i]) + d_removal_key[i] * weight[i];
        }
        strip.put(kDIclr, row, out);
        strip.put(kNewDK, row, d_k);

        strip.get(kDW, row, out);
#pragma unroll
        for (int i = 0; i < width; ++i) of_w0[i] += out[i];
        float d_v[width];
        strip.get(kDV, row, d_v), strip.get(kDOut, row, out), strip.get(kGate, row, weight);
#pragma unroll
        for (int i = 0; i < width; ++i) d_v[i] += bonus * out[i] * weight[i];
        if constexpr (mixes) {
            float v[width], first[width], mix[width];
            strip.get(kValue, row, mix), v0s.get(weight), strip.get(kV, row, v), strip.get(kVFirst, row, first);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                const float share = sigmoid(weight[i] + mix[i]);
                out[i] = d_v[i] * share;
                d_v[i] -= out[i];
                mix[i] = out[i] * (1.0f - share) * (first[i] - v[i]);
                of_v0[i] += mix[i];
            }
            strip.put(kDVFirst, row, out);
            strip.put(kDValue, row, mix);
        }
        strip.put(kNewDV, row, d_v);
        strip.leave(row);
    }
    strip.put_sum(kDW0, sums, of_w0);
    strip.put_sum(kDA0, sums, of_a0);
    strip.put_sum(kDKK, sums, of_k_k);
    strip.put_sum(kDKA, sums, of_k_a);
    if constexpr (mixes) strip.put_sum(kDV0, sums, of_v0);
}

}  // namespace

#ifdef __CUDACC__
namespace {

// What an operator gets, and what it gives beside sums over tokens.
struct Call {
    const Tensors &inputs, &weights;
    Tensors out;
    Tensor of_heads;  // (B, T, H, 2); may be undefined
    int64_t head_size;
    double eps;
};

void check(const Tensor& x, const Tensor& like, int64_t size, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && on_one_device(x, like) && x.numel() == size &&
                    x.is_contiguous() && begins_at_multiple_of(16, x),
                    "head_mix: ", name, " must be contiguous, 16-byte aligned, of one size, dtype and device");
}

template <typename T>
Problem<T> problem_of(const Call& call) {
    const Tensor& like = call.inputs[0];
    const int64_t channels = call.weights[0].numel(), rows = like.numel() / channels;
    STD_TORCH_CHECK(rows < int64_t{1} << 30, "head_mix: too many tokens");
    STD_TORCH_CHECK(call.head_size == 16 || call.head_size == 32 || call.head_size == 64 || call.head_size == 128,
                    "head_mix: heads must be of 16, 32, 64 or 128");
    STD_TORCH_CHECK(channels % call.head_size == 0, "head_mix: whole heads");
    Problem<T> p{};
    for (size_t i = 0; i < call.inputs.size(); ++i) {
        check(call.inputs[i], like, like.numel(), "inputs");
        p.in[i] = call.inputs[i].const_data_ptr<T>();
    }
    for (size_t i = 0; i < call.weights.size(); ++i) {
        check(call.weights[i], like, channels, "weights");
        p.weights[i] = call.weights[i].const_data_ptr<T>();
    }
    for (size_t i = 0; i < call.out.size(); ++i) p.out[i] = call.out[i].mutable_data_ptr<T>();
    if (call.of_heads.defined()) p.of_heads = reinterpret_cast<float2*>(call.of_heads.mutable_data_ptr<float>());
    p.rows = static_cast<int>(rows), p.channels = static_cast<int>(channels);
    p.head_size = static_cast<int>(call.head_size);
    p.per_channel = 1.0f / static_cast<float>(call.head_size), p.eps = static_cast<float>(call.eps);
    return p;
}

// Run `kernel`, whose threads have `width` channels, with as many strips as the device runs blocks at a time. Its `sums`
// join what it gives.
template <typename T>
void start(void (*kernel)(Problem<T>), int width, int sums, Call& call) {
    const Tensor& like = call.inputs[0];
    const auto stream = current_stream();
    Problem<T> p = problem_of<T>(call);
    const auto outputs = call.out.size();
    for (int i = 0; i < sums; ++i) {
        call.out.push_back(p.rows ? empty({p.channels}, like) : zeros({p.channels}, like));
    }
    if (p.rows == 0) return;
    const auto rounded_up = [](int x, int parts) { return (x + parts - 1) / parts; };
    const auto [columns, threads, bytes] =
        blocks_of(p.channels, width, static_cast<int>(call.inputs.size()), sizeof(T));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    p.strip = rounded_up(p.rows, std::max(1, blocks_at_a_time(kernel, threads, bytes) / columns));
    const int strips = rounded_up(p.rows, p.strip);
    Tensor of_strip;
    if (sums) {
        of_strip = empty({strips, sums, p.channels}, like, ScalarType::Float);
        p.of_strip = of_strip.mutable_data_ptr<float>();
    }
    kernel<<<dim3(strips, columns), threads, bytes, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (sums) {
        Columns<T> q{p.of_strip, {}, strips, p.channels, sums * p.channels};
        for (int i = 0; i < sums; ++i) q.out[i] = call.out[outputs + i].template mutable_data_ptr<T>();
        add_up_strips<T><<<rounded_up(q.columns, kColumns), kColumns * kPerColumn, 0, stream>>>(q);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
}

Tensors several_like(const Tensor& like, int n) {
    Tensors out;
    for (int i = 0; i < n; ++i) out.push_back(empty_like(like));
    return out;
}

Tensors before_on_cuda(const Tensors& inputs, const Tensors& weights, int64_t head_size) {
    using namespace before;
    const DeviceGuard guard(inputs[0].get_device_index());
    const bool mixes = inputs.size() == kInputs;
    STD_TORCH_CHECK((mixes || inputs.size() == kV) && weights.size() == (mixes ? kWeights : kV0), "head_mix: before");
    Call call{inputs, weights, several_like(inputs[0], mixes ? kOutputs : kNewV), {}, head_size, 0};
    with_dtype<float, BFloat16>(inputs[0], "head_mix", [&](auto zero) {
        using scalar_t = decltype(zero);
        start<scalar_t>(mixes ? run_before<scalar_t, true> : run_before<scalar_t, false>, kWidth<scalar_t>, 0, call);
    });
    return call.out;
}

Tensors after_on_cuda(const Tensors& inputs, const Tensors& weights, int64_t head_size, double eps) {
    using namespace after;
    const DeviceGuard guard(inputs[0].get_device_index());
    STD_TORCH_CHECK(inputs.size() == kInputs && weights.size() == kWeights, "head_mix: after");
    Call call{inputs, weights, several_like(inputs[kGate], kOutputs), {}, head_size, eps};
    with_dtype<float, BFloat16>(inputs[0], "head_mix", [&](auto zero) {
        using scalar_t = decltype(zero);
        start<scalar_t>(run_after<scalar_t>, kWidth<scalar_t>, 0, call);
    });
    return call.out;
}

Tensors after_backward_on_cuda(const Tensors& inputs, const Tensors& weights, int64_t head_size,
                               double eps, bool of_weights) {
    using namespace after_backward;
    const DeviceGuard guard(inputs[0].get_device_index());
    STD_TORCH_CHECK(inputs.size() == kInputs && weights.size() == kWeights, "head_mix: after_backward");
    const Tensor& gate = inputs[kGate];
    const auto of_heads = empty({gate.size(0), gate.size(1), gate.size(2) / head_size, 2},
                                gate, ScalarType::Float);
    Call call{inputs, weights, several_like(gate, kOutputs), of_heads, head_size, eps};
    with_dtype<float, BFloat16>(inputs[0], "head_mix", [&](auto zero) {
        using scalar_t = decltype(zero);
        start<scalar_t>(run_after_backward<scalar_t>, kWidth<scalar_t>, of_weights ? kSums : 0, call);
    });
    call.out.push_back(of_heads);
    return call.out;
}

Tensors before_backward_on_cuda(const Tensors& inputs, const Tensors& weights,
                                const Tensor& of_heads, int64_t head_size, bool of_weights) {
    using namespace before_backward;
    const DeviceGuard guard(inputs[0].get_device_index());
    const bool mixes = inputs.size() == kInputs;
    STD_TORCH_CHECK((mixes || inputs.size() == kV) && weights.size() == (mixes ? kWeights : kV0),
                    "head_mix: before_backward");
    Call call{inputs, weights, several_like(inputs[0], mixes ? kOutputs : kDValue), of_heads, head_size, 0};
    with_dtype<float, BFloat16>(inputs[0], "head_mix", [&](auto zero) {
        using scalar_t = decltype(zero);
        start<scalar_t>(mixes ? run_before_backward<scalar_t, true> : run_before_backward<scalar_t, false>, kNarrow,
                        !of_weights ? 0 : mixes ? kSums : kDV0, call);
    });
    return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("head_mix_before", TORCH_BOX(&before_on_cuda));
    library.impl("head_mix_after", TORCH_BOX(&after_on_cuda));
    library.impl("head_mix_after_backward", TORCH_BOX(&after_backward_on_cuda));
    library.impl("head_mix_before_backward", TORCH_BOX(&before_backward_on_cuda));
}
#endif
