// The kernel of matvec as a library for a CPU.
#include "single_token.h"

#define __shared__ static

template <typename Piece> Piece streamed(const Piece* from) { return *from; }

#include "../../../heron/ops/matvec/csrc/matvec.cu"

// Of n products, each as Product has it but for `first_block`; `stride` in elements. Weights with scales are codes.
extern "C" const char* matvec_emulated(int in_bf16, int n, const void** xs, const void** weights, const uint16_t** scales,
                                       const void** levels, const void** factors, const void** adds, void** ys,
                                       const int64_t* strides, const int* ins, const int* outs, const int* activations) {
  Products products{};
  int blocks = 0, longest = 0;
  for (; products.n < n; products.n++) {
    const int i = products.n;
    const int warps = warps_of(int64_t(ins[i]) * (levels[i] ? 1 : scales[i] ? 2 : in_bf16 ? 4 : 8) / 2);
    products.of[i] = {xs[i],   weights[i], factors[i], adds[i], scales[i],      levels[i], ys[i],
                      strides[i], ins[i],  outs[i],    activations[i], warps, blocks};
    blocks += blocks_of(outs[i], warps);
    longest = ins[i] > longest ? ins[i] : longest;
  }
  return launch<Products>(in_bf16 ? matvec<Brain> : matvec<float>, dim3(blocks), 32 * kWarps, 4 * longest, nullptr, products);
}
