// The fast path: bf16 in and out, chunks of 32 tokens, products of bf16 tiles on tensor cores with fp32 sums, fp32 state. One block
// runs one head of one sequence. At head size 64 the forward has four warps: warp i holds rows 16 i .. 16 i + 15 (values) of the
// state in registers. The backward has two halves of four warps, and one half holds the gradient of the state in the same way.
// A head of 128 is two parts of 64 columns: the forward has four warps for the values of each, and wide_backward.cuh its backward.
// README.md has the algebra and the budget of registers and shared memory.
#pragma once

#ifndef HERON_FORWARD_BLOCKS  // on one multiprocessor; 4 leave 128 registers and 56 KB to each
#define HERON_FORWARD_BLOCKS 4
#endif
#ifndef HERON_BACKWARD_BLOCKS  // 2 leave 128 registers and 113 KB to each
#define HERON_BACKWARD_BLOCKS 2
#endif
#ifndef HERON_BACKWARD_STAGES  // 2: the next chunk is on its way while this one is worked on, for 36 KB more
#define HERON_BACKWARD_STAGES 2
#endif

#include "wide_backward.cuh"

namespace tensor_core {

constexpr int kBackwardThreads = 2 * kThreads;
constexpr int kForwardStage = (kW + 1) * kTile, kState = (kDy + 1) * kTile, kBackwardStage = kState + kSquare;
template <int parts, bool transfer>
constexpr int kForwardThreads = (transfer ? 2 : 1) * parts * kThreads;
template <int parts, bool transfer>
constexpr int kForwardBlocks = HERON_FORWARD_BLOCKS * kThreads / kForwardThreads<parts, transfer>;
template <int parts>
constexpr int kForwardShared = 2 * parts * kForwardStage + kSquare;
constexpr int kStartSums = 4 * kSize * 4;  // of the columns of state * d_state, by the warps that have its rows
constexpr int kBackwardShared = HERON_BACKWARD_STAGES * kBackwardStage + 3 * kCells + kSquare + kStartSums + kTile + kTable;

// `transfer`: only the map of a segment's state, S_out = S_in P + C; no y and nothing saved. Of eight warps, four have C, from
// zero, and four P, from the identity and without v. With two `parts` there are twice as many warps; each four hold the rows of
// their part's values for all keys, scale their part's columns, and find half the columns of M.
template <int parts, bool transfer>
__global__ void __launch_bounds__(kForwardThreads<parts, transfer>, kForwardBlocks<parts, transfer>)
    forward(const __grid_constant__ Wkv7sProblem p, const __grid_constant__ Maps maps) {
  constexpr int threads = kForwardThreads<parts, transfer>, size = parts * kSize, kStage = parts * kForwardStage;
  Thread me = this_thread();
  const Sequence sequence = find_sequence<kChunk>(p);
  const int group = threads == kThreads ? 0 : of_first_lane(threadIdx.x / kThreads), part = parts == 1 ? 0 : group % parts;
  const bool identity = transfer && group / parts == 1;

  Accumulator state[8 * parts];
  const float* initial = p.segments > 1 ? p.edges : p.state;
  const int first_element = part * kSize * size;  // of the state's rows that are this half's
  load_state<size>(me, state, transfer ? nullptr : state_of(initial, p, sequence.index, sequence.head) + first_element);
  if (identity) {
#pragma unroll
    for (int i = 0; i < 32 * parts; i++) {
      const int row = 64 * part + 16 * me.warp + me.lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + me.lane % 4 * 2 + i % 2;
      state[i / 4][i % 4] = row == column ? 1.0f : 0.0f;
    }
  }
  Copies<parts> copies{shared_memory() + 2 * kStage + kChunk * 128, maps.of};
  auto copy_chunk = [&](int start) {
    const int index = start / kChunk % 2;
    copies.template ask<64, kW + 1>(threadIdx.x - 64, shared_memory() + index * kStage, index, start, 0);
  };
  copies.begin(p, sequence, kW + 1, transfer ? 1 << kR : 0);
  if (!identity && part == 0 && me.warp >= 2 && sequence.length > 0) copy_chunk(0);
  for (int start = 0; start < sequence.length; start += kChunk) {
    const Tile shared = shared_memory() + unknown_zero(), m = shared + 2 * kStage;
    const Tile stage = shared + start / kChunk % 2 * kStage, own = stage + part * kForwardStage;
    const int valid = sequence.length - start;
    constexpr int end = kW * kTile + 3072;  // in each part of a stage; the logits are dead once they are summed
    copies.template wait<threads, kW + 1>(stage, start / kChunk % 2, start / kChunk / 2, start);
    me = this_thread();
    constexpr int warps = threads / 32 / parts;
    float* const sums = reinterpret_cast<float*>(m) + part * warps * kSize;
    scale_inputs<warps, parts == 1>((identity ? 4 : 0) + me.warp, me.lane, own, sums, nullptr, reinterpret_cast<float*>(own + end),
                                    valid);
    show_to_warpgroups();
    __syncthreads();
    me = this_thread();

    if (!identity) {
      Accumulator c[8 / parts];
      Fragment a[4];
#pragma unroll
      for (int i = 0; i < parts; i++) {
        const Tile left = stage + i * kForwardStage + kA * kTile, right = stage + i * kForwardStage + (kB + part) * kTile;
#pragma unroll
        for (int k = 0; k < 4; k++) load_a(me, a[k], left, 16 * me.warp, 16 * k);
        if (i == 0) {
          multiply<4, 4 / parts, false, false>(me, c, a, right, -1, me.warp % 2 ? 15 : 5);
        } else {
          multiply<4, 4 / parts, false, true>(me, c, a, right, -1, me.warp % 2 ? 15 : 5);
        }
        wait_for_products();
      }
      store_attention<4 / parts>(me, m, c, reinterpret_cast<float*>(stage + kW * kTile), part * kChunk);
    }
    Fragment of_state[4], b;
    Accumulator z[8];  // (values, [a-rows; r-rows])
    const bool saves = !transfer && p.saved != nullptr;
    bfloat16* const saved = state_of(static_cast<bfloat16*>(p.saved), p, sequence.slot + start / kChunk, sequence.head);
#pragma unroll
    for (int i = 0; i < parts; i++) {
      const Tile left = stage + i * kForwardStage + kA * kTile;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        as_operand(of_state[k], state + 8 * i + 2 * k);
        if (saves) {
          saved_piece(me, saved + (parts * part + i) * kSize * kSize, k) = {of_state[k][0], of_state[k][1], of_state[k][2],
                                                                             of_state[k][3]};
        }
      }
      if (i == 0) {  // by single warps, where a warpgroup would not have the registers
        multiply<4, transfer ? 2 : 4, false, false, parts == 1>(me, z, of_state, left);
      } else {
        multiply<4, transfer ? 2 : 4, false, true, parts == 1>(me, z, of_state, left);
      }
    }
    if (!identity) {
      if (me.warp < 2) {
        __syncwarp();
        if (part == 0) invert(me, m, reinterpret_cast<float*>(stage + kW * kTile));
      } else if (part == 0 && valid > kChunk) {
        copy_chunk(start + kChunk);
      }
    }
    wait_for_products();
    __syncthreads();
    me = this_thread();

    Fragment uv[4];
    Fragment *const u = uv, *const v = uv + 2;
    auto load_v = [&] {
      load_a_by_depth(me, v[0], own + kV * kTile, 16 * me.warp, 0);
      load_a_by_depth(me, v[1], own + kV * kTile, 16 * me.warp, 16);
#pragma unroll
      for (int i = 0; i < 8 && transfer; i++) {
        if (identity) v[i / 4][i % 4] = 0;
      }
    };
    load_v();
#pragma unroll
    for (int group = 0; group < (transfer ? 2 : 4); group++) {
      load_b(me, b, m, kChunk, 16 * group);
      multiply_16(z + 2 * group, v[0], b);
      if (group % 2 == 1) {
        load_b(me, b, m, kChunk + 16, 16 * group);
        multiply_16(z + 2 * group, v[1], b);
      }
    }
    solve<false>(me, u, z, m);
    if (!transfer) {
      load_b(me, b, m, 0, kChunk);
      multiply_16(z + 4, u[0], b);
      load_b(me, b, m, 0, kChunk + 16);
      multiply_16(z + 6, u[0], b);
      load_b(me, b, m, 16, kChunk + 16);
      multiply_16(z + 6, u[1], b);
      const Tile tile = own + kA * kTile;
      turn_tokens(me, tile, z + 4);
      __syncwarp();
      const int row = me.lane / 2, column = 16 * me.warp + me.lane % 2 * 8, step = p.heads * size;
      bfloat16* const to = token_of<bfloat16>(p.y, p, sequence, start + row) + part * kSize + column;
      store_if(row < valid, to, *reinterpret_cast<const Piece*>(tile + place(row, column)));
      store_if(row + 16 < valid, to + 16 * step, *reinterpret_cast<const Piece*>(tile + place(row + 16, column)));
    }
    if (parts > 1) load_v();  // anew: meanwhile there was no room for it in registers
#pragma unroll
    for (int i = 0; i < parts; i++) multiply<4, 4, true>(me, state + 8 * i, uv, stage + i * kForwardStage + kB * kTile);
    wait_for_products();
#pragma unroll
    for (int i = 0; i < 8 * parts; i++) {
      const float* const factors = reinterpret_cast<const float*>(stage + i / 8 * kForwardStage + end);
      const Floats factor = *reinterpret_cast<const Floats*>(factors + i % 8 * 8 + me.lane % 4 * 2);
      state[i][0] *= factor.first;
      state[i][1] *= factor.second;
      state[i][2] *= factor.first;
      state[i][3] *= factor.second;
    }
  }
  const int index = int(blockIdx.x) / p.heads, head = int(blockIdx.x) % p.heads;
  if (transfer) {
    store_state<size>(me, state_of(identity ? p.transfer : p.local, p, index, head) + first_element, state);
  } else if (p.segments == 1) {
    store_state<size>(me, state_of(p.final_state, p, index, head) + first_element, state);
  } else if (index % p.segments == p.segments - 1) {
    store_state<size>(me, state_of(p.final_state, p, sequence.row, head) + first_element, state);
  }
}

// `transfer`: only the gradient of the segment's first state as far as it comes from its own y.
//
// The warps are two halves: of left, which has M, J, U, dM and the gradients of left, and of right, which has the state's
// gradient, X, dV and the gradients of right. What both do alike they do by the same instructions, since instructions that
// are not yet at hand are what this kernel waits for most.
template <bool transfer>
__global__ void __launch_bounds__(kBackwardThreads, HERON_BACKWARD_BLOCKS)
    backward(const __grid_constant__ Wkv7sProblem p, const __grid_constant__ Maps maps) {
  const bool of_left = of_first_lane(threadIdx.x / kThreads) == 0;
  Thread me = this_thread();
  const int late = me.warp % 2;
  const bool upper = me.warp < 2;  // rows of a or b, not of r or k

  Accumulator held[8] = {};  // of right: rows of the state's gradient; of left: z
  int length;
  int64_t first_output, first_state;  // elements of an output, and of the saved states, that lie before
  const int output_step = p.heads * kSize, state_step = p.heads * kSize * kSize;
  Copies<1> copies{shared_memory() + kBackwardShared - kTable, maps.of};
  {
    const Sequence sequence = find_sequence<kChunk>(p);
    length = sequence.length;
    first_output = ((sequence.row * p.tokens + sequence.first) * p.heads + sequence.head) * kSize;
    first_state = (sequence.slot * p.heads + sequence.head) * kSize * kSize;
    copies.begin(p, sequence, kDy + 1, transfer ? 1 << kK | 1 << kV : 0);
    if (!of_left) {
      const float* d_final = p.segments > 1 ? p.edges : p.d_final;
      const bool from_zero = transfer || d_final == nullptr;
      load_state(me, held, from_zero ? nullptr : state_of(d_final, p, sequence.index, sequence.head));
    }
  }
  const int last = (length + kChunk - 1) / kChunk * kChunk - kChunk;

  // The half of right copies the inputs, and the last two warps of left the states, while the first two invert.
  auto copy_chunk = [&](int start) {
    const int index = start / kChunk % HERON_BACKWARD_STAGES;
    const Tile stage = shared_memory() + index * kBackwardStage;
    const unsigned thread = threadIdx.x + unknown_zero();
    if (!of_left) {
      copies.ask<kThreads, kDy + 1>(thread - kThreads, stage, index, start, transfer ? 0 : kSquare);
    } else if (!transfer && !upper) {
      const bfloat16* from = static_cast<const bfloat16*>(p.saved) + first_state + int64_t(start / kChunk) * state_step;
      copies.ask_for_state<64>(thread - 64, stage + kState, index, from);
    }
  };
  if (HERON_BACKWARD_STAGES == 2 && last >= 0) copy_chunk(last);
  for (int start = last; start >= 0; start -= kChunk) {
    const Tile shared = shared_memory() + unknown_zero();
    const Tile m = shared + HERON_BACKWARD_STAGES * kBackwardStage, ux = m + kSquare;
    const Tile d = ux + kSquare;  // the gradient of the state at the end of the chunk, decayed
    float* const remains = reinterpret_cast<float*>(m + 3 * kCells);
    float* const start_sums = remains + kChunk * kSize;
    const Tile of_v = m + 3 * kCells + kSquare + kStartSums;
    const Tile stage = shared + start / kChunk % HERON_BACKWARD_STAGES * kBackwardStage;
    const Tile left = stage + kA * kTile, right = stage + kB * kTile, dy = stage + kDy * kTile, state = stage + kState;
    const int valid = length - start;
    if (HERON_BACKWARD_STAGES == 1) {
      show_to_warpgroups();
      __syncthreads();
      copy_chunk(start);
    }
    const int index = start / kChunk % HERON_BACKWARD_STAGES, turn = (last - start) / kChunk / HERON_BACKWARD_STAGES;
    copies.wait<kBackwardThreads, kDy + 1>(stage, index, turn, start);
    me = this_thread();
    scale_inputs<8>((of_left ? 0 : 4) + me.warp, me.lane, stage, reinterpret_cast<float*>(m), remains, nullptr, valid);
    show_to_warpgroups();
    __syncthreads();
    me = this_thread();

    Fragment b, rows[4];
    if (of_left) {
#pragma unroll
      for (int k = 0; k < 4; k++) load_a(me, rows[k], left, 16 * me.warp, 16 * k);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const Floats end = *reinterpret_cast<const Floats*>(remains + (kChunk - 1) * kSize + 8 * i + me.lane % 4 * 2);
        held[i][0] *= end.first;
        held[i][1] *= end.second;
        held[i][2] *= end.first;
        held[i][3] *= end.second;
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        as_operand(rows[k], held + 2 * k);
        if (!transfer) store_operand(me, d, 16 * me.warp, 16 * k, rows[k]);
      }
    }
    Accumulator c[8];  // rows of M, or (values, [b-rows; k-rows]): the gradient of [u; v]
    multiply<4, 4, false, false>(me, c, rows, right, -1, of_left ? late ? 15 : 5 : transfer ? 3 : 15);
    if (HERON_BACKWARD_STAGES == 2 && start > 0 && !(of_left && upper)) copy_chunk(start - kChunk);
    wait_for_products();
    Accumulator* const z = held;  // (values, a-rows) of u's bracket
    if (of_left) {
      store_attention<4>(me, m, c, reinterpret_cast<float*>(ux), 0);
      if (!transfer) {
#pragma unroll
        for (int k = 0; k < 4; k++) load_saved(me, rows[k], state, k);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; k++) store_operand(me, state, 16 * me.warp, 16 * k, rows[k]);
        multiply<4, 2, false, false>(me, z, rows, left);
      }
      if (upper) {
        __syncwarp();
        invert(me, m, reinterpret_cast<float*>(ux));
      }
      wait_for_products();
    }
    __syncthreads();
    me = this_thread();

    // u to `ux`, or x, and dv.
    if (of_left && !transfer) {
      Fragment u[2], v;
      load_a_by_depth(me, v, stage + kV * kTile, 16 * me.warp, 0);
      load_b(me, b, m, kChunk, 0);
      multiply_16(z, v, b);
      load_b(me, b, m, kChunk, 16);
      multiply_16(z + 2, v, b);
      load_a_by_depth(me, v, stage + kV * kTile, 16 * me.warp, 16);
      load_b(me, b, m, kChunk + 16, 16);
      multiply_16(z + 2, v, b);
      solve<false>(me, u, z, m);
      store_operand(me, ux, 16 * me.warp, 0, u[0]);
      store_operand(me, ux, 16 * me.warp, 16, u[1]);
    }
    if (!of_left) {  // rows becomes (values, [X; dY])
      load_a_by_depth(me, rows[2], dy, 16 * me.warp, 0);
      load_a_by_depth(me, rows[3], dy, 16 * me.warp, 16);
#pragma unroll
      for (int group = 0; group < (transfer ? 2 : 4); group++) {
        if (group % 2 == 0) {
          load_b_by_depth(me, b, m, kChunk, 16 * group);
          multiply_16(c + 2 * group, rows[2], b);
        }
        load_b_by_depth(me, b, m, kChunk + 16, 16 * group);
        multiply_16(c + 2 * group, rows[3], b);
      }
      solve<true>(me, rows, c, m);
      if (!transfer) {
        store_operand(me, ux, 16 * me.warp, kChunk, rows[0]);
        store_operand(me, ux, 16 * me.warp, kChunk + 16, rows[1]);
        load_b_by_depth(me, b, m, 0, kChunk);
        multiply_16(c + 4, rows[0], b);
        load_b_by_depth(me, b, m, 16, kChunk);
        multiply_16(c + 4, rows[1], b);
        load_b_by_depth(me, b, m, 16, kChunk + 16);
        multiply_16(c + 6, rows[1], b);
        turn_tokens(me, of_v, c + 4);
      }
    }
    if (!transfer) {
      show_to_warpgroups();
      __syncthreads();
      me = this_thread();
    }

    // dM to `m`, or the gradient of the state before the chunk.
    if (!of_left) {
      multiply<4, 4, true>(me, held, rows, left);
      wait_for_products();
      if (!transfer) {
        const Floats sum = sum_rows(me, state, held);
        *reinterpret_cast<Floats*>(start_sums + me.warp * kSize + 8 * (me.lane / 4) + me.lane % 4 * 2) = sum;
      }
    }
    if (transfer) continue;
    // This warp's 16 rows of [X; dY], or of [U; V].
    auto load_rows = [&](Fragment* to) {
      const int row = 16 * me.warp;
      const Tile tokens = of_left ? dy : stage + kV * kTile;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (upper) {
          load_a_by_depth(me, to[k], ux, of_left ? kChunk + row : row, 16 * k);
        } else {
          load_a(me, to[k], tokens, row - kChunk, 16 * k);
        }
      }
    };
    if (of_left) {
      load_rows(rows);
      Accumulator dm[8];
      multiply<4, 2, true, false>(me, dm, rows, ux, -1, late ? 3 : 1);
      multiply<4, 2, false, false>(me, dm + 4, rows, stage + kV * kTile, -1, late ? 3 : 1);
      wait_for_products();
#pragma unroll
      for (int k = 0; k < 4; k++) as_operand(rows[k], dm + 2 * k);
      mask_rows(me, rows, !upper);
#pragma unroll
      for (int k = 0; k < 4; k++) store_operand(me, m, 16 * me.warp, 16 * k, rows[k]);
    }
    __syncthreads();
    me = this_thread();

    // This warp's 16 rows of dM R + X S_0, or of dM^T L + [U; V] D.
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (of_left) {
        load_a(me, rows[k], m, 16 * me.warp, 16 * k);
      } else {
        load_a_by_depth(me, rows[k], m, 16 * me.warp, 16 * k);
      }
    }
    Fragment more_rows[4];
    Accumulator gradient[8];
    multiply<4, 4, true, false>(me, gradient, rows, of_left ? right : left, of_left ? late ? 15 : 5 : late ? 10 : 15);
    load_rows(more_rows);
    multiply<4, 4, true>(me, gradient, more_rows, of_left ? state : d);
    wait_for_products();
    __syncthreads();

    // Gradients of the scaled vectors, through shared memory to the layout in which they were scaled. Nothing reads M, U, X, D,
    // dy and the state any more.
    float* const of_a = reinterpret_cast<float*>(m);
    float* const of_b = of_a + kCells / 4;
    float* const of_k = of_b + kCells / 4;
    float* const of_r = reinterpret_cast<float*>(dy);
    float* const sums = of_r + kCells / 4;
    store_cells(me, of_left ? upper ? of_a : of_r : upper ? of_b : of_k, gradient);
    __syncthreads();
    me = this_thread();

    finish_gradients<4>(p, (of_left ? 0 : 4) + me.warp, me.lane, stage, of_v, remains, {of_a, of_r, of_b, of_k}, sums, start_sums,
                        first_output, output_step, start, valid);
  }
  if (of_left) return;
  const Sequence sequence = find_sequence<kChunk>(p);
  if (transfer) {
    store_state(me, state_of(p.local, p, sequence.index, sequence.head), held);
  } else if (p.segments == 1) {
    store_state(me, state_of(p.d_state, p, sequence.index, sequence.head), held);
  } else if (sequence.index % p.segments == 0) {
    store_state(me, state_of(p.d_state, p, sequence.row, sequence.head), held);
  }
}

// The states at the edges of the segments, one after another in fp32: forward S_{i+1} = S_i P_i + C_i, backward
// dS_{i-1} = dS_i P_i^T + D_i. Block (row * H + head, i) has 16 rows of the states.
constexpr int kPassThreads = 256, kPassShared = (16 + kSize) * (kSize + 1) * 4;

template <bool backwards>
__global__ void __launch_bounds__(kPassThreads) pass_states(const __grid_constant__ Wkv7sProblem p) {
  float(*const rows)[kSize + 1] = reinterpret_cast<float(*)[kSize + 1]>(shared_memory());
  float(*const transfer)[kSize + 1] = rows + 16;
  const int64_t row = int(blockIdx.x) / p.heads;
  const int head = int(blockIdx.x) % p.heads, first = 16 * int(blockIdx.y), column = int(threadIdx.x) % kSize;
  const float* from = backwards ? p.d_final : p.state;
  float values[4];
  for (int i = 0; i < 4; i++) {
    const int at = (first + int(threadIdx.x) / kSize + 4 * i) * kSize + column;
    values[i] = from == nullptr ? 0.0f : state_of(from, p, row, head)[at];
  }
  for (int step = 0; step < p.segments; step++) {
    const int64_t index = row * p.segments + (backwards ? p.segments - 1 - step : step);
    for (int i = 0; i < 4; i++) {
      const int at = int(threadIdx.x) / kSize + 4 * i;
      state_of(p.edges, p, index, head)[(first + at) * kSize + column] = values[i];
      rows[at][column] = values[i];
      values[i] = state_of(p.local, p, index, head)[(first + at) * kSize + column];
    }
    for (int i = threadIdx.x; i < kSize * kSize; i += kPassThreads) {
      transfer[i / kSize][i % kSize] = state_of(p.transfer, p, index, head)[i];
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kSize; k++) {
      const float factor = backwards ? transfer[column][k] : transfer[k][column];
      for (int i = 0; i < 4; i++) values[i] += rows[int(threadIdx.x) / kSize + 4 * i][k] * factor;
    }
    __syncthreads();
  }
}

template <int parts, bool transfer>
const char* launch_forward(const Wkv7sProblem& p, const Maps& maps, void* stream) {
  const dim3 blocks(p.sequences * p.heads);
  return launch(forward<parts, transfer>, blocks, kForwardThreads<parts, transfer>, kForwardShared<parts>, stream, p, maps);
}

const char* run_forward(const Wkv7sProblem& p, void* stream) {
  Maps maps;
  const char* error = describe_inputs(maps, p);
  if (error) return error;
  if (p.size == 2 * kSize) {
    return p.segments == 1 && p.y ? launch_forward<2, false>(p, maps, stream) : "heads of 128 are run by whole sequences";
  }
  if (p.y == nullptr) return launch_forward<1, true>(p, maps, stream);
  if (p.segments > 1) {
    if (!p.mapped) error = launch_forward<1, true>(p, maps, stream);
    if (!error) error = launch(pass_states<false>, dim3(p.batch * p.heads, 4), kPassThreads, kPassShared, stream, p);
  }
  return error ? error : launch_forward<1, false>(p, maps, stream);
}

const char* run_backward(const Wkv7sProblem& p, void* stream) {
  const unsigned blocks = p.sequences * p.heads;
  Maps maps;
  const char* error = describe_inputs(maps, p);
  if (error) return error;
  if (p.size == 2 * kSize) {
    return p.segments == 1 && p.dr
               ? launch(wide::backward, dim3(blocks), wide::kBlockThreads, wide::kShared, stream, p, maps)
               : "heads of 128 are run by whole sequences";
  }
  if (p.dr == nullptr) return launch(backward<true>, dim3(blocks), kBackwardThreads, kBackwardShared, stream, p, maps);
  if (p.segments > 1) {
    if (!p.mapped) error = launch(backward<true>, dim3(blocks), kBackwardThreads, kBackwardShared, stream, p, maps);
    if (!error) error = launch(pass_states<true>, dim3(p.batch * p.heads, 4), kPassThreads, kPassShared, stream, p);
  }
  return error ? error : launch(backward<false>, dim3(blocks), kBackwardThreads, kBackwardShared, stream, p, maps);
}

}  // namespace tensor_core
