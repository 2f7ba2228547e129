// The backward at head size 128, which is two parts of 64 values and two of 64 keys. A block of sixteen warps runs one head of
// one sequence: a half of left and a half of right, as at 64 (tensor_core.cuh), for each part. What is summed over values or keys
// a half sums over both parts; what has a row for each value, or a column for each key, each half of a part has for that part. The
// state's gradient, for which two halves have too few registers, lies in all four: values of the half's part, and keys of the
// first part in a half of left, of the second in a half of right.
#pragma once

#include "chunk_steps.cuh"

namespace tensor_core {
namespace wide {

constexpr int kBlockThreads = 4 * kThreads, kStage = 2 * (kDy + 1) * kTile;
constexpr int kRoom = 7 * kSquare;  // for M, [U; X] of both parts and D; later, with half of the state's, for gradients in fp32
constexpr int kShared = HERON_BACKWARD_STAGES * kStage + kRoom + 4 * kSquare + 2 * kSquare + kTable;
static_assert(8 * kCells <= kRoom + 2 * kSquare, "gradients in fp32 must leave room");

__global__ void __launch_bounds__(kBlockThreads, 1)
    backward(const __grid_constant__ Wkv7sProblem p, const __grid_constant__ Maps maps) {
  const int half = of_first_lane(threadIdx.x / kThreads), part = half / 2, side = half % 2;
  const bool of_left = side == 0;
  Thread me = this_thread();
  const int late = me.warp % 2;
  const bool upper = me.warp < 2;  // rows of a or b, not of r or k

  Accumulator held[8] = {};  // rows of the state's gradient
  int length;
  const int output_step = p.heads * 2 * kSize, state_step = p.heads * 4 * kSize * kSize;
  const int own_state = part * 2 * kSize * kSize + side * kSize;
  const Tile table = shared_memory() + kShared - kTable;
  Copies<2> copies{table, maps.of};
  // Elements of an output, and of the saved states, that lie before: where the table has room, not in registers.
  struct Before { int64_t outputs, states; };
  const Before& before = *reinterpret_cast<const Before*>(table);
  {
    const Sequence sequence = find_sequence<kChunk>(p);
    length = sequence.length;
    if (threadIdx.x == 0) {
      *reinterpret_cast<Before*>(table) = {((sequence.row * p.tokens + sequence.first) * p.heads + sequence.head) * 2 * kSize,
                                           (sequence.slot * p.heads + sequence.head) * 4 * kSize * kSize};
    }
    copies.begin(p, sequence, kDy + 1, 0);
    const float* const d_final = p.d_final == nullptr ? nullptr : state_of(p.d_final, p, sequence.index, sequence.head);
    load_state<2 * kSize, kSize>(me, held, d_final == nullptr ? nullptr : d_final + own_state);
  }
  const int last = (length + kChunk - 1) / kChunk * kChunk - kChunk;

  // The last half copies the inputs, and the last two warps of the first the states.
  auto copy_chunk = [&](int start) {
    const int index = start / kChunk % HERON_BACKWARD_STAGES;
    const unsigned thread = threadIdx.x + unknown_zero();
    if (half == 3) copies.ask<kThreads, kDy + 1>(thread - 3 * kThreads, shared_memory() + index * kStage, index, start, 0);
  };
  auto copy_state = [&](int start) {
    if (half != 0 || upper) return;
    const bfloat16* from = static_cast<const bfloat16*>(p.saved) + before.states + int64_t(start / kChunk) * state_step;
    const unsigned thread = threadIdx.x + unknown_zero();
    copies.ask_for_state<64>(thread - 64, shared_memory() + HERON_BACKWARD_STAGES * kStage + kRoom, from);
  };
  if (last >= 0) copy_state(last);
  if (HERON_BACKWARD_STAGES == 2 && last >= 0) copy_chunk(last);
  for (int start = last; start >= 0; start -= kChunk) {
    const Tile shared = shared_memory() + unknown_zero();
    const Tile m = shared + HERON_BACKWARD_STAGES * kStage, ux = m + kSquare;
    const Tile d = ux + 2 * kSquare;  // the gradient of the state at the end of the chunk, decayed
    const Tile state = m + kRoom;
    auto remains = [&](int of) { return reinterpret_cast<float*>(state + 4 * kSquare + of * kSquare); };
    const Tile stage = shared + start / kChunk % HERON_BACKWARD_STAGES * kStage;
    auto tile = [&](int of, int name) { return stage + (of * (kDy + 1) + name) * kTile; };
    const Tile own_ux = ux + part * kSquare, own_v = tile(part, kV), own_dy = tile(part, kDy);
    const int valid = length - start;
    if (HERON_BACKWARD_STAGES == 1) {
      show_to_warpgroups();
      __syncthreads();
      copy_chunk(start);
    }
    const int index = start / kChunk % HERON_BACKWARD_STAGES, turn = (last - start) / kChunk;
    copies.wait<kBlockThreads, kDy + 1>(stage, index, turn / HERON_BACKWARD_STAGES, start);
    me = this_thread();
    scale_inputs<8>(4 * side + me.warp, me.lane, tile(part, kA), reinterpret_cast<float*>(m) + part * 8 * kSize, remains(part),
                    nullptr, valid);
    show_to_warpgroups();
    __syncthreads();
    me = this_thread();

    // D, and what needs no more of it than this half has: columns of M, or a part of the gradient of [u; v].
    Fragment b, rows[4], more_rows[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Floats end = *reinterpret_cast<const Floats*>(remains(side) + (kChunk - 1) * kSize + 8 * i + me.lane % 4 * 2);
      held[i][0] *= end.first;
      held[i][1] *= end.second;
      held[i][2] *= end.first;
      held[i][3] *= end.second;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      as_operand(rows[k], held + 2 * k);
      store_operand(me, d + (2 * part + side) * kSquare, 16 * me.warp, 16 * k, rows[k]);
    }
    Accumulator c[8];  // of M, four; or (values, [b-rows; k-rows])
    if (of_left) {
#pragma unroll
      for (int k = 0; k < 4; k++) load_a(me, rows[k], tile(0, kA), 16 * me.warp, 16 * k);
      multiply<4, 2, false, false>(me, c, rows, tile(0, kB + part), -1, late ? 3 : 1);
#pragma unroll
      for (int k = 0; k < 4; k++) load_a(me, more_rows[k], tile(1, kA), 16 * me.warp, 16 * k);
      multiply<4, 2, false>(me, c, more_rows, tile(1, kB + part), -1, late ? 3 : 1);
      wait_for_products();
    } else {
      multiply<4, 4, false, false>(me, c, rows, tile(1, kB));
      wait_for_products();
    }
    __syncthreads();
    if (HERON_BACKWARD_STAGES == 2 && start > 0) copy_chunk(start - kChunk);
    Accumulator* const z = c;  // (values, a-rows) of u's bracket
    if (of_left) {
      store_attention<2>(me, m, c, reinterpret_cast<float*>(ux), part * kChunk);
      copies.wait_for_state(turn);
      const Tile own_state = state + 2 * part * kSquare;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        load_saved(me, rows[k], own_state, k);
        load_saved(me, more_rows[k], own_state + kSquare, k);
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        store_operand(me, own_state, 16 * me.warp, 16 * k, rows[k]);
        store_operand(me, own_state + kSquare, 16 * me.warp, 16 * k, more_rows[k]);
      }
      multiply<4, 2, false, false>(me, z, rows, tile(0, kA));
      multiply<4, 2, false>(me, z, more_rows, tile(1, kA));
      if (upper && part == 0) {
        __syncwarp();
        invert(me, m, reinterpret_cast<float*>(ux));
      }
      wait_for_products();
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) load_a(me, more_rows[k], d + 2 * part * kSquare, 16 * me.warp, 16 * k);
      multiply<4, 4, false>(me, c, more_rows, tile(0, kB));
      wait_for_products();
    }
    __syncthreads();
    me = this_thread();

    // u to `ux`, or x, and dv.
    Fragment of_v[2];
    if (of_left) {
      Fragment u[2], v;
      load_a_by_depth(me, v, own_v, 16 * me.warp, 0);
      load_b(me, b, m, kChunk, 0);
      multiply_16(z, v, b);
      load_b(me, b, m, kChunk, 16);
      multiply_16(z + 2, v, b);
      load_a_by_depth(me, v, own_v, 16 * me.warp, 16);
      load_b(me, b, m, kChunk + 16, 16);
      multiply_16(z + 2, v, b);
      solve<false>(me, u, z, m);
      store_operand(me, own_ux, 16 * me.warp, 0, u[0]);
      store_operand(me, own_ux, 16 * me.warp, 16, u[1]);
    } else {  // rows becomes (values, [X; dY])
      load_a_by_depth(me, rows[2], own_dy, 16 * me.warp, 0);
      load_a_by_depth(me, rows[3], own_dy, 16 * me.warp, 16);
#pragma unroll
      for (int group = 0; group < 4; group++) {
        if (group % 2 == 0) {
          load_b_by_depth(me, b, m, kChunk, 16 * group);
          multiply_16(c + 2 * group, rows[2], b);
        }
        load_b_by_depth(me, b, m, kChunk + 16, 16 * group);
        multiply_16(c + 2 * group, rows[3], b);
      }
      solve<true>(me, rows, c, m);
      store_operand(me, own_ux, 16 * me.warp, kChunk, rows[0]);
      store_operand(me, own_ux, 16 * me.warp, kChunk + 16, rows[1]);
      load_b_by_depth(me, b, m, 0, kChunk);
      multiply_16(c + 4, rows[0], b);
      load_b_by_depth(me, b, m, 16, kChunk);
      multiply_16(c + 4, rows[1], b);
      load_b_by_depth(me, b, m, 16, kChunk + 16);
      multiply_16(c + 6, rows[1], b);
      as_operand(of_v[0], c + 4);
      as_operand(of_v[1], c + 6);
    }
    show_to_warpgroups();
    __syncthreads();
    me = this_thread();

    // The gradient of the state before the chunk, and of left columns of dM to `m`.
    if (of_left) {
      load_a(me, rows[0], own_ux, 16 * me.warp, kChunk);
      load_a(me, rows[1], own_ux, 16 * me.warp, kChunk + 16);
      load_a_by_depth(me, rows[2], own_dy, 16 * me.warp, 0);
      load_a_by_depth(me, rows[3], own_dy, 16 * me.warp, 16);
    }
    multiply<4, 4, true>(me, held, rows, tile(side, kA));
    if (!of_left) wait_for_products();
    // This warp's 16 rows of [X; dY], or of [U; V], with the values of a part.
    auto load_rows = [&](Fragment* to, int of) {
      const int row = 16 * me.warp;
      const Tile turned = ux + of * kSquare, tokens = tile(of, of_left ? kDy : kV);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (upper) {
          load_a_by_depth(me, to[k], turned, of_left ? kChunk + row : row, 16 * k);
        } else {
          load_a(me, to[k], tokens, row - kChunk, 16 * k);
        }
      }
    };
    if (of_left) {
      Accumulator dm[4];
      load_rows(more_rows, 0);
      if (part == 0) {
        multiply<4, 2, true, false>(me, dm, more_rows, ux, -1, late ? 3 : 1);
      } else {
        multiply<4, 2, false, false>(me, dm, more_rows, tile(0, kV), -1, late ? 3 : 1);
      }
      wait_for_products();
      load_rows(rows, 1);
      if (part == 0) {
        multiply<4, 2, true>(me, dm, rows, ux + kSquare, -1, late ? 3 : 1);
      } else {
        multiply<4, 2, false>(me, dm, rows, tile(1, kV), -1, late ? 3 : 1);
      }
      wait_for_products();
#pragma unroll
      for (int k = 0; k < 2; k++) as_operand(rows[k], dm + 2 * k);
      mask_rows<2>(me, rows, !upper);
#pragma unroll
      for (int k = 0; k < 2; k++) store_operand(me, m, 16 * me.warp, part * kChunk + 16 * k, rows[k]);
    }
    wait_for_products();
    __syncthreads();
    me = this_thread();

    // This warp's 16 rows of dM R + X S_0, or of dM^T L + [U; V] D, with the keys of this part.
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (of_left) {
        load_a(me, rows[k], m, 16 * me.warp, 16 * k);
      } else {
        load_a_by_depth(me, rows[k], m, 16 * me.warp, 16 * k);
      }
    }
    Accumulator gradient[8];
    multiply<4, 4, true, false>(me, gradient, rows, tile(part, of_left ? kB : kA), of_left ? late ? 15 : 5 : late ? 10 : 15);
#ifdef HERON_WARPGROUPS
    wait_for_products();
    load_rows(rows, 0);
    multiply<4, 4, true>(me, gradient, rows, (of_left ? state : d) + part * kSquare);
    wait_for_products();
    load_rows(rows, 1);
    multiply<4, 4, true>(me, gradient, rows, (of_left ? state : d) + (2 + part) * kSquare);
#else
#pragma unroll 1  // the compiler would read both at once, and spill
    for (int of = 0; of < 2; of++) {
      load_rows(rows, of);
      multiply<4, 4, true>(me, gradient, rows, (of_left ? state : d) + (2 * of + part) * kSquare);
    }
#endif
    const Floats sum = sum_rows(me, state + (2 * part + side) * kSquare, held);
    wait_for_products();
    __syncthreads();

    // Gradients of the scaled vectors, through shared memory to the layout in which they were scaled. Nothing reads M, U, X, D,
    // v, dy and the state any more.
    float* const cells = reinterpret_cast<float*>(m);
    auto sums = [&](int of) { return reinterpret_cast<float*>(tile(of, kDy)); };
    store_cells(me, cells + (4 * part + (of_left ? upper ? kA : kR : upper ? kB : kK)) * (kCells / 4), gradient);
    float* const start_sums = sums(side) + (8 + 4 * part + me.warp) * kSize;
    *reinterpret_cast<Floats*>(start_sums + 8 * (me.lane / 4) + me.lane % 4 * 2) = sum;
#pragma unroll
    for (int i = 0; i < 2 && !of_left; i++) store_operand_transposed(me, own_v, 16 * i, 16 * me.warp, of_v[i]);
    __syncthreads();
    me = this_thread();
    float* const own_cells = cells + part * kCells;
    finish_gradients<8>(p, 4 * side + me.warp, me.lane, tile(part, kA), own_v, remains(part),
                        {own_cells, own_cells + kCells / 4, own_cells + kCells / 2, own_cells + kCells / 4 * 3}, sums(part),
                        sums(part) + 8 * kSize, before.outputs + part * kSize, output_step, start, valid);
    if (start > 0) copy_state(start - kChunk);
  }
  const Sequence sequence = find_sequence<kChunk>(p);
  store_state<2 * kSize, kSize>(me, state_of(p.d_state, p, sequence.index, sequence.head) + own_state, held);
}

}  // namespace wide
}  // namespace tensor_core
