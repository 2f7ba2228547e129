// The kernel of few_rows by boxes as a library for a CPU, in bf16.
//
// Blocks run one after another, so each runs three times: what the blocks of a cluster bring each other in the first round,
// they have in the second; what they have in shared memory when they meet in the second, the others read in the third. Boxes and matrix instructions permute
// bytes as the PTX manual says. A box is NaN until somebody waits for it.
#include "single_token.h"

#include <algorithm>
#include <map>
#include <set>

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
bool first_round;
std::vector<std::vector<uint32_t>> met;                           // what every block had in shared memory
std::vector<std::map<std::pair<Barrier*, int>, std::vector<Box>>> brought;  // to every block by others, and when
std::vector<std::set<unsigned>> brought_by, told;                 // who brings something to a block, whom it tells of room
unsigned block_of(int rank) { return blockIdx.x / blocks_of_cluster * blocks_of_cluster + rank; }

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
void init_barrier(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0, {}}; }
void show_barriers() {}
// As many others tell this block as it tells others.
void arrive(Barrier* barrier, int rank) {
  told[blockIdx.x].insert(block_of(rank));
  barrier->missing--;
  settle(*barrier);
}
void fill(const Box& box, bool arrived) {
  for (int r = 0; r < box.map.box_rows; r++) {
    for (int i = 0; i < kBoxNumbers; i++) {
      const int row = box.row + r, k = box.k + i;
      const bool inside = row < box.map.rows && k < box.map.in;
      word_at(swizzled(box.to + 128 * r + 2 * i)) = !arrived ? 0x7fc0 : inside ? box.map.data[row * box.map.stride + k] : 0;
    }
  }
}
bool passed(Barrier* barrier, int round) {
  for (const Box& box : barrier->under_way) {
    fill(box, true);
    barrier->bytes -= 128 * box.map.box_rows;
  }
  barrier->under_way.clear();
  if (first_round && barrier->missing == 0) barrier->bytes = 0;
  settle(*barrier);
  return barrier->rounds > round;
}
void await(Barrier* barrier, int round) {
  emulator::poll_until([=] { return passed(barrier, round); });
}
void add_box(Barrier* barrier, const Box& box) {
  if (box.to % 1024) emulator::fail("a box that is not where the permutation begins");
  fill(box, false);
  barrier->under_way.push_back(box);
}
void expect_bytes(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  for (const Box& box : brought[blockIdx.x][{barrier, barrier->rounds}]) {
    if (!first_round) add_box(barrier, box);
  }
  barrier->missing--;
  settle(*barrier);
}
void bring(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier, unsigned blocks) {
  const Box box{offset_of(to), map, k, row};
  add_box(barrier, box);
  bool to_itself = false;
  for (int rank = 0; blocks >> rank; rank++) {
    if ((blocks >> rank & 1) == 0) continue;
    const unsigned there = block_of(rank);
    brought_by[there].insert(blockIdx.x);
    to_itself |= there == blockIdx.x;
    if (first_round && there != blockIdx.x) brought[there][{barrier, barrier->rounds}].push_back(box);
  }
  if (!to_itself) emulator::fail("a box for others alone");
}
void prefetch_map(const CUtensorMap&) {}

unsigned long long descriptor(const void* rows) { return offset_of(rows) / 16; }
// The 16 numbers of a row from 16 * `at` bytes on, as a matrix instruction reads them.
void read_row(float (&numbers)[16], unsigned long long at, int row) {
  for (int i = 0; i < 16; i += 8) {
    const uint16_t* eight = &word_at(swizzled(16 * at + 128 * row + 2 * i));
    for (int j = 0; j < 8; j++) numbers[i + j] = as_float(uint32_t(eight[j]) << 16);
  }
}
template <typename T, int columns>
void multiply(float (&c)[columns / 2], unsigned long long rows, unsigned long long vectors) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float a[2][16], b[16];
  for (int below = 0; below < 2; below++) read_row(a[below], rows, row + 8 * below);
  for (int i = 0; i < columns / 4; i++) {
    read_row(b, vectors, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int below = 0; below < 2; below++) {
      for (int k = 0; k < 16; k++) c[i / 2 * 4 + below * 2 + i % 2] += a[below][k] * b[k];
    }
  }
}
void begin_multiplying() {}
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
  const auto& theirs = met[block_of(rank)];
  memcpy(&quad, blocks_of_cluster == 1 ? mine : reinterpret_cast<const float*>(theirs.data()) + offset_of(mine) / 4, 16);
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

template <int columns> const char* run(const Products& products, int blocks) {
  met.assign(blocks, std::vector<uint32_t>(kSharedBytes<columns> / 4, emulator::kNaN));
  brought.assign(blocks, {});
  brought_by.assign(blocks, {}), told.assign(blocks, {});
  blocks_of_cluster = products.cluster;
  const char* error = nullptr;
  for (int round = products.cluster == 1 ? 1 : 0; round < 3 && !error; round++) {
    first_round = round == 0;
    error = launch<Products>(few_rows_by_boxes<Brain, columns>, dim3(blocks), kThreads, kSharedBytes<columns>, nullptr, products);
  }
  if (!error && told != brought_by) error = "a block does not tell of its room those that bring it something";
  return error;
}

}  // namespace

// Of `count` products with n vectors; `strides` in elements.
extern "C" const char* few_rows_boxes_emulated(int count, int n, int part, int most, int enough, int side_by_side,
                                         const void** xs,
                                         const void** weights, const void** factors, const void** adds, void** ys,
                                         const int64_t* strides, const int* ins, const int* outs,
                                         const int* activations) {
  Products products{};
  for (int i = 0; i < count; i++) products.of[i] = {factors[i], adds[i], ys[i], ins[i], outs[i], activations[i]};
  products.count = count, products.n = n;
  const int blocks = plan(products, part, most, enough, side_by_side), columns = columns_of(n);
  for (int i = 0; i < count; i++) {
    products.weights[i] = {static_cast<const uint16_t*>(weights[i]), strides[i], ins[i], outs[i], kRows / products.tiles};
    products.xs[i] = {static_cast<const uint16_t*>(xs[i]), ins[i], ins[i], n, columns / products.of[i].side_by_side};
  }
  return columns == 32 ? run<32>(products, blocks) : columns == 64 ? run<64>(products, blocks) : run<128>(products, blocks);
}

extern "C" int few_rows_boxes_parts(int out, int in, int part, int most, int enough) {
  Product product{};
  product.out = out, product.in = in;
  return parts_of(product, part, most, enough);
}
