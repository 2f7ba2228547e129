// The kernel of sample_rows as a library for a CPU.
#include "warp.h"

#include <algorithm>
#include <utility>

#define __shared__ static
using std::max;
using std::min;

struct Brain {
  uint16_t bits;
  operator float() const { return as_float(uint32_t(bits) << 16); }
};

inline float __fmul_rn(float x, float y) { return x * y; }  // compiled without contraction
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline uint32_t __float_as_uint(float x) { return as_bits(x); }
inline float __uint_as_float(uint32_t bits) { return as_float(bits); }

inline bool __any_sync(unsigned, bool x) { return __ballot_sync(0xffffffffu, x) != 0; }
inline unsigned __reduce_add_sync(unsigned, unsigned x) { return reduce(x, [](unsigned a, unsigned b) { return a + b; }); }
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return reduce(x, [](unsigned a, unsigned b) { return max(a, b); }); }
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return reduce(x, [](unsigned a, unsigned b) { return min(a, b); }); }
inline int atomicAdd(int* to, int x) { return std::exchange(*to, *to + x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

#include "../../../heron/ops/sample_rows/csrc/sample_rows.cu"

namespace {
template <typename T>
const char* draw(const void* logits, int64_t rows, int64_t stride, const float* counts, const bool* barred,
                 const double* settings, const double* uniforms, int vocab, bool aligned, int64_t* ids, float* logprobs) {
  return launch<const T*, int64_t, const float*, const bool*, const double*, const double*, int, bool, int64_t*, float*>(
      sample_rows<T, 1, false>, dim3(rows), kThreads, 0, nullptr, static_cast<const T*>(logits), stride, counts, barred, settings,
      uniforms, vocab, aligned, ids, logprobs);
}
}  // namespace

extern "C" const char* sample_rows_emulated(int dtype, const void* logits, int64_t rows, int64_t stride,
                                            const float* counts, const bool* barred, const double* settings,
                                            const double* uniforms, int vocab, int aligned, int64_t* ids,
                                            float* logprobs) {
  const auto run = dtype == 0 ? draw<float> : draw<Brain>;
  return run(logits, rows, stride, counts, barred, settings, uniforms, vocab, aligned, ids, logprobs);
}
