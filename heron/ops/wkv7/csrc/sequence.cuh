// Which tokens a block works on, and where they lie.
#pragma once

#include "wkv7s.h"

constexpr float kDecayScale = 0.6065306597126334f;     // exp(-0.5)
constexpr float kLog2E = 1.4426950408889634f;

// One head of one sequence, packed sequence or segment.
struct Sequence {
  int64_t row, first, slot;  // of the batch; token in that row; of the first chunk among the saved states
  int length, index, head;
};

template <int chunk>
__device__ __forceinline__ Sequence find_sequence(const Wkv7sProblem& p) {
  Sequence s;
  s.index = int(blockIdx.x) / p.heads;
  s.head = int(blockIdx.x) % p.heads;
  if (p.cu_seqlens != nullptr) {
    int64_t first, last;
    if (p.cu_seqlens_is_int64) {
      first = static_cast<const int64_t*>(p.cu_seqlens)[s.index];
      last = static_cast<const int64_t*>(p.cu_seqlens)[s.index + 1];
    } else {
      first = static_cast<const int32_t*>(p.cu_seqlens)[s.index];
      last = static_cast<const int32_t*>(p.cu_seqlens)[s.index + 1];
    }
    first = first < 0 ? 0 : first > p.tokens ? p.tokens : first;  // bad offsets give bad numbers, never a bad address
    last = last < first ? first : last > p.tokens ? p.tokens : last;
    s.row = 0;
    s.first = first;
    s.length = int(last - first);
    s.slot = first / chunk + s.index;  // at most one chunk of each sequence before this one is not full
  } else {
    s.row = s.index / p.segments;
    s.first = int64_t(s.index % p.segments) * p.segment_tokens;
    const int64_t left = p.tokens - s.first;
    s.length = int(left < p.segment_tokens ? left : p.segment_tokens);
    s.slot = s.row * ((p.tokens + chunk - 1) / chunk) + s.first / chunk;
  }
  return s;
}

// Token t of the sequence in an input, and in a (B, T, H, N) output.
template <typename T>
__device__ __forceinline__ const T* token_of(const Wkv7sInput& x, const Sequence& s, int t) {
  return static_cast<const T*>(x.data) + s.row * x.batch + (s.first + t) * x.token + s.head * x.head;
}
template <typename T>
__device__ __forceinline__ T* token_of(void* y, const Wkv7sProblem& p, const Sequence& s, int t) {
  return static_cast<T*>(y) + ((s.row * p.tokens + s.first + t) * p.heads + s.head) * p.size;
}
// A state among (sequences, H, N, N), and the one saved before chunk c.
template <typename T>
__device__ __forceinline__ T* state_of(T* states, const Wkv7sProblem& p, int64_t index, int head) {
  return states + (index * p.heads + head) * p.size * p.size;
}
