// The kernel of few_rows for compute capability 9.0 as a library for a CPU, in bf16.
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

struct Barrier {
  int arrivals, missing, bytes, rounds;
  struct Box { unsigned to; const CUtensorMap* map; int k, row; } boxes[2];
  int under_way;
};

unsigned char* shared() { return reinterpret_cast<unsigned char*>(emulator::shared_words.data()); }
unsigned char* stages_memory() { return shared(); }
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
void init_barrier(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals}; }
void show_barriers() {}
void arrive(Barrier* barrier) {
  barrier->missing--;
  settle(*barrier);
}
void expect_bytes(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}
void fill(const Barrier::Box& box, bool arrived) {
  for (int r = 0; r < box.map->box_rows; r++) {
    for (int i = 0; i < kBoxNumbers; i++) {
      const int row = box.row + r, k = box.k + i;
      const bool inside = row < box.map->rows && k < box.map->in;
      word_at(swizzled(box.to + 128 * r + 2 * i)) = !arrived ? 0x7fc0 : inside ? box.map->data[row * box.map->stride + k] : 0;
    }
  }
}
bool passed(Barrier* barrier, int round) {
  for (int i = 0; i < barrier->under_way; i++) {
    fill(barrier->boxes[i], true);
    barrier->bytes -= 128 * barrier->boxes[i].map->box_rows;
  }
  barrier->under_way = 0;
  settle(*barrier);
  return barrier->rounds > round;
}
void await(Barrier* barrier, int round) {
  emulator::poll_until([=] { return passed(barrier, round); });
}
void bring(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) {
  if (offset_of(to) % 1024) emulator::fail("a box that is not where the permutation begins");
  if (barrier->under_way == 2) emulator::fail("more boxes than a stage has");
  const Barrier::Box box{offset_of(to), &map, k, row};
  fill(box, false);
  barrier->boxes[barrier->under_way++] = box;
}
void bring_once(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) { bring(to, map, k, row, barrier); }
void bring_near(const CUtensorMap&, int, int) {}

unsigned long long descriptor(const void* rows) { return offset_of(rows) / 16; }
template <typename T, int columns>
void multiply(float (&c)[columns / 2], unsigned long long rows, unsigned long long vectors) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (int i = 0; i < columns / 2; i++) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const auto number = [&](unsigned long long at, int row) {
        return bits_float(uint32_t(word_at(swizzled(16 * at + 128 * row + 2 * k))) << 16);
      };
      c[i] += number(rows, row) * number(vectors, column);
    }
  }
}
void begin_multiplying() {}
void end_multiplying() { __syncwarp(); }

int at_named_barrier, named_rounds;
void sync_multiplying();

std::vector<std::vector<uint32_t>> met;  // what every block had in shared memory
int blocks_of_cluster;
void sync_cluster() {
  __syncthreads();
  if (threadIdx.x == 0) met[blockIdx.x] = emulator::shared_words;
  __syncthreads();
}
void leave_cluster() {}

struct alignas(16) Quad { float values[4]; };
Quad sums_of(const float* mine, int rank) {
  Quad quad;
  const auto& theirs = met[blockIdx.x / blocks_of_cluster * blocks_of_cluster + rank];
  memcpy(&quad, blocks_of_cluster == 1 ? mine : reinterpret_cast<const float*>(theirs.data()) + offset_of(mine) / 4, 16);
  return quad;
}

}  // namespace

#include "../../../heron/ops/few_rows/csrc/hopper.cu"

namespace {

void sync_multiplying() {
  const int round = named_rounds;
  if (++at_named_barrier == kMultiply) at_named_barrier = 0, named_rounds++;
  emulator::poll_until([=] { return named_rounds > round; });
}

template <int columns> const char* run(const Products& products, int blocks) {
  met.assign(blocks, std::vector<uint32_t>(kSharedBytes<columns> / 4, emulator::kNaN));
  blocks_of_cluster = products.cluster;
  const char* error = nullptr;
  for (int round = 0; round < 2 && !error; round++) {
    error = launch<Products>(few_rows<Brain, columns>, dim3(blocks), kThreads, kSharedBytes<columns>, nullptr, products);
  }
  return error;
}

}  // namespace

// Of `count` products with n vectors; `strides` in elements.
extern "C" const char* few_rows_emulated(int count, int n, int part, int most, int enough, const void** xs,
                                         const void** weights, const void** factors, const void** adds, void** ys,
                                         const int64_t* strides, const int* ins, const int* outs,
                                         const int* activations) {
  Products products{};
  const int columns = columns_of(n);
  for (int i = 0; i < count; i++) {
    products.weights[i] = {static_cast<const uint16_t*>(weights[i]), strides[i], ins[i], outs[i], kRows};
    products.xs[i] = {static_cast<const uint16_t*>(xs[i]), ins[i], ins[i], n, columns};
    products.of[i] = {factors[i], adds[i], ys[i], ins[i], outs[i], activations[i]};
  }
  products.count = count, products.n = n;
  const int blocks = plan(products, part, most, enough);
  return columns == 32 ? run<32>(products, blocks) : columns == 64 ? run<64>(products, blocks) : run<128>(products, blocks);
}
