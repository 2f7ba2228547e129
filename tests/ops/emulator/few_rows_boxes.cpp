// The kernel of few_rows by boxes as a library for a CPU, in bf16.
//
// Blocks run one after another, so each runs twice: what the blocks of a cluster have in shared memory when they meet in the
// first round, the others read in the second. Boxes and matrix instructions permute bytes as the PTX manual says. A box is
// NaN until somebody waits for it.
#include "single_token.h"

#include <algorithm>

#define __shared__ static

using std::max;
using std::min;

struct CUtensorMap {
  const uint16_t* data;
  int64_t stride;
  int in, rows, box_rows;
};

namespace {

constexpr int kBoxNumbers = 64;  // of a row

struct Box { unsigned to; CUtensorMap map; int k, row; };
struct Barrier {
  int arrivals, missing, bytes, rounds;
  std::vector<Box> under_way;
};

int blocks_of_cluster;
std::vector<std::vector<uint32_t>> met;  // what every block had in shared memory

unsigned char* shared() { return reinterpret_cast<unsigned char*>(emulator::shared_words.data()); }
unsigned char* memory_of_boxes() { return shared(); }
unsigned offset_of(const void* x) { return static_cast<const unsigned char*>(x) - shared(); }
unsigned swizzled(unsigned offset) { return offset ^ (offset >> 7 & 7) << 4; }
uint16_t& word_at(unsigned offset) {
  if (offset + 2 > 4 * emulator::shared_words.size()) emulator::fail("beyond shared memory");
  return *reinterpret_cast<uint16_t*>(shared() + offset);
}

void settle(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.rounds++;
}
void init_barrier(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0, {}}; }
void show_barriers() {}
void arrive(Barrier* barrier) {
  if (barrier->missing-- == 0) emulator::fail("one too many at a barrier");
  settle(*barrier);
}
void expect_bytes(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}
void fill(const Box& box, bool arrived) {
  for (int r = 0; r < box.map.box_rows; r++) {
    for (int i = 0; i < kBoxNumbers; i++) {
      const int row = box.row + r, k = box.k + i;
      const bool inside = row < box.map.rows && k < box.map.in;
      const uint16_t word = !arrived ? 0x7fc0 : inside ? box.map.data[row * box.map.stride + k] : 0;
      word_at(swizzled(box.to + 128 * r + 2 * i)) = word;
    }
  }
}
bool passed(Barrier* barrier, int round) {
  for (const Box& box : barrier->under_way) {
    fill(box, true);
    barrier->bytes -= 128 * box.map.box_rows;
  }
  barrier->under_way.clear();
  settle(*barrier);
  return barrier->rounds > round;
}
void await(Barrier* barrier, int round) {
  emulator::poll_until([=] { return passed(barrier, round); });
}
void bring(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) {
  const Box box{offset_of(to), map, k, row};
  if (box.to % 1024) emulator::fail("a box that is not where the permutation begins");
  fill(box, false);
  barrier->under_way.push_back(box);
}
void bring_once(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) { bring(to, map, k, row, barrier); }
void prefetch_map(const CUtensorMap&) {}

unsigned long long descriptor(const void* rows) { return offset_of(rows) / 16; }
// The 16 numbers of a row from 16 * `at` bytes on, as a matrix instruction reads them.
void read_row(float (&numbers)[16], unsigned long long at, int row) {
  for (int i = 0; i < 16; i += 8) {
    const uint16_t* eight = &word_at(swizzled(16 * at + 128 * row + 2 * i));
    for (int j = 0; j < 8; j++) numbers[i + j] = as_float(uint32_t(eight[j]) << 16);
  }
}
template <typename T, int n> void multiply(float (&c)[n], unsigned long long rows, unsigned long long vectors) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float a[2][16], b[16];
  for (int below = 0; below < 2; below++) read_row(a[below], rows, row + 8 * below);
  for (int i = 0; i < n / 2; i++) {
    read_row(b, vectors, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int below = 0; below < 2; below++) {
      for (int k = 0; k < 16; k++) c[i / 2 * 4 + below * 2 + i % 2] += a[below][k] * b[k];
    }
  }
}
void begin_multiplying() {}
void end_multiplying() { __syncwarp(); }
template <int>
void multiplied() {}

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
