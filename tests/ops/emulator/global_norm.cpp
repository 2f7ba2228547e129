// The kernels of global_norm as a library for a CPU.
#include "numbers.h"
#include "warp.h"

#define __shared__ static

#include "../../../heron/ops/global_norm/csrc/global_norm.cu"

extern "C" const char* global_norm_emulated(int n, void** pointers, const int64_t* sizes, const bool* in_half,
                                            float* norm) {
  std::vector<Summed> tensors;
  for (int i = 0; i < n; i++) tensors.push_back({pointers[i], sizes[i], in_half[i]});
  const int chunks_of_all = chunks_of(tensors);
  std::vector<double> sums(chunks_of_all, NAN);
  const char* error = nullptr;
  for_tables<Table>(tensors, kChunk, [&](const Table& table, int chunks, int before) {
    if (error || chunks == 0) return;
    error = launch<Table, double*>(sum_chunks, dim3(chunks), kThreads, 0, nullptr, table, sums.data() + before);
  });
  if (error) return error;
  return launch<const double*, int, float*>(root_of_sums, dim3(1), kLast, 0, nullptr, sums.data(), chunks_of_all, norm);
}

extern "C" const char* verdict_emulated(const float* loss, const float* norm, double limit, double clip, float* verdict) {
  return launch<const float*, const float*, double, double, float*>(judge, dim3(1), 1, 0, nullptr, loss, norm, limit, clip,
                                                                    verdict);
}
