// The kernel of few_rows as a library for a CPU, in bf16.
//
// Blocks run one after another, so each runs twice: what the blocks of a cluster send each other in the first round, they
// have received in the second.
#include "single_token.h"

#include <algorithm>

#define __shared__ static

using std::min;
template <typename Piece> Piece streamed(const Piece* from) { return *from; }
template <typename T> void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add(c, a, b0, b1);
}

inline std::vector<std::vector<float>> sent;  // to every block
inline std::vector<int> missing;              // of every block, bytes that it has waited for in vain so far
inline int blocks_of_cluster, bytes_of_sums;
inline void expect_sums(unsigned long long*, int bytes) {
  if (threadIdx.x == 0) missing[blockIdx.x] += bytes;
}
inline void wait_for_cluster() {}
inline void send_sums(float* to, int rank, float a, float b, unsigned long long*) {
  const auto at = to - reinterpret_cast<float*>(emulator::shared_words.data());
  const auto block = blockIdx.x / blocks_of_cluster * blocks_of_cluster + rank;
  auto& theirs = sent[block];
  theirs.at(at) = a, theirs.at(at + 1) = b;
  missing[block] -= 8;
}
inline void receive_sums(unsigned long long*) {
  __syncthreads();
  if (threadIdx.x == 0) memcpy(emulator::shared_words.data(), sent[blockIdx.x].data(), bytes_of_sums);
  __syncthreads();
}

#include "../../../heron/ops/few_rows/csrc/few_rows.cu"

namespace {
template <int columns> const char* run(const Products& products, int blocks) {
  sent.assign(blocks, std::vector<float>(kSumBytes<columns> / 4, NAN));
  missing.assign(blocks, 0);
  bytes_of_sums = kSumBytes<columns>;
  blocks_of_cluster = products.cluster;
  const char* error = nullptr;
  for (int round = 0; round < 2 && !error; round++) {
    error = launch<Products>(few_rows<Brain, columns>, dim3(blocks), kThreads,
                             shared_bytes<columns>(products.staged), nullptr, products);
  }
  for (const int bytes : missing) {
    if (bytes != 0) return "a block waits for other bytes than those that are sent";
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
  Product product{};
  product.out = out, product.in = in;
  return parts_of(product, part, most);
}
