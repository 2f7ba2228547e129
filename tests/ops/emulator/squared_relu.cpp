// The kernels of squared_relu_mlp as a library for a CPU. What a block brings to both of its cluster it gets whole here, and
// tells itself of room twice.
#include "boxes.h"

#define __shared__ static

namespace {

unsigned __shfl_xor_sync(unsigned, unsigned word, int mask) { return exchange(word, mask); }

void arrive_at(Barrier* barrier, int) { arrive(barrier); }
void bring_half(unsigned char* to, int, int step, const CUtensorMap& map, int k, int row, int numbers_on, int rows_on,
                Barrier* barrier) {
  for (int half = 0; half < 2; half++) {
    bring(to + half * step, map, k + half * numbers_on, row + half * rows_on, barrier);
  }
}

unsigned long long descriptor_of_columns(const void* boxes) { return descriptor(boxes); }
void read_column(float (&numbers)[16], unsigned long long at, int column) {
  for (int k = 0; k < 16; k++) {
    const unsigned offset = 16 * at + column / 64 * 8192 + 128 * k + column % 64 * 2;
    numbers[k] = as_float(uint32_t(word_at(swizzled(offset))) << 16);
  }
}
template <bool by_columns, int n>
void multiply(float (&c)[n], unsigned long long left, unsigned long long right, bool adds) {
  if (!adds) std::fill(c, c + n, 0.0f);
  const auto read = [=](float (&numbers)[16], int i) { (by_columns ? read_column : read_row)(numbers, right, i); };
  add_products(c, left, read);
}
void commit_products() {}
template <int but> void wait_for_products() { __syncwarp(); }
template <int n> void settle(float (&)[n]) {}
template <int count> void keep_registers() {}
template <int count> void take_registers() {}
void sync_cluster() { __syncthreads(); }

int turns_given[2], turns_taken[2];  // by threads
void await_turn(int group) {
  const int turn = turns_taken[group]++ / 128;
  emulator::poll_until([=] { return turns_given[group] / 128 > turn; });
}
void give_turn(int group) { turns_given[group]++; }

unsigned pack_positive(float low, float high) { return pack(low < 0 ? 0 : low, high < 0 ? 0 : high); }
unsigned times(unsigned a, unsigned b) { return pack(low_half(a) * low_half(b), high_half(a) * high_half(b)); }
unsigned twice(unsigned a) { return pack(2 * low_half(a), 2 * high_half(a)); }

}  // namespace

#include "../../../heron/ops/squared_relu_mlp/csrc/squared_relu.cu"

namespace {

CUtensorMap map_of(const void* data, int rows, int in, int box_rows) {
  return {static_cast<const uint16_t*>(data), in, in, rows, box_rows};
}

}  // namespace

// All row by row, in bf16: left (tokens, depth), right (hidden, depth) or backward (depth, hidden), the others (tokens,
// hidden); `kept` is null forward.
extern "C" const char* squared_relu_emulated(const void* left, const void* right, const void* kept, void* out, void* squares,
                                             int tokens, int hidden, int depth, int blocks) {
  Problem p{};
  for (int group : {0, 1}) turns_given[group] = turns_taken[group] = 0;
  p.left = map_of(left, tokens, depth, kTokens);
  p.right = kept ? map_of(right, depth, hidden, kBox) : map_of(right, hidden, depth, kColumns / 2);
  p.kept = static_cast<const unsigned*>(kept);
  p.out = static_cast<unsigned*>(out), p.squares = static_cast<unsigned*>(squares);
  p.tokens = tokens, p.hidden = hidden, p.depth = depth;
  return launch<Problem>(kept ? squared_relu<true> : squared_relu<false>, dim3(blocks), kThreads, kSharedBytes, nullptr, p);
}
