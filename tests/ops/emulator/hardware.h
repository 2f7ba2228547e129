// The names of csrc/hardware.cuh for a CPU: threads of a block are fibers, blocks run one after another.
//
// A fiber runs until it waits: for its warp (shuffles, matrix instructions, __syncwarp), for the block (__syncthreads),
// or for something that it looks at again and again.
// Warps take turns in an order that changes at every wait, one running as far as it can before the next begins, so that
// a missing barrier shows as a wrong number. Shared memory starts as NaN. An asynchronous copy fills its target with NaN
// at once and delivers only when its thread waits for it. Lane layouts are those of the PTX manual.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct bfloat16 { uint16_t bits; };
struct float16 { _Float16 value; };

inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t round_to_bf16(float x) {
  uint32_t bits = as_bits(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

inline float to_float(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) { return float(x.value); }
template <typename T> T from_float(float x);
template <> inline bfloat16 from_float<bfloat16>(float x) { return {uint16_t(round_to_bf16(x))}; }
template <> inline float16 from_float<float16>(float x) { return {_Float16(x)}; }

inline uint32_t pack(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
inline float low_half(uint32_t packed) { return as_float(packed << 16); }
inline float high_half(uint32_t packed) { return as_float(packed & 0xffff0000u); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

namespace emulator {

constexpr int kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr uint32_t kNaN = 0x7fc07fc0u;  // a NaN as fp32 and twice as bf16

enum class Wait { kNone, kWarp, kBlock, kPoll, kDone };

struct Copy { void* to; const void* from; bool valid; int group, bytes; };

struct Fiber {
  ucontext_t entry;
  jmp_buf place;
  bool started;
  Wait wait;
  unsigned index;
  int group;
  std::vector<Copy> copies;
};

// What the lanes of one warp bring to a collective instruction, and take from it.
struct Warp {
  const void* rows[32];
  uint32_t in[32][6];
  float c[32][4];
  uint32_t out[32][4];
};

inline Fiber fibers[kMaxThreads];
inline std::unique_ptr<char[]> stacks{new char[size_t(kStackBytes) * kMaxThreads]};
inline Warp warps[kMaxThreads / 32];
inline jmp_buf scheduler;
inline bool progress;  // since the last turn, of a thread that had to poll
inline Fiber* current;
inline std::function<void()> body;
inline std::vector<uint32_t> shared_words;
inline dim3 block_index, grid_size, block_size, thread_index;

inline void enter() {
  body();
  current->wait = Wait::kDone;
  _longjmp(scheduler, 1);
}

// Run `fiber` until it waits or ends.
inline void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = dim3(fiber.index, 0, 0);
  fiber.wait = Wait::kNone;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
  }
}

inline void wait_for(Wait what) {
  current->wait = what;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// Until there is what a thread waits for, which another one does.
template <typename Ready> inline void poll_until(Ready ready) {
  while (!ready()) wait_for(Wait::kPoll);
  progress = true;
}

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "emulator: %s in block (%u, %u)\n", message, block_index.x, block_index.y);
  abort();
}

// Whether a barrier that has been through `rounds` seems to be beyond number `round`: the hardware knows no more than
// whether the last round was an even one.
inline bool seems_over(int rounds, int round) {
  const bool seems = (rounds + 1) % 2 == round % 2;
  if (seems != (rounds > round)) fail("a wait for a round that is not the next one");
  return seems;
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks.get() + size_t(i) * kStackBytes;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, enter, 0);
    fiber.started = false;
    fiber.wait = Wait::kNone;
    fiber.index = i;
    fiber.group = 0;
    fiber.copies.clear();
  }
  const unsigned n_warps = (threads + 31) / 32;
  bool together = false;  // all threads are at the barrier
  for (unsigned turn = 0, idle = 0;; turn++) {
    unsigned done = 0, at_barrier = 0, polling = 0;
    for (unsigned i = 0; i < n_warps; i++) {
      const unsigned warp = turn % 2 ? n_warps - 1 - i : (i + turn / 2) % n_warps;
      const unsigned first = warp * 32, last = first + 32 < threads ? first + 32 : threads;
      const auto count = [&](Wait what) {
        unsigned n = 0;
        for (unsigned j = first; j < last; j++) n += fibers[j].wait == what;
        return n;
      };
      for (bool running = true; running;) {
        const bool all_lanes = count(Wait::kWarp) == last - first;
        for (unsigned j = first; j < last; j++) {
          const Wait wait = fibers[j].wait;
          if (wait == Wait::kDone || (wait == Wait::kWarp && !all_lanes) || (wait == Wait::kBlock && !together)) continue;
          resume(fibers[j]);
        }
        const unsigned waiting = count(Wait::kWarp), ended = count(Wait::kDone);
        if (count(Wait::kPoll) == 0) {
          if (waiting != 0 && waiting != last - first) fail("lanes of a warp parted ways");
          if (ended != 0 && ended != last - first) fail("lanes of a warp ended apart");
        }
        running = waiting == last - first;
      }
    }
    for (unsigned i = 0; i < threads; i++) {
      done += fibers[i].wait == Wait::kDone;
      at_barrier += fibers[i].wait == Wait::kBlock;
      polling += fibers[i].wait == Wait::kPoll;
    }
    if (done == threads) break;
    together = at_barrier == threads;
    if (!together && polling == 0) fail("some threads passed a barrier that others never reach");
    idle = progress ? 0 : idle + 1;
    progress = false;
    if (!together && idle > 4 * kMaxThreads) fail("threads wait for what never comes");
  }
  for (unsigned i = 0; i < threads; i++) {
    if (!fibers[i].copies.empty()) fail("a kernel ended with copies under way");
  }
}

inline Warp& my_warp() { return warps[current->index / 32]; }
inline unsigned my_lane() { return current->index % 32; }

// All lanes have brought their part; lane 0, which goes on first, works for all.
template <typename Work> inline void collective(Work work) {
  wait_for(Wait::kWarp);
  if (my_lane() == 0) work(my_warp());
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)
#define blockDim (emulator::block_size)

inline void __syncthreads() { emulator::wait_for(emulator::Wait::kBlock); }
inline void __syncwarp() { emulator::wait_for(emulator::Wait::kWarp); }

namespace emulator {
inline void check_row(const void* row) {
  const char* base = reinterpret_cast<const char*>(shared_words.data());
  const char* address = static_cast<const char*>(row);
  if (address < base || address + 16 > base + 4 * shared_words.size()) fail("a matrix row outside shared memory");
  if ((address - base) % 16) fail("a matrix row that is not 16-byte aligned");
}
template <bool transposed> inline void load_matrices(uint32_t (&d)[4], const void* row) {
  my_warp().rows[my_lane()] = row;
  check_row(row);
  collective([](Warp& warp) {
    for (int matrix = 0; matrix < 4; matrix++) {
      for (int lane = 0; lane < 32; lane++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
          const int row = transposed ? 2 * (lane % 4) + i : lane / 4;
          const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
          pair[i] = static_cast<const uint16_t*>(warp.rows[8 * matrix + row])[column];
        }
        warp.out[lane][matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
    }
  });
  memcpy(d, my_warp().out[my_lane()], sizeof d);
}
}  // namespace emulator

inline void load_matrices(uint32_t (&d)[4], const void* row) { emulator::load_matrices<false>(d, row); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) { emulator::load_matrices<true>(d, row); }

inline uint32_t transpose_matrix(uint32_t fragment) {
  using namespace emulator;
  my_warp().in[my_lane()][0] = fragment;
  collective([](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) {
      uint32_t pair[2];
      for (int i = 0; i < 2; i++) {
        const int row = 2 * (lane % 4) + i, column = lane / 4;
        pair[i] = warp.in[4 * row + column / 2][0] >> (16 * (column % 2)) & 0xffffu;
      }
      warp.out[lane][0] = pair[0] | pair[1] << 16;
    }
  });
  return my_warp().out[my_lane()][0];
}

inline void store_matrices(void* row, const uint32_t (&d)[4]) {
  using namespace emulator;
  check_row(row);
  my_warp().rows[my_lane()] = row;
  memcpy(my_warp().in[my_lane()], d, sizeof d);
  collective([](Warp& warp) {
    for (int matrix = 0; matrix < 4; matrix++) {
      for (int lane = 0; lane < 32; lane++) {
        void* to = const_cast<void*>(warp.rows[8 * matrix + lane / 4]);
        static_cast<uint32_t*>(to)[lane % 4] = warp.in[lane][matrix];
      }
    }
  });
}
inline void store_matrices_transposed(void* row, const uint32_t (&d)[4]) {
  const uint32_t transposed[4] = {transpose_matrix(d[0]), transpose_matrix(d[1]), transpose_matrix(d[2]),
                                  transpose_matrix(d[3])};
  store_matrices(row, transposed);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulator;
  Warp& mine = my_warp();
  uint32_t* in = mine.in[my_lane()];
  memcpy(in, a, sizeof a);
  in[4] = b0;
  in[5] = b1;
  memcpy(mine.c[my_lane()], c, sizeof c);
  collective([](Warp& warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int row = lane / 4, pair = 2 * (lane % 4);
      for (int i = 0; i < 4; i++) {
        a[row + 8 * (i % 2)][pair + 8 * (i / 2)] = low_half(warp.in[lane][i]);
        a[row + 8 * (i % 2)][pair + 8 * (i / 2) + 1] = high_half(warp.in[lane][i]);
      }
      for (int i = 0; i < 2; i++) {
        b[pair + 8 * i][row] = low_half(warp.in[lane][4 + i]);
        b[pair + 8 * i + 1][row] = high_half(warp.in[lane][4 + i]);
      }
    }
    for (int row = 0; row < 16; row++) {
      float sums[8] = {};
      for (int k = 0; k < 16; k++) {
        for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
      }
      for (int column = 0; column < 8; column++) {
        warp.c[4 * (row % 8) + column / 2][2 * (row / 8) + column % 2] += sums[column];
      }
    }
  });
  memcpy(c, mine.c[my_lane()], sizeof c);
}

inline void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  multiply_add(c, {a0, a1, 0, 0}, b, 0);
}

struct alignas(16) Piece { uint32_t words[4]; };
template <typename T> inline void store_if(bool wanted, void* to, const T& value) {
  if (!wanted) return;
  if (reinterpret_cast<uintptr_t>(to) % sizeof value) emulator::fail("a store to an unaligned address");
  memcpy(to, &value, sizeof value);
}

inline void copy_async(void* to, const void* from, bool valid, int bytes = 16) {
  for (int i = 0; i < bytes / 4; i++) static_cast<uint32_t*>(to)[i] = emulator::kNaN;
  if (reinterpret_cast<uintptr_t>(from) % bytes && valid) {
    emulator::fail("an asynchronous copy from an unaligned address");
  }
  emulator::current->copies.push_back({to, from, valid, emulator::current->group, bytes});
}
inline void show_to_warpgroups() {}  // no warpgroup: what one multiplies, each warp multiplies here, at once
inline void wait_for_products() {}
inline void copy_commit() { emulator::current->group++; }
template <int pending> inline void copy_wait() {
  auto& copies = emulator::current->copies;
  size_t kept = 0;
  for (auto& copy : copies) {
    if (copy.group >= emulator::current->group - pending) {
      copies[kept++] = copy;
    } else if (copy.valid) {
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      memset(copy.to, 0, copy.bytes);
    }
  }
  copies.resize(kept);
}

#ifndef EMULATE_PIECES  // a GPU that copies no tiles
#define HERON_TILE_COPIES
#endif
struct TileMap { const char* first; int64_t sizes[3], steps[3]; };
struct Arrivals { int32_t expected, turns; };

namespace emulator {
struct TileCopy { void* to; std::vector<char> bytes; Arrivals* arrivals; };
inline std::vector<TileCopy> tile_copies;

inline void ask(void* to, std::vector<char> bytes, Arrivals* arrivals) {
  for (size_t i = 0; i < bytes.size() / 4; i++) static_cast<uint32_t*>(to)[i] = kNaN;
  tile_copies.push_back({to, bytes, arrivals});
}
}  // namespace emulator

inline void init_arrivals(Arrivals& arrivals) { arrivals = {}; }
inline void expect_bytes(Arrivals& arrivals, int bytes) {
  if (arrivals.expected) emulator::fail("bytes are expected before those of the turn before are there");
  arrivals.expected = bytes;
}
inline void wait_for_bytes(Arrivals& arrivals, bool odd) {
  if (arrivals.turns % 2 != odd) return;
  if (!arrivals.expected) emulator::fail("a wait for bytes that nobody asked for");
  std::vector<emulator::TileCopy> rest;
  for (auto& copy : emulator::tile_copies) {
    if (copy.arrivals == &arrivals) {
      memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
      arrivals.expected -= int(copy.bytes.size());
    } else {
      rest.push_back(copy);
    }
  }
  emulator::tile_copies = rest;
  if (arrivals.expected) emulator::fail("other bytes came than were expected");
  arrivals.turns++;
}
inline void copy_tile(void* to, const TileMap& map, int row, int token, int head, int column, Arrivals& arrivals) {
  std::vector<char> bytes(32 * 128);
  for (int i = 0; i < 32; i++, token++) {
    if (token < 0 || token >= map.sizes[1]) continue;
    const char* from = map.first + 2 * (row * map.steps[0] + token * map.steps[1] + head * map.steps[2] + column);
    for (int piece = 0; piece < 8; piece++) memcpy(bytes.data() + i * 128 + (piece ^ i % 8) * 16, from + piece * 16, 16);
  }
  emulator::ask(to, bytes, &arrivals);
}
inline void copy_bytes(void* to, const void* from, int bytes, Arrivals& arrivals) {
  emulator::ask(to, {static_cast<const char*>(from), static_cast<const char*>(from) + bytes}, &arrivals);
}
inline bool copies_tiles() { return true; }
inline const char* describe(TileMap& map, const void* first, int64_t rows, int64_t tokens, int64_t heads, int,
                            int64_t row_step, int64_t token_step, int64_t head_step) {
  map = {static_cast<const char*>(first), {rows, tokens, heads}, {row_step, token_step, head_step}};
  if (reinterpret_cast<uintptr_t>(first) % 16 || (row_step | token_step | head_step) % 8) return "an unaligned input";
  return row_step && token_step && head_step ? nullptr : "rows that coincide";
}

inline uint32_t exchange(uint32_t value, int lane_mask) {
  using namespace emulator;
  my_warp().in[my_lane()][0] = value;
  collective([lane_mask](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) warp.out[lane][0] = warp.in[lane ^ lane_mask][0];
  });
  return my_warp().out[my_lane()][0];
}
inline int of_first_lane(int value) {
  using namespace emulator;
  my_warp().in[my_lane()][0] = uint32_t(value);
  collective([](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) warp.out[lane][0] = warp.in[0][0];
  });
  return int(my_warp().out[my_lane()][0]);
}
inline float exchange(float value, int lane_mask) { return as_float(exchange(as_bits(value), lane_mask)); }

inline int unknown_zero() { return 0; }
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulator::shared_words.data()); }

template <typename... Arguments>
const char* launch(void (*kernel)(Arguments...), dim3 grid, int threads, int shared_bytes, void*, Arguments... arguments) {
  if (threads > emulator::kMaxThreads || shared_bytes > 227 * 1024) return "invalid configuration argument";
  emulator::grid_size = grid;
  emulator::block_size = dim3(threads);
  emulator::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; y++) {
    for (unsigned x = 0; x < grid.x; x++) {
      emulator::block_index = dim3(x, y);
      emulator::shared_words.assign(shared_bytes / 4, emulator::kNaN);
      emulator::run_block(threads);
    }
  }
  return nullptr;
}
