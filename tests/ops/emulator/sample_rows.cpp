// The kernel of sample_rows as a library for a CPU.
#include "hardware.h"

#include <algorithm>

#define __shared__ static
using std::max;
using std::min;

struct Brain {
  uint16_t bits;
  operator float() const { return bits_float(uint32_t(bits) << 16); }
};

inline float __fmul_rn(float x, float y) { return x * y; }  // compiled without contraction
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline uint32_t __float_as_uint(float x) { return float_bits(x); }
inline float __uint_as_float(uint32_t bits) { return bits_float(bits); }

// `from`: the lane whose value a lane takes.
template <typename T, typename From> T shuffle(T value, From from) {
  using namespace emulator;
  memcpy(my_warp().in[my_lane()], &value, sizeof value);
  collective([from](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) memcpy(warp.out[lane], warp.in[from(lane)], sizeof value);
  });
  memcpy(&value, my_warp().out[my_lane()], sizeof value);
  return value;
}
template <typename T> T __shfl_sync(unsigned, T x, int lane) { return shuffle(x, [=](int) { return lane; }); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return shuffle(x, [=](int i) { return i ^ mask; }); }
template <typename T> T __shfl_up_sync(unsigned, T x, int n) { return shuffle(x, [=](int i) { return i < n ? i : i - n; }); }

template <typename Merge> unsigned reduce(unsigned value, Merge merge) {
  for (int mask = 16; mask; mask /= 2) value = merge(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

inline unsigned __ballot_sync(unsigned, bool x) {
  return reduce(unsigned(x) << emulator::my_lane(), [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned, bool x) { return __ballot_sync(0xffffffffu, x) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

#include "../../../heron/ops/sample_rows/csrc/sample_rows.cu"

namespace {
template <typename T>
const char* draw(const void* logits, int64_t rows, int64_t stride, const float* counts, const bool* barred,
                 const double* settings, const double* uniforms, int vocab, bool aligned, int64_t* ids, float* logprobs) {
  return launch<const T*, int64_t, const float*, const bool*, const double*, const double*, int, bool, int64_t*, float*>(
      sample_rows<T, 1>, dim3(rows), kThreads, 0, nullptr, static_cast<const T*>(logits), stride, counts, barred, settings,
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
