// x times each token's row, on a GPU, and both gradients; and the gradient of rows that were looked up. A row's gradient
// is a sum over its tokens, which lie anywhere:
// the tokens are taken in the order of their rows, in pieces of one length, so that a token of every other place in
// the text keeps no block waiting. What a piece has of a row that goes on in the next is put aside, and added up by
// a second kernel, always in one order.

#include <cuda_bf16.h>

#include <algorithm>

#include "../../csrc/operator.h"

namespace {

constexpr int kWidth = 8;    // numbers of a thread
constexpr int kPiece = 16;   // tokens
constexpr int kAtOnce = 4;   // tokens that are read before the first is used
constexpr int kThreads = 1024;  // of a block, at most

__device__ __forceinline__ void read(const float* from, float (&to)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
}

__device__ __forceinline__ void read(const BFloat16* from, float (&to)[kWidth]) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}

__device__ __forceinline__ void write(float* to, const float (&from)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4)
        *reinterpret_cast<float4*>(to + i) = float4{from[i], from[i + 1], from[i + 2], from[i + 3]};
}

__device__ __forceinline__ void write(BFloat16* to, const float (&from)[kWidth]) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
        word[i] = *reinterpret_cast<const unsigned*>(&two);
    }
    *reinterpret_cast<uint4*>(to) = uint4{word[0], word[1], word[2], word[3]};
}

template <typename T, typename Row>
__global__ void gate(const T* x, const Row* rows, const int64_t* row, T* out, int64_t packs, int packs_a_token) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += stride) {
        const int64_t token = i / packs_a_token;
        float a[kWidth], b[kWidth];
        read(x + i * kWidth, a);
        read(rows + (row[token] * packs_a_token + i % packs_a_token) * kWidth, b);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) a[v] *= b[v];
        write(out + i * kWidth, a);
    }
}

template <typename T, typename Row>
struct Gradients {
    const T *d, *x;                     // (tokens, channels); x is null of rows that were looked up
    const float* rows;                  // (n_rows, channels); null likewise
    const int64_t *order, *row;         // (tokens,): the tokens in the order of their rows, and these rows
    T* d_x;                             // (tokens, channels); null likewise
    Row* d_rows;                        // (n_rows, channels)
    float* aside;                       // (pieces, 2, channels)
    int64_t tokens, n_rows;
    int channels;
};

// Whether the row of place `i` in the order is that of the place before.
__device__ __forceinline__ bool goes_on(const int64_t* row, int64_t i) { return i > 0 && row[i - 1] == row[i]; }

template <bool gated, typename T, typename Row>
__global__ void __launch_bounds__(kThreads) gradients(const Gradients<T, Row> p) {
    const int c = threadIdx.x * kWidth;
    if (c >= p.channels) return;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPiece, end = min(first + kPiece, p.tokens);
    float sum[kWidth] = {};
    bool begun_here = !goes_on(p.row, first);
    const auto clear = [&](int64_t from, int64_t to) {  // rows without tokens
        const float zeros[kWidth] = {};
        for (int64_t r = from; r < to; ++r) write(p.d_rows + r * p.channels + c, zeros);
    };
    for (int64_t i = first; i < end; i += kAtOnce) {
        float d[kAtOnce][kWidth], x[kAtOnce][kWidth], gates[kAtOnce][kWidth];
        int64_t token[kAtOnce], row[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int64_t at = min(i + k, end - 1);
            token[k] = p.order[at] * p.channels + c, row[k] = p.row[at];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            read(p.d + token[k], d[k]);
            if constexpr (gated) read(p.x + token[k], x[k]), read(p.rows + row[k] * p.channels + c, gates[k]);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int64_t at = i + k;
            if (at >= end) break;
            if (!goes_on(p.row, at)) clear(at > 0 ? p.row[at - 1] + 1 : 0, row[k]);
#pragma unroll
            for (int v = 0; v < kWidth; ++v) sum[v] += gated ? d[k][v] * x[k][v] : d[k][v];
            if constexpr (gated) {
#pragma unroll
                for (int v = 0; v < kWidth; ++v) d[k][v] *= gates[k][v];
                write(p.d_x + token[k], d[k]);
            }
            const bool ends = at + 1 == p.tokens || p.row[at + 1] != row[k];
            if (!ends && at + 1 < end) continue;
            if (begun_here && ends)
                write(p.d_rows + row[k] * p.channels + c, sum);
            else
                write(p.aside + (static_cast<int64_t>(blockIdx.x) * 2 + begun_here) * p.channels + c, sum);
            begun_here = true;
#pragma unroll
            for (int v = 0; v < kWidth; ++v) sum[v] = 0;
        }
    }
    // Those behind the last row with a token may be many: each block has some.
    for (int64_t r = p.row[p.tokens - 1] + 1 + blockIdx.x; r < p.n_rows; r += gridDim.x) clear(r, r + 1);
}

// The row with which this block's piece ends, if it began there and goes on.
template <typename T, typename Row>
__global__ void __launch_bounds__(kThreads) add_up(const Gradients<T, Row> p) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPiece, end = first + kPiece;
    if (end >= p.tokens || !goes_on(p.row, end)) return;
    const int64_t row = p.row[end];
    if (p.row[first] == row && goes_on(p.row, first)) return;
    int64_t last = end, beyond = p.tokens;  // the row's last place is in [last, beyond)
    while (beyond - last > 1) {
        const int64_t middle = (last + beyond) / 2;
        (p.row[middle] == row ? last : beyond) = middle;
    }
    const int c = threadIdx.x * kWidth;
    if (c >= p.channels) return;
    float sum[kWidth], more[kWidth];
    read(p.aside + (static_cast<int64_t>(blockIdx.x) * 2 + 1) * p.channels + c, sum);
#pragma unroll 4
    for (int64_t piece = blockIdx.x + 1; piece <= last / kPiece; ++piece) {
        read(p.aside + piece * 2 * p.channels + c, more);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) sum[v] += more[v];
    }
    write(p.d_rows + row * p.channels + c, sum);
}

void check(const Tensor& x, const Tensor& rows) {
    const auto width = rows.size(-1);
    STD_TORCH_CHECK(x.size(-1) == width && width % kWidth == 0 && width <= kThreads * kWidth,
                    "gate_rows: rows as wide as x, 8, 16, ... 8192 numbers");
    STD_TORCH_CHECK(on_one_device(rows, x), "gate_rows: rows must be on the device of x; rows.to(x.device)");
    for (const auto& each : {x, rows})
        STD_TORCH_CHECK(each.is_contiguous() && begins_at_multiple_of(16, each),
                        "gate_rows: tensors must be contiguous and 16-byte aligned");
}

Tensor gate_rows(const Tensor& x, const Tensor& rows, const Tensor& row) {
    check(x, rows);
    STD_TORCH_CHECK(row.numel() * rows.size(1) == x.numel(), "gate_rows: a row for each token");
    const DeviceGuard guard(x.get_device_index());
    auto out = empty_like(x);
    if (x.numel() == 0) return out;
    const int64_t packs = x.numel() / kWidth;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((packs + 255) / 256, 1 << 16));
    with_dtype<float, BFloat16>(x, "gate_rows", [&](auto zero) {
        using scalar_t = decltype(zero);
        with_dtype<float, BFloat16>(rows, "gate_rows, rows", [&](auto zero_row) {
            using row_t = decltype(zero_row);
            gate<<<blocks, 256, 0, current_stream()>>>(
                x.const_data_ptr<scalar_t>(), rows.const_data_ptr<row_t>(), row.const_data_ptr<int64_t>(),
                out.mutable_data_ptr<scalar_t>(), packs, static_cast<int>(rows.size(1) / kWidth));
        });
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return out;
}

template <bool gated, typename T, typename Row>
void start(Gradients<T, Row> p, const Tensor& d, const Tensor& order, const Tensor& row_in_order, Tensor& d_rows) {
    p.tokens = order.numel(), p.n_rows = d_rows.size(0), p.channels = static_cast<int>(d_rows.size(1));
    const int64_t pieces = (p.tokens + kPiece - 1) / kPiece;
    const Tensor aside = empty({pieces, 2, p.channels}, d, ScalarType::Float);
    p.d = d.const_data_ptr<T>(), p.order = order.const_data_ptr<int64_t>(), p.row = row_in_order.const_data_ptr<int64_t>();
    p.d_rows = d_rows.mutable_data_ptr<Row>(), p.aside = aside.mutable_data_ptr<float>();
    const unsigned blocks = static_cast<unsigned>(pieces), threads = (p.channels / kWidth + 31) / 32 * 32;
    gradients<gated><<<blocks, threads, 0, current_stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_up<<<blocks, threads, 0, current_stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> gate_rows_backward(const Tensor& d, const Tensor& x, const Tensor& rows,
                                              const Tensor& order, const Tensor& row_in_order) {
    check(x, rows), check(d, rows);
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float, "gate_rows: rows that get a gradient must be fp32, got ",
                    torch::headeronly::toString(rows.scalar_type()), "; rows.float()");
    STD_TORCH_CHECK(d.scalar_type() == x.scalar_type() && d.numel() == x.numel(), "gate_rows: a gradient like x");
    const DeviceGuard guard(x.get_device_index());
    auto d_x = empty_like(x), d_rows = order.numel() ? empty_like(rows) : zeros_like(rows);
    if (order.numel() == 0) return {d_x, d_rows};
    with_dtype<float, BFloat16>(x, "gate_rows", [&](auto zero) {
        using scalar_t = decltype(zero);
        Gradients<scalar_t, float> p{};
        p.x = x.const_data_ptr<scalar_t>(), p.rows = rows.const_data_ptr<float>();
        p.d_x = d_x.mutable_data_ptr<scalar_t>();
        start<true>(p, d, order, row_in_order, d_rows);
    });
    return {d_x, d_rows};
}

// d: (tokens, width) of rows that were looked up in a table of n_rows. Returns that of the table, in the dtype of d.
Tensor look_up_backward(const Tensor& d, const Tensor& order, const Tensor& row_in_order, int64_t n_rows) {
    check(d, d);
    STD_TORCH_CHECK(d.dim() == 2 && d.size(0) == order.numel(), "look_up: a gradient for each token");
    const DeviceGuard guard(d.get_device_index());
    if (order.numel() == 0) return zeros({n_rows, d.size(1)}, d);
    auto d_rows = empty({n_rows, d.size(1)}, d);
    with_dtype<float, BFloat16>(d, "look_up", [&](auto zero) {
        using scalar_t = decltype(zero);
        start<false>(Gradients<scalar_t, scalar_t>{}, d, order, row_in_order, d_rows);
    });
    return d_rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("gate_rows(Tensor x, Tensor rows, Tensor row) -> Tensor");
    library.def(
        "gate_rows_backward(Tensor d, Tensor x, Tensor rows, Tensor order, Tensor row_in_order) -> (Tensor, Tensor)");
    library.def("look_up_backward(Tensor d, Tensor order, Tensor row_in_order, int n_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("gate_rows", TORCH_BOX(&gate_rows));
    library.impl("gate_rows_backward", TORCH_BOX(&gate_rows_backward));
    library.impl("look_up_backward", TORCH_BOX(&look_up_backward));
}
