// Blocks that run at the same time and wait for one another; hardware.h runs one block after another.
//
// A block goes on until none of its threads gets any further, all waiting for one another or for another block; then
// the next block has its turn. Shared memory is dynamic, or lies in a range that is given.
#pragma once

#include "hardware.h"

namespace emulator {

constexpr unsigned kPatience = 1000;  // turns in which all wait

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint32_t> words;
  bool done = false;
};

inline unsigned count(const std::vector<Fiber>& fibers, unsigned first, unsigned last, Wait what) {
  unsigned n = 0;
  for (unsigned i = first; i < last; i++) n += fibers[i].wait == what;
  return n;
}

// Run each warp as far as it gets, once; whether any thread has got further.
inline bool run_once(Block& block, unsigned turn) {
  const unsigned threads = block.fibers.size(), n_warps = threads / 32;
  const bool together = count(block.fibers, 0, threads, Wait::kBlock) == threads;
  bool moved = false;
  for (unsigned i = 0; i < n_warps; i++) {
    const unsigned first = (turn % 2 ? n_warps - 1 - i : (i + turn) % n_warps) * 32, last = first + 32;
    for (bool running = true; running;) {
      const bool all_lanes = count(block.fibers, first, last, Wait::kWarp) == 32;
      for (unsigned j = first; j < last; j++) {
        const Wait wait = block.fibers[j].wait;
        if (wait == Wait::kDone || (wait == Wait::kWarp && !all_lanes) || (wait == Wait::kBlock && !together)) continue;
        progress = false;
        resume(block.fibers[j]);
        moved = moved || progress || wait != Wait::kPoll;
      }
      const unsigned waiting = count(block.fibers, first, last, Wait::kWarp);
      if (count(block.fibers, first, last, Wait::kPoll) == 0 && waiting != 0 && waiting != 32) fail("lanes of a warp parted ways");
      running = waiting == 32;
    }
  }
  block.done = count(block.fibers, 0, threads, Wait::kDone) == threads;
  return moved;
}

inline std::vector<Block> all;  // that run together

// `switches`: whether a block gives way to the others whenever all of its warps have run once. `fixed`: null, or the
// shared memory of the block that has its turn, if that is not dynamic.
inline void run_together(unsigned blocks, unsigned threads, int shared_bytes, bool switches, char* fixed = nullptr) {
  all.assign(blocks, {});
  std::unique_ptr<char[]> own_stacks{new char[size_t(kStackBytes) * threads * blocks]};
  for (unsigned b = 0; b < blocks; b++) {
    all[b].fibers.resize(threads);
    all[b].warps.resize(kMaxThreads / 32);
    all[b].words.assign((shared_bytes + 3) / 4, kNaN);
    for (unsigned i = 0; i < threads; i++) {
      Fiber& fiber = all[b].fibers[i];
      getcontext(&fiber.entry);
      fiber.entry.uc_stack.ss_sp = own_stacks.get() + size_t(b * threads + i) * kStackBytes;
      fiber.entry.uc_stack.ss_size = kStackBytes;
      fiber.entry.uc_link = nullptr;
      makecontext(&fiber.entry, enter, 0);
      fiber.started = false, fiber.wait = Wait::kNone, fiber.index = i, fiber.group = 0;
    }
  }
  unsigned left = blocks, stuck = 0;
  for (unsigned turn = 0; left != 0; turn++) {
    bool moved = false;
    for (unsigned k = 0; k < blocks; k++) {
      const unsigned b = turn % 2 ? blocks - 1 - k : k;
      Block& block = all[b];
      if (block.done) continue;
      block_index = dim3(b);
      const auto swap_memory = [&] {
        if (fixed) {
          std::swap_ranges(fixed, fixed + shared_bytes, reinterpret_cast<char*>(block.words.data()));
        } else {
          shared_words.swap(block.words);
        }
        std::swap_ranges(block.warps.begin(), block.warps.end(), warps);
      };
      swap_memory();
      for (bool goes_on = true; goes_on && !block.done;) {
        goes_on = run_once(block, turn);
        moved = moved || goes_on;
        if (switches) break;
      }
      left -= block.done;
      swap_memory();
    }
    stuck = moved ? 0 : stuck + 1;
    if (stuck > kPatience) fail("blocks wait for one another for ever");
  }
}

}  // namespace emulator
