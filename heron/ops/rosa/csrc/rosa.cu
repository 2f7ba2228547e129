// ROSA on a GPU: one warp for up to 1024 diagonals d = i - j of one stream, 32 lanes of M diagonals each.
//
// Along a diagonal the length of the common suffix of q[0..i] and k[0..i-d] is one more than at i - 1 where the symbols are
// equal, else 0: it stays in a register. Length and d make one number, (length << 16) + (65535 - d), whose maximum over all
// d is the longest match and, of those, the latest. Streams of more than 1025 tokens take several warps, which meet in
// an atomic maximum. T^2 / 2 cells a stream, about 7 instructions each.

#include "../../csrc/operator.h"

namespace {

constexpr int kWarps = 4;  // of a block; they share nothing

template <int M>
__global__ void __launch_bounds__(32 * kWarps)
match(const int32_t* __restrict__ q, const int32_t* __restrict__ k, int64_t streams, int tokens, int longest, int bands,
      uint32_t* __restrict__ best) {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (warp >= streams * bands) return;
    const int64_t stream = warp / bands;
    const int nearest = 1 + static_cast<int>(warp % bands) * 32 * M;  // the band's smallest d
    const int d = nearest + threadIdx.x % 32;                         // this lane's: d, d + 32, d + 64, ...
    q += stream * tokens;
    k += stream * tokens;
    best += stream * tokens;

    uint32_t length[M];
#pragma unroll
    for (int m = 0; m < M; ++m) length[m] = 0;

    for (int i = nearest; i < tokens; ++i) {
        const int32_t symbol = q[i];
        uint32_t found = 0;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const int j = i - d - 32 * m;
            if (j >= 0) {
                length[m] = k[j] == symbol ? length[m] + 1 : 0;
                const uint32_t counted = min(length[m], static_cast<uint32_t>(longest));
                found = max(found, (counted << 16) + (65535u - d - 32 * m));
            }
        }
        found = __reduce_max_sync(0xffffffffu, found);
        if (threadIdx.x % 32 == 0) {
            if (bands == 1)
                best[i] = found;
            else
                atomicMax(best + i, found);
        }
    }
}

__global__ void take_apart(const uint32_t* __restrict__ best, int64_t cells, int tokens, int64_t* __restrict__ src,
                           int64_t* __restrict__ length) {
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (cell >= cells) return;
    const uint32_t found = best[cell];
    const int64_t n = found >> 16;
    length[cell] = n;
    src[cell] = n ? cell % tokens - (65535 - static_cast<int64_t>(found & 65535u)) : -1;
}

// q, k: (S, T) int32, contiguous, 1 <= T <= 65535; longest >= 1.
std::tuple<Tensor, Tensor> rosa(const Tensor& q, const Tensor& k, int64_t longest) {
    const DeviceGuard guard(q.get_device_index());
    const auto stream = current_stream();
    const int64_t streams = q.size(0);
    const int tokens = static_cast<int>(q.size(1));
    const int most = static_cast<int>(std::min<int64_t>(longest, tokens));
    auto best = zeros({streams, tokens}, q);
    auto src = empty({streams, tokens}, q, ScalarType::Long);
    auto length = empty_like(src);
    auto* cells = reinterpret_cast<uint32_t*>(best.mutable_data_ptr<int32_t>());

    const auto launch = [&](auto kernel, int diagonals) {
        const int bands = std::max(1, (tokens - 1 + diagonals - 1) / diagonals);
        const int64_t blocks = (streams * bands + kWarps - 1) / kWarps;
        kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(
            q.mutable_data_ptr<int32_t>(), k.mutable_data_ptr<int32_t>(), streams, tokens, most, bands, cells);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (tokens <= 32 * 4 + 1)
        launch(match<4>, 32 * 4);
    else if (tokens <= 32 * 8 + 1)
        launch(match<8>, 32 * 8);
    else if (tokens <= 32 * 16 + 1)
        launch(match<16>, 32 * 16);
    else
        launch(match<32>, 32 * 32);

    const int64_t blocks = (best.numel() + 255) / 256;
    take_apart<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(cells, best.numel(), tokens, src.mutable_data_ptr<int64_t>(),
                                                                  length.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {src, length};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("rosa_match(Tensor q, Tensor k, int longest) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("rosa_match", TORCH_BOX(&rosa)); }
