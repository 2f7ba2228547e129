// What a chunk takes on tensor cores whatever the head size: a warp's or a half's share of each step, 64 columns at a time.
//
// `left` = [a; r] and `right` = [b; k] are scaled in place and read as 64 x 64 tiles. M's block of a-rows and b-columns, A, has J^T
// in place of each 8 x 8 block on its diagonal: the transposed inverse of I - A there.
#pragma once

#include "chunk_copies.cuh"

namespace tensor_core {

// Gradients of a chunk in fp32, 32 x 64, with rows 8 banks apart: bytes of those of one input.
constexpr int kCellPitch = kSize + 8, kCells = kChunk * kCellPitch * 4;
constexpr int kPitch = 12, kBlock = 8 * kPitch + 4;  // of 8 x 8 fp32: columns and blocks start in other banks, 16-byte aligned
constexpr float kLog2DecayScale = kDecayScale * kLog2E;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x)); }

// Two columns of an input's token t.
__device__ __forceinline__ uint32_t& word(Tile stage, int name, int t, int column) {
  return *reinterpret_cast<uint32_t*>(stage + name * kTile + place(t, column));
}

// Sums of log2 decay from the start of the chunk, and the rows of left and right scaled by them in place. Each of `warps`
// takes its share of the tokens, a lane two columns. `sums` is scratch of warps x 64; `remains`, exp(G) of each token, or `end`,
// exp(G) at the end (64), may be null. What is scaled is read before the sums, or behind them if there is no room in registers.
template <int warps, bool early = true>
__device__ __forceinline__ void scale_inputs(int warp, int lane, Tile stage, float* sums, float* remains, float* end,
                                             int valid) {
  constexpr int tokens = kChunk / warps;
  const int column = lane * 2;
  uint32_t words[tokens][4];
  float g[tokens][2], sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const int t = tokens * warp + i;
    const uint32_t w = word(stage, kW, t, column);
    for (int name = kA; name <= kK && early; name++) words[i][name] = word(stage, name, t, column);
    const float scale = t < valid ? -kLog2DecayScale : 0.0f;
    sum0 += scale * sigmoid(low_half(w));
    sum1 += scale * sigmoid(high_half(w));
    g[i][0] = sum0;
    g[i][1] = sum1;
  }
  *reinterpret_cast<Floats*>(sums + warp * kSize + column) = {sum0, sum1};
  __syncthreads();
  float base0 = 0.0f, base1 = 0.0f;
#pragma unroll
  for (int i = 0; i < warps - 1; i++) {
    const Floats earlier = *reinterpret_cast<const Floats*>(sums + i * kSize + column);
    if (i < warp) base0 += earlier.first, base1 += earlier.second;
  }
  float before0 = exp2_fast(base0), before1 = exp2_fast(base1);
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const int t = tokens * warp + i;
    for (int name = kA; name <= kK && !early; name++) words[i][name] = word(stage, name, t, column);
    const float g0 = base0 + g[i][0], g1 = base1 + g[i][1];
    const float after0 = exp2_fast(g0), after1 = exp2_fast(g1), inverse0 = exp2_fast(-g0), inverse1 = exp2_fast(-g1);
    auto scaled = [&](int name, float scale0, float scale1) {
      word(stage, name, t, column) = pack(low_half(words[i][name]) * scale0, high_half(words[i][name]) * scale1);
    };
    scaled(kA, before0, before1);
    scaled(kR, after0, after1);
    scaled(kB, inverse0, inverse1);
    scaled(kK, inverse0, inverse1);
    if (remains != nullptr) *reinterpret_cast<Floats*>(remains + t * kSize + column) = {after0, after1};
    before0 = after0;
    before1 = after1;
  }
  if (end != nullptr && warp == warps - 1) *reinterpret_cast<Floats*>(end + column) = {before0, before1};
}

// Of this warp's 16 rows of M or dM, zero what they must not see: an a-row sees earlier tokens, an r-row its `own` as well.
template <int groups = 4>
__device__ __forceinline__ void mask_rows(Thread me, Fragment* rows, bool own) {
  const int row = me.lane / 4 + own, column = me.lane % 4 * 2;
  const uint32_t late = me.warp % 2 ? ~0u : 0;  // tokens from 16 on see all blocks of those before
  const uint32_t diagonal = (column < row ? 0xffffu : 0) | (column + 1 < row ? 0xffff0000u : 0);
#pragma unroll
  for (int group = 0; group < groups; group++) {
    const uint32_t seen = group % 2 ? diagonal & late : diagonal | late;
    rows[group][0] &= seen;
    rows[group][3] &= seen;
    if (group % 2) {
      rows[group][1] &= late;
      rows[group][2] = 0;
    } else {
      rows[group][2] &= late;
    }
  }
}

// Invert I - A for the two 8 x 8 strictly lower blocks A that are this warp's, by substitution in fp32, a lane for each column;
// `a` holds them by columns, and anything above their diagonals. The inverses go to `m` by columns.
__device__ __forceinline__ void invert(Thread me, Tile m, const float* a) {
  const int second = me.lane / 8 % 2, column = me.lane % 8, first = 16 * me.warp + 8 * second;
  a += (2 * me.warp + second) * kBlock;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int k = 0; k < 7; k++) {
#pragma unroll
    for (int i = k + 1; i < 8; i++) x[i] += a[kPitch * k + i] * x[k];
  }
  if (me.lane < 16) {
    *reinterpret_cast<Piece*>(m + place(first + column, first)) = {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]),
                                                                   pack(x[6], x[7])};
  }
}

// This warp's 16 rows of left right^T, 16 groups columns from `first` on, masked, to M as far as they are not zero; the blocks
// that are to be inverted, in the columns from 0 on, go to `scratch` (4 kBlock floats), by columns.
template <int groups>
__device__ __forceinline__ void store_attention(Thread me, Tile m, const Accumulator* c, float* scratch, int first) {
  const int warp = me.warp, late = warp % 2;
  Fragment rows[groups];
#pragma unroll
  for (int group = 0; group < groups; group++) as_operand(rows[group], c + 2 * group);
  mask_rows<groups>(me, rows, warp >= 2);
#pragma unroll
  for (int group = 0; group < groups; group++) {
    if (group % 2 <= late) store_operand(me, m, 16 * warp, first + 16 * group, rows[group]);
  }
  if (warp < 2 && first == 0) {
    float* const block = scratch + 2 * warp * kBlock + me.lane % 4 * 2 * kPitch + me.lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      block[i / 2 * kBlock + i % 2 * kPitch] = late ? c[2 + i / 2][i / 2 * 2 + i % 2] : c[i / 2][i / 2 * 2 + i % 2];
    }
  }
}

// u^T = z^T J^T with z in four accumulators, or x^T = z^T J; the result as two A operands. 8 columns after another are multiplied
// by their inverse, and what they add to the others is added.
template <bool transposed>
__device__ __forceinline__ void solve(Thread me, Fragment* u, Accumulator* z, Tile m) {
  Fragment inverses, below[3];  // on M's diagonal, and below[j][i] of rows 8 i and columns 8 j
  const auto blocks = [&](int j) { return m + me.lane * 128 + (j ^ me.lane % 8) * 16; };
  if (transposed) {
    load_matrices(inverses, blocks(me.lane / 8));
  } else {
    load_matrices_transposed(inverses, blocks(me.lane / 8));
  }
#pragma unroll
  for (int j = 0; j < 3; j++) {
    if (transposed) {
      load_matrices_transposed(below[j], blocks(j));
    } else {
      load_matrices(below[j], blocks(j));
    }
  }
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const int j = transposed ? 3 - step : step;
    uint32_t* const word = u[j / 2] + j % 2 * 2;
    Accumulator c = {};
    multiply_add(c, pack(z[j][0], z[j][1]), pack(z[j][2], z[j][3]), inverses[j]);
    word[0] = pack(c[0], c[1]);
    word[1] = pack(c[2], c[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (transposed ? i < j : i > j) multiply_add(z[i], word[0], word[1], transposed ? below[i][j] : below[j][i]);
    }
  }
}

// Rows 16 warp .. of `columns` columns of a state (`size` x `size`) in global memory; null is zero.
template <int size = kSize, int columns = size>
__device__ __forceinline__ void load_state(Thread me, Accumulator* c, const float* state) {
#pragma unroll
  for (int i = 0; i < columns / 4; i++) {
    const int row = 16 * me.warp + me.lane / 4 + i % 2 * 8, column = i / 2 * 8 + me.lane % 4 * 2;
    Floats x = {0.0f, 0.0f};
    if (state != nullptr) x = *reinterpret_cast<const Floats*>(state + row * size + column);
    c[i / 2][i % 2 * 2] = x.first;
    c[i / 2][i % 2 * 2 + 1] = x.second;
  }
}
template <int size = kSize, int columns = size>
__device__ __forceinline__ void store_state(Thread me, float* state, const Accumulator* c) {
#pragma unroll
  for (int i = 0; i < columns / 4; i++) {
    const int row = 16 * me.warp + me.lane / 4 + i % 2 * 8, column = i / 2 * 8 + me.lane % 4 * 2;
    *reinterpret_cast<Floats*>(state + row * size + column) = {c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]};
  }
}

// Four accumulators that hold (values, tokens), as (tokens, values) to this warp's columns of a tile.
__device__ __forceinline__ void turn_tokens(Thread me, Tile tile, const Accumulator* c) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    Fragment f;
    as_operand(f, c + 2 * i);
    store_operand_transposed(me, tile, 16 * i, 16 * me.warp, f);
  }
}

// A state is saved as the four operands that its rows are to each warp; this lane's part of one.
template <typename T>
__device__ __forceinline__ Piece& saved_piece(Thread me, T* state, int k) {
  return reinterpret_cast<Piece*>(state)[(4 * me.warp + k) * 32 + me.lane];
}
__device__ __forceinline__ void load_saved(Thread me, Fragment& f, Tile state, int k) {
  const Piece piece = saved_piece(me, state, k);
#pragma unroll
  for (int i = 0; i < 4; i++) f[i] = piece.words[i];
}

// 16 x 64 of an accumulator to fp32 cells.
__device__ __forceinline__ void store_cells(Thread me, float* cells, const Accumulator* c) {
  cells += (16 * (me.warp % 2) + me.lane / 4) * kCellPitch + me.lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    *reinterpret_cast<Floats*>(cells + 8 * i) = {c[i][0], c[i][1]};
    *reinterpret_cast<Floats*>(cells + 8 * kCellPitch + 8 * i) = {c[i][2], c[i][3]};
  }
}

// A lane keeps half of its 2 * width sums and adds those that its partner has for it.
template <int width>
__device__ __forceinline__ void halve(Thread me, float (&sums)[16]) {
  const bool upper = me.lane & 2 * width;
#pragma unroll
  for (int i = 0; i < width; i++) {
    const float other = exchange(upper ? sums[i] : sums[i + width], 2 * width);
    sums[i] = (upper ? sums[i + width] : sums[i]) + other;
  }
}

// Sums over this warp's 16 rows of state * d_state, one column pair a lane: column 8 (lane / 4) + 2 (lane % 4).
__device__ __forceinline__ Floats sum_rows(Thread me, Tile state, const Accumulator* d_state) {
  float sums[16];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    Fragment f;
    load_a(me, f, state, 16 * me.warp, 16 * k);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float* const d = d_state[2 * k + i];
      sums[4 * k + 2 * i] = low_half(f[2 * i]) * d[0] + low_half(f[2 * i + 1]) * d[2];
      sums[4 * k + 2 * i + 1] = high_half(f[2 * i]) * d[1] + high_half(f[2 * i + 1]) * d[3];
    }
  }
  halve<8>(me, sums);
  halve<4>(me, sums);
  halve<2>(me, sums);
  return {sums[0], sums[1]};
}

// The last step of a backward chunk, for 64 columns by eight warps: gradients of the scaled vectors, `cells` by input, are scaled
// and go to the outputs from where the inputs were, that of v from `of_v`; the block meets once. The decay's:
// dg_t = D_{t-1} - alpha_t, D_t = dg_t + beta_t + kappa_t - rho_t, from D_0 = sum of state * d_state, here `start_warps` sums of
// 64. `sums` is scratch of 8 x 64. `first_output`: elements of an output before the sequence's first.
template <int start_warps>
__device__ __forceinline__ void finish_gradients(const Wkv7sProblem& p, int warp, int lane, Tile stage, Tile of_v,
                                                 const float* remains, const float* const (&cells)[4], float* sums,
                                                 const float* start_sums, int64_t first_output, int output_step, int start,
                                                 int valid) {
  constexpr int tokens = kChunk / 8;
  const int column = 2 * lane;
  Floats gradients[tokens][4], scales[tokens + 1] = {{1.0f, 1.0f}}, slopes[tokens];
  uint32_t words[tokens][4];
  if (warp > 0) scales[0] = *reinterpret_cast<const Floats*>(remains + (tokens * warp - 1) * kSize + column);
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const int t = tokens * warp + i;
    scales[i + 1] = *reinterpret_cast<const Floats*>(remains + t * kSize + column);
    for (int name = kA; name <= kK; name++) {
      gradients[i][name] = *reinterpret_cast<const Floats*>(cells[name] + t * kCellPitch + column);
      words[i][name] = word(stage, name, t, column);
    }
    const uint32_t w = word(stage, kW, t, column);
    const float s0 = sigmoid(low_half(w)), s1 = sigmoid(high_half(w));
    slopes[i] = {-kDecayScale * s0 * (1.0f - s0), -kDecayScale * s1 * (1.0f - s1)};
  }
  float alphas[tokens][2], rises[tokens][2], sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const Floats before = scales[i], after = scales[i + 1];
    const Floats inverse = {reciprocal_fast(after.first), reciprocal_fast(after.second)};
    // The gradient of one input takes the place of the input; the result is their product, both still scaled.
    auto finish = [&](int name, Floats scale) -> Floats {
      const Floats x = gradients[i][name];
      word(stage, name, tokens * warp + i, column) = pack(x.first * scale.first, x.second * scale.second);
      return {x.first * low_half(words[i][name]), x.second * high_half(words[i][name])};
    };
    const Floats of_alpha = finish(kA, before), of_rho = finish(kR, after);
    const Floats of_beta = finish(kB, inverse), of_kappa = finish(kK, inverse);
    alphas[i][0] = of_alpha.first;
    alphas[i][1] = of_alpha.second;
    rises[i][0] = of_beta.first + (of_kappa.first - of_rho.first);
    rises[i][1] = of_beta.second + (of_kappa.second - of_rho.second);
    sum0 += rises[i][0] - alphas[i][0];
    sum1 += rises[i][1] - alphas[i][1];
  }
  auto store_rows = [&](Tile tile, void* out) {  // this warp's tokens
    const int row = tokens * warp + lane / 8, piece = lane % 8 * 8;
    const int64_t element = first_output + int64_t(start + row) * output_step + piece;
    store_if(row < valid, static_cast<bfloat16*>(out) + element,
             *reinterpret_cast<const Piece*>(tile + place(row, piece)));
  };
  __syncwarp();
  store_rows(stage + kA * kTile, p.da);
  store_rows(stage + kR * kTile, p.dr);
  store_rows(stage + kB * kTile, p.db);
  store_rows(stage + kK * kTile, p.dk);
  store_rows(of_v, p.dv);
  *reinterpret_cast<Floats*>(sums + warp * kSize + column) = {sum0, sum1};
  if (start_warps > 4) show_to_warpgroups();  // a state is copied to where cells were
  __syncthreads();
  float dg0 = 0.0f, dg1 = 0.0f;
#pragma unroll
  for (int i = 0; i < start_warps; i++) {
    const Floats at_start = *reinterpret_cast<const Floats*>(start_sums + i * kSize + column);
    dg0 += at_start.first;
    dg1 += at_start.second;
  }
#pragma unroll
  for (int i = 0; i < 7; i++) {
    const Floats earlier = *reinterpret_cast<const Floats*>(sums + i * kSize + column);
    if (i < warp) dg0 += earlier.first, dg1 += earlier.second;
  }
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const int t = tokens * warp + i;
    dg0 -= alphas[i][0];
    dg1 -= alphas[i][1];
    word(stage, kW, t, column) = pack(slopes[i].first * dg0, slopes[i].second * dg1);
    dg0 += rises[i][0];
    dg1 += rises[i][1];
  }
  __syncwarp();
  store_rows(stage + kW * kTile, p.dw);
}

}  // namespace tensor_core
