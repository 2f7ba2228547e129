// The names of csrc/boxes.cuh for a CPU. Boxes and matrix instructions permute bytes as the PTX manual says. A box is NaN
// until somebody waits for it. A cluster's blocks run one after another.
#pragma once

#include "single_token.h"

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
  return (barrier->rounds - round) % 2 != 0;  // it counts no further than to two
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
void prefetch_map(const CUtensorMap&) {}

unsigned long long descriptor(const void* rows) { return offset_of(rows) / 16; }
// The 16 numbers of a row from 16 * `at` bytes on, as a matrix instruction reads them.
void read_row(float (&numbers)[16], unsigned long long at, int row) {
  for (int i = 0; i < 16; i += 8) {
    const uint16_t* eight = &word_at(swizzled(16 * at + 128 * row + 2 * i));
    for (int j = 0; j < 8; j++) numbers[i + j] = as_float(uint32_t(eight[j]) << 16);
  }
}
// c += the 64 rows that a warpgroup multiplies, times n columns; read_right(numbers, column) gives 16 numbers of one.
template <int n, typename Read> void add_products(float (&c)[n], unsigned long long rows, Read read_right) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float a[2][16], b[16];
  for (int below = 0; below < 2; below++) read_row(a[below], rows, row + 8 * below);
  for (int i = 0; i < n / 2; i++) {
    read_right(b, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int below = 0; below < 2; below++) {
      for (int k = 0; k < 16; k++) c[i / 2 * 4 + below * 2 + i % 2] += a[below][k] * b[k];
    }
  }
}
void begin_multiplying() {}

}  // namespace
