// The kernels of AdamW as a library for a CPU.
#include "numbers.h"

#define __shared__ static

#include "../../../heron/ops/adamw/csrc/adamw.cu"

// Six pointers a tensor: weight, exp_avg, exp_avg_sq, step, gradient, copy.
extern "C" const char* adamw_emulated(int n, void** pointers, const int64_t* sizes, int in_half, double lr,
                                      double beta1, double beta2, double eps, double weight_decay,
                                      const float* grad_scale, const float* found_inf) {
  std::vector<Stepped> tensors;
  for (int i = 0; i < n; i++, pointers += 6) {
    float* values[4];
    for (int k = 0; k < 4; k++) values[k] = static_cast<float*>(pointers[k]);
    auto* copy = static_cast<BFloat16*>(pointers[5]);
    tensors.push_back({values[0], values[1], values[2], values[3], pointers[4], copy, sizes[i]});
  }
  const Rule rule{lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf};
  const char* error = nullptr;
  std::vector<Step> rules(kTensors);
  for_tables<Table>(tensors, kChunk, [&](const Table& table, int chunks, int) {
    const auto kernel = in_half ? adamw<BFloat16> : adamw<float>;
    if (!error) error = launch<Table, Rule, Step*>(count, dim3(1), kTensors, 0, nullptr, table, rule, rules.data());
    if (!error) {
      error = launch<Table, Rule, const Step*>(kernel, dim3(chunks), kThreads, 0, nullptr, table, rule, rules.data());
    }
  });
  return error;
}
