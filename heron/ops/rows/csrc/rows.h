// What is done with one row of a table, by `lanes` threads that each take every lanes-th piece of it: the 32 of a warp
// (rows.cu), or one (rows.cpp). Nothing passes between the threads, and no product and sum are fused, so that the
// numbers are the same bit for bit on every device, wherever a row lies.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HERON_ROWS __device__ __forceinline__
#define HERON_ADD(a, b) __fadd_rn(a, b)
#define HERON_SUB(a, b) __fsub_rn(a, b)
#define HERON_MUL(a, b) __fmul_rn(a, b)
#define HERON_DIV(a, b) __fdiv_rn(a, b)
#define HERON_SQRT(a) __fsqrt_rn(a)
#else  // built with -ffp-contract=off
#define HERON_ROWS inline
#define HERON_ADD(a, b) ((a) + (b))
#define HERON_SUB(a, b) ((a) - (b))
#define HERON_MUL(a, b) ((a) * (b))
#define HERON_DIV(a, b) ((a) / (b))
#define HERON_SQRT(a) std::sqrt(a)
#endif

namespace heron_rows {

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    T values[width];
};

// Several pieces are read before the first is written: a row may lie behind a bus.
template <int ahead, typename Piece>
HERON_ROWS void copy_row(const Piece* __restrict__ from, Piece* __restrict__ to, int pieces, int lane, int lanes) {
    for (int begin = lane; begin < pieces; begin += ahead * lanes) {
        Piece held[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            if (begin + i * lanes < pieces) held[i] = from[begin + i * lanes];
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            if (begin + i * lanes < pieces) to[begin + i * lanes] = held[i];
        }
    }
}

HERON_ROWS float widened(float x) { return x; }

HERON_ROWS float widened(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

HERON_ROWS void put(float x, float& place) { place = x; }

HERON_ROWS void put(float x, uint16_t& bf16) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bf16 = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// What AdamW needs beside the numbers of a row in its t-th step, rounded to fp32 as PyTorch rounds them.
struct Step {
    float size, of_v, beta1_rest, beta2, beta2_rest, eps;
};

HERON_ROWS Step step_at(int t, double lr, double beta1, double beta2, double eps) {
    return {static_cast<float>(lr / (1 - pow(beta1, static_cast<double>(t)))),
            static_cast<float>(sqrt(1 - pow(beta2, static_cast<double>(t)))),
            static_cast<float>(1 - beta1),
            static_cast<float>(beta2),
            static_cast<float>(1 - beta2),
            static_cast<float>(eps)};
}

template <int width, int ahead, typename Moment>
HERON_ROWS void adamw_row(float* __restrict__ row, Moment* __restrict__ exp_avg, Moment* __restrict__ exp_avg_sq,
                          const float* __restrict__ gradient, int pieces, const Step& step, int lane, int lanes) {
    auto* rows = reinterpret_cast<Pack<float, width>*>(row);
    auto* ms = reinterpret_cast<Pack<Moment, width>*>(exp_avg);
    auto* vs = reinterpret_cast<Pack<Moment, width>*>(exp_avg_sq);
    const auto* gs = reinterpret_cast<const Pack<float, width>*>(gradient);
    for (int begin = lane; begin < pieces; begin += ahead * lanes) {
        Pack<float, width> p[ahead], g[ahead];
        Pack<Moment, width> m[ahead], v[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int at = begin + i * lanes;
            if (at < pieces) p[i] = rows[at], m[i] = ms[at], v[i] = vs[at], g[i] = gs[at];
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int at = begin + i * lanes;
            if (at >= pieces) break;
#pragma unroll
            for (int j = 0; j < width; ++j) {
                const float d = g[i].values[j], m_old = widened(m[i].values[j]);
                const float m_new = HERON_ADD(m_old, HERON_MUL(step.beta1_rest, HERON_SUB(d, m_old)));
                const float v_new = HERON_ADD(HERON_MUL(widened(v[i].values[j]), step.beta2),
                                              HERON_MUL(HERON_MUL(step.beta2_rest, d), d));
                const float scale = HERON_ADD(HERON_DIV(HERON_SQRT(v_new), step.of_v), step.eps);
                put(m_new, m[i].values[j]);
                put(v_new, v[i].values[j]);
                p[i].values[j] = HERON_SUB(p[i].values[j], HERON_DIV(HERON_MUL(m_new, step.size), scale));
            }
            rows[at] = p[i], ms[at] = m[i], vs[at] = v[i];
        }
    }
}

}  // namespace heron_rows
