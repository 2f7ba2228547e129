// Gradients of the soft suffix carrier without its T x T tensors in memory of all streams at once: one stream after another,
// along the distances c = t - 1 - u, where the recurrence over t is a product of rows. README.md has the equations.

#include "streams.h"

#include <cmath>
#include <cstring>

namespace {

constexpr int32_t LANES = 8;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

constexpr float SHARPNESS = 2.41421356f;  // sqrt 2 + 1
constexpr float NO_MATCH_LOGIT = 0.5f;

INLINE Unaligned& at(float* row, int32_t c) { return *reinterpret_cast<Unaligned*>(row + c); }
INLINE Vector at(const float* row, int32_t c) { return *reinterpret_cast<const Unaligned*>(row + c); }

INLINE float sum(Vector x) {
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

INLINE float greatest(Vector x) {
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
    return *std::max_element(lanes, lanes + LANES);
}

// e^x for x <= 0: 2^n times a polynomial in the rest, whose coefficients are powers of ln 2 over factorials.
INLINE Vector exponential(Vector x) {
    const Vector scaled = x * 1.44269504f;
    const Vector least = Vector{} - 126.0f;
    const Vector y = scaled < least ? least : scaled;
    const Integers n = __builtin_convertvector(y, Integers);
    const Vector f = y - __builtin_convertvector(n, Vector);  // in (-1, 0]
    Vector power = Vector{} + 1.5403530e-4f;
    power = power * f + 1.3333558e-3f;
    power = power * f + 9.6181291e-3f;
    power = power * f + 5.5504109e-2f;
    power = power * f + 2.4022651e-1f;
    power = power * f + 6.9314718e-1f;
    power = power * f + 1.0f;
    const Integers exponent = (n + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return power * scale;
}

struct Problem {
    const uint8_t *q, *k, *v;        // (n_streams, length)
    const float* slope;              // (n_streams, length, n_bits): what half a step of each bit of the value is worth
    const float *middle, *no_match;  // (n_streams, length): what a value without its bits is worth, and no match
    int64_t n_streams;
    int32_t length, n_bits;
    float *dq, *dk, *dv;  // (n_streams, length, n_bits): by the signs 1 and -1
};

// One row t of the carrier: c < n is the match that ended c + 1 tokens ago.
struct Row {
    int32_t t, n, n_bits;
    const float *g, *before, *allowed;
    float *length, *root, *weight, *d_length;
    const float* value[8];  // of each bit, after that end
    float* d_value[8];
    const float* slope;
    float middle, no_match;
};

FOR_EACH_CPU void forward_row(const Row& r) {
    const float crowd = std::log(static_cast<float>(std::max(r.t, 1)));
    for (int32_t c = 0; c < r.n; c += LANES) at(r.length, c) = at(r.g, c) * (1.0f + at(r.before, c));
    for (int32_t c = 0; c < r.n; c += LANES)
        for (int32_t lane = 0; lane < LANES; ++lane) r.root[c + lane] = std::sqrt(1.0f + r.length[c + lane]);
    Vector most = Vector{} + NO_MATCH_LOGIT;
    for (int32_t c = 0; c < r.n; c += LANES) {
        const Vector logit = SHARPNESS * (at(r.root, c) - 1.0f) - crowd;
        most = logit > most ? logit : most;
        at(r.weight, c) = logit;
    }
    const float top = greatest(most);
    const float no_route = std::exp(NO_MATCH_LOGIT - top);
    Vector total = {}, worth = {};
    for (int32_t c = 0; c < r.n; c += LANES) {
        const Vector e = exponential(at(r.weight, c) - top) * at(r.allowed, c);
        Vector w = Vector{} + r.middle;
        for (int32_t b = 0; b < r.n_bits; ++b) w += r.slope[b] * at(r.value[b], c);
        at(r.weight, c) = e;
        at(r.d_length, c) = w;
        total += e;
        worth += e * w;
    }
    const float share = 1.0f / (sum(total) + no_route);
    const float mean = (sum(worth) + no_route * r.no_match) * share;
    for (int32_t c = 0; c < r.n; c += LANES) {
        const Vector p = at(r.weight, c) * share;
        at(r.d_length, c) = p * (at(r.d_length, c) - mean) * (0.5f * SHARPNESS) / at(r.root, c);
        for (int32_t b = 0; b < r.n_bits; ++b) at(r.d_value[b], c) += r.slope[b] * p;
    }
}

struct BackRow {
    int32_t n, n_bits;
    const float *g, *before, *d_length;
    float* carry;
    const float* key[8];
    float* d_key[8];
    const float* query;
    float* d_query;
};

FOR_EACH_CPU void backward_row(const BackRow& r) {
    Vector d_query[8] = {};
    for (int32_t c = 0; c < r.n; c += LANES) {
        const Vector along = (at(r.d_length, c) + at(r.carry, c)) * at(r.g, c);
        const Vector d_log = along * (1.0f + at(r.before, c));
        at(r.carry, c) = along;
        for (int32_t b = 0; b < r.n_bits; ++b) {
            d_query[b] += d_log * at(r.key[b], c);
            at(r.d_key[b], c) += d_log * r.query[b];
        }
    }
    for (int32_t b = 0; b < r.n_bits; ++b) r.d_query[b] = sum(d_query[b]);
}

class Carrier {
  public:
    explicit Carrier(const Problem& p)
        : p_(p),
          width_(p.length + 2 * LANES),
          g_((size_t{1} << p.n_bits) * width_),
          length_(size_t(p.length + 1) * width_),
          d_length_(size_t(p.length) * width_),
          root_(width_),
          weight_(width_),
          carry_(width_),
          allowed_(width_ + LANES),
          keys_(size_t(p.n_bits) * width_),
          values_(keys_),
          d_keys_(keys_),
          d_values_(keys_) {
        std::fill_n(allowed_.begin(), p.length, 1.0f);
    }

    void run(int64_t stream) {
        const int32_t length = p_.length, bits = p_.n_bits;
        const int64_t offset = stream * length;
        const uint8_t *q = p_.q + offset, *k = p_.k + offset, *v = p_.v + offset;
        const float rate = 1.5f / bits;

        for (std::vector<float>* zeroed : {&carry_, &d_keys_, &d_values_}) std::fill(zeroed->begin(), zeroed->end(), 0.0f);
        for (int32_t u = 0; u < length; ++u) {  // from the right to the left: the latest first
            const int32_t place = length - 1 - u;
            for (int32_t symbol = 0; symbol < 1 << bits; ++symbol)
                g_[size_t(symbol) * width_ + place] = std::exp(-2 * rate * __builtin_popcount(symbol ^ k[u]));
            for (int32_t b = 0; b < bits; ++b) {
                keys_[size_t(b) * width_ + place] = k[u] >> b & 1 ? 1.0f : -1.0f;
                values_[size_t(b) * width_ + place] = v[u] >> b & 1 ? 1.0f : -1.0f;
            }
        }

        // Row t of the lengths is kept at t + 1; the row before the first stays zero.
        for (int32_t t = 0; t < length; ++t) {
            Row row{};
            row.t = row.n = t;
            row.n_bits = bits;
            row.g = g_.data() + size_t(q[t]) * width_ + length - t;
            row.before = length_.data() + size_t(t) * width_;
            row.length = length_.data() + size_t(t + 1) * width_;
            row.allowed = allowed_.data() + length - t;
            row.root = root_.data();
            row.weight = weight_.data();
            row.d_length = d_length_.data() + size_t(t) * width_;
            for (int32_t b = 0; b < bits; ++b) {
                row.value[b] = values_.data() + size_t(b) * width_ + length - 1 - t;
                row.d_value[b] = d_values_.data() + size_t(b) * width_ + length - 1 - t;
            }
            row.slope = p_.slope + (offset + t) * bits;
            row.middle = p_.middle[offset + t];
            row.no_match = p_.no_match[offset + t];
            forward_row(row);
        }
        for (int32_t t = length - 1; t >= 0; --t) {
            float query[8];
            for (int32_t b = 0; b < bits; ++b) query[b] = rate * (q[t] >> b & 1 ? 1.0f : -1.0f);
            BackRow row{};
            row.n = t;
            row.n_bits = bits;
            row.g = g_.data() + size_t(q[t]) * width_ + length - t;
            row.before = length_.data() + size_t(t) * width_;
            row.d_length = d_length_.data() + size_t(t) * width_;
            row.carry = carry_.data();
            for (int32_t b = 0; b < bits; ++b) {
                row.key[b] = keys_.data() + size_t(b) * width_ + length - t;
                row.d_key[b] = d_keys_.data() + size_t(b) * width_ + length - t;
            }
            row.query = query;
            row.d_query = p_.dq + (offset + t) * bits;
            backward_row(row);
            for (int32_t b = 0; b < bits; ++b) row.d_query[b] *= rate;
        }
        for (int32_t u = 0; u < length; ++u)
            for (int32_t b = 0; b < bits; ++b) {
                p_.dk[(offset + u) * bits + b] = d_keys_[size_t(b) * width_ + length - 1 - u];
                p_.dv[(offset + u) * bits + b] = d_values_[size_t(b) * width_ + length - 1 - u];
            }
    }

  private:
    const Problem& p_;
    const int32_t width_;
    std::vector<float> g_, length_, d_length_, root_, weight_, carry_, allowed_, keys_, values_, d_keys_, d_values_;
};

}  // namespace

// n_streams >= 1, length >= 1, n_bits <= 8, symbols < 2^n_bits. Returns 0, or 1 when there was not enough memory.
extern "C" int heron_rosa_soft(const uint8_t* q, const uint8_t* k, const uint8_t* v, const float* slope,
                               const float* middle, const float* no_match, int64_t n_streams, int32_t length,
                               int32_t n_bits, int64_t n_threads, float* dq, float* dk, float* dv) {
    const Problem problem{q, k, v, slope, middle, no_match, n_streams, length, n_bits, dq, dk, dv};
    return !run_streams<Carrier>(problem, n_threads);
}
