// The kernels that make operands in e4m3 as a library for a CPU.
#include "single_token.h"

#define __shared__ static

inline float of_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return NAN;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits & 0x80 ? -size : size;
}

inline uint8_t to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return sign | 0x7f;
  const float size = fabsf(x);
  int exponent;
  frexpf(size, &exponent);
  if (size < 0.015625f) exponent = -5;  // numbers below 2^-6 are multiples of 2^-9
  return sign | uint8_t((exponent + 5) * 8 + int(nearbyintf(ldexpf(size, 4 - exponent))));
}

inline uint32_t rounded(uint32_t two, float factor) {
  return to_e4m3(as_float(two << 16) * factor) | uint32_t(to_e4m3(as_float(two & 0xffff0000u) * factor)) << 8;
}

inline uint32_t multiplied(uint32_t four, float factor) {
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t(to_e4m3(of_e4m3(four >> 8 * i & 0xff) * factor)) << 8 * i;
  return out;
}

inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff, high = (a > b ? a : b) & 0xffff0000u;
  return high | low;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  using namespace emulator;
  my_warp().in[my_lane()][0] = x;
  collective([](Warp& warp) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; lane++) most = warp.in[lane][0] > most ? warp.in[lane][0] : most;
    for (int lane = 0; lane < 32; lane++) warp.out[lane][0] = most;
  });
  return my_warp().out[my_lane()][0];
}

#include "../../../heron/ops/fp8_linear/csrc/operands.cu"

extern "C" const char* fp8_rows_emulated(const void* x, void* out, float* scales, int64_t n, int64_t m, float smallest) {
  const Rows rows{static_cast<const Sixteen*>(x), static_cast<Eight*>(out), scales, n, int(m / 8), smallest};
  return launch<Rows>(round_rows, dim3((n + kWarps - 1) / kWarps), kThreads, 0, nullptr, rows);
}

extern "C" const char* fp8_turned_emulated(const uint8_t* x, const float* factors, uint8_t* out, int64_t n, int64_t m) {
  const Turn problem{x, factors, out, n, m};
  return launch<Turn>(turn, dim3((m + kTile - 1) / kTile, (n + kTile - 1) / kTile), kThreads, 0, nullptr, problem);
}
