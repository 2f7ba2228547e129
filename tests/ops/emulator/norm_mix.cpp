// The kernel of norm_mix as a library for a CPU.
#include "single_token.h"

#define __shared__ static

#include "../../../heron/ops/norm_mix/csrc/norm_mix.cu"

extern "C" const char* norm_mix_emulated(int in_bf16, const void* x, const void* weight, const void* bias,
                                         const void* mixes, void* last, void* mixed, int n, int m, int channels,
                                         float eps) {
  const Problem problem{x, weight, bias, mixes, last, mixed, n, m, channels, eps};
  return launch<Problem>(in_bf16 ? norm_mix<Brain> : norm_mix<float>, dim3(n), kThreads, 0, nullptr, problem);
}
