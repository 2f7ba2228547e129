// The kernel of few_rows by boxes as a library for a CPU, in bf16.
//
// Blocks run one after another, so each runs twice: what the blocks of a cluster have in shared memory when they meet in the
// first round, the others read in the second.
#include "boxes.h"

#include <algorithm>

#define __shared__ static

using std::max;
using std::min;

namespace {

int blocks_of_cluster;
std::vector<std::vector<uint32_t>> met;  // what every block had in shared memory

void bring_once(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) { bring(to, map, k, row, barrier); }
template <typename T, int n> void multiply(float (&c)[n], unsigned long long rows, unsigned long long vectors) {
  add_products(c, rows, [=](float (&numbers)[16], int vector) { read_row(numbers, vectors, vector); });
}
void end_multiplying() { __syncwarp(); }

int at_named_barrier, named_rounds;
void sync_multiplying();

void sync_cluster() {
  __syncthreads();
  if (threadIdx.x == 0) met[blockIdx.x] = emulator::shared_words;
  __syncthreads();
}
void meet_cluster() { __syncthreads(); }

struct alignas(16) Quad { float values[4]; };
Quad sums_of(const float* mine, int rank) {
  Quad quad;
  const auto& theirs = met[blockIdx.x / blocks_of_cluster * blocks_of_cluster + rank];
  const auto* there = reinterpret_cast<const float*>(theirs.data()) + offset_of(mine) / 4;
  memcpy(&quad, blocks_of_cluster == 1 ? mine : there, sizeof quad);
  return quad;
}

}  // namespace

#include "../../../heron/ops/few_rows/csrc/boxes.cu"

namespace {

void sync_multiplying() {
  const int round = named_rounds;
  if (++at_named_barrier == kMultiply) at_named_barrier = 0, named_rounds++;
  emulator::poll_until([=] { return named_rounds > round; });
}

}  // namespace

// Of `count` products with n vectors; `strides` in elements; `part` and `enough` as Sharing has them.
extern "C" const char* few_rows_boxes_emulated(int count, int n, int part, int enough, const void** xs,
                                               const void** weights, const void** factors, const void** adds, void** ys,
                                               const int64_t* strides, const int* ins, const int* outs,
                                               const int* activations) {
  Products products{};
  for (int i = 0; i < count; i++) {
    products.of[i] = {factors[i], adds[i], ys[i], ins[i], outs[i], activations[i]};
    products.weights[i] = {static_cast<const uint16_t*>(weights[i]), strides[i], ins[i], outs[i], kRows};
    products.xs[i] = {static_cast<const uint16_t*>(xs[i]), ins[i], ins[i], n, kColumns};
  }
  products.count = count, products.n = n;
  const int blocks = share_out(products, sharing(part, enough));
  met.assign(blocks, std::vector<uint32_t>(kSharedBytes / 4, emulator::kNaN));
  blocks_of_cluster = products.cluster;
  const char* error = nullptr;
  for (int round = products.cluster == 1 ? 1 : 0; round < 2 && !error; round++) {
    error = launch<Products>(few_rows_by_boxes<Brain>, dim3(blocks), kThreads, kSharedBytes, nullptr, products);
  }
  return error;
}

extern "C" int few_rows_boxes_parts(int out, int in) {
  return parts_of(out, in, sharing());
}
