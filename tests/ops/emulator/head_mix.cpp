// The kernels of head_mix as a library for a CPU.
#include "single_token.h"

#include <algorithm>

#define __shared__ static

struct float2 { float x, y; };
struct __nv_bfloat162 { uint32_t bits; };
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {pack(low, high)}; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::min;

#include "../../../heron/ops/head_mix/csrc/head_mix.cu"

namespace {
template <typename T> struct Kernel { void (*run)(Problem<T>); int width, inputs, outputs, sums; };

template <typename T> Kernel<T> kernel_of(const char* name, bool mixes) {
  const int width = kWidth<T>;
  if (!strcmp(name, "before")) {
    using namespace before;
    if (mixes) return {run_before<T, true>, width, kInputs, kOutputs, 0};
    return {run_before<T, false>, width, kV, kNewV, 0};
  }
  if (!strcmp(name, "after")) return {run_after<T>, width, after::kInputs, after::kOutputs, 0};
  if (!strcmp(name, "after_backward")) {
    using namespace after_backward;
    return {run_after_backward<T>, width, kInputs, kOutputs, kSums};
  }
  using namespace before_backward;
  if (mixes) return {run_before_backward<T, true>, kNarrow, kInputs, kOutputs, kSums};
  return {run_before_backward<T, false>, kNarrow, kV, kDValue, kDV0};
}

template <typename T>
const char* run(const char* name, bool mixes, void** in, void** weights, int n_weights, void** out, float* of_heads,
                float* of_strip, const int* sizes, float eps) {
  const Kernel<T> kernel = kernel_of<T>(name, mixes);
  Problem<T> p{};
  for (int i = 0; i < kernel.inputs; i++) p.in[i] = static_cast<const T*>(in[i]);
  for (int i = 0; i < n_weights; i++) p.weights[i] = static_cast<const T*>(weights[i]);
  for (int i = 0; i < kernel.outputs; i++) p.out[i] = static_cast<T*>(out[i]);
  p.of_heads = reinterpret_cast<float2*>(of_heads);
  p.of_strip = of_strip;
  p.rows = sizes[0], p.channels = sizes[1], p.head_size = sizes[2], p.strip = sizes[3];
  p.per_channel = 1.0f / p.head_size, p.eps = eps;
  const int strips = (p.rows + p.strip - 1) / p.strip;
  const Blocks blocks = blocks_of(p.channels, kernel.width, kernel.inputs, sizeof(T));
  if (const char* error = launch<Problem<T>>(kernel.run, dim3(strips, blocks.columns), blocks.threads, blocks.bytes, nullptr, p)) {
    return error;
  }
  if (!of_strip) return nullptr;
  Columns<T> q{of_strip, {}, strips, p.channels, kernel.sums * p.channels};
  for (int i = 0; i < kernel.sums; i++) q.out[i] = static_cast<T*>(out[kernel.outputs + i]);
  const dim3 grid((q.columns + kColumns - 1) / kColumns);
  return launch<Columns<T>>(add_up_strips<T>, grid, kColumns * kPerColumn, 0, nullptr, q);
}
}  // namespace

// sizes: rows, channels, head size, tokens of a strip. out: outputs, then sums. of_strip: null, if none are wanted.
extern "C" const char* head_mix_emulated(const char* name, int in_bf16, int mixes, void** in, void** weights,
                                         int n_weights, void** out, float* of_heads, float* of_strip, const int* sizes,
                                         float eps) {
  return (in_bf16 ? run<Brain> : run<float>)(name, mixes, in, weights, n_weights, out, of_heads, of_strip, sizes, eps);
}
