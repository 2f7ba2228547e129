// The kernel of few_rows as a library for a CPU, in bf16.
//
// Blocks run one after another, so each runs twice: what a block of a cluster shows to the others in the first round, they
// read in the second.
#include "single_token.h"

#include <algorithm>

#define __shared__ static

using std::min;
template <typename Piece> Piece streamed(const Piece* from) { return *from; }
template <typename T> void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add(c, a, b0, b1);
}

inline std::vector<std::vector<uint32_t>> shown;  // the shared memory of every block
inline int blocks_of_cluster;
inline void sync_cluster(int) {
  __syncthreads();
  if (threadIdx.x == 0) shown[blockIdx.x] = emulator::shared_words;
  __syncthreads();
}
inline void leave_cluster(int) {}
inline const float* in_block(const float* x, int rank) {
  const auto at = reinterpret_cast<const uint32_t*>(x) - emulator::shared_words.data();
  const auto& theirs = shown[blockIdx.x / blocks_of_cluster * blocks_of_cluster + rank];
  static const std::vector<float> nothing(1 << 16);
  return theirs.empty() ? nothing.data() : reinterpret_cast<const float*>(theirs.data()) + at;
}

#include "../../../heron/ops/few_rows/csrc/few_rows.cu"

namespace {
template <int columns> const char* run(const Products& products, int blocks) {
  shown.assign(blocks, {});
  blocks_of_cluster = products.cluster;
  const char* error = nullptr;
  for (int round = 0; round < 2 && !error; round++) {
    error = launch<Products>(few_rows<Brain, columns>, dim3(blocks), kThreads,
                             shared_bytes<columns>(products.staged), nullptr, products);
  }
  return error;
}
}  // namespace

// Of `count` products with n vectors; `strides` in elements; `part` and `most` as plan has them.
extern "C" const char* few_rows_emulated(int count, int n, int part, int most, const void** xs,
                                         const void** weights, const void** factors, const void** adds, void** ys,
                                         const int64_t* strides, const int* ins, const int* outs,
                                         const int* activations) {
  Products products{};
  for (int i = 0; i < count; i++) {
    products.of[i] = {xs[i], weights[i], factors[i], adds[i], ys[i], strides[i], ins[i], outs[i], activations[i]};
  }
  products.count = count, products.n = n;
  const int blocks = plan(products, part, most);
  const int columns = columns_of(n);
  return columns == 8 ? run<8>(products, blocks) : columns == 16 ? run<16>(products, blocks) : run<32>(products, blocks);
}

extern "C" int few_rows_parts(int out, int in, int part, int most) {
  return parts_of(out, in, sharing(part, most));
}
