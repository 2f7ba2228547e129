// The kernels of squared_relu_product as a library for a CPU, with blocks that run at the same time.
//
// Boxes and matrix instructions permute bytes as the PTX manual says. A box is NaN until somebody waits for it; what is
// multiplied or written comes as late as its threads allow, so that who does not wait for it gets wrong numbers.
#include <algorithm>
#include <deque>
#include <map>

#include "single_token.h"
#include "together.h"

using std::min;

struct CUtensorMap {
  uint16_t* data;
  int64_t stride;
  int columns, rows, box_rows;
};

namespace {

constexpr int kBoxNumbers = 64;  // of a row

struct Box { unsigned char* to; CUtensorMap map; int column, row; };
struct State {
  int arrivals, missing, bytes, rounds;
  std::vector<Box> under_way;
};
using Barrier = unsigned long long;
std::map<const void*, State> barriers;  // of all blocks
std::map<unsigned, unsigned char*> memories;  // of all blocks
std::map<std::pair<unsigned, int>, std::pair<int, int>> named;  // by block and number: how many are there, rounds
using Waiting = std::map<std::pair<unsigned, unsigned>, std::deque<std::function<void()>>>;  // by block and thread
Waiting products, writes;  // those that are not there yet

unsigned char* shared() { return reinterpret_cast<unsigned char*>(emulator::shared_words.data()); }
unsigned char* memory_of_boxes() {
  unsigned char* const first = shared() + (1024 - uintptr_t(shared()) % 1024) % 1024;
  return memories[blockIdx.x] = first;
}
// The place in the block of this rank that `x` is in this one.
template <typename T> T* there(T* x, int rank) {
  const unsigned other = blockIdx.x / 2 * 2 + rank;
  if (!memories.count(other)) emulator::fail("a block of the cluster that has not begun");
  return reinterpret_cast<T*>(memories[other] + (reinterpret_cast<unsigned char*>(x) - memories[blockIdx.x]));
}
unsigned char* swizzled(unsigned char* at) {
  const uintptr_t address = uintptr_t(at);
  return reinterpret_cast<unsigned char*>(address ^ (address >> 7 & 7) << 4);
}
std::pair<unsigned, unsigned> me() { return {blockIdx.x, threadIdx.x}; }

void settle(State& state) {
  if (state.missing != 0 || state.bytes != 0) return;
  state.missing = state.arrivals;
  state.rounds++;
  emulator::progress = true;
}
State& state_of(const void* barrier) {
  if (!barriers.count(barrier)) emulator::fail("no barrier");
  return barriers.at(barrier);
}
void init_barrier(Barrier* barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0, {}}; }
void show_barriers() {}
void arrive_at(Barrier* barrier, int rank) {
  State& state = state_of(there(barrier, rank));
  if (state.missing-- == 0) emulator::fail("one too many at a barrier");
  settle(state);
}
void arrive(Barrier* barrier) { arrive_at(barrier, blockIdx.x % 2); }
void expect_bytes(Barrier* barrier, int bytes) {
  state_of(barrier).bytes += bytes;
  arrive(barrier);
}
uint16_t& number_of(unsigned char* box, int row, int i) {
  return *reinterpret_cast<uint16_t*>(swizzled(box + 128 * row + 2 * i));
}
void fill(const Box& box, bool arrived) {
  for (int r = 0; r < box.map.box_rows; r++) {
    for (int i = 0; i < kBoxNumbers; i++) {
      const int row = box.row + r, column = box.column + i;
      const bool inside = row < box.map.rows && column < box.map.columns;
      number_of(box.to, r, i) = !arrived ? 0x7fc0 : inside ? box.map.data[row * box.map.stride + column] : 0;
    }
  }
}
bool passed(const void* barrier, int round) {
  State& state = state_of(barrier);
  if (state.rounds <= round) {
    for (const Box& box : state.under_way) fill(box, true), state.bytes -= 128 * box.map.box_rows;
    state.under_way.clear();
    settle(state);
  }
  return emulator::seems_over(state.rounds, round);
}
void await(Barrier* barrier, int round) {
  emulator::poll_until([=] { return passed(barrier, round); });
}
void bring_there(void* to, const CUtensorMap& map, int column, int row, Barrier* barrier) {
  const Box box{static_cast<unsigned char*>(to), map, column, row};
  if (uintptr_t(to) % 1024) emulator::fail("a box that is not where the permutation begins");
  fill(box, false);
  state_of(barrier).under_way.push_back(box);
}
void bring(void* to, const CUtensorMap& map, int column, int row, Barrier* barrier) {
  bring_there(to, map, column, row, barrier);
}
void bring_to_all(void* to, const CUtensorMap& map, int column, int row, Barrier* barrier) {
  for (int rank = 0; rank < 2; rank++) {
    bring_there(there(static_cast<char*>(to), rank), map, column, row, there(barrier, rank));
  }
}
void prefetch_map(const CUtensorMap&) {}

void write(const CUtensorMap& map, const void* from, int column, int row) {
  auto* box = static_cast<unsigned char*>(const_cast<void*>(from));
  writes[me()].push_back([=] {
    for (int r = 0; r < map.box_rows && row + r < map.rows; r++) {
      for (int i = 0; i < kBoxNumbers && column + i < map.columns; i++) {
        uint16_t& to = map.data[(row + r) * map.stride + column + i];
        if (to != 0x7fc0) emulator::fail("a number that is written twice");
        to = number_of(box, r, i);
      }
    }
  });
}
template <int but> void written() {
  auto& mine = writes[me()];
  for (; mine.size() > but; mine.pop_front()) mine.front()();
}
void show_to_engines() {}
void take_registers() {}
void give_registers() {}

void sync(unsigned block, int number, int threads) {
  auto& here = named[{block, number}];
  const int round = here.second;
  if (++here.first == threads) here = {0, round + 1}, emulator::progress = true;
  emulator::poll_until([&here, round] { return here.second > round; });
}
void sync_group(int group) { sync(blockIdx.x, 1 + group, 128); }
void sync_cluster() { sync(blockIdx.x / 2 * 2, 0, 2 * 384); }

unsigned descriptor(const void* rows) {
  return (static_cast<const unsigned char*>(rows) - memories[blockIdx.x]) / 16;
}
void begin_multiplying() {}
// `turned`: the weight's rows are numbers of the sum.
template <int tokens, bool turned> void multiply(float (&c)[tokens / 2], unsigned a, unsigned b, bool adds) {
  unsigned char *const weight = memories[blockIdx.x] + 16 * a, *const x = memories[blockIdx.x] + 16 * b;
  const int lane = threadIdx.x % 32, channel = threadIdx.x / 32 % 4 * 16 + lane / 4;
  products[me()].push_back([=, &c] {
    float of_weight[2][16], of_x[16];
    for (int below = 0; below < 2; below++) {
      for (int k = 0; k < 16; k++) {
        const int at = channel + 8 * below;
        of_weight[below][k] = as_float(uint32_t(turned ? number_of(weight, k, at) : number_of(weight, at, k)) << 16);
      }
    }
    for (int i = 0; i < tokens / 4; i++) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) of_x[k] = as_float(uint32_t(number_of(x, token, k)) << 16);
      for (int below = 0; below < 2; below++) {
        float& sum = c[i / 2 * 4 + below * 2 + i % 2];
        if (!adds) sum = 0.0f;
        for (int k = 0; k < 16; k++) sum += of_weight[below][k] * of_x[k];
      }
    }
  });
}
void end_multiplying() { products[me()].push_back(nullptr); }
template <int but> void multiplied() {
  auto& mine = products[me()];
  int groups = std::count_if(mine.begin(), mine.end(), [](const auto& product) { return product == nullptr; });
  for (; groups > but; mine.pop_front()) {
    if (mine.front() == nullptr) groups--; else mine.front()();
  }
  __syncwarp();
}

// work(warp, number, lane, matrix, shift) for all numbers of 8 x 8 matrices, of which a lane has two of a column, at
// `shift` of a word.
template <bool four, typename Work> void with_matrices(const void* row, Work work) {
  using namespace emulator;
  if (four || my_lane() < 16) check_row(row);
  my_warp().rows[my_lane()] = row;
  collective([work](Warp& warp) {
    for (int matrix = 0; matrix < (four ? 4 : 2); matrix++) {
      for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 2; i++) {
          const auto* numbers = static_cast<const uint16_t*>(warp.rows[8 * matrix + lane % 4 * 2 + i]);
          work(warp, const_cast<uint16_t&>(numbers[lane / 4]), lane, matrix, 16 * i);
        }
      }
    }
  });
}
template <bool four> void load_turned(unsigned (&m)[4], const void* row) {
  memset(emulator::my_warp().out[emulator::my_lane()], 0, sizeof m);
  with_matrices<four>(row, [](emulator::Warp& warp, uint16_t& number, int lane, int matrix, int shift) {
    if (shift == 0) warp.out[lane][matrix] = 0;
    warp.out[lane][matrix] |= uint32_t(number) << shift;
  });
  memcpy(m, emulator::my_warp().out[emulator::my_lane()], sizeof m);
}
template <bool four> void store_turned(void* row, const unsigned (&m)[4]) {
  memcpy(emulator::my_warp().in[emulator::my_lane()], m, (four ? 4 : 2) * sizeof *m);
  with_matrices<four>(row, [](emulator::Warp& warp, uint16_t& number, int lane, int matrix, int shift) {
    number = warp.in[lane][matrix] >> shift;
  });
}

unsigned rounded(float low, float high) { return pack(low, high); }
// Of both halves of two words.
template <typename Of> unsigned of_halves(unsigned a, unsigned b, Of of) {
  return pack(of(low_half(a), low_half(b)), of(high_half(a), high_half(b)));
}
unsigned squared(unsigned key) {
  return of_halves(key, key, [](float x, float) { return x > 0 || x != x ? x * x : 0.0f; });
}
unsigned gradient(unsigned d_square, unsigned square) {
  return of_halves(d_square, square, [](float d, float x) {
    return x <= 0 ? 0.0f : d * 2 * as_float(round_to_bf16(sqrtf(x)) << 16);
  });
}

}  // namespace

#include "../../../heron/ops/squared_relu_product/csrc/squared_relu_product.cu"

namespace {

template <typename Form, bool backward> void run(const Problem& p, int blocks, bool switches) {
  barriers.clear(), memories.clear(), named.clear(), products.clear(), writes.clear();
  emulator::grid_size = dim3(blocks);
  emulator::block_size = dim3(kThreads);
  emulator::body = [&] { products_with_squares<Form, backward>(p); };
  emulator::run_together(blocks, kThreads, Form::kSharedBytes, switches);
}

}  // namespace

// Of x (n, in) and weight (hidden, in), or of x, weight (in, hidden) and `square`; `out` (n, hidden) is all 0x7fc0. How
// many forms there are.
extern "C" int squared_relu_product_emulated(int form, int n, int in, int hidden, int blocks, int beside, bool switches,
                                             uint16_t* x, uint16_t* weight, uint16_t* square, uint16_t* out) {
  const bool backward = square != nullptr;
  return with_form(form, [=](auto chosen) {
    using F = decltype(chosen);
    Problem p{};
    if (backward) {
      p.weight = {weight, hidden, hidden, in, kDepth};
    } else {
      p.weight = {weight, in, in, hidden, kHidden};
    }
    p.x = {x, in, in, n, F::kTokens / kCluster};
    p.square = {square, hidden, hidden, n, F::kPart};
    p.out = {out, hidden, hidden, n, F::kPart};
    p.steps = (in + kDepth - 1) / kDepth;
    p.channels = (hidden + kHidden * kCluster - 1) / (kHidden * kCluster);
    p.tokens = (n + F::kTokens - 1) / F::kTokens;
    p.beside = min(beside, p.channels);
    (backward ? run<F, true> : run<F, false>)(p, blocks, switches);
  });
}
