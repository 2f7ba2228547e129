// The kernels of shift_mix as a library for a CPU.
#include "single_token.h"

#include <algorithm>
#include <type_traits>

#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct float2 { float x, y; };
struct __nv_bfloat162 { uint32_t bits; };
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {pack(low, high)}; }
using std::min;

#include "../../../heron/ops/shift_mix/csrc/shift_mix.cu"

namespace {
Shape shape_of(const int* sizes, const int* begins) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], 1.0f / float(sizes[2]), begins, sizes[4]};
}

template <typename T> Norm<T> norm_of(void** norm, int n_mixes) {
  Norm<T> made{static_cast<const T*>(norm[0]), static_cast<const T*>(norm[1]), {}};
  for (int i = 0; i < n_mixes; i++) made.mixes[i] = static_cast<const T*>(norm[2 + i]);
  return made;
}

template <typename T, int n> const char* run_forward(void** in, void** norm, void** out, const Shape& shape, float eps) {
  constexpr int width = 16 / sizeof(T);
  Forward<T> p{};
  p.x = static_cast<const T*>(in[0]), p.branch = static_cast<const T*>(in[1]), p.last = static_cast<const T*>(in[2]);
  p.norm = norm_of<T>(norm, n), p.shape = shape, p.eps = eps;
  for (int i = 0; i < n; i++) p.mixed[i] = static_cast<T*>(out[i]);
  p.stats = static_cast<float2*>(out[n]), p.new_last = static_cast<T*>(out[n + 1]), p.sum = static_cast<T*>(out[n + 2]);
  const int threads = threads_for(shape.channels, width);
  return launch<Forward<T>>(forward<T, width, n>, dim3(strips_of(shape)), threads, 0, nullptr, p);
}

template <typename T, int n> const char* run_backward(void** in, void** norm, void** out, const Shape& shape) {
  Backward<T> p{};
  p.d_sum = static_cast<const T*>(in[0]), p.d_new_last = static_cast<const T*>(in[1]);
  p.sum = static_cast<const T*>(in[2]), p.stats = static_cast<const float2*>(in[3]);
  p.last = static_cast<const T*>(in[4]);
  for (int i = 0; i < n; i++) p.d_mixed[i] = static_cast<const T*>(in[5 + i]);
  p.norm = norm_of<T>(norm, n), p.shape = shape;
  p.d = static_cast<T*>(out[0]), p.of_strip = static_cast<float*>(out[1]), p.d_last = static_cast<T*>(out[2]);
  const int threads = threads_for(shape.channels, kBackwardWidth<T, n>);
  const auto bytes = static_cast<int>(backward_memory<T, n>(threads));
  return launch<Backward<T>>(backward<T, n>, dim3(strips_of(shape)), threads, bytes, nullptr, p);
}

template <typename T>
const char* run(bool back, int n, void** in, void** norm, void** out, const Shape& shape, float eps) {
  if (n == 1) return back ? run_backward<T, 1>(in, norm, out, shape) : run_forward<T, 1>(in, norm, out, shape, eps);
  if (n == 2) return back ? run_backward<T, 2>(in, norm, out, shape) : run_forward<T, 2>(in, norm, out, shape, eps);
  return back ? run_backward<T, 6>(in, norm, out, shape) : run_forward<T, 6>(in, norm, out, shape, eps);
}
}  // namespace

// sizes: rows, tokens, channels, tokens of a strip, sequences. norm: weight, bias, mixes.
extern "C" const char* shift_mix_emulated(int in_bf16, int back, int n_mixes, void** in, void** norm, void** out,
                                          const int* sizes, const int* begins, float eps) {
  return (in_bf16 ? run<Brain> : run<float>)(back, n_mixes, in, norm, out, shape_of(sizes, begins), eps);
}
