// AdamW for many tensors on a GPU: gradients, weights and moments are read once, weights and moments written once, and
// so are bf16 copies of the weights. A block steps a chunk of one tensor. Products and sums are fused only as written.

#ifdef __CUDACC__  // the tests also compile the kernels for a CPU
#include "../../csrc/operator.h"
#endif

#include "../../csrc/chunks.cuh"

#include <cstdint>
#include <optional>
#include <vector>

namespace {

constexpr int kTensors = 512;  // of one launch: what it is told about them must fit in 32,764 bytes
constexpr int kThreads = 256;
constexpr int kWidth = 4, kAhead = 2;  // values in a piece; pieces that a thread reads before it writes the first
constexpr int kChunk = 8192;           // values: few enough for the last blocks to end almost together

struct Stepped {
    float *weight, *exp_avg, *exp_avg_sq, *step;
    const void* gradient;
    BFloat16* copy;  // null: none
    int64_t size;
};
using Table = Chunked<Stepped, kTensors>;
struct Rule {
    double lr, beta1, beta2, eps, weight_decay;
    const float *grad_scale, *found_inf;  // null: none

    __device__ bool holds_back() const { return found_inf && *found_inf != 0; }
};
static_assert(sizeof(Table) + sizeof(Rule) + sizeof(void*) <= 32764);

// What the numbers of a tensor need beside themselves in its t-th step.
struct Step {
    float unscale, decay, beta1_rest, beta2_rest, size, of_v, eps;
};

__device__ Step step_at(double t, const Rule& rule) {
    return {rule.grad_scale ? 1 / *rule.grad_scale : 1,
            static_cast<float>(rule.lr * rule.weight_decay),
            static_cast<float>(1 - rule.beta1),
            static_cast<float>(1 - rule.beta2),
            static_cast<float>(rule.lr / (1 - pow(rule.beta1, t))),
            static_cast<float>(sqrt(1 - pow(rule.beta2, t))),
            static_cast<float>(rule.eps)};
}

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    T values[width];
};

template <int width, typename Gradient>
__device__ __forceinline__ void step_chunk(const Stepped& tensor, int64_t begin, int size, const Step& step) {
    auto* __restrict__ weights = reinterpret_cast<Pack<float, width>*>(tensor.weight + begin);
    auto* __restrict__ ms = reinterpret_cast<Pack<float, width>*>(tensor.exp_avg + begin);
    auto* __restrict__ vs = reinterpret_cast<Pack<float, width>*>(tensor.exp_avg_sq + begin);
    const auto* __restrict__ gs =
        reinterpret_cast<const Pack<Gradient, width>*>(static_cast<const Gradient*>(tensor.gradient) + begin);
    auto* __restrict__ copies = reinterpret_cast<Pack<BFloat16, width>*>(tensor.copy ? tensor.copy + begin : nullptr);
    const int pieces = size / width;
    for (int first = threadIdx.x; first < pieces; first += kAhead * kThreads) {
        Pack<float, width> p[kAhead], m[kAhead], v[kAhead];
        Pack<Gradient, width> g[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int at = first + i * kThreads;
            if (at < pieces) p[i] = weights[at], m[i] = ms[at], v[i] = vs[at], g[i] = gs[at];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int at = first + i * kThreads;
            if (at >= pieces) break;
            Pack<BFloat16, width> rounded;
#pragma unroll
            for (int j = 0; j < width; ++j) {
                const float d = __fmul_rn(static_cast<float>(g[i].values[j]), step.unscale);
                float &w = p[i].values[j], &m_ = m[i].values[j], &v_ = v[i].values[j];
                w = __fmaf_rn(-step.decay, w, w);
                m_ = __fmaf_rn(step.beta1_rest, __fsub_rn(d, m_), m_);
                v_ = __fmaf_rn(step.beta2_rest, __fsub_rn(__fmul_rn(d, d), v_), v_);
                const float scale = __fadd_rn(__fdiv_rn(__fsqrt_rn(v_), step.of_v), step.eps);
                w = __fsub_rn(w, __fdiv_rn(__fmul_rn(m_, step.size), scale));
                rounded.values[j] = static_cast<BFloat16>(w);
            }
            weights[at] = p[i], ms[at] = m[i], vs[at] = v[i];
            if (copies) copies[at] = rounded;
        }
    }
}

__device__ bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Before the step of any chunk, with a thread for each tensor: its count goes up, and what goes by it is written down.
__global__ void count(const __grid_constant__ Table table, const __grid_constant__ Rule rule, Step* steps) {
    if (rule.holds_back() || threadIdx.x >= table.n) return;
    const float t = *table.tensor[threadIdx.x].step + 1;
    *table.tensor[threadIdx.x].step = t;
    steps[threadIdx.x] = step_at(t, rule);
}

template <typename Gradient>
__global__ void __launch_bounds__(kThreads, 4)
    adamw(const __grid_constant__ Table table, const __grid_constant__ Rule rule, const Step* steps) {
    if (rule.holds_back()) return;
    const int block = static_cast<int>(blockIdx.x);
    const int t = table.of_block(block);
    const Stepped& tensor = table.tensor[t];
    const Step step = steps[t];
    const int64_t begin = static_cast<int64_t>(block - table.first_chunk[t]) * kChunk;
    const int size = static_cast<int>(tensor.size - begin < kChunk ? tensor.size - begin : kChunk);
    const bool whole = size % kWidth == 0 && aligned(tensor.gradient, kWidth * sizeof(Gradient)) &&
                       aligned(tensor.copy, kWidth * sizeof(BFloat16)) && aligned(tensor.weight, kWidth * sizeof(float)) &&
                       aligned(tensor.exp_avg, kWidth * sizeof(float)) && aligned(tensor.exp_avg_sq, kWidth * sizeof(float));
    if (whole)
        step_chunk<kWidth, Gradient>(tensor, begin, size, step);
    else
        step_chunk<1, Gradient>(tensor, begin, size, step);
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T>
T* data(const Tensor& tensor, const Tensor& weight, const char* name) {
    STD_TORCH_CHECK(on_one_device(tensor, weight) && tensor.is_contiguous() && tensor.sizes().equals(weight.sizes()),
                    name, " must be contiguous, of the shape and on the device of their weights");
    return tensor.mutable_data_ptr<T>();
}

float* scalar(const Tensor& tensor, int device, const char* name) {
    STD_TORCH_CHECK(tensor.get_device_index() == device && tensor.numel() == 1, name, " must be scalars beside weights");
    return tensor.mutable_data_ptr<float>();
}

void adamw_(const Tensors& weights, const Tensors& gradients, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
            const Tensors& steps, const Tensors& copies, double lr, double beta1, double beta2, double eps,
            double weight_decay, const Optional& grad_scale, const Optional& found_inf) {
    const int device = weights[0].get_device_index();
    const bool in_half = gradients[0].scalar_type() == ScalarType::BFloat16;
    std::vector<Stepped> tensors;
    tensors.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
        const auto& weight = weights[i];
        STD_TORCH_CHECK(weight.get_device_index() == device, "weights must be on one device");
        tensors.push_back({
            data<float>(weight, weight, "weights"),
            data<float>(exp_avgs[i], weight, "exp_avgs"),
            data<float>(exp_avg_sqs[i], weight, "exp_avg_sqs"),
            scalar(steps[i], device, "steps"),
            in_half ? static_cast<const void*>(data<BFloat16>(gradients[i], weight, "gradients"))
                    : data<float>(gradients[i], weight, "gradients"),
            copies.empty() ? nullptr : data<BFloat16>(copies[i], weight, "copies"),
            weight.numel(),
        });
    }
    const DeviceGuard guard(device);
    const auto stream = current_stream();
    const Rule rule{lr, beta1, beta2, eps, weight_decay,
                    grad_scale ? scalar(*grad_scale, device, "grad_scale") : nullptr,
                    found_inf ? scalar(*found_inf, device, "found_inf") : nullptr};
    const int64_t bytes = sizeof(Step) * kTensors;
    const Tensor room = empty({bytes / static_cast<int64_t>(sizeof(float))}, weights[0], ScalarType::Float);
    auto* rules = reinterpret_cast<Step*>(room.mutable_data_ptr<float>());
    for_tables<Table>(tensors, kChunk, [&](const Table& table, int chunks, int) {
        count<<<1, kTensors, 0, stream>>>(table, rule, rules);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        if (chunks == 0) return;
        in_half ? adamw<BFloat16><<<chunks, kThreads, 0, stream>>>(table, rule, rules)
                : adamw<float><<<chunks, kThreads, 0, stream>>>(table, rule, rules);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "adamw_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor(e!)[] copies, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "Tensor? grad_scale, Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("adamw_", TORCH_BOX(&adamw_)); }
#endif
