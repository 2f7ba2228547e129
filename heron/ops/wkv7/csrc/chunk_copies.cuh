// Copies of a chunk's inputs to shared memory in the background, each to its tile, by one of two means. A kernel calls `begin`
// once, `ask` for a chunk and `wait` for it. A head of `parts` times 64 columns comes as tiles of the first 64 of every input, and
// then of the next. `table` has 16 bytes for them in each of its rows of 128: where M has a hole, since
// its r-rows 0 .. 15 and k-columns 16 .. 31 are all zero, and no product reads them.
#pragma once

#include "tiles.cuh"

namespace tensor_core {

constexpr int kTable = (kDy + 1) * 128;  // bytes

// Whole tiles, each asked for by one thread of a warp.
template <int parts>
struct TileCopies {
  Tile table;
  const TileMap* maps;
  int row, first, head, length;
  unsigned there;  // bits of inputs; the others come as zeros
  bool packed;

  __device__ __forceinline__ Arrivals& arrivals(int index) const {
    return reinterpret_cast<Arrivals*>(table + place(0, kChunk + 16))[index];
  }
  __device__ __forceinline__ Arrivals& of_state() const { return *reinterpret_cast<Arrivals*>(table + place(1, kChunk + 16)); }
  // Of the first `n` inputs; those of the bits `skipped` come as zeros. Ends with the block in step.
  __device__ __forceinline__ void begin(const Wkv7sProblem& p, const Sequence& sequence, int n, unsigned skipped) {
    row = int(sequence.row), first = int(sequence.first), head = sequence.head, length = sequence.length;
    packed = p.cu_seqlens != nullptr;
    there = 0;
    for (int i = 0; i < n; i++) there |= unsigned(p.inputs[i].data != nullptr) << i;
    there &= ~skipped;
    if (threadIdx.x < 2) init_arrivals(arrivals(threadIdx.x));
    if (parts > 1 && threadIdx.x == 2) init_arrivals(of_state());
    __syncthreads();
  }
  // The chunk at `start` to stage `index`; `thread` is this one's number among those that ask. `more` bytes come with it.
  template <int threads, int n>
  __device__ __forceinline__ void ask(unsigned thread, Tile stage, int index, int start, int more) const {
    if (thread % 32 != 0) return;
    if (thread == 0) expect_bytes(arrivals(index), parts * n * kTile + more);
#pragma unroll 1
    for (int i = thread / 32; i < parts * n; i += threads / 32) {
      const int input = parts == 1 ? i : i % n, column = parts == 1 ? 0 : i / n * kSize;
      const int token = there >> input & 1 ? first + start : -kChunk;
      copy_tile(stage + i * kTile, maps[input], row, token, head, column, arrivals(index));
    }
  }
  template <int threads>
  __device__ __forceinline__ void ask_for_state(unsigned thread, Tile to, int index, const void* from) const {
    if (thread == 0) copy_bytes(to, from, kSquare, arrivals(index));
  }
  // One that comes by itself, and all threads' wait for it; `turn` counts them.
  template <int threads>
  __device__ __forceinline__ void ask_for_state(unsigned thread, Tile to, const void* from) const {
    if (thread != 0) return;
    expect_bytes(of_state(), parts * parts * kSquare);
    copy_bytes(to, from, parts * parts * kSquare, of_state());
  }
  __device__ __forceinline__ void wait_for_state(int turn) const { wait_for_bytes(of_state(), turn % 2); }
  // Until the chunk is there that is number `turn` of its stage; what belongs to another packed sequence is zero. All threads.
  template <int threads, int n>
  __device__ __forceinline__ void wait(Tile stage, int index, int turn, int start) const {
    __syncthreads();
    wait_for_bytes(arrivals(index), turn % 2);
    if (!packed || length - start >= kChunk) return;
    const int first_piece = threadIdx.x + (parts == 1 ? 0 : unknown_zero());  // so that no pieces are kept in registers
    for (int i = first_piece; i < parts * n * kTile / 16; i += threads) {
      if (i / 8 % kChunk >= length - start) reinterpret_cast<Piece*>(stage)[i] = {};
    }
    __syncthreads();
  }
};

// Where the sequence's first token of an input lies, bytes from one token to the next, and how many there are; of an input
// that comes as zeros, none, at an address that may be read.
struct alignas(16) Source { const char* first; int32_t step, length; };

// Pieces of 16 bytes, by all threads that ask.
template <int parts>
struct PieceCopies {
  Tile table;
  const TileMap* maps;

  __device__ __forceinline__ Source& source(int i) const { return *reinterpret_cast<Source*>(table + place(i, kChunk + 16)); }
  __device__ __forceinline__ void begin(const Wkv7sProblem& p, const Sequence& sequence, int n, unsigned skipped) {
    const int i = int(threadIdx.x);
    if (i < n) {
      const Wkv7sInput& x = p.inputs[i];
      const bool there = x.data != nullptr && !(skipped >> i & 1) && sequence.length > 0;
      const void* first = there ? token_of<bfloat16>(x, sequence, 0) : p.inputs[kW].data;
      source(i) = {static_cast<const char*>(first), there ? int(x.token * 2) : 0, there ? sequence.length : 0};
    }
    __syncthreads();
  }
  template <int threads, int n>
  __device__ __forceinline__ void ask(unsigned thread, Tile stage, int, int start, int) const {
    constexpr int rows = threads / 8;  // of a tile at once
    const int row = thread / 8, column = thread % 8 * 8;
    Tile to = stage + place(row, column);
#pragma unroll 1
    for (int i = 0; i < parts * n; i++, to += kTile) {
      const Source from = source(parts == 1 ? i : i % n);
      const char* piece = from.first + int64_t(start + row) * from.step + (parts == 1 ? 0 : i / n * 128) + column * 2;
#pragma unroll
      for (int j = 0; j < kChunk / rows; j++, piece += rows * from.step) {
        copy_async(to + j * rows * 128, piece, start + row + j * rows < from.length);
      }
    }
    copy_commit();
  }
  template <int threads>
  __device__ __forceinline__ void ask_for_state(unsigned thread, Tile to, int, const void* from) const {
    const int piece = thread * 16;
#pragma unroll
    for (int i = 0; i < kSquare; i += threads * 16) copy_async(to + piece + i, static_cast<const char*>(from) + piece + i, true);
    copy_commit();
  }
  template <int threads>
  __device__ __forceinline__ void ask_for_state(unsigned thread, Tile to, const void* from) const {
    for (int i = 0; i < parts * parts; i++) {
      ask_for_state<threads>(thread, to + i * kSquare, 0, static_cast<const char*>(from) + i * kSquare);
    }
  }
  __device__ __forceinline__ void wait_for_state(int) const {}  // it came with the inputs
  template <int threads, int n>
  __device__ __forceinline__ void wait(Tile, int, int, int) const {
    copy_wait<0>();
    __syncthreads();
  }
};

#ifdef HERON_TILE_COPIES
template <int parts>
using Copies = TileCopies<parts>;
#else
template <int parts>
using Copies = PieceCopies<parts>;
#endif
struct Maps { TileMap of[kDy + 1]; };

// For a device that copies tiles; null, or the error in words.
inline const char* describe_inputs(Maps& maps, const Wkv7sProblem& p) {
  if (!copies_tiles()) return nullptr;
  for (int i = 0; i <= kDy; i++) {
    const Wkv7sInput& x = p.inputs[p.inputs[i].data != nullptr ? i : kW];
    const int64_t any = p.size;  // the step of a dimension of one
    const char* error = describe(maps.of[i], x.data, p.batch, p.tokens, p.heads, p.size, p.batch > 1 ? x.batch : any,
                                 p.tokens > 1 ? x.token : any, p.heads > 1 ? x.head : any);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace tensor_core
