// The kernel of head_step as a library for a CPU.
#include "single_token.h"

#define __shared__ static

#include "../../../heron/ops/head_step/csrc/head_step.cu"

namespace {
template <typename T, typename S> const char* step(const Problem& problem, int rows, int size) {
  const dim3 grid(rows * problem.heads);
  if (size == 16) return launch<Problem>(head_step<T, S, 16>, grid, 4 * 16, 0, nullptr, problem);
  if (size == 64) return launch<Problem>(head_step<T, S, 64>, grid, 4 * 64, 0, nullptr, problem);
  return "no such head size";
}
}  // namespace

// parts: in the order of Name.
extern "C" const char* head_step_emulated(int in_bf16, const void** parts, void* y, const void* wkv, void* new_wkv,
                                          const int64_t* drawn, int rows, int heads, int size, float eps) {
  Problem problem{};
  for (int i = 0; i < kNames; i++) problem.of[i] = parts[i];
  problem.y = y;
  problem.wkv = wkv;
  problem.new_wkv = new_wkv;
  problem.drawn = drawn;
  problem.heads = heads;
  problem.eps = eps;
  const auto in_bf16_form = drawn ? step<Brain, Brain> : step<Brain, float>;
  return (in_bf16 ? in_bf16_form : step<float, float>)(problem, rows, size);
}
