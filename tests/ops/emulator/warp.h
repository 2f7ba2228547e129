// Shuffles and votes of a warp, beside hardware.h.
#pragma once

#include "hardware.h"

// `from`: the lane whose value a lane takes.
template <typename T, typename From> T shuffle(T value, From from) {
  using namespace emulator;
  memcpy(my_warp().in[my_lane()], &value, sizeof value);
  collective([from](Warp& warp) {
    for (int lane = 0; lane < 32; lane++) memcpy(warp.out[lane], warp.in[from(lane)], sizeof value);
  });
  memcpy(&value, my_warp().out[my_lane()], sizeof value);
  return value;
}
template <typename T> T __shfl_sync(unsigned, T x, int lane) { return shuffle(x, [=](int) { return lane; }); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return shuffle(x, [=](int i) { return i ^ mask; }); }
template <typename T> T __shfl_up_sync(unsigned, T x, int n) { return shuffle(x, [=](int i) { return i < n ? i : i - n; }); }

template <typename Merge> unsigned reduce(unsigned value, Merge merge) {
  for (int mask = 16; mask; mask /= 2) value = merge(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

inline unsigned __ballot_sync(unsigned, bool x) {
  return reduce(unsigned(x) << emulator::my_lane(), [](unsigned a, unsigned b) { return a | b; });
}
