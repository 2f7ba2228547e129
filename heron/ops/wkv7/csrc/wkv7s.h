// WKV7 with state: the one interface between the kernels (wkv7s.cu) and those who call them (wkv7s_op.cpp, the tests).
#pragma once

#include <stdint.h>

enum Wkv7sDtype { kWkv7sFloat32 = 0, kWkv7sBFloat16 = 1, kWkv7sFloat16 = 2 };

// The order in which a chunk of them lies in shared memory.
enum Wkv7sName { kA, kR, kB, kK, kV, kW, kDy };

// A (B, T, H, N) tensor whose last dimension is contiguous; strides in elements, rows 16-byte aligned.
struct Wkv7sInput {
  const void* data;  // null: zeros
  int64_t batch, token, head;
};

// B, T, H, N as in heron.ops.wkv7. What is written, and every state, is contiguous. A sequence is a row of the batch,
// a packed sequence, or a segment of a row.
struct Wkv7sProblem {
  struct Wkv7sInput inputs[7];  // by Wkv7sName
  const void* cu_seqlens;  // (sequences + 1,) or null
  const float* state;      // (sequences, H, N, N)
  const float* d_final;    // (sequences, H, N, N) or null
  void* y;                 // (B, T, H, N), or null: the forward gives transfer and local alone
  float* final_state;      // (sequences, H, N, N)
  void* saved;             // the state before each chunk (slots, H, N, N), or null: no backward will come
  void *dr, *dw, *dk, *dv, *da, *db;  // (B, T, H, N), or null: the backward gives local alone
  float* d_state;                     // (sequences, H, N, N)
  // With segments > 1, or where nothing else is wanted: (B * segments, H, N, N). Over a segment, S_out = S_in P + C.
  float* transfer;  // P: written by the forward, read by the backward
  float* local;     // C, or the gradient of S_in as far as it comes from the segment's own y
  float* edges;     // S_in, or the gradient of S_out
  int64_t tokens;
  int32_t batch, heads, size, dtype;
  int32_t sequences;
  int32_t cu_seqlens_is_int64;
  int32_t tensor_cores;     // 1: chunks of 32 and a bf16 `saved`; 0: chunks of 16 and an fp32 one
  int32_t segments;         // of each row, run side by side; 1 with cu_seqlens
  int32_t segment_tokens;   // a multiple of 32
  int32_t mapped;           // 1: transfer and local of every segment are there already
};

// Each queues its kernels on `stream` of the current device and returns null, or what went wrong in words.
#ifdef __cplusplus
extern "C" {
#endif
const char* wkv7s_forward(const struct Wkv7sProblem* problem, void* stream);
const char* wkv7s_backward(const struct Wkv7sProblem* problem, void* stream);
const char* wkv7s_step(const struct Wkv7sProblem* problem, void* stream);
#ifdef __cplusplus
}
#endif
