// The general kernels: fp32 arithmetic on any GPU, for fp32, bf16 and fp16 inputs and every head size. One block runs one
// head of one sequence, chunk after chunk, with all tiles in shared memory; README.md has the algebra. The names are
// those of chunked.py: `left` stacks a and r, `right` b and k, `uv` u and v, `x` the gradients of u's bracket and of y.
#pragma once

#include "sequence.cuh"

namespace general {

constexpr int kChunk = 16;

template <int size>
struct Tiles {
  static constexpr int kThreads = size >= 64 ? 256 : 128;
  static constexpr int kPitch = size + 1;  // rows and columns are both read without bank conflicts
  float left[2 * kChunk][kPitch], right[2 * kChunk][kPitch], uv[2 * kChunk][kPitch], x[2 * kChunk][kPitch];
  float state[size][kPitch];  // the state, or in the backward its gradient
  float log_decay[kChunk + 1][size];  // summed from the start of the chunk; row 0 is 0
  float m[2 * kChunk][2 * kChunk + 1];
};

template <int size>
struct BackwardTiles : Tiles<size> {
  float dm[2 * kChunk][2 * kChunk + 1];
  float alpha[kChunk][size + 1], h[kChunk][size + 1];
};

// One number of an input, and of a (B, T, H, N) output. The dtype is a branch, not a template: the kernels are bound by
// arithmetic, and there are a third as many to compile.
__device__ __forceinline__ float read(const Wkv7sProblem& p, Wkv7sName name, const Sequence& sequence, int t, int n) {
  const Wkv7sInput& x = p.inputs[name];
  if (p.dtype == kWkv7sFloat32) return token_of<float>(x, sequence, t)[n];
  if (p.dtype == kWkv7sBFloat16) return to_float(token_of<bfloat16>(x, sequence, t)[n]);
  return to_float(token_of<float16>(x, sequence, t)[n]);
}
__device__ __forceinline__ void write(void* out, const Wkv7sProblem& p, const Sequence& sequence, int t, int n, float x) {
  if (p.dtype == kWkv7sFloat32) {
    token_of<float>(out, p, sequence, t)[n] = x;
  } else if (p.dtype == kWkv7sBFloat16) {
    token_of<bfloat16>(out, p, sequence, t)[n] = from_float<bfloat16>(x);
  } else {
    token_of<float16>(out, p, sequence, t)[n] = from_float<float16>(x);
  }
}

// store(i, j, sum over k of a(i, k) * b(k, j)) for all i < rows, j < columns.
template <int threads, int rows, int columns, int depth, typename A, typename B, typename Store>
__device__ __forceinline__ void product(A a, B b, Store store) {
  constexpr int kRows = rows >= 4 ? 4 : rows, kColumns = columns % 4 == 0 ? 2 : 1;
  for (int item = threadIdx.x; item < rows / kRows * (columns / kColumns); item += threads) {
    const int j0 = item % (columns / kColumns), i0 = item / (columns / kColumns) * kRows;
    float sums[kRows][kColumns] = {};
#pragma unroll 8
    for (int k = 0; k < depth; k++) {
      float as[kRows], bs[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; i++) as[i] = a(i0 + i, k);
#pragma unroll
      for (int j = 0; j < kColumns; j++) bs[j] = b(k, j0 + j * (columns / kColumns));
#pragma unroll
      for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int j = 0; j < kColumns; j++) sums[i][j] += as[i] * bs[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
      for (int j = 0; j < kColumns; j++) store(i0 + i, j0 + j * (columns / kColumns), sums[i][j]);
    }
  }
}

// left, right, v and the summed log decays of a chunk; rows from `valid` on are zero and decay nothing.
template <int size>
__device__ void load_chunk(Tiles<size>& s, const Wkv7sProblem& p, const Sequence& sequence, int start, int valid) {
  for (int n = threadIdx.x; n < size; n += Tiles<size>::kThreads) {
    float sum = 0.0f;
    s.log_decay[0][n] = 0.0f;
#pragma unroll 2
    for (int t = 0; t < kChunk; t++) {
      float a = 0, r = 0, b = 0, k = 0, v = 0, log_decay = 0;
      if (t < valid) {
        a = read(p, kA, sequence, start + t, n);
        r = read(p, kR, sequence, start + t, n);
        b = read(p, kB, sequence, start + t, n);
        k = read(p, kK, sequence, start + t, n);
        v = read(p, kV, sequence, start + t, n);
        log_decay = -kDecayScale / (1.0f + expf(-read(p, kW, sequence, start + t, n)));
      }
      s.left[t][n] = a * expf(sum);
      sum += log_decay;
      const float remains = expf(sum), inverse = expf(-sum);
      s.left[kChunk + t][n] = r * remains;
      s.right[t][n] = b * inverse;
      s.right[kChunk + t][n] = k * inverse;
      s.uv[kChunk + t][n] = v;
      s.log_decay[t + 1][n] = sum;
    }
  }
}

// M = mask(left right^T): an a-row sees earlier tokens, an r-row its own as well.
template <int size>
__device__ void attend(Tiles<size>& s) {
  product<Tiles<size>::kThreads, 2 * kChunk, 2 * kChunk, size>(
      [&](int i, int k) { return s.left[i][k]; }, [&](int k, int j) { return s.right[j][k]; },
      [&](int i, int j, float sum) {
        const int t = i % kChunk, earlier = j % kChunk;
        s.m[i][j] = earlier < t || (earlier == t && i >= kChunk) ? sum : 0.0f;
      });
}

// u, from the bracket that (I - A_ab)^-1 multiplies.
template <int size>
__device__ void substitute_forward(Tiles<size>& s) {
  for (int n = threadIdx.x; n < size; n += Tiles<size>::kThreads) {
    float u[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; t++) {
      u[t] = s.uv[t][n];
#pragma unroll
      for (int i = 0; i < t; i++) u[t] += s.m[t][i] * u[i];
      s.uv[t][n] = u[t];
    }
  }
}

template <int size>
__device__ void substitute_backward(Tiles<size>& s) {
  for (int n = threadIdx.x; n < size; n += Tiles<size>::kThreads) {
    float x[kChunk];
#pragma unroll
    for (int t = kChunk - 1; t >= 0; t--) {
      x[t] = s.x[t][n];
#pragma unroll
      for (int i = t + 1; i < kChunk; i++) x[t] += s.m[i][t] * x[i];
      s.x[t][n] = x[t];
    }
  }
}

template <int size>
__device__ void load_state(Tiles<size>& s, const float* from) {
  for (int i = threadIdx.x; i < size * size; i += Tiles<size>::kThreads) {
    s.state[i / size][i % size] = from == nullptr ? 0.0f : from[i];
  }
}

template <int size>
__device__ void store_state(const Tiles<size>& s, float* to) {
  for (int i = threadIdx.x; i < size * size; i += Tiles<size>::kThreads) to[i] = s.state[i / size][i % size];
}

template <int size>
__global__ void __launch_bounds__(Tiles<size>::kThreads, 2) forward(const __grid_constant__ Wkv7sProblem p) {
  constexpr int threads = Tiles<size>::kThreads;
  Tiles<size>& s = *reinterpret_cast<Tiles<size>*>(shared_memory());
  const Sequence sequence = find_sequence<kChunk>(p);
  load_state(s, state_of(p.state, p, sequence.index, sequence.head));
  for (int start = 0; start < sequence.length; start += kChunk) {
    const int valid = sequence.length - start < kChunk ? sequence.length - start : kChunk;
    load_chunk<size>(s, p, sequence, start, valid);
    __syncthreads();
    if (p.saved != nullptr) {
      store_state(s, state_of(static_cast<float*>(p.saved), p, sequence.slot + start / kChunk, sequence.head));
    }
    attend(s);
    __syncthreads();
    product<threads, 2 * kChunk, size, size>(
        [&](int i, int k) { return s.left[i][k]; }, [&](int k, int j) { return s.state[j][k]; },
        [&](int i, int j, float sum) {
#pragma unroll
          for (int k = 0; k < kChunk; k++) sum += s.m[i][kChunk + k] * s.uv[kChunk + k][j];
          (i < kChunk ? s.uv[i][j] : s.x[i][j]) = sum;
        });
    __syncthreads();
    substitute_forward(s);
    __syncthreads();
    product<threads, kChunk, size, kChunk>(
        [&](int i, int k) { return s.m[kChunk + i][k]; }, [&](int k, int j) { return s.uv[k][j]; },
        [&](int i, int j, float sum) {
          if (i < valid) write(p.y, p, sequence, start + i, j, s.x[kChunk + i][j] + sum);
        });
    product<threads, size, size, 2 * kChunk>(
        [&](int i, int k) { return s.uv[k][i]; }, [&](int k, int j) { return s.right[k][j]; },
        [&](int i, int j, float sum) { s.state[i][j] = (s.state[i][j] + sum) * expf(s.log_decay[kChunk][j]); });
    __syncthreads();
  }
  store_state(s, state_of(p.final_state, p, sequence.index, sequence.head));
}

template <int size>
__global__ void __launch_bounds__(Tiles<size>::kThreads, 1) backward(const __grid_constant__ Wkv7sProblem p) {
  constexpr int threads = Tiles<size>::kThreads;
  BackwardTiles<size>& s = *reinterpret_cast<BackwardTiles<size>*>(shared_memory());
  const Sequence sequence = find_sequence<kChunk>(p);
  load_state(s, p.d_final == nullptr ? nullptr : state_of(p.d_final, p, sequence.index, sequence.head));
  for (int start = (sequence.length - 1) / kChunk * kChunk; start >= 0 && sequence.length > 0; start -= kChunk) {
    const int valid = sequence.length - start < kChunk ? sequence.length - start : kChunk;
    const float* state =
        state_of(static_cast<const float*>(p.saved), p, sequence.slot + start / kChunk, sequence.head);
    load_chunk<size>(s, p, sequence, start, valid);
    for (int i = threadIdx.x; i < kChunk * size; i += threads) {
      const int t = i / size;
      const bool there = t < valid && p.inputs[kDy].data != nullptr;
      s.x[kChunk + t][i % size] = there ? read(p, kDy, sequence, start + t, i % size) : 0.0f;
    }
    __syncthreads();
    attend(s);
    for (int i = threadIdx.x; i < size * size; i += threads) {
      s.state[i / size][i % size] *= expf(s.log_decay[kChunk][i % size]);
    }
    __syncthreads();
    product<threads, kChunk, size, size>(
        [&](int i, int k) { return s.left[i][k]; }, [&](int k, int j) { return state[j * size + k]; },
        [&](int i, int j, float sum) {
#pragma unroll
          for (int k = 0; k < kChunk; k++) sum += s.m[i][kChunk + k] * s.uv[kChunk + k][j];
          s.uv[i][j] = sum;
        });
    product<threads, kChunk, size, size>(
        [&](int i, int k) { return s.right[i][k]; }, [&](int k, int j) { return s.state[j][k]; },
        [&](int i, int j, float sum) {
#pragma unroll
          for (int k = 0; k < kChunk; k++) sum += s.m[kChunk + k][i] * s.x[kChunk + k][j];
          s.x[i][j] = sum;
        });
    __syncthreads();
    substitute_forward(s);
    substitute_backward(s);
    __syncthreads();
    product<threads, kChunk, size, size>(
        [&](int i, int k) { return s.right[kChunk + i][k]; }, [&](int k, int j) { return s.state[j][k]; },
        [&](int i, int j, float sum) {
#pragma unroll
          for (int k = 0; k < 2 * kChunk; k++) sum += s.m[k][kChunk + i] * s.x[k][j];
          if (i < valid) write(p.dv, p, sequence, start + i, j, sum);
        });
    product<threads, 2 * kChunk, 2 * kChunk, size>(
        [&](int i, int k) { return s.x[i][k]; }, [&](int k, int j) { return s.uv[j][k]; },
        [&](int i, int j, float sum) {
          const int t = i % kChunk, earlier = j % kChunk;
          s.dm[i][j] = earlier < t || (earlier == t && i >= kChunk) ? sum : 0.0f;
        });
    __syncthreads();
    // The gradients of a scaled row and column share a thread, so that h needs no sum across threads.
    for (int i = threadIdx.x; i < kChunk * size; i += threads) {
      const int t = i / size, n = i % size;
      float da = 0, dr = 0, db = 0, dk = 0;
#pragma unroll 8
      for (int j = 0; j < 2 * kChunk; j++) {
        da += s.dm[t][j] * s.right[j][n];
        dr += s.dm[kChunk + t][j] * s.right[j][n];
        db += s.dm[j][t] * s.left[j][n];
        dk += s.dm[j][kChunk + t] * s.left[j][n];
      }
#pragma unroll 8
      for (int v = 0; v < size; v++) {
        da += s.x[t][v] * state[v * size + n];
        dr += s.x[kChunk + t][v] * state[v * size + n];
        db += s.uv[t][v] * s.state[v][n];
        dk += s.uv[kChunk + t][v] * s.state[v][n];
      }
      s.alpha[t][n] = da * s.left[t][n];
      s.h[t][n] = db * s.right[t][n] + dk * s.right[kChunk + t][n] - dr * s.left[kChunk + t][n];
      if (t < valid) {
        const float before = expf(s.log_decay[t][n]), after = expf(s.log_decay[t + 1][n]);
        write(p.da, p, sequence, start + t, n, da * before);
        write(p.dr, p, sequence, start + t, n, dr * after);
        write(p.db, p, sequence, start + t, n, db / after);
        write(p.dk, p, sequence, start + t, n, dk / after);
      }
    }
    __syncthreads();
    product<threads, size, size, 2 * kChunk>(
        [&](int i, int k) { return s.x[k][i]; }, [&](int k, int j) { return s.left[k][j]; },
        [&](int i, int j, float sum) { s.state[i][j] += sum; });
    __syncthreads();
    for (int n = threadIdx.x; n < size; n += threads) {
      float dg = 0.0f;
#pragma unroll 8
      for (int v = 0; v < size; v++) dg += state[v * size + n] * s.state[v][n];
#pragma unroll
      for (int t = 0; t < kChunk; t++) {
        dg -= s.alpha[t][n];
        if (t < valid) {
          const float w = read(p, kW, sequence, start + t, n);
          const float slope = -kDecayScale / ((1.0f + expf(-w)) * (1.0f + expf(w)));
          write(p.dw, p, sequence, start + t, n, dg * slope);
        }
        dg += s.h[t][n];
      }
    }
    __syncthreads();
  }
  store_state(s, state_of(p.d_state, p, sequence.index, sequence.head));
}

struct alignas(16) Quad { float values[4]; };

// Rows of states for which a multiprocessor has registers; what the compilers make of it without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kStepRows = 192;
#else
constexpr int kStepRows = 256;
#endif

// One or a few tokens, no gradient: the state stays in registers, each row of it in four lanes.
template <int size>
__global__ void __launch_bounds__(4 * size, size == 128 ? 1 : kStepRows / size) step(const __grid_constant__ Wkv7sProblem p) {
  constexpr int kKeys = size / 4;
  const Sequence sequence = find_sequence<kChunk>(p);
  const int row = int(threadIdx.x) / 4, lane = int(threadIdx.x) % 4;
  float(&vectors)[5][size] = *reinterpret_cast<float(*)[5][size]>(shared_memory());  // r, decay, k, a, b
  const float* from = state_of(p.state, p, sequence.index, sequence.head) + row * size;
  // A lane has every fourth run of four keys.
  auto key = [=](int i) { return 16 * (i / 4) + 4 * lane + i % 4; };
  alignas(16) float state[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; i += 4) *reinterpret_cast<Quad*>(state + i) = *reinterpret_cast<const Quad*>(from + key(i));
  for (int t = 0; t < sequence.length; t++) {
    __syncthreads();
    for (int n = threadIdx.x; n < size; n += 4 * size) {
      vectors[0][n] = read(p, kR, sequence, t, n);
      vectors[1][n] = expf(-kDecayScale / (1.0f + expf(-read(p, kW, sequence, t, n))));
      vectors[2][n] = read(p, kK, sequence, t, n);
      vectors[3][n] = read(p, kA, sequence, t, n);
      vectors[4][n] = read(p, kB, sequence, t, n);
    }
    const float v = read(p, kV, sequence, t, row);
    __syncthreads();
    float sa = 0.0f, y = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; i++) sa += state[i] * vectors[3][key(i)];
    sa += exchange(sa, 1);
    sa += exchange(sa, 2);
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
      const int n = key(i);
      state[i] = state[i] * vectors[1][n] + sa * vectors[4][n] + v * vectors[2][n];
      y += state[i] * vectors[0][n];
    }
    y += exchange(y, 1);
    y += exchange(y, 2);
    if (lane == 0) write(p.y, p, sequence, t, row, y);
  }
  float* to = state_of(p.final_state, p, sequence.index, sequence.head) + row * size;
#pragma unroll
  for (int i = 0; i < kKeys; i += 4) *reinterpret_cast<Quad*>(to + key(i)) = *reinterpret_cast<const Quad*>(state + i);
}

template <int size>
const char* run_size(const Wkv7sProblem& p, int which, void* stream) {
  const dim3 grid(p.sequences * p.heads);
  constexpr int threads = Tiles<size>::kThreads;
  if (which == 0) return launch(forward<size>, grid, threads, int(sizeof(Tiles<size>)), stream, p);
  if (which == 1) return launch(backward<size>, grid, threads, int(sizeof(BackwardTiles<size>)), stream, p);
  return launch(step<size>, grid, 4 * size, int(5 * size * sizeof(float)), stream, p);
}

const char* run(const Wkv7sProblem& p, int which, void* stream) {
  if (p.segments != 1) return "the general kernels take whole sequences";
  if (p.size == 16) return run_size<16>(p, which, stream);
  if (p.size == 32) return run_size<32>(p, which, stream);
  if (p.size == 64) return run_size<64>(p, which, stream);
  if (p.size == 128) return run_size<128>(p, which, stream);
  return "the head size must be 16, 32, 64 or 128";
}

}  // namespace general
