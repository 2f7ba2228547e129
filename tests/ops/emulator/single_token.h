// What the kernels of single tokens, matvec and head_step, need beside hardware.h.
#pragma once

#include "hardware.h"

struct Brain {
  uint16_t bits;
  Brain() = default;
  Brain(float x) : bits(round_to_bf16(x)) {}
  operator float() const { return as_float(uint32_t(bits) << 16); }
};

inline float __uint_as_float(uint32_t bits) { return as_float(bits); }
inline uint32_t __float_as_uint(float x) { return as_bits(x); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; i++) picked |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  using namespace emulator;
  memcpy(my_warp().in[my_lane()], &x, sizeof x);
  collective([mask](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) memcpy(warp.out[lane], warp.in[lane ^ mask], sizeof(float));
  });
  memcpy(&x, my_warp().out[my_lane()], sizeof x);
  return x;
}
inline float __shfl_sync(unsigned, float x, int source, int width) {
  using namespace emulator;
  memcpy(my_warp().in[my_lane()], &x, sizeof x);
  collective([=](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) memcpy(warp.out[lane], warp.in[lane / width * width + source], sizeof(float));
  });
  memcpy(&x, my_warp().out[my_lane()], sizeof x);
  return x;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <int bytes> inline void begin_copy_of(void* to, const void* from, bool wanted) {
  copy_async(to, from, wanted, bytes);
}
inline void end_of_copies() { copy_commit(); }
template <int but> inline void copies_arrived() { copy_wait<but>(); }
inline void wait_for_inputs() {}
inline void prefetch(const void*) {}
