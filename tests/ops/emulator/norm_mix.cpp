// The kernel of norm_mix as a library for a CPU.
#include "single_token.h"

#define __shared__ static

#include "../../../heron/ops/norm_mix/csrc/norm_mix.cu"

extern "C" const char* norm_mix_emulated(int in_bf16, const void* x, const void* weight, const void* bias,
                                         const void* mixes, const void* last, void* new_last, void* mixed, int n, int m,
                                         int channels, float eps) {
  const Problem problem{x, weight, bias, mixes, last, new_last, mixed, n, m, channels, eps};
  const auto kernel = in_bf16 ? (channels % 8 ? norm_mix<Brain, 2> : norm_mix<Brain, 8>)
                              : (channels % 4 ? norm_mix<float, 2> : norm_mix<float, 4>);
  return launch<Problem>(kernel, dim3(n), kThreads, 0, nullptr, problem);
}
