// The kernel of ROSA's soft gradients as a library for a CPU.
#include "warp.h"

#include <algorithm>

#define __host__
#define __shared__ static
using std::max;
using std::min;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

#include "../../../heron/ops/rosa/csrc/soft.cu"

extern "C" const char* rosa_soft_emulated(const uint8_t* q, const uint8_t* k, const uint8_t* v, const float* slope,
                                          const float* middle, const float* no_match, int64_t streams, int tokens, int bits,
                                          int64_t most_blocks, float* dq, float* dk, float* dv) {
  const int64_t blocks = min(most_blocks, blocks_of(streams, tokens, bits));
  std::vector<float> scratch(blocks * floats_of(tokens, bits), NAN);
  const Problem problem{q, k, v, slope, middle, no_match, dq, dk, dv, scratch.data(), streams, tokens, bits};
  const auto kernel = bits == 1 ? soft<1> : bits <= 4 ? soft<4> : soft<8>;
  return launch<Problem>(kernel, dim3(unsigned(blocks)), threads_of(tokens), 0, nullptr, problem);
}
