// One token of some sequences through a whole network on a CPU. Nearly all of its time goes into reading the matrices, so
// each is read once for all sequences, by threads that share out its rows and meet at a barrier behind each product.
//
// A sum of products is made in one order, whatever sequences are computed beside it and however many threads there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX2__  // AVX-512 says so too
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kUnroll = 2;  // vectors of a row that are under way at once
#ifdef __AVX512F__          // how many registers there are
constexpr int kTogether = 4, kRowsTogether = 2, kFewRows = 4;
#else
constexpr int kTogether = 2, kRowsTogether = 1, kFewRows = 1;
#endif
// kRowsTogether rows of a matrix are multiplied at once with kTogether sequences. With one sequence it is row after row:
// that reads the matrix from its begin to its end, which is what the processor's own prefetching is made for. Rows in 4
// bits that are shorter than kShort bytes are the exception, kFewRows at once: what comes behind a row takes its time.
constexpr int kShort = 1024;
constexpr int kAhead = 8192;      // bytes of a matrix that are asked for before they are needed
constexpr int kShare = 65536;     // bytes of a matrix that a thread takes at a time
constexpr int kGroup = 64;        // codes of a row that share a scale
constexpr float kDecayScale = 0.60653065971263342f;  // e^-0.5
constexpr float kLeastNorm = 1e-12f;

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));

struct Bf16 {
    uint16_t bits;
};

Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// GCC 12 makes of a conversion to numbers of twice the size one instruction or a few, of any larger step a loop.
Vector load(const Bf16* from) {
    using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
    using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
#ifdef __AVX512F__
    const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16;
#else
    const Words words = __builtin_convertvector(halves, Words) << 16;
#endif
    Vector v;
    std::memcpy(&v, &words, sizeof v);
    return v;
}

using Codes = int8_t __attribute__((vector_size(kLanes)));

Vector widened(Codes codes) {
#ifdef __AVX512F__
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#else
    using Halves = int16_t __attribute__((vector_size(kLanes * sizeof(int16_t))));
    using Words = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(codes, Halves), Words), Vector);
#endif
}

Vector load(const int8_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return widened(codes);
}

// The first `some` numbers, and zeros.
template <typename T>
Vector load(const T* from, int some) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, from, some * sizeof(T));
    return load(lanes);
}

float value(float x) { return x; }

float value(Bf16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
}

void set(float& to, float x) { to = x; }

void set(Bf16& to, float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    if (x != x)
        word |= 0x00400000u;  // NaN stays NaN
    else
        word += 0x7fffu + (word >> 16 & 1);
    to.bits = static_cast<uint16_t>(word >> 16);
}

// x in all lanes.
Vector spread(Bf16 x) {
#ifdef __AVX512F__
    return (Vector)(_mm512_set1_epi32(x.bits) << 16);
#else
    return value(x) - Vector{};
#endif
}

// By halves: the upper one is added to the lower one.
float sum(const Vector& v) {
    using Eight = float __attribute__((vector_size(8 * sizeof(float))));
    using Four = float __attribute__((vector_size(4 * sizeof(float))));
    Eight eights[2];
    std::memcpy(eights, &v, sizeof v);
    eights[0] += eights[1];
    Four fours[2];
    std::memcpy(fours, eights, sizeof fours);
    fours[0] += fours[1];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// a b + c, rounded in one way wherever the compiler puts it.
float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// A matrix from one of its rows on: n numbers each, fp32 or bf16.
template <typename T>
struct Rows {
    static constexpr int kShortRows = 1;
    const T* numbers;
    int n;

    Rows from(int64_t row) const { return {numbers + row * n, n}; }
    int bytes() const { return n * static_cast<int>(sizeof(T)); }  // of a row
};

// The codes of a group in 8 bits, each standing for itself.
class Bytes {
  public:
    static constexpr int kBytes = kGroup, kShortRows = 1;

    explicit Bytes(const int8_t*) {}

    Vector part(const char* group, int which) const {
        return load(reinterpret_cast<const int8_t*>(group) + which * kLanes);
    }
};

// In 4 bits: word j of a group has the codes of its numbers j, 16 + j, 32 + j and 48 + j, which stand for one of 16 levels.
class Nibbles {
  public:
    static constexpr int kBytes = kGroup / 2, kShortRows = kFewRows;

#ifdef __AVX512F__
    explicit Nibbles(const int8_t* levels) : levels_(load(levels)) {}

    Vector part(const char* group, int which) const {
        __m256i words;
        std::memcpy(&words, group, sizeof words);
        const __m512i codes = _mm512_srli_epi32(_mm512_cvtepu16_epi32(words), 4 * which);
        return (Vector)_mm512_permutexvar_ps(codes, (__m512)levels_);  // by the last 4 bits
    }

  private:
    Vector levels_;
#elif defined __AVX2__
    explicit Nibbles(const int8_t* levels) { std::memcpy(&levels_, levels, sizeof levels_); }

    Vector part(const char* group, int which) const {
        using Words = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
        Words words;
        std::memcpy(&words, group, sizeof words);
        const auto codes = __builtin_convertvector(words >> 4 * which & 15, Codes);
        return widened((Codes)_mm_shuffle_epi8((__m128i)levels_, (__m128i)codes));
    }

  private:
    Codes levels_;
#else
    explicit Nibbles(const int8_t* levels) { std::copy(levels, levels + 16, levels_); }

    Vector part(const char* group, int which) const {
        uint16_t words[kLanes];
        float found[kLanes];
        std::memcpy(words, group, sizeof words);
        for (int lane = 0; lane < kLanes; ++lane) found[lane] = levels_[words[lane] >> 4 * which & 15];
        return load(found);
    }

  private:
    float levels_[16];
#endif
};

// A matrix of codes: a number is what its code stands for, times the scale of its group. n is a multiple of kGroup.
template <typename Coding>
struct CodedRows {
    static constexpr int kShortRows = Coding::kShortRows;
    const char* codes;
    const Bf16* scales;
    Coding coding;
    int n;

    CodedRows from(int64_t row) const {
        return {codes + row * bytes(), scales + row * (n / kGroup), coding, n};
    }
    int bytes() const { return n / kGroup * Coding::kBytes; }
};

// sums[r][i] = row r of the weight . x[i]; vectors of x lie n apart too.
template <int rows, int together, typename T>
void dots(const Rows<T>& weight, const float* x, float (&sums)[rows][together]) {
    const int n = weight.n;
    Vector parts[rows][together][kUnroll] = {};
    int at = 0;
    for (; at + kUnroll * kLanes <= n; at += kUnroll * kLanes) {
        for (int r = 0; r < rows; ++r) {
            const T* here = weight.numbers + int64_t{r} * n + at;
            for (int line = 0; line < kUnroll * kLanes * static_cast<int>(sizeof(T)); line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(here) + kAhead + line);
            for (int u = 0; u < kUnroll; ++u) {
                const Vector w = load(here + u * kLanes);
                for (int i = 0; i < together; ++i) parts[r][i][u] += w * load(x + int64_t{i} * n + at + u * kLanes);
            }
        }
    }
    for (; at < n; at += kLanes) {
        const int some = std::min(kLanes, n - at);
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < together; ++i)
                parts[r][i][0] += load(weight.numbers + int64_t{r} * n + at, some) * load(x + int64_t{i} * n + at, some);
    }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < together; ++i) sums[r][i] = sum(parts[r][i][0] + parts[r][i][1]);
}

template <int rows, int together, typename Coding>
void dots(const CodedRows<Coding>& weight, const float* x, float (&sums)[rows][together]) {
    const int n = weight.n, groups = n / kGroup;
    Vector parts[rows][together] = {};
    for (int g = 0; g < groups; ++g) {
        for (int r = 0; r < rows; ++r) {
            const char* here = weight.codes + (int64_t{r} * groups + g) * Coding::kBytes;
            const Vector scale = spread(weight.scales[r * groups + g]);
            if (g * Coding::kBytes % 64 == 0) __builtin_prefetch(here + kAhead);
            for (int i = 0; i < together; ++i) {
                const float* with = x + int64_t{i} * n + g * kGroup;
                Vector sum = weight.coding.part(here, 0) * load(with);
                for (int k = 1; k < kGroup / kLanes; ++k) sum += weight.coding.part(here, k) * load(with + k * kLanes);
                parts[r][i] += scale * sum;
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < together; ++i) sums[r][i] = sum(parts[r][i]);
}

// A point that all threads reach before any goes on.
class Barrier {
  public:
    // Before any of them comes.
    void set_threads(int threads) { threads_ = threads; }

    void wait() {
        if (threads_ == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round;)
            if (++spins > 2000) std::this_thread::yield();  // somebody else may need this core
    }

  private:
    int threads_ = 1;
    std::atomic<int> arrived_{0}, round_{0};
};

enum Activation { kNone, kTanh, kSigmoid, kSquaredRelu };

float activated(float x, Activation activation) {
    switch (activation) {
        case kTanh: return std::tanh(x);
        case kSigmoid: return sigmoid(x);
        case kSquaredRelu: return x > 0.0f ? x * x : x * 0.0f;  // NaN stays NaN
        default: return x;
    }
}

}  // namespace

extern "C" {

// What cpu.py fills in; all contiguous.
struct HeronMatrix {
    const void* numbers;   // (out, in), fp32 or bf16; codes where there are scales
    const void* scales;    // null, or (out, in / kGroup) in bf16
    const int8_t* levels;  // null, or what each of 16 codes of 4 bits stands for
};

// Vectors of channels are fp32, shifts and matrices without scales fp32 or bf16.
struct HeronLayer {
    const float *norm1_weight, *norm1_bias, *mix;  // mix: (6, C), of r, k, v, w, a, g
    HeronMatrix receptance, key, value, output;
    const void* down[4];   // (rank, C) of values, decay, iclr, gate
    const void* up[4];     // (C, rank)
    const float* bias[3];  // of values (null in layer 0), decay, iclr
    int32_t rank[4];
    const float *k_k, *k_a, *r_k, *head_norm_weight, *head_norm_bias;
    const float *norm2_weight, *norm2_bias, *channel_mix;
    HeronMatrix ffn_key, ffn_value;
    void *att_shift, *ffn_shift;  // (all sequences, C)
    float* wkv;                   // (all sequences, H, N, N)
};

// R rows of tables, of which lengths of matches share some: rows[length], from 1 on, and 0 for a length of 0.
struct HeronMemory {
    const float *scale, *length, *copy;  // (K, C), (K, R, C), (K, R)
    const int32_t* rows;                 // (max_match + 1,)
    int32_t n_matches, n_rows, max_match;
};

// What followed an earlier occurrence of the last `length` tokens.
struct HeronMatch {
    int64_t predicted, length;
};

struct HeronNetwork {
    const void* embedding;  // (V, C), fp32 or bf16
    const float *first_norm_weight, *first_norm_bias;
    const HeronLayer* layers;
    const float *norm_weight, *norm_bias;
    HeronMatrix head;  // (V, C)
    HeronMemory memory;
    int32_t n_layer, channels, heads, hidden, vocab;
    int32_t in_half;      // shifts and matrices without scales are bf16
    int32_t gates_hidden; // the gates are of the hidden channels, not of the output
    float norm_eps, head_norm_eps;
};

}  // extern "C"

namespace {

// y = add + factor activation(weight x) for each sequence; where it adds onto itself, y takes the place of add.
struct Product {
    HeronMatrix weight;  // (out, in)
    int out, in;
    const float* x;  // (n, in)
    float* y;        // (n, out)
    Activation activation = kNone;
    const float* add = nullptr;     // (out,)
    const float* factor = nullptr;  // (n, out)
    bool onto_itself = false;
};

float dot(const float* a, const float* b, int n) {
    Vector sums = {};
    int at = 0;
    for (; at + kLanes <= n; at += kLanes) sums += load(a + at) * load(b + at);
    if (at < n) sums += load(a + at, n - at) * load(b + at, n - at);
    return sum(sums);
}

// y = x less its mean, over its deviation. x and y may be the same.
void normalise(const float* x, float eps, int n, float* y) {
    Vector sums = {};
    int at = 0;
    for (; at + kLanes <= n; at += kLanes) sums += load(x + at);
    if (at < n) sums += load(x + at, n - at);
    const float mean = sum(sums) / n;
    for (int i = 0; i < n; ++i) y[i] = x[i] - mean;
    const float scale = 1.0f / std::sqrt(dot(y, y, n) / n + eps);
    for (int i = 0; i < n; ++i) y[i] *= scale;
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int n, float* y) {
    normalise(x, eps, n, y);
    for (int i = 0; i < n; ++i) y[i] = y[i] * weight[i] + bias[i];
}

template <typename T>
class Step {
  public:
    Step(const HeronNetwork& net, int n, const int32_t* sequences, const int64_t* tokens, const HeronMatch* recalled,
         const float* gates, float* logits)
        : net_(net), n_(n), sequences_(sequences), tokens_(tokens), recalled_(recalled), gates_(gates), logits_(logits) {
        const int64_t C = net.channels;
        int ranks = 0;
        for (int l = 0; l < net.n_layer; ++l) {
            const auto& rank = net.layers[l].rank;
            ranks = std::max(ranks, rank[0] + rank[1] + rank[2] + rank[3]);
        }
        turns_ = std::make_unique<std::atomic<int>[]>(kProducts * net.n_layer + 1);
        for (int i = 0; i <= kProducts * net.n_layer; ++i) turns_[i] = 0;
        room_ = std::make_unique<float[]>(n * (17 * C + ranks + net.hidden));
        float* next = room_.get();
        const auto take = [&](int64_t width) { return std::exchange(next, next + n * width); };
        x_ = take(C), normed_ = take(C), mixed_ = take(6 * C), r_ = take(C), k_ = take(C), v_ = take(C), y_ = take(C);
        v_first_ = take(C), up_ = take(4 * C), down_ = take(ranks), hidden_ = take(net.hidden);
    }

    void set_threads(int threads) {
        threads_ = threads;
        barrier_.set_threads(threads);
    }

    // To be called by each of the threads, which are numbered.
    void run(int thread) {
        embed(thread);
        for (int l = 0; l < net_.n_layer; ++l) layer(thread, net_.layers[l], l);
        for (int i = thread; i < n_; i += threads_)
            layer_norm(x_ + i * C(), net_.norm_weight, net_.norm_bias, net_.norm_eps, net_.channels, normed_ + i * C());
        barrier_.wait();
        multiply(turns_[kProducts * net_.n_layer], {{net_.head, net_.vocab, net_.channels, normed_, logits_}});
        if (!recalled_) return;
        barrier_.wait();
        raise(thread);
    }

  private:
    int64_t C() const { return net_.channels; }

    // The first row of the tables of memory's match k that stands for a length.
    int64_t row_of(int k, int64_t length) const { return k * int64_t{net_.memory.n_rows} + net_.memory.rows[length] - 1; }

    // x_ = norm(embedding[token] + for each match: embedding[predicted] scale + length), for this thread's sequences.
    void embed(int thread) {
        const HeronMemory& memory = net_.memory;
        const T* rows = static_cast<const T*>(net_.embedding);
        for (int i = thread; i < n_; i += threads_) {
            float* x = x_ + i * C();
            const T* own = rows + tokens_[i] * C();
            for (int c = 0; c < net_.channels; ++c) x[c] = value(own[c]);
            for (int k = 0; k < (recalled_ ? memory.n_matches : 0); ++k) {
                const HeronMatch& match = recalled_[i * memory.n_matches + k];
                if (match.length == 0) continue;
                const T* predicted = rows + match.predicted * C();
                const float *scale = memory.scale + k * C(), *length = memory.length + row_of(k, match.length) * C();
                for (int c = 0; c < net_.channels; ++c) x[c] += value(predicted[c]) * scale[c] + length[c];
            }
            layer_norm(x, net_.first_norm_weight, net_.first_norm_bias, net_.norm_eps, net_.channels, x);
        }
    }

    // Adds what memory does to the logits of what its matches predict, for this thread's sequences.
    void raise(int thread) {
        const HeronMemory& memory = net_.memory;
        for (int i = thread; i < n_; i += threads_) {
            for (int k = 0; k < memory.n_matches; ++k) {
                const HeronMatch& match = recalled_[i * memory.n_matches + k];
                if (match.length > 0)
                    logits_[i * int64_t{net_.vocab} + match.predicted] += memory.copy[row_of(k, match.length)];
            }
        }
    }

    void layer(int thread, const HeronLayer& w, int number) {
        const int c = net_.channels;
        const int64_t part = n_ * C();  // of mixed_ and up_: one of their tensors
        std::atomic<int>* turn = &turns_[kProducts * number];
        mix(thread, w.norm1_weight, w.norm1_bias, w.mix, 6, w.att_shift);
        barrier_.wait();
        const float *x_r = mixed_, *x_k = x_r + part, *x_v = x_k + part, *x_w = x_v + part, *x_a = x_w + part, *x_g = x_a + part;
        float* down[4] = {down_};
        for (int i = 1; i < 4; ++i) down[i] = down[i - 1] + n_ * w.rank[i - 1];
        multiply(*turn++, {{w.receptance, c, c, x_r, r_},
                          {w.key, c, c, x_k, k_},
                          {w.value, c, c, x_v, v_},
                          {{w.down[0]}, w.rank[0], c, x_v, down[0]},
                          {{w.down[1]}, w.rank[1], c, x_w, down[1], kTanh},
                          {{w.down[2]}, w.rank[2], c, x_a, down[2]},
                          {{w.down[3]}, w.rank[3], c, x_g, down[3], kSigmoid}});
        barrier_.wait();
        multiply(*turn++, {{{w.up[0]}, c, w.rank[0], down[0], up_, kNone, w.bias[0]},
                          {{w.up[1]}, c, w.rank[1], down[1], up_ + part, kNone, w.bias[1]},
                          {{w.up[2]}, c, w.rank[2], down[2], up_ + 2 * part, kNone, w.bias[2]},
                          {{w.up[3]}, c, w.rank[3], down[3], up_ + 3 * part}});
        barrier_.wait();
        const int size = c / net_.heads;
        for (int i = thread; i < n_ * net_.heads; i += threads_) head(w, number == 0, i / net_.heads, i % net_.heads, size);
        barrier_.wait();
        multiply(*turn++, {{w.output, c, c, y_, x_, kNone, nullptr, nullptr, true}});
        barrier_.wait();
        mix(thread, w.norm2_weight, w.norm2_bias, w.channel_mix, 1, w.ffn_shift);
        barrier_.wait();
        const float* gates = gates_ ? gates_ + number * n_ * int64_t{net_.gates_hidden ? net_.hidden : c} : nullptr;
        multiply(*turn++, {{w.ffn_key, net_.hidden, c, mixed_, hidden_, kSquaredRelu, nullptr,
                           net_.gates_hidden ? gates : nullptr}});
        barrier_.wait();
        multiply(*turn++, {{w.ffn_value, c, net_.hidden, hidden_, x_, kNone, nullptr,
                           net_.gates_hidden ? nullptr : gates, true}});
        barrier_.wait();
    }

    // mixed_ = norm + (last - norm) mix for each of `mixes`, and then last = norm, for this thread's sequences.
    void mix(int thread, const float* weight, const float* bias, const float* mixes, int n_mixes, void* lasts) {
        for (int i = thread; i < n_; i += threads_) {
            float* now = normed_ + i * C();
            T* last = static_cast<T*>(lasts) + sequences_[i] * C();
            layer_norm(x_ + i * C(), weight, bias, net_.norm_eps, net_.channels, now);
            for (int m = 0; m < n_mixes; ++m) {
                float* to = mixed_ + (int64_t{m} * n_ + i) * C();
                const float* mix = mixes + m * C();
                for (int c = 0; c < net_.channels; ++c) to[c] = now[c] + (value(last[c]) - now[c]) * mix[c];
            }
            for (int c = 0; c < net_.channels; ++c) set(last[c], now[c]);
        }
    }

    // Rows of all these matrices, as many as this thread can get hold of. `turn` counts the shares that are taken.
    void multiply(std::atomic<int>& turn, std::initializer_list<Product> products) {
        const auto next = [&turn] { return turn.fetch_add(1, std::memory_order_relaxed); };
        int number = next(), before = 0;
        const auto take = [&](const Product& p, const auto& weight) {
            constexpr int kShortRows = std::decay_t<decltype(weight)>::kShortRows;
            constexpr int kAtOnce = std::max(kRowsTogether, kShortRows);
            const int rows = std::max(1, kShare / weight.bytes() / kAtOnce) * kAtOnce;
            const int shares = (p.out + rows - 1) / rows;
            for (; number - before < shares; number = next()) {
                const int begin = (number - before) * rows, end = std::min(begin + rows, p.out);
                int i = 0;
                for (; i + kTogether <= n_; i += kTogether)
                    multiply_rows<kRowsTogether, kTogether>(p, weight, begin, end, i);
                for (; i < n_; ++i) {
                    if (weight.bytes() < kShort)
                        multiply_rows<kShortRows, 1>(p, weight, begin, end, i);
                    else
                        multiply_rows<1, 1>(p, weight, begin, end, i);
                }
            }
            before += shares;
        };
        for (const auto& p : products) {
            if (p.weight.levels)
                take(p, coded<Nibbles>(p));
            else if (p.weight.scales)
                take(p, coded<Bytes>(p));
            else
                take(p, Rows<T>{static_cast<const T*>(p.weight.numbers), p.in});
        }
    }

    template <typename Coding>
    static CodedRows<Coding> coded(const Product& p) {
        const auto& [numbers, scales, levels] = p.weight;
        return {static_cast<const char*>(numbers), static_cast<const Bf16*>(scales), Coding(levels), p.in};
    }

    template <int rows, int together, typename Weight>
    static void multiply_rows(const Product& p, const Weight& weight, int begin, int end, int i) {
        const float* x = p.x + int64_t{i} * p.in;
        for (; begin + rows <= end; begin += rows) {
            float sums[rows][together];
            dots(weight.from(begin), x, sums);
            for (int r = 0; r < rows; ++r)
                for (int k = 0; k < together; ++k) put(p, i + k, begin + r, sums[r][k]);
        }
        if constexpr (rows > 1) multiply_rows<1, together>(p, weight, begin, end, i);
    }

    static void put(const Product& p, int64_t i, int64_t j, float sum) {
        float& y = p.y[i * p.out + j];
        const float factor = p.factor ? p.factor[i * p.out + j] : 1.0f;
        const float add = p.onto_itself ? y : p.add ? p.add[j] : 0.0f;
        y = multiply_add(activated(sum, p.activation), factor, add);
    }

    // Gates, WKV7, norm and bonus of one head of one sequence, as heron.ops.head_step has them.
    void head(const HeronLayer& w, bool is_first, int64_t i, int number, int size) {
        const int64_t at = i * C() + number * size, part = n_ * C();
        const int channel = number * size;
        const float *r = r_ + at, *value_logits = up_ + at, *decay_logits = value_logits + part;
        const float *iclr_logits = decay_logits + part, *gate = iclr_logits + part;
        float *k = k_ + at, *v = v_ + at, *y = y_ + at;
        float decay[kLargestHead], removal[kLargestHead], replaced[kLargestHead], weighted_key[kLargestHead];
        for (int j = 0; j < size; ++j) {
            const float iclr = sigmoid(iclr_logits[j]);
            decay[j] = std::exp(-kDecayScale * sigmoid(decay_logits[j]));
            removal[j] = k[j] * w.k_k[channel + j];
            replaced[j] = iclr;
            k[j] *= 1.0f + (iclr - 1.0f) * w.k_a[channel + j];
            weighted_key[j] = k[j] * w.r_k[channel + j];
            if (is_first)
                v_first_[at + j] = v[j];
            else
                v[j] += (v_first_[at + j] - v[j]) * sigmoid(value_logits[j]);
        }
        const float bonus = dot(r, weighted_key, size);
        const float norm = std::max(std::sqrt(dot(removal, removal, size)), kLeastNorm);
        for (int j = 0; j < size; ++j) removal[j] /= norm, replaced[j] *= removal[j];
        float* state = w.wkv + (sequences_[i] * int64_t{net_.heads} + number) * size * size;
        for (int row = 0; row < size; ++row, state += size) {
            const float removed = -dot(state, removal, size);
            Vector sums = {};
            for (int j = 0; j < size; j += kLanes) {
                const Vector s = load(state + j) * load(decay + j) + removed * load(replaced + j) + v[row] * load(k + j);
                std::memcpy(state + j, &s, sizeof s);
                sums += s * load(r + j);
            }
            y[row] = sum(sums);
        }
        normalise(y, net_.head_norm_eps, size, y);
        for (int j = 0; j < size; ++j) {
            const float normed = y[j] * w.head_norm_weight[channel + j] + w.head_norm_bias[channel + j];
            y[j] = (normed + bonus * v[j]) * gate[j];
        }
    }

    static constexpr int kLargestHead = 256;
    static constexpr int kProducts = 5;  // of a layer, one behind the other

    const HeronNetwork& net_;
    const int n_;
    const int32_t* sequences_;
    const int64_t* tokens_;
    const HeronMatch* recalled_;
    const float* gates_;
    float* logits_;
    int threads_ = 1;
    Barrier barrier_;
    std::unique_ptr<std::atomic<int>[]> turns_;  // of each product
    std::unique_ptr<float[]> room_;
    float *x_, *normed_, *mixed_, *r_, *k_, *v_, *y_, *v_first_, *up_, *down_, *hidden_;
};

template <typename T>
void step(const HeronNetwork& net, int n, const int32_t* sequences, const int64_t* tokens, const HeronMatch* recalled,
          const float* gates, float* logits, int threads) {
    Step<T> step(net, n, sequences, tokens, recalled, gates, logits);
    std::atomic<bool> begun{false};  // not before it is known how many threads there are
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int t = 1; t < threads; ++t) {
            others.emplace_back([&begun, &step, t] {
                while (!begun.load(std::memory_order_acquire)) std::this_thread::yield();
                step.run(t);
            });
        }
    } catch (const std::system_error&) {  // no more threads: those that are there do the work
    }
    step.set_threads(static_cast<int>(others.size()) + 1);
    begun.store(true, std::memory_order_release);
    step.run(0);
    for (auto& other : others) other.join();
}

bool is_known(const HeronNetwork& net, int n, const int64_t* tokens, const HeronMatch* recalled) {
    const auto in = [](int64_t x, int64_t end) { return 0 <= x && x < end; };
    if (!std::all_of(tokens, tokens + n, [&](int64_t token) { return in(token, net.vocab); })) return false;
    return !recalled || std::all_of(recalled, recalled + n * net.memory.n_matches, [&](const HeronMatch& match) {
        return in(match.predicted, net.vocab) && in(match.length, net.memory.max_match + 1);
    });
}

}  // namespace

// sequences: which n of all sequences these are, all different; tokens: (n,) what they read; recalled: (n, K) what memory
// found for these, or null; gates: (L, n, C) or (L, n, hidden) of the tokens' table rows, or null; logits: (n, V).
// Returns 0, or 1, and nothing has changed, for ids or lengths that the network does not know.
extern "C" int heron_token_step(const HeronNetwork* net, int32_t n, const int32_t* sequences, const int64_t* tokens,
                                const HeronMatch* recalled, const float* gates, float* logits, int32_t threads) {
    if (!is_known(*net, n, tokens, recalled)) return 1;
    if (net->in_half)
        step<Bf16>(*net, n, sequences, tokens, recalled, gates, logits, threads);
    else
        step<float>(*net, n, sequences, tokens, recalled, gates, logits, threads);
    return 0;
}
