// The kernel of head_step as a library for a CPU.
#include "single_token.h"

#define __shared__ static

float divide_fast(float x, float y) { return x / y; }
template <typename Part> Part read_once(const Part* from) { return *from; }

#include "../../../heron/ops/head_step/csrc/head_step.cu"

namespace {
template <typename T, typename S> const char* step(const Problem& problem, int together, int size) {
  const dim3 grid(together * problem.heads);
  if (size == 16) return launch<Problem>(head_step<T, S, 16>, grid, 2 * 16, 0, nullptr, problem);
  if (size == 64) return launch<Problem>(head_step<T, S, 64>, grid, 2 * 64, 0, nullptr, problem);
  if (size == 128) return launch<Problem>(head_step<T, S, 128>, grid, 2 * 128, 0, nullptr, problem);
  return "no such head size";
}
}  // namespace

// parts: in the order of Name. `together`: sequences that there are blocks for; they do the others, too.
extern "C" const char* head_step_emulated(int in_bf16, const void** parts, void* y, const void* wkv, void* new_wkv,
                                          const int64_t* drawn, int sequences, int together, int heads, int size,
                                          float eps) {
  Problem problem{};
  for (int i = 0; i < kNames; i++) problem.of[i] = parts[i];
  problem.y = y;
  problem.wkv = wkv;
  problem.new_wkv = new_wkv;
  problem.drawn = drawn;
  problem.sequences = sequences, problem.heads = heads;
  problem.eps = eps;
  const auto in_bf16_form = drawn ? step<Brain, Brain> : step<Brain, float>;
  return (in_bf16 ? in_bf16_form : step<float, float>)(problem, together, size);
}
