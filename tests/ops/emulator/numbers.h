// bf16, and the operations of fp32 that are rounded one by one; what includes it is compiled without contraction.
#pragma once

#include <cmath>

#include "hardware.h"

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) : bits(uint16_t(round_to_bf16(x))) {}
  operator float() const { return as_float(uint32_t(bits) << 16); }
};

inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
