// Tiles of bf16 in shared memory and their products on tensor cores, for a half of four warps. Tiles have rows of 64 bf16 = 128
// bytes, whose eight 16-byte pieces are permuted by the row, so that ldmatrix meets no bank conflict by rows or by columns.
#pragma once

#include "sequence.cuh"

namespace tensor_core {

constexpr int kSize = 64, kChunk = 32, kThreads = 128;
constexpr int kTile = kChunk * kSize * 2, kSquare = 2 * kTile;  // bytes of a tile of tokens, of a 64 x 64 tile

struct alignas(8) Floats { float first, second; };

using Tile = unsigned char*;
using Fragment = uint32_t[4];      // 16 x 16 of an A operand, or 16 x 16 of a B operand: two of its 16 x 8
using Accumulator = float[4];      // 16 x 8: rows lane / 4 and 8 more, columns 2 (lane % 4) and the next

// Where this thread is among the four warps of its half. A kernel asks anew in each of its phases, since the compiler would keep
// whatever depends on it in registers through the whole loop, and spill.
struct Thread { int warp, lane; };
__device__ __forceinline__ Thread this_thread() {
  const int index = int((threadIdx.x + unknown_zero()) % kThreads);
  return {of_first_lane(index / 32) & 3, index % 32};
}

__device__ __forceinline__ int place(int row, int column) {
  return row * 128 + ((column / 8 ^ row % 8) * 16) + column % 8 * 2;
}

// The row that a lane gives to ldmatrix, in a tile whose 16 x 16 corner lies at (0, 0): matrices 0 and 1 below one another,
// 2 and 3 beside them; or 0 and 1 beside one another. Since 16 columns are two pieces, another corner's columns only flip
// bits: place(row + r, column + c) = row * 128 + (place(r, c) ^ column * 2) for multiples of 16.
__device__ __forceinline__ int down_first(Thread me) {
  const int lane = me.lane;
  return place(lane % 16, lane / 16 * 8);
}
__device__ __forceinline__ int across_first(Thread me) {
  const int lane = me.lane;
  return place(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
}
// A operands: rows row.., depth k.. of a tile that is stored by rows, or by depth.
__device__ __forceinline__ void load_a(Thread me, Fragment& f, Tile tile, int row, int k) {
  load_matrices(f, tile + row * 128 + (down_first(me) ^ k * 2));
}
__device__ __forceinline__ void load_a_by_depth(Thread me, Fragment& f, Tile tile, int row, int k) {
  load_matrices_transposed(f, tile + k * 128 + (across_first(me) ^ row * 2));
}
// B operands: depth k.., columns column.. of a tile that is stored by columns, or by depth.
__device__ __forceinline__ void load_b(Thread me, Fragment& f, Tile tile, int k, int column) {
  load_matrices(f, tile + column * 128 + (across_first(me) ^ k * 2));
}
__device__ __forceinline__ void load_b_by_depth(Thread me, Fragment& f, Tile tile, int k, int column) {
  load_matrices_transposed(f, tile + k * 128 + (down_first(me) ^ column * 2));
}

// 16 columns, c[0] and c[1], += a b.
__device__ __forceinline__ void multiply_16(Accumulator* c, const Fragment& a, const Fragment& b) {
  multiply_add(c[0], a, b[0], b[1]);
  multiply_add(c[1], a, b[2], b[3]);
}
// c += a b, or c = a b if not `adds`, for this warp's 16 rows: 16 n deep, a in registers, 16 groups columns of a tile stored by
// columns or by depth. The four warps of a half come to it together, and leave a and c alone until wait_for_products; not
// `together`, each warp multiplies alone and at once. Bits of `depths` and `of_groups` say which 16 of the depth and of the columns
// are of use; the rest of a is zero, the rest of c comes out as anything.
template <int n, int groups, bool by_depth, bool adds = true, bool together = true>
__device__ __forceinline__ void multiply(Thread me, Accumulator* c, const Fragment* a, Tile tile, int depths = -1,
                                         int of_groups = -1) {
#ifdef HERON_WARPGROUPS
  if constexpr (together) {
    const uint32_t first = matrix_descriptor(tile);
    start_products();
#pragma unroll
    for (int k = 0; k < n; k++) {
      const uint32_t b = first + k * (by_depth ? 128 : 2);
      if (groups == 4) {
        if (adds || k > 0) {
          multiply_add_64<by_depth, true>(c, a[k], b);
        } else {
          multiply_add_64<by_depth, false>(c, a[k], b);
        }
      } else if (adds || k > 0) {
        multiply_add_32<by_depth, true>(c, a[k], b);
      } else {
        multiply_add_32<by_depth, false>(c, a[k], b);
      }
    }
    commit_products();
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < 8 * groups && !adds; i++) c[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int k = 0; k < n; k++) {
    if (!(depths >> k & 1)) continue;
#pragma unroll
    for (int group = 0; group < groups; group++) {
      if (!(of_groups >> group & 1)) continue;
      Fragment b;
      if (by_depth) {
        load_b_by_depth(me, b, tile, 16 * k, 16 * group);
      } else {
        load_b(me, b, tile, 16 * k, 16 * group);
      }
      multiply_16(c + 2 * group, a[k], b);
    }
  }
}
// Two accumulators side by side as an A operand.
__device__ __forceinline__ void as_operand(Fragment& f, const Accumulator* c) {
  f[0] = pack(c[0][0], c[0][1]);
  f[1] = pack(c[0][2], c[0][3]);
  f[2] = pack(c[1][0], c[1][1]);
  f[3] = pack(c[1][2], c[1][3]);
}
__device__ __forceinline__ void store_operand(Thread me, Tile tile, int row, int column, const Fragment& f) {
  store_matrices(tile + row * 128 + (down_first(me) ^ column * 2), f);
}
// The transpose of what store_operand stores.
__device__ __forceinline__ void store_operand_transposed(Thread me, Tile tile, int row, int column, const Fragment& f) {
  store_matrices_transposed(tile + row * 128 + (across_first(me) ^ column * 2), f);
}

}  // namespace tensor_core
