// What kernels of products read and what they do to a sum. The tests also compile it for a CPU.
#pragma once

namespace {

// 16 bytes, which are taken apart only where they are used: they wait in fewer registers.
struct alignas(16) Piece {
    unsigned words[4];
};

#ifdef __CUDACC__
// Read once: it is the first to leave the caches.
__device__ __forceinline__ Piece streamed(const Piece* from) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{bits.x, bits.y, bits.z, bits.w}};
}
#endif

enum Activation { kNone, kTanh, kSigmoid, kSquaredRelu };

__device__ __forceinline__ float activated(float x, int activation) {
    if (activation == kTanh) return tanhf(x);
    if (activation == kSigmoid) return 1.0f / (1.0f + expf(-x));
    if (activation == kSquaredRelu) return x > 0.0f ? x * x : x * 0.0f;  // NaN stays NaN
    return x;
}

}  // namespace
